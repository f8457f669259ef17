"""What a frozen encoder runs for a plan: its layers in as few compiled calls as there can be.

A program is kept from call to call, and before each it is seen whether the encoder is still what it was made
of (fingerprint.py): parameters that were changed in place are read as they are, anything else makes it anew.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, groupby
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fastgate.ops import fused_layers
from fastgate.ops.fused_layers import FusedSegment, HalfLayer, LinearOperands, NormOperands
from fastgate.ops.linear import Packed
from fastgate.runtime.context import ForwardContext
from fastgate.runtime.fingerprint import ModuleFingerprint
from fastgate.runtime.layer import Layer
from fastgate.runtime.plan import Step

MOST = 16  # programs kept of an encoder
Piece = tuple[int, tuple[Step, ...]]  # of a layer: steps to run one after another
RunSteps = Callable[[ForwardContext, int, tuple[Step, ...], Tensor], Tensor]


class CompiledPlan:
    """The halves of all layers in order: stretches of them compiled, the others by their steps.

    kept: it serves again, while the encoder stays as it is; so there are no hooks in it.
    """

    def __init__(self, run: ForwardContext, dtype: torch.dtype, kept: bool):
        self.kept = kept
        self.plan = run.plan  # kept alive: its id is a key
        halves = [(i, steps) for i in range(len(run.layers)) for steps in run.plan.halves(i)]
        ready = [_half(run, i, run.layers[i], steps, dtype) for i, steps in halves]
        self.pieces: list[Piece | FusedSegment] = []
        for compiled, group in groupby(zip(halves, ready, strict=True), lambda pair: pair[1] is not None):
            if compiled:
                self.pieces.append(FusedSegment([half for _, half in group]))  # type: ignore[misc]
            else:
                self.pieces += [piece for piece, _ in group]

    def __call__(self, run: ForwardContext, h: Tensor, run_steps: RunSteps) -> Tensor:
        for piece in self.pieces:
            if isinstance(piece, FusedSegment):
                unpadded, hops = run.unpadded, list[Tensor]()
                if piece.shifts:  # on all packed rows, or each on fewer than the one before
                    hops = (
                        list(chain(*unpadded.shrink_steps))
                        if piece.narrows
                        else [unpadded.has_left_neighbour]
                    )
                h = piece(h, unpadded.keys.cu_seqlens, unpadded.wanted_rows, hops)
            else:
                h = run_steps(run, *piece, h)
        return h


class PlanCache:
    """Those of one encoder, while it is made of the same things."""

    def __init__(self) -> None:
        # Together, so that two threads see what belongs together.
        self.held: tuple[ModuleFingerprint, dict[tuple[Any, ...], CompiledPlan]] | None = None

    @property
    def made(self) -> dict[tuple[Any, ...], CompiledPlan]:
        """The programs of the encoder as it was last, by plan."""
        return {} if self.held is None else self.held[1]

    def find(self, run: ForwardContext, h: Tensor) -> CompiledPlan | None:
        """The program of a run whose embeddings are h (rows, hidden); None where no half can be compiled."""
        if run.observed or not fused_layers.runs(h):
            return None
        held = self.held
        if held is None or not held[0].holds(run.inspection):
            held = self.held = ModuleFingerprint(run.inspection), {}
        fingerprint, made = held
        if fingerprint.refusal or fingerprint.drops():
            return CompiledPlan(run, h.dtype, kept=False)
        gated = tuple(isinstance(gate, Tensor) for gate in run.gates)
        key = (id(run.plan), run.unpadded.key_rows is None, gated)
        found = made.get(key)
        if found is None:
            if len(made) >= MOST:
                made.clear()
            found = made[key] = CompiledPlan(run, h.dtype, kept=True)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> PlanCache:
        return PlanCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return PlanCache, ()


def _in_panels(weight: Tensor | Packed | None, dtype: torch.dtype) -> TypeGuard[Packed]:
    """Whether compiled halves multiply rows of this dtype with this weight."""
    return isinstance(weight, Packed) and weight.in_panels and weight.dtype == dtype


def _half(
    run: ForwardContext, i: int, layer: Layer, steps: tuple[Step, ...], dtype: torch.dtype
) -> HalfLayer | None:
    if steps[0].op == "shift_norm":
        output_rows_only, has_halo = steps[0].output_rows_only, run.unpadded.has_halo
        return (
            None
            if output_rows_only and not has_halo
            else _shift_half(layer, dtype, steps[0].halo if output_rows_only else None)
        )
    if steps[-1].op == "skip_norm":
        return None
    return (_feed_forward_half if steps[0].op == "intermediate" else _attention_half)(
        run, i, layer, steps, dtype
    )


def _attention_half(
    run: ForwardContext, i: int, layer: Layer, steps: tuple[Step, ...], dtype: torch.dtype
) -> HalfLayer | None:
    query, key, value, dense, end = layer.query, layer.key, layer.value, layer.dense, layer.attention_end
    assert query is not None and key is not None and value is not None and dense is not None
    soft, output = isinstance(run.gates[i], Tensor), dense.weight
    if not _in_panels(output, dtype) or run.unpadded.key_rows is not None or soft or not end.fuses:
        return None
    if end.rate or layer.rate:
        return None
    after, ending = LinearOperands(output, dense.bias), _norm(end.norm)
    if steps[0].op == "project_query":
        weight = query.weight
        operands = key.module.weight, value.module.weight, value.bias
        if not _in_panels(weight, dtype) or {operands[0].dtype, operands[1].dtype} != {dtype}:
            return None
        first, shape = LinearOperands(weight, query.bias), (layer.heads_in(weight.shape[0]), layer.at.scaling)
        return fused_layers.absorbed_half(first, *operands, *shape, after, ending)
    together = None if steps[0].output_rows_only else layer.fused_qkv
    if not _in_panels(together, dtype):
        return None
    shape = (layer.heads_in(together.shape[0] // 3), layer.at.scaling)
    return fused_layers.attention_half(together, layer.biases, *shape, after, ending)


def _norm(norm: Any) -> NormOperands:
    return NormOperands(norm.weight, norm.bias, norm.eps)


def _shift_half(layer: Layer, dtype: torch.dtype, halo: int | None) -> HalfLayer | None:
    """By itself it gains nothing: only before a half that is compiled."""
    if layer.gelu is None or not _in_panels(layer.gelu.weight, dtype) or not layer.attention_end.plain_norm:
        return None
    return fused_layers.shift_half(layer.shift_vectors, _norm(layer.attention_end.norm), halo)


def _feed_forward_half(
    run: ForwardContext, i: int, layer: Layer, steps: tuple[Step, ...], dtype: torch.dtype
) -> HalfLayer | None:
    up, down, end = layer.gelu, layer.down, layer.output_end
    if up is None or not end.fuses or end.rate:
        return None
    first, then = up.weight, down.weight
    if not (_in_panels(first, dtype) and _in_panels(then, dtype)):
        return None
    products = LinearOperands(first, up.bias), LinearOperands(then, down.bias)
    if not steps[-1].chained:
        return fused_layers.feed_forward_half(*products, _norm(end.norm))
    following, norm = run.layers[i + 1], end.norm
    if not following.attention_end.plain_norm:
        return None
    weight, bias, second = following.fold_next_norm(norm)
    computed = weight is not norm.weight or bias is not norm.bias
    anew = (lambda: following.fold_next_norm(norm)[:2]) if computed else None
    return fused_layers.feed_forward_half(*products, NormOperands(weight, bias, norm.eps, **second), anew)
