"""Times embed_norm, forward and backward, against torch: `pytest bench/kernels/bench_embed_norm.py`.

Ids fall off as words do (uniform in the logarithm of the rank) over BERT's vocabulary. Backward's time is
mostly the tables' gradients, which are dense, as nn.Embedding's are.
"""

from __future__ import annotations

import harness
import kernel_baselines
import pytest
import torch
from harness import DEVICE, ON_GPU, Work
from torch import Tensor
from torch.nn.functional import embedding, layer_norm

from fastgate.ops.embed_norm import embed_norm

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 3e-2 if ON_GPU else 1e-5
ROWS = (512, 4096, 32768, 131072) if ON_GPU else (32, 800)
HIDDEN = (384, 768, 1024)
VOCABULARY, POSITIONS, TYPES = 30522, 512, 2
EPS = 1e-12
IMPLEMENTATIONS = ("fastgate", "eager", "compile")


def fused(words: Tensor, positions: Tensor, types: Tensor, *rest: Tensor) -> Tensor:
    return embed_norm(words, positions, types, *rest, EPS)


def eager(words, positions, types, word_table, position_table, type_table, weight, norm_bias):
    u = embedding(words, word_table) + embedding(types, type_table) + embedding(positions, position_table)
    return layer_norm(u, weight.shape, weight, norm_bias, EPS)


def operands(rows: int, hidden: int, sets: int) -> list[list[Tensor]]:
    """(words, positions, types, three tables, weight, norm_bias); the parameters are the same in all sets."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(DTYPE)

    def ids() -> list[Tensor]:
        ranks = VOCABULARY ** torch.rand(rows, generator=generator, device=DEVICE)
        positions = torch.arange(rows, device=DEVICE) % POSITIONS
        return [ranks.long().clamp_max(VOCABULARY - 1), positions, torch.zeros_like(positions)]

    parameters = [draw(n, hidden) for n in (VOCABULARY, POSITIONS, TYPES)] + [draw(hidden), draw(hidden)]
    return [[*ids(), *parameters] for _ in range(sets)]


def forward(rows: int, hidden: int) -> Work:
    """A word's row read and one written; positions' and types' rows come out of the cache."""
    size = rows * (2 * hidden * DTYPE.itemsize + 3 * 8)
    given = operands(rows, hidden, harness.sets_for(size))
    group = f"embed_norm forward {rows}x{hidden} {str(DTYPE).removeprefix('torch.')}"
    return kernel_baselines.inference_work(group, fused, eager, given, size, TOLERANCE)


def backward(rows: int, hidden: int) -> Work:
    """dy and a word's row read, du written and read by each table, and the tables' gradients written."""
    tables = (VOCABULARY + POSITIONS + TYPES) * hidden
    size = (6 * rows * hidden + tables) * DTYPE.itemsize
    given = operands(rows, hidden, harness.sets_for(size))
    grads = [torch.randn(rows, hidden, device=DEVICE).to(DTYPE) for _ in given]
    group = f"embed_norm backward {rows}x{hidden} {str(DTYPE).removeprefix('torch.')}"
    return kernel_baselines.differentiation_work(group, fused, eager, given, grads, size, TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("rows", ROWS)
def test_forward(report, rows, hidden, implementation):
    report(forward, (rows, hidden), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("rows", ROWS)
def test_backward(report, rows, hidden, implementation):
    report(backward, (rows, hidden), implementation)
