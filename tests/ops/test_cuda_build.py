"""gated_add_norm in CUDA C++: what nvcc makes of it, its arithmetic on an emulated device, and a real one."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import cubin_stats, cuda_resources, subprocesses
from helpers.cases import BF16, DTYPES, FP16, FP32, SHAPES, Dtypes
from helpers.norm_cases import CALLS, SEED, check, make, requested_bits, run
from helpers.op_checks import assert_same_bits
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from fastgate import env, ops
from fastgate.ops import backends, reference
from fastgate.ops.gated_add_norm import OPERANDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests" / "emulator"
TORCH = Path(torch.__file__).parent
A100_SHARED = 163 * 1024

needs_nvcc = pytest.mark.skipif(cuda_resources.nvcc() is None, reason="nvcc is not installed")
needs_cuobjdump = pytest.mark.skipif(
    cubin_stats.cuobjdump() is None, reason="cuobjdump: triton is not installed"
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
missing = backends.load_cuda_library()
needs_library = pytest.mark.skipif(missing != "", reason=f"libfastgate_cuda.so: {missing}")
TABLE = json.loads(cuda_resources.TABLE.read_text())


@pytest.mark.parametrize("architecture", cuda_resources.ARCHITECTURES)
def test_the_table_of_resources_has_no_spill_and_wide_rows(architecture):
    """No local memory. Rows of one 16-bit type move 16 bytes an access throughout: what is narrower are the
    gate (in any of three types) and the seed. Elsewhere 16-bit elements move 8 bytes beside float32's 16."""
    kernels = TABLE["kernels"][architecture]
    assert len(kernels) == 26
    for name, kernel in kernels.items():
        assert (kernel["local"], kernel["stack"]) == (0, 0), name
        if "x=bfloat16 residual=bfloat16" in name or "x=float16 residual=float16" in name:
            assert kernel["wide"] >= 40 and kernel["narrow"] <= 4, name
        elif "x=" in name and "mixed" not in name:
            assert kernel["wide"] > 0, name
    assert max(kernel["registers"] for name, kernel in kernels.items() if "backward" in name) <= 128


@needs_nvcc
@needs_cuobjdump
def test_the_table_of_resources_is_what_nvcc_makes():
    """One architecture, to save time; `cd tests && python -m helpers.cuda_resources` compares all three."""
    if cuda_resources.nvcc_version() != TABLE["nvcc"]:
        pytest.skip(f"nvcc {cuda_resources.nvcc_version()}, and the table is of {TABLE['nvcc']}")
    assert cuda_resources.compiled("sm_90") == TABLE["kernels"]["sm_90"]


@needs_library
def test_the_library_loads_without_a_gpu_and_refuses_cpu_tensors():
    code = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "x, vector = torch.randn(3, 8), torch.ones(8)\n"
        "operands = (x, x, vector, vector, 1e-5, *[None] * 4, 0.0, *[None] * 3, 0.0)\n"
        "calls = (('gated_add_norm', operands), ('gated_add_norm_backward', (x, *operands, 3)))\n"
        "for op, arguments in calls:\n"
        "    print(getattr(torch.ops.fastgate_cuda, op).default._schema)\n"
        "    try:\n"
        "        getattr(torch.ops.fastgate_cuda, op)(*arguments)\n"
        "    except NotImplementedError as error:\n"
        "        print(str(error).splitlines()[0])\n"
    )
    output = subprocesses.finish(subprocesses.start(code, backends.CUDA_LIBRARY))
    assert "fastgate_cuda::gated_add_norm(Tensor x" in output
    for op in ("gated_add_norm", "gated_add_norm_backward"):
        assert f"Could not run 'fastgate_cuda::{op}' with arguments from the 'CPU' backend" in output


@needs_library
def test_the_library_has_no_python_symbol_and_carries_its_runtime():
    library = backends.CUDA_LIBRARY.read_bytes()
    assert b"PyInit" not in library and b"libtorch_python" not in library
    assert b"libtorch_cpu.so" in library and b"libcudart.so" not in library


