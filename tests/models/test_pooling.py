"""A pooler that reads the mean over the attended rows: against Hugging Face and a mean by hand, and kept."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers
from helpers import tiny_models
from helpers.encoders import LENGTHS, batch, make, without_attention
from helpers.graph_models import FILLS, graphs_of, same

import fastgate
from fastgate.models.handle import get_encoder

HEAD = "ForSequenceClassification"
WHOLE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pooled_by_hand(encoder, inputs):
    """What the pooler of an encoder of transformers makes of the mean over the attended rows."""
    hidden = encoder(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    return encoder.pooler((hidden * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True))


def logits_by_hand(model, inputs):
    return model.classifier(model.dropout(pooled_by_hand(model.bert, inputs)))


def pair(keep=None, **options):
    """(a model of transformers without the attention of other layers, fastgate's with pooling="mean")."""
    model = make("Bert", HEAD, **options)
    patched = fastgate.patch(copy.deepcopy(model), pooling="mean")
    if keep is None:
        return model, patched
    return without_attention(model, set(range(3)) - set(keep)), fastgate.prune(patched, keep=keep)


def rows_of_the_last_layer(model, **inputs):
    with get_encoder(model).record() as trace, torch.no_grad():
        model(**inputs)
    return trace.steps[-1].rows


@pytest.mark.parametrize("frozen", [False, True], ids=["plain", "frozen"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("keep", [None, (0, 2), (1,), ()], ids=str)
@torch.no_grad()
def test_logits_are_those_of_a_mean_by_hand(keep, side, frozen):
    model, patched = pair(keep)
    if frozen:
        fastgate.freeze(patched)
    inputs = batch(model, HEAD, side)
    want = logits_by_hand(model, inputs)
    torch.testing.assert_close(patched(**inputs).logits, want, rtol=0, atol=1e-5)
    assert (want - model(**inputs).logits).abs().max() > 0.01, "token 0 would do as well"
    holes = dict(inputs, attention_mask=inputs["attention_mask"].clone())
    holes["attention_mask"][0, 3:6] = 0
    torch.testing.assert_close(patched(**holes).logits, logits_by_hand(model, holes), rtol=0, atol=1e-5)
    full = dict(inputs, attention_mask=torch.ones_like(inputs["attention_mask"]))
    unmasked = {name: value for name, value in full.items() if name != "attention_mask"}
    torch.testing.assert_close(patched(**unmasked).logits, logits_by_hand(model, full), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_attended_row_is_computed_and_no_other(side):
    _, patched = pair()
    inputs = batch(patched, HEAD, side)
    assert rows_of_the_last_layer(patched, **inputs) == sum(LENGTHS)
    explained = fastgate.explain(patched)
    assert explained.demand == "attended" and explained.output_rows == explained.unpadded_rows
    assert not any("absorbed_attention" in layer.steps for layer in explained.layers)
    fastgate.patch(patched, pooling="first")
    assert rows_of_the_last_layer(patched, **inputs) == len(LENGTHS)


@pytest.mark.parametrize("keep", [None, (1,)], ids=str)
def test_gradients_are_those_of_a_mean_by_hand(keep):
    model, patched = pair(keep, **WHOLE)
    inputs = batch(model, HEAD)
    labels = torch.tensor([0, 1, 2, 1])
    torch.nn.functional.cross_entropy(logits_by_hand(model.train(), inputs), labels).backward()
    patched.train()(**inputs, labels=labels).loss.backward()
    wanted = dict(model.named_parameters())
    parameters = dict(patched.named_parameters())
    scale = 1e-6 * sum(p.grad.square().sum() for p in parameters.values()).sqrt()
    for name, parameter in parameters.items():
        error = (parameter.grad - wanted[name].grad).norm()
        assert error <= 1e-4 * wanted[name].grad.norm() + scale, name


def test_gradients_in_float64():
    """By differences, through the mean: sequences of several lengths, one of them of a single row."""
    patched = pair(**WHOLE)[1].double()
    inputs = batch(patched, HEAD, lengths=(5, 3, 1))
    embedded = patched.bert.embeddings.word_embeddings(inputs.pop("input_ids")).detach()[:, :5, :]
    inputs = {name: value[:, :5] for name, value in inputs.items()}
    embedded.requires_grad_(True)
    torch.autograd.gradcheck(
        lambda x: patched(inputs_embeds=x, **inputs).logits, embedded, fast_mode=True, atol=1e-6
    )


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.bfloat16, 0.05)], ids=str)
@torch.no_grad()
def test_other_dtypes(dtype, atol):
    model, patched = pair()
    inputs = batch(model, HEAD)
    want = logits_by_hand(model.double(), inputs)
    got = patched.to(dtype)(**inputs).logits
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "XLMRoberta", "Camembert"])
@torch.no_grad()
def test_bare_encoders(family):
    model = make(family, "Model")
    patched = fastgate.patch(copy.deepcopy(model), pooling="mean")
    inputs = batch(model, "Model", "left")
    got = patched(**inputs)
    torch.testing.assert_close(got.pooler_output, pooled_by_hand(model, inputs), rtol=0, atol=1e-5)
    mask = inputs["attention_mask"].bool()
    want = model(**inputs).last_hidden_state
    torch.testing.assert_close(got.last_hidden_state[mask], want[mask], rtol=0, atol=1e-5)


