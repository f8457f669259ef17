"""`prune`: remove the attention of every layer but those to keep, weights and all."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import nn

from fastgate.errors import ArgumentError, Unsupported, format_error
from fastgate.models.architectures import find_encoders
from fastgate.models.handle import EncoderHandle, check_module, get_encoder
from fastgate.models.patching import patch
from fastgate.nn.replacement import KINDS, Removed


def prune(model: nn.Module, keep: Iterable[int], replacement: str = "zero") -> nn.Module:
    """Keep self-attention in the layers `keep` (indices from 0) and drop it everywhere else, in place.

    Patches the model if it is not patched, drops the query, key, value and output weights of the other
    layers, and leaves their LayerNorm. `replacement` stands in for what is dropped: `zero` nothing, `mean` a
    vector, `affine` a vector and a scale a channel, `shift` these and weights a channel on the two tokens
    beside; values already learned are kept, others start at zero. A `shift` is the one that costs a step of
    its own, and the rows it looks at are computed with those it is computed for. Returns the model.

    keep: integers of Python, numpy or torch.

    Raises ArgumentError for indices outside the encoder, an unknown replacement, or a layer pruned before,
    Unsupported for a model with adapters of PEFT, or layers dropped that are one module with layers kept.
    """
    check_module("prune", model)
    refuse_adapters("prune", model)
    found = list(find_encoders(model))
    if len(found) != 1:  # which of these raises says how many there are
        patch(model)
        get_encoder(model, "prune")
    state = EncoderHandle(found[0].encoder)
    kept = _indices(keep, state.num_layers)
    if replacement not in KINDS:
        raise ArgumentError(
            format_error("prune", "replacement", repr(replacement), " | ".join(KINDS), "pass one of these")
        )
    gone = [i for i in kept if state.is_removed(i)]
    if gone:
        raise ArgumentError(
            format_error(
                "prune", "keep", gone, "layers whose attention is still there", "load the unpruned model"
            )
        )

    dropped = [i for i in range(state.num_layers) if i not in kept]
    at = [id(view.attention) for view in state.layers]
    shared = [i for i in dropped if at[i] in {at[j] for j in kept}]
    if shared:
        got, remedy = f"layers {shared} that share their attention with others", "copy.deepcopy each layer"
        raise Unsupported(format_error("prune", "keep", got, "layers of their own to drop", remedy))
    patch(model)
    state.add_replacements(replacement, layers=dropped)
    for i, view in enumerate(state.layers):
        if i in kept:
            view.attention._modules.pop("replacement", None)
        else:
            view.attention.self = Removed()
            view.attention.output.dense = Removed()
    state.runtime.removed = tuple(dropped)
    state.runtime.forget()
    state.set_gates([1.0 if i in kept else 0.0 for i in range(state.num_layers)])
    return model


def refuse_adapters(where: str, model: nn.Module) -> None:
    """Refuse modules of PEFT: what PEFT saves of such a model would lack the pruning."""
    for name, module in model.named_modules():
        if any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
            got = f"{name or 'the model'}, a {type(module).__name__} of PEFT"
            remedy = (
                "call model = model.merge_and_unload().requires_grad_(True), which is exact, and prune and "
                "fastgate.save that: an adapter has no place for what is pruned"
            )
            raise Unsupported(format_error(where, "model", got, "a model without adapters", remedy))


def _indices(keep: Any, layers: int) -> list[int]:
    """The layers to keep, in order."""
    wanted, remedy = f"layer indices from 0 to {layers - 1}", "pass a list, such as keep=[0, 3]"
    if isinstance(keep, str | bytes) or not isinstance(keep, Iterable):
        raise ArgumentError(format_error("prune", "keep", repr(keep), wanted, remedy))
    try:
        given = list(keep)
    except TypeError as error:  # a tensor without a dimension
        raise ArgumentError(format_error("prune", "keep", repr(keep), wanted, remedy)) from error
    found, wrong = set(), []
    for one in given:
        index = _index(one)
        if index is None or not 0 <= index < layers:
            wrong.append(one)
        else:
            found.add(index)
    if wrong:
        raise ArgumentError(format_error("prune", "keep", wrong[:5], wanted, "drop or correct them"))
    return sorted(found)


def _index(value: Any) -> int | None:
    """An integer of Python, numpy or torch; None for anything else, booleans too."""
    kind = str(getattr(value, "dtype", type(value).__name__))
    if "bool" in kind or getattr(value, "is_complex", lambda: False)():
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        return None
