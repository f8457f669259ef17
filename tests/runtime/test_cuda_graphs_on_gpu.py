"""Graphs on a CUDA device: equal to the run without, weights, streams, threads, memory."""

from __future__ import annotations

import pytest
import torch
from helpers.encoders import batch
from helpers.graph_models import CHANGES, FILLS, HEADS, captured, graphs_of, patched, same
from helpers.threads import run_in_threads

from fastgate.runtime import cuda_graphs

WIDE = {"hidden_size": 128, "intermediate_size": 256}  # heads that the GPU's kernels take


def on_gpu(head="ForSequenceClassification", keep=None, dtype=torch.float32, **options):
    model, plain = patched(head, keep, **(WIDE | options))
    return model.to("cuda", dtype), plain.to("cuda", dtype)


def gpu_batch(model, head="", side="right", lengths=FILLS[0]):
    return {name: t.cuda() for name, t in batch(model, head, side, lengths).items()}


# cuBLAS may choose another kernel for a bucket's rows than for a batch's.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnADevice:
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize(
        ("keep", "replacement"),
        [(None, "zero"), ((0,), "affine"), ((0, 2), "affine"), ((), "affine"), ((0,), "shift")],
    )
    @pytest.mark.parametrize("head", HEADS)
    def test_equal_to_the_run_without(self, head, keep, replacement, dtype):
        model, plain = on_gpu(head, keep, dtype, replacement=replacement)
        for fill in (*FILLS, *FILLS):
            for side in ("right", "left"):
                inputs = gpu_batch(model, head, side, fill)
                on_host = dict(inputs, attention_mask=inputs["attention_mask"].cpu())
                same(model, plain, inputs, TOLERANCE[dtype])
                with torch.inference_mode():
                    one, two = model(**inputs)[0], model(**on_host)[0]
                assert torch.equal(one, two)
        found = graphs_of(model)
        assert found.captures and found.replays > found.captures and not found.refused, found.eager_reasons

    def test_weights(self):
        model, plain = on_gpu()
        inputs = gpu_batch(model)
        found = captured(model, plain, inputs)
        for one in (model, plain):
            with torch.no_grad():
                one.bert.encoder.layer[0].attention.self.query.weight.mul_(0.5)
        same(model, plain, inputs, 1e-3)
        assert found.captures == 1
        for captures, change in enumerate(("data", "assign", "gates", "module"), 2):
            for one in (model, plain):
                CHANGES[change](one)
                one.cuda()
            for _ in range(3):
                same(model, plain, inputs, 1e-3)
            assert found.captures == captures

    def test_streams_and_what_is_on_them(self):
        """Behind the work that fills its operands, and before what a call on another stream does."""
        model, plain = on_gpu()
        all_inputs = [gpu_batch(model, lengths=fill) for fill in FILLS]
        for inputs in all_inputs:
            captured(model, plain, inputs)
        with torch.inference_mode():
            wanted = [plain(**inputs).logits for inputs in all_inputs]
            torch.cuda.synchronize()
            streams, found = [torch.cuda.Stream() for _ in range(4)], []
            for turn in range(40):
                stream, at = streams[turn % 4], turn % len(all_inputs)
                with torch.cuda.stream(stream):
                    late = {name: torch.zeros_like(t) for name, t in all_inputs[at].items()}
                    late["attention_mask"] = all_inputs[at]["attention_mask"].cpu()
                    torch.cuda._sleep(2_000_000)
                    for name in ("input_ids", "token_type_ids"):
                        late[name].copy_(all_inputs[at][name])
                    found.append((model(**late).logits, at))
            torch.cuda.synchronize()
        for got, at in found:
            torch.testing.assert_close(got, wanted[at], rtol=1e-3, atol=1e-3)
        assert graphs_of(model).replays >= 40

    def test_threads(self):
        model, plain = on_gpu()
        all_inputs = [gpu_batch(model, lengths=fill) for fill in (*FILLS, (14,), (3, 2))]
        with torch.inference_mode():
            wanted = [plain(**inputs).logits for inputs in all_inputs]
        torch.cuda.synchronize()

        @torch.inference_mode()
        def work(start):
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(30):
                    at = (start + turn) % len(all_inputs)
                    got = model(**all_inputs[at]).logits
                    torch.testing.assert_close(got, wanted[at], rtol=1e-3, atol=1e-3)

        run_in_threads(work)
        assert graphs_of(model).replays > 60 and not graphs_of(model).refused

    def test_memory_is_bounded(self, monkeypatch):
        monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
        monkeypatch.setattr(cuda_graphs, "CAPTURE_AT", 0)  # at every sight, however many were evicted
        model, plain = on_gpu()
        sizes = [gpu_batch(model, lengths=(14,) * n) for n in (32, 16, 8, 4, 2, 1)]
        held = []
        for _ in range(3):
            for inputs in sizes:
                same(model, plain, inputs, 1e-3)
            torch.cuda.synchronize()
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        found = graphs_of(model)
        assert found.captures == 18 and found.evictions == 16 and len(found.graphs) == 2
        assert held[2][0] - held[0][0] < 1 << 20 and held[2][1] - held[0][1] < 1 << 24, held
        found.clear()
