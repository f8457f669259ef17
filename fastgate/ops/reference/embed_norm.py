"""embed_norm, the mathematics: with rows i, T a table and T[k] its row k:

    u = words[word_i] + positions[position_i] + types[type_i]
    y = m * (xhat * weight + norm_bias) / (1 - p)     then, if weight2 is given, a second norm of y

and backwards, with du as in gated_add_norm.py and dy, where weight2 is given, the du of the second norm:

    dy = m / (1 - p) * dy                             dT[k] = sum_i [T's id of i is k] * du_i, 0 for padding
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm

from fastgate.ops.reference.norm import accumulation_dtype, cast, drop, norm_backward, normalise


class EmbedGradients(NamedTuple):
    """Gradients of embed_norm; None where the operand was not given."""

    word_table: Tensor
    position_table: Tensor
    type_table: Tensor
    weight: Tensor
    norm_bias: Tensor
    weight2: Tensor | None
    norm_bias2: Tensor | None


def _gather(
    words: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word_table: Tensor,
    position_table: Tensor,
    type_table: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """u of embed_norm, (rows, H)."""
    u = embedding(words, word_table).to(dtype) + embedding(positions, position_table).to(dtype)
    return u + (type_table[0] if types is None else embedding(types, type_table)).to(dtype)


def embed_norm(
    words: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word_table: Tensor,
    position_table: Tensor,
    type_table: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
    weight2: Tensor | None = None,
    norm_bias2: Tensor | None = None,
    eps2: float = 0.0,
) -> Tensor:
    """y of the module's head comment, differentiable by plain autograd (padding apart).

    words, positions: (rows,) int64 or int32; types: the same, None for type 0; tables: (number, H), one
    dtype; vectors: (H,); mask: (rows, H) bool, True where kept, None to drop nothing. Returns (rows, H) in
    the tables' dtype. IndexError for an id outside its table.
    """
    dtype = accumulation_dtype(word_table, word_table)
    u = _gather(words, positions, types, word_table, position_table, type_table, dtype)
    y = layer_norm(u, u.shape[-1:], weight.to(dtype), norm_bias.to(dtype), eps)
    y = drop(y, None, dropout_p, mask, dtype)
    if weight2 is not None:
        y = layer_norm(y, y.shape[-1:], weight2.to(dtype), cast(norm_bias2, dtype), eps2)
    return y.to(word_table.dtype)


def embed_norm_backward(
    grad: Tensor,
    words: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word_table: Tensor,
    position_table: Tensor,
    type_table: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
    weight2: Tensor | None = None,
    norm_bias2: Tensor | None = None,
    eps2: float = 0.0,
    padding_idx: int = -1,
    position_padding_idx: int = -1,
) -> EmbedGradients:
    """The backward equations of the module's head comment, written out; gathers again.

    grad: (rows, H), the gradient of y. padding_idx, position_padding_idx: the row of the word and of the
    position table that gets no gradient, -1 for none. The tables' gradients are dense, in their dtype; those
    of the vectors come in the accumulation dtype (float32, float64 for float64).
    """
    dtype = accumulation_dtype(word_table, word_table)
    xhat, rstd = normalise(
        _gather(words, positions, types, word_table, position_table, type_table, dtype), eps
    )
    weight, norm_bias, dy = weight.to(dtype), norm_bias.to(dtype), grad.to(dtype)
    dweight2 = dnorm_bias2 = None
    if weight2 is not None:
        v = drop(xhat * weight + norm_bias, None, dropout_p, mask, dtype)
        xhat2, rstd2 = normalise(v, eps2)
        dweight2, dnorm_bias2 = (dy * xhat2).sum(0), dy.sum(0)
        dy = norm_backward(dy, weight2.to(dtype), xhat2, rstd2)
    dy = drop(dy, None, dropout_p, mask, dtype)
    du = norm_backward(dy, weight, xhat, rstd)
    return EmbedGradients(
        word_table=_scatter(du, words, word_table, padding_idx),
        position_table=_scatter(du, positions, position_table, position_padding_idx),
        type_table=_scatter(du, types, type_table, -1),
        weight=(dy * xhat).sum(0),
        norm_bias=dy.sum(0),
        weight2=dweight2,
        norm_bias2=dnorm_bias2,
    )


def _scatter(du: Tensor, ids: Tensor | None, table: Tensor, padding_idx: int) -> Tensor:
    """dT: the rows of du summed by their ids, row padding_idx left zero; without ids all go to row 0."""
    if ids is None:
        dtable = torch.zeros_like(table)
        dtable[0] = du.sum(0)
        return dtable
    rows: Tensor = torch.ops.aten.embedding_dense_backward(du, ids, table.shape[0], padding_idx, False)
    return rows.to(table.dtype)
