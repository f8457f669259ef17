"""What one forward of an encoder is given, and what it records on its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from fastgate.runtime.layer import Gate, Layer
from fastgate.runtime.snapshot import EncoderSnapshot
from fastgate.runtime.steps.base import Step
from fastgate.runtime.unpadding import UnpaddedBatch

if TYPE_CHECKING:
    from fastgate.runtime.embedding_inputs import EmbeddingInputs
    from fastgate.runtime.plan import Plan

StepHook = Callable[[Step, Tensor], None]


class ExecutedStep(NamedTuple):
    """A step as it ran, and how many rows it made."""

    step: Step
    rows: int


@dataclass
class ActivationTrace:
    """What an encoder computed, while recording.

    hidden: (index, rows) of the embeddings and of each layer in turn. rows: (n, hidden). index: (n,) int64,
    row b * length + t of the padded batch. attention_output: (layer, rows), a kept attention's output before
    dropout. steps: every step as it ran. length: of the padded batch. every_row: every row is computed that
    hidden states can be had of. If not, what runs is what runs unrecorded, and `hidden` stays empty.
    forwards: how many there were since recording began. A copy is empty.
    """

    hidden: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    attention_output: list[tuple[int, Tensor]] = field(default_factory=list)
    steps: list[ExecutedStep] = field(default_factory=list)
    length: int = 0
    every_row: bool = True
    forwards: int = 0

    def begin(self, length: int) -> None:
        """Count a forward, and drop what an earlier one left. length: of the padded batch."""
        self.clear()
        self.length = length
        self.forwards += 1

    def clear(self) -> None:
        """Drop what a forward left."""
        self.hidden, self.attention_output, self.steps = [], [], []

    def add_attention(self, layer: int, rows: Tensor, bias: Tensor | None) -> None:
        """Keep an attention's output, which is rows + bias."""
        output = rows.detach() if bias is None else rows.detach() + bias.detach()
        self.attention_output.append((layer, output))

    def __deepcopy__(self, memo: dict[int, Any]) -> ActivationTrace:
        """A model is copied without what it last computed: tensors of a graph cannot be copied."""
        return ActivationTrace(every_row=self.every_row)


@dataclass
class ForwardContext:
    """One forward: what stays the same from step to step.

    snapshot: the encoder's modules. gates: one a layer. unpadded: the batch's rows. plan: what runs on them.
    inputs: what the embeddings are made from. training: the encoder is in training mode. trace: what to
    record, or None. hidden_states: (batch, length, hidden) of the embeddings and of each layer, where a call
    asks for them. probabilities: those of each attention that runs, by layer, likewise. step_hook: called
    after each step.
    """

    snapshot: EncoderSnapshot
    gates: list[Gate]
    unpadded: UnpaddedBatch
    plan: Plan
    inputs: EmbeddingInputs
    training: bool = False
    trace: ActivationTrace | None = None
    hidden_states: list[Tensor] | None = None
    probabilities: dict[int, Tensor] | None = None
    step_hook: StepHook | None = None
    layers: tuple[Layer, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = self.snapshot.layers

    @property
    def is_observed(self) -> bool:
        """Whether anything is kept or shown of what lies between the embeddings and the result."""
        return not (
            self.trace is None
            and self.hidden_states is None
            and self.probabilities is None
            and self.step_hook is None
        )

    def is_gated(self, layer: int) -> bool:
        """Whether a gate multiplies the attention of this layer."""
        return isinstance(self.gates[layer], Tensor)

    def output_rows(self, rows: Tensor, output_rows_only: bool) -> Tensor:
        """The output rows of all unpadded rows, or all of them."""
        if not output_rows_only:
            return rows
        return rows.index_select(0, self.unpadded.output_rows)  # type: ignore[arg-type]

    def end_step(self, step: Step, rows: Tensor) -> None:
        """Record that a step made these rows."""
        if self.trace is not None:
            self.trace.steps.append(ExecutedStep(step, rows.shape[0]))
        if self.step_hook is not None:
            self.step_hook(step, rows)

    def end_layer(self, rows: Tensor, output_rows_only: bool) -> Tensor:
        """Keep the rows of a layer's output where they are asked for.

        Returns the rows to go on with. They are taken from what is kept, so that its gradient is theirs.
        """
        unpadded = self.unpadded
        if self.hidden_states is not None:
            self.hidden_states.append(unpadded.pad(rows, output_rows_only))
            rows = unpadded.unpad(self.hidden_states[-1], output_rows_only)
        if self.trace is not None and self.trace.every_row:
            index = unpadded.output_index() if output_rows_only else unpadded.row_index()
            self.trace.hidden.append((index, rows))
        return rows
