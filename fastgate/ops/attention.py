"""Self-attention over packed rows: the usual form, and probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgate import reference
from fastgate.ops import slots
from fastgate.packing import Ragged

# From here on torch's own attention is the faster one on the CPU, where it need not pad.
LONG = 64


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Ragged,
    keys: Ragged,
    heads: int,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """dropout(softmax(q k^T * scale)) v in each sequence.

    q: (queries.rows, hidden); k, v: (keys.rows, hidden). Returns (queries.rows, hidden). A sequence without
    keys gives zeros, as torch's scaled_dot_product_attention does for a row that is masked out entirely. The
    dropout mask is a function of a seed from torch's default generator, of query row * heads + head, and of
    the key's column.
    """
    seed = slots.draw_seed("attention", dropout_p, q.device)
    chosen = _chosen(q, heads)
    even = queries.equal and keys.equal and keys.longest >= LONG and not dropout_p
    if chosen.backend == "reference" or even:
        return torch_attention(q, k, v, queries, keys, heads, scale, dropout_p, seed)
    operands = (q, k, v, queries.cu_seqlens, keys.cu_seqlens, heads, scale, dropout_p, seed)
    direct = slots.is_direct(q)
    if direct and not slots.needs_gradient(q, k, v):
        return chosen.forward(*operands)
    call: Callable[..., tuple[Tensor, Tensor]] = _Attention.apply if direct else torch.ops.fastgate.attention
    return call(*operands)[0]


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Ragged,
    keys: Ragged,
    heads: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`attention` in plain torch, for every device and dtype: the measure of compiled kernels."""
    if dropout_p or keys.longest == 0:
        return _openly(q, k, v, queries, keys, heads, scale, dropout_p, seed)
    if queries.equal and keys.equal:
        one, two, three = (_heads(t, len(queries.lengths), heads) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(one, two, three, scale=scale)
        return mixed.transpose(1, 2).reshape(q.shape)
    return _padded(q, k, v, queries, keys, heads, scale)


def _heads(rows: Tensor, sequences: int, heads: int) -> Tensor:
    """(sequences * n, hidden) -> (sequences, heads, n, head_dim)."""
    n = rows.shape[0] // max(sequences, 1)
    return rows.view(sequences, n, heads, rows.shape[-1] // heads).transpose(1, 2)


def _grid(rows: Tensor, ragged: Ragged) -> Tensor:
    """(rows, hidden) -> (sequences, longest, hidden), zeros where no row is."""
    shape = (len(ragged.lengths), ragged.longest, rows.shape[-1])
    if ragged.equal:
        return rows.view(shape)
    flat, _ = ragged.padded
    return rows.new_zeros(shape[0] * shape[1], shape[2]).index_copy(0, flat, rows).view(shape)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged, heads: int, scale: float
) -> Tensor:
    """Pads to the longest sequence and masks the keys."""
    sequences = len(queries.lengths)
    one, two, three = (
        _heads(_grid(t, r).flatten(0, 1), sequences, heads) for t, r in ((q, queries), (k, keys), (v, keys))
    )
    mask = keys.padded[1][:, None, None, :]
    mixed = F.scaled_dot_product_attention(one, two, three, attn_mask=mask, scale=scale)
    return mixed.transpose(1, 2).reshape(-1, q.shape[-1]).index_select(0, queries.padded[0])


def _openly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Ragged,
    keys: Ragged,
    heads: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """One sequence at a time, its probabilities in the open for the mask that all backends share."""
    mixed, at, of = [q[:0]], 0, 0
    mask = reference.keep_mask(seed, queries.rows * heads, keys.longest, dropout_p) if dropout_p else None  # type: ignore[arg-type]
    for n, m in zip(queries.lengths, keys.lengths, strict=True):
        one, two, three = (_heads(t, 1, heads)[0] for t in (q[at : at + n], k[of : of + m], v[of : of + m]))
        p = (torch.matmul(one, two.transpose(1, 2)) * scale).softmax(-1)
        if mask is not None:
            kept = mask[at * heads : (at + n) * heads, :m].view(n, heads, m).transpose(0, 1)
            p = torch.where(kept, p / (1.0 - dropout_p), 0.0)
        mixed.append(torch.matmul(p, three).transpose(0, 1).reshape(n, q.shape[-1]))
        at, of = at + n, of + m
    return torch.cat(mixed)


_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, int heads, float scale, float dropout_p, "
    "Tensor? seed"
)
# lse: the log-sum-exp of every query's scores, (heads, queries), in the form that the backend's own backward
# takes; without elements where it takes none.
slots.schemas.define(f"attention({_OPERANDS}) -> (Tensor out, Tensor lse)")
slots.schemas.define(
    f"attention_backward(Tensor grad, Tensor out, Tensor lse, {_OPERANDS}) -> (Tensor, Tensor, Tensor)"
)


