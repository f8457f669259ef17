"""linear: x W^T, the product of a Linear; its bias is left to whatever reads the product next.

On the CPU oneDNN computes it in float32, and in bfloat16 where the processor can. In float32 torch's own
F.linear goes to another library, which is slower on some processors. Elsewhere, under autocast and where
torch traces, it is F.linear. With a weight that `pack` has laid out, csrc/cpu/linear.cpp computes it where
the processor can, oneDNN elsewhere.
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

from fastgate.errors import ArgumentError, Unsupported, format_error
from fastgate.ops import autograd, onednn_shapes, registry

PACKED_LINEAR = "packed_linear"  # the compiled product
PANEL_ROWS = 32  # rows of a weight that lie together, as csrc/cpu/linear.cpp has it
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
        side_by_side = self.data.shape[2] // PANEL_ROWS  # numbers of a row
        split = self.data.view(len(self.data), -1, PANEL_ROWS, side_by_side).transpose(1, 2)
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
        """x W^T + b, with the exact GELU of it if `gelu`. x: (..., K) in the weight's dtype, on the CPU.

        Raises Unsupported under autocast, where torch traces, if a gradient is wanted, or for another dtype.
        """
        if (
            not registry.bypasses_dispatcher(x)
            or x.dtype != self.data.dtype
            or torch.is_autocast_enabled("cpu")
            or autograd.any_requires_grad(x)
        ):
            got, wanted = "a frozen one in training, autocast or torch.compile", "one that is not packed"
            if x.dtype != self.data.dtype:
                got, wanted = f"a frozen one of {self.data.dtype} for rows of {x.dtype}", "one dtype"
            raise Unsupported(
                format_error("linear", "weight", got, wanted, "call fastgate.thaw(model) first")
            )
        if registry.reference_is_selected("linear_gelu" if gelu else "linear", "cpu"):
            y = F.linear(x, self.dense(), None if bias is None else bias.to(x.dtype))
            return F.gelu(y) if gelu else y
        if not self.in_panels:
            return onednn_product(x, self.data, bias, gelu)
        return torch.ops.fastgate_cpu.packed_linear.default(x, self.data, bias, self.shape[0], gelu)  # type: ignore[no-any-return]


def pack(weight: Tensor) -> Packed:
    """A copy of a weight (N, K) on the CPU, of one of `ONEDNN_DTYPES`, laid out for its products."""
    weight = weight.detach().contiguous()
    rows, depth = weight.shape
    side_by_side = interleaving(weight.dtype, depth)
    if side_by_side:
        padded = F.pad(weight, (0, 0, 0, -rows % PANEL_ROWS)).view(
            -1, PANEL_ROWS, depth // side_by_side, side_by_side
        )
        panels = padded.transpose(1, 2).contiguous()
        return Packed(panels.view(len(panels), -1, PANEL_ROWS * side_by_side), (rows, depth))
    return Packed(torch.ops.mkldnn._reorder_linear_weight(weight, ONEDNN_ROWS), (rows, depth))


def _unpickled(data: Tensor, shape: tuple[int, int], fused_qkv: Packed | None) -> Packed:
    """What was in panels, packed anew where this process multiplies with another layout."""
    packed = Packed(data, shape, fused_qkv)
    return (
        packed if interleaving(data.dtype, shape[1]) == data.shape[2] // PANEL_ROWS else pack(packed.dense())
    )


def interleaving(dtype: torch.dtype, depth: int) -> int:
    """How many numbers of a row lie side by side in a panel; 0 where panels cannot be multiplied with."""
    registry.load_defaults()  # and with them the compiled library
    library = torch.ops.fastgate_cpu
    if not hasattr(library, PACKED_LINEAR):
        return 0
    if dtype == torch.float32:
        return 1
    return 2 if depth % 2 == 0 and library.packs_bfloat16() else 0


def pack_together(weights: Sequence[Tensor]) -> list[Packed]:
    """Weights (N, K) of one shape, each packed; `fused_qkv` is all of them, for one product (rows of the
    first, then of the next), in the same memory where the layout allows it: elsewhere None."""
    rows, depth = weights[0].shape
    whole = pack(torch.cat([weight.detach() for weight in weights])) if rows % PANEL_ROWS == 0 else None
    if whole is None or not whole.in_panels:
        return [pack(weight) for weight in weights]
    return [Packed(part, (rows, depth), whole) for part in whole.data.split(rows // PANEL_ROWS)]  # type: ignore[no-untyped-call]


def linear(x: Tensor, weight: Tensor | Packed) -> Tensor:
    """The product of a Linear without its bias: x W^T.

    Args:
        x: (..., K), floating. Under autocast it is cast as torch's F.linear casts it.
        weight: (N, K) of x's dtype, or a packed one (`from fastgate.ops.linear import pack`).

    Returns:
        (..., N) in x's dtype, or autocast's. Differentiable in x and weight.

    Raises:
        ArgumentError: for shapes that do not fit.
        Unsupported: for a packed weight in training, under autocast, where torch traces, or with another
            dtype.

    Example:
        >>> x, weight = torch.ones(2, 3), torch.ones(4, 3)
        >>> fastgate.ops.linear(x, weight).tolist()
        [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]
    """
    if not isinstance(weight, Packed) and (weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]):
        got = f"shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        raise ArgumentError(
            format_error("linear", "x, weight", got, "(..., K) and (N, K)", "transpose the weight")
        )
    return multiply(x, weight)


def multiply(x: Tensor, weight: Tensor | Packed) -> Tensor:
    """`linear` without its checks, for operands that fit."""
    if isinstance(weight, Packed):
        return weight.product(x)
    if not registry.bypasses_dispatcher(x):
        return F.linear(x, weight)
    chosen = registry.implementation("linear", x.device.type, x.dtype, x=x, weight=weight)
    if chosen is registry.REFERENCE["linear"]:
        return F.linear(x, weight)
    if autograd.any_requires_grad(x, weight):
        return _Linear.apply(chosen, x, weight)  # type: ignore[no-any-return, no-untyped-call]
    return chosen.forward(x, weight)  # type: ignore[no-any-return]


def onednn_supports(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies these operands as they are now."""
    return (
        x.device.type == "cpu"
        and x.dtype in ONEDNN_DTYPES
        and x.dtype == weight.dtype
        and type(weight) in (Tensor, nn.Parameter)
        and registry.bypasses_dispatcher(x)
        and not torch.is_autocast_enabled("cpu")
    )


