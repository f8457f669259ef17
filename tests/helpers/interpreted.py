"""Makes Triton's interpreter round and multiply bfloat16 as hardware does; triton_device.py imports it."""

from __future__ import annotations

import numpy as np
from triton.runtime import interpreter


def _repair_bfloat16() -> None:
    """The interpreter keeps bfloat16 as 16-bit integers, multiplies those, and cuts float32 off where
    hardware rounds to nearest. A product of two bfloat16 numbers is exact in float32: multiply there."""
    builder = interpreter.InterpreterBuilder
    bf16, fp32, handle = interpreter.tl.bfloat16, interpreter.tl.float32, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl

    def widen(operand):
        if operand.dtype.scalar != bf16:
            return operand
        return handle((operand.data.astype(np.uint32) << 16).view(np.float32), fp32)

    def create_dot(self, a, b, d, *rest):
        return dot(self, widen(a), widen(b), d, *rest)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != fp32 or dst_type.scalar != bf16:
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return handle(np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16), bf16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.create_fp_trunc = cast_impl


_repair_bfloat16()
