"""Half layers of encoders from packed weights, for inference on the CPU: any number in one compiled call.

What they compute is what their steps compute one by one. A small batch feels what the calls between cost, all
the more as the weights that pass through the caches push out what the calls need.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgate.ops import autograd, registry
from fastgate.ops.linear import ONEDNN_DTYPES, Packed

COMPILED_OP = "fused_layers"
OPS = ("attention", "absorbed_attention", "gated_add_norm", "shift_norm")  # what it calls, besides products
PRODUCT_OPS = ("linear", "linear_gelu")
# Kinds of half layers. csrc/cpu/half_layers.h has the same.
ATTENTION, ABSORBED, FEED_FORWARD, SHIFT_NORM = range(4)
ALL_ROWS = -1  # the halo of a shift_norm that leaves no row out
_ATTENTION_END = ("output", "output_bias", "norm_weight", "norm_bias")
# Kind -> the operands of a half layer, in the compiled op's order; csrc/cpu/half_layers.h has the same.
OPERANDS = {
    ATTENTION: ("qkv", "q_bias", "k_bias", "v_bias", *_ATTENTION_END),
    ABSORBED: ("query", "q_bias", "key", "value", "v_bias", *_ATTENTION_END),
    FEED_FORWARD: (
        "up", "up_bias", "down", "down_bias", "norm_weight", "norm_bias", "norm_weight2", "norm_bias2",
    ),
    SHIFT_NORM: ("offset", "scale", "before", "after", "norm_weight", "norm_bias"),
}  # fmt: skip


class NormOperands(NamedTuple):
    """A LayerNorm's operands, (H,) each, and those of a second one behind it, where there is one."""

    weight: Tensor
    bias: Tensor
    eps: float
    weight2: Tensor | None = None
    norm_bias2: Tensor | None = None
    eps2: float = 0.0


class LinearOperands(NamedTuple):
    """A Linear: its packed weight (N, K), its bias (N,) or None."""

    weight: Packed
    bias: Tensor | None


class HalfLayer(NamedTuple):
    """A half layer as the compiled op takes it. size: heads, columns of the first product, or a token shift's
    halo. numbers: eps, and attention's scale or the second eps. norm: computes the weight and bias of the
    first LayerNorm, where they are no parameters."""

    kind: int
    size: int
    numbers: tuple[float, float]
    operands: tuple[Tensor | None, ...]
    norm: Callable[[], tuple[Tensor, Tensor]] | None = None


def runs(h: Tensor) -> bool:
    """Whether fused calls may run on rows like these, (rows, H).

    The compiled kernels are what runs their steps, and nothing traces, asks for a gradient or casts.
    """
    return (
        h.dtype in ONEDNN_DTYPES
        and h.device.type == "cpu"
        and registry.bypasses_dispatcher(h)
        and not autograd.any_requires_grad(h)
        and not torch.is_autocast_enabled("cpu")
        and all(registry.implementation(op, "cpu").fused for op in OPS)
        and not any(registry.reference_is_selected(op, "cpu") for op in PRODUCT_OPS)
        and hasattr(torch.ops.fastgate_cpu, COMPILED_OP)
    )


def attention_half_layer(
    qkv: Packed,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    heads: int,
    scale: float,
    output: LinearOperands,
    norm: NormOperands,
) -> HalfLayer:
    """h -> LayerNorm(h + output(attention of h's rows in each sequence)).

    qkv: (3 H, H), query, key and value below one another; biases: theirs.
    """
    operands = (qkv.data, *biases, output.weight.data, output.bias, norm.weight, norm.bias)
    return HalfLayer(ATTENTION, heads, (norm.eps, scale), operands)


def absorbed_half_layer(
    query: LinearOperands,
    key: Tensor,
    value: Tensor,
    value_bias: Tensor | None,
    heads: int,
    scale: float,
    output: LinearOperands,
    norm: NormOperands,
) -> HalfLayer | None:
    """h -> LayerNorm(q + output(absorbed attention of q over h's rows in each sequence)), q = h[output_rows].

    key, value: (H, H). None but for an H that is a multiple of 16.
    """
    if key.shape[0] % 16:
        return None
    operands = (query.weight.data, query.bias, key, value, value_bias, output.weight.data, output.bias)
    return HalfLayer(ABSORBED, heads, (norm.eps, scale), (*operands, norm.weight, norm.bias))


def feed_forward_half_layer(
    up: LinearOperands,
    down: LinearOperands,
    norm: NormOperands,
    compute_norm: Callable[[], tuple[Tensor, Tensor]] | None = None,
) -> HalfLayer:
    """h -> LayerNorm(h + down(gelu(up(h)))), and a second LayerNorm where `norm` has one.

    compute_norm: computes the weight and bias of the first one, where they are no parameters.
    """
    operands = (up.weight.data, up.bias, down.weight.data, down.bias, norm.weight, norm.bias)
    second = (norm.weight2, norm.norm_bias2)
    return HalfLayer(
        FEED_FORWARD, up.weight.shape[0], (norm.eps, norm.eps2), (*operands, *second), compute_norm
    )


def shift_half_layer(
    vectors: tuple[Tensor, Tensor, Tensor, Tensor], norm: NormOperands, halo: int | None = None
) -> HalfLayer:
    """h -> LayerNorm(h + r(h)), as shift_norm. vectors: offset, scale, before, after, (H,) each.

    halo: h are the rows within halo + 1 hops of those that the head reads, and the result are those within
    `halo` hops. None: all rows, of all.
    """
    size = ALL_ROWS if halo is None else halo
    return HalfLayer(SHIFT_NORM, size, (norm.eps, 0.0), (*vectors, norm.weight, norm.bias))


class FusedSegment:
    """Half layers that follow one another, as one compiled call.

    has_token_shift: one of them is a token shift. has_halo: on fewer rows than there are.
    """

    def __init__(self, half_layers: Sequence[HalfLayer]):
        self.operands = [t for half in half_layers for t in half.operands]
        begins = itertools.accumulate((len(half.operands) for half in half_layers), initial=0)
        places = zip(begins, half_layers, strict=False)
        self.computed_norms = [
            (at + OPERANDS[half.kind].index("norm_weight"), half.norm)
            for at, half in places
            if half.norm is not None
        ]
        self.kinds = [number for half in half_layers for number in (half.kind, half.size)]
        self.numbers = [number for half in half_layers for number in half.numbers]
        halos = {half.size for half in half_layers if half.kind == SHIFT_NORM}
        self.has_token_shift, self.has_halo = bool(halos), bool(halos - {ALL_ROWS})

    def __call__(
        self, h: Tensor, cu_seqlens: Tensor, output_rows: Tensor | None, neighbours: list[Tensor]
    ) -> Tensor:
        """From rows (rows, H) to rows of that dtype and width.

        cu_seqlens: (sequences + 1,) int32, their ends. output_rows: (sequences,) int64, a row of each
        sequence, for absorbed attention. neighbours: with a token shift one tensor, (rows,) bool, as
        shift_norm takes it. With a halo two for each number of hops from 0 up: that of the rows within
        hops + 1, and which of those are within `hops`, int64.
        """
        operands = self.operands
        if self.computed_norms:
            operands = list(operands)
            for at, norm in self.computed_norms:
                operands[at : at + 2] = norm()
        call = getattr(torch.ops.fastgate_cpu, COMPILED_OP).default
        rows: Tensor = call(h, operands, self.kinds, self.numbers, cu_seqlens, output_rows, neighbours)
        return rows
