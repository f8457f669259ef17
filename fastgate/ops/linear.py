"""linear: x W^T, the product of a Linear; its bias is left to whatever reads the product next.

On the CPU oneDNN makes it in float32 and bfloat16: in float32 torch's own F.linear goes to another library,
which is slower on some processors. Elsewhere, under autocast and where torch traces, it is F.linear. From a
weight that `pack` has laid out, csrc/cpu/linear.cpp makes it where the processor can, oneDNN elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgate.errors import Unsupported, format_error
from fastgate.ops import derivatives, registry, row_counts

ONEDNN_DTYPES = (torch.float32, torch.bfloat16)
PANELS = "packed_linear"  # the compiled product
PANEL = 32  # rows of a weight that lie together, as csrc/cpu/linear.cpp has it
ONEDNN_ROWS = 512  # rows of x that oneDNN chooses a layout for; it serves every other number


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight (N, K) laid out for the CPU's products, for inference: `data` in panels, or in oneDNN's own
    layout. Panels of float32: (N / 32 rounded up, K, 32), element (p, k, c) that of row 32 p + c, or 0; of
    bfloat16: (N / 32 rounded up, K / 2, 64), element (p, k, 2 c + i) that of row 32 p + c, column 2 k + i."""

    data: Tensor
    shape: tuple[int, int]
    fused_qkv: Packed | None = None  # the weight that this one is a part of

    @property
    def in_panels(self) -> bool:
        """In panels, not in oneDNN's layout."""
        return not self.data.is_mkldnn

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def dense(self) -> Tensor:
        """The weight as it was, (N, K)."""
        if not self.in_panels:
            return self.data.to_dense()
        together = self.data.shape[2] // PANEL  # numbers of a row that lie side by side
        split = self.data.view(len(self.data), -1, PANEL, together).transpose(1, 2)
        return split.reshape(-1, self.shape[1])[: self.shape[0]].contiguous()

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles: panels as such; oneDNN's layout, which cannot be copied, as the weight."""
        if self.in_panels:
            return _unpickled, (self.data, self.shape, self.fused_qkv)
        return pack, (self._kept_dense(),)

    def _kept_dense(self) -> Tensor:
        """The weight. A process that is being spawned reads it from shared memory after it was pickled."""
        weight = self.dense()
        if get_spawning_popen() is not None:
            object.__setattr__(self, "_sent", weight)
        return weight

    def product(self, x: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
        """x W^T + b, with the exact GELU of it if asked. x: (..., K) in the weight's dtype, on the CPU.

        Raises Unsupported under autocast, where torch traces, if a gradient is wanted, or for another dtype.
        """
        if (
            not registry.bypasses_dispatcher(x)
            or x.dtype != self.data.dtype
            or torch.is_autocast_enabled("cpu")
            or registry.any_requires_grad(x)
        ):
            got, wanted = "a frozen one in training, autocast or torch.compile", "one that is not packed"
            if x.dtype != self.data.dtype:
                got, wanted = f"a frozen one of {self.data.dtype} for rows of {x.dtype}", "one dtype"
            raise Unsupported(
                format_error("linear", "weight", got, wanted, "call fastgate.thaw(model) first")
            )
        if not self.in_panels:
            return product(x, self.data, bias, gelu)
        return torch.ops.fastgate_cpu.packed_linear.default(x, self.data, bias, self.shape[0], gelu)


def pack(weight: Tensor) -> Packed:
    """A copy of a weight (N, K), float32 or bfloat16 on the CPU, laid out for its products."""
    weight = weight.detach().contiguous()
    rows, depth = weight.shape
    together = _together(weight.dtype, depth)
    if together:
        padded = F.pad(weight, (0, 0, 0, -rows % PANEL)).view(-1, PANEL, depth // together, together)
        panels = padded.transpose(1, 2).contiguous()
        return Packed(panels.view(len(panels), -1, PANEL * together), (rows, depth))
    return Packed(torch.ops.mkldnn._reorder_linear_weight(weight, ONEDNN_ROWS), (rows, depth))


def _unpickled(data: Tensor, shape: tuple[int, int], fused_qkv: Packed | None) -> Packed:
    """What was in panels, packed anew where this process multiplies with another layout."""
    packed = Packed(data, shape, fused_qkv)
    return packed if _together(data.dtype, shape[1]) == data.shape[2] // PANEL else pack(packed.dense())


def _together(dtype: torch.dtype, depth: int) -> int:
    """How many numbers of a row lie side by side in a panel; 0 where panels cannot be multiplied with."""
    registry.implementation("linear_gelu", "cpu")  # the compiled library is loaded with the first op
    library = torch.ops.fastgate_cpu
    if not hasattr(library, PANELS):
        return 0
    if dtype == torch.float32:
        return 1
    return 2 if depth % 2 == 0 and library.packs_bfloat16() else 0


def pack_together(weights: Sequence[Tensor]) -> list[Packed]:
    """Weights (N, K) of one shape, each packed; `joint` is all of them, for one product (rows of the first,
    then of the next), in the same memory where the layout allows it: elsewhere None."""
    rows, depth = weights[0].shape
    whole = pack(torch.cat([weight.detach() for weight in weights])) if rows % PANEL == 0 else None
    if whole is None or not whole.in_panels:
        return [pack(weight) for weight in weights]
    return [Packed(part, (rows, depth), whole) for part in whole.data.split(rows // PANEL)]


def linear(x: Tensor, weight: Tensor | Packed) -> Tensor:
    """x W^T.

    x: (..., K), floating; weight: (N, K) of x's dtype, or what `pack` made of one. Returns (..., N) in x's
    dtype; under autocast both are cast as torch's F.linear casts them. Differentiable in both.

    Raises Unsupported for a packed weight as Packed.product does.
    """
    if isinstance(weight, Packed):
        return weight.product(x)
    if not takes(x, weight):
        return F.linear(x, weight)
    return _Linear.apply(x, weight) if registry.any_requires_grad(x, weight) else product(x, weight)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is called for these operands, as they are now."""
    return (
        x.device.type == "cpu"
        and x.dtype in ONEDNN_DTYPES
        and x.dtype == weight.dtype
        and type(weight) in (Tensor, nn.Parameter)
        and registry.bypasses_dispatcher(x)
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
    """oneDNN's x W^T + b, with the exact GELU of it if asked: no gradient."""
    rows, columns = x.shape[:-1].numel(), weight.shape[0]
    if rows < 2 or row_counts.is_exact(rows, *weight.shape, x.dtype, gelu):
        return _compiled_product(x, weight, bias, gelu)
    flat, y = x.reshape(rows, -1), x.new_empty(rows, columns)
    if rows <= row_counts.PIECE:
        padded = _pad_rows(flat, row_counts.round_up(rows))
        y.copy_(_compiled_product(padded, weight, bias, gelu)[:rows])
    else:
        for begin, end in row_counts.pieces(rows):
            y[begin:end] = _compiled_product(flat[begin:end], weight, bias, gelu)
    return y.view(*x.shape[:-1], columns)


def _compiled_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """The product as one call, for which oneDNN compiles and keeps code for x's number of rows."""
    call = torch.ops.mkldnn._linear_pointwise.default
    return call(x, weight, bias, "gelu" if gelu else "none", [], "none")


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    """x (n, K) with rows of zeros below, (rows, K)."""
    return F.pad(x, (0, 0, 0, rows - len(x)))


def rows_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad W: the gradient of x, (..., K), from grad (..., N)."""
    return product(grad, weight.t()) if takes(grad, weight) else torch.matmul(grad, weight)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x over all rows: (N, K) from grad (..., N) and x (..., K)."""
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    rows = len(x)
    if not rows or not takes(grad, x):
        return torch.mm(grad.t(), x)
    if not row_counts.is_exact("weight gradient", rows, grad.shape[1], x.shape[1], x.dtype):
        rows = row_counts.round_up(rows)
        grad, x = _pad_rows(grad, rows), _pad_rows(x, rows)
    return _compiled_product(grad.t(), x.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dweight = ctx.needs_input_grad
        if derivatives.needs_torch((grad,)):
            return derivatives.differentiate_by_torch(F.linear, (x, weight), (dx, dweight), (grad,))
        return rows_gradient(grad, weight) if dx else None, weight_gradient(grad, x) if dweight else None
