"""shift_norm, the mathematics: with rows i and l_i, whether row i has a left neighbour, the row above it,

    u_i = x_i + offset + scale * x_i + [l_i] before * x_(i-1) + [l_(i+1)] after * x_(i+1)
    y = LayerNorm(u)

and backwards, with du as in gated_add_norm.py:

    dx_i = (1 + scale) * du_i + [l_(i+1)] before * du_(i+1) + [l_i] after * du_(i-1)
    doffset = sum_i du_i                               dscale = sum_i du_i * x_i
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
    offset: Tensor
    scale: Tensor
    before: Tensor
    after: Tensor
    weight: Tensor
    norm_bias: Tensor


def neighbours(x: Tensor, has_left_neighbour: Tensor) -> tuple[Tensor, Tensor]:
    """The rows above and below each row of x (rows, H), zeros where those are no neighbours.

    has_left_neighbour: (rows,) bool, whether a row and the one above it are neighbours. Not by a product with 0:
    what a row that is no neighbour holds, NaN even, stays there."""
    above = torch.where(has_left_neighbour[:, None], x.roll(1, 0), 0.0)
    return above, torch.where(has_left_neighbour.roll(-1)[:, None], x.roll(-1, 0), 0.0)


def _mix(
    x: Tensor, has_left_neighbour: Tensor, offset: Tensor, scale: Tensor, before: Tensor, after: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """u, and the rows above and below."""
    above, below = neighbours(x, has_left_neighbour)
    return x + (offset + scale * x + before * above + after * below), above, below


def shift_norm(
    x: Tensor,
    has_left_neighbour: Tensor,
    offset: Tensor,
    scale: Tensor,
    before: Tensor,
    after: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """y of the module's head comment, differentiable by plain autograd.

    x: (rows, H); has_left_neighbour: (rows,) bool; vectors: (H,). Returns (rows, H) in the dtype of x.
    """
    dtype = accumulation_dtype(x, x)
    u = _mix(x.to(dtype), has_left_neighbour, *(v.to(dtype) for v in (offset, scale, before, after)))[0]
    return layer_norm(u, u.shape[-1:], weight.to(dtype), norm_bias.to(dtype), eps).to(x.dtype)


def shift_norm_backward(
    grad: Tensor,
    x: Tensor,
    has_left_neighbour: Tensor,
    offset: Tensor,
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
    offset, scale, before, after = (v.to(dtype) for v in (offset, scale, before, after))
    u, above, below = _mix(wide, has_left_neighbour, offset, scale, before, after)
    xhat, rstd = normalise(u, eps)
    du = norm_backward(dy, weight.to(dtype), xhat, rstd)
    du_above, du_below = neighbours(du, has_left_neighbour)
    return ShiftGradients(
        x=(du + (scale * du + before * du_below + after * du_above)).to(x.dtype),
        offset=du.sum(0),
        scale=(du * wide).sum(0),
        before=(du * above).sum(0),
        after=(du * below).sum(0),
        weight=(dy * xhat).sum(0),
        norm_bias=dy.sum(0),
    )
