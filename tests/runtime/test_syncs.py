"""Waits of the host for the device: one for a mask on the device, none for one on the host, none after it."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers.encoders import batch, make, output_rows
from helpers.fake_device import REMOTE, Remote, Waits, on_remote
from torch import Tensor

import fastgate
from fastgate import ops
from fastgate.runtime.unpadding import unpad

HEADS = (
    "Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM",
)  # fmt: skip


@contextmanager
def kernels_there():
    """Implementations on the device that read ends there, as a GPU's do; else the references run."""
    for op, reference in ops.REFERENCE.items():
        ops.IMPLEMENTATIONS[op, REMOTE.type] = replace(reference, backend="by ends")
    try:
        yield
    finally:
        for op in ops.REFERENCE:
            ops.IMPLEMENTATIONS.pop((op, REMOTE.type))


def masks_of(side: str, lengths: tuple[int, ...], length: int) -> Tensor:
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    return {"right": mask, "left": mask.flip(1), "holes": mask.roll(1, 1) ^ (torch.arange(length) == 3)}[side]


@pytest.mark.parametrize("demand", ["attended", "first", "every", "some"])
@pytest.mark.parametrize("side", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("far", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_unpadding_waits_once_at_most(far, side, demand):
    """The same index sets as on the host, whichever mask lies where."""
    lengths, length = (7, 3, 0, 5), 8
    attended = None if side == "none" else masks_of(side, lengths, length)
    asked = {
        "first": torch.arange(length).expand(4, -1) == 0,
        "every": torch.ones(4, length, dtype=torch.bool),
    }
    asked["some"] = torch.rand(4, length, generator=torch.Generator().manual_seed(0)) < 0.3
    wanted = asked.get(demand)
    host = unpad(4, length, attended, wanted, torch.device("cpu"))
    moved = [
        Remote(m) if m is not None and away else m for m, away in zip((attended, wanted), far, strict=True)
    ]
    with Waits() as device:
        unpadded = unpad(4, length, *moved, REMOTE)
        before = dict(device.waits)
        found = [unpadded.index, unpadded.key_rows, unpadded.output_rows, unpadded.output_index()]
        found += [r.cu_seqlens for r in (unpadded.queries, unpadded.keys, unpadded.outputs)] + [
            unpadded.has_left_neighbour
        ]
        rows = unpadded.unpad(Remote(torch.randn(4, length, 2)))
        unpadded.pad(rows, output_rows_only=False)
        assert dict(device.waits) == before
    assert sum(before.values()) == int(any(isinstance(m, Remote) for m in moved)), before
    true = [host.index, host.key_rows, host.output_rows, host.output_index()]
    true += [r.cu_seqlens for r in (host.queries, host.keys, host.outputs)] + [host.has_left_neighbour]
    for one, two in zip(found, true, strict=True):
        assert (one is None) == (two is None)
        assert one is None or (isinstance(one, Remote) and torch.equal(one.held, two))


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "references"])
@pytest.mark.parametrize(
    ("keep", "replacement"), [(None, "zero"), ((0,), "affine"), ((), "affine"), ((0,), "shift")]
)
@pytest.mark.parametrize("head", HEADS)
def test_a_forward_waits_for_the_mask_alone(head, keep, replacement, kernels, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows real devices only
    model = fastgate.patch(make("Bert", head))
    if keep is not None:
        fastgate.prune(model, keep=list(keep), replacement=replacement)
    for side in ("right", "left"):
        inputs = batch(model, head, side)
        with torch.no_grad():
            want = model(**inputs)[0]
        far = on_remote(copy.deepcopy(model))
        for mask_there in (True, False):
            given = {name: Remote(t) for name, t in inputs.items()}
            if not mask_there:
                given["attention_mask"] = inputs["attention_mask"]
            with torch.no_grad(), Waits() as device:
                if kernels:
                    with kernels_there():
                        got = far(**given)[0]
                else:
                    got = far(**given)[0]
            assert sum(device.waits.values()) == int(mask_there), device.waits
            name = "last_hidden_state" if head == "Model" else "logits"
            mask = inputs["attention_mask"] if head != "ForQuestionAnswering" else torch.ones(4, 14)
            found, true = (output_rows(name, t, mask) for t in (got.held, want))
            torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)


def test_a_mean_waits_for_nothing_more(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    model = fastgate.patch(make("Bert", "ForSequenceClassification"), pooling="mean")
    inputs = batch(model, "ForSequenceClassification")
    with torch.no_grad():
        want = model(**inputs).logits
    far = on_remote(copy.deepcopy(model))
    for mask_there in (True, False):
        given = {name: Remote(t) for name, t in inputs.items()}
        if not mask_there:
            given["attention_mask"] = inputs["attention_mask"]
        with torch.no_grad(), Waits() as device, kernels_there():
            got = far(**given).logits
        assert sum(device.waits.values()) == int(mask_there), device.waits
        torch.testing.assert_close(got.held, want, rtol=1e-4, atol=1e-4)


def test_a_wait_is_seen():
    """The count itself: each of these would stop the host."""
    for wait in (
        lambda t: t.max().item(),
        lambda t: t.any().item(),
        lambda t: bool(t.all()),
        lambda t: t.nonzero(),
        lambda t: t.cpu(),
        lambda t: torch.empty(3, dtype=t.dtype).copy_(t),
    ):
        with Waits() as device:
            wait(Remote(torch.tensor([True, False, True])))
        assert sum(device.waits.values()) >= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("head", HEADS)
def test_on_a_gpu(head, graphs):
    """torch itself says what waits: an error from embedding to head, with the mask on the host."""
    options = {"hidden_size": 128, "intermediate_size": 256}  # heads that the kernels take
    model = fastgate.patch(make("Bert", head, **options).cuda(), graphs=graphs)
    inputs = {name: t.cuda() for name, t in batch(model, head).items()}
    host = dict(inputs, attention_mask=inputs["attention_mask"].cpu())
    with torch.inference_mode():
        for _ in range(3):  # compiles, captures
            model(**inputs)
            model(**host)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**host)
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waited = [w for w in caught if "called a synchronizing" in str(w.message)]
    assert len(waited) == 1, [str(w.message) for w in waited]
