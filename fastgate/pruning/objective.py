"""What pruning aims at: a share of the attention removed or a speed-up, its expectation, and the Lagrangian.

What a layer costs hangs on the topmost attention: below it every row is computed, from it upwards those that
the head reads, and what shifts need to compute them. With p_m the probability that attention m runs, layer t
has the topmost one with probability p_t * prod over m > t of (1 - p_m), which makes the expected cost smooth
in the gates and exact where every p is 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.nn.choices import ReplacementKind
from fastgate.nn.hard_concrete import harden
from fastgate.nn.replacement import REPLACEMENTS
from fastgate.pruning.numbers import integer, number
from fastgate.runtime.costs import Sizes
from fastgate.runtime.plan import flops_of, make_plan


@dataclass(frozen=True)
class Sparsity:
    """Remove this share of the attention sublayers.

    Args:
        share: In (0, 1). Whole sublayers are removed: 0.67 of six is four.
    """

    share: float

    def __post_init__(self) -> None:
        wanted, remedy = "a number between 0 and 1", "0.8 removes 80%"
        share = number("Sparsity", "share", self.share, wanted, remedy, lambda x: 0.0 < x < 1.0)
        object.__setattr__(self, "share", share)


@dataclass(frozen=True)
class Speedup:
    """Divide the encoder's FLOPs by this factor, on batches like those trained on.

    Args:
        factor: Above 1. 4.0 asks for a quarter of the FLOPs.
    """

    factor: float

    def __post_init__(self) -> None:
        wanted, remedy = "a number above 1", "4.0 asks for a quarter of the FLOPs"
        factor = number("Speedup", "factor", self.factor, wanted, remedy, lambda x: x > 1.0)
        object.__setattr__(self, "factor", factor)


@dataclass(frozen=True)
class Fixed:
    """Keep the attention of these layers. No gate is learned.

    Args:
        keep: Indices of layers, from 0, chosen by hand or by `fastgate.pruning.baselines`.
    """

    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        wanted, remedy = "indices of layers", "pass e.g. Fixed((0, 5))"
        if isinstance(self.keep, str | bytes) or not isinstance(self.keep, Iterable):
            raise ArgumentError(format_error("Fixed", "keep", repr(self.keep), wanted, remedy))
        keep = tuple(integer("Fixed", "keep", i, wanted, remedy, lambda i: i >= 0) for i in self.keep)
        object.__setattr__(self, "keep", keep)


Target = Sparsity | Speedup | Fixed


@dataclass(frozen=True)
class Costs:
    """FLOPs of an encoder, by its topmost attention.

    attention, feed_forward: of each layer's two parts below that one. tail: of all from that attention
    upwards, by the number of layers above it; the last is of an encoder without attention.
    """

    attention: float
    feed_forward: float
    tail: tuple[float, ...]

    def total(self, p: Tensor) -> Tensor:
        """Expected cost for the probabilities p (layers,) that each attention runs; 0-d, differentiable."""
        none_from = torch.flip(torch.cumprod(torch.flip(1 - p, (0,)), 0), (0,))  # P(none from layer l up)
        topmost = torch.cat([none_from[:1], p * torch.cat([none_from[1:], p.new_ones(1)])])
        tail = p.new_tensor(self.tail[::-1])
        layers = torch.arange(p.numel(), dtype=p.dtype, device=p.device)
        below = self.feed_forward * layers + self.attention * (p.cumsum(0) - p)
        return topmost @ tail + topmost[1:] @ below

    def share(self, p: Tensor) -> Tensor:
        """`total` relative to every attention running; 0-d."""
        return self.total(p) / self.total(torch.ones_like(p))


def costs_of(sizes: Sizes, layers: int, replacement: ReplacementKind) -> Costs:
    """Costs of an encoder whose removed attention has a replacement of this kind.

    Where there is one output row a sequence, the head never reads another. Above the topmost attention these
    rows are computed, and one to either side for each token shift that is still above: as though no sequence
    were shorter. CUDA graphs, which compute every row there, are not counted.
    """
    step = REPLACEMENTS[replacement].step
    output_rows_only, single = sizes.output_rows < sizes.rows, sizes.output_rows == sizes.sequences

    def cost(attends: tuple[bool, ...], top: int) -> float:
        """FLOPs of the layers from `top` up."""
        mixing = tuple((i, step) for i, runs in enumerate(attends) if step is not None and not runs)
        halo = sum(mixer.hops for i, mixer in mixing if i > top) if single else 0
        within = tuple(min(sizes.rows, sizes.output_rows + k * sizes.sequences) for k in range(halo + 1))
        above, fewer = replace(sizes, rows_within_halo=within), output_rows_only and within[-1] < sizes.rows
        plan = make_plan(attends, fewer, single and not halo, False, mixing, halo > 0)
        return float(sum(flops_of(plan.of_layer(i), above) for i in range(max(top, 0), layers)))

    tail = [cost(tuple(i == top for i in range(layers)), top) for top in reversed(range(-1, layers))]
    attention, feed_forward = make_plan((True,)).layers[0]
    return Costs(float(flops_of(attention, sizes)), float(flops_of(feed_forward, sizes)), tuple(tail))


class Objective:
    """A target on an encoder of `layers` layers: what is removed in expectation, and which set meets it."""

    def __init__(self, target: Target, layers: int):
        self.target, self.layers = target, layers
        if isinstance(target, Sparsity):
            self.removed = math.floor(target.share * layers + 0.5)
            if not self.removed:
                got, wanted = f"{target.share}, which removes none of {layers}", f"{0.5 / layers:.3g} or more"
                raise ArgumentError(
                    format_error("Sparsity", "share", got, wanted, "ask for one attention at least")
                )
        if isinstance(target, Fixed):
            wrong = [i for i in target.keep if not 0 <= i < layers]
            if wrong or len(set(target.keep)) != len(target.keep):
                raise ArgumentError(
                    format_error(
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
                format_error("Speedup", "costs", "none yet", "batches measured in the warm phase", remedy)
            )
        return max(self._within(p, costs, 1.0 / self.target.factor))[2]

    def margin(self, p: Tensor, costs: Costs | None) -> float | None:
        """By how much the sum of p over the chosen layers is above that of the next choice that keeps a layer
        which the first does not; for Sparsity P(open) of the last layer kept minus that of the first dropped.

        None where there is no other choice: a Fixed one, or one that keeps or drops every layer.
        """
        if isinstance(self.target, Fixed):
            return None
        if isinstance(self.target, Sparsity):
            keep = self.layers - self.removed
            ordered = p.sort(descending=True).values
            return float(ordered[keep - 1] - ordered[keep]) if 0 < keep < self.layers else None
        assert costs is not None
        first, *others = sorted(self._within(p, costs, 1.0 / self.target.factor, True), reverse=True)
        rivals = [total for total, _, keep in others if not set(keep) <= set(first[2])]
        return first[0] - rivals[0] if rivals else None

    def _within(
        self, p: Tensor, costs: Costs, budget: float, exchanged: bool = False
    ) -> list[tuple[float, float, list[int]]]:
        """(sum of p, -cost, layers kept) of sets within the budget. Costs depend on the topmost kept layer
        and the number below: of these layers ** 2 kinds of set the one with the largest sum is in it.

        exchanged: the set is in it too whose least likely layer below the top is exchanged for the next.
        """
        candidates: list[tuple[float, float, list[int]]] = []
        for top in range(-1, self.layers):
            for below in range(max(top, 0) + 1):
                keep = [*harden(p[:top], below), top] if top >= 0 else []
                cost = float(costs.share(_indicator(keep, self.layers)))
                if cost <= budget + 1e-9:
                    candidates.append((float(p[keep].sum()), -cost, keep))
                    if exchanged and 0 < below < top:
                        more = [i for i in harden(p[:top], below + 1) if i not in keep]
                        least = min(keep[:-1], key=lambda i: (float(p[i]), -i))
                        other = sorted([i for i in keep if i != least] + more)
                        candidates.append((float(p[other].sum()), -cost, other))
        if not candidates:
            floor = float(1.0 / costs.share(_indicator([], self.layers)))
            wanted = f"at most {floor:.2f}, the factor with no attention left"
            remedy = "ask for less: the rest is feed-forward layers"
            raise ArgumentError(format_error("Speedup", "factor", round(1.0 / budget, 4), wanted, remedy))
        return candidates


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
