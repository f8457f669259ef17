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
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..info import environment
from ..patch import patch
from .budget import MaxDrop, clear_attempts, hold_out, prune_within
from .load import load_task
from .methods import config_of, target_of
from .model import demo_model_path, dense_model, load_tokenizer
from .settings import Settings
from .training import Fit, Training

Line = dict[str, Any]  # a run's result
GREEDY_BATCHES = 16  # of training rows, for the choice by loss


def read_lines(path: Path) -> list[Line]:
    """The results in a file; a last line that a kill cut off is not one of them."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def left(runs: list[Settings], out: Path) -> list[Settings]:
    """Those whose line is not in `out` yet."""
    there = [line["settings"] for line in read_lines(out)]
    return [run for run in runs if run.identity not in there]


def _append(out: Path, line: Mapping[str, Any]) -> None:
    """One line, whole: after a line that a kill cut off it begins anew."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_name(f".{out.name}.lock")):
        cut = out.is_file() and not out.read_bytes().endswith(b"\n") and out.stat().st_size > 0
        with out.open("a") as file:
            file.write(("\n" if cut else "") + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def sweep(
    runs: list[Settings],
    data_dir: Path | None,
    out: Path,
    work: Path,
    *,
    tell: Callable[[str], None] = print,
) -> None:
    """Do the runs that are left; each line is written to `out` when its run is done.

    work: folder for the dense models, which stay, and for trainings under way. Runs of a dense model that
    another process works on are left to it.
    """
    work.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Settings]] = {}
    for run in left(runs, out):
        groups.setdefault(run.dense, []).append(run)
    for name, group in groups.items():
        try:
            held = FileLock(work / f"{name}.lock").acquire(timeout=0)
        except Timeout:
            continue
        with held:  # a process that is killed lets go too
            chosen = left(group, out)  # another process may have done some meanwhile
            if chosen:
                _run_group(chosen, data_dir, out, work / name, tell)


def _run_group(
    chosen: list[Settings], data_dir: Path | None, out: Path, folder: Path, tell: Callable[[str], None]
) -> None:
    """Runs that share a dense model."""
    from transformers import set_seed

    first = chosen[0]
    source = str(demo_model_path()) if first.model == "minilm" else first.model
    task = load_task(
        first.task, data_dir, evaluate_on=first.evaluate_on.split(",") if first.evaluate_on else (),
        max_train_rows=first.train_rows, max_eval_rows=first.eval_rows, seed=first.seed,
    )  # fmt: skip
    tokenizer = load_tokenizer(source, task)
    rows = task.tokenize(tokenizer, first.max_length, first.stride)
    training = Training(
        task, folder, tokenizer, rows if first.max_drop is None else hold_out(rows, first.seed)
    )
    set_seed(first.seed)  # the head is new
    model = patch(dense_model(source, task), pooling=first.pooling)
    dense = training.dense(model, _fit(first, first.dense_epochs, first.dense_lr))
    for settings in chosen:
        found = _run(settings, training, dense)
        _append(out, _line(settings, training, dense, found))
        clear_attempts(training, settings.name)
        shutil.rmtree(folder / settings.name, ignore_errors=True)
        shutil.rmtree(folder / "work", ignore_errors=True)
        gc.collect()  # a Trainer is a cycle that holds a model and its optimizer
        tell(
            f"{settings.task} seed {settings.seed} {settings.method} kept {found['kept']}: "
            f"{task.metric} {found['score']:.4f}, dense {dense['score']:.4f}, {found['seconds']:.0f} s"
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
        "gates": [{"step": e["step"], "open": [round(p, 3) for p in e["open"]]} for e in history],
        "settings": settings.identity,
        "environment": environment(),
    }


def run_workers(arguments: list[str], workers: int) -> int:
    """The same command in so many processes, cores and GPUs shared among them; 0 if all went well."""
    cores, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    started = []
    for worker in range(workers):
        env = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // workers))}
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = str(worker % gpus)
        started.append(subprocess.Popen([sys.executable, "-m", "fastgate.cli", *arguments], env=env))
    return max([process.wait() for process in started], default=0)
