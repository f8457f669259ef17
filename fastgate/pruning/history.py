"""What the gates did: an entry of the history now and then, and the numbers of a log line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgate.pruning.pruning_run import PruningRun

HISTORY_ENTRIES = 400  # of a run, about


def is_logged(step: int, total: int, marks: tuple[int, ...]) -> bool:
    """Whether the entry of a step is kept: that of `marks`, and HISTORY_ENTRIES of `total` steps or so."""
    return step % max(1, total // HISTORY_ENTRIES) == 0 or step in marks


def entry_of(run: PruningRun) -> dict[str, Any]:
    """The entry of the step that has just ended."""
    return {
        "step": run.steps,
        "phase": run.phase,
        "target": run.target_now,
        "reduction": run.reduction_now,
        "multipliers": run.search.multipliers,
        "open": run.open_probabilities,
        "gates": run.search.expected_gates,
        "margin": run.margin,
    }


def metrics_of(run: PruningRun) -> dict[str, float]:
    """Numbers for a logger: target and expected reduction now, the multipliers, P(open) of each gate; the
    margin of the choice once it is made."""
    linear, quadratic = run.search.multipliers
    numbers = {
        "pruning/target": run.target_now,
        "pruning/reduction": run.reduction_now,
        "pruning/hardened": float(run.kept is not None),
        "pruning/multiplier_linear": linear,
        "pruning/multiplier_quadratic": quadratic,
    }
    if run.margin is not None:
        numbers["pruning/margin"] = run.margin
    return numbers | {f"pruning/gate_{i}": p for i, p in enumerate(run.open_probabilities)}
