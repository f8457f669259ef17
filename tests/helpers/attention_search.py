"""The search of attention's programs for their sequence, against a count on the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgate.kernels.attention_tiles import find_sequence


@triton.jit
def _search(
    cu_ptr,  # (sequences + 1,)
    found_ptr,  # (tiles,) int32
    sequences,
    find: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    tl.store(found_ptr + tile, find(cu_ptr, sequences, tile, BLOCK))


def check(device: torch.device) -> None:
    """One sequence, a few, and enough for a second round of probes."""
    block = 64
    generator = torch.Generator().manual_seed(0)
    for sequences in (1, 3, 150) if device.type == "cpu" else (1, 2, 127, 128, 129, 16385):
        lengths = torch.randint(0, 130, (sequences,), generator=generator)
        lengths[torch.rand(sequences, generator=generator) < 0.2] = 0
        cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(torch.int32)
        tiles = int(cu[-1]) // block + sequences
        found = torch.full((tiles,), -1, dtype=torch.int32, device=device)
        _search[(tiles,)](cu.to(device), found, sequences, find_sequence, block)
        slots = cu[:-1] // block + torch.arange(sequences)
        assert torch.equal(
            found.cpu(), (torch.searchsorted(slots, torch.arange(tiles), right=True) - 1).int()
        )
        blocks = torch.bincount(found.cpu(), minlength=sequences)
        assert (blocks * block >= lengths).all(), "a sequence has too few slots"
