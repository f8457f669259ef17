"""absorbed_attention: attention with one query a sequence, which forms neither keys nor values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.ops import autograd, reference, registry
from fastgate.ops.ragged import SequenceOffsets


def absorbed_attention(
    q: Tensor,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    value_bias: Tensor | None,
    keys: SequenceOffsets,
    heads: int,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention with one query a sequence, which forms neither keys nor values.

    Computes dropout(softmax(q k^T * scale)) v, where k and v are what a Linear makes of x. The weights are
    absorbed into the query and the output, as in multi-head latent attention, a head at a time:

        probe = W_k^T q      p = softmax_j(scale * probe . x_j)      out = W_v (sum_j p_j x_j) + b_v sum_j p_j

    That is 2 * heads * H multiply-adds a row of x, not 2 * hidden * H. The key's bias cancels in the softmax.

    Args:
        q: (sequences, hidden), floating: one query a sequence.
        x: (keys.rows, H), floating: the rows that keys and values would be made of. It is cast to q's dtype,
            as the weights are.
        key: (hidden, H), the weight of the key's Linear.
        value: (hidden, H), the weight of the value's Linear.
        value_bias: (hidden,) or None.
        keys: where the sequences begin and end in x.
        heads: number of heads; divides hidden.
        scale: multiplies the scores, such as head_dim ** -0.5.
        dropout_p: probability of dropping a probability, in [0, 1). The mask is a function of a seed drawn
            from torch's default generator of the device, of sequence * heads + head, and of the row's place
            in its sequence.

    Returns:
        (sequences, hidden) in q's dtype. A sequence without rows gives zeros. Differentiable in every tensor.

    Raises:
        ArgumentError: for shapes, dtypes or values that do not fit.

    Example:
        >>> q, x, weight = torch.randn(2, 8), torch.randn(5, 8), torch.randn(8, 8)
        >>> keys = fastgate.ops.SequenceOffsets.from_lengths([2, 3])
        >>> fastgate.ops.absorbed_attention(q, x, weight, weight, None, keys, heads=2, scale=0.5).shape
        torch.Size([2, 8])
    """
    sequences, hidden = _check(q, x, key, value, value_bias, keys, heads)
    width = hidden // heads
    seed = registry.draw_seed("absorbed_attention", dropout_p, q.device)
    per_head = q.reshape(sequences, heads, width).transpose(0, 1)
    probe = torch.bmm(per_head, key.to(q.dtype).view(heads, width, -1)).transpose(0, 1)
    mixed, total = _mix(probe, x.to(probe.dtype), keys, scale, dropout_p, seed)  # autocast's, of a product
    per_head, to_values = mixed.transpose(0, 1), value.to(q.dtype).view(heads, width, -1).transpose(1, 2)
    if value_bias is None:
        out = torch.bmm(per_head, to_values)
    else:
        # Weights add up to 1: known of real lengths only, since traced ones may stand for others.
        adds_up = registry.bypasses_dispatcher(q) and not dropout_p and 0 not in keys.lengths
        bias = value_bias.to(q.dtype).view(heads, 1, width)
        out = _values(per_head, to_values, bias, None if adds_up else total)
    return out.transpose(0, 1).reshape(sequences, hidden)


def _values(per_head: Tensor, to_values: Tensor, bias: Tensor, total: Tensor | None) -> Tensor:
    """per_head to_values + total * bias, (heads, sequences, width). total: (sequences, heads). None: 1."""
    if total is None:
        return torch.baddbmm(bias, per_head, to_values)
    return (torch.bmm(per_head, to_values) + total.t().unsqueeze(-1) * bias).to(bias.dtype)


def _check(
    q: Tensor,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    value_bias: Tensor | None,
    keys: SequenceOffsets,
    heads: int,
) -> torch.Size:
    if q.dim() != 2 or q.shape[0] != len(keys.lengths) or heads < 1 or q.shape[1] % heads:
        wanted = f"({len(keys.lengths)}, hidden), one query a sequence, {heads} heads in hidden"
        _refuse("q", f"shape {tuple(q.shape)}", wanted, "select one row of each sequence")
    if q.dtype not in registry.DTYPES or not x.is_floating_point():
        _refuse("q, x", f"{q.dtype}, {x.dtype}", "floating dtypes", "convert them before the call")
    if x.dim() != 2 or x.shape[0] != keys.rows:
        _refuse("x", f"shape {tuple(x.shape)}", f"({keys.rows}, H), the rows of keys", "unpad the batch")
    wanted_shape = (q.shape[1], x.shape[1])
    if key.shape != wanted_shape or value.shape != wanted_shape:
        got = f"shapes {tuple(key.shape)}, {tuple(value.shape)}"
        _refuse("key, value", got, f"{wanted_shape} twice", "pass the Linears' weights")
    if value_bias is not None and value_bias.shape != wanted_shape[:1]:
        _refuse("value_bias", f"shape {tuple(value_bias.shape)}", f"({q.shape[1]},)", "match value's rows")
    return q.shape


def _refuse(argument: str, got: object, wanted: str, remedy: str) -> NoReturn:
    raise ArgumentError(format_error("absorbed_attention", argument, got, wanted, remedy))


