"""Self-attention over packed rows: the usual form, and probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.ops import reference, registry
from fastgate.ops.ragged import SequenceOffsets


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: SequenceOffsets,
    keys: SequenceOffsets,
    heads: int,
    scale: float,
    dropout_p: float = 0.0,
    *,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
) -> Tensor:
    """dropout(softmax((q + q_bias) (k + k_bias)^T * scale)) (v + v_bias) in each sequence.

    q: (queries.rows, hidden); k, v: (keys.rows, hidden); biases: (hidden,). Returns (queries.rows, hidden). A
    sequence without keys gives zeros, as torch's scaled_dot_product_attention does for a row that is masked
    out entirely. k_bias adds the same to every score of a query, which the softmax takes out again: it is not
    read, and its gradient is exactly zero. The dropout mask is a function of a seed from torch's default
    generator, of query row * heads + head, and of the key's column.

    Raises ArgumentError for biases and dropout_p that do not fit.
    """
    for name, bias in (("q_bias", q_bias), ("k_bias", k_bias), ("v_bias", v_bias)):
        if bias is not None and (bias.shape != q.shape[1:] or bias.device != q.device):
            got, wanted = (
                f"shape {tuple(bias.shape)} on {bias.device}",
                f"{tuple(q.shape[1:])} on {q.device}",
            )
            raise ArgumentError(format_error("attention", name, got, wanted, "pass one number a column of q"))
    seed = registry.draw_seed("attention", dropout_p, q.device)
    chosen = _chosen(q, heads)
    if chosen.backend == "reference":
        biases = (q_bias, k_bias, v_bias)
        return torch_attention(q, k, v, queries, keys, heads, scale, dropout_p, seed, biases)
    operands = (
        q, k, v, q_bias, k_bias, v_bias, queries.cu_seqlens, keys.cu_seqlens, heads, scale, dropout_p, seed,
    )  # fmt: skip
    direct = registry.bypasses_dispatcher(q)
    if direct and not registry.any_requires_grad(*operands[:6]):
        return chosen.forward(*operands)
    call: Callable[..., tuple[Tensor, Tensor]] = _trained if direct else torch.ops.fastgate.attention
    return call(*operands)[0]


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: SequenceOffsets,
    keys: SequenceOffsets,
    heads: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Tensor:
    """`attention` in plain torch, for every device and dtype: the measure of compiled kernels."""
    q_bias, k_bias, v_bias = biases
    if k_bias is not None and registry.any_requires_grad(k_bias):
        # A gradient of zeros and not a missing one, as DDP and Adam expect.
        q_bias = 0.0 * k_bias if q_bias is None else q_bias + 0.0 * k_bias
    q, v = _with_bias(q, q_bias), _with_bias(v, v_bias)
    if dropout_p or keys.longest == 0 or (q.dtype == torch.float64 and registry.any_requires_grad(q, k, v)):
        # float64 is for derivatives of every order, which torch's own attention does not have.
        return _openly(q, k, v, queries, keys, heads, scale, dropout_p, seed)
    if queries.equal and keys.equal:
        one, two, three = (_heads(t, len(queries.lengths), heads) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(one, two, three, scale=scale)
        return mixed.transpose(1, 2).reshape(q.shape)
    return _padded(q, k, v, queries, keys, heads, scale)


def _with_bias(rows: Tensor, bias: Tensor | None) -> Tensor:
    """rows + bias rounded to rows' dtype, as a Linear's output is."""
    return rows if bias is None else (rows + bias).to(rows.dtype)


def _heads(rows: Tensor, sequences: int, heads: int) -> Tensor:
    """(sequences * n, hidden) -> (sequences, heads, n, head_dim)."""
    n = rows.shape[0] // max(sequences, 1)
    return rows.view(sequences, n, heads, rows.shape[-1] // heads).transpose(1, 2)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, queries: SequenceOffsets, keys: SequenceOffsets, heads: int, scale: float
) -> Tensor:
    """Pads to the longest sequence and masks the keys."""
    sequences = len(queries.lengths)
    one, two, three = (
        _heads(r.grid(t).flatten(0, 1), sequences, heads) for t, r in ((q, queries), (k, keys), (v, keys))
    )
    mask = keys.padded[1][:, None, None, :]
    mixed = F.scaled_dot_product_attention(one, two, three, attn_mask=mask, scale=scale)
    return mixed.transpose(1, 2).reshape(-1, q.shape[-1]).index_select(0, queries.padded[0])


def _openly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: SequenceOffsets,
    keys: SequenceOffsets,
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
    "Tensor q, Tensor k, Tensor v, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, Tensor cu_q, Tensor cu_k, "
    "int heads, float scale, float dropout_p, Tensor? seed"
)
# lse: the log-sum-exp of every query's scores, (heads, queries), in the form that the backend's own backward
# takes; without elements where it takes none.
registry.LIBRARY.define(f"attention({_OPERANDS}) -> (Tensor out, Tensor lse)")
registry.LIBRARY.define(
    f"attention_backward(Tensor grad, Tensor out, Tensor lse, {_OPERANDS}) -> (Tensor, Tensor, Tensor)"
)


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, *operands: Any) -> Tensor:
    *biases, cu_q, cu_k, heads, scale, dropout_p, seed = operands
    return torch_attention(
        q,
        k,
        v,
        SequenceOffsets.of(cu_q),
        SequenceOffsets.of(cu_k),
        heads,
        scale,
        dropout_p,
        seed,
        tuple(biases),
    )


def _reference_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *operands: Any) -> Any:
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        out = _reference_forward(q, k, v, *operands)
    return torch.autograd.grad(out, (q, k, v), grad, materialize_grads=True)


registry.REFERENCE["attention"] = registry.Implementation(
    "reference", _reference_forward, _reference_backward, frozenset(registry.DTYPES)
)


def _chosen(q: Tensor, heads: int) -> registry.Implementation:
    found = registry.implementation("attention", q.device.type, q.dtype)
    fits = found.head_dims is None or q.shape[1] // heads in found.head_dims
    return found if fits else registry.REFERENCE["attention"]


def _forward(*operands: Any) -> tuple[Tensor, Tensor]:
    q, heads = operands[0], operands[8]
    chosen = _chosen(q, heads)
    if chosen.saving is not None:
        return chosen.saving[0](*operands)
    return chosen.forward(*operands), q.new_empty(0, dtype=torch.float32)


def _backward(grad: Tensor, out: Tensor, lse: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    chosen = _chosen(operands[0], operands[8])
    if chosen.saving is not None:
        return chosen.saving[1](grad, out, lse, *operands)
    return chosen.backward(grad, *operands)


registry.LIBRARY.impl("attention", _forward, "CompositeExplicitAutograd")
registry.LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastgate::attention")
def _fake(*operands: Any) -> tuple[Tensor, Tensor]:
    q, heads = operands[0], operands[8]
    lse = (0,) if _chosen(q, heads).saving is None else (heads, q.shape[0])
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)


@torch.library.register_fake("fastgate::attention_backward")
def _fake_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *operands: Any
) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """The output costs no memory: the product after it keeps it too."""
    *tensors, ctx.heads, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(*output, *tensors, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:  # what reads the rows has no gradient, such as a quantised Linear
        return (None,) * len(ctx.needs_input_grad)
    out, lse, *tensors, seed = ctx.saved_tensors
    call = _backward if registry.bypasses_dispatcher(grad) else torch.ops.fastgate.attention_backward
    dq, dk, dv = call(grad, out, lse, *tensors, ctx.heads, ctx.scale, ctx.dropout_p, seed)
    q_bias, k_bias, v_bias = (
        bias if needed else None for bias, needed in zip(tensors[3:6], ctx.needs_input_grad[3:6], strict=True)
    )
    return (
        dq, dk, dv, _over_rows(dq, q_bias), None if k_bias is None else torch.zeros_like(k_bias),
        _over_rows(dv, v_bias), None, None, None, None, None, None,
    )  # fmt: skip


def _over_rows(gradient: Tensor, bias: Tensor | None) -> Tensor | None:
    """A bias's gradient, summed in float32 at least; torch's sum gives the same bits at every call."""
    if bias is None:
        return None
    return gradient.sum(0, dtype=torch.promote_types(gradient.dtype, bias.dtype)).to(bias.dtype)


def _operands(ctx: Any) -> tuple[Any, ...]:
    _, _, *tensors, seed = ctx.saved_tensors
    return *tensors, ctx.heads, ctx.scale, ctx.dropout_p, seed


def _plain(q: Tensor, k: Tensor, v: Tensor, *operands: Any) -> Tensor:
    """The op by way of its probabilities: torch's own attention has no second derivative everywhere."""
    q_bias, k_bias, v_bias, cu_q, cu_k, heads, scale, dropout_p, seed = operands
    q, k, v = _with_bias(q, q_bias), _with_bias(k, k_bias), _with_bias(v, v_bias)
    return _openly(q, k, v, SequenceOffsets.of(cu_q), SequenceOffsets.of(cu_k), heads, scale, dropout_p, seed)


_trained = registry.register_autograd_formula(
    "attention", _forward, _differentiate, _plain, _keep_for_backward, _operands
)


def attention_probabilities(
    q: Tensor,
    k: Tensor,
    queries: SequenceOffsets,
    keys: SequenceOffsets,
    key_places: Tensor,
    length: int,
    heads: int,
    scale: float,
) -> Tensor:
    """softmax(q k^T * scale) as (sequences, heads, longest query, length), keys at their padded places.

    q: (queries.rows, hidden); k: (keys.rows, hidden); key_places: (keys.rows,) int64, the column of each key.
    """
    sequences = len(queries.lengths)
    at = keys.sequence_of_row * length + key_places
    spread = k.new_zeros(sequences * length, k.shape[-1]).index_copy(0, at, k)
    there = torch.zeros(sequences * length, dtype=torch.bool, device=q.device).index_fill(0, at, True)
    there = there.view(sequences, 1, 1, length)
    scores = torch.matmul(
        _heads(queries.grid(q).flatten(0, 1), sequences, heads),
        _heads(spread, sequences, heads).transpose(2, 3),
    )
    p = (scores * scale).masked_fill(~there, float("-inf")).softmax(-1)
    return p.nan_to_num(0.0) if 0 in keys.lengths else p
