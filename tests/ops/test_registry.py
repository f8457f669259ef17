"""The registry: its loader, what implementations support, and set_backend."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from helpers.subprocesses import finish, start

from fastgate import env, ops
from fastgate.errors import ArgumentError
from fastgate.ops import backends, fused_layers, registry
from fastgate.ops.linear import missing_for_onednn, pack

COMPILED = pytest.mark.skipif(backends.load_cpu_library() != "", reason=backends.load_cpu_library())
ONEDNN = pytest.mark.skipif(missing_for_onednn() != "", reason=missing_for_onednn())
FP32 = torch.float32


@pytest.fixture
def empty(monkeypatch):
    """As before the first op."""
    for name in ("IMPLEMENTATIONS", "_selected", "_defaults"):
        monkeypatch.setattr(registry, name, {})
    monkeypatch.setattr(registry, "_loader", None)


@pytest.fixture
def restored():
    """Every op runs its default again after the test."""
    yield
    for op in ops.OPS:
        ops.set_backend(op, None)


def ours(op="gated_add_norm", **changes):
    return replace(ops.REFERENCE[op], backend="ours", **changes)


def test_a_loader_that_raises_is_called_again(empty):
    """Its error is every op's, until it succeeds; the reference never runs in its place."""
    calls, implementation = [], ours()

    def load():
        calls.append(None)
        if len(calls) < 3:
            raise RuntimeError(f"attempt {len(calls)}")
        return {("gated_add_norm", "cpu"): implementation}

    registry.register_loader(load)
    for attempt in (1, 2):
        with pytest.raises(RuntimeError, match=f"attempt {attempt}"):
            registry.implementation("gated_add_norm", "cpu", FP32)
    for _ in range(2):
        assert registry.implementation("gated_add_norm", "cpu", FP32) is implementation
    assert len(calls) == 3


