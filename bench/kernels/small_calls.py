"""Every GPU kernel once or twice on small, odd shapes, for compute-sanitizer to watch: see bench/gpu.sh.

A memory checker slows a launch down a hundredfold, so the shapes are the smallest that reach every path: rows
that do not fill a block, widths that are no multiple of a vector, sequences of length 0 and 1, with dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgate import ops
from fastgate.ops import backends
from fastgate.ops.absorbed_attention import absorbed_attention
from fastgate.ops.attention import attention
from fastgate.ops.embed_norm import embed_norm
from fastgate.ops.gated_add_norm import gated_add_norm
from fastgate.ops.linear_gelu import linear_gelu
from fastgate.ops.ragged import SequenceOffsets

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.bfloat16, torch.float32)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def trained(y: Tensor) -> None:
    y.float().square().sum().backward()
    assert y.isfinite().all()


def norms(dtype: torch.dtype) -> None:
    ops.implementation("gated_add_norm", DEVICE.type)  # the first call fills the slots, which are set here
    for language in backends.implementations("gated_add_norm", DEVICE.type)[1:]:
        ops.IMPLEMENTATIONS["gated_add_norm", DEVICE.type] = language
        for rows, hidden in ((13, 771), (5, 384), (3, 4100)):
            x, residual = draw(rows, hidden, dtype=dtype), draw(rows, hidden, dtype=dtype)
            vectors = [draw(hidden, dtype=dtype) for _ in range(5)]
            bias, scale, shift = vectors[2:]
            gate = draw(dtype=torch.float32)
            gated = {"bias": bias, "gate": gate, "scale": scale, "offset": shift, "dropout_p": 0.1}
            trained(gated_add_norm(x, residual, *vectors[:2], 1e-5, **gated))
            trained(
                gated_add_norm(x, residual, *vectors[:2], 1e-5, weight2=bias, norm_bias2=scale, eps2=1e-5)
            )


def attentions(dtype: torch.dtype) -> None:
    for lengths, heads, hidden in (((5, 0, 1, 33), 2, 128), ((70, 3, 130), 1, 128), ((40, 9), 2, 64)):
        rows = SequenceOffsets(lengths, DEVICE)
        q, k, v = (draw(rows.rows, hidden, dtype=dtype) for _ in range(3))
        for dropout_p in (0.0, 0.1):
            trained(attention(q, k, v, rows, rows, heads, 0.2, dropout_p))
        one = draw(len(lengths), hidden, dtype=dtype)
        key, value = draw(hidden, hidden, dtype=dtype), draw(hidden, hidden, dtype=dtype)
        for dropout_p in (0.0, 0.1):
            bias = draw(hidden, dtype=dtype)
            trained(absorbed_attention(one, q, key, value, bias, rows, heads, 0.2, dropout_p))


def products(dtype: torch.dtype) -> None:
    for rows, depth, width in ((37, 384, 1536), (200, 70, 129)):
        x, weight = draw(rows, depth, dtype=dtype), draw(width, depth, dtype=dtype)
        trained(linear_gelu(x, weight, draw(width, dtype=dtype)))


def embeddings(dtype: torch.dtype) -> None:
    for hidden in (384, 771):
        words, positions = torch.randint(50, (19,), device=DEVICE), torch.arange(19, device=DEVICE)
        tables = [draw(count, hidden, dtype=dtype) for count in (50, 20, 2)]
        vectors = [draw(hidden, dtype=dtype) for _ in range(4)]
        second = {"weight2": vectors[2], "norm_bias2": vectors[3], "eps2": 1e-5}
        for given in ({}, second):
            trained(embed_norm(words, positions, None, *tables, *vectors[:2], 1e-5, dropout_p=0.1, **given))


def main() -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        for calls in (norms, attentions, products, embeddings):
            calls(dtype)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print("all calls finite")


if __name__ == "__main__":
    main()
