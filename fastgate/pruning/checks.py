"""What a Pruner asks of a model and of a batch before it uses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.errors import ArgumentError, CheckpointError, Unsupported, format_error
from fastgate.models.handle import EncoderHandle, check_module
from fastgate.models.pruning import refuse_adapters
from fastgate.nn.packed_linear import PackedLinear
from fastgate.pruning.config import PruningConfig
from fastgate.pruning.recording import Forward
from fastgate.pruning.replacement_training import replacement_modules
from fastgate.pruning.schedule import Schedule


def check_arguments(
    model: nn.Module, config: PruningConfig, teacher: nn.Module | None, optimizer: object = None
) -> None:
    """Raises ArgumentError for arguments of a Pruner that are not of their types, and for a model that is to
    be its own teacher."""
    if not isinstance(config, PruningConfig):
        remedy = "pass fastgate.PruningConfig(target=...)"
        raise ArgumentError(format_error("Pruner", "config", repr(config), "a PruningConfig", remedy))
    check_module("Pruner", model)
    if teacher is not None and not isinstance(teacher, nn.Module):
        got, remedy = repr(teacher), "load the model"
        raise ArgumentError(format_error("Pruner", "teacher", got, "a model or None", remedy))
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        got, wanted = repr(optimizer), "a torch.optim.Optimizer or None"
        raise ArgumentError(format_error("Pruner", "optimizer", got, wanted, "pass the optimizer"))
    if teacher is model:
        got, wanted = "the model itself", "another model or None"
        remedy = "pass copy.deepcopy(model), or None to distil from the model with its gates open"
        raise ArgumentError(format_error("Pruner", "teacher", got, wanted, remedy))


def check_planned(schedule: Schedule | None) -> Schedule:
    """Raises ArgumentError while the number of steps is unknown."""
    if schedule is None:
        wanted, remedy = "the number of optimizer steps", "pass it, or call plan_steps"
        raise ArgumentError(format_error("Pruner", "total_steps", None, wanted, remedy))
    return schedule


def check_length(planned: Schedule | None, schedule: Schedule) -> None:
    """Raises CheckpointError if a run that was planned is to have another number of steps."""
    if planned is not None and planned != schedule:
        wanted = f"{planned.total}, as the run began with"
        remedy = "resume with the same number of steps: the phase is a function of the step"
        raise CheckpointError(format_error("Pruner", "total_steps", schedule.total, wanted, remedy))


def check_student(model: nn.Module) -> None:
    """Raises ArgumentError for a frozen model, Unsupported for one with adapters or inside DDP."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            remedy = "call fastgate.thaw(model) first: packed weights cannot be trained"
            raise ArgumentError(format_error("Pruner", "model", f"{name} frozen", "a model to train", remedy))
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            got, wanted = f"a model inside {type(module).__name__}", "the model itself"
            remedy = "make the Pruner before DistributedDataParallel takes the model: it adds parameters"
            raise Unsupported(format_error("Pruner", "model", got, wanted, remedy))
    refuse_adapters("Pruner", model)


def check_whole(handle: EncoderHandle) -> None:
    """Raises ArgumentError for an encoder whose attention is not all there."""
    removed = [i for i in range(handle.num_layers) if handle.is_removed(i)]
    if removed:
        got = f"attention of layers {removed} pruned"
        raise ArgumentError(
            format_error("Pruner", "model", got, "every attention there", "load the dense model")
        )


def check_trainable(model: nn.Module, handle: EncoderHandle) -> None:
    """Raises ArgumentError unless a weight of the model, besides those of the replacements, learns."""
    own = {id(p) for layer in replacement_modules(handle) for p in layer.parameters()}
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


def task_loss_of(outputs: Any, task_loss: Tensor | None, weight: float, device: torch.device) -> Tensor:
    """`task_loss`, or the loss in what a model returned, 0-d on `device`.

    Raises ArgumentError if there is none, unless its `weight` is 0.
    """
    loss = task_loss
    if loss is None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        loss = torch.zeros(()) if loss is None and weight == 0.0 else loss
    if task_loss is not None and (not isinstance(loss, Tensor) or loss.dim()):
        got, remedy = repr(task_loss), "pass the mean over the batch, as a tensor"
        raise ArgumentError(format_error("Pruner.loss", "task_loss", got, "a 0-d tensor", remedy))
    if not isinstance(loss, Tensor):
        got, wanted = "no loss", "an output of transformers or a dict with `loss`"
        remedy = "pass labels in the batch, or the task's own loss: pruner.loss(outputs, batch, task_loss)"
        raise ArgumentError(format_error("Pruner.loss", "outputs", got, wanted, remedy))
    return loss.to(device)


def check_gradient(task_loss: Tensor, forward: Forward, model: nn.Module, handle: EncoderHandle) -> None:
    """Raises ArgumentError for a forward that autograd did not record.

    The task's loss may be a constant, as in a batch without labels, if the encoder's outputs are not.
    """
    if not torch.is_grad_enabled() or task_loss.requires_grad:
        return
    if not any(rows.requires_grad for _, rows in forward.hidden):
        check_trainable(model, handle)
        got, remedy = "a loss without a gradient", "call the model outside torch.no_grad()"
        raise ArgumentError(format_error("Pruner.loss", "outputs", got, "those of a training step", remedy))