@torch.no_grad()
def test_multiple_choice():
    model = make("Bert", "ForMultipleChoice")
    patched = fastgate.patch(copy.deepcopy(model), pooling="mean")
    inputs = batch(model, "ForMultipleChoice")
    flat = {name: value.flatten(0, 1) for name, value in inputs.items()}
    want = model.classifier(pooled_by_hand(model.bert, flat)).view(2, -1)
    torch.testing.assert_close(patched(**inputs).logits, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_that_are_computed_besides_are_not_in_the_mean():
    model, patched = pair()
    inputs = batch(model, HEAD)
    want = logits_by_hand(model, inputs)
    whole = patched(**inputs, output_hidden_states=True)
    torch.testing.assert_close(whole.logits, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.hidden_states[-1], model.bert(**inputs).last_hidden_state)
    padding = inputs["attention_mask"] == 0
    torch.testing.assert_close(patched(**inputs, rows=padding).logits, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_mean_of_nothing_is_zero():
    _, patched = pair()
    inputs = batch(patched, HEAD)
    inputs["attention_mask"][1] = 0
    want = patched.classifier(patched.bert.pooler(torch.zeros(1, 1, 32)))
    torch.testing.assert_close(patched(**inputs).logits[1:2], want)


@pytest.mark.parametrize("keep", [None, (1,)], ids=str)
def test_graphs_replay_the_same(stand_in, keep):
    plain = fastgate.patch(make("Bert", HEAD), pooling="mean", graphs=False)
    if keep is not None:
        fastgate.prune(plain, keep=keep)
    model = fastgate.patch(copy.deepcopy(plain), graphs=True)
    for fill in FILLS:
        for side in ("right", "left"):
            same(model, plain, batch(model, HEAD, side, fill))
    assert graphs_of(model).replays > 0


@torch.no_grad()
def test_it_goes_where_the_model_goes(tmp_path):
    _, patched = pair((0, 2))
    inputs = batch(patched, HEAD)
    want = patched(**inputs).logits
    assert patched.config.fastgate_pooling == "mean"
    path = fastgate.save(patched, tmp_path / "pruned")
    for again in (
        fastgate.load(path),
        copy.deepcopy(patched),
        pickle.loads(pickle.dumps(patched)),
        fastgate.patch(patched),
    ):
        assert torch.equal(again(**inputs).logits, want)
        assert fastgate.explain(again).demand == "attended"
    config = json.loads((path / "config.json").read_text())
    assert config["fastgate_pooling"] == "mean"
    (path / "config.json").write_text(json.dumps(config | {"fastgate_pooling": "max"}))
    with pytest.raises(fastgate.CheckpointError, match=r"config.json: got contents that do not match"):
        fastgate.load(path)


@torch.no_grad()
def test_saved_by_transformers_and_patched_again(tmp_path):
    model, patched = pair()
    inputs = batch(model, HEAD)
    patched.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pip install fastgate"):  # it would read token 0
        transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**inputs).logits, patched(**inputs).logits)
    tagger = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert not hasattr(tagger.config, "fastgate_pooling")  # it has no pooler, so nothing reads a mean
    fastgate.unpatch(tagger)


@torch.no_grad()
def test_the_way_back_is_the_first_row():
    model, patched = pair()
    inputs = batch(model, HEAD)
    with pytest.raises(
        fastgate.Unsupported, match=r"unpatch: model: got a pooler that reads the mean.*first"
    ):
        fastgate.unpatch(patched)
    torch.testing.assert_close(patched(**inputs).logits, logits_by_hand(model, inputs), rtol=0, atol=1e-5)
    fastgate.patch(patched, pooling="first")
    torch.testing.assert_close(patched(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)
    assert not hasattr(patched.config, "fastgate_pooling")
    assert type(fastgate.unpatch(patched)) is transformers.BertForSequenceClassification


@pytest.mark.parametrize(
    "family, head",
    [(family, HEAD) for family in ("Roberta", "XLMRoberta", "Camembert")]
    + [("Bert", "ForTokenClassification"), ("Bert", "ForPreTraining"), ("Bert", "ForQuestionAnswering")],
)
def test_heads_that_read_rows_themselves_are_refused_before_anything_is_touched(family, head):
    both = torch.nn.ModuleList([make("Bert", HEAD), make(family, head)])
    message = (
        rf'patch: pooling: got "mean" for a {family}{head}, wanted an encoder whose pooler.*; leave it out'
    )
    with pytest.raises(fastgate.Unsupported, match=message):
        fastgate.patch(both, pooling="mean")
    assert type(both[0]) is transformers.BertForSequenceClassification
    assert not hasattr(both[0].config, "fastgate_pooling") and not hasattr(both[0].bert, "fastgate_runtime")


def test_what_else_is_refused():
    with pytest.raises(fastgate.ArgumentError, match=r"pooling: got 'max', wanted \"first\" or \"mean\""):
        fastgate.patch(make("Bert", HEAD), pooling="max")
    for head in ("Model", HEAD):
        with pytest.raises(fastgate.ArgumentError, match=r"demand: got \"first\", wanted .* \(attended\)"):
            fastgate.patch(make("Bert", head), demand="first", pooling="mean")
    replaced = make("Bert", "Model")
    replaced.pooler = torch.nn.Identity()
    with pytest.raises(fastgate.Unsupported, match="for a BertModel"):
        fastgate.patch(replaced, pooling="mean")


def test_sentence_transformers_pools_by_itself(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    first = modules.Transformer(str(tiny_models.model_folder(tmp_path / "bert")))
    model = SentenceTransformer(modules=[first, modules.Pooling(32, "cls")], device="cpu")
    with pytest.raises(fastgate.Unsupported, match=r"under sentence-transformers.*the Pooling module"):
        fastgate.patch(model, pooling="mean")
    model[0].model.config.fastgate_pooling = "mean"
    assert fastgate.explain(fastgate.patch(model)).demand == "start"
