"""`prune`: remove the attention of every layer but those to keep, weights and all."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex, TypeVar

from torch import nn

from fastgate.errors import ArgumentError, Unsupported, format_error
from fastgate.models.architectures import find_encoders
from fastgate.models.handle import EncoderHandle, check_module, get_encoder
from fastgate.models.patching import patch
from fastgate.nn.choices import REPLACEMENT_KINDS, ReplacementKind
from fastgate.nn.replacement import Removed

M = TypeVar("M", bound=nn.Module)


def prune(model: M, keep: Iterable[SupportsIndex], replacement: ReplacementKind = "zero") -> M:
    """Keep self-attention in the layers `keep` and remove it from all others, in place.

    Patches the model if it is not patched. Drops the query, key, value and output weights of the other
    layers, and leaves their LayerNorm.

    Args:
        model: A model with one BERT or RoBERTa encoder.
        keep: Indices of layers, from 0: integers of Python, numpy or torch.
        replacement: What takes the place of a pruned attention. "zero" is nothing, "mean" a vector, "affine"
            a vector and a scale per channel. "shift", the token shift, is these and, per channel, weights on
            the previous and the next token. Values already learned stay; others start at zero. Only the token
            shift costs a step of its own, and output rows that it adds.

    Returns:
        The model.

    Raises:
        ArgumentError: For indices outside the encoder, an unknown replacement, or a layer pruned before.
        Unsupported: For a model with adapters of PEFT, or pruned layers that are one module with layers kept.
    """
    check_module("prune", model)
    refuse_adapters("prune", model)
    encoders = list(find_encoders(model))
    if len(encoders) != 1:  # which of these raises says how many there are
        patch(model)
        get_encoder(model, "prune")
    handle = EncoderHandle(encoders[0].encoder)
    kept = _indices(keep, handle.num_layers)
    if replacement not in REPLACEMENT_KINDS:
        wanted = " | ".join(REPLACEMENT_KINDS)
        raise ArgumentError(
            format_error("prune", "replacement", repr(replacement), wanted, "pass one of these")
        )
    dropped = [i for i in range(handle.num_layers) if i not in kept]
    _check_layers(handle, kept, dropped)
    patch(model)
    handle.add_replacements(replacement, layers=dropped)
    for i, layer in enumerate(handle.layers):
        if i in kept:
            layer.attention._modules.pop("replacement", None)
        else:
            layer.attention.self = Removed()
            layer.attention.output.dense = Removed()
    handle.runtime.removed = tuple(dropped)
    handle.runtime.forget()
    handle.set_gates([1.0 if i in kept else 0.0 for i in range(handle.num_layers)])
    return model


def _check_layers(handle: EncoderHandle, kept: list[int], dropped: list[int]) -> None:
    """Refuse to keep what was pruned before, and to drop what layers that are kept have too."""
    pruned = [i for i in kept if handle.is_removed(i)]
    if pruned:
        wanted, remedy = "layers whose attention is still there", "load the unpruned model"
        raise ArgumentError(format_error("prune", "keep", pruned, wanted, remedy))
    attentions = [id(layer.attention) for layer in handle.layers]
    shared = [i for i in dropped if attentions[i] in {attentions[j] for j in kept}]
    if shared:
        got, remedy = f"layers {shared} that share their attention with others", "copy.deepcopy each layer"
        raise Unsupported(format_error("prune", "keep", got, "layers of their own to drop", remedy))


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


def _indices(keep: object, layers: int) -> list[int]:
    """The layers to keep, in order."""
    wanted, remedy = f"layer indices from 0 to {layers - 1}", "pass a list, such as keep=[0, 3]"
    if isinstance(keep, str | bytes) or not isinstance(keep, Iterable):
        raise ArgumentError(format_error("prune", "keep", repr(keep), wanted, remedy))
    try:
        values = list(keep)
    except TypeError as error:  # a tensor without a dimension
        raise ArgumentError(format_error("prune", "keep", repr(keep), wanted, remedy)) from error
    indices, wrong = set(), []
    for value in values:
        index = _index(value)
        if index is None or not 0 <= index < layers:
            wrong.append(value)
        else:
            indices.add(index)
    if wrong:
        raise ArgumentError(format_error("prune", "keep", wrong[:5], wanted, "drop or correct them"))
    return sorted(indices)


def _index(value: Any) -> int | None:
    """An integer of Python, numpy or torch; None for anything else, booleans too."""
    kind = str(getattr(value, "dtype", type(value).__name__))
    if "bool" in kind or getattr(value, "is_complex", lambda: False)():
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        return None
