"""attention: self-attention over an unpadded batch; and its probabilities, for those who ask for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.ops import autograd, reference, registry
from fastgate.ops.ragged import SequenceOffsets
from fastgate.ops.reference.attention import add_bias, attention_by_sequence, split_heads


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
    """Self-attention in each sequence of an unpadded batch: dropout(softmax(q k^T * scale)) v, a head at a
    time.

    Queries and keys are two sets of rows: a sequence may have fewer queries than keys. Biases are added
    first.

    Args:
        q: (queries.rows, hidden), floating.
        k: (keys.rows, hidden), of q's dtype and device.
        v: (keys.rows, hidden), of q's dtype and device.
        queries: where the sequences begin and end in q.
        keys: where the sequences begin and end in k and v; as many sequences as in q.
        heads: number of heads; divides hidden.
        scale: multiplies the scores, such as head_dim ** -0.5.
        dropout_p: probability of dropping a probability, in [0, 1). The mask is a function of a seed drawn
            from torch's default generator of the device, of query row * heads + head, and of the key's place
            in its sequence.
        q_bias: (hidden,), added to q.
        k_bias: (hidden,). It adds the same to every score of a query, which the softmax takes out again: it
            is not read, and its gradient is exactly zero.
        v_bias: (hidden,), added to v.

    Returns:
        (queries.rows, hidden) in q's dtype. A sequence without keys gives zeros, as a row that is masked out
        entirely does in torch's scaled_dot_product_attention. Differentiable in every tensor.

    Raises:
        ArgumentError: for shapes, dtypes, devices or values that do not fit.

    Example:
        >>> q = torch.randn(5, 8)  # two sequences, of 2 and of 3 tokens
        >>> offsets = fastgate.ops.SequenceOffsets.from_lengths([2, 3])
        >>> fastgate.ops.attention(q, q, q, offsets, offsets, heads=2, scale=0.5).shape
        torch.Size([5, 8])
    """
    _check_rows(q, k, v, queries, keys, heads)
    _check_biases(q, q_bias=q_bias, k_bias=k_bias, v_bias=v_bias)
    seed = registry.draw_seed("attention", dropout_p, q.device)
    chosen = _chosen(q, heads)
    if chosen is registry.REFERENCE["attention"]:
        biases = (q_bias, k_bias, v_bias)
        return reference.attention(q, k, v, queries, keys, heads, scale, dropout_p, seed, biases)
    operands = (
        q, k, v, q_bias, k_bias, v_bias, queries.cu_seqlens, keys.cu_seqlens, heads, scale, dropout_p, seed,
    )  # fmt: skip
    direct = registry.bypasses_dispatcher(q)
    if direct and not autograd.any_requires_grad(*operands[:6]):
        return chosen.forward(*operands)  # type: ignore[no-any-return]
    call: Callable[..., tuple[Tensor, Tensor]] = _trained if direct else torch.ops.fastgate.attention
    return call(*operands)[0]


def _check_biases(q: Tensor, **biases: Tensor | None) -> None:
    for name, bias in biases.items():
        if bias is not None and (bias.shape != q.shape[1:] or bias.device != q.device):
            got = f"shape {tuple(bias.shape)} on {bias.device}"
            _refuse(name, got, f"{tuple(q.shape[1:])} on {q.device}", "pass one number a column of q")


def _check_rows(
    q: Tensor, k: Tensor, v: Tensor, queries: SequenceOffsets, keys: SequenceOffsets, heads: int
) -> None:
    if q.dim() != 2 or k.dim() != 2 or k.shape != v.shape or q.shape[1] != k.shape[1]:
        got = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        _refuse("q, k, v", f"shapes {got}", "(queries, hidden), (keys, hidden) twice", "flatten them to rows")
    if heads < 1 or q.shape[1] % heads:
        _refuse("heads", heads, f"a divisor of hidden, {q.shape[1]}", "pass the number of heads")
    if q.shape[0] != queries.rows or k.shape[0] != keys.rows:
        got = f"{queries.rows} and {keys.rows} rows for {q.shape[0]} and {k.shape[0]}"
        _refuse("queries, keys", got, "the rows of q and of k", "make them from the lengths of the sequences")
    if len(queries.lengths) != len(keys.lengths):
        got = f"{len(queries.lengths)} and {len(keys.lengths)} sequences"
        _refuse("queries, keys", got, "as many in both", "give a sequence without queries the length 0")
    if q.dtype not in registry.DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        got = f"{q.dtype}, {k.dtype}, {v.dtype}"
        _refuse("q, k, v", got, "one floating dtype", "convert them before the call")
    if k.device != q.device or v.device != q.device:
        got = f"{q.device}, {k.device}, {v.device}"
        _refuse("q, k, v", got, "one device", "move them to q's device")


def _refuse(argument: str, got: object, wanted: str, remedy: str) -> NoReturn:
    raise ArgumentError(format_error("attention", argument, got, wanted, remedy))


_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, Tensor cu_q, Tensor cu_k, "
    "int heads, float scale, float dropout_p, Tensor? seed"
)
# lse: the log-sum-exp of every query's scores, (heads, queries), in the form that the backend's own backward
# takes; without elements where it takes none.
_FORWARD_SCHEMA = f"attention({_OPERANDS}) -> (Tensor out, Tensor lse)"
_BACKWARD_SCHEMA = (
    f"attention_backward(Tensor grad, Tensor out, Tensor lse, {_OPERANDS}) -> (Tensor, Tensor, Tensor)"
)


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, *operands: Any) -> Tensor:
    q_bias, k_bias, v_bias, cu_q, cu_k, heads, scale, dropout_p, seed = operands
    queries, keys = SequenceOffsets.from_cu_seqlens(cu_q), SequenceOffsets.from_cu_seqlens(cu_k)
    biases = (q_bias, k_bias, v_bias)
    return reference.attention(q, k, v, queries, keys, heads, scale, dropout_p, seed, biases)


def _reference_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """By torch's autograd: its own attention has a faster backward than the equations written out."""
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        out = _reference_forward(q, k, v, *operands)
    return torch.autograd.grad(out, (q, k, v), grad, materialize_grads=True)


