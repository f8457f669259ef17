"""The shapes, element types and tolerances that ops are tested with, each with its reason."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    sizes: tuple[int, ...]  # (..., hidden)
    reason: str

    def __str__(self) -> str:
        return "x".join(map(str, self.sizes))


SHAPES = (
    Shape((0, 384), "no rows: nothing is attended"),
    Shape((1, 384), "one row: batch 1 above the last kept attention"),
    Shape((3, 1), "one channel: the variance is zero"),
    Shape((5, 7), "narrower than a vector register, odd"),
    Shape((2, 9, 768), "a padded batch in three dimensions, BERT-base width"),
    Shape((33, 384), "MiniLM width, one row more than a run of summed rows"),
    Shape((129, 771), "odd rows, and a width that is no multiple of four, the dropout group"),
    Shape((2117, 12), "many row blocks, the last one short"),
    Shape((3, 8192), "the widest row"),
)


class Dtypes(NamedTuple):
    x: torch.dtype
    residual: torch.dtype
    parameters: torch.dtype
    reason: str

    def __str__(self) -> str:
        return "-".join(str(dtype).removeprefix("torch.") for dtype in self[:3])


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (
    Dtypes(FP32, FP32, FP32, "the default"),
    Dtypes(BF16, BF16, BF16, "a model converted to bfloat16"),
    Dtypes(BF16, FP32, FP32, "autocast: products in bfloat16, residual stream and norms in float32"),
    Dtypes(FP32, BF16, FP32, "the mixture the other way round"),
    Dtypes(FP16, FP16, FP16, "half precision, which only some backends take"),
)


def unit(dtype: torch.dtype, value: Tensor) -> float:
    """One unit in the last place of the largest element of `value` in `dtype`."""
    return torch.finfo(dtype).eps * float(value.abs().max()) if value.numel() else 0.0


def error(got: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; NaN anywhere makes it infinite."""
    if not truth.numel():
        return 0.0
    worst = float((got.double() - truth.double()).abs().max())
    return worst if worst == worst else float("inf")


def allowed(torchs_own: Tensor, truth: Tensor, dtype: torch.dtype, condition: float = 1.0) -> float:
    """Twice the error of torch at this precision, plus one unit in the last place.

    condition: how much one rounding on the way grows until it reaches the result, by the op's mathematics.
    """
    return 2 * error(torchs_own, truth) + condition * unit(dtype, truth)
