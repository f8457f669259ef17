"""FinetuneConfig: what decides the outcome of one run, on the command line, in a sweep and in Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fastgate.errors import ArgumentError, format_error
from fastgate.nn.choices import POOLINGS, Pooling, ReplacementKind
from fastgate.pruning import Distill, Fixed, PruningConfig
from fastgate.pruning.objective import Target
from fastgate.training.phases import TEACHERS, Fit
from fastgate.training.setting_ranges import check_range
from fastgate.training.targets import DEFAULT_TARGET, RunTarget, target_settings

TYPICAL_SEARCH_STEPS = 300  # steps of search that the default rate of the gates suits
_DISTILL_FIELDS = ("logits", "hidden", "temperature", "labels", "dropout", "swap")
_PRUNING_FIELDS = ("replacement", "warm", "ramp", "harden", "gate_lr", "gates", "replacement_lr")


@dataclass(frozen=True, kw_only=True)
class PruningOptions:
    """What a run changes of fastgate's way to prune. None leaves the default.

    logits, hidden, temperature, labels, dropout, swap are fields of Distill; logits and hidden 0 switch the
    distillation off. teacher is one of TEACHERS. The others are fields of PruningConfig.
    """

    replacement: ReplacementKind | None = None
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

    def pruning_config(self, kind: str, target: Target, seed: int) -> PruningConfig:
        """How to prune on a task of that kind (catalog.KINDS). Raises ArgumentError for contradictions."""
        terms = {name: getattr(self, name) for name in _DISTILL_FIELDS if getattr(self, name) is not None}
        options = {name: getattr(self, name) for name in _PRUNING_FIELDS if getattr(self, name) is not None}
        distill = replace(default_distill(kind), **terms)
        return PruningConfig(
            target=target, seed=seed, distill=distill if distill.teaches else None, **options
        )

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that differ from the defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


def default_distill(kind: str) -> Distill:
    """The weights of the distillation losses on a task of that kind (catalog.KINDS)."""
    return Distill.for_tokens() if kind == "tokens" else Distill()


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One run: a dense fine-tune, then a pruning of the dense model that also trains.

    Args:
        model: a name of the hub, or a folder.
        task: name of the task.
        target: how much attention to remove. None only for runs that prune nothing.
        max_length: rows are truncated to this many tokens, or are split into windows of it with `stride`.
        stride: tokens that neighbouring windows share (Task.tokenize); None truncates.
        pooling: what the pooler of a classifier reads, `first` or `mean` (fastgate.patch).
        batch_size: rows of an optimizer step.
        bf16: train under autocast in bfloat16; weights and scores stay in float32.
        seed: random seed.
        dense_epochs, prune_epochs: passes over the training rows, in each phase.
        dense_lr, prune_lr: peak learning rate of each phase.
        warmup: share of the steps of a phase in which the learning rate rises.
        pruning: changes to the default way to prune.
        data: where the rows came from, kept with the results.

    Raises ArgumentError for a number out of its range and for an unknown pooling.
    """

    model: str
    task: str
    target: RunTarget | None = DEFAULT_TARGET
    max_length: int = 128
    stride: int | None = None
    pooling: Pooling = "first"
    batch_size: int = 32
    bf16: bool = False
    seed: int = 0
    dense_epochs: float = 3.0
    prune_epochs: float = 3.0
    dense_lr: float = 5e-5
    prune_lr: float = 5e-5
    warmup: float = 0.06
    pruning: PruningOptions = PruningOptions()
    data: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_range("FinetuneConfig", name, name, value)
        check_pooling("FinetuneConfig", "pooling", self.pooling)

    @property
    def dense_fit(self) -> Fit:
        """How the dense phase trains."""
        return self._fit(self.dense_epochs, self.dense_lr)

    @property
    def prune_fit(self) -> Fit:
        """How the pruning phase trains."""
        return self._fit(self.prune_epochs, self.prune_lr)

    def _fit(self, epochs: float, lr: float) -> Fit:
        return Fit(epochs, self.batch_size, lr, self.warmup, self.seed, self.bf16)

    def pruning_config(self, kind: str, target: Target) -> PruningConfig:
        """How to prune to `target` on a task of that kind (catalog.KINDS)."""
        return self.pruning.pruning_config(kind, target, self.seed)

    def with_gate_lr_for(self, steps: int) -> FinetuneConfig:
        """The config for a pruning phase of `steps` optimizer steps.

        The gates move up to 8 times faster in a search shorter than TYPICAL_SEARCH_STEPS. A rate that the
        config sets itself stays.
        """
        if self.pruning.gate_lr is not None:
            return self
        defaults = PruningConfig(target=Fixed(()))
        search = max(1.0, (defaults.harden - defaults.warm) * steps)
        gate_lr = defaults.gate_lr * min(8.0, max(1.0, TYPICAL_SEARCH_STEPS / search))
        return replace(self, pruning=replace(self.pruning, gate_lr=gate_lr))

    def to_settings(self) -> dict[str, Any]:
        """All of it as flat JSON values, under the keys of `run.json` and of result.json's `settings`."""
        settings: dict[str, Any] = {
            "model": self.model,
            "task": self.task,
            **target_settings(self.target),
            "max_length": self.max_length,
            "stride": self.stride,
            "pooling": self.pooling,
            "batch_size": self.batch_size,
            "lr": self.dense_lr,
            "bf16": self.bf16,
            "seed": self.seed,
            "epochs": self.dense_epochs,
            "prune_epochs": self.prune_epochs,
            "warmup": self.warmup,
            "data": dict(self.data),
        }
        if isinstance(self.target, Fixed):
            settings["keep"] = list(self.target.keep)
        if self.prune_lr != self.dense_lr:
            settings["prune_lr"] = self.prune_lr
        return {**settings, **self.pruning.changes}


def check_pooling(where: str, argument: str, pooling: object) -> Pooling:
    """`pooling`, once it is one of fastgate.patch's.

    where, argument: for the message. Raises ArgumentError.
    """
    if not isinstance(pooling, str) or pooling not in POOLINGS:
        wanted = "one of " + ", ".join(POOLINGS)
        raise ArgumentError(format_error(where, argument, repr(pooling)[:80], wanted, "pass one of these"))
    return pooling
