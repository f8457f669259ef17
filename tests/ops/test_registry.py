"""The registry's loader: called once, by whichever thread comes first, and again as long as it fails."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from helpers.subprocesses import finish, start

from fastgate import ops
from fastgate.ops import backends, registry


@pytest.fixture
def empty(monkeypatch):
    """As before the first op."""
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", {})
    monkeypatch.setattr(registry, "_fill", None)


def test_a_loader_that_raises_is_called_again(empty):
    """Its error is every op's, until it succeeds."""
    calls = []
    ours = replace(ops.REFERENCE["gated_add_norm"], backend="ours")

    def fill():
        calls.append(None)
        if len(calls) < 3:
            raise RuntimeError(f"attempt {len(calls)}")
        registry.IMPLEMENTATIONS["gated_add_norm", "cpu"] = ours

    registry.register_loader(fill)
    for attempt in (1, 2):
        with pytest.raises(RuntimeError, match=f"attempt {attempt}"):
            registry.implementation("gated_add_norm", "cpu", torch.float32)
    for _ in range(2):
        assert registry.implementation("gated_add_norm", "cpu", torch.float32) is ours
    assert len(calls) == 3


@pytest.mark.parametrize("fails", [False, True])
def test_threads_that_arrive_together_wait_for_the_loader(empty, fails):
    ours = replace(ops.REFERENCE["gated_add_norm"], backend="ours")
    calls, found = [], []

    def fill():
        calls.append(None)
        time.sleep(0.05)
        if fails and len(calls) == 1:
            raise RuntimeError("once")
        registry.IMPLEMENTATIONS["gated_add_norm", "cpu"] = ours

    def ask(together):
        together.wait()
        try:
            found.append(registry.implementation("gated_add_norm", "cpu", torch.float32).backend)
        except RuntimeError as error:
            found.append(str(error))

    registry.register_loader(fill)
    together = threading.Barrier(8)
    threads = [threading.Thread(target=ask, args=(together,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.count("ours") == 8 - fails and found.count("once") == fails
    assert len(calls) == 1 + fails


FORCED = """
import torch
torch.cuda.is_available = lambda: True  # as on a machine with a GPU, which is not reached
from fastgate import backends, ops
from fastgate.errors import ArgumentError
from fastgate.ops.gated_add_norm import gated_add_norm

backends.CUDA_LIBRARY = backends.CUDA_LIBRARY.with_name("none.so")
x, one = torch.randn(3, 8), torch.ones(8)
for attempt in range(3):
    try:
        gated_add_norm(x, x, one, one, 1e-5)
    except ArgumentError as error:
        print(error)
print(ops.IMPLEMENTATIONS)
"""


@pytest.mark.parametrize("forced", ["cuda", "nonsense"])
def test_a_forced_language_that_cannot_run_is_every_ops_error(forced, monkeypatch):
    monkeypatch.setenv("FASTGATE_CUDA", forced)
    *errors, slots_left = finish(start(FORCED)).splitlines()
    assert len(errors) == 3 and len(set(errors)) == 1
    assert errors[0].startswith(f"FASTGATE_CUDA: value: got '{forced}', wanted one ")
    assert slots_left == "{}"


def test_a_library_that_does_not_load_is_said(tmp_path):
    library = tmp_path / "libfastgate_cpu.so"
    library.write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match=r"libfastgate_cpu\.so does not load under torch"):
        reason = backends._load(library, "reason", "fastgate_cpu", ("attention",))
    assert "does not load" in reason


COMPILED = """
import torch
from fastgate.ops.gated_add_norm import gated_add_norm

x, one = torch.randn(3, 8), torch.ones(8)
function = lambda x: gated_add_norm(x, x, one, one, 1e-5) + 1
found = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
assert torch.allclose(found, function(x))
"""


def test_the_first_op_may_be_compiled():
    finish(start(COMPILED))
