"""A sweep's recipe, and the settings of each run that it stands for.

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
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from fastgate.data.catalog import CATALOG
from fastgate.errors import ArgumentError, DataError, format_error
from fastgate.models.handle import POOLINGS
from fastgate.nn.replacement import KINDS
from fastgate.pruning.config import GATES
from fastgate.training.config import TARGETS, Job
from fastgate.training.phases import TEACHERS
from fastgate.training.setting_ranges import check_range

# Method -> what of its settings may say how much to remove: one of these, and no other.
METHODS: dict[str, tuple[str, ...]] = {
    "dense": (),  # the dense model as it is
    "dense_longer": (),  # the same steps and distillation more
    "learned": TARGETS,
    "random": ("sparsity",),
    "top_drop": ("sparsity",),
    "every_other": ("sparsity",),
    "greedy": ("sparsity",),  # by the loss on training rows
    "fixed": (),  # `keep` says it
}
MOST_BYTES, MAX_RUNS = 1 << 20, 20_000  # of a recipe
_LISTS = ("tasks", "seeds", "runs", "per_task")
_DENSE = (
    "task", "seed", "train_rows", "eval_rows", "max_length", "stride", "pooling", "model", "batch_size",
    "dense_epochs", "dense_lr", "bf16", "evaluate_on",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(Job):
    """All that decides one run's outcome.

    model: `minilm` (the demo extra's) besides. method: one of METHODS. keep: the layers of `fixed`.
    train_rows, eval_rows: at most so many, None for all. evaluate_on: splits that are scored together, by
    commas, None for the task's own. dense_epochs, dense_lr: of the dense fine-tune; epochs, lr: of the
    pruning run. logits, hidden, temperature, labels, dropout, swap: as Distill has them, logits and hidden 0
    for none; teacher: one of TEACHERS, whom it listens to. The rest: as PruningConfig has them, None for its
    own.
    """

    model: str = "minilm"
    method: str = "learned"
    keep: tuple[int, ...] | None = None
    train_rows: int | None = None
    eval_rows: int | None = None
    evaluate_on: str | None = None
    dense_epochs: float = 3.0
    dense_lr: float = 5e-5
    epochs: float = 3.0
    replacement: str | None = None
    logits: float | None = None
    hidden: float | None = None
    temperature: float | None = None
    labels: float | None = None
    dropout: float | None = None
    swap: float | None = None
    teacher: str = TEACHERS[0]
    warm: float | None = None
    ramp: float | None = None
    harden: float | None = None
    gate_lr: float | None = None
    gates: str | None = None
    replacement_lr: float | None = None

    @property
    def dense(self) -> str:
        """Name of the dense model that the run starts from: runs of one name share it."""
        decisive = {name: value for name, value in self._told.items() if name in _DENSE}
        decisive["apart"] = self.max_drop is not None
        return f"{self.task}-{self.seed}-{_digest(decisive)[:8]}"

    @property
    def name(self) -> str:
        """Of the run: the same settings, the same name."""
        return f"{self.method}-{_digest(self._told)[:12]}"

    @property
    def model_name(self) -> str:
        """Of a model in a folder the folder's."""
        path = Path(self.model)
        return path.name if path.is_dir() else self.model

    @property
    def identity(self) -> dict[str, Any]:
        """What a line of results says of the settings: as JSON has them, the model by its name."""
        return dict(json.loads(json.dumps({**self._told, "model": self.model_name})))

    @property
    def _told(self) -> dict[str, Any]:
        """All of it; what was no choice once only if it is not as it was then, so that names and lines of
        results from then still hold."""
        before = {"pooling": "first", "bf16": False, "teacher": "dense"}
        before |= dict.fromkeys(("evaluate_on", "replacement_lr", "dropout"))
        return {k: v for k, v in asdict(self).items() if k not in before or v != before[k]}


_TYPES = {field.name: str(field.type) for field in fields(Settings)}  # annotations, as they are written


def read_recipe(path: str | Path, model: str | None = None) -> list[Settings]:
    """The runs of a recipe, seed by seed and there task by task: a sweep cut off early has seen every task.

    model: in place of the recipe's, None for that. Raises DataError for a file that is not a recipe,
    ArgumentError for values that no run can have.
    """
    import yaml

    path = Path(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        got = f"{path}: {' '.join(str(error).split())[:160]}"
        raise DataError(
            format_error("sweep", "recipe", got, "a YAML file", "check the path, mend the file")
        ) from error
    if not isinstance(found, dict):
        raise DataError(
            format_error(
                "sweep", "recipe", f"{path}: a {type(found).__name__}", "keys and values", "see --help"
            )
        )
    return expand(found if model is None else {**found, "model": model})


def expand(recipe: Mapping[str, Any]) -> list[Settings]:
    """The runs of a recipe that was read."""
    known = {field.name for field in fields(Settings)}
    _only("recipe", recipe, (known | set(_LISTS)) - {"task", "seed"})
    base = {key: value for key, value in recipe.items() if key not in _LISTS}
    tasks, seeds = _listed(recipe.get("tasks") or []), _listed(recipe.get("seeds", [0]))
    runs, per_task = ({} if recipe.get(key) is None else recipe[key] for key in ("runs", "per_task"))
    runs = runs or [{}]
    if not tasks:
        _refuse("tasks", "none", "one or more of " + ", ".join(CATALOG), "name the tasks")
    if not seeds:
        _refuse("seeds", "none", "one or more whole numbers", "name the seeds, or leave the key out")
    for task in tasks:
        _checked_task(task)
    if not isinstance(runs, list):
        _refuse("runs", _short(runs), "a list", "write each run as - {method: learned, sparsity: 0.5}")
    for place, run in enumerate(runs):
        _only(f"runs: number {place + 1}", run, known - {"task", "seed"})
    _only("per_task", per_task, set(CATALOG))
    for task, changes in per_task.items():
        if changes is not None:
            _only(f"per_task: {task}", changes, known - {"task", "seed"})
    most = len(seeds) * sum(_count({**base, **(per_task.get(t) or {}), **r}) for t in tasks for r in runs)
    if most > MAX_RUNS:
        _refuse("recipe", f"{most} runs", f"at most {MAX_RUNS}", "make several recipes of it")
    made: list[Settings] = []
    for seed, task, run in itertools.product(seeds, tasks, runs):
        given = {**base, **(per_task.get(task) or {}), **run, "task": task, "seed": seed}
        several = _several(given)
        for values in itertools.product(*several.values()):
            one = {**given, **dict(zip(several, values, strict=True))}
            typed = {key: _typed(key, value) for key, value in one.items()}
            made.append(_checked(Settings(**typed)))
    return list(dict.fromkeys(made))


def _several(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The keys that stand for a run of each of their values."""
    return {key: value for key, value in given.items() if isinstance(value, list) and key != "keep"}


def _count(given: Mapping[str, Any]) -> int:
    return math.prod(len(value) for value in _several(given).values())


def _only(where: str, found: Any, known: set[str]) -> None:
    """Refuse what is not a mapping with known keys alone."""
    if not isinstance(found, Mapping):
        _refuse(where, _short(found), "keys and values", "write key: value")
    unknown = [key for key in found if not isinstance(key, str) or key not in known]
    if unknown:
        got = ", ".join(key[:40] if isinstance(key, str) else _short(key) for key in unknown[:10])
        _refuse(where, got, ", ".join(sorted(known)), "mend the key")


def _typed(key: str, value: Any) -> Any:
    """The value of a key of Settings, of the type that the field has."""
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
            value = float(value)  # YAML takes 5e-5, without a point, for a text
        except ValueError:
            _refuse(key, _short(value), "a number", "write it as 5.0e-5 or 0.00005")
    check_range("sweep", key, key, value)
    return value


def _checked_task(task: Any) -> None:
    if not isinstance(task, str) or task not in CATALOG:
        _refuse("tasks", _short(task), "one of " + ", ".join(CATALOG), "mend the name")


def _checked(settings: Settings) -> Settings:
    _checked_task(settings.task)
    if settings.pooling not in POOLINGS:
        _refuse("pooling", _short(settings.pooling), "one of " + ", ".join(POOLINGS), "mend the name")
    if settings.pooling == "mean" and CATALOG[settings.task].kind == "tokens":
        _refuse("pooling", f"mean for {settings.task}", "first for a token task", "set it by per_task")
    if settings.teacher not in TEACHERS:
        _refuse("teacher", _short(settings.teacher), "one of " + ", ".join(TEACHERS), "mend the name")
    if settings.method not in METHODS:
        _refuse("method", _short(settings.method), "one of " + ", ".join(METHODS), "mend the name")
    for name, values in (("replacement", KINDS), ("gates", GATES)):
        given = getattr(settings, name)
        if given is not None and given not in values:
            _refuse(name, _short(given), "one of " + ", ".join(values), "mend the name")
    if settings.method == "fixed" and settings.keep is None:
        _refuse("keep", "none", "the layers to keep", "give e.g. keep: [1, 4]")
    if settings.method == "dense":  # nothing of a pruning decides its outcome
        plain = {f.name: f.default for f in fields(Settings) if f.name not in (*_DENSE, "method")}
        return replace(settings, **plain)  # type: ignore[arg-type]
    targets, chosen = METHODS[settings.method], settings.given
    if targets and (len(chosen) != 1 or chosen[0] not in targets):
        got = ", ".join(f"{name} {getattr(settings, name)}" for name in chosen) or "none"
        _refuse("target", got, "one of " + ", ".join(targets), f"give it for {settings.method}")
    return settings


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    """A value from a file, however large or deep: a recipe may be hostile."""
    return reprlib.repr(value)


def _refuse(argument: str, got: object, wanted: str, remedy: str) -> NoReturn:
    raise ArgumentError(format_error("sweep", argument, got, wanted, remedy))
