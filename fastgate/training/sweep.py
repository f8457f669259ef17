"""A sweep: the runs of a recipe (settings.py), one JSON line each, that can be cut off anywhere.

All runs of a task and a seed start from one dense fine-tuned model, which is also their teacher. Any number
of processes may work on one sweep: each takes a dense model that no other holds, and does its runs.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from filelock import FileLock, Timeout

from fastgate.data.load import load_task
from fastgate.data.task import Task
from fastgate.env import environment
from fastgate.errors import ArgumentError, DataError, format_error
from fastgate.models.handle import get_encoder
from fastgate.models.patching import patch
from fastgate.pruning import Fixed
from fastgate.pruning.objective import Objective
from fastgate.training.disk import check_makeable, full_disk_told
from fastgate.training.feasibility import check_length, check_steps, check_target
from fastgate.training.max_drop import MaxDrop, clear_attempts, hold_out, prune_within
from fastgate.training.methods import config_of, target_of
from fastgate.training.model import demo_model_path, dense_model, load_tokenizer
from fastgate.training.phases import Fit, Listener, Training
from fastgate.training.sweep_config import Settings

Line = dict[str, Any]  # a run's result
GREEDY_BATCHES = 16  # of training rows, for the choice by loss


def read_lines(path: Path) -> list[Line]:
    """The results in a file; a line that a kill cut off is not one of them.

    Raises DataError for a file that holds anything else.
    """
    try:
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8", errors="strict")
    except (OSError, UnicodeDecodeError) as error:
        _refuse_file(path, str(error)[:120], error)
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            result = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            if not line.startswith("{"):
                _refuse_file(path, f"line {number} is no JSON", error)
            continue  # cut off
        if result is None:
            continue
        if not (isinstance(result, dict) and isinstance(result.get("settings"), dict)):
            _refuse_file(path, f"line {number} is no result of a run", None)
        found.append(result)
    return found


def _refuse_file(path: Path, why: str, error: Exception | None) -> NoReturn:
    remedy = "check the path, or choose another file"
    raise DataError(
        format_error("sweep", "results", f"{path}: {why}", "lines that a sweep wrote", remedy)
    ) from error


def left(runs: list[Settings], out: Path) -> list[Settings]:
    """Those whose line is not in `out` yet."""
    there = [line["settings"] for line in read_lines(out)]
    return [run for run in runs if run.identity not in there]


def _append(out: Path, line: Mapping[str, Any]) -> None:
    """One line, whole, unless its run has one; a line that a kill cut off is taken away first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_told(out), FileLock(out.with_name(f".{out.name}.lock")):
        if any(found["settings"] == line["settings"] for found in read_lines(out)):
            return  # a process with another work folder was first
        with out.open("ab+") as file:
            _mend(file)
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _mend(file: BinaryIO) -> None:
    """End the file with a whole line."""
    file.seek(0)
    content = file.read()
    last = content[content.rfind(b"\n") + 1 :]
    try:
        whole = not last or json.loads(last) is not None
    except ValueError:
        whole = False
    if last and whole:
        file.write(b"\n")
    elif last:
        file.truncate(len(content) - len(last))


_KEYS: dict[str, type | tuple[type, ...]] = {
    "task": str, "model": str, "method": str, "metric": str, "kept": list, "layers": int, "gates": list,
    "score": (int, float), "dense_score": (int, float), "seed": int,
}  # fmt: skip


def check_results(path: Path) -> None:
    """Raises DataError unless `path` is a file of results that tables can be made of."""
    if not path.is_file():
        _refuse_file(path, "a folder" if path.is_dir() else "no such file", None)
    for line in read_lines(path):
        wrong = [key for key, kind in _KEYS.items() if not isinstance(line.get(key), kind)]
        if wrong or line["layers"] < 1 or "max_length" not in line["settings"]:
            _refuse_file(path, f"a line without {', '.join(wrong) or 'its settings'}", None)


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


