"""The sweep config, a YAML file, and the runs that it stands for.

Top-level keys are settings of every run. `tasks`, `seeds` and `runs` say which runs there are: a list inside
a run stands for a run of each of its values. `per_task` overrides settings by task:

    model: minilm
    tasks: [sst2, wnut17]
    seeds: [0, 1, 2]
    epochs: 2
    runs:
      - {method: learned, sparsity: [0.5, 0.67, 0.83]}
      - {method: [random, top_drop], sparsity: 0.67}
    per_task:
      imdb: {max_length: 256, train_rows: 5000}

The settings are those of FinetuneConfig, PruningOptions and SweepRun, with three differences. `epochs` and
`lr` are the pruning phase's. The target is a number under `sparsity`, `speedup` or `max_drop`, or a list of
layers under `keep`. There is no `warmup` and no `data`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from fastgate.data.catalog import CATALOG
from fastgate.errors import ArgumentError, DataError, format_error
from fastgate.nn.choices import POOLINGS, REPLACEMENT_KINDS
from fastgate.pruning import Fixed
from fastgate.pruning.config import GATES
from fastgate.training.config import FinetuneConfig, PruningOptions
from fastgate.training.methods import METHODS
from fastgate.training.phases import TEACHERS
from fastgate.training.setting_ranges import check_range
from fastgate.training.targets import RunTarget, key_of, target_settings, targets_in

MAX_BYTES, MAX_RUNS = 1 << 20, 20_000  # of a sweep config
_LIST_KEYS = ("tasks", "seeds", "runs", "per_task")
_KEY_OF_FIELD = {"prune_epochs": "epochs", "prune_lr": "lr"}  # a field that has another key in files
_DENSE_KEYS = (
    "task", "seed", "train_rows", "eval_rows", "max_length", "stride", "pooling", "model", "batch_size",
    "dense_epochs", "dense_lr", "bf16", "evaluate_on",
)  # fmt: skip
# Settings that did not exist at first, and what they were then.
_FIRST_VALUES: dict[str, Any] = {
    "pooling": "first", "bf16": False, "teacher": "dense",
    "evaluate_on": None, "replacement_lr": None, "dropout": None,
}  # fmt: skip


def key_of_field(field_name: str) -> str:
    """The key that a sweep config has for a field of FinetuneConfig."""
    return _KEY_OF_FIELD.get(field_name, field_name)


@dataclass(frozen=True, kw_only=True)
class SweepRun(FinetuneConfig):
    """All that decides one run's outcome.

    Args:
        model: as in FinetuneConfig, or `minilm`, the model of the demo extra.
        method: one of METHODS.
        train_rows, eval_rows: at most so many rows, None for all.
        evaluate_on: splits that are scored together, separated by commas; None for the task's own.
    """

    model: str = "minilm"
    target: RunTarget | None = None
    method: str = "learned"
    train_rows: int | None = None
    eval_rows: int | None = None
    evaluate_on: str | None = None

    @property
    def dense_name(self) -> str:
        """Name of the dense model that the run starts from: runs of one name share it."""
        settings = self._named_settings
        decisive = {key: value for key, value in settings.items() if key in _DENSE_KEYS}
        decisive["apart"] = settings["max_drop"] is not None
        return f"{self.task}-{self.seed}-{_digest(decisive)[:8]}"

    @property
    def name(self) -> str:
        """Of the run: the same settings, the same name."""
        return f"{self.method}-{_digest(self._named_settings)[:12]}"

    @property
    def model_name(self) -> str:
        """The name of the folder, for a model in a folder."""
        path = Path(self.model)
        return path.name if path.is_dir() else self.model

    @property
    def identity(self) -> dict[str, Any]:
        """The settings in a line of results: as JSON, with the model's name."""
        return dict(json.loads(json.dumps({**self._named_settings, "model": self.model_name})))

    def to_settings(self) -> dict[str, Any]:
        """The settings under the keys of a sweep config, and in the order of lines of results."""
        return {
            "model": self.model,
            "task": self.task,
            **target_settings(self.target),
            **self._fields("max_length", "stride", "pooling", "batch_size"),
            "lr": self.prune_lr,
            **self._fields("bf16", "seed", "method"),
            "keep": self.target.keep if isinstance(self.target, Fixed) else None,
            **self._fields("train_rows", "eval_rows", "evaluate_on", "dense_epochs", "dense_lr"),
            "epochs": self.prune_epochs,
            **vars(self.pruning),
        }

    def _fields(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    @property
    def _named_settings(self) -> dict[str, Any]:
        """Without those that did not exist at first and are as they were then, so that names and lines of
        results from then still match."""
        return {
            key: value
            for key, value in self.to_settings().items()
            if key not in _FIRST_VALUES or value != _FIRST_VALUES[key]
        }


# Key -> the type of its values, as the annotation is written.
_TYPES: dict[str, str] = {
    **{key_of_field(f.name): str(f.type) for f in fields(SweepRun)},
    **{f.name: str(f.type) for f in fields(PruningOptions)},
    **dict.fromkeys(target_settings(None), "float | None"),
    "keep": "tuple[int, ...] | None",
}
for _name in ("target", "pruning", "data", "warmup"):
    del _TYPES[_name]


def make_run(settings: Mapping[str, Any]) -> SweepRun:
    """The run with these settings, under the keys and with the values that a sweep config has.

    Raises ArgumentError for values that no run can have.
    """
    values = {key: _typed(key, value) for key, value in settings.items()}
    _check_choices(values)
    own = {f.name: values[key] for f in fields(SweepRun) if (key := key_of_field(f.name)) in values}
    pruning = {f.name: values[f.name] for f in fields(PruningOptions) if f.name in values}
    method = values.get("method", "learned")
    if method == "dense":  # nothing of a pruning decides its outcome
        dense = {name: value for name, value in own.items() if name in (*_DENSE_KEYS, "method")}
        return SweepRun(**dense)
    return SweepRun(**own, target=_target(method, values), pruning=PruningOptions(**pruning))


def _target(method: str, values: Mapping[str, Any]) -> RunTarget | None:
    """The target of a run, checked for its method. Raises ArgumentError for none or several."""
    keep = values.get("keep")
    if method == "fixed" and keep is None:
        _refuse("keep", "none", "the layers to keep", "give e.g. keep: [1, 4]")
    targets: list[RunTarget] = [*targets_in(values), *([] if keep is None else [Fixed(keep)])]
    allowed = METHODS[method]
    if len(targets) > 1 or (allowed and (not targets or key_of(targets[0]) not in allowed)):
        got = ", ".join(f"{key_of(target)} {values[key_of(target)]}" for target in targets) or "none"
        wanted = "one of " + ", ".join(allowed) if allowed else "one at most"
        _refuse("target", got, wanted, f"give it for {method}, and null for the others")
    return targets[0] if targets else None


def read_sweep_config(path: str | Path, model: str | None = None) -> list[SweepRun]:
    """The runs of a sweep config, seed by seed and there task by task: a sweep that is interrupted early has
    seen every task.

    model: overrides the file's, None for that. Raises DataError for a file that is no sweep config,
    ArgumentError for values that no run can have.
    """
    import yaml

    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        got = f"{path}: {' '.join(str(error).split())[:160]}"
        remedy = "check the path, correct the file"
        raise DataError(format_error("sweep", "sweep file", got, "a YAML file", remedy)) from error
    if not isinstance(content, dict):
        got = f"{path}: a {type(content).__name__}"
        raise DataError(format_error("sweep", "sweep file", got, "keys and values", "see --help"))
    return expand(content if model is None else {**content, "model": model})


def expand(config: Mapping[str, Any]) -> list[SweepRun]:
    """The runs of a sweep config that was read."""
    run_keys = set(_TYPES) - {"task", "seed"}
    _check_keys("sweep file", config, run_keys | set(_LIST_KEYS))
    common = {key: value for key, value in config.items() if key not in _LIST_KEYS}
    tasks, seeds = _as_list(config.get("tasks") or []), _as_list(config.get("seeds", [0]))
    runs, per_task = ({} if config.get(key) is None else config[key] for key in ("runs", "per_task"))
    runs = runs or [{}]
    _check_axes(tasks, seeds, runs, per_task, run_keys)
    combinations = [
        {**common, **(per_task.get(task) or {}), **run, "task": task, "seed": seed}
        for seed, task, run in itertools.product(seeds, tasks, runs)
    ]
    count = sum(math.prod(map(len, _axes(settings).values())) for settings in combinations)
    if count > MAX_RUNS:
        _refuse("sweep file", f"{count} runs", f"at most {MAX_RUNS}", "split it into several files")
    expanded: list[SweepRun] = []
    for settings in combinations:
        axes = _axes(settings)
        for values in itertools.product(*axes.values()):
            expanded.append(make_run({**settings, **dict(zip(axes, values, strict=True))}))
    return list(dict.fromkeys(expanded))


def _check_axes(tasks: list[Any], seeds: list[Any], runs: Any, per_task: Any, run_keys: set[str]) -> None:
    """Refuse lists of tasks, seeds and runs that are empty or of another form."""
    if not tasks:
        _refuse("tasks", "none", "one or more of " + ", ".join(CATALOG), "name the tasks")
    if not seeds:
        _refuse("seeds", "none", "one or more whole numbers", "name the seeds, or leave the key out")
    for task in tasks:
        if not isinstance(task, str) or task not in CATALOG:
            _refuse("tasks", _short(task), "one of " + ", ".join(CATALOG), "correct the name")
    if not isinstance(runs, list):
        _refuse("runs", _short(runs), "a list", "write each run as - {method: learned, sparsity: 0.5}")
    if len(tasks) * len(seeds) * len(runs) > MAX_RUNS:
        got = f"{len(tasks) * len(seeds) * len(runs)} runs"
        _refuse("sweep file", got, f"at most {MAX_RUNS}", "split it into several files")
    for position, run in enumerate(runs):
        _check_keys(f"runs: number {position + 1}", run, run_keys)
    _check_keys("per_task", per_task, set(CATALOG))
    for task, changes in per_task.items():
        if changes is not None:
            _check_keys(f"per_task: {task}", changes, run_keys)


def _axes(settings: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The keys that stand for a run of each of their values."""
    return {key: value for key, value in settings.items() if isinstance(value, list) and key != "keep"}


def _check_keys(where: str, mapping: Any, known: set[str]) -> None:
    """Refuse what is not a mapping with known keys alone."""
    if not isinstance(mapping, Mapping):
        _refuse(where, _short(mapping), "keys and values", "write key: value")
    unknown = [key for key in mapping if not isinstance(key, str) or key not in known]
    if unknown:
        got = ", ".join(key[:40] if isinstance(key, str) else _short(key) for key in unknown[:10])
        _refuse(where, got, ", ".join(sorted(known)), "correct the key")


def _typed(key: str, value: Any) -> Any:
    """The value of a key, converted to its type. Raises ArgumentError for a value of another type."""
    kind = _TYPES[key]
    if value is None:
        if "None" not in kind:
            _refuse(key, "nothing", "a value", "give one, or leave the key out")
        return None
    if kind.startswith("tuple"):
        whole = isinstance(value, list) and all(type(layer) is int and layer >= 0 for layer in value)
        if not whole:
            _refuse(key, _short(value), "a list of layers", "write e.g. keep: [1, 4]")
        return tuple(value)
    if kind.startswith("str"):
        if not isinstance(value, str):
            _refuse(key, _short(value), "a text", "put it in quotes")
        return value
    if kind.startswith("bool"):
        if not isinstance(value, bool):
            _refuse(key, _short(value), "true or false", "write one of them")
        return value
    if kind.startswith("float") and isinstance(value, str):
        try:
            value = float(value)  # YAML reads 5e-5, without a point, as text
        except ValueError:
            _refuse(key, _short(value), "a number", "write it as 5.0e-5 or 0.00005")
    check_range("sweep", key, key, value)
    return value


def _check_choices(values: Mapping[str, Any]) -> None:
    """Raises ArgumentError for a name that is none of its setting's, or that contradicts another setting."""
    choices: dict[str, Any] = {
        "task": CATALOG, "pooling": POOLINGS, "teacher": TEACHERS, "method": METHODS,
        "replacement": REPLACEMENT_KINDS, "gates": GATES,
    }  # fmt: skip
    for key, known in choices.items():
        value = values.get(key)
        if value is not None and value not in known:
            _refuse(key, _short(value), "one of " + ", ".join(known), "correct the name")
    if values.get("pooling") == "mean" and CATALOG[values["task"]].kind == "tokens":
        _refuse("pooling", f"mean for {values['task']}", "first for a token task", "set it by per_task")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    """A value from a file, however large or deep: the file may be hostile."""
    return reprlib.repr(value)


def _refuse(argument: str, got: object, wanted: str, remedy: str) -> NoReturn:
    raise ArgumentError(format_error("sweep", argument, got, wanted, remedy))
