"""`explain`: a table of what a patched model runs, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .forward import demanded_rows, make_runtime_plan, reach_of
from .graphs import DEVICES
from .layer import is_linear_gelu, replacement_of, weight_of
from .packing import pack_rows
from .plan import Sizes, flops
from .state import EncoderState, encoder_state


@dataclass(frozen=True)
class Row:
    """One layer: its gate, live rows of packed ones, steps, share of the unpruned model's FLOPs, notes."""

    layer: int
    attention: str
    gate: float
    live_rows: int
    steps: tuple[str, ...]
    flops: int
    flops_share: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """What a patched model runs for sequences of `lengths` tokens; shares are of dense FLOPs, unpadded.

    graphs: what CUDA graphs have done so far, None on a device without them.
    """

    demand: str
    lengths: tuple[int, ...]
    packed_rows: int
    demanded_rows: int
    kept: tuple[int, ...]
    flops: int
    flops_share: float
    layers: tuple[Row, ...]
    graphs: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data (JSON-ready)."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"demand {self.demand}: {self.demanded_rows} of {self.packed_rows} rows read; attention kept in "
            f"{list(self.kept)} of {len(self.layers)} layers; {self.flops_share:.1%} of dense FLOPs",
            "layer  attention  gate  live rows  steps   FLOPs  notes",
        ]
        for row in self.layers:
            lines.append(
                f"{row.layer:>5}  {row.attention:<9} {row.gate:>5.2f}  {row.live_rows:>9}  "
                f"{len(row.steps):>5}  {row.flops_share:>6.1%}  {', '.join(row.notes)}".rstrip()
            )
        return "\n".join(lines if self.graphs is None else [*lines, f"CUDA graphs: {self.graphs}"])


def explain(model: nn.Module, lengths: Sequence[int] = (32,) * 8) -> Explanation:
    """What the patched `model` runs for a batch of sequences of these lengths (tokens each).

    Raises NothingPatched if the model is not patched.
    """
    state = encoder_state(model)
    encoder = state.encoder
    batch, longest = len(lengths), max(lengths)
    attended = torch.arange(longest) < torch.tensor(lengths)[:, None]
    demanded = demanded_rows(encoder, attended, None, False, (batch, longest), attended.device)
    packing = pack_rows(batch, longest, attended, demanded, attended.device, reach_of(encoder))
    plan = make_runtime_plan(encoder, state.runtime.inspections.of(encoder), packing, capture=False)
    config = encoder.config
    pairs = sum(q * k for q, k in zip(packing.queries.lengths, packing.keys.lengths, strict=True))
    sizes = Sizes(
        config.hidden_size,
        config.intermediate_size,
        packing.queries.rows,
        packing.keys.rows,
        packing.within,
        pairs,
        batch,
    )
    heads = config.num_attention_heads
    h, rows = config.hidden_size, sum(lengths)
    dense = state.num_layers * (
        2 * rows * h * (4 * h + 2 * config.intermediate_size) + 4 * sum(n * n for n in lengths) * h
    )

    table = []
    for i, layer in enumerate(encoder.encoder.layer):
        steps = plan.of_layer(i)
        gate = state.gates[i]
        value = gate.item() if isinstance(gate, Tensor) else gate
        cost = sum(flops(step, sizes, heads) for step in steps)
        status = (
            "removed"
            if state.is_removed(i)
            else "skipped"
            if value == 0
            else "gated"
            if isinstance(gate, Tensor)
            else "kept"
        )
        table.append(
            Row(
                i,
                status,
                value,
                sizes.live(steps[-1]),
                tuple(s.op for s in steps),
                cost,
                cost / dense,
                _notes(layer, steps[0].op),
            )
        )
    total = sum(row.flops for row in table)
    return Explanation(
        state.runtime.demand,
        tuple(lengths),
        sizes.packed,
        sizes.demanded,
        plan.kept,
        total,
        total / dense,
        tuple(table),
        _graphs(state),
    )


def _graphs(state: EncoderState) -> str | None:
    graphs = state.runtime.graphs
    if next(state.encoder.parameters()).device.type not in DEVICES:
        return None
    return "turned off" if graphs is None else graphs.said()


def _notes(layer: Any, first: str) -> tuple[str, ...]:
    """What is not the usual: an absorbed attention, a replacement, modules called as they are."""
    notes = ["absorbed: one query a sequence"] if first == "project_query" else []
    replacement = replacement_of(layer)
    if replacement is not None and replacement.kind != "zero":
        notes.append(f"replaced by {replacement.kind}")
    for path in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "output.dense",
    ):
        parent, _, name = path.rpartition(".")
        module = layer.get_submodule(parent)._modules.get(name)
        if module is not None and weight_of(module) is None and not hasattr(module, "fastgate_removed"):
            notes.append(f"{path} called as {type(module).__name__}")
    if not is_linear_gelu(layer.intermediate):
        notes.append(f"intermediate called as {type(layer.intermediate).__name__}")
    return tuple(notes)
