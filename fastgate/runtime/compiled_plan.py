"""What a frozen encoder runs for a plan: its layers in as few fused CPU calls as there can be.

A compiled plan is kept from call to call. Before each it is seen whether the encoder is still what the plan
was compiled from (fingerprint.py): parameters that were changed in place are read as they are, anything else
compiles it again.
"""

from __future__ import annotations

import threading
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor

from fastgate.ops import fused_layers
from fastgate.ops.fused_layers import FusedSegment
from fastgate.runtime.context import ForwardContext
from fastgate.runtime.eager import run_sublayer
from fastgate.runtime.fingerprint import ModuleFingerprint
from fastgate.runtime.plan import Sublayer
from fastgate.runtime.unpadding import UnpaddedBatch

MAX_CACHED_PLANS = 16


class CompiledPlan:
    """The sublayers of all layers in order: segments of them as fused calls, the others by their steps.

    is_cached: it serves again, while the encoder stays as it is. So there are no hooks in it.
    """

    def __init__(self, context: ForwardContext, dtype: torch.dtype, is_cached: bool):
        self.is_cached = is_cached
        self.plan = context.plan  # kept alive: its id is a key
        sublayers = [sublayer for layer in context.plan.layers for sublayer in layer]
        lowered = [sublayer[0].lower(context, sublayer, dtype) for sublayer in sublayers]
        self.segments: list[Sublayer | FusedSegment] = []
        for is_fused, group in groupby(
            zip(sublayers, lowered, strict=True), lambda pair: pair[1] is not None
        ):
            if is_fused:
                self.segments.append(FusedSegment([half for _, half in group if half is not None]))
            else:
                self.segments += [sublayer for sublayer, _ in group]

    def __call__(self, context: ForwardContext, h: Tensor) -> Tensor:
        """h: embeddings, (rows, hidden). Returns (output rows, hidden)."""
        unpadded = context.unpadded
        for segment in self.segments:
            if isinstance(segment, FusedSegment):
                masks = _neighbour_masks(unpadded, segment)
                h = segment(h, unpadded.keys.cu_seqlens, unpadded.output_rows, masks)
            else:
                h = run_sublayer(context, segment, h)
        return h


def _neighbour_masks(unpadded: UnpaddedBatch, segment: FusedSegment) -> list[Tensor]:
    """What the token shifts of a segment read of the neighbours of rows."""
    if not segment.has_token_shift:
        return []
    if segment.has_halo:
        return list(chain(*unpadded.shrink_steps))
    return [unpadded.has_left_neighbour]


class PlanCache:
    """The compiled plans of one encoder, while it is made of the same things. A copy begins empty."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Together, so that two threads see what belongs together.
        self._cached: tuple[ModuleFingerprint, dict[tuple[Any, ...], CompiledPlan]] | None = None

    @property
    def plans(self) -> list[CompiledPlan]:
        """The compiled plans of the encoder as it was last."""
        cached = self._cached
        return [] if cached is None else list(cached[1].values())

    def clear(self) -> None:
        """Drop every compiled plan."""
        self._cached = None

    def find(self, context: ForwardContext, h: Tensor) -> CompiledPlan | None:
        """The compiled plan of a forward whose embeddings are h (rows, hidden). None: run it eagerly."""
        if context.is_observed or not fused_layers.runs(h):
            return None
        cached = self._cached
        if cached is None or not cached[0].matches(context.snapshot):
            cached = self._cached = ModuleFingerprint(context.snapshot), {}
        fingerprint, plans = cached
        if fingerprint.refusal or fingerprint.drops():
            return CompiledPlan(context, h.dtype, is_cached=False)
        gated = tuple(isinstance(gate, Tensor) for gate in context.gates)
        key = (id(context.plan), context.unpadded.key_rows is None, gated)
        compiled = plans.get(key)
        if compiled is None:
            with self._lock:
                compiled = plans.get(key)  # another thread may have been first
                if compiled is None:
                    if len(plans) >= MAX_CACHED_PLANS:
                        plans.clear()
                    compiled = plans[key] = CompiledPlan(context, h.dtype, is_cached=True)
        return compiled

    def __deepcopy__(self, memo: dict[int, Any]) -> PlanCache:
        return PlanCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return PlanCache, ()
