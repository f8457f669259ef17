"""Attention in Triton: in the interpreter here, on a device where one is; exactness, masks, repeatability."""

from __future__ import annotations

import json

import children
import pytest
import torch
from attention_cases import (
    CASES,
    LONG,
    MASKS,
    check,
    check_autograd,
    check_mask,
    check_without_saving,
    make,
    ours,
)

triton = pytest.importorskip("triton", reason="triton is not installed")

on_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
# A process of its own, for kernels are interpreted or compiled for good when their module is imported.
INTERPRET = """
import interpreted, json, torch, traceback
torch.set_num_threads(1)
from attention_cases import *
from fastgate.kernels import attention as kernels
import attention_search
report = {}
def run(name, check, *arguments):
    try:
        check(*arguments)
        report[name] = ""
    except Exception:
        report[name] = traceback.format_exc()
for case in CASES:
    run(str(case), check, kernels, case)
for mask in MASKS:
    run(f"mask {mask}", check_mask, kernels, *mask)
run("without saving", check_without_saving, kernels, CASES[3])
run("autograd", check_autograd, kernels)
run("search", attention_search.check, kernels, "cpu")
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def interpreted():
    """Each check's traceback, empty where it passed."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton 3.6 stumbles over the scalars of NumPy 2.4")
    return json.loads(children.finish(children.start(INTERPRET)))


@pytest.mark.parametrize(
    "name", [*map(str, CASES), *(f"mask {mask}" for mask in MASKS), "without saving", "autograd", "search"]
)
def test_in_the_interpreter(interpreted, name):
    assert not interpreted[name], interpreted[name]


@pytest.fixture
def kernels():
    from fastgate.kernels import attention

    return attention


class TestOnADevice:
    pytestmark = on_device

    @pytest.mark.parametrize("case", (*CASES, *LONG), ids=str)
    def test_as_exact_as_torch(self, kernels, case):
        check(kernels, case, "cuda")

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_nothing_saved_gives_the_same_bits(self, kernels, case):
        check_without_saving(kernels, case, "cuda")

    def test_autograd_and_tracing(self, kernels):
        check_autograd(kernels, "cuda")

    @pytest.mark.parametrize("mask", MASKS, ids=str)
    def test_masks_are_the_references(self, kernels, mask):
        check_mask(kernels, *mask, "cuda")

    def test_every_tile_is_found(self, kernels):
        import attention_search

        attention_search.check(kernels, "cuda")

    @pytest.mark.parametrize("case", CASES[:4], ids=str)
    def test_a_hundred_launches_give_the_same_bits(self, kernels, case):
        call = make(case, "cuda")
        first = ours(kernels, call)
        for _ in range(100):
            out, lse = kernels.forward_saving(*call.tensors, *call.operands)
            again = (out, *kernels.backward_saved(call.grad, out, lse, *call.tensors, *call.operands))
            assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))

    @pytest.mark.parametrize("case", CASES[:4], ids=str)
    def test_a_graph_replays_on_new_values_and_lengths(self, kernels, case):
        """The host reads no length: a captured call serves other lengths of as many rows, another seed."""
        call = make(case, "cuda")
        wanted = ours(kernels, call)  # compiles, which capture forbids
        tensors = [t.clone() for t in call.tensors]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = kernels.forward_saving(*call.tensors, *call.operands)
            found = (out, *kernels.backward_saved(call.grad, out, lse, *call.tensors, *call.operands))
        graph.replay()
        assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
        for t in call.tensors:
            t.copy_(t.flip(0))
        for ends in call.operands[:2]:
            ends.copy_(torch.cat((ends[:1], ends.diff().flip(0).cumsum(0).to(ends.dtype))))
        if call.operands[-1] is not None:
            call.operands[-1].add_(1)
        wanted = [t.clone() for t in ours(kernels, call)]
        graph.replay()
        assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
        assert not torch.equal(call.tensors[0], tensors[0])

    def test_runs_on_the_current_stream(self, kernels):
        call = make(CASES[0], "cuda")
        wanted = ours(kernels, call)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            late = [t.clone() for t in call.tensors]
            out = kernels.forward(*late, *call.operands)
        stream.synchronize()
        assert torch.equal(out, wanted[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 4}, "attention: heads: got hidden / heads of 16, wanted hidden / heads of 32, 64, 128"),
        ({"scale": -1.0}, "attention: scale: got -1.0, wanted a positive number"),
        ({"dropout_p": 0.5}, "attention: seed: got None"),
        ({"v": torch.zeros(2, 64)}, "attention: q, k, v"),
        (
            {"k": torch.zeros(3, 64, dtype=torch.float16)},
            "attention: q, k, v: got torch.float32, torch.float16",
        ),
        ({"cu_k": torch.zeros(3, dtype=torch.int32)}, "attention: cu_q, cu_k"),
        (dict.fromkeys(("cu_q", "cu_k"), torch.zeros(1, dtype=torch.int32)), "attention: cu_q, cu_k"),
    ],
)
def test_what_does_not_fit_is_refused(kernels, change, message):
    operands = dict.fromkeys("qkv", torch.zeros(3, 64))
    operands |= dict.fromkeys(("cu_q", "cu_k"), torch.tensor([0, 3], dtype=torch.int32))
    operands |= {"heads": 1, "scale": 0.1, "dropout_p": 0.0, "seed": None} | change
    with pytest.raises(ValueError, match=message):
        kernels.forward(*operands.values())
