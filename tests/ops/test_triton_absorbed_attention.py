"""Absorbed attention in Triton: exactness, masks, repeatability, splits; in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from helpers import triton_device
from helpers.absorbed_cases import (
    CASES,
    LONG,
    SEED,
    SPLIT,
    Case,
    as_implementation,
    check,
    check_masks,
    check_without_saving,
    make,
    run,
    traceable,
)
from helpers.cases import BF16, FP16, FP32
from helpers.triton_device import DEVICE, INTERPRETED, gpu_only, shifted
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgate import ops
from fastgate.errors import ArgumentError
from fastgate.ops.absorbed_attention import absorbed_attention
from fastgate.ops.ragged import SequenceOffsets

pytest.importorskip("triton", reason="triton is not installed")
from fastgate.kernels import absorbed_attention as kernels

pytestmark = [pytest.mark.slow, *triton_device.MARKS]


@pytest.fixture
def split(monkeypatch):
    """Sequences of a few dozen rows are shared by several programs."""
    monkeypatch.setattr(kernels, "SPLIT_FROM", 40)
    monkeypatch.setattr(kernels, "LEAST_SPLIT", 16)
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 12)


@pytest.fixture
def filled(monkeypatch):
    """The registry has the kernels for this device."""
    ops.implementation("absorbed_attention", DEVICE.type, FP32)  # loads the registry
    monkeypatch.setitem(ops.IMPLEMENTATIONS, ("absorbed_attention", DEVICE.type), as_implementation(kernels))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_torch(case):
    check(kernels, case, DEVICE)


@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_split_sequences_are_as_exact(split, case):
    rows, sequences = sum(case.lengths), len(case.lengths)
    assert kernels.splits_of(sequences, rows, DEVICE) >= 4
    check(kernels, case, DEVICE)


@gpu_only
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sequences_and_many(case):
    check(kernels, case, DEVICE)


@pytest.mark.parametrize("room", [163, 99])
def test_less_shared_memory(monkeypatch, room):
    monkeypatch.setattr(kernels, "shared_memory", lambda _: room)
    hidden = 1024 if room == 163 else 512
    assert not kernels.fits(torch.empty(1, 2, hidden + 1)) and not kernels.fits(torch.empty(1, 65, 8))
    check(kernels, Case((20, 33), 2, hidden, BF16, 0.0, "half as many rows at a time"), DEVICE)


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[15]], ids=str)
def test_nothing_saved_gives_the_same_bits(case):
    check_without_saving(kernels, case, DEVICE)


@settings(max_examples=5 if INTERPRETED else 60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 20 if INTERPRETED else 900), min_size=1, max_size=3),
    heads=st.integers(2, 18),
    hidden=st.integers(8, 40 if INTERPRETED else 1024),  # the error of a few numbers is a matter of luck
    dropout_p=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from([FP32, BF16, FP16]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(lengths, heads, hidden, dropout_p, dtype, seed):
    check(kernels, Case(tuple(lengths), heads, hidden, dtype, dropout_p, "any"), DEVICE, seed)


@pytest.mark.parametrize(("longest", "dtype"), [(13, FP32), (40, BF16)])
@pytest.mark.parametrize("seed", [SEED, -3])
def test_masks_are_the_references(longest, dtype, seed):
    check_masks(kernels, longest, seed, dtype, DEVICE)


def test_masks_of_split_sequences_are_the_references(split):
    assert kernels.splits_of(2, 2 * 60 - 1, DEVICE) > 1
    check_masks(kernels, 60, SEED, BF16, DEVICE)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_autograd_through_the_slot(filled, dropout_p):
    """Eager, traced and without gradients, against the torch form of the same draws."""
    lengths = (5, 0, 9) if dropout_p else (5, 9)
    keys, host = SequenceOffsets(lengths, DEVICE), SequenceOffsets(lengths, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    sizes = ((len(lengths), 32), (sum(lengths), 32), (32, 32), (32, 32), (32,))
    twins = [torch.randn(size, generator=generator).mul_(0.4).requires_grad_() for size in sizes]
    leaves = [twin.detach().to(DEVICE).requires_grad_() for twin in twins]

    def call(leaves, keys):
        return absorbed_attention(*leaves, keys, 4, 0.3, dropout_p)

    def seeded(call, leaves, keys):
        torch.manual_seed(4)
        return call(leaves, keys)

    out = seeded(call, leaves, keys)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    with torch.no_grad():
        assert torch.equal(seeded(call, leaves, keys), out)
    traced = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(seeded(traced, leaves, traceable(keys)).square().sum(), leaves),
        grads,
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if DEVICE.type == "cpu" or not dropout_p:  # another device draws other seeds
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(ops.IMPLEMENTATIONS, ("absorbed_attention", "cpu"), raising=False)
            wanted = seeded(call, twins, host)
        torch.testing.assert_close(out.cpu(), wanted, rtol=1e-4, atol=1e-5)
        for got, want in zip(grads, torch.autograd.grad(wanted.square().sum(), twins), strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)


def test_opcheck(filled):
    call = make(Case((5, 3), 2, 16, FP32, 0.3, "small"), DEVICE)
    probe, x = (t.detach().requires_grad_() for t in (call.probe, call.x))
    torch.library.opcheck(torch.ops.fastgate.absorbed_attention.default, (probe, x, *call.rest))


def test_strided_and_unaligned_operands():
    """Rows and probes of any strides, and beginning between 16-byte boundaries, give the same bits."""
    call = make(Case((9, 20), 3, 48, BF16, 0.1, "small"), DEVICE)

    def widened(t):
        return torch.stack((t, t), -1).flatten(-2)[..., ::2]

    want = run(kernels, call)
    for change in (shifted, widened, torch.Tensor.contiguous):
        names = ("grad", "grad_total", "probe", "x")
        other = call._replace(**{name: change(getattr(call, name)) for name in names})
        assert all(torch.equal(one, two) for one, two in zip(run(kernels, other), want, strict=True))


@pytest.mark.parametrize("case", [CASES[0], CASES[2], SPLIT[0]], ids=str)
def test_bits_repeat(split, case):
    call = make(case, DEVICE)
    want = run(kernels, call)
    for _ in range(1 if INTERPRETED else 100):
        assert all(torch.equal(one, two) for one, two in zip(run(kernels, call), want, strict=True))


@gpu_only
@pytest.mark.parametrize("case", [CASES[0], CASES[2], SPLIT[0]], ids=str)
def test_a_graph_replays_on_new_values_and_lengths(split, case):
    """The host reads no length: a captured call serves other lengths of as many rows, another seed."""
    call = make(case, DEVICE)

    def change():
        call.x.copy_(call.x.flip(0))
        ends, seed = call.rest[0], call.rest[-1]
        ends.copy_(torch.cat((ends[:1], ends.diff().flip(0).cumsum(0).to(ends.dtype))))
        seed.add_(1)

    triton_device.check_replay(lambda: run(kernels, call), change)


@gpu_only
def test_another_stream_and_what_is_on_it():
    call = make(CASES[0], DEVICE)
    triton_device.check_stream(lambda: run(kernels, call), call.x)


@gpu_only
def test_the_slot_is_filled():
    assert ops.implementation("absorbed_attention", "cuda", BF16).backend == "triton"


@pytest.mark.parametrize(
    ("rows", "sequences", "splits"),
    [(512, 1, 8), (8192, 1, 64), (9600, 32, 4), (800, 32, 1), (32, 1, 1), (0, 4, 1), (32768, 256, 1)],
)
def test_splits_follow_the_shapes(monkeypatch, rows, sequences, splits):
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 132)
    assert kernels.splits_of(sequences, rows, DEVICE) == splits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe": torch.zeros(2, 65, 8)}, "probe, x: got .*65, 8.*at most 64 heads"),
        ({"probe": torch.zeros(2, 8)}, "probe, x: got"),
        ({"x": torch.zeros(3, 9)}, "probe, x: got"),
        ({"x": torch.zeros(3, 8, dtype=FP16)}, "probe, x: got torch.float32, torch.float16"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int32)}, "cu_seqlens: got"),
        ({"dropout_p": 0.5}, "seed: got None"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    operands = {"probe": torch.zeros(2, 2, 8), "x": torch.zeros(3, 8)}
    operands["cu_seqlens"] = torch.tensor([0, 1, 3], dtype=torch.int32)
    operands |= {"scale": 0.1, "dropout_p": 0.0, "seed": None} | change
    with pytest.raises(ArgumentError, match=f"^absorbed_attention: {message}"):
        kernels.forward(*operands.values())
