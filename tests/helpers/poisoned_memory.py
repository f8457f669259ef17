"""Fresh memory that holds NaN or 3.4e38, so that a kernel which does not write all of its output shows."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# mallopt(M_PERTURB, v) of glibc fills fresh memory with the complement of v: 0x7f7f7f7f is 3.4e38 in float32.
# Compiled kernels allocate below the level at which torch fills with NaN.
M_PERTURB, HUGE = -6, 0x80


@contextmanager
def poisoned() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
    mallopt(M_PERTURB, HUGE)
    try:
        yield
    finally:
        mallopt(M_PERTURB, 0)
        torch.use_deterministic_algorithms(before)
