"""Load what a run trains on, and check that the run can work. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgate.data.task import Task
from fastgate.models.handle import get_encoder
from fastgate.models.patching import patch
from fastgate.pruning import Fixed
from fastgate.pruning.objective import Objective
from fastgate.training.config import FinetuneConfig
from fastgate.training.feasibility import check_length, check_steps, check_target
from fastgate.training.max_drop import hold_out
from fastgate.training.model import dense_model, load_tokenizer
from fastgate.training.targets import MaxDrop, RunTarget, key_of


@dataclass(frozen=True)
class Prepared:
    """tokenizer; model: dense and patched; rows: the task's, tokenised, with `held_out` for MaxDrop."""

    task: Task
    tokenizer: Any
    model: Any
    rows: Any


@dataclass(frozen=True)
class Wording:
    """What errors name. where: the command. name_of: field of FinetuneConfig, or target -> option or key."""

    where: str
    name_of: Callable[[str], str]


def prepare(config: FinetuneConfig, source: str | Path, task: Task, wording: Wording) -> Prepared:
    """Load the tokenizer and the model of `source`, with a new head, and tokenise the rows of the task.

    Raises ArgumentError, CheckpointError or DataError for what does not fit together.
    """
    from transformers import set_seed

    tokenizer = load_tokenizer(source, task)
    set_seed(config.seed)  # the head is new
    model: Any = dense_model(source, task)
    patch(model, pooling=config.pooling)
    check_length(wording.where, wording.name_of("max_length"), config.max_length, model)
    rows = task.tokenize(tokenizer, config.max_length, config.stride)
    if isinstance(config.target, MaxDrop):
        rows = hold_out(rows, config.seed)
    return Prepared(task, tokenizer, model, rows)


def check_pruning(config: FinetuneConfig, target: RunTarget, prepared: Prepared, wording: Wording) -> None:
    """Raises ArgumentError if the pruning of a run has too few steps, a target out of reach, or options that
    contradict each other."""
    train = prepared.rows["train"]
    names = wording.name_of("prune_epochs"), wording.name_of("batch_size")
    check_steps(wording.where, *names, len(train), config.batch_size, config.prune_epochs)
    learned = Fixed(()) if isinstance(target, MaxDrop) else target
    pruning = config.pruning_config(prepared.task.kind, learned)
    if isinstance(target, Fixed):
        Objective(target, get_encoder(prepared.model).num_layers)  # raises ArgumentError for unknown layers
    else:
        name = wording.name_of(key_of(target))
        check_target(wording.where, name, target, prepared.model, train, pruning.replacement)
