"""attention, the mathematics: over an unpadded batch, a sequence and a head at a time, queries i and keys j:

    S_ij = scale * q_i . k_j        p_ij = softmax_j(S_ij)
    P_ij = m_ij * p_ij / (1 - p)    out_i = sum_j P_ij v_j

with q, k, v the rows with their biases added, keep mask m and dropout probability p, and backwards, of the
gradient g of out:

    dv_j  = sum_i P_ij g_i
    dP_ij = m_ij / (1 - p) * (g_i . v_j)
    dS_ij = p_ij * (dP_ij - sum_k p_ik dP_ik)
    dq_i  = scale * sum_j dS_ij k_j                   dk_j = scale * sum_i dS_ij q_i

A sequence without keys gives zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgate.ops.autograd import any_requires_grad
from fastgate.ops.ragged import SequenceOffsets
from fastgate.ops.reference.dropout import keep_mask
from fastgate.ops.reference.norm import accumulation_dtype

Biases = tuple[Tensor | None, Tensor | None, Tensor | None]
NO_BIASES: Biases = (None, None, None)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: SequenceOffsets,
    keys: SequenceOffsets,
    heads: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    biases: Biases = NO_BIASES,
) -> Tensor:
    """out of the module's head comment, for every device and dtype, differentiable by plain autograd.

    Runs torch's scaled_dot_product_attention where that has what is needed, attention_by_sequence elsewhere.

    q: (queries.rows, hidden); k, v: (keys.rows, hidden); biases: those of q, k and v, (hidden,) each; seed:
    () int64 where dropout_p > 0. Returns (queries.rows, hidden) in q's dtype.
    """
    q_bias, k_bias, v_bias = biases
    if k_bias is not None and any_requires_grad(k_bias):
        # A gradient of zeros and not a missing one, as DDP and Adam expect.
        q_bias = 0.0 * k_bias if q_bias is None else q_bias + 0.0 * k_bias
    q, v = add_bias(q, q_bias), add_bias(v, v_bias)
    if dropout_p or keys.longest == 0 or (q.dtype == torch.float64 and any_requires_grad(q, k, v)):
        # float64 is for derivatives of every order, which torch's own attention does not have.
        return attention_by_sequence(q, k, v, queries, keys, heads, scale, dropout_p, seed)
    if queries.equal and keys.equal:
        q_head, k_head, v_head = (split_heads(t, len(queries.lengths), heads) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q_head, k_head, v_head, scale=scale)
        return out.transpose(1, 2).reshape(q.shape)
    return _padded(q, k, v, queries, keys, heads, scale)


def add_bias(rows: Tensor, bias: Tensor | None) -> Tensor:
    """rows + bias rounded to rows' dtype, as a Linear's output is."""
    return rows if bias is None else (rows + bias).to(rows.dtype)


def split_heads(rows: Tensor, sequences: int, heads: int) -> Tensor:
    """(sequences * n, hidden) -> (sequences, heads, n, head_dim)."""
    n = rows.shape[0] // max(sequences, 1)
    return rows.view(sequences, n, heads, rows.shape[-1] // heads).transpose(1, 2)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, queries: SequenceOffsets, keys: SequenceOffsets, heads: int, scale: float
) -> Tensor:
    """Pads to the longest sequence and masks the keys."""
    sequences = len(queries.lengths)
    q_head, k_head, v_head = (
        split_heads(offsets.grid(t).flatten(0, 1), sequences, heads)
        for t, offsets in ((q, queries), (k, keys), (v, keys))
    )
    mask = keys.padded[1][:, None, None, :]
    out = F.scaled_dot_product_attention(q_head, k_head, v_head, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).reshape(-1, q.shape[-1]).index_select(0, queries.padded[0])


def _sequences(queries: SequenceOffsets, keys: SequenceOffsets) -> Iterator[tuple[slice, slice]]:
    """The rows of queries and of keys of each sequence."""
    first_query, first_key = 0, 0
    for n, m in zip(queries.lengths, keys.lengths, strict=True):
        yield slice(first_query, first_query + n), slice(first_key, first_key + m)
        first_query, first_key = first_query + n, first_key + m


def _mask(
    queries: SequenceOffsets, keys: SequenceOffsets, heads: int, dropout_p: float, seed: Tensor | None
) -> Tensor | None:
    """Which probabilities dropout keeps: bool (queries.rows * heads, longest), None if nothing is dropped."""
    if not dropout_p:
        return None
    assert seed is not None
    return keep_mask(seed, queries.rows * heads, keys.longest, dropout_p)


def _kept(mask: Tensor, rows: slice, heads: int, keys: int) -> Tensor:
    """The part of _mask of one sequence: (heads, queries, keys)."""
    part = mask[rows.start * heads : rows.stop * heads, :keys]
    return part.view(rows.stop - rows.start, heads, keys).transpose(0, 1)


def attention_by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: SequenceOffsets,
    keys: SequenceOffsets,
    heads: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """out of the module's head comment as its equations say, differentiable to every order.

    One sequence at a time, its probabilities in the open for the dropout mask that all backends share.
    Operands as in `attention`, biases added.
    """
    outs = [q[:0]]
    mask = _mask(queries, keys, heads, dropout_p, seed)
    for rows, key_rows in _sequences(queries, keys):
        q_head, k_head, v_head = (split_heads(t, 1, heads)[0] for t in (q[rows], k[key_rows], v[key_rows]))
        p = (torch.matmul(q_head, k_head.transpose(1, 2)) * scale).softmax(-1)
        if mask is not None:
            p = torch.where(_kept(mask, rows, heads, k_head.shape[1]), p / (1.0 - dropout_p), 0.0)
        outs.append(torch.matmul(p, v_head).transpose(0, 1).reshape(-1, q.shape[-1]))
    return torch.cat(outs)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: SequenceOffsets,
    keys: SequenceOffsets,
    heads: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by the equations of the module's head comment, written out.

    grad: (queries.rows, hidden), the gradient of out; the other operands as in `attention`, biases added. The
    gradients come in the operands' dtypes.
    """
    dtype = accumulation_dtype(q, k)
    grads = [torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (q, k, v)]
    mask = _mask(queries, keys, heads, dropout_p, seed)
    for rows, key_rows in _sequences(queries, keys):
        q_head, k_head, v_head, g = (
            split_heads(t.to(dtype), 1, heads)[0] for t in (q[rows], k[key_rows], v[key_rows], grad[rows])
        )
        p = dropped = (torch.matmul(q_head, k_head.transpose(1, 2)) * scale).softmax(-1)
        dp = torch.matmul(g, v_head.transpose(1, 2))
        if mask is not None:
            kept = _kept(mask, rows, heads, k_head.shape[1])
            dropped = torch.where(kept, p / (1.0 - dropout_p), 0.0)
            dp = torch.where(kept, dp / (1.0 - dropout_p), 0.0)
        ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
        by_head = (
            torch.matmul(ds, k_head),
            torch.matmul(ds.transpose(1, 2), q_head),
            torch.matmul(dropped.transpose(1, 2), g),
        )
        for total, part, place in zip(grads, by_head, (rows, key_rows, key_rows), strict=True):
            total[place] = part.transpose(0, 1).reshape(-1, q.shape[-1])
    dq, dk, dv = (total.to(t.dtype) for total, t in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv
