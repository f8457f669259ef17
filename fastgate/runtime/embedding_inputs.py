"""What the embeddings of a batch are made from: ids to gather by, vectors that a call gave, or a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from fastgate.runtime.context import ForwardContext


class TokenIds(NamedTuple):
    """What embeddings are gathered by, int64 of one shape each. types None: type 0 everywhere."""

    words: Tensor
    positions: Tensor
    types: Tensor | None


class EmbeddingInputs(Protocol):
    """padded_ids: the ids of the padded batch, (batch or 1, length) each. None where ids are not gathered."""

    @property
    def padded_ids(self) -> TokenIds | None: ...

    def rows(self, context: ForwardContext, output_rows_only: bool) -> TokenIds | Tensor:
        """Ids of the unpadded or the output rows, (rows,) each, or their embeddings, (rows, hidden)."""


@dataclass(frozen=True)
class PaddedIds:
    """Ids of a padded batch, (batch or 1, length) each."""

    padded_ids: TokenIds

    def rows(self, context: ForwardContext, output_rows_only: bool) -> TokenIds:
        return TokenIds(*(unpadded_ids(context, ids, output_rows_only) for ids in self.padded_ids))  # type: ignore[arg-type]


@dataclass(frozen=True)
class UnpaddedIds:
    """Ids of the rows that the embeddings make, (rows,) each."""

    ids: TokenIds
    padded_ids: None = None

    def rows(self, context: ForwardContext, output_rows_only: bool) -> TokenIds:
        return self.ids


@dataclass(frozen=True)
class GivenVectors:
    """Word vectors that a call gave, (batch, length, hidden). positions, types: ids, (batch or 1, length)."""

    vectors: Tensor
    positions: Tensor
    types: Tensor | None
    padded_ids: None = None

    def rows(self, context: ForwardContext, output_rows_only: bool) -> Tensor:
        embeddings: Any = context.snapshot.embeddings
        type_table: Any = context.snapshot.tables[2]
        types = unpadded_ids(context, self.types, output_rows_only)
        u = context.unpadded.unpad(self.vectors, output_rows_only)
        u = u + embeddings.position_embeddings(unpadded_ids(context, self.positions, output_rows_only))
        u = u + (type_table.weight[0] if types is None else type_table(types))
        return embeddings.dropout(embeddings.LayerNorm(u))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class CalledModule:
    """The embeddings' module, called with padded input: its hooks may count on that.

    arguments: its keyword arguments.
    """

    arguments: dict[str, Any]
    padded_ids: None = None

    def rows(self, context: ForwardContext, output_rows_only: bool) -> Tensor:
        return context.unpadded.unpad(context.snapshot.embeddings(**self.arguments), output_rows_only)


def unpadded_ids(context: ForwardContext, ids: Tensor | None, output_rows_only: bool) -> Tensor | None:
    """Ids (batch or 1, length) of the unpadded or the output rows, (rows,)."""
    if ids is None:
        return None
    unpadded = context.unpadded
    return unpadded.unpad(ids.expand(unpadded.batch, unpadded.length), output_rows_only)