def _mix(
    probe: Tensor, x: Tensor, keys: SequenceOffsets, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(mixed, total), by the implementation that fits."""
    direct = registry.bypasses_dispatcher(probe)
    chosen = _chosen(probe) if direct else None
    if chosen is registry.REFERENCE["absorbed_attention"]:
        return reference.absorbed_attention(probe, x, keys, scale, dropout_p, seed)
    operands = (probe, x, keys.cu_seqlens, scale, dropout_p, seed)
    if chosen is not None and not autograd.any_requires_grad(probe, x):
        return chosen.forward(*operands)  # type: ignore[no-any-return]
    call: Callable[..., tuple[Tensor, ...]] = torch.ops.fastgate.absorbed_attention
    if direct:
        call = _trained
    mixed, total, *_ = call(*operands)
    return mixed, total


_OPERANDS = "Tensor probe, Tensor x, Tensor cu_seqlens, float scale, float dropout_p, Tensor? seed"
# total is float32, float64 for float64. lse: the log-sum-exp of every probe's scores, (sequences, heads), and
# residue, as mixed, what mixed's rounding took away, both in the form that the backend's own backward takes;
# without elements where it takes none.
_FORWARD_SCHEMA = (
    f"absorbed_attention({_OPERANDS}) -> (Tensor mixed, Tensor total, Tensor lse, Tensor residue)"
)
_BACKWARD_SCHEMA = (
    "absorbed_attention_backward(Tensor grad_mixed, Tensor? grad_total, Tensor mixed, Tensor total, "
    f"Tensor lse, Tensor residue, {_OPERANDS}) -> (Tensor dprobe, Tensor dx)"
)


def _reference_forward(
    probe: Tensor, x: Tensor, cu_seqlens: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    keys = SequenceOffsets.from_cu_seqlens(cu_seqlens)
    return reference.absorbed_attention(probe, x, keys, scale, dropout_p, seed)


def _reference_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    probe: Tensor,
    x: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    keys = SequenceOffsets.from_cu_seqlens(cu_seqlens)
    return reference.absorbed_attention_backward(grad, grad_total, probe, x, keys, scale, dropout_p, seed)


registry.REFERENCE["absorbed_attention"] = registry.Implementation(
    "reference", _reference_forward, _reference_backward, frozenset(registry.DTYPES)
)


def _chosen(probe: Tensor) -> registry.Implementation:
    return registry.implementation("absorbed_attention", probe.device.type, probe.dtype, probe=probe)


def _forward(probe: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    chosen = _chosen(probe)
    if chosen.saving is not None:
        return chosen.saving.forward(probe, *operands)  # type: ignore[no-any-return]
    return *chosen.forward(probe, *operands), probe.new_empty(0, dtype=torch.float32), probe.new_empty(0)


def _backward(
    grad: Tensor,
    grad_total: Tensor | None,
    mixed: Tensor,
    total: Tensor,
    lse: Tensor,
    residue: Tensor,
    probe: Tensor,
    *operands: Any,
) -> tuple[Tensor, ...]:
    chosen = _chosen(probe)
    # Without lse another implementation ran forward: set_backend was called in between.
    if chosen.saving is not None and lse.numel():
        saved = (mixed, total, lse, residue)
        return chosen.saving.backward(grad, grad_total, *saved, probe, *operands)  # type: ignore[no-any-return]
    return chosen.backward(grad, grad_total, probe, *operands)  # type: ignore[no-any-return]


def _fake(probe: Tensor, x: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    saving, pairs = _chosen(probe).saving is not None, probe.shape[:2]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(probe.shape),
        x.new_empty(pairs, dtype=dtype),
        x.new_empty(pairs if saving else (0,), dtype=torch.float32),
        x.new_empty(probe.shape if saving and x.dtype != torch.float32 else (0,)),
    )


def _fake_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    mixed: Tensor,
    total: Tensor,
    lse: Tensor,
    residue: Tensor,
    probe: Tensor,
    x: Tensor,
    *operands: Any,
) -> tuple[Tensor, Tensor]:
    return probe.new_empty(probe.shape), x.new_empty(x.shape)


registry.define_op(_FORWARD_SCHEMA, _forward, _fake)
registry.define_op(_BACKWARD_SCHEMA, _backward, _fake_backward)


def _keep_for_backward(ctx: autograd.Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """mixed costs no memory: the product after it keeps it too."""
    probe, x, cu_seqlens, *numbers, seed = inputs
    ctx.numbers = numbers
    ctx.save_for_backward(*output, probe, x, cu_seqlens, seed)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: autograd.Context, grad: Tensor | None, grad_total: Tensor | None, *_: None
) -> tuple[Any, ...]:
    *tensors, seed = ctx.saved_tensors
    direct = registry.bypasses_dispatcher(tensors[0])
    call = _backward if direct else torch.ops.fastgate.absorbed_attention_backward
    grad = torch.zeros_like(tensors[0]) if grad is None else grad
    dprobe, dx = call(grad, grad_total, *tensors, *ctx.numbers, seed)
    return dprobe, dx, None, None, None, None


def _operands(ctx: autograd.Context) -> tuple[Any, ...]:
    *_, probe, x, cu_seqlens, seed = ctx.saved_tensors
    return probe, x, cu_seqlens, *ctx.numbers, seed


_trained = autograd.register_autograd_formula(
    "absorbed_attention", _forward, _differentiate, _reference_forward, _keep_for_backward, _operands
)
