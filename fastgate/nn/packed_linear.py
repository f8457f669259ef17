"""PackedLinear: what `freeze` makes of a Linear, with a weight laid out for the CPU's matrix product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastgate.errors import Unsupported, format_error
from fastgate.ops.linear import ONEDNN_DTYPES, Packed, pack
from fastgate.ops.torch_compat import TensorWeakRef, version_of

T = TypeVar("T")

_REMEDY = "call fastgate.thaw(model) first"


def pack_linear(module: nn.Linear, packed: Packed | None = None) -> None:
    """Make `module`, a plain Linear, a PackedLinear: the module stays, its weight parameter goes.

    The parameter is not held, so that its memory is free unless somebody else holds it, such as an optimizer.
    """
    weight = module._parameters.pop("weight")
    assert weight is not None
    state = {
        "packed": packed or pack(weight),
        "weight_requires_grad": weight.requires_grad,
        "bias_required_grad": None if module.bias is None else module.bias.requires_grad,
    }
    module.__dict__.update(state, parameter=TensorWeakRef(weight), parameter_version=version_of(weight))
    module.__class__ = PackedLinear  # type: ignore[assignment]


def unpack_linear(module: PackedLinear) -> bool:
    """Make `module` the Linear again that it was, with the parameter that it had if somebody holds that.

    Returns whether that parameter was changed in place since, which no frozen forward has seen. It then keeps
    its values, unless other weights were loaded into the frozen module.
    """
    reference, version = (module.__dict__.pop(name, None) for name in ("parameter", "parameter_version"))
    flag, changed, dense = module.asks_for_gradient, module.flags_changed, module.packed.dense()
    for name in ("packed", "weight_requires_grad", "bias_required_grad"):
        del module.__dict__[name]
    weight = None if reference is None else reference()
    repacked, edited = module.__dict__.pop("packed_anew", False), False
    if weight is not None and version_of(weight) != version:
        edited, dense = True, dense if repacked else weight.detach()
    if weight is None:
        weight = nn.Parameter(dense, requires_grad=flag)
    elif changed:
        weight.requires_grad_(flag)
    if weight.dtype != dense.dtype or not torch.equal(weight.detach(), dense):
        weight.data = dense
    bias = module._parameters.pop("bias")
    module._parameters.update(weight=weight, bias=bias)  # in a Linear's order
    module.__class__ = nn.Linear  # type: ignore[assignment]
    return edited


class FrozenWeight(Unsupported, AttributeError):
    """The weight of a Linear that `freeze` packed was asked for; `hasattr` says that there is none."""


class PackedLinear(nn.Module):
    """What `linear` computes, from a packed copy of its weight, for inference only.

    The state dict holds `weight` (out_features, in_features) and `bias` as the Linear's does, and loads them;
    there is no `weight` to change in place, which would go unnoticed. `to` another dtype packs anew.
    """

    in_features: int
    out_features: int
    packed: Packed
    bias: nn.Parameter | None
    weight_requires_grad: bool  # of the parameter that the weight was
    bias_required_grad: bool | None  # of the bias then; None without one
    packed_anew: bool  # whether the module was converted or loaded since; absent if not

    @property
    def flags_changed(self) -> bool:
        """Whether `requires_grad` was set on the bias since: there is no weight that it could be set on."""
        return self.bias is not None and self.bias.requires_grad != self.bias_required_grad

    @property
    def asks_for_gradient(self) -> bool:
        """Whether the weight asks for a gradient: as it did, or as the bias does if that was set since."""
        return self.bias.requires_grad if self.flags_changed else self.weight_requires_grad  # type: ignore[union-attr]

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse_weight(name, value)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        _refuse_weight(name, param)
        super().register_parameter(name, param)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            wanted = "a Linear that is not frozen, or state_dict(), which has the weight"
            raise FrozenWeight(format_error("weight", "Linear.weight", "a packed weight", wanted, _REMEDY))
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        cls: type[nn.Module] = type(self)
        if cls is nn.Linear:  # it was thawed, and a wrapper holds this method still
            return nn.Linear.forward(self, x)  # type: ignore[arg-type]
        if torch.is_grad_enabled() and (x.requires_grad or asks_for_gradients(self)):
            return without_gradients(self.training, lambda: self.packed.product(x, self.bias))
        return self.packed.product(x, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )

    def _put(self, weight: Tensor) -> None:
        _check_place(weight)
        self.packed, self.packed_anew = pack(weight), True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        weight = self.packed.dense()
        applied = fn(weight)
        if applied is not weight:
            self._put(applied)
        elif self.packed.in_panels:
            fn(self.packed.data)  # which stays where it is, or is moved in place, to shared memory
        return nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.packed.dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        name = prefix + "weight"
        weight = state_dict.get(name)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if name in unexpected_keys:
            unexpected_keys.remove(name)
        if weight is None:
            if strict:
                missing_keys.append(name)
        elif weight.shape != (self.out_features, self.in_features):
            wanted = (self.out_features, self.in_features)
            error_msgs.append(f"size mismatch for {name}: got {tuple(weight.shape)}, wanted {wanted}")
        else:
            assigns = local_metadata.get("assign_to_params_buffers", False)
            self._put(weight if assigns else weight.to(self.packed.data.device, self.packed.dtype))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: which parameter the weight was is of no meaning elsewhere."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("parameter")}


def _refuse_weight(name: str, value: Any) -> None:
    """Nobody would read a weight that is set on a PackedLinear."""
    if name == "weight":
        got = f"a {type(value).__name__} for a frozen Linear"
        raise Unsupported(
            format_error("weight", "Linear.weight", got, "a Linear that is not frozen", _REMEDY)
        )


def _check_place(weight: Tensor) -> None:
    if weight.device.type != "cpu" or weight.dtype not in ONEDNN_DTYPES:
        got = f"{weight.dtype} on {weight.device}"
        raise Unsupported(format_error("freeze", "model", got, "float32 or bfloat16 on the CPU", _REMEDY))


def check_apply(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Refuse what would move packed weights to where they cannot be, before anything has moved."""
    for dtype in {m.packed.dtype for m in module.modules() if isinstance(m, PackedLinear)}:
        _check_place(fn(torch.empty(0, dtype=dtype)))


