"""Inference in several threads at once: on one patched, pruned or frozen model, and in the ops alone."""

from __future__ import annotations

import pytest
import torch
from helpers import encoders
from helpers.bfloat16 import PACKED_DTYPES
from helpers.threads import run_in_threads

import fastgate
from fastgate.ops.linear import pack

THREADS = 6

MODELS = {
    "patched": lambda model: model,
    "pruned": lambda model: fastgate.prune(model, keep=[1], replacement="shift"),
    "frozen": fastgate.freeze,
    "pruned and frozen": lambda model: fastgate.freeze(fastgate.prune(model, keep=[0], replacement="shift")),
}


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("which", MODELS)
def test_one_model_in_many_threads(which, head):
    """Many shapes, with and without padding, each thread in another order, from the first forward on."""
    make = encoders.make("Bert", head, layers=3)
    model = MODELS[which](fastgate.patch(make))
    lengths = [(n,) * (1 + n % 3) if n % 2 else (14, n, 1 + n // 2) for n in range(1, 15)]
    batches = [encoders.batch(model, head, lengths=one) for one in lengths]

    @torch.inference_mode()
    def work(i):
        order = sorted(range(len(batches)), key=lambda b: (b * (2 * i + 1) + i) % len(batches))
        return [{b: model(**batches[b]).logits.clone() for b in order} for _ in range(3)]

    found = run_in_threads(work, THREADS)
    with torch.inference_mode():
        want = [model(**batch).logits for batch in batches]
    for results in found:
        for logits in results:
            for b, got in logits.items():
                torch.testing.assert_close(got, want[b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", PACKED_DTYPES, ids=str)
def test_packed_products_in_many_threads(dtype):
    weight = pack(torch.randn(640, 96).to(dtype))
    xs = [torch.randn(100 + i, 96).to(dtype) for i in range(THREADS)]
    want = [weight.product(x, gelu=True) for x in xs]
    for got, one in zip(
        run_in_threads(lambda i: weight.product(xs[i], gelu=True), THREADS), want, strict=True
    ):
        assert torch.equal(got, one)
