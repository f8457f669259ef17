"""linear: x W^T, the product of a Linear; its bias is left to whatever reads the product next.

On the CPU oneDNN makes it in float32 and bfloat16, from the weight as it stands or from one that `pack` has
laid out for it: in float32 torch's own F.linear goes to another library, which is slower on some processors.
Elsewhere, under autocast and where torch traces, it is F.linear.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastgate.errors import Unsupported, say
from fastgate.ops import slots

ONEDNN_DTYPES = (torch.float32, torch.bfloat16)
PACK_ROWS = 512  # rows of x that a packed layout is chosen for; it serves every other number


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T.

    x: (..., K), floating; weight: (N, K) of x's dtype, or what `pack` made of one. Returns (..., N) in x's
    dtype; under autocast both are cast as torch's F.linear casts them. Differentiable in both.

    Raises Unsupported for a packed weight under autocast, where torch traces, or if a gradient is wanted.
    """
    if not takes(x, weight):
        refuse_packed(weight)
        return F.linear(x, weight)
    if slots.needs_gradient(x, weight):
        refuse_packed(weight)
        return _Linear.apply(x, weight)
    return product(x, weight)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is called for these operands, as they are now."""
    return (
        x.device.type == "cpu"
        and x.dtype in ONEDNN_DTYPES
        and x.dtype == weight.dtype
        and type(weight) in (Tensor, nn.Parameter)
        and slots.is_direct(x)
        and not torch.is_autocast_enabled("cpu")
        and not missing_for_onednn()
    )


@functools.cache
def missing_for_onednn() -> str:
    """The reason oneDNN's products cannot be called here, empty if they can."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return f"torch {torch.__version__} has no mkldnn._linear_pointwise"
    return ""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """oneDNN's x W^T + b, with the exact GELU of it if asked: one call, no gradient."""
    call = torch.ops.mkldnn._linear_pointwise.default
    return call(x, weight, bias, "gelu" if gelu else "none", [], "none")


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight (N, K), float32 or bfloat16 on the CPU, in the layout oneDNN multiplies with."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACK_ROWS)


def refuse_packed(weight: Tensor) -> None:
    """Raise Unsupported if `pack` made the weight."""
    if weight.is_mkldnn:
        got, wanted = "a frozen one in training, autocast or torch.compile", "one that is not packed"
        raise Unsupported(say("linear", "weight", got, wanted, "call fastgate.thaw(model) first"))


def rows_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad W: the gradient of x, (..., K), from grad (..., N)."""
    return product(grad, weight.t()) if takes(grad, weight) else torch.matmul(grad, weight)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x over all rows: (N, K) from grad (..., N) and x (..., K)."""
    return torch.mm(grad.reshape(-1, grad.shape[-1]).t(), x.reshape(-1, x.shape[-1]))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx, dweight = ctx.needs_input_grad
        return rows_gradient(grad, weight) if dx else None, weight_gradient(grad, x) if dweight else None
