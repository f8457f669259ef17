"""A sweep: methods, sparsities and seeds on tasks, one JSON line a run, that can be cut off anywhere.

A recipe is YAML. Top-level keys are the fields of Settings, for every run; `tasks`, `seeds` and `runs` say
which runs there are (a list inside a run stands for each of its values); `per_task` overrides fields by task:

    model: minilm
    tasks: [sst2, wnut17]
    seeds: [0, 1, 2]
    epochs: 2
    runs:
      - {method: learned, sparsity: [0.5, 0.67, 0.83]}
      - {method: [random, top_drop], sparsity: 0.67}
    per_task:
      imdb: {max_length: 256, train_rows: 5000}

All runs of a task and a seed start from one dense fine-tuned model, which is also their teacher. Any number
of processes may work on one sweep: each takes a dense model that no other holds, and does its runs.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..errors import ArgumentError, DataError, say
from ..info import environment
from ..patch import patch
from ..pruning import Distill, Fixed, PruningConfig, Sparsity, Speedup, criteria
from .budget import MaxDrop, clear_attempts, hold_out, prune_within
from .catalog import CATALOG
from .load import load_task
from .model import demo_model_path, dense_model, load_tokenizer
from .training import Fit, Training

GREEDY_BATCHES = 16  # of training rows, for the choice by loss
_LISTS = ("tasks", "seeds", "runs")
_DATA = ("task", "seed", "train_rows", "eval_rows", "max_length", "stride")
_DENSE = (*_DATA, "model", "batch_size", "dense_epochs", "dense_lr")


@dataclass(frozen=True)
class Settings:
    """All that decides one run's outcome.

    model: `minilm` (the demo extra's), a name of the hub, or a folder. method: one of METHODS. sparsity: the
    share of the attention sublayers to remove; for `learned` also speedup: how many times cheaper the encoder
    shall be, or max_drop: share of the dense score that the cut may cost; keep: the layers of `fixed`.
    train_rows, eval_rows: at most so many, None for all. max_length: tokens a row is cut at, or with `stride`
    its windows' length (Task.tokenize). dense_epochs, dense_lr: of the dense fine-tune; epochs, lr: of the
    pruning run. logits, hidden: weights of the distillation, both 0 for none. The rest: as PruningConfig has
    them, None for its own.
    """

    model: str = "minilm"
    task: str = ""
    seed: int = 0
    method: str = "learned"
    sparsity: float | None = None
    speedup: float | None = None
    max_drop: float | None = None
    keep: tuple[int, ...] | None = None
    train_rows: int | None = None
    eval_rows: int | None = None
    max_length: int = 128
    stride: int | None = None
    batch_size: int = 32
    dense_epochs: float = 3.0
    dense_lr: float = 5e-5
    epochs: float = 3.0
    lr: float = 5e-5
    replacement: str | None = None
    logits: float | None = None
    hidden: float | None = None
    temperature: float | None = None
    warm: float | None = None
    ramp: float | None = None
    harden: float | None = None
    gate_lr: float | None = None
    gates: str | None = None

    @property
    def dense(self) -> str:
        """Name of the dense model that the run starts from: runs of one name share it."""
        decisive = {**{name: getattr(self, name) for name in _DENSE}, "apart": self.max_drop is not None}
        decides = json.dumps(decisive, sort_keys=True)
        return f"{self.task}-{self.seed}-{hashlib.sha256(decides.encode()).hexdigest()[:8]}"

    @property
    def name(self) -> str:
        """Of the run: the same settings, the same name."""
        decides = json.dumps(asdict(self), sort_keys=True)
        return f"{self.method}-{hashlib.sha256(decides.encode()).hexdigest()[:12]}"


def _kept(settings: Settings, layers: int) -> int:
    """How many layers keep their attention."""
    if settings.sparsity is None:
        _refuse("sparsity", "none", "the share to remove, in (0, 1)", f"give it for {settings.method}")
    return layers - int(settings.sparsity * layers + 0.5)  # type: ignore[operator]


def _learned(settings: Settings, layers: int, model: Any, batches: Callable[[], list]) -> Any:
    if settings.max_drop is not None:
        return MaxDrop(settings.max_drop)
    if settings.speedup is not None:
        return Speedup(settings.speedup)
    return Sparsity(settings.sparsity or 0.0)


def _greedy(settings: Settings, layers: int, model: Any, batches: Callable[[], list]) -> Fixed:
    patched = patch(model).eval()
    return Fixed(tuple(criteria.greedy_by_loss(patched, batches(), _kept(settings, layers))))


# Method -> the target it makes of (settings, layers, the dense model, a maker of labelled batches).
METHODS: dict[str, Callable[[Settings, int, Any, Callable[[], list]], Any]] = {
    "dense": lambda s, layers, *_: None,  # the dense model as it is
    "dense_longer": lambda s, layers, *_: Fixed(tuple(range(layers))),  # the same steps and distillation more
    "learned": _learned,
    "random": lambda s, layers, *_: Fixed(tuple(criteria.random_choice(layers, _kept(s, layers), s.seed))),
    "top_drop": lambda s, layers, *_: Fixed(tuple(criteria.top_drop(layers, _kept(s, layers)))),
    "every_other": lambda s, layers, *_: Fixed(tuple(criteria.every_other(layers, _kept(s, layers)))),
    "greedy": _greedy,
    "fixed": lambda s, layers, *_: Fixed(tuple(s.keep or ())),
}


def _refuse(argument: str, got: object, wanted: str, remedy: str) -> None:
    raise ArgumentError(say("sweep", argument, got, wanted, remedy))


def read_recipe(path: str | Path, model: str | None = None) -> list[Settings]:
    """The runs of a recipe, in its order: by task and seed, so that runs of one dense model come together.

    model: in place of the recipe's, None for that. Raises DataError for a file that is not a recipe,
    ArgumentError for values that no run can have.
    """
    import yaml

    path = Path(path)
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        got = f"{path}: {' '.join(str(error).split())[:160]}"
        raise DataError(
            say("sweep", "recipe", got, "a YAML file", "check the path, mend the file")
        ) from error
    if not isinstance(found, dict):
        raise DataError(
            say("sweep", "recipe", f"{path}: a {type(found).__name__}", "keys and values", "see --help")
        )
    return expand(found if model is None else {**found, "model": model})


def expand(recipe: Mapping[str, Any]) -> list[Settings]:
    """The runs of a recipe that was read."""
    known = {field.name for field in fields(Settings)}
    base = {key: value for key, value in recipe.items() if key not in (*_LISTS, "per_task")}
    tasks, seeds = _listed(recipe.get("tasks", [])), _listed(recipe.get("seeds", [0]))
    runs, per_task = recipe.get("runs") or [{}], recipe.get("per_task") or {}
    if not tasks:
        _refuse("tasks", "none", "one or more of " + ", ".join(CATALOG), "name the tasks")
    made: list[Settings] = []
    for task, seed, run in itertools.product(tasks, seeds, runs):
        given = {**base, **(per_task.get(task) or {}), **run, "task": task, "seed": seed}
        unknown = sorted(set(given) - known)
        if unknown:
            _refuse(
                "recipe", ", ".join(unknown), ", ".join(sorted(known | {*_LISTS, "per_task"})), "mend the key"
            )
        several = {key: value for key, value in given.items() if isinstance(value, list) and key != "keep"}
        for values in itertools.product(*several.values()):
            one = {**given, **dict(zip(several, values, strict=True))}
            one["keep"] = None if one.get("keep") is None else tuple(one["keep"])
            made.append(_checked(Settings(**one)))
    return list(dict.fromkeys(made))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _checked(settings: Settings) -> Settings:
    if settings.task not in CATALOG:
        _refuse("tasks", repr(settings.task), "one of " + ", ".join(CATALOG), "mend the name")
    if settings.method not in METHODS:
        _refuse("method", repr(settings.method), "one of " + ", ".join(METHODS), "mend the name")
    if settings.method == "fixed" and settings.keep is None:
        _refuse("keep", "none", "the layers to keep", "give e.g. keep: [1, 4]")
    if settings.method == "dense":  # nothing of a pruning decides its outcome
        plain = {f.name: f.default for f in fields(Settings) if f.name not in (*_DENSE, "method")}
        return replace(settings, **plain)  # type: ignore[arg-type]
    if settings.method in ("learned", "random", "top_drop", "every_other", "greedy"):
        targets = ("sparsity", "speedup", "max_drop") if settings.method == "learned" else ("sparsity",)
        given = [n for n in ("sparsity", "speedup", "max_drop") if getattr(settings, n) is not None]
        share = settings.sparsity is None or 0.0 < settings.sparsity < 1.0
        if len(given) != 1 or given[0] not in targets or not share:
            got = ", ".join(f"{n} {getattr(settings, n)}" for n in given) or "none"
            wanted = "one of " + ", ".join(targets) + ", a sparsity in (0, 1)"
            _refuse("target", got, wanted, f"give it for {settings.method}")
    return settings


def config_of(settings: Settings, target: Any) -> PruningConfig:
    """How a run prunes."""
    names = ("replacement", "warm", "ramp", "harden", "gate_lr", "gates")
    given = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    terms = {
        n: getattr(settings, n)
        for n in ("logits", "hidden", "temperature")
        if getattr(settings, n) is not None
    }
    distill = Distill(**terms)
    if not (distill.logits or distill.hidden):
        given["distill"] = None
    elif terms:
        given["distill"] = distill
    return PruningConfig(target=target, seed=settings.seed, **given)


def read_lines(path: Path) -> list[dict[str, Any]]:
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


def identity(settings: Settings) -> dict[str, Any]:
    """What a line says of its settings: as JSON has them, a model in a folder by the folder's name."""
    found = {**asdict(settings), "model": _model_name(settings)}
    return dict(json.loads(json.dumps(found)))


def _model_name(settings: Settings) -> str:
    path = Path(settings.model)
    return path.name if path.is_dir() else settings.model


def left(runs: list[Settings], out: Path) -> list[Settings]:
    """Those whose line is not in `out` yet."""
    there = [line["settings"] for line in read_lines(out)]
    return [run for run in runs if identity(run) not in there]


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
    for name, group in itertools.groupby(
        sorted(left(runs, out), key=lambda run: run.dense), lambda r: r.dense
    ):
        try:
            held = FileLock(work / f"{name}.lock").acquire(timeout=0)
        except Timeout:
            continue
        with held:  # a process that is killed lets go too
            chosen = left(list(group), out)  # another process may have done some meanwhile
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
        first.task, data_dir, max_train_rows=first.train_rows, max_eval_rows=first.eval_rows, seed=first.seed
    )
    tokenizer = load_tokenizer(source, task)
    rows = task.tokenize(tokenizer, first.max_length, first.stride)
    training = Training(
        task, folder, tokenizer, rows if first.max_drop is None else hold_out(rows, first.seed)
    )
    set_seed(first.seed)  # the head is new
    dense = training.dense(patch(dense_model(source, task)), _fit(first, first.dense_epochs, first.dense_lr))
    for settings in chosen:
        found = _run(settings, training, dense)
        _append(out, _line(settings, training, dense, found))
        clear_attempts(training, settings.name)
        shutil.rmtree(folder / settings.name, ignore_errors=True)
        shutil.rmtree(folder / "work", ignore_errors=True)
        tell(
            f"{settings.task} seed {settings.seed} {settings.method} kept {found['kept']}: "
            f"{task.metric} {found['score']:.4f}, dense {dense['score']:.4f}, {found['seconds']:.0f} s"
        )