# ---- the kernels' own source on an emulated device, tests/emulator ----


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """(backend on CPU tensors, its library): the kernels run in coroutines, the stream comes from a stub."""
    if torch.version.cuda is not None and not torch.cuda.is_available():
        pytest.skip("torch's own CUDA library is in the process, and has no device to give a stream of")
    folder = tmp_path_factory.mktemp("emulated")
    stub = "int aoti_torch_get_current_cuda_stream(int device, void** s) { *s = (void*)0x1234; return 0; }"
    command = ["g++", "-x", "c", "-", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
    subprocess.run([*command, "-o", folder / "libtorch_cuda.so"], input=stub, text=True, check=True)
    if not torch.cuda.is_available():  # else the real one is in the process
        ctypes.CDLL(str(folder / "libtorch_cuda.so"))
    library = folder / "libfastgate_emulated.so"
    setup = (ROOT / "setup.py").read_text()
    target = setup.split('TORCH_TARGET = "')[1].split('"')[0]
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    command += [f"-DTORCH_TARGET_VERSION={target}", "-I", EMULATOR, "-I", ROOT / "csrc"]
    command += ["-isystem", TORCH / "include", EMULATOR / "gated_add_norm.cpp", "-o", library]
    subprocess.run([*command, "-L", TORCH / "lib", "-ltorch_cpu"], check=True)
    torch.ops.load_library(str(library))
    op = torch.ops.fastgate_emulated
    backend = ops.Implementation(
        "emulated",
        op.gated_add_norm.default,
        op.gated_add_norm_backward.default,
        frozenset(backends.GPU_DTYPES),
    )
    handle = ctypes.CDLL(str(library))
    handle.last_stream.restype = ctypes.c_void_p
    handle.emulate(3, A100_SHARED)
    return backend, handle


EMULATED_CASES = [
    ((0, 384), DTYPES, ("everything",)),
    ((3, 1), DTYPES[:1], CALLS),  # one channel: the variance is zero
    ((5, 7), DTYPES, CALLS),  # every type, one by one
    ((2, 3, 384), DTYPES, ("everything", "two norms and dropout")),  # two warps a row backwards
    ((31, 768), DTYPES[1:3], ("everything",)),  # several rows a team, and three warps a row
    ((4, 1024), DTYPES[:2], ("two norms and dropout",)),
    ((3, 771), DTYPES[1:2], ("everything",)),
    # sixteen warps a row
    ((2, 8192), (*DTYPES[:2], Dtypes(FP16, FP32, FP32, "")), ("two norms and dropout",)),
    ((3, 40), (Dtypes(BF16, FP16, FP32, ""), Dtypes(FP16, FP32, BF16, "")), ("everything",)),
]


@needs_compiler
@pytest.mark.parametrize(
    ("sizes", "dtypes", "call"),
    [
        pytest.param(sizes, dtypes, call, id=f"{'x'.join(map(str, sizes))}-{dtypes}-{call}")
        for sizes, several, calls in EMULATED_CASES
        for dtypes in several
        for call in calls
    ],
)
def test_the_kernels_are_as_exact_as_torch_emulated(emulated, sizes, dtypes, call, poisoned):
    backend, library = emulated
    check(backend, make(sizes, dtypes, call))
    assert torch.cuda.is_available() or sizes[0] == 0 or library.last_stream() == 0x1234


@needs_compiler
def test_sums_that_exceed_shared_memory_take_more_launches(emulated):
    backend, library = emulated
    given = make((3, 5000), DTYPES[0], "two norms and dropout")
    grad = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1))
    first = run(backend, given, grad)
    library.emulate(3, 70 * 1024)
    again = run(backend, given, grad)
    library.emulate(3, A100_SHARED)
    assert_same_bits(first, again)


@needs_compiler
def test_bits_do_not_depend_on_alignment_emulated(emulated):
    given = make((5, 384), DTYPES[1], "everything")
    grad = torch.randn(5, 384, generator=torch.Generator().manual_seed(1))
    first = run(emulated[0], given, grad)
    room = torch.empty(5 * 384 + 3, dtype=torch.bfloat16)
    moved = {**given, "x": room[3:].view(5, 384).copy_(given["x"])}
    assert_same_bits(first, run(emulated[0], moved, grad))


@needs_compiler
@pytest.mark.parametrize("hidden", [7, 64])
@pytest.mark.parametrize("seed", [0, SEED, -3])
def test_masks_are_the_reference_s_emulated(emulated, seed, hidden):
    _masks_agree(emulated[0], seed, hidden, "cpu")


def _masks_agree(backend, seed, hidden, device):
    """x's gradient is zero where it was dropped, and there only."""
    rows = 9
    given = make((rows, hidden), DTYPES[0], "plain")
    given.update(dropout_p=0.4, seed=torch.tensor(seed))
    mask = reference.keep_mask(given["seed"], rows, hidden, 0.4)
    grad = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(1))
    _, grads = run(backend, _to(given, device), grad.to(device))
    assert torch.equal(grads["x"].cpu() != 0, mask)


