"""Graphs of an encoder: equal to the run without them, and that run where a call does not fit a graph.

On an imitation (helpers/fake_cuda_graph.py) that replays what ops did to memory. test_cuda_graphs_on_gpu.py
has the real thing.
"""

from __future__ import annotations

import pytest
import torch
from helpers.encoders import batch, make
from helpers.fake_cuda_graph import Tape
from helpers.graph_models import FILLS, HEADS, captured, graphs_of, patched, same
from torch import nn

import fastgate
from fastgate.models.handle import get_encoder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keep", "replacement"),
    [(None, "zero"), *((keep, kind) for keep in ((0,), (1,), (0, 2), ()) for kind in ("affine", "shift"))],
)
@pytest.mark.parametrize("head", HEADS)
def test_equal_to_the_run_without(stand_in, head, keep, replacement):
    model, plain = patched(head, keep, replacement=replacement)
    for fill in FILLS:
        for side in ("right", "left"):
            same(model, plain, batch(model, head, side, fill))
    found = graphs_of(model)
    assert found.captures and found.replays >= found.captures
    assert not {"recording, or attentions asked for", "a capture that failed"} & set(found.eager_reasons)


@pytest.mark.parametrize("family", ["Roberta", "XLMRoberta", "Camembert"])
def test_every_family(stand_in, family):
    model, plain = patched("ForTokenClassification", family=family)
    for fill in FILLS:
        inputs = batch(model, "ForTokenClassification", lengths=fill)
        del inputs["token_type_ids"]
        same(model, plain, inputs)
    assert graphs_of(model).replays >= 2


@pytest.mark.parametrize("keep", [None, (1,)], ids=["dense", "shift"])
def test_odd_batches(stand_in, keep):
    """Holes in the mask, sequences with nothing attended, no mask, one row, no rows, int32 ids, no types."""
    model, plain = patched(keep=keep, replacement="shift")
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


def test_a_kind_is_captured_when_it_comes_again_and_results_stay(stand_in):
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
    assert hidden is not None and found.eager_reasons["gradients, or training"] == 1


def test_explain_says_what_graphs_did(stand_in):
    model, plain = patched()
    inputs = batch(model, "")
    captured(model, plain, inputs)
    text = " ".join(str(fastgate.explain(model)).split("\n\n")[-1].split())  # long lines are wrapped
    found = graphs_of(model)
    assert text.startswith(f"CUDA graphs: {len(found.graphs)} captured, {found.replays} replays; ")
    assert "1 calls run eagerly: a batch shape seen too seldom yet" in text
    off = fastgate.patch(make("Bert", "ForSequenceClassification"), graphs=False)
    assert str(fastgate.explain(off)).endswith("CUDA graphs: turned off")


def test_explain_says_nothing_of_graphs_where_there_are_none():
    model = fastgate.patch(make("Bert", "ForSequenceClassification"))
    assert fastgate.explain(model).graphs is None and "graphs" not in str(fastgate.explain(model))


def test_an_encoder_without_padding_gives_memory_of_its_own(stand_in):
    model, plain = patched("Model")
    inputs = batch(model, "Model", lengths=(14, 14, 14, 14))
    captured(model, plain, inputs)
    kept = same(model, plain, inputs).last_hidden_state
    held = kept.clone()
    same(model, plain, dict(inputs, input_ids=inputs["input_ids"].flip(0)))
    assert torch.equal(kept, held)


def test_what_does_not_fit_runs_as_ever(stand_in):
    model, plain = patched()
    inputs = batch(model, "")
    found = captured(model, plain, inputs)
    replays = found.replays

    def counted(reason):
        assert found.replays == replays and found.eager_reasons[reason] >= 1, found.eager_reasons

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
        with get_encoder(model).record() as trace:
            model(**inputs)
        assert trace.steps
        counted("recording, or attentions asked for")
        model(inputs_embeds=model.bert.embeddings.word_embeddings(inputs["input_ids"]))
        counted("embeddings that were given or replaced")
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
        counted("autocast")
        with Tape():
            model(**inputs)
        counted("a dispatch mode")
        stand_in.busy_now = True
        model(**inputs)
        counted("a capture under way")
        stand_in.busy_now = False
        get_encoder(model).set_gates([1.0, torch.tensor(0.5), 1.0])
        model(**inputs)
        counted("gates that are tensors")
        get_encoder(model).set_gates([1.0] * 3)
    assert found.captures == 1
    same(model, plain, inputs)
    assert found.replays == replays + 1  # and fits again


def test_modules_and_parameters_of_other_kinds(stand_in):
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
    (reason,) = graphs_of(model).eager_reasons
    assert reason.startswith("a Doubled of")


def test_a_backend_that_reads_lengths_on_the_host(stand_in):
    """The reference does: no graph is captured of it, and it is not tried again."""
    fastgate.ops.IMPLEMENTATIONS.pop(("attention", "cpu"))
    model, plain = patched()
    inputs = batch(model, "")
    for _ in range(4):
        same(model, plain, inputs)
    found = graphs_of(model)
    assert found.captures == 0 and found.eager_reasons["a backend that reads lengths on the host"] == 3


def test_a_capture_that_fails(stand_in):
    model, plain = patched()
    inputs = batch(model, "")
    stand_in.fail = torch.OutOfMemoryError("no memory left")
    same(model, plain, inputs)
    with pytest.warns(RuntimeWarning, match="no memory left"):
        same(model, plain, inputs)
    same(model, plain, inputs)
    assert graphs_of(model).eager_reasons["a capture that failed"] == 2


def test_the_flag(stand_in):
    model, plain = patched()
    assert get_encoder(plain).runtime.executor.graphs is None
    assert fastgate.patch(plain) is plain and get_encoder(plain).runtime.executor.graphs is None
    fastgate.patch(model, graphs=False)
    assert get_encoder(model).runtime.executor.graphs is None
    assert get_encoder(fastgate.patch(make("Bert", "Model"))).runtime.executor.graphs is not None
