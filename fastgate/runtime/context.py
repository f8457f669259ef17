"""What one forward of an encoder is given, and what it notes on its way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from fastgate.models.inspection import Inspection
from fastgate.runtime.layer import Gate, Layer, is_skipped
from fastgate.runtime.plan import Plan, make_plan
from fastgate.runtime.unpadding import UnpaddedBatch


@dataclass
class ActivationTrace:
    """What an encoder computed, while recording.

    hidden: (index, rows) of the embeddings and of each layer in turn: rows (n, hidden), index (n,) int64 row
    b * length + t of the padded batch. attention_output: (layer, rows), a kept attention's output before
    dropout. steps: (op, layer, rows) of every step as it ran.
    length: of the padded batch. whole: every row is computed that hidden states can be had of; else what runs
    is what runs unrecorded, and `hidden` stays empty. A copy is empty.
    """

    hidden: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    attention_output: list[tuple[int, Tensor]] = field(default_factory=list)
    steps: list[tuple[str, int, int]] = field(default_factory=list)
    length: int = 0
    whole: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> ActivationTrace:
        """A model is copied without what it last computed: tensors of a graph cannot be copied."""
        return ActivationTrace(whole=self.whole)


@dataclass
class ForwardContext:
    """One forward: what stays the same from step to step.

    states: (batch, length, hidden) of the embeddings and of each layer, where a call asks for them.
    probabilities: those of each attention that runs, likewise.
    """

    encoder: Any
    inspection: Inspection
    gates: list[Gate]
    unpadded: UnpaddedBatch
    plan: Plan
    record: ActivationTrace | None = None
    states: list[Tensor] | None = None
    probabilities: dict[int, Tensor] | None = None
    layers: tuple[Layer, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = self.inspection.layers

    @property
    def observed(self) -> bool:
        """Whether something is kept of what lies between the embeddings and the result."""
        return self.record is not None or self.states is not None or self.probabilities is not None


class TokenIds(NamedTuple):
    """Of packed rows, (rows,) each: what their embeddings are gathered by. types None: type 0 everywhere."""

    words: Tensor
    positions: Tensor
    types: Tensor | None


def plan_for(
    gates: list[Gate], shifts: tuple[int, ...], absorbable: bool, unpadded: UnpaddedBatch, capture: bool
) -> Plan:
    """The plan for these gates; `absorbable`: the last attention's key and value weights can be read."""
    attends = tuple(not is_skipped(g) for g in gates)
    one_query_per_sequence = unpadded.one_query_per_sequence and absorbable and not unpadded.has_halo
    return make_plan(
        attends, unpadded.output_rows_only, one_query_per_sequence, capture, shifts, unpadded.has_halo
    )
