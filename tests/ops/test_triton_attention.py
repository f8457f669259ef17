"""Attention in Triton: exactness, masks, repeatability, odd operands; in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from helpers import triton_device
from helpers.attention_cases import (
    CASES,
    LONG,
    MASKS,
    Case,
    check,
    check_autograd,
    check_mask,
    check_without_saving,
    make,
    ours,
)
from helpers.triton_device import DEVICE, INTERPRETED, gpu_only
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")
from helpers import attention_search

from fastgate.kernels import attention as kernels

pytestmark = [pytest.mark.slow, *triton_device.MARKS]
FEW = CASES[3:4] if INTERPRETED else CASES


def launch(call):
    """O, dQ, dK, dV."""
    out, lse = kernels.forward_saving(*call.tensors, *call.operands)
    return (out, *kernels.backward_saved(call.grad, out, lse, *call.tensors, *call.operands))


@pytest.mark.parametrize("case", CASES if INTERPRETED else (*CASES, *LONG), ids=str)
def test_as_exact_as_torch(case):
    check(kernels, case, DEVICE)


longest = 40 if INTERPRETED else 700


@settings(max_examples=5 if INTERPRETED else 60, deadline=None, derandomize=True)
@given(
    pairs=st.lists(st.tuples(*[st.integers(0, longest)] * 2), max_size=3 if INTERPRETED else 40),
    alike=st.booleans(),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from(kernels.HEAD_DIMS[:2] if INTERPRETED else kernels.HEAD_DIMS),
    dtype=st.sampled_from(kernels.DTYPES),
    dropout_p=st.sampled_from((0.0, 0.3)),
)
def test_any_lengths(pairs, alike, heads, head_dim, dtype, dropout_p):
    """Queries and keys of any lengths, also none, alike as in a whole layer or not. One sequence has some of
    both: with a key each all gradients of queries are zero, and leave no scale to measure an error by."""
    queries, keys = zip((7, 9), *pairs, strict=True)
    check(kernels, Case(queries, queries if alike else keys, heads, head_dim, dtype, dropout_p, ""), DEVICE)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_nothing_saved_gives_the_same_bits(case):
    check_without_saving(kernels, case, DEVICE)


def test_autograd_and_tracing():
    check_autograd(kernels, DEVICE)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks_are_the_references(mask):
    check_mask(kernels, *mask, DEVICE)


def test_every_tile_is_found():
    attention_search.check(DEVICE)


@pytest.mark.parametrize("case", FEW[:4], ids=str)
def test_bits_repeat(case):
    call = make(case, DEVICE)
    first = ours(kernels, call)
    for _ in range(1 if INTERPRETED else 100):
        assert all(torch.equal(one, two) for one, two in zip(first, launch(call), strict=True))


@pytest.mark.parametrize("columns", [0, 1, 3])
def test_unaligned_rows_give_the_same_bits(columns):
    """Rows that begin between 16-byte boundaries, and rows whose distance is no multiple of 16 bytes."""
    call = make(next(case for case in CASES if case.bias and case.strided), DEVICE)
    wanted = ours(kernels, call)
    tensors = []
    for t in call.tensors:
        wide = torch.zeros(t.shape[0], t.shape[1] + columns, dtype=t.dtype, device=DEVICE)
        wide[:, columns // 2 : columns // 2 + t.shape[1]] = t
        tensors.append(wide[:, columns // 2 : columns // 2 + t.shape[1]])
    found = ours(kernels, call._replace(tensors=tuple(tensors)))
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


@gpu_only
class TestOnADevice:
    @pytest.mark.parametrize("case", CASES[:4], ids=str)
    def test_a_graph_replays_on_new_values_and_lengths(self, case):
        """The host reads no length: a captured call serves other lengths of as many rows, another seed."""
        call = make(case, DEVICE)

        def change():
            for t in call.tensors:
                t.copy_(t.flip(0))
            for ends in call.operands[3:5]:
                ends.copy_(torch.cat((ends[:1], ends.diff().flip(0).cumsum(0).to(ends.dtype))))
            if call.operands[-1] is not None:
                call.operands[-1].add_(1)

        triton_device.check_replay(lambda: launch(call), change)

    def test_another_stream_and_what_is_on_it(self):
        call = make(CASES[0], DEVICE)
        triton_device.check_stream(lambda: launch(call), call.tensors[0])


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
        ({"k_bias": torch.zeros(32)}, r"attention: k_bias: got shape \(32,\), wanted \(64,\)"),
        ({"cu_k": torch.zeros(3, dtype=torch.int32)}, "attention: cu_q, cu_k"),
        (dict.fromkeys(("cu_q", "cu_k"), torch.zeros(1, dtype=torch.int32)), "attention: cu_q, cu_k"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    operands = dict.fromkeys("qkv", torch.zeros(3, 64))
    operands |= dict.fromkeys(("q_bias", "k_bias", "v_bias"))
    operands |= dict.fromkeys(("cu_q", "cu_k"), torch.tensor([0, 3], dtype=torch.int32))
    operands |= {"heads": 1, "scale": 0.1, "dropout_p": 0.0, "seed": None} | change
    with pytest.raises(ValueError, match=message):
        kernels.forward(*operands.values())
