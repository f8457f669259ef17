"""How many graphs there are and of what sizes; threads and streams that share them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers.encoders import VOCABULARY, batch
from helpers.graph_models import FILLS, captured, graphs_of, patched, same
from helpers.threads import run_in_threads
from hypothesis import given
from hypothesis import strategies as st

from fastgate.runtime import cuda_graphs, graph_device
from fastgate.runtime.graph_key import rounded


def test_large_batches_run_as_ever(stand_in, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_ROWS", 20)
    model, plain = patched()
    for _ in range(3):
        same(model, plain, batch(model, ""))
    assert not graphs_of(model).captures and graphs_of(model).eager_reasons["no rows, or more than 20"] == 3


@pytest.mark.slow
def test_sentences_one_by_one_share_few_graphs(stand_in):
    model, plain = patched()
    for n in range(1, 41):
        ids = torch.randint(5, VOCABULARY, (1, n))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for _ in range(2):
            same(model, plain, inputs)
    assert graphs_of(model).captures == 4  # 16, 32 and 48 rows, and one row, all of which is read


@given(st.integers(1, 4096))
def test_buckets(rows):
    size = rounded(rows)
    assert size % 16 == 0 and rows <= size <= max(16, rows + max(15, rows // 7)) and rounded(size) == size
    assert rows <= 512 or size <= rows * 1.0625


def test_the_least_recently_used_graph_goes(stand_in, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    model, plain = patched()
    found = graphs_of(model)
    sizes = [batch(model, "", lengths=(14,) * n) for n in (1, 2, 4)]
    one, two, four = sizes
    for inputs in (one, one, two, two, one, four, four):
        same(model, plain, inputs)
    assert found.captures == 3 and found.evictions == 1 and len(found.graphs) == 2 and stand_in.drained
    same(model, plain, one)
    assert found.captures == 3  # two went
    for _ in range(2):
        same(model, plain, two)
    assert (found.captures, found.evictions) == (4, 2)
    # A turnover of evictions: what comes in turn with too many others has to come twice as often.
    for _ in range(3):
        same(model, plain, four)
    assert found.captures == 4
    same(model, plain, four)
    assert found.captures == 5
    found.clear()
    assert not found.graphs and found.device is None
    captured(model, plain, one)


def test_threads(stand_in):
    """Each with its own batches: the device asserts that no two are in one memory at once."""
    model, plain = patched()
    all_inputs = [batch(model, "", lengths=fill) for fill in (*FILLS, (14,), (3, 2))]
    with torch.inference_mode():
        wanted = [plain(**inputs).logits for inputs in all_inputs]

    @torch.inference_mode()
    def work(start):
        for turn in range(12):
            at = (start + turn) % len(all_inputs)
            torch.testing.assert_close(model(**all_inputs[at]).logits, wanted[at])

    run_in_threads(work)
    assert graphs_of(model).replays > 24


class FakeCuda:
    """As much of torch.cuda as captures use; the log says what was called, on which stream."""

    def __init__(self, monkeypatch):
        self.log, self.now = [], "default"
        fake = self

        class Stream:
            def __init__(self, name="side"):
                self.name = name

            def __eq__(self, other):
                return self.name == other.name

            def wait_stream(self, other):
                fake.log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event):
                fake.log.append(f"{self.name} waits for {event.recorded}")

        class Event:
            recorded = None

            def record(self, stream):
                self.recorded = f"work on {stream.name}"

            def synchronize(self):
                fake.log.append("drained")

        @contextlib.contextmanager
        def on(stream):
            before, fake.now = fake.now, stream.name
            yield
            fake.now = before

        @contextlib.contextmanager
        def graph(graph, pool, stream, capture_error_mode):
            fake.log.append(f"capture on {stream.name}, {capture_error_mode}, in {pool}")
            with on(stream):
                yield
            fake.log.append("captured")

        class CUDAGraph:
            def replay(self):
                fake.log.append(f"replay on {fake.now}")

        names = {"Stream": Stream, "Event": Event, "stream": on, "graph": graph, "CUDAGraph": CUDAGraph}
        names |= {"current_stream": lambda: Stream(self.now), "graph_pool_handle": lambda: "one pool"}
        names |= {"device": lambda device: contextlib.nullcontext()}
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        self.on, self.Stream = on, Stream


def test_the_order_of_streams(monkeypatch):
    """On a device that is not there: who waits for whom, in captures and between calls on two streams."""
    fake = FakeCuda(monkeypatch)
    cuda = graph_device.Cuda(torch.device("cuda:0"))
    with cuda.use():
        replay, out = cuda.capture(lambda: fake.log.append(f"body on {fake.now}") or "result")
        replay()
    assert out == "result" and fake.log == [
        "side waits for default",
        "body on side",
        "default waits for side",
        "capture on side, thread_local, in one pool",
        "body on side",
        "captured",
        "replay on default",
    ]
    fake.log.clear()
    with cuda.use():  # the same stream: in order as it is
        replay()
    with fake.on(fake.Stream("other")), cuda.use():
        replay()
    with cuda.use():
        replay()
    cuda.drain()
    assert fake.log == [
        "replay on default",
        "other waits for work on default",
        "replay on other",
        "default waits for work on other",
        "replay on default",
        "drained",
    ]
