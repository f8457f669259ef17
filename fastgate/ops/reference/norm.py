"""What the ops with a LayerNorm share: precision, dropout applied, the norm and its backward."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor, residual: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, residual.dtype) else torch.float32


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def drop(x: Tensor, bias: Tensor | None, dropout_p: float, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dropout(x + bias) in the accumulation dtype; without a mask nothing is dropped."""
    d = x.to(dtype)
    if bias is not None:
        d = d + bias.to(dtype)
    if mask is not None:
        d = torch.where(mask.reshape(d.shape), d / (1.0 - dropout_p), 0.0)
    return d


def normalise(u: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(xhat, rstd) over the last dimension."""
    centred = u - u.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def norm_backward(dy: Tensor, weight: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
    t = dy * weight
    return rstd * (t - t.mean(-1, keepdim=True) - xhat * (t * xhat).mean(-1, keepdim=True))
