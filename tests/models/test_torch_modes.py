"""Patched models under no_grad, inference_mode, autocast and torch.compile, pruned and not, against Hugging
Face's under the same; graph breaks and recompilations counted."""

import contextlib
import copy
import shutil

import pytest
import torch
from helpers.encoders import LENGTHS, batch, make, output_rows, without_attention
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import fastgate

pytestmark = pytest.mark.slow

HEADS = ("ForSequenceClassification", "ForTokenClassification", "Model")
KEEP = (None, (0, 2), (0,), ())
SHAPES = ((14, 9, 3), (20, 9, 3, 1, 7), (4, 4), (25, 1, 2, 3, 4, 5), (30, 2), (1, 1), (8,) * 9)


def pair(head, keep, **options):
    model = make("Bert", head, **options)
    patched = fastgate.patch(copy.deepcopy(model))
    if keep is not None:
        fastgate.prune(patched, keep=keep)
        without_attention(model, [i for i in range(3) if i not in keep])
    return model, patched


def read(outputs, mask):
    """Everything that is claimed equal, as one vector in float64."""
    claimed = [output_rows(n, t, mask) for n, t in outputs.items() if isinstance(t, torch.Tensor)]
    return torch.cat([t.double().flatten() for t in claimed])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_inference(head, keep, context):
    model, patched = pair(head, keep)
    inputs = batch(model, head)
    with context():
        theirs, ours = model(**inputs), patched(**inputs)
    mask = inputs["attention_mask"]
    torch.testing.assert_close(read(ours, mask), read(theirs, mask), rtol=0, atol=1e-5)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].is_inference() == value.is_inference() and ours[name].dtype == value.dtype
            assert ours[name].requires_grad == value.requires_grad


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_autocast_is_no_further_from_float32_than_hugging_faces(head, keep, context):
    model, patched = pair(head, keep)
    inputs = batch(model, head)
    mask = inputs["attention_mask"]
    with context():
        exact = model(**inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs, ours = model(**inputs), patched(**inputs)
    truth = read(exact, mask)
    error, allowed = ((read(each, mask) - truth).norm() for each in (ours, theirs))
    assert 0 < error <= 1.5 * allowed
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}


@pytest.mark.parametrize("head", HEADS)
def test_training_after_inference_mode_meets_nothing_kept_from_it(head):
    model, patched = pair(head, None)
    inputs = batch(model, head)
    with torch.inference_mode():
        patched(**inputs)
    read(patched(**inputs), inputs["attention_mask"]).sum().backward()
    gradients = [p.grad for p in patched.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def breaks(counted):
    """The reasons of graph breaks so far, one word each."""
    words = {"forward_encoder": "encoder", "nonzero": "rows"}
    return {next((w for name, w in words.items() if name in why), why) for why in counted["graph_break"]}


# Head -> what breaks the graph, and the graphs compiled for one batch shape.
COMPILED = {
    "ForSequenceClassification": ({"encoder"}, 1),
    "ForTokenClassification": ({"encoder"}, 1),
    "Model": ({"encoder"}, 0),
    "ForMaskedLM": ({"encoder", "rows"}, 3),
}


@pytest.mark.parametrize("head", COMPILED)
@pytest.mark.parametrize("keep", [None, (0,)])
@torch.no_grad()
def test_compiled_over_many_shapes(head, keep, dynamo):
    """Its own graphs for the first shape, one more of each with sizes left open, and for batches of one row
    or column; no more after that. The encoder runs as it is: what breaks the graph is it, once."""
    expected, graphs = COMPILED[head]
    model, patched = pair(head, keep)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(patched, backend=counter)

    def assert_right(lengths):
        inputs = batch(model, head, lengths=lengths)
        mask = inputs["attention_mask"]
        want, got = model(**inputs), compiled(**inputs)
        torch.testing.assert_close(read(got, mask), read(want, mask), rtol=0, atol=1e-4)

    assert_right(LENGTHS)
    assert counter.frame_count == graphs and breaks(dynamo) == expected
    for lengths in SHAPES:
        assert_right(lengths)
    few = counter.frame_count
    assert few <= 4 * graphs
    for lengths in (*SHAPES, (17, 5, 2), (3,) * 11, (33, 32, 31, 30)):
        assert_right(lengths)
    assert counter.frame_count == few and breaks(dynamo) == expected


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_training(head, autocast, dynamo):
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    _, patched = pair(head, None, **options)
    compiled = torch.compile(copy.deepcopy(patched), backend="aot_eager")
    for lengths in (LENGTHS, (9, 3), (20, 4, 1)):
        inputs, results = batch(patched, head, lengths=lengths, labels=True), []
        for model in (patched, compiled):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = model.train()(**inputs).loss
            loss.backward()
            results.append((loss.detach(), [p.grad for p in model.parameters()]))
        (want, theirs), (got, ours) = results
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        for gradient, other in zip(ours, theirs, strict=True):
            if other is not None:
                torch.testing.assert_close(gradient, other, rtol=2e-2 if autocast else 1e-4, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of torch.compile wants g++")
@torch.no_grad()
def test_compiled_by_the_default_backend(dynamo):
    model, patched = pair("ForSequenceClassification", (0, 2))
    compiled = torch.compile(patched)
    for lengths in (LENGTHS, (9, 3, 20)):
        inputs = batch(model, "ForSequenceClassification", lengths=lengths)
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)
    assert breaks(dynamo) == {"encoder"}


@torch.no_grad()
def test_one_graph_of_all_is_refused_by_the_compiler(dynamo):
    _, patched = pair("ForSequenceClassification", None)
    inputs = batch(patched, "ForSequenceClassification")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="encoder runs an unpadded batch"):
        torch.compile(patched, fullgraph=True, backend="eager")(**inputs)