def groups_of(runs: list[Settings]) -> dict[str, list[Settings]]:
    """Runs by the name of their dense model."""
    groups: dict[str, list[Settings]] = {}
    for run in runs:
        groups.setdefault(run.dense, []).append(run)
    return groups


def sweep(
    runs: list[Settings],
    data_dir: Path | None,
    out: Path,
    work: Path,
    *,
    tell: Callable[[str], None] = print,
    listener: Listener | None = None,
) -> None:
    """Do the runs that are left; each line is written to `out` when its run is done.

    work: folder for the dense models, which stay, and for trainings under way. Runs of a dense model that
    another process works on are left to it: `skipped` says which.
    """
    work.mkdir(parents=True, exist_ok=True)
    groups = groups_of(left(runs, out))
    for place, (name, group) in enumerate(groups.items(), 1):
        try:
            held = _lock(work, name).acquire(timeout=0)
        except Timeout:
            continue
        with held:  # a process that is killed lets go too
            chosen = left(group, out)  # another process may have done some meanwhile
            if chosen:
                first = chosen[0]
                tell(
                    f"{first.task} seed {first.seed}: {len(chosen)} runs from one dense model, "
                    f"group {place} of {len(groups)}"
                )
                with full_disk_told(work):
                    _run_group(chosen, data_dir, out, work / name, tell, listener)


def _lock(work: Path, name: str) -> FileLock:
    return FileLock(work / f"{name}.lock")


def skipped(runs: list[Settings], out: Path, work: Path) -> list[str]:
    """Why each group with runs that are left was not done, a line each; empty once every run has its line."""
    said = []
    for name, group in groups_of(left(runs, out)).items():
        try:
            with _lock(work, name).acquire(timeout=0):
                why = "its process ended before it was done; the same command goes on from there"
        except Timeout:
            why = f"another process holds {work / name}.lock; end that, or wait for it"
        first = group[0]
        said.append(f"{first.task} seed {first.seed}: {len(group)} runs are left: {why}")
    return said


def check_runs(runs: list[Settings], data_dir: Path | None) -> None:
    """Raises ArgumentError or DataError for a run that cannot work, as far as that is known before training.

    Runs that differ in their seed alone are as good as each other: one of them is looked at.
    """
    alike = dict.fromkeys(replace(run, seed=runs[0].seed) for run in runs)
    for group in groups_of(list(alike)).values():
        _prepared(group, data_dir)


def _prepared(group: list[Settings], data_dir: Path | None) -> tuple[Task, Any, Any, Any]:
    """(task, tokenizer, patched dense model, tokenised rows) of runs of one dense model, found sound."""
    from transformers import set_seed

    first = group[0]
    where = f"sweep, {first.task} seed {first.seed}"
    source = str(demo_model_path()) if first.model == "minilm" else first.model
    task = load_task(
        first.task, data_dir, evaluate_on=first.evaluate_on.split(",") if first.evaluate_on else (),
        max_train_rows=first.train_rows, max_eval_rows=first.eval_rows, seed=first.seed,
    )  # fmt: skip
    tokenizer = load_tokenizer(source, task)
    set_seed(first.seed)  # the head is new
    model: Any = dense_model(source, task)
    patch(model, pooling=first.pooling)
    check_length(where, "max_length", first.max_length, model)
    rows = task.tokenize(tokenizer, first.max_length, first.stride)
    rows = rows if first.max_drop is None else hold_out(rows, first.seed)
    layers = get_encoder(model).num_layers
    for settings in group:
        if settings.method == "dense":
            continue
        check_steps(where, "epochs", "batch_size", len(rows["train"]), settings.batch_size, settings.epochs)
        target = settings.target if settings.given else Fixed(settings.keep or ())
        # It raises for settings that contradict each other.
        config = config_of(settings, Fixed(()) if isinstance(target, MaxDrop) else target)
        if isinstance(target, Fixed):
            Objective(target, layers)  # it raises for layers that are not there
        else:
            check_target(where, settings.given[0], target, model, rows["train"], config.replacement)
    return task, tokenizer, model, rows


