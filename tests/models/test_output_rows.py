"""Output rows: those that patch, a call or labels ask for; and what runs then."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from helpers import tiny_models
from helpers.encoders import FAMILIES, LENGTHS, VOCABULARY, batch, make
from transformers.utils.generic import find_labels

import fastgate
from fastgate.models.handle import get_encoder

TOKENS = ("ForTokenClassification", "ForMaskedLM", "ForPreTraining")


def logits_of(output):
    return output.logits if "logits" in output else output.prediction_logits


def rows_of_the_last_layer(model, **inputs):
    with get_encoder(model).record() as trace, torch.no_grad():
        model(**inputs)
    return trace.steps[-1].rows


def some_rows(inputs, share=0.3, seed=5):
    """Attended rows by chance, at least one."""
    mask = inputs["attention_mask"].bool()
    chosen = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < share)
    chosen[0, 1] = True
    return chosen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_first_is_token_0_of_a_bare_encoder(family, pooled, side):
    model = make(family, "Model")
    if not pooled:
        model.pooler = None
    inputs = batch(model, "Model", side)
    patched = fastgate.patch(copy.deepcopy(model), demand="first")
    want, got = model(**inputs), patched(**inputs)
    torch.testing.assert_close(got.last_hidden_state[:, 0], want.last_hidden_state[:, 0], rtol=0, atol=1e-5)
    assert not got.last_hidden_state[:, 1:].any()
    if pooled:
        torch.testing.assert_close(got.pooler_output, want.pooler_output, rtol=0, atol=1e-5)
    assert rows_of_the_last_layer(patched, **inputs) == len(LENGTHS)
    assert "absorbed_attention" in fastgate.explain(patched).layers[-1].steps


@torch.no_grad()
def test_patching_again_keeps_the_demand_and_a_new_one_takes_effect():
    model = make("Bert", "Model")
    inputs = batch(model, "Model")

    def rows(patched):
        return rows_of_the_last_layer(patched, **inputs)

    patched = fastgate.patch(copy.deepcopy(model))
    assert rows(patched) == sum(LENGTHS)
    for demand, count in (("first", 4), (None, 4), ("first", 4), ("all", sum(LENGTHS)), (None, sum(LENGTHS))):
        assert fastgate.patch(patched, demand=demand) is patched
        assert rows(patched) == count
        assert fastgate.explain(patched).demand == ("first" if count == 4 else "attended")
    fastgate.patch(patched, demand="first")
    fastgate.prune(patched, keep=[0])
    assert rows(patched) == 4 and get_encoder(patched).gates == [1.0, 0.0, 0.0]
    fastgate.patch(patched, demand="all")
    assert get_encoder(patched).gates == [1.0, 0.0, 0.0] and rows(patched) == sum(LENGTHS)
    with pytest.raises(fastgate.ArgumentError, match=r"patch: demand: got 'last', wanted \"first\" or"):
        fastgate.patch(patched, demand="last")


@torch.no_grad()
def test_the_demand_goes_where_the_model_goes(tmp_path):
    patched = fastgate.patch(make("Roberta", "Model"), demand="first")
    inputs = batch(patched, "Model")
    want = patched(**inputs).last_hidden_state
    assert not want[:, 1:].any()
    for again in (
        copy.deepcopy(patched),
        pickle.loads(pickle.dumps(patched)),
        fastgate.load(fastgate.save(patched, tmp_path / "x")),
    ):
        assert torch.equal(again(**inputs).last_hidden_state, want)
        assert "\ndemand first: 8 output rows of 256\n" in str(fastgate.explain(again))
    fastgate.unpatch(patched)
    assert fastgate.patch(patched)(**inputs).last_hidden_state[:, 1].any(), "unpatch forgets the demand"


@pytest.mark.parametrize("head", [*TOKENS, "ForQuestionAnswering"])
def test_fewer_rows_than_a_head_reads_are_refused_before_anything_is_touched(head):
    both = torch.nn.ModuleList([make("Bert", "Model"), make("Bert", head)])
    with pytest.raises(
        fastgate.ArgumentError, match=rf"Bert{head} reads .*; leave demand out, or pass demand="
    ):
        fastgate.patch(both, demand="first")
    assert type(both[0]) is transformers.BertModel and not hasattr(both[0], "fastgate_runtime")
    model = fastgate.patch(both[1])
    with pytest.raises(fastgate.ArgumentError, match="what stands above"):
        fastgate.patch(model.bert, demand="first")
    alone = fastgate.patch(make("Bert", "Model"), demand="first")
    model.bert = alone
    with pytest.raises(fastgate.ArgumentError, match=f"Bert{head}"):
        fastgate.patch(model)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_all_under_a_head_computes_the_attended_rows_too(family, side):
    model = make(family, "ForSequenceClassification")
    inputs = batch(model, "ForSequenceClassification", side)
    mask = inputs["attention_mask"].bool()
    patched = fastgate.patch(copy.deepcopy(model), demand="first")
    assert rows_of_the_last_layer(patched, **inputs) == len(LENGTHS)
    fastgate.patch(patched, demand="all")
    torch.testing.assert_close(patched(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)
    want, got = (m.base_model(**inputs).last_hidden_state for m in (model, patched))
    torch.testing.assert_close(got[mask], want[mask], rtol=0, atol=1e-5)
    asked = fastgate.patch(make("Bert", "ForQuestionAnswering"), demand="all")
    assert fastgate.explain(asked).demand == "every"


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, head", [(f, h) for f in FAMILIES for h in TOKENS[: 3 if f == "Bert" else 2]]
)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_rows_of_one_call(family, head, labelled, training):
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = make(family, head, **options).train(training)
    patched = fastgate.patch(copy.deepcopy(model))
    inputs = batch(model, head, labels=labelled)
    asked = some_rows(inputs)
    read = asked | (inputs["labels"] != -100) if labelled else asked
    want, got = model(**inputs), patched(**inputs, rows=asked)
    torch.testing.assert_close(logits_of(got)[read], logits_of(want)[read], rtol=0, atol=1e-4)
    if labelled:
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
    if head != "ForTokenClassification":
        assert not logits_of(got)[~read].any()
    pooled = head == "ForPreTraining"
    expected = int(read.sum()) + (int((~read[:, 0]).sum()) if pooled else 0)
    assert rows_of_the_last_layer(patched, **inputs, rows=asked) == expected
    if pooled:
        torch.testing.assert_close(got.seq_relationship_logits, want.seq_relationship_logits)


@pytest.mark.parametrize("pooled", [True, False])
@torch.no_grad()
def test_rows_of_a_bare_encoder(pooled):
    model = make("Bert", "Model")
    if not pooled:
        model.pooler = None
    inputs = batch(model, "Model")
    asked = some_rows(inputs)
    want = model(**inputs)
    for demand in ("first", "all"):
        patched = fastgate.patch(copy.deepcopy(model), demand=demand)
        got = patched(**inputs, rows=asked)
        torch.testing.assert_close(
            got.last_hidden_state[asked], want.last_hidden_state[asked], rtol=0, atol=1e-5
        )
        read = asked.clone()
        if pooled:
            read[:, 0] = True
            torch.testing.assert_close(got.pooler_output, want.pooler_output, rtol=0, atol=1e-5)
        assert not got.last_hidden_state[~read].any()
        assert rows_of_the_last_layer(patched, **inputs, rows=asked) == int(read.sum())
    whole = patched(**inputs, rows=asked, output_hidden_states=True)
    torch.testing.assert_close(whole.last_hidden_state, want.last_hidden_state, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padded_rows_can_be_asked_for_and_no_row_at_all():
    model = make("Bert", "ForTokenClassification")
    patched = fastgate.patch(copy.deepcopy(model))
    inputs = batch(model, "ForTokenClassification")
    asked = inputs["attention_mask"] == 0
    want, got = model(**inputs).logits, patched(**inputs, rows=asked).logits
    torch.testing.assert_close(got[asked], want[asked], rtol=0, atol=1e-5)
    nothing = torch.zeros_like(asked)
    for head in ("ForTokenClassification", "ForMaskedLM"):
        patched = fastgate.patch(make("Bert", head))
        assert patched(**inputs, rows=nothing).logits.isfinite().all()


def test_rows_that_cannot_be_honoured_are_refused():
    for head in ("Model", *TOKENS):
        patched = fastgate.patch(make("Bert", head))
        inputs = batch(patched, head)
        mask = inputs["attention_mask"]
        cases = {
            "torch.int64": mask,
            r"shape \(4,\)": mask[:, 0].bool(),
            r"shape \(4, 13\)": mask[:, 1:].bool(),
            "list": mask.bool().tolist(),
        }
        for got, rows in cases.items():
            with pytest.raises(
                fastgate.ArgumentError,
                match=rf"forward: rows: got {got}, wanted a bool tensor \(batch, length\) = \(4, 14\); pass",
            ):
                patched(**inputs, rows=rows)
    for head, what in (("ForSequenceClassification", "token 0"), ("ForQuestionAnswering", "every token")):
        patched = fastgate.patch(make("Bert", head))
        inputs = batch(patched, head)
        with pytest.raises(fastgate.ArgumentError, match=f"wanted none, as this head reads {what}; leave"):
            patched(**inputs, rows=inputs["attention_mask"].bool())


@pytest.mark.parametrize("head", TOKENS)
def test_labels_for_other_tokens_are_refused(head):
    patched = fastgate.patch(make("Bert", head))
    inputs = batch(patched, head, labels=True)
    longer = torch.nn.functional.pad(inputs.pop("labels"), (0, 1))
    for training in (False, True):
        with pytest.raises(ValueError, match=r"labels: got shape \(4, 15\), wanted one a token, \(4, 14\)"):
            patched.train(training)(**inputs, labels=longer)


@pytest.mark.parametrize("head", TOKENS)
def test_in_training_only_labelled_rows_are_computed(head):
    patched = fastgate.patch(make("Bert", head))
    inputs = batch(patched, head, labels=True)
    labelled = inputs["labels"] != -100
    if head == "ForPreTraining":
        labelled[:, 0] = True
    assert rows_of_the_last_layer(patched.train(), **inputs) == int(labelled.sum())
    assert rows_of_the_last_layer(patched.eval(), **inputs) == sum(LENGTHS)
    fastgate.patch(patched, demand="all")
    assert rows_of_the_last_layer(patched.train(), **inputs) == sum(LENGTHS)


@pytest.mark.parametrize(
    "family, head", [("Bert", "ForMaskedLM"), ("Bert", "ForPreTraining"), ("Roberta", "ForMaskedLM")]
)
def test_the_vocabulary_is_scored_for_the_rows_that_are_read(family, head):
    model = fastgate.patch(make(family, head))
    inputs = batch(model, head, labels=True)
    scored = []
    model.get_output_embeddings().register_forward_hook(lambda m, a, out: scored.append(out.shape))
    labelled = int((inputs["labels"] != -100).sum())
    asked = some_rows(inputs)
    bare = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    model.train()(**inputs)
    model.eval()(**bare)
    model(**bare, rows=asked)
    whole = model(**bare, output_hidden_states=True)
    model(input_ids=inputs["input_ids"])
    rows = [
        labelled,
        sum(LENGTHS),
        int(asked.sum()),
        inputs["input_ids"].numel(),
        inputs["input_ids"].numel(),
    ]
    assert scored == [(n, VOCABULARY) for n in rows]
    assert logits_of(whole).shape == (*inputs["input_ids"].shape, VOCABULARY)


@torch.no_grad()
def test_language_models_return_tuples_as_before():
    for head in ("ForMaskedLM", "ForPreTraining"):
        model = make("Bert", head)
        patched = fastgate.patch(copy.deepcopy(model))
        inputs = batch(model, head, lengths=(14, 14), labels=True)
        for options in ({}, {"output_hidden_states": True}):
            theirs, ours = (m(**inputs, **options, return_dict=False) for m in (model, patched))
            assert [type(t) for t in theirs] == [type(t) for t in ours]
            for want, got in zip(theirs[:2], ours[:2], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
        positional = patched(inputs["input_ids"], inputs["attention_mask"])
        torch.testing.assert_close(
            logits_of(positional), logits_of(model(**{**inputs, "token_type_ids": None}))
        )


@pytest.mark.parametrize(
    "task, head", [("fill-mask", "MaskedLM"), ("token-classification", "TokenClassification")]
)
def test_pipelines_over_tokens(task, head, tmp_path):
    folder = tiny_models.model_folder(tmp_path / "model")
    model = getattr(transformers, f"BertFor{head}").from_pretrained(folder).eval()
    texts = ["the film was [MASK]", "a [MASK] story it was not"]
    found = [
        transformers.pipeline(task, model=each, tokenizer=tiny_models.tokenizer(tmp_path / "words"))(
            texts, batch_size=2
        )
        for each in (model, fastgate.patch(copy.deepcopy(model)))
    ]
    for theirs, ours in zip(*found, strict=True):
        assert len(theirs) == len(ours) > 0
        for want, got in zip(theirs, ours, strict=True):
            assert want.keys() == got.keys() and abs(want["score"] - got["score"]) < 1e-5


@pytest.mark.parametrize("head", ["Model", *TOKENS])
def test_what_inspects_the_signature_sees_the_old_one(head):
    cls = getattr(transformers, "Bert" + head)
    model = fastgate.patch(make("Bert", head))
    assert inspect.signature(type(model).forward) == inspect.signature(cls.forward)
    assert find_labels(type(model)) == find_labels(cls)
    trainer = transformers.Trainer(model, transformers.TrainingArguments(report_to=[], use_cpu=True))
    trainer._set_signature_columns_if_needed()
    assert "rows" not in trainer._signature_columns and "input_ids" in trainer._signature_columns


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForMaskedLM"])
def test_gradients_of_logits_that_were_asked_for(head):
    """A loss of one's own over the rows asked for."""
    model = make("Bert", head)
    patched = fastgate.patch(copy.deepcopy(model))
    inputs = batch(model, head)
    asked = some_rows(inputs)
    model(**inputs).logits[asked].square().mean().backward()
    patched(**inputs, rows=asked).logits[asked].square().mean().backward()
    for (name, ours), theirs in zip(patched.named_parameters(), model.parameters(), strict=True):
        if theirs.grad is not None and "key.bias" not in name:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


@torch.no_grad()
def test_rows_may_lie_on_the_host_and_in_inference_mode():
    patched = fastgate.patch(make("Bert", "ForMaskedLM"))
    inputs = batch(patched, "ForMaskedLM")
    asked = some_rows(inputs)
    with torch.inference_mode():
        got = patched(**inputs, rows=asked).logits
    assert torch.equal(got[asked], patched(**inputs, rows=asked).logits[asked])