@pytest.mark.parametrize("fails", [False, True])
def test_threads_that_arrive_together_wait_for_the_loader(empty, fails):
    calls, results = [], []

    def load():
        calls.append(None)
        time.sleep(0.05)
        if fails and len(calls) == 1:
            raise RuntimeError("once")
        return {("gated_add_norm", "cpu"): ours()}

    def ask(together):
        together.wait()
        try:
            results.append(registry.implementation("gated_add_norm", "cpu", FP32).backend)
        except RuntimeError as error:
            results.append(str(error))

    registry.register_loader(load)
    together = threading.Barrier(8)
    threads = [threading.Thread(target=ask, args=(together,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("ours") == 8 - fails and results.count("once") == fails
    assert len(calls) == 1 + fails


def test_an_implementation_supports_its_dtypes_and_what_fits(empty):
    half = torch.float16
    implementation = ours("attention", dtypes=frozenset({FP32}), fits=lambda head_dim: head_dim == 64)
    assert implementation.supports((FP32,)) and not implementation.supports((FP32, half))
    assert implementation.supports((FP32,), {"head_dim": 64})
    assert not implementation.supports((FP32,), {"head_dim": 32})
    registry.IMPLEMENTATIONS["attention", "cpu"] = implementation
    for dtype, head_dim, want in ((FP32, 64, implementation), (FP32, 32, None), (half, 64, None)):
        chosen = registry.implementation("attention", "cpu", dtype, head_dim=head_dim)
        assert chosen is (want or ops.REFERENCE["attention"])


def test_a_backend_needs_its_versions(monkeypatch):
    backend = replace(backends.BACKENDS[0], missing=lambda: "", versions={"torch": "99.0"})
    assert backend.why_not().startswith(f"needs torch 99.0, {torch.__version__} is installed")
    assert replace(backend, versions={"torch": "2.11", "no-such-package": "1.0"}).why_not() == ""
    assert replace(backend, missing=lambda: "not built").why_not() == "not built"


def norm_call():
    x, one = torch.linspace(-1.0, 1.0, 24).view(3, 8), torch.ones(8)
    return ops.gated_add_norm(x, x, one, one, 1e-5)


@COMPILED
def test_set_backend_chooses_and_restores(restored, monkeypatch):
    assert registry.implementation("gated_add_norm", "cpu", FP32).backend == "cpp"
    compiled = norm_call()
    called = []
    reference = ops.REFERENCE["gated_add_norm"]
    spy = replace(reference, forward=lambda *operands: called.append(None) or reference.forward(*operands))
    monkeypatch.setitem(registry.REFERENCE, "gated_add_norm", spy)
    ops.set_backend("gated_add_norm", "reference")
    torch.testing.assert_close(norm_call(), compiled)
    assert called and ((("gated_add_norm", "cpu"), "reference")) in registry.selections()
    ops.set_backend("gated_add_norm", "cpp", device="cpu")
    assert registry.implementation("gated_add_norm", "cpu", FP32).backend == "cpp"
    ops.set_backend("gated_add_norm", None)
    assert registry.selections() == () and torch.equal(norm_call(), compiled)
    assert len(called) == 1


@COMPILED
def test_env_shows_what_set_backend_chose(restored):
    def rows():
        listed = [op for op in env.collect()["ops"] if op["op"] == "attention" and op["device"] == "cpu"]
        return {op["backend"]: (op["chosen"], op["reason"]) for op in listed}

    before = rows()
    assert before["cpp"] == (True, "float32 and bfloat16")
    ops.set_backend("attention", "reference")
    assert rows() == {
        "cpp": (False, "set_backend chose reference"),
        "reference": (True, "every dtype: set_backend chose it"),
    }
    ops.set_backend("attention", None)
    assert rows() == before


@COMPILED
@pytest.mark.parametrize("op", [*fused_layers.OPS, *fused_layers.PRODUCT_OPS])
def test_fused_layers_leave_an_op_to_the_reference_that_was_chosen(op, restored):
    rows = torch.zeros(2, 32)
    with torch.no_grad():
        assert fused_layers.runs(rows)
        ops.set_backend(op, "reference")
        assert not fused_layers.runs(rows)
        ops.set_backend(op, None)
        assert fused_layers.runs(rows)


@ONEDNN
def test_a_chosen_reference_multiplies_packed_weights_too(restored, monkeypatch):
    x, weight, bias = torch.randn(5, 32), torch.randn(64, 32), torch.randn(64)
    packed = pack(weight)
    ops.set_backend("linear", "reference")
    ops.set_backend("linear_gelu", "reference")

    def refuse(*operands):
        raise AssertionError("oneDNN was called")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", refuse)
    product = torch.nn.functional.linear(x, weight)
    assert torch.equal(ops.linear(x, packed), product) and torch.equal(ops.linear(x, weight), product)
    want = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
    assert torch.equal(ops.linear_gelu(x, packed, bias), want)
    assert torch.equal(ops.linear_gelu(x, weight, bias), want)


@COMPILED
def test_gradients_may_be_asked_for_after_another_backend_was_chosen(restored):
    x = torch.randn(5, 8, requires_grad=True)
    offsets = ops.SequenceOffsets.from_lengths((2, 3))
    grads = []
    for after in ("cpp", "reference"):
        out = ops.attention(x, x, x, offsets, offsets, 2, 0.5)
        ops.set_backend("attention", after)
        grads.append(torch.autograd.grad(out.square().sum(), x)[0])
        ops.set_backend("attention", None)
    torch.testing.assert_close(*grads)


REFUSED = {
    "op": (("gelu", "cpp"), {}, r"op: got 'gelu', wanted one of .*attention.*; pass the name of an op"),
    "name": (("attention", "fast"), {}, r"name: got 'fast', wanted one of cpp, triton, reference, or None"),
    "another op's": (("attention", "onednn"), {}, "name: got 'onednn', wanted one of cpp, triton, reference"),
    "device": (("linear", "onednn"), {"device": "cuda"}, "device: got 'cuda', wanted one of cpu"),
    "no device": (
        ("attention", "cpp"),
        {"device": "toaster"},
        "device: got 'toaster', wanted one of cpu, cuda",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_set_backend_refuses_by_name(what):
    arguments, named, message = REFUSED[what]
    with pytest.raises(ArgumentError, match=f"^set_backend: {message}"):
        ops.set_backend(*arguments, **named)
    assert registry.selections() == ()


def test_set_backend_says_why_a_backend_cannot_run(monkeypatch):
    monkeypatch.setattr(backends, "missing_for_triton", lambda: "no CUDA device")
    message = "name: got 'triton', wanted one that runs here: no CUDA device; see python -m fastgate.env"
    with pytest.raises(ArgumentError, match=message):
        ops.set_backend("attention", "triton")
    assert registry.selections() == ()


def test_set_backend_from_many_threads(restored):
    """Every call runs one of the two, and the last choice stays."""
    want, errors = norm_call(), []

    def choose(name):
        try:
            for _ in range(200):
                ops.set_backend("gated_add_norm", name)
                torch.testing.assert_close(norm_call(), want)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=choose, args=(name,)) for name in ("reference", None) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    ops.set_backend("gated_add_norm", "reference")
    assert registry.implementation("gated_add_norm", "cpu", FP32) is ops.REFERENCE["gated_add_norm"]


FORCED = """
import torch
torch.cuda.is_available = lambda: True  # as on a machine with a GPU, which is not reached
from fastgate import ops
from fastgate.errors import ArgumentError
from fastgate.ops import backends
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


@pytest.mark.slow
@pytest.mark.parametrize("forced", ["cuda", "nonsense"])
def test_a_forced_language_that_cannot_run_is_every_ops_error(forced, monkeypatch):
    monkeypatch.setenv("FASTGATE_CUDA", forced)
    *errors, implementations = finish(start(FORCED)).splitlines()
    assert len(errors) == 3 and len(set(errors)) == 1
    assert errors[0].startswith(f"FASTGATE_CUDA: value: got '{forced}', wanted one ")
    assert implementations == "{}"


def test_a_library_that_does_not_load_is_said(tmp_path):
    library = tmp_path / "libfastgate_cpu.so"
    library.write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match=r"libfastgate_cpu\.so does not load under torch"):
        reason = backends._load(library, "reason", "fastgate_cpu", ("attention",))
    assert "does not load" in reason


TRACED = """
import torch
from fastgate.ops.gated_add_norm import gated_add_norm

x, one = torch.randn(3, 8), torch.ones(8)
function = lambda x: gated_add_norm(x, x, one, one, 1e-5) + 1
found = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
assert torch.allclose(found, function(x))
"""


@pytest.mark.slow
def test_the_first_op_may_be_compiled():
    finish(start(TRACED))


@pytest.mark.slow
def test_linear_may_be_the_first_op_and_compiled():
    code = (
        "import torch; from fastgate.ops.linear import linear; "
        "f = torch.compile(lambda a, b: linear(a, b) + 1, fullgraph=True, backend='eager'); "
        "print(tuple(f(torch.randn(4, 8), torch.randn(5, 8, requires_grad=True)).shape))"
    )
    assert finish(start(code)).strip() == "(4, 5)"


def test_selections_may_be_read_while_another_thread_selects():
    stop, errors = threading.Event(), []

    def select():
        while not stop.is_set():
            for name in ("reference", None):
                for op in ("attention", "shift_norm", "gated_add_norm"):
                    ops.set_backend(op, name, device="cpu")

    def read():
        try:
            for _ in range(20_000):
                registry.selections()
        except RuntimeError as error:
            errors.append(error)

    interval, thread = sys.getswitchinterval(), threading.Thread(target=select)
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        read()
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
        for op in ("attention", "shift_norm", "gated_add_norm"):
            ops.set_backend(op, None, device="cpu")
    assert not errors
