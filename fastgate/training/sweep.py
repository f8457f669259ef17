"""A sweep: the runs of a sweep config (sweep_config.py). It can be interrupted at any point and continued.

All runs of a task and a seed start from one dense fine-tuned model, which is also their teacher. Any number
of processes may work on one sweep. Each takes a dense model that no other process holds, and does its runs.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastgate.data.load import load_task
from fastgate.env import environment
from fastgate.errors import ArgumentError, format_error
from fastgate.pruning import Fixed
from fastgate.training.disk import check_makeable, full_disk_as_oserror
from fastgate.training.evaluate import collator_of
from fastgate.training.max_drop import clear_attempts, prune_to
from fastgate.training.methods import target_of
from fastgate.training.model import demo_model_path, dense_model
from fastgate.training.phases import TaskTrainer
from fastgate.training.preparation import Prepared, Wording, check_pruning, prepare
from fastgate.training.progress import DENSE, Listener
from fastgate.training.sweep_config import SweepRun, key_of_field
from fastgate.training.sweep_results import Line, append_line, read_lines
from fastgate.training.targets import number_of

GREEDY_BATCHES, GREEDY_BATCH_SIZE = 16, 32  # of training rows, for the choice by loss


def runs_left(runs: list[SweepRun], out: Path) -> list[SweepRun]:
    """Those whose line is not in `out` yet."""
    finished = [line["settings"] for line in read_lines(out)]
    return [run for run in runs if run.identity not in finished]


def check_files(out: Path, work: Path) -> None:
    """Raises DataError or ArgumentError unless results can be kept in `out` and models in `work`."""
    check_makeable("sweep", "--out", out.parent)
    if out.is_dir():
        got = f"{out}, a folder"
        raise ArgumentError(format_error("sweep", "--out", got, "a file", "name the file in it"))
    if out.exists() and not os.access(out, os.W_OK):
        got = f"{out}, which cannot be written to"
        raise ArgumentError(format_error("sweep", "--out", got, "a file that can be", "choose another path"))
    read_lines(out)
    check_makeable("sweep", "--work", work)


def group_by_dense_model(runs: list[SweepRun]) -> dict[str, list[SweepRun]]:
    """Runs by the name of their dense model."""
    groups: dict[str, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault(run.dense_name, []).append(run)
    return groups


def sweep(
    runs: list[SweepRun],
    data_dir: Path | None,
    out: Path,
    work: Path,
    *,
    tell: Callable[[str], None] = print,
    listener: Listener | None = None,
) -> None:
    """Do the runs that are left. Each line is written to `out` as soon as its run is finished.

    work: folder for the dense models, which stay, and for trainings under way. Runs of a dense model that
    another process holds are left to that process: `describe_runs_left` lists them. tell: is called with a
    line of text for each group and each run.
    """
    work.mkdir(parents=True, exist_ok=True)
    groups = group_by_dense_model(runs_left(runs, out))
    for number, (name, group) in enumerate(groups.items(), 1):
        try:
            lock = _lock(work, name).acquire(timeout=0)
        except Timeout:
            continue
        with lock:  # a process that is killed releases it too
            group = runs_left(group, out)  # another process may have done some of them meanwhile
            if group:
                first = group[0]
                tell(
                    f"{first.task} seed {first.seed}: {len(group)} runs from one dense model, "
                    f"group {number} of {len(groups)}"
                )
                with full_disk_as_oserror(work):
                    do_group(group, data_dir, out, work / name, tell, listener)


def _lock(work: Path, name: str) -> FileLock:
    return FileLock(work / f"{name}.lock")


def describe_runs_left(runs: list[SweepRun], out: Path, work: Path) -> list[str]:
    """Why runs are left, a line for each group of them; empty once every run has its line."""
    lines = []
    for name, group in group_by_dense_model(runs_left(runs, out)).items():
        try:
            with _lock(work, name).acquire(timeout=0):
                reason = "its process ended too early; run the same command again to continue"
        except Timeout:
            reason = f"another process holds {work / name}.lock; end that, or wait for it"
        first = group[0]
        lines.append(f"{first.task} seed {first.seed}: {len(group)} runs are left: {reason}")
    return lines


def check_runs(runs: list[SweepRun], data_dir: Path | None) -> None:
    """Raises ArgumentError or DataError for a run that cannot work, as far as that is known before training.

    Of runs that differ in their seed alone, only one is checked.
    """
    without_seeds = dict.fromkeys(replace(run, seed=runs[0].seed) for run in runs)
    for group in group_by_dense_model(list(without_seeds)).values():
        _prepare_group(group, data_dir)


def _prepare_group(group: list[SweepRun], data_dir: Path | None) -> Prepared:
    """What runs of one dense model train on, once each of them is found to work."""
    first = group[0]
    wording = Wording(f"sweep, {first.task} seed {first.seed}", key_of_field)
    source = str(demo_model_path()) if first.model == "minilm" else first.model
    task = load_task(
        first.task,
        data_dir,
        evaluate_on=first.evaluate_on.split(",") if first.evaluate_on else (),
        max_train_rows=first.train_rows,
        max_eval_rows=first.eval_rows,
        seed=first.seed,
    )
    prepared = prepare(first, source, task, wording)
    for run in group:
        if run.method != "dense":
            check_pruning(run, run.target or Fixed(()), prepared, wording)
    return prepared


def do_group(
    group: list[SweepRun],
    data_dir: Path | None,
    out: Path,
    folder: Path,
    tell: Callable[[str], None],
    listener: Listener | None,
) -> None:
    """Do runs that share a dense model, which is kept in `folder`."""
    first = group[0]
    prepared = _prepare_group(group, data_dir)
    task = prepared.task
    for note in task.notes:
        tell(f"{first.task} seed {first.seed}: {note}")
    task_trainer = TaskTrainer(task, folder, prepared.tokenizer, prepared.rows, listener)
    dense = task_trainer.dense(prepared.model, first.dense_fit)
    for run in group:
        result = do_run(run, task_trainer, dense)
        append_line(out, _line(run, task_trainer, dense, result))
        clear_attempts(task_trainer, run.name)
        shutil.rmtree(folder / run.name, ignore_errors=True)
        shutil.rmtree(folder / "work", ignore_errors=True)
        gc.collect()  # a Trainer is a cycle that holds a model and its optimizer
        doubt = ", layers not told apart by the search" if result.get("separated") is False else ""
        tell(
            f"{run.task} seed {run.seed} {run.method} kept {result['kept']}: "
            f"{task.metric} {result['score']:.4f}, dense {dense['score']:.4f}, "
            f"{result['seconds']:.0f} s{doubt}"
        )


def do_run(run: SweepRun, task_trainer: TaskTrainer, dense: dict[str, Any]) -> dict[str, Any]:
    """Prune the dense model as the run says. dense: the result of TaskTrainer.dense."""
    model = dense_model(task_trainer.out / DENSE, task_trainer.task)
    layers = int(model.config.num_hidden_layers)
    if run.method == "dense":
        no_pruning: dict[str, Any] = {"replacement": None, "teacher_seconds": 0.0, "steps": []}
        return {**dense, "kept": list(range(layers)), "layers": layers, "seconds": 0.0, **no_pruning}
    target = target_of(run, layers, model, lambda: _greedy_batches(run, task_trainer))
    return prune_to(target, task_trainer, run, dense, layers, run.name)


def _greedy_batches(run: SweepRun, task_trainer: TaskTrainer) -> list[Any]:
    """Labelled batches of training rows, drawn by the run's seed."""
    rows = task_trainer.rows["train"]
    count = min(len(rows), GREEDY_BATCHES * GREEDY_BATCH_SIZE)
    order = random.Random(run.seed).sample(range(len(rows)), count)
    collate = collator_of(task_trainer.task, task_trainer.tokenizer)
    drawn = [{k: v for k, v in rows[i].items() if k != "document"} for i in order]
    return [collate(drawn[start : start + GREEDY_BATCH_SIZE]) for start in range(0, count, GREEDY_BATCH_SIZE)]


def _line(run: SweepRun, task_trainer: TaskTrainer, dense: dict[str, Any], result: dict[str, Any]) -> Line:
    task = task_trainer.task
    history = result["steps"][:: max(1, len(result["steps"]) // 40)]
    return {
        "task": run.task,
        "model": run.model_name,
        "method": run.method,
        "replacement": result["replacement"],
        "target": number_of(run.target),
        **({"attempts": result["attempts"]} if "attempts" in result else {}),
        "kept": result["kept"],
        "layers": result["layers"],
        "margin": result.get("margin"),
        "seed": run.seed,
        "metric": task.metric,
        "score": result["score"],
        "scores": result["scores"],
        "dense_score": dense["score"],
        "train_seconds": result["seconds"],
        "teacher_seconds": result["teacher_seconds"],
        "dense_seconds": dense["seconds"],
        "rows": len(task_trainer.rows["train"]),
        "scored": len(task_trainer.rows["evaluation"]),
        "input": dict(task.counts),
        "gates": [{"step": e["step"], "open": [round(p, 3) for p in e["open"]]} for e in history],
        "settings": run.identity,
        "environment": environment(),
    }
