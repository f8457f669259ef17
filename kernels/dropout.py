"""The dropout mask of every backend, in a Triton kernel: Philox words against an integer threshold."""

from __future__ import annotations

import triton
import triton.language as tl

WORD = 0xFFFFFFFF


@triton.jit
def kept(seed, row, group, threshold, SHAPE: tl.constexpr):
    """Which elements of a tile are kept: bool of SHAPE (..., 4 * G), whole groups of four columns.

    seed: () int64; row: int64, group: int32 = column // 4, which together broadcast to (..., G); threshold:
    int32 whose bits are the unsigned word from which an element is kept. Each word is computed once: the
    four of a group are joined so that they lie side by side.
    """
    row, group = tl.broadcast(row, group.to(tl.int64))
    zero = tl.zeros_like(row).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, row.to(tl.uint32), (row >> 32).to(tl.uint32), group.to(tl.uint32), zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(SHAPE)
    return words >= threshold.to(tl.uint32, bitcast=True)


def threshold_argument(dropout_p: float) -> int:
    """reference.dropout_threshold as the int32 of the same bits: one compiled kernel takes them all."""
    threshold = min(round(dropout_p * 2.0**32), WORD)
    return threshold - 2**32 if threshold >= 2**31 else threshold
