"""The dropout mask of every backend: Philox words against an integer threshold."""

from __future__ import annotations

import torch
from torch import Tensor

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def dropout_threshold(dropout_p: float) -> int:
    """The unsigned 32-bit number below which a Philox word drops its element."""
    return min(round(dropout_p * 2.0**32), WORD)


def philox(key: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox 4x32-10 (Salmon et al. 2011): four words from four.

    key: int64 seed; counter: int64 tensors that hold unsigned 32-bit words, as do the four returned.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & WORD, (key >> 32) & WORD
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _wide_product(c0, PHILOX_MULTIPLIERS[0])
        high1, low1 = _wide_product(c2, PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + PHILOX_WEYL[0]) & WORD, (k1 + PHILOX_WEYL[1]) & WORD
    return c0, c1, c2, c3


def _wide_product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b: int64 products wrap, so the bits are those of the unsigned product."""
    product = a * b
    return (product >> 32) & WORD, product & WORD


def keep_mask(seed: Tensor, rows: int, hidden: int, dropout_p: float) -> Tensor:
    """The dropout mask of every backend: bool (rows, hidden), True where kept.

    seed: int64, one element. Element (row, column) is decided by word `column % 4` of the Philox counter
    (row low, row high, column // 4, 0) under the key `seed`, kept if it reaches the integer threshold.
    """
    device = seed.device
    row = torch.arange(rows, device=device).unsqueeze(1)
    group = torch.arange((hidden + 3) // 4, device=device).unsqueeze(0)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox(seed.reshape(()), (row & WORD, row >> 32, group, zero))
    words_by_column = torch.stack(words, dim=-1).reshape(rows, 4 * group.shape[1])
    return words_by_column[:, :hidden] >= dropout_threshold(dropout_p)
