"""How far a training is, and who is told so after every optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

DENSE, PRUNE = "dense", "prune"  # the phases


@dataclass(frozen=True)
class Progress:
    """Where a training is: phase DENSE or PRUNE, optimizer steps, the last loss, P(open) of each gate.

    stage: of a pruning, the Pruner's phase; empty in the dense phase.
    """

    phase: str
    step: int
    total: int
    loss: float | None = None
    gates: tuple[float, ...] = ()
    stage: str = ""


Listener = Callable[[Progress], None]
