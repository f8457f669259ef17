"""Every op's mathematics in plain torch, forward and backward: the truth each backend is measured against.

gated_add_norm, with rows i and channels j, keep mask m and keep probability 1 - p:

    d = m * (x + bias) / (1 - p)                      dropout of the sublayer's output
    u = scale * residual + gate * d + shift
    y = (u - mean(u)) * rstd(u) * weight + norm_bias  then, if weight2 is given, a second norm of y

and backwards, with xhat = (u - mean) * rstd, t = dy * weight and means over channels:

    du        = rstd * (t - mean(t) - xhat * mean(t * xhat))
    dx        = gate * m / (1 - p) * du               dbias  = sum_i dx
    dresidual = scale * du                            dscale = sum_i du * residual
    dgate     = sum_ij du * d                         dshift = sum_i du
    dweight   = sum_i dy * xhat                       dnorm_bias = sum_i dy

linear_gelu, with Phi and phi the distribution and the density of the standard normal:

    v  = x W^T + b,  y = v Phi(v)                     Phi(v) = (1 + erf(v / sqrt 2)) / 2: the exact GELU
    dv = dy * (Phi(v) + v phi(v))                     dx = dv W,  dW = dv^T x,  db = sum_i dv

embed_norm, with rows i, T a table and T[k] its row k:

    u = words[word_i] + positions[position_i] + types[type_i]
    y = m * (xhat * weight + norm_bias) / (1 - p)     then, if weight2 is given, a second norm of y

and backwards, with du as above and dy, where weight2 is given, the du of the second norm:

    dy = m / (1 - p) * dy                             dT[k] = sum_i [T's id of i is k] * du_i, 0 for padding
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


class Gradients(NamedTuple):
    """Gradients of gated_add_norm; None where the operand was not given."""

    x: Tensor
    residual: Tensor
    bias: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor
    norm_bias: Tensor
    weight2: Tensor | None
    norm_bias2: Tensor | None


class EmbedGradients(NamedTuple):
    """Gradients of embed_norm; None where the operand was not given."""

    word_table: Tensor
    position_table: Tensor
    type_table: Tensor
    weight: Tensor
    norm_bias: Tensor
    weight2: Tensor | None
    norm_bias2: Tensor | None


def dropout_threshold(dropout_p: float) -> int:
    """The unsigned 32-bit number below which a Philox word drops its element."""
    return min(round(dropout_p * 2.0**32), WORD)


def philox(key: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox 4x32-10 (Salmon et al. 2011): four words from four.

    key: int64 seed; counter: int64 tensors that hold unsigned 32-bit words, as do the four returned.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & WORD, (key >> 32) & WORD
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _wide_product(c0, PHILOX_MULTIPLIERS[0])
        high1, low1 = _wide_product(c2, PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + PHILOX_WEYL[0]) & WORD, (k1 + PHILOX_WEYL[1]) & WORD
    return c0, c1, c2, c3


def _wide_product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b: int64 products wrap, so the bits are those of the unsigned product."""
    product = a * b
    return (product >> 32) & WORD, product & WORD


