"""linear_gelu, the mathematics: with Phi and phi the distribution and the density of the standard normal:

v  = x W^T + b,  y = v Phi(v)                     Phi(v) = (1 + erf(v / sqrt 2)) / 2: the exact GELU
dv = dy * (Phi(v) + v phi(v))                     dx = dv W,  dW = dv^T x,  db = sum_i dv
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgate.ops.reference.norm import accumulation_dtype


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in the accumulation dtype."""
    dtype = accumulation_dtype(x, weight)
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
    dtype = accumulation_dtype(x, weight)
    v = _linear(x, weight, bias)
    density = torch.exp(-0.5 * v.square()) / math.sqrt(2.0 * math.pi)
    dv = grad.to(dtype) * (_normal_distribution(v) + v * density)
    rows = dv.reshape(-1, weight.shape[0])
    dweight = rows.t() @ x.reshape(-1, weight.shape[1]).to(dtype)
    return (dv @ weight.to(dtype)).to(x.dtype), dweight, None if bias is None else rows.sum(0)
