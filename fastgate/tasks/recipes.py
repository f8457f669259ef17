"""The recipe of `fastgate finetune`: dense fine-tune, self-prune with the dense model as teacher, score."""

from __future__ import annotations

import functools
import json
import math
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, say
from ..info import environment
from ..patch import patch
from ..pruning import PruningConfig
from ..pruning.objective import Target
from .budget import MaxDrop, clear_attempts, hold_out, prune_within
from .job import Job
from .methods import usual_distill
from .model import check_length, dense_model, load_tokenizer
from .task import Task
from .training import RESULT, Fit, Listener, Training, read_json, write_json

USUAL_SEARCH = 300  # steps of search that the usual rate of the gates suits
_RUN, _HISTORY = "run.json", "history.json"
_OWN = ("dense", "pruned", "work", _RUN, RESULT, _HISTORY, "report.md", "gates.png")


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
            remedy = "pass one of --target-sparsity, --target-speedup and --max-drop"
            got = " and ".join(self.given) or "none"
            raise ArgumentError(say("finetune", "target", got, wanted, remedy))
        self.target  # noqa: B018 - it checks the number

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


def clear(out: Path) -> None:
    """Remove what an earlier run left in `out`, and nothing else."""
    if (out / _RUN).is_file():
        for name in _OWN:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _prepare(out: Path, recipe: Recipe, resume: bool) -> None:
    """Make the output folder, or see that it holds the same run."""
    if out.exists() and not out.is_dir():
        raise ArgumentError(say("finetune", "out", f"{out}, a file", "a folder", "choose another path"))
    wanted = json.loads(json.dumps(asdict(recipe)))
    if not (out / _RUN).is_file():
        if out.is_dir() and any(out.iterdir()):
            raise ArgumentError(say("finetune", "out", f"{out}, not empty", "a new folder", "choose another"))
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / _RUN, wanted)
        return
    if not resume:
        remedy = "pass --resume to go on with it, or choose another folder"
        raise ArgumentError(say("finetune", "out", f"{out}, which holds a run", "a new folder", remedy))
    found = {"pooling": "first", "bf16": False, **read_json(out / _RUN)}  # there was no choice once
    other = [f"{key} {found.get(key)!r}" for key in wanted if found.get(key) != wanted[key]]
    if other:
        remedy = "resume with the settings the run began with"
        now = ", ".join(f"{key} {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key])
        raise ArgumentError(say("finetune", "resume", now, ", ".join(other), remedy))


def finetune(
    recipe: Recipe,
    task: Task,
    out: str | Path,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    save_every: float | None = 0.1,
) -> dict[str, Any]:
    """Run the recipe in the folder `out` and return what `result.json` then holds.

    Written to `out`: `dense` (Hugging Face's format), `pruned` (fastgate's), `history.json` (the gates over
    the steps), `result.json`. save_every: share of a phase between two checkpoints, None for none. A run that
    was killed goes on from its last checkpoint with `resume`. Raises ArgumentError for a folder in other use,
    DataError for bad data.
    """
    from transformers import set_seed

    out = Path(out)
    tokenizer = load_tokenizer(recipe.model, task)
    set_seed(recipe.seed)  # the head is new
    model = dense_model(recipe.model, task)
    check_length(model.config, recipe.max_length)
    # Before anything is written: it refuses models that fastgate does not know.
    patch(model, pooling=recipe.pooling)
    _prepare(out, recipe, resume)
    if (out / RESULT).is_file():
        return read_result(out)
    rows = task.tokenize(tokenizer, recipe.max_length, recipe.stride)
    target = recipe.target
    if isinstance(target, MaxDrop):
        rows = hold_out(rows, recipe.seed)
    steps = math.ceil(math.ceil(len(rows["train"]) / recipe.batch_size) * recipe.prune_epochs)
    training = Training(task, out, tokenizer, rows, listener, save_every)
    dense = training.dense(model, recipe.fit(recipe.epochs))
    fit = recipe.fit(recipe.prune_epochs)
    if isinstance(target, MaxDrop):
        layers = int(model.config.num_hidden_layers)
        config_of = functools.partial(recipe.pruning, task.kind, steps)
        pruned = prune_within(training, target, dense, layers, config_of, fit)
    else:
        pruned = training.prune(recipe.pruning(task.kind, steps, target), fit)
    write_json(out / _HISTORY, {"kept": pruned["kept"], "steps": pruned.pop("steps")})
    result = {
        "environment": environment(),
        "settings": json.loads(json.dumps(asdict(recipe))),
        "rows": {split: len(found) for split, found in rows.items()},
        "labels": list(task.labels),
        "metric": task.metric,
        "dense": dense,
        "pruned": pruned,
    }
    write_json(out / RESULT, result)
    clear_attempts(training)
    shutil.rmtree(out / "work", ignore_errors=True)
    return result