def _lengths(cu_seqlens: Tensor) -> Ragged:
    return Ragged(tuple(cu_seqlens.diff().tolist()), cu_seqlens.device)


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any) -> Tensor:
    return torch_attention(q, k, v, _lengths(cu_q), _lengths(cu_k), *rest)


def _reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any
) -> Any:
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        out = torch_attention(q, k, v, _lengths(cu_q), _lengths(cu_k), *rest)
    return torch.autograd.grad(out, (q, k, v), grad, materialize_grads=True)


slots.REFERENCE["attention"] = slots.Implementation(
    "reference", _reference_forward, _reference_backward, frozenset(slots.DTYPES)
)


def _chosen(q: Tensor, heads: int) -> slots.Implementation:
    found = slots.implementation("attention", q.device.type, q.dtype)
    fits = found.head_dims is None or q.shape[1] // heads in found.head_dims
    return found if fits else slots.REFERENCE["attention"]


def _forward(*operands: Any) -> tuple[Tensor, Tensor]:
    q, heads = operands[0], operands[5]
    chosen = _chosen(q, heads)
    if chosen.saving is not None:
        return chosen.saving[0](*operands)
    return chosen.forward(*operands), q.new_empty(0, dtype=torch.float32)


def _backward(grad: Tensor, out: Tensor, lse: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    chosen = _chosen(operands[0], operands[5])
    if chosen.saving is not None:
        return chosen.saving[1](grad, out, lse, *operands)
    return chosen.backward(grad, *operands)


slots.schemas.impl("attention", _forward, "CompositeExplicitAutograd")
slots.schemas.impl("attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastgate::attention")
def _fake(*operands: Any) -> tuple[Tensor, Tensor]:
    q, heads = operands[0], operands[5]
    lse = (0,) if _chosen(q, heads).saving is None else (heads, q.shape[0])
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)


@torch.library.register_fake("fastgate::attention_backward")
def _fake_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *operands: Any
) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """The output costs no memory: the product after it keeps it too."""
    q, k, v, cu_q, cu_k, *ctx.numbers, seed = inputs
    ctx.save_for_backward(*output, q, k, v, cu_q, cu_k, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    dq, dk, dv = torch.ops.fastgate.attention_backward(grad, *tensors, *ctx.numbers, seed)
    return dq, dk, dv, None, None, None, None, None, None


class _Attention(torch.autograd.Function):
    """The same for eager training, without the registration's cost."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*operands)
        _keep_for_backward(ctx, operands, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grad, None)


torch.library.register_autograd(
    "fastgate::attention", _differentiate, setup_context=_keep_for_backward, lib=slots.schemas
)


def attention_probabilities(
    q: Tensor,
    k: Tensor,
    queries: Ragged,
    keys: Ragged,
    key_places: Tensor,
    length: int,
    heads: int,
    scale: float,
) -> Tensor:
    """softmax(q k^T * scale) as (sequences, heads, longest query, length), keys at their padded places.

    q: (queries.rows, hidden); k: (keys.rows, hidden); key_places: (keys.rows,) int64, the column of each key.
    """
    sequences = len(queries.lengths)
    row = torch.repeat_interleave(
        torch.arange(sequences, device=q.device), torch.tensor(keys.lengths, device=q.device)
    )
    at = row * length + key_places
    spread = k.new_zeros(sequences * length, k.shape[-1]).index_copy(0, at, k)
    there = torch.zeros(sequences * length, dtype=torch.bool, device=q.device).index_fill(0, at, True)
    there = there.view(sequences, 1, 1, length)
    scores = torch.matmul(
        _heads(_grid(q, queries).flatten(0, 1), sequences, heads),
        _heads(spread, sequences, heads).transpose(2, 3),
    )
    p = (scores * scale).masked_fill(~there, float("-inf")).softmax(-1)
    return p.nan_to_num(0.0) if 0 in keys.lengths else p
