"""`explain`: a table of what a patched model runs, layer by layer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.errors import ArgumentError, format_error
from fastgate.models.encoder_forward import halo_of, output_row_mask, plan_of_encoder
from fastgate.models.handle import EncoderHandle, get_encoder
from fastgate.runtime.cuda_graphs import DEVICES
from fastgate.runtime.layer import Layer, is_skipped
from fastgate.runtime.plan import Sizes, flops
from fastgate.runtime.unpadding import unpad


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
    output_row_mask: int
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
            f"demand {self.demand}: {self.output_row_mask} of {self.packed_rows} rows read; attention kept in "
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

    Raises NothingPatched if the model is not patched, ArgumentError for what is no model and for lengths that
    are no batch, Unsupported where a forward would be refused.
    """
    if not isinstance(model, nn.Module):
        remedy = "pass what fastgate.patch or fastgate.load returned"
        raise ArgumentError(format_error("explain", "model", repr(model), "a patched model", remedy))
    lengths = _checked(lengths)
    state = get_encoder(model, "explain")
    state.check_layers("explain")
    encoder = state.encoder
    batch, longest = len(lengths), max(lengths)
    attended = torch.arange(longest) < torch.tensor(lengths)[:, None]
    demanded = output_row_mask(encoder, attended, None, False, (batch, longest), attended.device)
    unpadded = unpad(batch, longest, attended, demanded, attended.device, halo_of(encoder))
    inspection = state.runtime.inspections.of(encoder)
    plan = plan_of_encoder(encoder, inspection, unpadded, capture=False)
    pairs = sum(q * k for q, k in zip(unpadded.queries.lengths, unpadded.keys.lengths, strict=True))
    rows, squares = sum(lengths), sum(n * n for n in lengths)

    table, dense = [], 0
    for i, layer in enumerate(inspection.layers):
        steps = plan.of_layer(i)
        gate = state.gates[i]
        attention, heads, intermediate = _widths(encoder.config, layer)
        sizes = Sizes(
            encoder.config.hidden_size,
            intermediate,
            unpadded.queries.rows,
            unpadded.keys.rows,
            unpadded.within,
            pairs,
            batch,
            attention,
        )
        dense += 4 * rows * sizes.hidden * (2 * attention + intermediate) + 4 * squares * attention
        table.append(
            Row(
                i,
                _status(state, i),
                gate.item() if isinstance(gate, Tensor) else gate,
                sizes.live(steps[-1]),
                tuple(s.op for s in steps),
                sum(flops(step, sizes, heads) for step in steps),
                0.0,
                _notes(layer, steps[0].op),
            )
        )
    table = [replace(row, flops_share=row.flops / dense) for row in table]
    total = sum(row.flops for row in table)
    return Explanation(
        state.runtime.demand,
        tuple(lengths),
        unpadded.queries.rows,
        unpadded.within[0],
        plan.kept,
        total,
        total / dense,
        tuple(table),
        _graphs(state),
    )


def _checked(lengths: Any) -> list[int]:
    """The lengths as a list, once they are positive numbers of tokens."""
    try:
        found = [operator.index(n) for n in lengths]
    except TypeError:
        found = []
    if not found or min(found) < 1:
        remedy = "pass e.g. [32] * 8"
        raise ArgumentError(
            format_error("explain", "lengths", repr(lengths), "one number of tokens a sequence", remedy)
        )
    return found


def _widths(config: Any, layer: Layer) -> tuple[int, int, int]:
    """(all heads together, number of heads, feed-forward block) of a layer, which may be narrower than the
    config says; what a module does not tell, and a pruned attention, are as the config has it."""
    attention = None if layer.query is None else getattr(layer.query.module, "out_features", None)
    up = layer.intermediate._modules.get("dense")
    intermediate = getattr(up, "out_features", None) or config.intermediate_size
    if attention is None:
        return config.hidden_size, config.num_attention_heads, intermediate
    return attention, layer.heads_in(attention), intermediate


def _status(state: EncoderHandle, i: int) -> str:
    """What became of a layer's attention, in one word."""
    gate = state.gates[i]
    if state.is_removed(i):
        return "removed"
    if is_skipped(gate) or (isinstance(gate, Tensor) and gate.item() == 0):
        return "skipped"
    return "gated" if isinstance(gate, Tensor) else "kept"


def _graphs(state: EncoderHandle) -> str | None:
    graphs = state.runtime.graphs
    first = next(state.encoder.parameters(), None)
    if first is None or first.device.type not in DEVICES:
        return None
    return "turned off" if graphs is None else graphs.said()


def _notes(layer: Layer, first: str) -> tuple[str, ...]:
    """What is not the usual: an absorbed attention, a replacement, modules called as they are."""
    notes = ["absorbed: one query a sequence"] if first == "project_query" else []
    if layer.replacement is not None and layer.replacement.kind != "zero":
        notes.append(f"replaced by {layer.replacement.kind}")
    products = {
        "attention.self.query": layer.query,
        "attention.self.key": layer.key,
        "attention.self.value": layer.value,
        "attention.output.dense": layer.dense,
        "output.dense": layer.down,
    }
    called = {path: dense.module for path, dense in products.items() if dense is not None and not dense.plain}
    for path, end in (("attention.output", layer.attention_end), ("output", layer.output_end)):
        if not end.plain_dropout and (end is layer.output_end or layer.query is not None):
            called[f"{path}.dropout"] = end.dropout
        if not end.plain_norm:
            called[f"{path}.LayerNorm"] = end.norm
    if layer.gelu is None:
        called["intermediate"] = layer.intermediate
    return (*notes, *(f"{path} called as {type(module).__name__}" for path, module in called.items()))
