"""What can be known of a run before it trains: do its rows fit, its steps suffice, is its target in reach?

The dense fine-tune takes most of the time, and what is asked of the pruning afterwards does not depend on it.
where, argument: what an error names, the command and what the user calls the setting.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fastgate.data.metrics import IGNORED
from fastgate.errors import ArgumentError, format_error
from fastgate.models.handle import get_encoder
from fastgate.pruning import Sparsity, Speedup
from fastgate.pruning.objective import Target, costs_of
from fastgate.runtime.costs import Sizes
from fastgate.training.max_drop import MaxDrop
from fastgate.training.model import longest_row

LEAST_STEPS = 3  # of a pruning run: one to measure in, one to search in, one to recover in


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


def check_steps(where: str, argument: str, batches: str, rows: int, batch_size: int, epochs: float) -> None:
    """Raises ArgumentError if a pruning run of so many epochs is too short. batches: as `argument`, of the
    batch size."""
    steps = steps_of(rows, batch_size, epochs)
    if steps < LEAST_STEPS:
        got = f"{epochs:g}, which is {steps} optimizer step{'s' * (steps != 1)} of {batch_size} rows"
        remedy = f"raise {argument}, lower {batches}, or give more than {rows} training rows"
        raise ArgumentError(format_error(where, argument, got, f"{LEAST_STEPS} steps or more", remedy))


def check_target(
    where: str, argument: str, target: Target | MaxDrop, model: Any, train: Any, replacement: str
) -> None:
    """Raises ArgumentError for a target that removes nothing from the patched, unpruned model, or that no
    choice of layers reaches on rows like those of `train`, tokenised ones with `labels`."""
    layers = get_encoder(model).num_layers
    if isinstance(target, Sparsity) and math.floor(target.share * layers + 0.5) == 0:
        got = f"{target.share:g}, which is 0 of {layers} attention sublayers"
        remedy = f"ask for {0.5 / layers:.2g} or more"
        raise ArgumentError(format_error(where, argument, got, "a share that removes at least one", remedy))
    if isinstance(target, Speedup):
        most = highest_speedup(model, train, replacement)
        if target.factor > most:
            wanted = f"at most {most:.2f}, the factor with no attention left on these rows"
            remedy = "ask for less: the rest is feed-forward layers"
            raise ArgumentError(format_error(where, argument, f"{target.factor:g}", wanted, remedy))


def highest_speedup(model: Any, train: Any, replacement: str) -> float:
    """How many times cheaper the patched model's encoder is without any attention on rows like those of
    `train`, by the costs that pruning itself counts."""
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
    costs = costs_of(sizes, layers, replacement == "shift")
    return float(1.0 / costs.share(torch.zeros(layers, dtype=torch.float64)))