def _run_group(
    chosen: list[Settings],
    data_dir: Path | None,
    out: Path,
    folder: Path,
    tell: Callable[[str], None],
    listener: Listener | None,
) -> None:
    """Runs that share a dense model."""
    first = chosen[0]
    task, tokenizer, model, rows = _prepared(chosen, data_dir)
    for note in task.notes:
        tell(f"{first.task} seed {first.seed}: {note}")
    training = Training(task, folder, tokenizer, rows, listener)
    dense = training.dense(model, _fit(first, first.dense_epochs, first.dense_lr))
    for settings in chosen:
        found = _run(settings, training, dense)
        _append(out, _line(settings, training, dense, found))
        clear_attempts(training, settings.name)
        shutil.rmtree(folder / settings.name, ignore_errors=True)
        shutil.rmtree(folder / "work", ignore_errors=True)
        gc.collect()  # a Trainer is a cycle that holds a model and its optimizer
        doubt = ", layers not told apart by the search" if found.get("separated") is False else ""
        tell(
            f"{settings.task} seed {settings.seed} {settings.method} kept {found['kept']}: "
            f"{task.metric} {found['score']:.4f}, dense {dense['score']:.4f}, {found['seconds']:.0f} s{doubt}"
        )


def _fit(settings: Settings, epochs: float, lr: float) -> Fit:
    return Fit(epochs, settings.batch_size, lr, seed=settings.seed, bf16=settings.bf16)


def _run(settings: Settings, training: Training, dense: dict[str, Any]) -> dict[str, Any]:
    model = dense_model(training.out / "dense", training.task)
    layers = int(model.config.num_hidden_layers)
    if settings.method == "dense":
        nothing: dict[str, Any] = {"replacement": None, "teacher_seconds": 0.0, "steps": []}
        return {**dense, "kept": list(range(layers)), "layers": layers, "seconds": 0.0, **nothing}

    def batches() -> list[Any]:
        rows = training.rows["train"]
        order = random.Random(settings.seed).sample(range(len(rows)), min(len(rows), GREEDY_BATCHES * 32))
        collate = training.task.collator(training.tokenizer)
        chosen = [{k: v for k, v in rows[i].items() if k != "document"} for i in order]
        return [collate(chosen[at : at + 32]) for at in range(0, len(order), 32)]

    target = target_of(settings, layers, model, batches)
    fit = _fit(settings, settings.epochs, settings.lr)
    if isinstance(target, MaxDrop):
        make = functools.partial(config_of, settings)
        return prune_within(training, target, dense, layers, make, fit, settings.name, settings.teacher)
    return training.prune(config_of(settings, target), fit, settings.name, settings.teacher)


def _line(settings: Settings, training: Training, dense: dict[str, Any], found: dict[str, Any]) -> Line:
    task, layers = training.task, found["layers"]
    history = found["steps"][:: max(1, len(found["steps"]) // 40)]
    return {
        "task": settings.task,
        "model": settings.model_name,
        "method": settings.method,
        "replacement": found["replacement"],
        "target": settings.sparsity or settings.speedup or settings.max_drop,
        **({"attempts": found["attempts"]} if "attempts" in found else {}),
        "kept": found["kept"],
        "layers": layers,
        "margin": found.get("margin"),
        "seed": settings.seed,
        "metric": task.metric,
        "score": found["score"],
        "scores": found["scores"],
        "dense_score": dense["score"],
        "train_seconds": found["seconds"],
        "teacher_seconds": found["teacher_seconds"],
        "dense_seconds": dense["seconds"],
        "rows": len(training.rows["train"]),
        "scored": len(training.rows["evaluation"]),
        "input": dict(task.counts),
        "gates": [{"step": e["step"], "open": [round(p, 3) for p in e["open"]]} for e in history],
        "settings": settings.identity,
        "environment": environment(),
    }
