"""The replacements' parameters in an optimizer: their own learning rate, and whether they move at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastgate.errors import ArgumentError, format_error
from fastgate.models.handle import EncoderHandle

GROUP_KEY = "fastgate_replacements"  # in the parameter groups that `set_rates` has made


def replacement_modules(handle: EncoderHandle) -> list[nn.Module]:
    """The replacement of each layer that has one."""
    modules = (handle.replacement(layer) for layer in range(handle.num_layers))
    return [module for module in modules if module is not None]


def trained_parameters(handle: EncoderHandle, layer: int) -> list[nn.Parameter]:
    """The parameters of a layer's replacement that ask for gradients."""
    replacement = handle.replacement(layer)
    return [] if replacement is None else [p for p in replacement.parameters() if p.requires_grad]


def is_missing(optimizer: torch.optim.Optimizer, handle: EncoderHandle) -> bool:
    """Whether a parameter of a replacement that is to be trained is not in `optimizer`."""
    return any(True for _ in _missing(optimizer, handle))


def set_rates(optimizer: torch.optim.Optimizer, handle: EncoderHandle, ratio: float) -> None:
    """Give the replacements' parameters groups of their own in `optimizer`, at `ratio` times the rate of the
    weights beside them. A second call changes nothing.

    Parameters that the optimizer has are moved out of their group. Those that it lacks get the settings of
    the group that has the LayerNorm behind them, else of the first group. Raises ArgumentError if a scheduler
    has the optimizer already: it would not know the new groups.
    """
    own = {id(p) for module in replacement_modules(handle) for p in module.parameters()}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in own]
        if moved and ratio != 1.0 and GROUP_KEY not in group:
            _refuse_scheduled(optimizer)
            group["params"] = [p for p in group["params"] if id(p) not in own]
            _add_group(optimizer, group, moved, ratio)
    added: dict[int, list[nn.Parameter]] = {}
    for layer, parameter in _missing(optimizer, handle):
        added.setdefault(_group_of_norm(optimizer, handle, layer), []).append(parameter)
    for index, parameters in added.items():
        _refuse_scheduled(optimizer)
        _add_group(optimizer, optimizer.param_groups[index], parameters, ratio)


def _missing(optimizer: torch.optim.Optimizer, handle: EncoderHandle) -> Iterator[tuple[int, nn.Parameter]]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in range(handle.num_layers):
        for parameter in trained_parameters(handle, layer):
            if id(parameter) not in held:
                yield layer, parameter


def _add_group(
    optimizer: torch.optim.Optimizer, like: dict[str, Any], parameters: list[nn.Parameter], ratio: float
) -> None:
    settings = {key: value for key, value in like.items() if key != "params"}
    rate = like["lr"] * ratio
    optimizer.add_param_group({**settings, "params": parameters, "lr": rate, GROUP_KEY: True})


def _group_of_norm(optimizer: torch.optim.Optimizer, handle: EncoderHandle, layer: int) -> int:
    """The index of the group that has the LayerNorm after the attention of `layer`; 0 if none has."""
    norm = {id(p) for p in handle.layers[layer].attention.output.LayerNorm.parameters()}
    for index, group in enumerate(optimizer.param_groups):
        if any(id(p) in norm for p in group["params"]):
            return index
    return 0


def _refuse_scheduled(optimizer: torch.optim.Optimizer) -> None:
    # accelerate wraps optimizers; a scheduler of torch marks the step of the one it is made for.
    if hasattr(getattr(optimizer, "optimizer", optimizer).step, "_wrapped_by_lr_sched"):
        got, wanted = "an optimizer that has a scheduler", "one without: groups are added to it"
        remedy = "give the optimizer to the Pruner before the scheduler is made"
        raise ArgumentError(format_error("Pruner", "optimizer", got, wanted, remedy))


class MovementCheck:
    """Notices replacements that no optimizer trains: they stay where the warm phase has put them."""

    def __init__(self) -> None:
        self._starts: dict[int, list[torch.Tensor]] = {}

    def start(self, handle: EncoderHandle) -> None:
        """Note where the replacements are now."""
        layers = range(handle.num_layers)
        self._starts = {i: [p.detach().clone() for p in trained_parameters(handle, i)] for i in layers}

    def finish(self, handle: EncoderHandle, kept: Sequence[int], stacklevel: int) -> None:
        """Warn if no replacement in use, of a layer not in `kept`, has moved since `start`."""
        used = [i for i in self._starts if i not in kept]
        now = [p for i in used for p in trained_parameters(handle, i)]
        then = [p for i in used for p in self._starts[i]]
        self._starts = {}
        if now and len(now) == len(then) and all(map(torch.equal, now, then)):
            warnings.warn(
                "Pruner: no replacement has moved since the warm phase: the optimizer does not train their "
                "parameters. Pass it: Pruner(..., optimizer=optimizer), or "
                "pruner.prepare_optimizer(optimizer) if it is made later.",
                stacklevel=stacklevel + 1,
            )
