"""What a Pruner asks of a model and of a batch before it uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastgate.errors import ArgumentError, Unsupported, format_error
from fastgate.models.handle import EncoderHandle
from fastgate.models.pruning import refuse_adapters
from fastgate.nn.packed_linear import PackedLinear


def check_student(model: nn.Module) -> None:
    """Raises ArgumentError for a frozen model, Unsupported for one with adapters or inside DDP."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            remedy = "call fastgate.thaw(model) first: packed weights cannot be trained"
            raise ArgumentError(format_error("Pruner", "model", f"{name} frozen", "a model to train", remedy))
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            got, wanted = f"a model inside {type(module).__name__}", "the model itself"
            remedy = "attach to the model before DistributedDataParallel takes it: attach adds parameters"
            raise Unsupported(format_error("Pruner", "model", got, wanted, remedy))
    refuse_adapters("Pruner", model)


def check_whole(state: EncoderHandle) -> None:
    """Raises ArgumentError for an encoder whose attention is not all there."""
    removed = [i for i in range(state.num_layers) if state.is_removed(i)]
    if removed:
        got = f"attention of layers {removed} pruned"
        raise ArgumentError(
            format_error("Pruner", "model", got, "every attention there", "load the dense model")
        )


def check_trainable(model: nn.Module, replacements: Sequence[nn.Module]) -> None:
    """Raises ArgumentError unless a weight of the model, besides those of `replacements`, learns."""
    own = {id(p) for layer in replacements for p in layer.parameters()}
    if not any(p.requires_grad for p in model.parameters() if id(p) not in own):
        got, wanted = "every weight with requires_grad False", "weights to train"
        remedy = "call model.requires_grad_(True), which merge_and_unload() of PEFT leaves to you"
        raise ArgumentError(format_error("Pruner.loss", "model", got, wanted, remedy))


def check_batch(call: str, inputs: Any) -> None:
    """Raises ArgumentError for a batch that is no dict."""
    if not isinstance(inputs, Mapping):
        got, wanted = type(inputs).__name__, "a dict of what the model is called with"
        remedy = "pass the batch as the model takes it by keywords: model(**batch)"
        raise ArgumentError(format_error(f"Pruner.{call}", "inputs", got, wanted, remedy))
