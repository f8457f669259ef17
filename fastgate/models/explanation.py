"""`explain`: a table of what a patched model runs, layer by layer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.errors import ArgumentError, format_error
from fastgate.models.architectures import longest_row
from fastgate.models.encoder_forward import halo_of, output_row_mask, plan_of_encoder
from fastgate.models.handle import EncoderHandle, get_encoder
from fastgate.nn.protocols import BertLikeConfig
from fastgate.runtime.costs import Sizes
from fastgate.runtime.graph_device import DEVICES
from fastgate.runtime.layer import Layer, is_skipped
from fastgate.runtime.plan import flops_of
from fastgate.runtime.steps.absorbed_attention import ProjectQuery
from fastgate.runtime.steps.base import Step
from fastgate.runtime.unpadding import UnpaddedBatch, unpad
from fastgate.text_table import paragraph, text_table

_LISTED = 8  # sequences whose lengths are listed one by one


@dataclass(frozen=True)
class Row:
    """One layer of an Explanation.

    layer: its index.
    attention: `kept`, `gated`, `skipped` (its gate is 0) or `removed`.
    gate: the value of its gate.
    live_rows: tokens that its last step computes.
    steps: names of the steps that run.
    flops: their floating-point operations on the batch.
    flops_share: of the FLOPs of the whole unpruned model on the tokens of the batch.
    notes: what is not as usual, for example a replacement.
    """

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
    """What a patched model runs for one batch. `print` shows it as a table.

    demand: which rows the head reads.
    lengths: tokens of each sequence of the batch. All numbers below refer to them.
    unpadded_rows: tokens of the batch.
    output_rows: those that the head reads.
    kept: layers whose attention runs.
    flops: floating-point operations of all layers.
    flops_share: of the unpruned model's FLOPs on the tokens of the batch.
    layers: a Row for each layer.
    graphs: what CUDA graphs have done so far. None on a device without them.
    """

    demand: str
    lengths: tuple[int, ...]
    unpadded_rows: int
    output_rows: int
    kept: tuple[int, ...]
    flops: int
    flops_share: float
    layers: tuple[Row, ...]
    graphs: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data (JSON-ready)."""
        return asdict(self)

    def __str__(self) -> str:
        table = text_table(
            ["layer", "attention", "gate", "live rows", "steps", "share of FLOPs", "notes"],
            [
                [
                    str(row.layer),
                    row.attention,
                    f"{row.gate:.2f}",
                    str(row.live_rows),
                    str(len(row.steps)),
                    f"{row.flops_share:.1%}",
                    ", ".join(row.notes),
                ]
                for row in self.layers
            ],
            (1, 6),
        )
        parts = [
            f"batch: {describe_lengths(self.lengths)}",
            f"demand {self.demand}: {self.output_rows} output rows of {self.unpadded_rows}",
            f"attention kept in {list(self.kept)} of {len(self.layers)} layers",
            f"FLOPs: {self.flops_share:.1%} of the unpruned model's on the tokens of this batch",
            *([_ABOVE_ALL] if self.flops_share > 1 else []),
        ]
        graphs = [] if self.graphs is None else ["", paragraph(f"CUDA graphs: {self.graphs}", indent="  ")]
        return "\n".join([*(paragraph(part, indent="  ") for part in parts), "", table, *graphs])


_ABOVE_ALL = (
    "The share is above 100% because this head reads every row. fastgate then computes the padding too. The "
    "FLOPs of the unpruned model are of the tokens alone."
)


def describe_lengths(lengths: Sequence[int]) -> str:
    """In words: `3 sequences of 8, 16, 32 tokens`, or the range and the mean if there are many lengths."""
    count, tokens = len(lengths), sum(lengths)
    sequences = "1 sequence" if count == 1 else f"{count} sequences"
    if len(set(lengths)) == 1:
        return f"{sequences} of {lengths[0]} tokens"
    if count <= _LISTED:
        return f"{sequences} of {', '.join(map(str, lengths))} tokens"
    return f"{sequences} of {min(lengths)} to {max(lengths)} tokens, {tokens / count:.1f} on average"


def explain(model: nn.Module, lengths: Sequence[int] = (32,) * 8) -> Explanation:
    """What the patched `model` runs, layer by layer, for a batch of sequences of these lengths.

    The live rows and the FLOPs depend on the lengths. Pass those of your own data, for example
    `[len(ids) for ids in batch["input_ids"]]` without padding. No forward runs.

    Args:
        model: what fastgate.patch or fastgate.load returned.
        lengths: tokens of each sequence, [CLS] and [SEP] included. The default is 8 sequences of 32 tokens.

    Raises:
        NothingPatched: the model is not patched.
        ArgumentError: `model` is no model, `lengths` are no batch, or a sequence is longer than the model's
            position table.
        Unsupported: a forward would be refused.
    """
    if not isinstance(model, nn.Module):
        remedy = "pass what fastgate.patch or fastgate.load returned"
        raise ArgumentError(format_error("explain", "model", repr(model), "a patched model", remedy))
    lengths = _checked(lengths)
    handle = get_encoder(model, "explain")
    handle.check_layers("explain")
    encoder, runtime = handle.encoder, handle.runtime
    config: Any = encoder.config
    _check_positions(lengths, longest_row(config))
    unpadded = _unpadded(handle, lengths)
    inspection = runtime.inspections.of(encoder)
    plan = plan_of_encoder(encoder, inspection, unpadded, capture=False)
    sizes = [layer_sizes(encoder.config, layer, unpadded) for layer in inspection.layers]
    # Of the unpruned model on the tokens alone: a head that reads every row has padding computed as well.
    tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    dense_flops = sum(replace(each, rows=tokens, pairs=pairs).dense_flops for each in sizes)
    rows = tuple(
        _row(handle, i, layer, plan.of_layer(i), sizes[i], dense_flops)
        for i, layer in enumerate(inspection.layers)
    )
    flops = sum(row.flops for row in rows)
    return Explanation(
        runtime.demand,
        tuple(lengths),
        unpadded.queries.rows,
        unpadded.rows_within_halo[0],
        plan.kept,
        flops,
        flops / dense_flops,
        rows,
        _graphs(handle),
    )


