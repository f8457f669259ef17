"""Graphs of an encoder: equal to the run without them, never stale, bounded, safe under threads and streams.

On a stand-in (tape.py) that replays what ops did to memory; test_graphs_on_gpu.py has the real thing.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from encoders import VOCABULARY, batch, make
from graph_models import CHANGES, FILLS, HEADS, captured, graphs_of, patched, same
from hypothesis import given
from hypothesis import strategies as st
from tape import Tape, pretended
from torch import nn

import fastgate
from fastgate import graphs
from fastgate.graphs import rounded
from fastgate.state import encoder_state


@pytest.fixture
def device():
    with pretended() as found:
        yield found


@pytest.mark.parametrize("keep", [None, (0,), (1,), (0, 2), ()], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_equal_to_the_run_without(device, head, keep):
    model, plain = patched(head, keep)
    for fill in FILLS:
        for side in ("right", "left"):
            same(model, plain, batch(model, head, side, fill))
    found = graphs_of(model)
    assert found.captures and found.replays >= found.captures
    assert not {"recording, or attentions asked for", "a capture that failed"} & set(found.eager)


@pytest.mark.parametrize("family", ["Roberta", "XLMRoberta", "Camembert"])
def test_every_family(device, family):
    model, plain = patched("ForTokenClassification", family=family)
    for fill in FILLS:
        inputs = batch(model, "ForTokenClassification", lengths=fill)
        del inputs["token_type_ids"]
        same(model, plain, inputs)
    assert graphs_of(model).replays >= 2


def test_odd_batches(device):
    """Holes in the mask, sequences with nothing attended, no mask, one row, no rows, int32 ids, no types."""
    model, plain = patched()
    full = batch(model, "")
    holes = dict(full, attention_mask=full["attention_mask"].clone())
    holes["attention_mask"][0, 3:6] = 0
    empty = dict(full, attention_mask=full["attention_mask"].clone())
    empty["attention_mask"][2] = 0
    none = {"input_ids": full["input_ids"], "attention_mask": torch.ones_like(full["attention_mask"])}
    one = {name: t[:1, :1] for name, t in full.items()}
    short = dict(full, input_ids=full["input_ids"].int())
    for inputs in (holes, empty, none, one, short):
        before = graphs_of(model).replays
        for _ in range(4):
            same(model, plain, inputs)
        assert graphs_of(model).replays >= before + 2
    with torch.inference_mode():
        unmasked = model(input_ids=none["input_ids"]).logits
        torch.testing.assert_close(unmasked, plain(input_ids=none["input_ids"]).logits)
        nothing = {name: t[:0] for name, t in full.items()}
        assert model(**nothing).logits.shape == (0, 3)


def test_a_kind_is_captured_when_it_comes_again_and_results_stay(device):
    model, plain = patched()
    first, second = (batch(model, "", lengths=fill) for fill in FILLS[:2])
    found = graphs_of(model)
    same(model, plain, first)
    assert (found.captures, found.replays) == (0, 0)
    kept = same(model, plain, first).logits
    assert (found.captures, found.replays) == (1, 1)
    hidden = model.bert(**first).last_hidden_state if torch.is_grad_enabled() else None
    held = kept.clone()
    for _ in range(3):
        same(model, plain, second)  # 27 rows and 28: one bucket
    assert (found.captures, found.replays) == (1, 4) and torch.equal(kept, held)
    assert hidden is not None and found.eager["gradients, or training"] == 1


def test_explain_says_what_graphs_did(device):
    model, plain = patched()
    inputs = batch(model, "")
    captured(model, plain, inputs)
    text = str(fastgate.explain(model)).splitlines()[-1]
    found = graphs_of(model)
    assert text.startswith(f"CUDA graphs: {len(found.graphs)} captured, {found.replays} replays; ")
    assert "1 calls without: a kind of batch seen too seldom yet" in text
    off = fastgate.patch(make("Bert", "ForSequenceClassification"), graphs=False)
    assert str(fastgate.explain(off)).endswith("CUDA graphs: turned off")


def test_explain_says_nothing_of_graphs_where_there_are_none():
    model = fastgate.patch(make("Bert", "ForSequenceClassification"))
    assert fastgate.explain(model).graphs is None and "graphs" not in str(fastgate.explain(model))


def test_an_encoder_without_padding_gives_memory_of_its_own(device):
    model, plain = patched("Model")
    inputs = batch(model, "Model", lengths=(14, 14, 14, 14))
    captured(model, plain, inputs)
    kept = same(model, plain, inputs).last_hidden_state
    held = kept.clone()
    same(model, plain, dict(inputs, input_ids=inputs["input_ids"].flip(0)))
    assert torch.equal(kept, held)


def test_values_changed_in_place_are_seen(device):
    model, plain = patched()
    inputs = batch(model, "")
    found = captured(model, plain, inputs)
    for one in (model, plain):
        with torch.no_grad():
            one.bert.encoder.layer[0].attention.self.query.weight.mul_(0.5)
            one.bert.embeddings.LayerNorm.bias.add_(0.1)
            one.bert.encoder.layer[2].output.dense.weight.data += 0.05  # bumps no version
    same(model, plain, inputs)
    assert found.captures == 1 and found.replays == 2


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_encoder_is_captured_anew(device, change):
    model, plain = patched()
    inputs = batch(model, "")
    found = captured(model, plain, inputs)
    for one in (model, plain):
        CHANGES[change](one)
    for _ in range(3):
        same(model, plain, inputs)
    assert found.captures == 2 and found.replays == 3 and not found.refused


def test_gates_that_come_back_find_their_graph(device):
    model, plain = patched()
    inputs = batch(model, "")
    found = captured(model, plain, inputs)
    for gates, captures in (([1.0, 1.0, 0.0], 2), ([1.0] * 3, 2), ([1.0, 1.0, 0.0], 2)):
        for one in (model, plain):
            encoder_state(one).set_gates(gates)
        for _ in range(2):
            same(model, plain, inputs)
        assert found.captures == captures


def test_what_does_not_fit_runs_as_ever(device):
    model, plain = patched()
    inputs = batch(model, "")
    found = captured(model, plain, inputs)
    replays = found.replays

    def counted(reason):
        assert found.replays == replays and found.eager[reason] >= 1, found.eager

    model(**inputs)
    counted("gradients, or training")
    with torch.no_grad():
        model.train()(**inputs)
        model.eval()
        model.bert.encoder.layer[1].output.dropout.train()
        model(**inputs)
        counted("a Dropout in training")
        model.eval()
        assert model(**inputs, output_hidden_states=True).hidden_states is not None
        assert model(**inputs, output_attentions=True).attentions is not None
        with encoder_state(model).record() as record:
            model(**inputs)
        assert record.steps
        counted("recording, or attentions asked for")
        model(inputs_embeds=model.bert.embeddings.word_embeddings(inputs["input_ids"]))
        counted("embeddings that were given or replaced")
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
        counted("autocast")
        with Tape():
            model(**inputs)
        counted("a dispatch mode")
        device.busy_now = True
        model(**inputs)
        counted("a capture under way")
        device.busy_now = False
        encoder_state(model).set_gates([1.0, torch.tensor(0.5), 1.0])
        model(**inputs)
        counted("gates that are tensors")
        encoder_state(model).set_gates([1.0] * 3)
    assert found.captures == 1
    same(model, plain, inputs)
    assert found.replays == replays + 1  # and fits again


def test_hooks_run(device):
    """A hook that comes when there is a graph is not lost, and once it is gone there is a graph again."""
    model, plain = patched()
    inputs = batch(model, "")
    found = captured(model, plain, inputs)
    called = []
    handle = model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_: called.append(1))
    same(model, plain, inputs)
    same(model, plain, inputs)
    assert len(called) == 2 and found.eager["hooks, or a replaced forward"] == 2
    handle.remove()
    captured(model, plain, inputs)
    assert found.captures == 2
    with pytest.raises(fastgate.errors.Unsupported, match="hook"), torch.inference_mode():
        model.bert.encoder.layer[0].attention.self.register_forward_hook(lambda *_: None)
        model(**inputs)


def test_modules_and_parameters_of_other_kinds(device):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, plain = patched()
    inputs = batch(model, "")
    for one in (model, plain):
        old = one.bert.encoder.layer[0].output.dense
        one.bert.encoder.layer[0].output.dense = Doubled(64, 32)
        one.bert.encoder.layer[0].output.dense.load_state_dict(old.state_dict())
    for _ in range(3):
        same(model, plain, inputs)
    (reason,) = graphs_of(model).eager
    assert reason.startswith("a Doubled of")


def test_a_backend_that_reads_lengths_on_the_host(device):
    """The reference does: no graph is captured of it, and it is not tried again."""
    fastgate.ops.SLOTS.pop(("attention", "cpu"))
    model, plain = patched()
    inputs = batch(model, "")
    for _ in range(4):
        same(model, plain, inputs)
    found = graphs_of(model)
    assert found.captures == 0 and found.eager["a backend that reads lengths on the host"] == 3


def test_a_capture_that_fails(device):
    model, plain = patched()
    inputs = batch(model, "")
    device.fail = torch.OutOfMemoryError("no memory left")
    same(model, plain, inputs)
    with pytest.warns(RuntimeWarning, match="no memory left"):
        same(model, plain, inputs)
    same(model, plain, inputs)
    assert graphs_of(model).eager["a capture that failed"] == 2


def test_large_batches_run_as_ever(device, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_ROWS", 20)
    model, plain = patched()
    for _ in range(3):
        same(model, plain, batch(model, ""))
    assert not graphs_of(model).captures and graphs_of(model).eager["no rows, or more than 20"] == 3


def test_the_least_recently_used_graph_goes(device, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    model, plain = patched()
    found = graphs_of(model)
    sizes = [batch(model, "", lengths=(14,) * n) for n in (1, 2, 4)]
    one, two, four = sizes
    for inputs in (one, one, two, two, one, four, four):
        same(model, plain, inputs)
    assert found.captures == 3 and found.evictions == 1 and len(found.graphs) == 2 and device.drained
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


def test_the_flag(device):
    model, plain = patched()
    assert encoder_state(plain).runtime.graphs is None
    assert fastgate.patch(plain) is plain and encoder_state(plain).runtime.graphs is None
    fastgate.patch(model, graphs=False)
    assert encoder_state(model).runtime.graphs is None
    assert encoder_state(fastgate.patch(make("Bert", "Model"))).runtime.graphs is not None


def test_copies_begin_without_graphs(device):
    model, plain = patched()
    inputs = batch(model, "")
    captured(model, plain, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert graphs_of(other) is not graphs_of(model) and not graphs_of(other).graphs
        captured(other, plain, inputs)
    # A replica shares what the encoder carries, but not its weights.
    replica = copy.copy(model.bert)
    replica._modules = dict(model.bert._modules, embeddings=copy.deepcopy(model.bert.embeddings))
    with torch.no_grad():
        replica.embeddings.LayerNorm.weight.mul_(2.0)
        want = plain.bert(**inputs).last_hidden_state
        assert not torch.allclose(replica(**inputs).last_hidden_state, want)
    same(model, plain, inputs)


def test_threads(device):
    """Each with its own batches: the device asserts that no two are in one memory at once."""
    model, plain = patched()
    all_inputs = [batch(model, "", lengths=fill) for fill in (*FILLS, (14,), (3, 2))]
    with torch.inference_mode():
        wanted = [plain(**inputs).logits for inputs in all_inputs]
    wrong = []

    def work(start):
        try:
            with torch.inference_mode():
                for turn in range(12):
                    at = (start + turn) % len(all_inputs)
                    torch.testing.assert_close(model(**all_inputs[at]).logits, wanted[at])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and graphs_of(model).replays > 24


def test_sentences_one_by_one_share_few_graphs(device):
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


def test_the_bench_of_a_fingerprint(device):
    """Its host time is one of the smallest parts of a call: it makes no tensor and calls no op."""
    model, plain = patched()
    found = captured(model, plain, batch(model, ""))
    with Tape() as tape:
        assert found.fingerprint.holds(model.bert) and not found.fingerprint.drops()
    assert not tape.steps


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
    cuda = graphs.Cuda(torch.device("cuda:0"))
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
