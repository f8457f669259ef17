"""shift_norm, the mathematics: with rows i and l_i, whether row i and the row above it are linked,

    u_i = x_i + shift + scale * x_i + [l_i] before * x_(i-1) + [l_(i+1)] after * x_(i+1)
    y = LayerNorm(u)

and backwards, with du as in gated_add_norm.py:

    dx_i = (1 + scale) * du_i + [l_(i+1)] before * du_(i+1) + [l_i] after * du_(i-1)
    dshift = sum_i du_i                               dscale = sum_i du_i * x_i
    dbefore = sum_i [l_i] du_i * x_(i-1)              dafter = sum_i [l_(i+1)] du_i * x_(i+1)

The row above the first is the last, and the row below the last the first: l_0 is false.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from fastgate.ops.reference.norm import accumulation_dtype, norm_backward, normalise


class ShiftGradients(NamedTuple):
    """Gradients of shift_norm."""

    x: Tensor
    shift: Tensor
    scale: Tensor
    before: Tensor
    after: Tensor
    weight: Tensor
    norm_bias: Tensor


def neighbours(x: Tensor, linked: Tensor) -> tuple[Tensor, Tensor]:
    """The rows above and below each row of x (rows, H), zeros where they are not linked to it; linked:
    (rows,) bool. Not by a product with 0: what a row not linked holds, NaN even, stays there."""
    above = torch.where(linked[:, None], x.roll(1, 0), 0.0)
    return above, torch.where(linked.roll(-1)[:, None], x.roll(-1, 0), 0.0)


def _mix(
    x: Tensor, linked: Tensor, shift: Tensor, scale: Tensor, before: Tensor, after: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """u, and the rows above and below."""
    above, below = neighbours(x, linked)
    return x + (shift + scale * x + before * above + after * below), above, below


def shift_norm(
    x: Tensor,
    linked: Tensor,
    shift: Tensor,
    scale: Tensor,
    before: Tensor,
    after: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """y of the module's head comment, differentiable by plain autograd.

    x: (rows, H); linked: (rows,) bool; vectors: (H,). Returns (rows, H) in the dtype of x.
    """
    dtype = accumulation_dtype(x, x)
    u = _mix(x.to(dtype), linked, *(v.to(dtype) for v in (shift, scale, before, after)))[0]
    return layer_norm(u, u.shape[-1:], weight.to(dtype), norm_bias.to(dtype), eps).to(x.dtype)


def shift_norm_backward(
    grad: Tensor,
    x: Tensor,
    linked: Tensor,
    shift: Tensor,
    scale: Tensor,
    before: Tensor,
    after: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> ShiftGradients:
    """The backward equations of the module's head comment, written out; mixes again.

    grad: (rows, H), the gradient of y. dx comes in the dtype of x, the vectors' gradients in the accumulation
    dtype (float32, float64 for float64).
    """
    dtype = accumulation_dtype(x, x)
    wide, dy = x.to(dtype), grad.to(dtype)
    shift, scale, before, after = (v.to(dtype) for v in (shift, scale, before, after))
    u, above, below = _mix(wide, linked, shift, scale, before, after)
    xhat, rstd = normalise(u, eps)
    du = norm_backward(dy, weight.to(dtype), xhat, rstd)
    du_above, du_below = neighbours(du, linked)
    return ShiftGradients(
        x=(du + (scale * du + before * du_below + after * du_above)).to(x.dtype),
        shift=du.sum(0),
        scale=(du * wide).sum(0),
        before=(du * above).sum(0),
        after=(du * below).sum(0),
        weight=(dy * xhat).sum(0),
        norm_bias=dy.sum(0),
    )
