"""gated_add_norm, the mathematics: with rows i and channels j, keep mask m and keep probability 1 - p:

    d = m * (x + bias) / (1 - p)                      dropout of the sublayer's output
    u = scale * residual + gate * d + offset
    y = (u - mean(u)) * rstd(u) * weight + norm_bias  then, if weight2 is given, a second norm of y

and backwards, with xhat = (u - mean) * rstd, t = dy * weight and means over channels:

    du        = rstd * (t - mean(t) - xhat * mean(t * xhat))
    dx        = gate * m / (1 - p) * du               dbias  = sum_i dx
    dresidual = scale * du                            dscale = sum_i du * residual
    dgate     = sum_ij du * d                         doffset = sum_i du
    dweight   = sum_i dy * xhat                       dnorm_bias = sum_i dy
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from fastgate.ops.reference.norm import accumulation_dtype, cast, drop, norm_backward, normalise


class Gradients(NamedTuple):
    """Gradients of gated_add_norm; None where the operand was not given."""

    x: Tensor
    residual: Tensor
    bias: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    offset: Tensor | None
    weight: Tensor
    norm_bias: Tensor
    weight2: Tensor | None
    norm_bias2: Tensor | None


def _mix(
    dropped: Tensor,
    residual: Tensor,
    gate: Tensor | float | None,
    scale: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """u = scale * residual + gate * dropped + offset, in dropped's dtype."""
    dtype = dropped.dtype
    u = residual.to(dtype)
    if scale is not None:
        u = u * scale.to(dtype)
    if gate is not None:
        dropped = dropped * (gate.to(dtype) if isinstance(gate, Tensor) else gate)
    u = u + dropped
    return u if offset is None else u + offset.to(dtype)


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
    offset: Tensor | None = None,
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
    dtype = accumulation_dtype(x, residual)
    dropped = drop(x, bias, dropout_p, mask, dtype)
    u = _mix(dropped, residual, gate, scale, offset)
    y = layer_norm(u, u.shape[-1:], weight.to(dtype), norm_bias.to(dtype), eps)
    if weight2 is not None:
        y = layer_norm(y, y.shape[-1:], weight2.to(dtype), cast(norm_bias2, dtype), eps2)
    return y.to(torch.promote_types(x.dtype, residual.dtype))


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
    offset: Tensor | None = None,
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
    dtype = accumulation_dtype(x, residual)
    hidden = x.shape[-1]
    x, residual, grad = (t.reshape(-1, hidden) for t in (x, residual, grad))
    dropped = drop(x, bias, dropout_p, mask, dtype)
    xhat, rstd = normalise(_mix(dropped, residual, gate, scale, offset), eps)
    weight, norm_bias, dy = weight.to(dtype), norm_bias.to(dtype), grad.to(dtype)
    dweight2 = dnorm_bias2 = None
    if weight2 is not None:
        xhat2, rstd2 = normalise(xhat * weight + norm_bias, eps2)
        dweight2, dnorm_bias2 = (dy * xhat2).sum(0), dy.sum(0)
        dy = norm_backward(dy, weight2.to(dtype), xhat2, rstd2)
    du = norm_backward(dy, weight, xhat, rstd)
    dx = du if gate is None else du * gate
    if mask is not None:
        dx = torch.where(mask.reshape(dx.shape), dx / (1.0 - dropout_p), 0.0)
    return Gradients(
        x=dx.to(x.dtype),
        residual=(du if scale is None else du * scale.to(dtype)).to(residual.dtype),
        bias=None if bias is None else dx.sum(0),
        gate=None if gate is None else (du * dropped).sum(),
        scale=None if scale is None else (du * residual.to(dtype)).sum(0),
        offset=None if offset is None else du.sum(0),
        weight=(dy * xhat).sum(0),
        norm_bias=dy.sum(0),
        weight2=dweight2,
        norm_bias2=dnorm_bias2,
    )