def asks_for_gradients(module: nn.Module) -> bool:
    """Whether a parameter in `module` asks for a gradient, or one that a packed weight was."""
    return any(p.requires_grad for p in module.parameters()) or any(
        m.asks_for_gradient for m in module.modules() if isinstance(m, PackedLinear)
    )


def without_gradients(training: bool, compute: Callable[[], T]) -> T:
    """What `compute` returns, computed without a graph; a backward through it raises Unsupported, and so does
    this call in training."""
    if training:
        raise Unsupported(
            format_error(
                "forward",
                "model",
                "a frozen one in training mode",
                "one that is not frozen, or eval mode",
                "call fastgate.thaw(model) to train it, or model.eval() to infer",
            )
        )
    with torch.no_grad():
        outputs = compute()
    guarded: T = _guarded(outputs)
    return guarded


def _guarded(outputs: Any) -> Any:
    """The same outputs; a backward through a tensor among them raises Unsupported."""
    if isinstance(outputs, Tensor):
        return _NoBackward.apply(outputs, torch.empty(0, requires_grad=True))  # type: ignore[no-untyped-call]
    if isinstance(outputs, dict):  # a ModelOutput
        return type(outputs)(**{name: _guarded(value) for name, value in outputs.items()})
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(_guarded(value) for value in outputs)
    return outputs


class _NoBackward(torch.autograd.Function):
    """An output that would have had a gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, asks: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise Unsupported(
            format_error(
                "backward",
                "model",
                "a frozen one, whose parameters ask for gradients",
                "one that is not frozen",
                "call fastgate.thaw(model) to train it; to train only what reads its outputs, "
                "call model.requires_grad_(False) before fastgate.freeze(model)",
            )
        )