def _fits_onednn(x: Tensor, weight: Tensor) -> bool:
    """As onednn_supports, of an x that the registry and `multiply` have looked at."""
    return (
        x.dtype == weight.dtype
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def missing_for_onednn() -> str:
    """The reason oneDNN's products cannot be called here, empty if they can."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return f"torch {torch.__version__} has no mkldnn._linear_pointwise"
    return ""


def _onednn_dtypes() -> frozenset[torch.dtype]:
    """What oneDNN multiplies here; none where it is missing. bfloat16 takes AVX512 or AVX-NE-CONVERT."""
    if missing_for_onednn():
        return frozenset()
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return frozenset((torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,))


ONEDNN_DTYPES = _onednn_dtypes()


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """oneDNN's x W^T + b, with the exact GELU of it if `gelu`: no gradient."""
    rows, columns = x.shape[:-1].numel(), weight.shape[0]
    if rows < 2 or onednn_shapes.is_exact(rows, *weight.shape, x.dtype, gelu):
        return _compiled_product(x, weight, bias, gelu)
    flat, y = x.reshape(rows, -1), x.new_empty(rows, columns)
    if rows <= onednn_shapes.LARGEST_PIECE:
        padded = _pad_rows(flat, onednn_shapes.round_up(rows))
        y.copy_(_compiled_product(padded, weight, bias, gelu)[:rows])
    else:
        for begin, end in onednn_shapes.pieces(rows):
            y[begin:end] = _compiled_product(flat[begin:end], weight, bias, gelu)
    return y.view(*x.shape[:-1], columns)


def _compiled_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """The product as one call, for which oneDNN compiles and keeps code for x's number of rows."""
    call = torch.ops.mkldnn._linear_pointwise.default
    return call(x, weight, bias, "gelu" if gelu else "none", [], "none")  # type: ignore[no-any-return]


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    """x (n, K) with rows of zeros below, (rows, K)."""
    return F.pad(x, (0, 0, 0, rows - len(x)))


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad W: the gradient of x, (..., K), from grad (..., N)."""
    return onednn_product(grad, weight.t()) if onednn_supports(grad, weight) else torch.matmul(grad, weight)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x over all rows: (N, K) from grad (..., N) and x (..., K)."""
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    rows = len(x)
    if not rows or not onednn_supports(grad, x):
        return torch.mm(grad.t(), x)
    if not onednn_shapes.is_exact("weight gradient", rows, grad.shape[1], x.shape[1], x.dtype):
        rows = onednn_shapes.round_up(rows)
        grad, x = _pad_rows(grad, rows), _pad_rows(x, rows)
    return _compiled_product(grad.t(), x.t())


def _reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    dx, dweight = needs
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        torch.matmul(grad, weight) if dx else None,
        torch.mm(rows.t(), x.reshape(-1, x.shape[-1])) if dweight else None,
    )


def _onednn_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    dx, dweight = needs
    return input_gradient(grad, weight) if dx else None, weight_gradient(grad, x) if dweight else None


registry.REFERENCE["linear"] = registry.Implementation(
    "reference", F.linear, _reference_backward, frozenset(registry.DTYPES)
)


def onednn() -> registry.Implementation:
    """The CPU's, where `missing_for_onednn` finds nothing."""
    return registry.Implementation(
        "onednn", onednn_product, _onednn_backward, ONEDNN_DTYPES, fits=_fits_onednn
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chosen: registry.Implementation, x: Tensor, weight: Tensor) -> Tensor:
        ctx.chosen = chosen
        ctx.save_for_backward(x, weight)
        return chosen.forward(x, weight)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operands, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if autograd.needs_torch((grad,)):
            return None, *autograd.differentiate_by_torch(F.linear, operands, needs, (grad,))
        return None, *ctx.chosen.backward(grad, *operands, needs)
