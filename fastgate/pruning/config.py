"""PruningConfig: how to prune, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from fastgate.errors import ArgumentError, format_error
from fastgate.nn.choices import REPLACEMENT_KINDS, ReplacementKind
from fastgate.pruning.distillation import Distill
from fastgate.pruning.numbers import integer, number
from fastgate.pruning.objective import Speedup, Target
from fastgate.pruning.schedule import make_schedule

Gates = Literal["hard_concrete", "exact"]
GATES: tuple[Gates, ...] = ("hard_concrete", "exact")


@dataclass(frozen=True)
class PruningConfig:
    """How to prune.

    Args:
        target: `Sparsity(0.8)`, `Speedup(4.0)`, or `Fixed(keep)` for a choice made by hand.
        replacement: What takes the place of a pruned attention: `zero`, `mean`, `affine`, or `shift`, which
            mixes neighbouring tokens in an op of its own and gives the best score. The others cost no op.
        distill: Weights of the distillation terms; None for none.
        warm: Share of all steps until which every gate is open.
        ramp: Share of all steps until which the target rises.
        harden: Share of all steps at which the gates are fixed; the steps after it recover the score.
        gate_lr: Adam's learning rate for the gates' log-alpha and the Lagrangian's multipliers.
        gates: `hard_concrete`, each drawn by itself and held to the target by a Lagrangian, or `exact`, as
            many at a time as the target leaves (for Sparsity).
        replacement_lr: The learning rate of the replacements' parameters, relative to that of the weights
            beside them: they have further to go.
        seed: Of the draws.

    Raises ArgumentError for values outside these.
    """

    target: Target
    replacement: ReplacementKind = "shift"
    distill: Distill | None = field(default_factory=Distill)
    warm: float = 0.02
    ramp: float = 0.2
    harden: float = 0.3
    gate_lr: float = 0.05
    gates: Gates = "hard_concrete"
    replacement_lr: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.target, Target):
            self._refuse("target", "Sparsity, Speedup or Fixed", "pass e.g. fastgate.Sparsity(0.8)")
        if self.replacement not in REPLACEMENT_KINDS:
            self._refuse("replacement", " | ".join(REPLACEMENT_KINDS), "pass one of these")
        if self.distill is not None and not isinstance(self.distill, Distill):
            self._refuse("distill", "a Distill or None", "pass Distill(logits=1.0)")
        above = "a number above 0"
        self._number("gate_lr", above, "0.05 suits some hundred steps of search", lambda x: x > 0.0)
        self._number("replacement_lr", above, "1.0 is the weights' own rate", lambda x: x > 0.0)
        for name in ("warm", "ramp", "harden"):
            remedy = "0.3 is three tenths of all steps"
            self._number(name, "a share of all steps", remedy, lambda x: True)  # make_schedule checks more
        whole, remedy = "a whole number from -2**63 to 2**64 - 1", "pass e.g. 0"
        seed = integer("PruningConfig", "seed", self.seed, whole, remedy, lambda x: -(2**63) <= x < 2**64)
        object.__setattr__(self, "seed", seed)
        if self.gates not in GATES:
            self._refuse("gates", " | ".join(GATES), "pass one of these")
        if self.gates == "exact" and isinstance(self.target, Speedup):
            self._refuse("target", "a Sparsity with exact gates", "pass Sparsity, or gates='hard_concrete'")
        make_schedule(100, self.warm, self.ramp, self.harden)

    def _number(self, name: str, wanted: str, remedy: str, fits: Callable[[float], bool]) -> None:
        checked = number("PruningConfig", name, getattr(self, name), wanted, remedy, fits)
        object.__setattr__(self, name, checked)

    def _refuse(self, field_name: str, wanted: str, remedy: str) -> None:
        got = repr(getattr(self, field_name))
        raise ArgumentError(format_error("PruningConfig", field_name, got, wanted, remedy))
