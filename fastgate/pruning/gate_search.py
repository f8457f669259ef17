"""The gates of a run: drawn and moved while the search lasts, then hardened to meet the target exactly."""

from __future__ import annotations

import warnings

import torch

from fastgate.nn import hard_concrete
from fastgate.pruning.config import PruningConfig
from fastgate.pruning.learner import GateLearner
from fastgate.pruning.objective import Costs, Objective

# P(open) of the last layer kept minus that of the first dropped: the least difference that is called a
# choice. A share that is estimated from 100 draws, as many as a short search has, is off by 0.05 (one
# standard error).
SEPARATED = 0.05


class GateSearch:
    """What is known of the gates of `layers` layers, and which layers stay.

    kept: the layers whose attention stays, None until hardened. margin: how far P(open) tells the choice from
    the next best one, None before hardening and where nothing was searched for.
    """

    def __init__(self, config: PruningConfig, layers: int):
        self.layers = layers
        self.objective = Objective(config.target, layers)
        self.learner = GateLearner(self.objective, config.gate_lr, config.seed, config.gates == "exact")
        self.kept: list[int] | None = None
        self.margin: float | None = None

    def start(self, costs: Costs | None) -> None:
        """Begin the search, for layers of these costs.

        Raises ArgumentError for a target that no choice of layers reaches: here, not when the search ends.
        """
        self.learner.costs = costs
        self.objective.choose(self.learner.p_open, costs)

    @property
    def open_probabilities(self) -> list[float]:
        """P(open) of each layer's gate; 0 and 1 once hardened."""
        if self.kept is not None:
            return [float(i in self.kept) for i in range(self.layers)]
        probabilities: list[float] = self.learner.p_open.tolist()
        return probabilities

    @property
    def expected_gates(self) -> list[float]:
        """The mean of each layer's gate; 0 and 1 once hardened."""
        if self.kept is not None or self.learner.exact:
            return self.open_probabilities
        expected: list[float] = hard_concrete.expected(self.learner.log_alpha.detach()).tolist()
        return expected

    @property
    def settled_gates(self) -> list[float]:
        """Those of a model outside its training steps: open until hardened."""
        return [1.0] * self.layers if self.kept is None else self.open_probabilities

    @property
    def multipliers(self) -> list[float]:
        """The Lagrangian's: of the gap and of its square."""
        values: list[float] = self.learner.multipliers.tolist()
        return values

    @property
    def reduction(self) -> float:
        """The share of the attention (Speedup: of the FLOPs) that is removed, in expectation."""
        return float(self.objective.reduction(torch.tensor(self.open_probabilities), self.learner.costs))

    @property
    def separated(self) -> bool | None:
        """Whether `margin` is large enough that the layers kept are a choice of the search, and not of their
        order; None where there is no margin."""
        return None if self.margin is None else self.margin >= SEPARATED

    def harden(self, stacklevel: int) -> list[int]:
        """Fix every gate at 0 or 1 by the target; returns the layers kept. Warns of a tie."""
        self.learner.aim(self.objective.goal)
        probabilities, costs = self.learner.p_open, self.learner.costs
        kept = self.objective.choose(probabilities, costs)
        self.margin = self.objective.margin(probabilities, costs)
        self.kept = kept
        if self.separated is False:
            warnings.warn(
                f"Pruner: the search has not told the layers apart: kept {kept}, but another choice is "
                f"within {self.margin:.3f} of it in P(open), less than {SEPARATED}. Search for more "
                "steps (harden), or with another gate_lr, before calling this choice learned.",
                stacklevel=stacklevel + 1,
            )
        return kept
