"""The first step of a plan: the embeddings of the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastgate.nn.plain_modules import dropout_rate
from fastgate.ops.embed_norm import embed_norm
from fastgate.runtime.embedding_inputs import TokenIds
from fastgate.runtime.steps.base import Step, skipped_norm

if TYPE_CHECKING:
    from fastgate.runtime.context import ForwardContext


@dataclass(frozen=True)
class Embed(Step):
    """Word, position and type vectors added, then LayerNorm and dropout.

    takes_next_norm: the LayerNorm that layer 0's skipped attention leaves behind runs here too.
    """

    name = "embed"
    ends_sublayer = True

    takes_next_norm: bool = False

    def embed(self, context: ForwardContext) -> Tensor:
        """(rows, hidden) of the unpadded or the output rows."""
        rows, takes_norm = context.inputs.rows(context, self.output_rows_only), self.takes_next_norm
        if isinstance(rows, TokenIds):
            first, dropout = context.layers[0], context.snapshot.embeddings.dropout
            # Dropout stands between the two norms: what is added behind it cannot be folded in before it.
            folds = first.attention_end.plain_norm and not (dropout_rate(dropout) and first.adds_offset)
            rows = self._gather(context, rows, takes_norm and folds)
            takes_norm = takes_norm and not folds
        if takes_norm:
            rows = skipped_norm(context.layers[0], rows)
        context.end_step(self, rows)
        return context.end_layer(rows, self.output_rows_only)

    def _gather(self, context: ForwardContext, ids: TokenIds, with_next_norm: bool) -> Tensor:
        embeddings: Any = context.snapshot.embeddings
        words, positions = embeddings.word_embeddings, embeddings.position_embeddings
        norm, second = embeddings.LayerNorm, dict[str, Any]()
        weight, norm_bias = norm.weight, norm.bias
        if with_next_norm:
            weight, norm_bias, second = context.layers[0].fold_next_norm(norm)
        return embed_norm(
            *ids,
            words.weight,
            positions.weight,
            embeddings.token_type_embeddings.weight,
            weight,
            norm_bias,
            norm.eps,
            dropout_p=dropout_rate(embeddings.dropout),
            padding_idx=words.padding_idx,
            position_padding_idx=positions.padding_idx,
            **second,
        )