def test_info_names_the_cuda_backend_and_why_it_does_not_run(monkeypatch):
    monkeypatch.delenv("FASTGATE_CUDA", raising=False)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type != "cuda":
        pytest.skip(f"the accelerator is {accelerator.type}")
    report = env.collect()
    (candidate,) = [c for c in report["ops"] if (c["op"], c["backend"]) == ("gated_add_norm", "cuda")]
    assert candidate["device"] == "cuda"
    assert candidate["chosen"] == (accelerator is not None and not missing)
    if not candidate["chosen"]:
        assert candidate["reason"] == (missing or "no CUDA device")
    text = " ".join(env.render(report).split())  # long lines are wrapped
    assert "gated_add_norm on cuda: cuda" in text and candidate["reason"] in text


def test_the_forced_language_is_checked(monkeypatch):
    monkeypatch.setenv("FASTGATE_CUDA", "opencl")
    with pytest.raises(ValueError, match="FASTGATE_CUDA: value: got 'opencl', wanted one of cuda"):
        backends.forced_language()


# ---- a real device ----


def _to(given, device):
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()
    }


@pytest.fixture
def on_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if missing:
        pytest.skip(f"libfastgate_cuda.so: {missing}")
    return backends.cuda("gated_add_norm")


def _from_cpu(backend):
    """`backend` for CPU tensors: moved to the device, and the results back."""

    def moved(function):
        def call(*operands):
            given = [o.cuda() if isinstance(o, torch.Tensor) else o for o in operands]
            results = function(*given)
            return results.cpu() if isinstance(results, torch.Tensor) else tuple(r.cpu() for r in results)

        return call

    return ops.Implementation(
        backend.backend, moved(backend.forward), moved(backend.backward), backend.dtypes
    )


@pytest.mark.gpu
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", (*DTYPES, Dtypes(FP16, FP32, FP32, "float16 autocast")), ids=str)
def test_the_kernels_are_as_exact_as_torch(on_gpu, dtypes, shape, call, poisoned):
    check(_from_cpu(on_gpu), make(shape.sizes, dtypes, call))


@pytest.mark.gpu
@settings(max_examples=60, deadline=None, derandomize=True)
@drawn(
    rows=st.integers(0, 300),
    hidden=st.one_of(st.integers(1, 40), st.integers(1, 8192), st.integers(1, 1024).map(lambda n: 8 * n)),
    dtypes=st.sampled_from(DTYPES),
    call=st.sampled_from(sorted(CALLS)),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows, hidden, dtypes, call, seed):
    if not torch.cuda.is_available() or missing:
        pytest.skip("no CUDA device" if not missing else f"libfastgate_cuda.so: {missing}")
    check(_from_cpu(backends.cuda("gated_add_norm")), make((rows, hidden), dtypes, call, seed))


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [1, 7, 64, 384, 771])
@pytest.mark.parametrize("seed", [0, SEED, -3])
def test_masks_are_the_reference_s(on_gpu, seed, hidden):
    if hidden > 1:  # one channel has no gradient
        _masks_agree(on_gpu, seed, hidden, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_a_hundred_launches_give_the_same_bits(on_gpu, dtypes):
    given = _to(make((4099, 768), dtypes, "everything"), "cuda")
    grad = torch.randn(4099, 768, device="cuda")
    first = run(on_gpu, given, grad)
    for _ in range(100):
        assert_same_bits(first, run(on_gpu, given, grad))


@pytest.mark.gpu
def test_another_stream_waits_for_nobody_else_s(on_gpu):
    """x is made on a side stream behind a long queue: a kernel on another stream would read it too early."""
    given = _to(make((1024, 384), DTYPES[0], "plain"), "cuda")
    expected = on_gpu.forward(*given.values())
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = torch.full_like(given["x"], float("nan"))
        torch.cuda._sleep(50_000_000)
        late.copy_(given["x"])
        y = on_gpu.forward(*{**given, "x": late}.values())
    side.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_a_graph_replays_with_new_values_gate_and_seed(on_gpu):
    given = _to(make((515, 768), DTYPES[1], "everything"), "cuda")
    grad = torch.randn(515, 768, device="cuda", dtype=torch.bfloat16)
    operands, wanted = [given[name] for name in OPERANDS], requested_bits(given)

    def step():
        return on_gpu.forward(*operands), *on_gpu.backward(grad, *operands, wanted)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    given["x"].normal_()
    given["gate"].fill_(0.25)
    given["seed"].fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    for ran, expected in zip(captured, step(), strict=True):
        assert torch.equal(ran, expected)


@pytest.mark.gpu
def test_operands_on_another_device_are_refused(on_gpu):
    given = _to(make((3, 8), DTYPES[0], "plain"), "cuda")
    with pytest.raises(RuntimeError, match="gated_add_norm: weight: got a tensor on another device"):
        on_gpu.forward(*{**given, "weight": given["weight"].cpu()}.values())