registry.REFERENCE["attention"] = registry.Implementation(
    "reference", _reference_forward, _reference_backward, frozenset(registry.DTYPES)
)


def _chosen(q: Tensor, heads: int) -> registry.Implementation:
    return registry.implementation("attention", q.device.type, q.dtype, head_dim=q.shape[1] // heads)


def _forward(*operands: Any) -> tuple[Tensor, Tensor]:
    q, heads = operands[0], operands[8]
    chosen = _chosen(q, heads)
    if chosen.saving is not None:
        return chosen.saving.forward(*operands)  # type: ignore[no-any-return]
    return chosen.forward(*operands), q.new_empty(0, dtype=torch.float32)


def _backward(grad: Tensor, out: Tensor, lse: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    chosen = _chosen(operands[0], operands[8])
    # Without lse another implementation ran forward: set_backend was called in between.
    if chosen.saving is not None and lse.numel():
        return chosen.saving.backward(grad, out, lse, *operands)  # type: ignore[no-any-return]
    return chosen.backward(grad, *operands)  # type: ignore[no-any-return]


def _fake(*operands: Any) -> tuple[Tensor, Tensor]:
    q, heads = operands[0], operands[8]
    lse = (0,) if _chosen(q, heads).saving is None else (heads, q.shape[0])
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)


def _fake_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *operands: Any
) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


registry.define_op(_FORWARD_SCHEMA, _forward, _fake)
registry.define_op(_BACKWARD_SCHEMA, _backward, _fake_backward)


def _keep_for_backward(ctx: autograd.Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """The output costs no memory: the product after it keeps it too."""
    *tensors, heads, scale, dropout_p, seed = inputs
    ctx.numbers = [heads, scale, dropout_p]
    ctx.save_for_backward(*output, *tensors, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: autograd.Context, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:  # what reads the rows has no gradient, such as a quantised Linear
        return (None,) * len(ctx.needs_input_grad)
    out, lse, *tensors, seed = ctx.saved_tensors
    call = _backward if registry.bypasses_dispatcher(grad) else torch.ops.fastgate.attention_backward
    dq, dk, dv = call(grad, out, lse, *tensors, *ctx.numbers, seed)
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


def _operands(ctx: autograd.Context) -> tuple[Any, ...]:
    _, _, *tensors, seed = ctx.saved_tensors
    return *tensors, *ctx.numbers, seed


def _plain(q: Tensor, k: Tensor, v: Tensor, *operands: Any) -> Tensor:
    """The op by way of its probabilities: torch's own attention has no second derivative everywhere."""
    q_bias, k_bias, v_bias, cu_q, cu_k, heads, scale, dropout_p, seed = operands
    q, k, v = add_bias(q, q_bias), add_bias(k, k_bias), add_bias(v, v_bias)
    queries, keys = SequenceOffsets.from_cu_seqlens(cu_q), SequenceOffsets.from_cu_seqlens(cu_k)
    return attention_by_sequence(q, k, v, queries, keys, heads, scale, dropout_p, seed)


_trained = autograd.register_autograd_formula(
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
    place = keys.sequence_of_row * length + key_places
    padded = k.new_zeros(sequences * length, k.shape[-1]).index_copy(0, place, k)
    is_key = torch.zeros(sequences * length, dtype=torch.bool, device=q.device).index_fill(0, place, True)
    is_key = is_key.view(sequences, 1, 1, length)
    scores = torch.matmul(
        split_heads(queries.grid(q).flatten(0, 1), sequences, heads),
        split_heads(padded, sequences, heads).transpose(2, 3),
    )
    p = (scores * scale).masked_fill(~is_key, float("-inf")).softmax(-1)
    return p.nan_to_num(0.0) if 0 in keys.lengths else p
