"""The recipe of `fastgate finetune`: dense fine-tune, self-prune with the dense model as teacher, score."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastgate.data.task import Task
from fastgate.env import environment
from fastgate.errors import ArgumentError, format_error
from fastgate.models.handle import POOLINGS
from fastgate.models.patching import patch
from fastgate.pruning import PruningConfig
from fastgate.pruning.objective import Target
from fastgate.training.config import Job
from fastgate.training.disk import full_disk_told, read_json, write_json
from fastgate.training.feasibility import check_length, check_steps, check_target, steps_of
from fastgate.training.max_drop import MaxDrop, clear_attempts, hold_out, prune_within
from fastgate.training.methods import usual_distill
from fastgate.training.model import dense_model, load_tokenizer
from fastgate.training.phases import RESULT, Fit, Listener, Training
from fastgate.training.run_folder import HISTORY, WHERE, check_free, check_same, claim, pruning_has_begun
from fastgate.training.setting_ranges import check_range, option_of

USUAL_SEARCH = 300  # steps of search that the usual rate of the gates suits
OTHER_TARGET = "pass --resume with another target"


@dataclass(frozen=True, kw_only=True)
class Recipe(Job):
    """What decides the outcome of a run; a resumed run has to have the same.

    epochs, prune_epochs: passes over the training rows, dense and pruning. lr: of both phases. warmup: share
    of the steps of each phase. data: where the rows came from. Raises ArgumentError unless there is one
    target.
    """

    sparsity: float | None = 0.8
    epochs: float = 3.0
    prune_epochs: float = 3.0
    warmup: float = 0.06
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.given) != 1:
            wanted = "one of a sparsity, a speedup and a largest drop"
            remedy = "pass one of these options"
            got = " and ".join(map(option_of, self.given)) or "none"
            raise ArgumentError(
                format_error(WHERE, "--target-sparsity, --target-speedup, --max-drop", got, wanted, remedy)
            )
        for name, value in asdict(self).items():
            check_range(WHERE, option_of(name), name, value)
        if self.pooling not in POOLINGS:
            remedy = "pass one of these"
            raise ArgumentError(
                format_error(WHERE, "--pooling", repr(self.pooling), " or ".join(POOLINGS), remedy)
            )

    def fit(self, epochs: float) -> Fit:
        """How a phase of that many epochs trains."""
        return Fit(epochs, self.batch_size, self.lr, self.warmup, self.seed, self.bf16)

    def pruning(self, kind: str, steps: int, target: Target) -> PruningConfig:
        """How to prune on a task of that kind, in that many optimizer steps. A short search moves its gates
        faster."""
        usual = PruningConfig(target=target, seed=self.seed, distill=usual_distill(kind))
        search = max(1.0, (usual.harden - usual.warm) * steps)
        return replace(usual, gate_lr=usual.gate_lr * min(8.0, max(1.0, USUAL_SEARCH / search)))


def read_result(out: Path) -> dict[str, Any]:
    """What `finetune` wrote to `out`/result.json."""
    return dict(read_json(out / RESULT))


def finetune(
    recipe: Recipe,
    task: Task,
    out: str | Path,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    tell: Callable[[str], None] | None = None,
    save_every: float | None = 0.1,
) -> dict[str, Any]:
    """Run the recipe in the folder `out` and return what `result.json` then holds.

    Written to `out`: `dense` (Hugging Face's format), `pruned` (fastgate's), `history.json` (the gates over
    the steps), `result.json`. tell: hears before training what is cut off the rows, a sentence each.
    save_every: share of a phase between two checkpoints, None for none. A run that was killed goes on from
    its last checkpoint with `resume`; until its pruning has begun it may then have another target. All is
    checked before the folder is made. Raises ArgumentError for a folder in other use and for settings that
    cannot work, DataError for bad data.
    """
    out = Path(out)
    settings = json.loads(json.dumps(asdict(recipe)))
    check_free(out, resume)
    before = check_same(out, settings)
    if (out / RESULT).is_file():
        return read_result(out)
    tokenizer, model, rows = _prepared(recipe, task)
    claim(out, settings, before, rows)
    if tell is not None:
        for note in task.notes:
            tell(note)
    target = recipe.target
    steps = steps_of(len(rows["train"]), recipe.batch_size, recipe.prune_epochs)
    training = Training(task, out, tokenizer, rows, listener, save_every)
    dense = training.dense(model, recipe.fit(recipe.epochs))
    fit = recipe.fit(recipe.prune_epochs)
    try:
        if isinstance(target, MaxDrop):
            layers = int(model.config.num_hidden_layers)
            config_of = functools.partial(recipe.pruning, task.kind, steps)
            pruned = prune_within(training, target, dense, layers, config_of, fit)
        else:
            pruned = training.prune(recipe.pruning(task.kind, steps, target), fit)
    except ArgumentError as error:
        if pruning_has_begun(out):
            raise
        remedy = f"{OTHER_TARGET}: the dense model in {out} is finished and stays"
        raise ArgumentError(f"{error}; {remedy}") from error
    with full_disk_told(out):
        write_json(out / HISTORY, {"kept": pruned["kept"], "steps": pruned.pop("steps")})
        result = {
            "environment": environment(),
            "settings": settings,
            "rows": {split: len(found) for split, found in rows.items()},
            "input": dict(task.counts),
            "labels": list(task.labels),
            "metric": task.metric,
            "dense": dense,
            "pruned": pruned,
        }
        write_json(out / RESULT, result)
    clear_attempts(training)
    shutil.rmtree(out / "work", ignore_errors=True)
    return result


def _prepared(recipe: Recipe, task: Task) -> tuple[Any, Any, Any]:
    """(tokenizer, patched dense model, tokenised rows) of a run, found sound: nothing is written before."""
    from transformers import set_seed

    tokenizer = load_tokenizer(recipe.model, task)
    set_seed(recipe.seed)  # the head is new
    model: Any = dense_model(recipe.model, task)
    patch(model, pooling=recipe.pooling)
    check_length(WHERE, "--max-length", recipe.max_length, model)
    rows = task.tokenize(tokenizer, recipe.max_length, recipe.stride)
    target = recipe.target
    if isinstance(target, MaxDrop):
        rows = hold_out(rows, recipe.seed)
    count = len(rows["train"])
    check_steps(WHERE, "--prune-epochs", "--batch-size", count, recipe.batch_size, recipe.prune_epochs)
    option = option_of(recipe.given[0])
    check_target(WHERE, option, target, model, rows["train"], PruningConfig.replacement)
    return tokenizer, model, rows