def keep_mask(seed: Tensor, rows: int, hidden: int, dropout_p: float) -> Tensor:
    """The dropout mask of every backend: bool (rows, hidden), True where kept.

    seed: int64, one element. Element (row, column) is decided by word `column % 4` of the Philox counter
    (row low, row high, column // 4, 0) under the key `seed`, kept if it reaches the integer threshold.
    """
    device = seed.device
    row = torch.arange(rows, device=device).unsqueeze(1)
    group = torch.arange((hidden + 3) // 4, device=device).unsqueeze(0)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox(seed.reshape(()), (row & WORD, row >> 32, group, zero))
    words_by_column = torch.stack(words, dim=-1).reshape(rows, 4 * group.shape[1])
    return words_by_column[:, :hidden] >= dropout_threshold(dropout_p)


def _accumulation_dtype(x: Tensor, residual: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, residual.dtype) else torch.float32


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _dropped(
    x: Tensor, bias: Tensor | None, dropout_p: float, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """dropout(x + bias) in the accumulation dtype; without a mask nothing is dropped."""
    d = x.to(dtype)
    if bias is not None:
        d = d + bias.to(dtype)
    if mask is not None:
        d = torch.where(mask.reshape(d.shape), d / (1.0 - dropout_p), 0.0)
    return d


def _mix(
    dropped: Tensor, residual: Tensor, gate: Tensor | float | None, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """u = scale * residual + gate * dropped + shift, in dropped's dtype."""
    dtype = dropped.dtype
    u = residual.to(dtype)
    if scale is not None:
        u = u * scale.to(dtype)
    if gate is not None:
        dropped = dropped * (gate.to(dtype) if isinstance(gate, Tensor) else gate)
    u = u + dropped
    return u if shift is None else u + shift.to(dtype)


def gated_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    gate: Tensor | float | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
    weight2: Tensor | None = None,
    norm_bias2: Tensor | None = None,
    eps2: float = 0.0,
) -> Tensor:
    """y of the module's head comment, differentiable by plain autograd.

    x, residual: (..., H); vectors: (H,); gate: 0-d or float; mask: bool of x's shape, True where kept, None
    to drop nothing. Returns (..., H) in the promoted dtype of x and residual.
    """
    dtype = _accumulation_dtype(x, residual)
    dropped = _dropped(x, bias, dropout_p, mask, dtype)
    u = _mix(dropped, residual, gate, scale, shift)
    y = layer_norm(u, u.shape[-1:], weight.to(dtype), norm_bias.to(dtype), eps)
    if weight2 is not None:
        y = layer_norm(y, y.shape[-1:], weight2.to(dtype), _cast(norm_bias2, dtype), eps2)
    return y.to(torch.promote_types(x.dtype, residual.dtype))


def _normalise(u: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(xhat, rstd) over the last dimension."""
    centred = u - u.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def _norm_backward(dy: Tensor, weight: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
    t = dy * weight
    return rstd * (t - t.mean(-1, keepdim=True) - xhat * (t * xhat).mean(-1, keepdim=True))


def gated_add_norm_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    gate: Tensor | float | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
    weight2: Tensor | None = None,
    norm_bias2: Tensor | None = None,
    eps2: float = 0.0,
) -> Gradients:
    """The backward equations of the module's head comment, written out; recomputes what forward did not keep.

    grad: (..., H), the gradient of y. dx and dresidual come in the dtypes of x and residual, the parameters'
    gradients in the accumulation dtype (float32, float64 for float64).
    """
    dtype = _accumulation_dtype(x, residual)
    hidden = x.shape[-1]
    x, residual, grad = (t.reshape(-1, hidden) for t in (x, residual, grad))
    dropped = _dropped(x, bias, dropout_p, mask, dtype)
    xhat, rstd = _normalise(_mix(dropped, residual, gate, scale, shift), eps)
    weight, norm_bias, dy = weight.to(dtype), norm_bias.to(dtype), grad.to(dtype)
    dweight2 = dnorm_bias2 = None
    if weight2 is not None:
        xhat2, rstd2 = _normalise(xhat * weight + norm_bias, eps2)
        dweight2, dnorm_bias2 = (dy * xhat2).sum(0), dy.sum(0)
        dy = _norm_backward(dy, weight2.to(dtype), xhat2, rstd2)
    du = _norm_backward(dy, weight, xhat, rstd)
    dx = du if gate is None else du * gate
    if mask is not None:
        dx = torch.where(mask.reshape(dx.shape), dx / (1.0 - dropout_p), 0.0)
    return Gradients(
        x=dx.to(x.dtype),
        residual=(du if scale is None else du * scale.to(dtype)).to(residual.dtype),
        bias=None if bias is None else dx.sum(0),
        gate=None if gate is None else (du * dropped).sum(),
        scale=None if scale is None else (du * residual.to(dtype)).sum(0),
        shift=None if shift is None else du.sum(0),
        weight=(dy * xhat).sum(0),
        norm_bias=dy.sum(0),
        weight2=dweight2,
        norm_bias2=dnorm_bias2,
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in the accumulation dtype."""
    dtype = _accumulation_dtype(x, weight)
    v = x.to(dtype) @ weight.to(dtype).t()
    return v if bias is None else v + bias.to(dtype)


def _normal_distribution(v: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(v * math.sqrt(0.5)))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y of the module's head comment, differentiable by plain autograd.

    x: (..., K); weight: (N, K); bias: (N,). Returns (..., N) in x's dtype.
    """
    v = _linear(x, weight, bias)
    return (v * _normal_distribution(v)).to(x.dtype)


def linear_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dW, db) by the equations of the module's head comment, written out.

    grad: (..., N), the gradient of y. dx comes in x's dtype, dW and db in the accumulation dtype.
    """
    dtype = _accumulation_dtype(x, weight)
    v = _linear(x, weight, bias)
    density = torch.exp(-0.5 * v.square()) / math.sqrt(2.0 * math.pi)
    dv = grad.to(dtype) * (_normal_distribution(v) + v * density)
    rows = dv.reshape(-1, weight.shape[0])
    dweight = rows.t() @ x.reshape(-1, weight.shape[1]).to(dtype)
    return (dv @ weight.to(dtype)).to(x.dtype), dweight, None if bias is None else rows.sum(0)


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
    dtype = _accumulation_dtype(word_table, word_table)
    u = _gather(words, positions, types, word_table, position_table, type_table, dtype)
    y = layer_norm(u, u.shape[-1:], weight.to(dtype), norm_bias.to(dtype), eps)
    y = _dropped(y, None, dropout_p, mask, dtype)
    if weight2 is not None:
        y = layer_norm(y, y.shape[-1:], weight2.to(dtype), _cast(norm_bias2, dtype), eps2)
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
    dtype = _accumulation_dtype(word_table, word_table)
    xhat, rstd = _normalise(
        _gather(words, positions, types, word_table, position_table, type_table, dtype), eps
    )
    weight, norm_bias, dy = weight.to(dtype), norm_bias.to(dtype), grad.to(dtype)
    dweight2 = dnorm_bias2 = None
    if weight2 is not None:
        v = _dropped(xhat * weight + norm_bias, None, dropout_p, mask, dtype)
        xhat2, rstd2 = _normalise(v, eps2)
        dweight2, dnorm_bias2 = (dy * xhat2).sum(0), dy.sum(0)
        dy = _norm_backward(dy, weight2.to(dtype), xhat2, rstd2)
    dy = _dropped(dy, None, dropout_p, mask, dtype)
    du = _norm_backward(dy, weight, xhat, rstd)
    return EmbedGradients(
        word_table=scatter(du, words, word_table, padding_idx),
        position_table=scatter(du, positions, position_table, position_padding_idx),
        type_table=scatter(du, types, type_table, -1),
        weight=(dy * xhat).sum(0),
        norm_bias=dy.sum(0),
        weight2=dweight2,
        norm_bias2=dnorm_bias2,
    )


def scatter(du: Tensor, ids: Tensor | None, table: Tensor, padding_idx: int) -> Tensor:
    """dT: the rows of du summed by their ids, row padding_idx left zero; without ids all go to row 0."""
    if ids is None:
        dtable = torch.zeros_like(table)
        dtable[0] = du.sum(0)
        return dtable
    return torch.ops.aten.embedding_dense_backward(du, ids, table.shape[0], padding_idx, False).to(
        table.dtype
    )


def _absorbed_weights(
    probe: Tensor, grid: Tensor, there: Tensor | None, scale: float, empty: bool, dtype: torch.dtype
) -> Tensor:
    """The softmax of the scores, (sequences, heads, longest), in the accumulation dtype."""
    scores = torch.bmm(probe * scale, grid.transpose(1, 2)).to(dtype)
    if there is not None:
        scores = scores.masked_fill(~there[:, None, :], float("-inf"))
    p = scores.softmax(-1)
    return p.nan_to_num(0.0) if empty else p


def absorbed_attention(
    probe: Tensor,
    grid: Tensor,
    scale: float,
    *,
    there: Tensor | None = None,
    empty: bool = False,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows mixed by the weights that a probe a head gives them, with rows j of one sequence and head h:

        p_j = softmax_j(scale * probe_h . x_j)     mixed_h = sum_j P_hj x_j     total_h = sum_j P_hj

    where P = mask * p / (1 - dropout_p). probe: (sequences, heads, H); grid: (sequences, longest, H), the
    rows x and zeros where none is; there: (sequences, longest) bool, None if all are; empty: some sequence
    has no row, and gets zeros; mask: bool (sequences, heads, longest), True where kept. Returns mixed
    (sequences, heads, H) in the dtype of grid and total (sequences, heads) in that of sums: float32, float64
    for float64. Differentiable by plain autograd.
    """
    dtype = _accumulation_dtype(probe, grid)
    p = _absorbed_weights(probe, grid, there, scale, empty, dtype)
    if mask is not None:
        p = torch.where(mask, p / (1.0 - dropout_p), 0.0)
    return torch.bmm(p.to(grid.dtype), grid), p.sum(-1)


def absorbed_attention_backward(
    grad_mixed: Tensor,
    grad_total: Tensor | None,
    probe: Tensor,
    grid: Tensor,
    scale: float,
    *,
    there: Tensor | None = None,
    empty: bool = False,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dprobe, dgrid) of absorbed_attention, written out; computes the weights again.

    dP_hj = mask_hj / (1 - dropout_p) * (grad_mixed_h . x_j + grad_total_h)
    dS_hj = p_hj * (dP_hj - sum_k p_hk dP_hk)
    dprobe_h = scale * sum_j dS_hj x_j         dx_j = sum_h (P_hj grad_mixed_h + scale * dS_hj probe_h)
    """
    dtype = _accumulation_dtype(probe, grid)
    x, a, u = (t.to(dtype) for t in (grid, probe, grad_mixed))
    p = dropped = _absorbed_weights(a, x, there, scale, empty, dtype)
    dp = torch.bmm(u, x.transpose(1, 2))
    if grad_total is not None:
        dp = dp + grad_total.to(dtype).unsqueeze(-1)
    if mask is not None:
        dropped = torch.where(mask, p / (1.0 - dropout_p), 0.0)
        dp = torch.where(mask, dp / (1.0 - dropout_p), 0.0)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    dprobe = torch.bmm(ds, x)
    dx = torch.bmm(dropped.transpose(1, 2), u) + torch.bmm(ds.transpose(1, 2), a)
    return dprobe.to(probe.dtype), dx.to(grid.dtype)