def _unpadded(handle: EncoderHandle, lengths: Sequence[int]) -> UnpaddedBatch:
    """A batch of sequences of these lengths, as a forward unpads it."""
    batch, longest = len(lengths), max(lengths)
    attended = torch.arange(longest) < torch.tensor(lengths)[:, None]
    outputs = output_row_mask(handle.encoder, attended, None, False, (batch, longest), attended.device)
    return unpad(batch, longest, attended, outputs, attended.device, halo_of(handle.encoder))


def _row(
    handle: EncoderHandle, i: int, layer: Layer, steps: tuple[Step, ...], sizes: Sizes, dense_flops: int
) -> Row:
    """What layer i runs. dense_flops: of the unpruned model."""
    gate, flops = handle.gates[i], flops_of(steps, sizes)
    return Row(
        i,
        _status(handle, i),
        gate.item() if isinstance(gate, Tensor) else gate,
        steps[-1].rows(sizes),
        tuple(step.name for step in steps),
        flops,
        flops / dense_flops,
        _notes(layer, steps[0]),
    )


def _checked(lengths: Any) -> list[int]:
    """The lengths as a list, once they are positive numbers of tokens."""
    try:
        numbers = [operator.index(n) for n in lengths]
    except TypeError:
        numbers = []
    if not numbers or min(numbers) < 1:
        remedy = "pass e.g. [32] * 8"
        raise ArgumentError(
            format_error("explain", "lengths", repr(lengths), "one number of tokens a sequence", remedy)
        )
    return numbers


def _check_positions(lengths: Sequence[int], limit: int) -> None:
    """Raises ArgumentError for a sequence that is longer than the position table."""
    if max(lengths) > limit:
        got, wanted = f"a sequence of {max(lengths)} tokens", f"at most {limit}, the model's position table"
        raise ArgumentError(format_error("explain", "lengths", got, wanted, "pass shorter sequences"))


def layer_sizes(config: BertLikeConfig, layer: Layer, unpadded: UnpaddedBatch) -> Sizes:
    """What the costs of a layer depend on.

    A layer may be narrower than the config says. What a module does not tell, and a pruned attention, are as
    the config has it.
    """
    width = None if layer.query is None else getattr(layer.query.module, "out_features", None)
    up = layer.intermediate._modules.get("dense")
    return Sizes(
        hidden=config.hidden_size,
        intermediate=getattr(up, "out_features", None) or config.intermediate_size,
        heads=config.num_attention_heads if width is None else layer.heads_in(width),
        attention_width=config.hidden_size if width is None else width,
        rows=unpadded.queries.rows,
        keys=unpadded.keys.rows,
        rows_within_halo=unpadded.rows_within_halo,
        pairs=unpadded.pairs,
        sequences=unpadded.batch,
    )


def _status(handle: EncoderHandle, i: int) -> str:
    """What became of a layer's attention, in one word."""
    gate = handle.gates[i]
    if handle.is_removed(i):
        return "removed"
    if is_skipped(gate) or (isinstance(gate, Tensor) and gate.item() == 0):
        return "skipped"
    return "gated" if isinstance(gate, Tensor) else "kept"


def _graphs(handle: EncoderHandle) -> str | None:
    graphs = handle.runtime.executor.graphs
    first = next(handle.encoder.parameters(), None)
    if first is None or first.device.type not in DEVICES:
        return None
    return "turned off" if graphs is None else graphs.summary()


def _notes(layer: Layer, first: Step) -> tuple[str, ...]:
    """What is not the usual: an absorbed attention, a replacement, modules called as they are."""
    notes = ["absorbed: one query a sequence"] if isinstance(first, ProjectQuery) else []
    if layer.replacement is not None and layer.replacement.kind != "zero":
        notes.append(f"replaced by {layer.replacement.kind}")
    linears = {
        "attention.self.query": layer.query,
        "attention.self.key": layer.key,
        "attention.self.value": layer.value,
        "attention.output.dense": layer.dense,
        "output.dense": layer.down,
    }
    called = {path: dense.module for path, dense in linears.items() if dense is not None and not dense.plain}
    for path, end in (("attention.output", layer.attention_end), ("output", layer.output_end)):
        if not end.plain_dropout and (end is layer.output_end or layer.query is not None):
            called[f"{path}.dropout"] = end.dropout
        if not end.plain_norm:
            called[f"{path}.LayerNorm"] = end.norm
    if layer.gelu is None:
        called["intermediate"] = layer.intermediate
    return (*notes, *(f"{path} called as {type(module).__name__}" for path, module in called.items()))
