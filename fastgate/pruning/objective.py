"""What pruning aims at: a share of the attention removed or a speed-up, its expectation, and the Lagrangian.

Under row demand the rows of layer l's output are all live if any layer above it mixes tokens, otherwise only
the demanded ones are. With p_m the probability that attention m runs, P(all live) = 1 - prod over m > l of (1
- p_m), which makes the expected cost smooth in the gates and exact where every p is 0 or 1. Where a `shift`
stands in for attention every layer mixes, and p_m there is 1: more than a classifier computes, which needs
few rows above its last attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError, say
from ..gates import harden
from ..plan import Sizes, flops, make_plan


@dataclass(frozen=True)
class Sparsity:
    """Remove this share, in (0, 1), of the attention sublayers, in whole ones: 0.67 of six is four."""

    share: float

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ArgumentError(
                say("Sparsity", "share", self.share, "a number between 0 and 1", "0.8 removes 80%")
            )


@dataclass(frozen=True)
class Speedup:
    """Cut the encoder's FLOPs by this factor, above 1, under row demand on batches like those trained on."""

    factor: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 1.0):
            raise ArgumentError(
                say(
                    "Speedup",
                    "factor",
                    self.factor,
                    "a number above 1",
                    "4.0 asks for a quarter of the FLOPs",
                )
            )


@dataclass(frozen=True)
class Fixed:
    """Keep these layers' attention, chosen by hand or by a control of `criteria`; no gate is learned."""

    keep: tuple[int, ...]


Target = Sparsity | Speedup | Fixed


@dataclass(frozen=True)
class Costs:
    """FLOPs of one layer's attention and feed-forward part, on all rows and (narrow) on the demanded ones.

    mixes: what stands in for an attention mixes tokens, for next to no FLOPs of its own.
    """

    attention: float
    attention_narrow: float
    feed_forward: float
    feed_forward_narrow: float
    mixes: bool = False

    def total(self, p: Tensor) -> Tensor:
        """Expected cost for the probabilities p (layers,) that each attention runs; 0-d, differentiable."""
        still = torch.zeros_like(p) if self.mixes else 1 - p  # P(layer l mixes no tokens)
        above = torch.cat([torch.flip(torch.cumprod(torch.flip(still, (0,)), 0), (0,))[1:], p.new_ones(1)])
        live = 1 - above  # P(some layer above layer l mixes)
        attention = p * (live * self.attention + above * self.attention_narrow)
        return (attention + live * self.feed_forward + above * self.feed_forward_narrow).sum()

    def share(self, p: Tensor) -> Tensor:
        """`total` relative to every attention running; 0-d."""
        return self.total(p) / self.total(torch.ones_like(p))


def costs_of(sizes: Sizes, heads: int, narrow: bool, single: bool, mixes: bool = False) -> Costs:
    """Costs of a layer. narrow: fewer rows are demanded than packed; single: one row a sequence is; mixes: as
    in Costs."""
    layer_sizes = (make_plan((True, True), narrow, single, False).of_layer(i) for i in (0, 1))
    wide, last = ([(step.op, flops(step, sizes, heads)) for step in steps] for steps in layer_sizes)
    feed_forward = ("intermediate", "project_down", "output_norm")

    def add(steps: list[tuple[str, int]], inside: bool) -> float:
        return float(sum(cost for op, cost in steps if (op in feed_forward) is inside))

    return Costs(add(wide, False), add(last, False), add(wide, True), add(last, True), mixes)


class Objective:
    """A target on an encoder of `layers` layers: what is removed in expectation, and which set meets it."""

    def __init__(self, target: Target, layers: int):
        self.target, self.layers = target, layers
        if isinstance(target, Sparsity):
            self.removed = math.floor(target.share * layers + 0.5)
        if isinstance(target, Fixed):
            wrong = [i for i in target.keep if not 0 <= i < layers]
            if wrong or len(set(target.keep)) != len(target.keep):
                raise ArgumentError(
                    say(
                        "Fixed",
                        "keep",
                        target.keep,
                        f"different layers from 0 to {layers - 1}",
                        "name each layer once",
                    )
                )

    @property
    def goal(self) -> float:
        """What `reduction` is to reach."""
        if isinstance(self.target, Sparsity):
            return self.removed / self.layers
        if isinstance(self.target, Speedup):
            return 1.0 - 1.0 / self.target.factor
        return 1.0 - len(self.target.keep) / self.layers

    def reduction(self, p: Tensor, costs: Costs | None) -> Tensor:
        """Expected share of the attention (Speedup: of the FLOPs) that is gone; p: (layers,) P(open); 0-d."""
        if isinstance(self.target, Speedup):
            assert costs is not None
            return 1.0 - costs.share(p)
        return 1.0 - p.mean()

    def choose(self, p: Tensor, costs: Costs | None) -> list[int]:
        """Layers to keep: exact top-k of p; for Speedup the set with the largest sum of p within the cost."""
        if isinstance(self.target, Fixed):
            return sorted(self.target.keep)
        if isinstance(self.target, Sparsity):
            return harden(p, self.layers - self.removed)
        if costs is None:
            remedy = "train through the warm phase before hardening"
            raise ArgumentError(
                say("Speedup", "costs", "none yet", "batches measured in the warm phase", remedy)
            )
        return self._choose_within(p, costs, 1.0 / self.target.factor)

    def _choose_within(self, p: Tensor, costs: Costs, budget: float) -> list[int]:
        """Costs depend on the topmost kept layer and the number below: one of layers ** 2 sets."""
        candidates: list[tuple[float, float, list[int]]] = []
        for top in range(-1, self.layers):
            for below in range(max(top, 0) + 1):
                keep = [*harden(p[:top], below), top] if top >= 0 else []
                cost = float(costs.share(_indicator(keep, self.layers)))
                if cost <= budget + 1e-9:
                    candidates.append((float(p[keep].sum()), -cost, keep))
        if not candidates:
            floor = float(1.0 / costs.share(_indicator([], self.layers)))
            wanted = f"at most {floor:.2f}, the factor with no attention left"
            remedy = "ask for less: the rest is feed-forward layers"
            if costs.mixes:
                remedy = "ask for less, or for replacement='mean', which lets rows be given up"
            raise ArgumentError(say("Speedup", "factor", round(1.0 / budget, 4), wanted, remedy))
        return max(candidates)[2]


def _indicator(keep: Sequence[int], layers: int) -> Tensor:
    p = torch.zeros(layers, dtype=torch.float64)
    p[list(keep)] = 1.0
    return p


def lagrangian(reduction: Tensor, target: float, linear: Tensor, quadratic: Tensor) -> Tensor:
    """linear * gap + quadratic * gap ** 2 with gap = target - reduction (Xia et al. 2022); 0-d.

    Gates go down this term and both multipliers up it, until the gap is closed.
    """
    gap = target - reduction
    return linear * gap + quadratic * gap * gap
