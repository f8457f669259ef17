"""Checks of a run before it trains: do its rows fit, are its steps enough, can its target be reached?

The dense fine-tune takes most of the time, and these answers do not depend on it. `where` and `argument` are
what an error names: the command, and what the user calls the setting.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fastgate.data.metrics import IGNORED
from fastgate.errors import ArgumentError, format_error
from fastgate.models.architectures import longest_row
from fastgate.models.handle import get_encoder
from fastgate.nn.choices import ReplacementKind
from fastgate.pruning import Sparsity, Speedup
from fastgate.pruning.objective import costs_of
from fastgate.runtime.costs import Sizes
from fastgate.training.targets import RunTarget, removed_of

MIN_STEPS = 3  # of a pruning phase: one to measure in, one to search in, one to recover in


def check_length(where: str, argument: str, length: int, model: Any) -> None:
    """Raises ArgumentError unless the model has positions for rows of `length` tokens."""
    limit = longest_row(model.config)
    if not 3 <= length <= limit:
        remedy = f"set {argument} to at most {limit}"
        raise ArgumentError(format_error(where, argument, length, f"3 to {limit} tokens", remedy))


def check_rows(where: str, argument: str, input_ids: Any, model: Any) -> None:
    """Raises ArgumentError if a row of token ids is longer than the model has positions for."""
    limit, longest = longest_row(model.config), max(map(len, input_ids))
    if longest > limit:
        got, wanted = f"rows of up to {longest} tokens", f"at most {limit}, as the model has positions for"
        raise ArgumentError(format_error(where, argument, got, wanted, f"set {argument} to {limit}"))


def steps_of(rows: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of a phase, as the Trainer counts them."""
    return math.ceil(math.ceil(rows / batch_size) * epochs)


def check_steps(
    where: str, argument: str, batch_argument: str, rows: int, batch_size: int, epochs: float
) -> None:
    """Raises ArgumentError if a pruning phase of so many epochs is too short.

    batch_argument: what the user calls the batch size.
    """
    steps = steps_of(rows, batch_size, epochs)
    if steps < MIN_STEPS:
        got = f"{epochs:g}, which is {steps} optimizer step{'s' * (steps != 1)} of {batch_size} rows"
        remedy = f"raise {argument}, lower {batch_argument}, or give more than {rows} training rows"
        raise ArgumentError(format_error(where, argument, got, f"{MIN_STEPS} steps or more", remedy))


def check_target(
    where: str, argument: str, target: RunTarget, model: Any, train: Any, replacement: ReplacementKind
) -> None:
    """Raises ArgumentError for a target that removes nothing, or that no choice of layers reaches.

    model: patched and not pruned. train: tokenised rows with `labels`, like those of the training.
    """
    layers = get_encoder(model).num_layers
    if isinstance(target, Sparsity) and removed_of(target, layers) == 0:
        got = f"{target.share:g}, which is 0 of {layers} attention sublayers"
        remedy = f"ask for {0.5 / layers:.2g} or more"
        raise ArgumentError(format_error(where, argument, got, "a share that removes at least one", remedy))
    if isinstance(target, Speedup):
        highest = highest_speedup(model, train, replacement)
        if target.factor > highest:
            wanted = f"at most {highest:.2f}, the speed-up without any attention on these rows"
            remedy = "ask for less: the feed-forward layers always run"
            raise ArgumentError(format_error(where, argument, f"{target.factor:g}", wanted, remedy))


def highest_speedup(model: Any, train: Any, replacement: ReplacementKind) -> float:
    """The speed-up in FLOPs of the patched model's encoder without any attention, on rows like `train`.

    The costs are those that the Pruner counts.
    """
    state = get_encoder(model)
    config, layers = state.encoder.config, state.num_layers
    lengths = np.asarray([len(ids) for ids in train["input_ids"]], dtype=np.int64)
    rows, sequences = int(lengths.sum()), len(lengths)
    output_rows = rows
    if state.runtime.demand in ("first", "start"):
        output_rows = sequences
    elif state.runtime.demand == "labelled":
        output_rows = sum(int((np.asarray(labels) != IGNORED).sum()) for labels in train["labels"])
    sizes = Sizes(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        rows=rows,
        keys=rows,
        rows_within_halo=(output_rows,),
        pairs=int(np.square(lengths).sum()),
        sequences=sequences,
    )
    costs = costs_of(sizes, layers, replacement)
    return float(1.0 / costs.share(torch.zeros(layers, dtype=torch.float64)))
