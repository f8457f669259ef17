"""What the timings stand on: the thread counts to time at, and no figure from a wrong result."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(params=sorted({1, os.cpu_count() or 1}), ids=lambda n: f"{n}thread")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
