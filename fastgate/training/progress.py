"""How far a run is, and who is told so after every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

DENSE, PRUNE, SCORE = "dense", "prune", "score"  # the phases


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        phase: DENSE, PRUNE or SCORE.
        step, total: optimizer steps of the phase; of SCORE, batches.
        loss: the last training loss.
        gates: the probability that each gate is open, in a pruning.
        stage: the Pruner's phase, in a pruning.
    """

    phase: str
    step: int
    total: int
    loss: float | None = None
    gates: tuple[float, ...] = ()
    stage: str = ""


Listener = Callable[[Progress], None]