def _fit(settings: Settings, epochs: float, lr: float) -> Fit:
    return Fit(epochs, settings.batch_size, lr, seed=settings.seed)


def _run(settings: Settings, training: Training, dense: dict[str, Any]) -> dict[str, Any]:
    model = dense_model(training.out / "dense", training.task)
    layers = int(model.config.num_hidden_layers)
    if settings.method == "dense":
        nothing = {"teacher_seconds": 0.0, "steps": []}
        return {**dense, "kept": list(range(layers)), "layers": layers, "seconds": 0.0, **nothing}

    def batches() -> list[Any]:
        rows = training.rows["train"]
        order = random.Random(settings.seed).sample(range(len(rows)), min(len(rows), GREEDY_BATCHES * 32))
        collate = training.task.collator(training.tokenizer)
        chosen = [{k: v for k, v in rows[i].items() if k != "document"} for i in order]
        return [collate(chosen[at : at + 32]) for at in range(0, len(order), 32)]

    target = METHODS[settings.method](settings, layers, model, batches)
    fit = _fit(settings, settings.epochs, settings.lr)
    if isinstance(target, MaxDrop):
        make = functools.partial(config_of, settings)
        return prune_within(training, target, dense, layers, make, fit, settings.name)
    return training.prune(config_of(settings, target), fit, settings.name)


def _line(
    settings: Settings, training: Training, dense: dict[str, Any], found: dict[str, Any]
) -> dict[str, Any]:
    task, layers = training.task, found["layers"]
    history = found["steps"][:: max(1, len(found["steps"]) // 40)]
    return {
        "task": settings.task,
        "model": _model_name(settings),
        "method": settings.method,
        "replacement": settings.replacement or PruningConfig(target=Sparsity(0.5)).replacement,
        "target": settings.sparsity or settings.speedup or settings.max_drop,
        **({"attempts": found["attempts"]} if "attempts" in found else {}),
        "kept": found["kept"],
        "layers": layers,
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
        "settings": identity(settings),
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
