"""Which batches a CUDA graph serves: its sizes, rounded up, and all else that decides what it holds."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastgate.runtime.context import ForwardContext
from fastgate.runtime.embedding_inputs import TokenIds


def rounded(rows: int) -> int:
    """A number of rows, rounded up to a multiple of 16: 8 sizes an octave up to 512 rows, where weights are
    what a product reads, and 16 sizes above."""
    octave = max(rows - 1, 1).bit_length()
    step = 1 << max(octave - (4 if rows <= 512 else 5), 4)
    return -(-rows // step) * step


class GraphShape(NamedTuple):
    """The sizes of a graph. rows: of the embeddings. keys, outputs: 0 where they are all of the rows."""

    rows: int
    sequences: int
    keys: int
    outputs: int


class GraphKey(NamedTuple):
    """All that decides what a graph holds, beside the encoder.

    has_other_rows: there are rows that are no output rows. embeds_outputs_only: the embeddings make output
    rows only. has_types: token types are given. has_empty: a sequence may have no keys.
    """

    shape: GraphShape
    gates: tuple[float, ...]
    has_other_rows: bool
    one_query_per_sequence: bool
    embeds_outputs_only: bool
    has_types: bool
    has_empty: bool
    precision: str
    deterministic: bool


def key_of(context: ForwardContext, ids: TokenIds) -> GraphKey:
    """The key of the graph that a forward may be replayed from. ids: of the padded batch."""
    unpadded = context.unpadded
    rows, sequences = unpadded.queries.rows, 1 << max(unpadded.batch - 1, 0).bit_length()
    keys = 0 if unpadded.host.key_rows is None else rounded(unpadded.keys.rows)
    outputs = sequences if unpadded.one_query_per_sequence else rounded(unpadded.outputs.rows)
    embeds_outputs_only = context.plan.embed.output_rows_only
    shape = GraphShape(rounded(rows), sequences, keys, outputs if unpadded.has_other_rows else 0)
    return GraphKey(
        GraphShape(outputs, sequences, 0, 0) if embeds_outputs_only else shape,
        tuple(context.gates),  # type: ignore[arg-type]
        unpadded.has_other_rows,
        unpadded.one_query_per_sequence,
        embeds_outputs_only,
        ids.types is not None,
        0 in unpadded.keys.lengths,
        str(getattr(torch.backends.cuda.matmul, "fp32_precision", "")),
        torch.are_deterministic_algorithms_enabled(),
    )
