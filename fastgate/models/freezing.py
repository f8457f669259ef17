"""`freeze`: pack the weights of a patched model for inference on the CPU. `thaw` takes it back."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastgate.errors import ArgumentError, NothingPatched, Unsupported, format_error
from fastgate.models.architectures import find_encoders
from fastgate.models.handle import EncoderHandle, check_module
from fastgate.nn.packed_linear import (
    PackedLinear,
    asks_for_gradients,
    pack_linear,
    unpack_linear,
    without_gradients,
)
from fastgate.nn.plain_modules import is_plain
from fastgate.ops.linear import ONEDNN_DTYPES, Packed, missing_for_onednn, pack_together
from fastgate.runtime.layer import is_skipped, layers_that_mix

M = TypeVar("M", bound=nn.Module)


def freeze(model: M) -> M:
    """Pack the weights of plain Linears for inference on the CPU, in place.

    The outputs stay the same but for rounding. The layers of an encoder of plain modules then run in one
    call. Packed weights replace the parameters, so they can neither go stale nor be trained. A forward in
    training mode raises Unsupported, and so does a backward through the outputs. No parameter's
    `requires_grad` is changed. If none asks for a gradient, the outputs have none. Weights that several
    modules share, and weights that are read otherwise than by a product, stay as they are. The state dict and
    `fastgate.save` hold ordinary weights. Freezing twice changes nothing.

    Args:
        model: A patched model in eval mode, in float32 on the CPU, or in bfloat16 on a CPU with AVX512.

    Returns:
        The model. `fastgate.thaw(model)` gives the Linears back.

    Raises:
        NothingPatched: For a model that is not patched.
        ArgumentError: For a model in training mode or with soft gates.
        Unsupported: For other devices and dtypes, or a torch without oneDNN.
    """
    check_module("freeze", model)
    handles = _handles(model)
    if not handles:
        got = f"unpatched {type(model).__name__}"
        raise NothingPatched(
            format_error("freeze", "model", got, "a patched model", "call fastgate.patch(model)")
        )
    _check_mode(model, handles)
    linears = _packable(model, handles)
    fused: dict[nn.Linear, Packed] = {}
    for handle in handles:
        for view in handle.layers:
            fused.update(_packed_qkv(view.attention.self, set(linears)))
    for linear in linears:
        pack_linear(linear, fused.get(linear))
    for handle in handles:
        handle.runtime.frozen = True
        handle.runtime.forget()
    return model


def _handles(model: nn.Module) -> list[EncoderHandle]:
    """The handles on the patched encoders in a model."""
    encoders = [located.encoder for located in find_encoders(model)]
    return [EncoderHandle(encoder) for encoder in encoders if hasattr(encoder, "fastgate_runtime")]


def _check_mode(model: nn.Module, handles: list[EncoderHandle]) -> None:
    """Refuse training mode, soft gates, and a torch that has not the products that packed weights need."""
    if model.training:
        got = "a model in training mode"
        raise ArgumentError(
            format_error("freeze", "model", got, "one in eval mode", "call model.eval() first")
        )
    if missing_for_onednn():
        raise Unsupported(
            format_error("freeze", "torch", missing_for_onednn(), "oneDNN", "run the model as it is")
        )
    for handle in handles:
        soft = [i for i, gate in enumerate(handle.gates) if isinstance(gate, Tensor)]
        if soft:
            remedy = "harden the gates (Pruner.harden) first"
            raise ArgumentError(
                format_error("freeze", "model", f"soft gates in layers {soft}", "0 or 1", remedy)
            )


def _packable(model: nn.Module, handles: list[EncoderHandle]) -> list[nn.Linear]:
    """The Linears to pack: plain ones, whose weight no other module has and nothing reads otherwise.

    Raises Unsupported for one that is elsewhere than on the CPU, or of a dtype that is not packed.
    """
    read: set[nn.Module] = set()
    for handle in handles:
        if handle.runtime.demand in ("first", "start"):
            read |= _absorbed(handle)
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    linears = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and is_plain(module)
        and module not in read
        and holders[id(module.weight)] == 1
    ]
    places = {(linear.weight.device.type, linear.weight.dtype) for linear in linears}
    wrong = sorted(
        f"{dtype} on {device}" for device, dtype in places if device != "cpu" or dtype not in ONEDNN_DTYPES
    )
    if wrong:
        wanted, remedy = "float32 or bfloat16 on the CPU", "run the model as it is, or convert it first"
        if torch.bfloat16 not in ONEDNN_DTYPES:
            wanted = "float32 on the CPU (bfloat16 takes a processor with AVX512)"
            remedy = "call model.float() first, or run the model as it is"
        raise Unsupported(format_error("freeze", "model", ", ".join(wrong), wanted, remedy))
    return linears


def thaw(model: M) -> M:
    """Undo `freeze`, in place.

    The Linears are the modules that they were. They have the parameters that they had where somebody still
    holds those, such as an optimizer, and new ones elsewhere. A model that is not frozen stays as it is.

    Args:
        model: A frozen model.

    Returns:
        The model.

    Warns:
        RuntimeWarning: If such a parameter was changed in place meanwhile. The frozen model did not have the
            change, and the thawed one has it.
    """
    check_module("thaw", model)
    edited = []
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            if unpack_linear(module):
                edited.append(f"{name}.weight")
        elif hasattr(module, "fastgate_runtime"):
            EncoderHandle(module).runtime.frozen = False
    if edited:
        names = ", ".join(edited[:3]) + (f" and {len(edited) - 3} more" if len(edited) > 3 else "")
        message = f"thaw: {names} changed while the model was frozen, and its outputs did not follow"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return model


def forward_frozen(forward: Callable[..., Any], encoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`forward` of a frozen encoder, which has no gradients: its outputs refuse a backward where something
    asks for one."""
    if not torch.is_grad_enabled():
        return forward(encoder, *args, **kwargs)
    arguments = (*args, *kwargs.values())
    if any(isinstance(t, Tensor) and t.requires_grad for t in arguments) or asks_for_gradients(encoder):
        return without_gradients(encoder.training, lambda: forward(encoder, *args, **kwargs))
    return forward(encoder, *args, **kwargs)


def _packed_qkv(attention: Any, linears: set[nn.Linear]) -> dict[nn.Linear, Packed]:
    """Query, key and value packed together, if all three are among `linears` and of one shape."""
    parts = [attention._modules.get(name) for name in ("query", "key", "value")]
    if not linears.issuperset(parts) or len({part.weight.shape for part in parts}) > 1:
        return {}
    return dict(zip(parts, pack_together([part.weight for part in parts]), strict=True))


def _absorbed(handle: EncoderHandle) -> set[nn.Module]:
    """The key and value Linears of the last attention. With one query per sequence their weights are read."""
    gates = handle.gates
    top = max((i for i, gate in enumerate(gates) if not is_skipped(gate)), default=-1)
    mixing = layers_that_mix(handle.encoder.encoder.layer, gates)
    if max((i for i, _ in mixing), default=-1) >= top:
        return set()
    attention = handle.layers[top].attention.self
    return {attention.key, attention.value}
