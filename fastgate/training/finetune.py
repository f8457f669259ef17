"""One run: dense fine-tune, self-pruning with the dense model as teacher, scores of both models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgate.data.task import Task
from fastgate.env import environment
from fastgate.errors import ArgumentError, format_error
from fastgate.training.config import FinetuneConfig
from fastgate.training.disk import full_disk_as_oserror, read_json, write_json
from fastgate.training.feasibility import steps_of
from fastgate.training.max_drop import clear_attempts, prune_to
from fastgate.training.phases import RESULT, TaskTrainer
from fastgate.training.preparation import Prepared, Wording, check_pruning, prepare
from fastgate.training.progress import Listener
from fastgate.training.run_folder import HISTORY, WHERE, check_free, check_same, claim, pruning_has_begun
from fastgate.training.setting_ranges import option_of
from fastgate.training.targets import RunTarget, describe_target

_WORDING = Wording(WHERE, option_of)


def read_result(out: Path) -> dict[str, Any]:
    """What `finetune` wrote to `out`/result.json."""
    return dict(read_json(out / RESULT))


def finetune(
    config: FinetuneConfig,
    task: Task,
    out: str | Path,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    tell: Callable[[str], None] | None = None,
    announce: Callable[[str], None] | None = None,
    save_every: float | None = 0.1,
) -> dict[str, Any]:
    """Do a run in the folder `out` and return what `result.json` then holds.

    The folder then has `dense` (Hugging Face's format), `pruned` (fastgate's format), `history.json` (the
    gates at each step) and `result.json`. A killed run continues from its last checkpoint with `resume`.
    Until its pruning has begun it may then have another target.

    Args:
        config: the run.
        task: its checked rows.
        out: folder that does not exist yet, or with `resume` that of the same run.
        resume: whether to continue the run in `out`.
        listener: is called with a Progress after every optimizer step, and after every batch of a scoring.
        tell: is called before training with a sentence about everything that was left out of the rows.
        announce: is called with the target in layers before training, and with the dense score as soon as it
            is known.
        save_every: share of a phase between two checkpoints, None for no checkpoints.

    Raises ArgumentError for a folder in other use and for settings that cannot work, DataError for bad data.
    Both come before the folder is made.
    """
    out = Path(out)
    target = config.target
    if target is None:
        raise ArgumentError(
            format_error(WHERE, "target", None, "a target", "pass e.g. fastgate.Sparsity(0.67)")
        )
    settings = json.loads(json.dumps(config.to_settings()))
    check_free(out, resume)
    before = check_same(out, settings)
    if (out / RESULT).is_file():
        return read_result(out)
    prepared = prepare(config, config.model, task, _WORDING)
    check_pruning(config, target, prepared, _WORDING)
    claim(out, settings, before, prepared.rows)
    if tell is not None:
        for note in task.notes:
            tell(note)
    if announce is not None:
        announce(f"target: {describe_target(target, int(prepared.model.config.num_hidden_layers))}")
    task_trainer = TaskTrainer(task, out, prepared.tokenizer, prepared.rows, listener, save_every)
    dense = task_trainer.dense(prepared.model, config.dense_fit)
    if announce is not None:
        announce(f"dense {task.metric} {dense['score']:.4f} on {len(task.evaluation)} rows")
    pruned = _prune(config, target, task_trainer, dense, prepared)
    with full_disk_as_oserror(out):
        write_json(out / HISTORY, {"kept": pruned["kept"], "steps": pruned.pop("steps")})
        result = _result(settings, prepared, dense, pruned)
        write_json(out / RESULT, result)
    clear_attempts(task_trainer)
    shutil.rmtree(out / "work", ignore_errors=True)
    return result


def _prune(
    config: FinetuneConfig,
    target: RunTarget,
    task_trainer: TaskTrainer,
    dense: dict[str, Any],
    prepared: Prepared,
) -> dict[str, Any]:
    steps = steps_of(len(prepared.rows["train"]), config.batch_size, config.prune_epochs)
    layers = int(prepared.model.config.num_hidden_layers)
    try:
        return prune_to(target, task_trainer, config.with_gate_lr_for(steps), dense, layers)
    except ArgumentError as error:
        out = task_trainer.out
        if pruning_has_begun(out):
            raise
        remedy = f"pass --resume with another target: the dense model in {out} is finished and stays"
        raise ArgumentError(f"{error}; {remedy}") from error


def _result(
    settings: dict[str, Any], prepared: Prepared, dense: dict[str, Any], pruned: dict[str, Any]
) -> dict[str, Any]:
    """What result.json holds."""
    task = prepared.task
    return {
        "environment": environment(),
        "settings": settings,
        "rows": {split: len(rows) for split, rows in prepared.rows.items()},
        "input": dict(task.counts),
        "labels": list(task.labels),
        "metric": task.metric,
        "dense": dense,
        "pruned": pruned,
    }
