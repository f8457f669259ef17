"""The halves of an encoder layer from packed weights, for inference on the CPU: one compiled call each.

What they compute is what their steps compute one by one. A small batch feels what the calls between cost, all
the more as the weights that pass through the caches push out what the calls need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgate.ops import slots
from fastgate.ops.linear import ONEDNN_DTYPES, Packed
from fastgate.packing import Ragged

CALLS = ("packed_attention", "packed_absorbed_attention", "packed_feed_forward")  # the compiled halves

OPS = ("attention", "absorbed_attention", "gated_add_norm")  # what they call, besides products


class Norm(NamedTuple):
    """A LayerNorm's operands, (H,) each, and those of a second one behind it, where there is one."""

    weight: Tensor
    bias: Tensor
    eps: float
    weight2: Tensor | None = None
    norm_bias2: Tensor | None = None
    eps2: float = 0.0


class Product(NamedTuple):
    """A Linear: its packed weight (N, K), its bias (N,) or None."""

    weight: Packed
    bias: Tensor | None


def runs(h: Tensor) -> bool:
    """Whether the halves may run on rows like these, (rows, H): the compiled kernels are what runs its steps,
    and nothing traces, wants a gradient or casts."""
    return (
        h.dtype in ONEDNN_DTYPES
        and h.device.type == "cpu"
        and slots.is_direct(h)
        and not slots.needs_gradient(h)
        and not torch.is_autocast_enabled("cpu")
        and all(slots.implementation(op, "cpu").backend == "cpp" for op in OPS)
        and hasattr(torch.ops.fastgate_cpu, CALLS[0])
    )


class Half(NamedTuple):
    """A half of a layer that is ready to run: from rows (rows, H) to rows of that dtype and width."""

    compiled: Callable[..., Tensor]
    operands: tuple[Any, ...]

    def __call__(self, h: Tensor) -> Tensor:
        return self.compiled(h, *self.operands)


def attention_half(
    qkv: Packed,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    sequences: Ragged,
    heads: int,
    scale: float,
    output: Product,
    norm: Norm,
) -> Half:
    """h -> LayerNorm(h + output(attention of h's rows in each sequence)).

    qkv: (3 H, H), query, key and value below one another; biases: theirs.
    """
    operands = (qkv.data, *biases, sequences.cu_seqlens, heads, scale, output.weight.data, output.bias)
    return Half(torch.ops.fastgate_cpu.packed_attention.default, (*operands, *norm[:3]))


def absorbed_half(
    wanted: Tensor,
    query: Product,
    key: Tensor,
    value: Tensor,
    value_bias: Tensor | None,
    sequences: Ragged,
    heads: int,
    scale: float,
    output: Product,
    norm: Norm,
) -> Half | None:
    """h -> LayerNorm(h[wanted] + output(absorbed attention of h[wanted] over h's rows in each sequence)).

    wanted: (sequences,) int64, a row of each sequence; key, value: (H, H). None but for float32 and an H that
    is a multiple of 16.
    """
    if key.shape[0] % 16 or key.dtype != torch.float32:
        return None
    operands = (wanted, query.weight.data, query.bias, key, value, value_bias, sequences.cu_seqlens)
    rest = (heads, scale, output.weight.data, output.bias, *norm[:3])
    return Half(torch.ops.fastgate_cpu.packed_absorbed_attention.default, (*operands, *rest))


def feed_forward_half(up: Product, down: Product, norm: Norm) -> Half:
    """h -> LayerNorm(h + down(gelu(up(h)))), and a second LayerNorm where `norm` has one."""
    operands = (up.weight.data, up.bias, up.weight.shape[0], down.weight.data, down.bias)
    return Half(torch.ops.fastgate_cpu.packed_feed_forward.default, (*operands, *norm))
