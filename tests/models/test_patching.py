"""A patched, unpruned model against Hugging Face: every head, its outputs and gradients, every call."""

import copy
import pickle

import pytest
import torch
import transformers
from helpers.encoders import ALL, FAMILIES, LENGTH, batch, make, output_rows
from torch import nn
from transformers.utils.generic import find_labels

import fastgate
from fastgate.models.handle import get_encoder


def pair(family, head, **options):
    model = make(family, head, **options)
    return model, fastgate.patch(copy.deepcopy(model))


def assert_same(theirs, ours, mask, atol=1e-5):
    assert theirs.keys() == ours.keys()
    for name, want in theirs.items():
        if isinstance(want, torch.Tensor):
            got = ours[name]
            assert got.shape == want.shape and got.dtype == want.dtype, name
            want, got = output_rows(name, want, mask), output_rows(name, got, mask)
            torch.testing.assert_close(got, want, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("family, head", ALL)
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_outputs(family, head, side):
    model, patched = pair(family, head)
    inputs = batch(model, head, side)
    mask = inputs["attention_mask"].view(-1, LENGTH)
    assert_same(model(**inputs), patched(**inputs), mask)
    assert_same(model(inputs["input_ids"]), patched(inputs["input_ids"]), torch.ones_like(mask))


@pytest.mark.slow
@pytest.mark.parametrize("family, head", [(f, h) for f, h in ALL if h != "Model"])
@pytest.mark.parametrize("training", [False, True])
def test_loss_and_gradients(family, head, training):
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, patched = pair(family, head, **options)
    inputs = batch(model, head, labels=True)
    gradients = []
    for each in (model, patched):
        loss = each.train(training)(**inputs).loss
        loss.backward()
        gradients.append((loss.detach(), {n: p.grad for n, p in each.named_parameters()}))
    (loss, wanted), (got_loss, got) = gradients
    torch.testing.assert_close(got_loss, loss, rtol=1e-5, atol=1e-5)
    noise = 1e-6 * sum(g.square().sum() for g in wanted.values() if g is not None).sqrt().item()
    for name, want in wanted.items():
        if want is None:
            assert got[name] is None
            continue
        # What cancels in a softmax (keys' biases, question answering's last ones) has noise for a gradient.
        error = (got[name] - want).norm().item()
        assert error <= 1e-4 * want.norm().item() + noise, name


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_autocast(head):
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, patched = pair("Bert", head, **options)
    inputs = batch(model, head, labels=True)
    exact = model.train()(**inputs)
    exact.loss.backward()
    results = []
    truth = {n: p.grad.clone() for n, p in model.named_parameters()}
    for each in (model, patched):
        each.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = each.train()(**inputs)
        out.loss.backward()
        error = sum((p.grad - truth[n]).square().sum() for n, p in each.named_parameters()).sqrt().item()
        results.append((out.loss.item(), error))
    assert abs(results[0][0] - results[1][0]) < 0.05
    assert results[1][1] <= 1.5 * results[0][1], (
        "our bf16 gradients are further from fp32 than Hugging Face's"
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ways_to_call(family):
    model, patched = pair(family, "Model")
    inputs = batch(model, "Model")
    ids, mask, types = inputs.values()
    embedded = model.get_input_embeddings()(ids)
    positions = torch.arange(LENGTH).flip(0)[None] + 2
    ways = [
        {"input_ids": ids, "attention_mask": mask.bool()},
        {"input_ids": ids, "attention_mask": mask.float()},
        {"input_ids": ids, "attention_mask": torch.ones_like(mask)},
        {"input_ids": ids, "attention_mask": mask, "token_type_ids": types},
        {"input_ids": ids, "attention_mask": mask, "position_ids": positions},
        {"input_ids": ids, "attention_mask": mask, "position_ids": positions.expand(len(ids), -1)},
        {"inputs_embeds": embedded, "attention_mask": mask},
        {"inputs_embeds": embedded, "attention_mask": mask, "token_type_ids": types},
        {"input_ids": ids[:1], "attention_mask": mask[:1]},
        {"input_ids": ids[:, :1], "attention_mask": mask[:, :1]},
        {"input_ids": ids[1:2, :9]},
    ]
    for way in ways:
        rows = way.get("attention_mask", torch.ones(1, 9)).bool()
        assert_same(model(**way), patched(**way), rows)


@torch.no_grad()
def test_longest_input_and_one_too_long():
    model, patched = pair("Bert", "ForSequenceClassification", layers=1)
    ids = torch.randint(5, 90, (2, 40))
    assert_same(model(ids), patched(ids), torch.ones_like(ids))
    with pytest.raises(fastgate.ArgumentError, match="length 41"):
        patched(torch.randint(5, 90, (2, 41)))


@torch.no_grad()
def test_nothing_attended_is_as_in_sdpa():
    model, patched = pair("Bert", "ForSequenceClassification")
    inputs = batch(model, "ForSequenceClassification")
    inputs["attention_mask"][1] = 0
    assert_same(model(**inputs), patched(**inputs), inputs["attention_mask"])
    inputs["attention_mask"][:] = 0
    assert_same(model(**inputs), patched(**inputs), inputs["attention_mask"])


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
@pytest.mark.parametrize("selection", [True, 2, -1, [0, -1], [1, 7]])
@torch.no_grad()
def test_hidden_states(head, selection):
    model, patched = pair("Roberta", head)
    inputs = batch(model, head)
    theirs, ours = (m(**inputs, output_hidden_states=selection) for m in (model, patched))
    assert len(theirs.hidden_states) == len(ours.hidden_states) == 4
    for want, got in zip(theirs.hidden_states, ours.hidden_states, strict=True):
        assert (want is None) == (got is None)
        if want is not None:  # padded rows too: with hidden states every row is an output row
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_attentions_and_tuples():
    model, patched = pair("Bert", "ForSequenceClassification", attention="eager")
    inputs = batch(model, "ForSequenceClassification")
    options = {"output_attentions": True, "output_hidden_states": True, "return_dict": False}
    theirs, ours = model(**inputs, **options), patched(**inputs, **options)
    assert [type(t) for t in theirs] == [type(t) for t in ours]
    for want, got in zip(theirs[-1], ours[-1], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    bare = patched.bert(inputs["input_ids"], return_dict=False)
    assert isinstance(bare, tuple) and len(bare) == 2


@torch.no_grad()
def test_rows_nobody_reads_are_zero():
    _, patched = pair("Bert", "ForSequenceClassification")
    inputs = batch(patched, "ForSequenceClassification")
    out = patched.bert(**inputs).last_hidden_state
    assert out[:, 0].abs().min() > 0 and out[:, 1:].abs().max() == 0


def test_labels_on_padding_count_in_the_loss():
    model, patched = pair(
        "Bert", "ForTokenClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    inputs = batch(model, "ForTokenClassification")
    labels = torch.randint(0, 3, inputs["input_ids"].shape)
    for training in (False, True):
        want, got = (m.train(training)(**inputs, labels=labels).loss for m in (model, patched))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_names_signatures_and_the_way_back(tmp_path):
    for family, head in ALL:
        model = make(family, head, layers=1)
        classes = {name: type(module) for name, module in model.named_modules()}
        keys = list(model.state_dict())
        assert fastgate.patch(model) is model and fastgate.patch(model) is model
        assert {n: type(m).__name__ for n, m in model.named_modules()} == {
            n: c.__name__ for n, c in classes.items()
        }
        assert isinstance(model, classes[""]) and list(model.state_dict()) == keys
        assert find_labels(type(model)) == find_labels(classes[""])
        again = pickle.loads(pickle.dumps(model))
        assert type(again) is type(model) and type(copy.deepcopy(model)) is type(model)
        assert fastgate.unpatch(model) is model
        assert {name: type(module) for name, module in model.named_modules()} == classes
        assert not hasattr(model, "fastgate_runtime") and list(model.state_dict()) == keys
    fastgate.patch(model).save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == [family + head]
    assert type(type(model).from_pretrained(tmp_path)).__name__ == family + head


def test_pipeline(minilm_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm_path).eval()
    texts = ["a fine film", "no", "and then there was, all in all, nothing left to say about it"]
    theirs = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)(
        texts, batch_size=3
    )
    ours = transformers.pipeline("text-classification", model=fastgate.patch(model), tokenizer=tokenizer)(
        texts, batch_size=3
    )
    for want, got in zip(theirs, ours, strict=True):
        assert want["label"] == got["label"] and abs(want["score"] - got["score"]) < 1e-5


def test_minilm_outputs_and_gradients(minilm_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path)
    config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for auto in ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"):
        torch.manual_seed(0)
        model = getattr(transformers, auto).from_pretrained(minilm_path, **config)
        patched = fastgate.patch(copy.deepcopy(model))
        inputs = tokenizer(
            ["a fine film", "and so on, and so on, and so on"], padding=True, return_tensors="pt"
        )
        theirs, ours = model.eval()(**inputs), patched.eval()(**inputs)
        assert_same(theirs, ours, inputs["attention_mask"])
        mask = inputs["attention_mask"]
        for out in (theirs, ours):
            sum(output_rows(n, t, mask).square().mean() for n, t in out.items()).backward()
        grads = {n: p.grad for n, p in patched.named_parameters()}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and "key.bias" not in name:
                assert (grads[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-9, name


@torch.no_grad()
def test_minilm_at_its_longest(minilm_path):
    model = transformers.AutoModel.from_pretrained(minilm_path).eval()
    patched = fastgate.patch(copy.deepcopy(model))
    ids = torch.randint(5, 30000, (2, 512), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 300:] = 0
    assert_same(model(ids, attention_mask=mask), patched(ids, attention_mask=mask), mask)
    assert_same(model(ids[:1]), patched(ids[:1]), mask[:1])


def test_gradient_checkpointing_gives_the_same_gradients():
    options = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    _, plain = pair("Bert", "ForSequenceClassification", **options)
    inputs = batch(plain, "ForSequenceClassification", labels=True)
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    grads = []
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        model.train()(**inputs).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, want in grads[0].items():
        torch.testing.assert_close(grads[1][name], want, rtol=1e-4, atol=1e-6, msg=name)


class Wrapper(nn.Module):
    """Somebody's own head over an encoder."""

    def __init__(self, encoder):
        super().__init__()
        self.auto_model = encoder

    def forward(self, **inputs):
        return self.auto_model(**inputs).last_hidden_state.sum(1)


@torch.no_grad()
def test_encoder_inside_another_module():
    wrapped = Wrapper(make("Bert", "Model"))
    inputs = batch(wrapped.auto_model, "Model", lengths=(14, 14))
    want = wrapped(**inputs)
    assert fastgate.patch(wrapped) is wrapped
    torch.testing.assert_close(wrapped(**inputs), want, rtol=0, atol=1e-4)


def test_what_is_refused_before_anything_is_touched():
    decoder = make("Bert", "Model")
    decoder.config.is_decoder = True
    cross = make("Bert", "Model")
    cross.config.add_cross_attention = True
    hooked = make("Bert", "Model")
    hooked.encoder.layer[1].attention.self.register_forward_hook(lambda *a: None)
    replaced = make("Bert", "Model")
    replaced.encoder.layer[2].output = nn.Identity()
    for model, reason in (
        (decoder, "is_decoder"),
        (cross, "add_cross_attention"),
        (hooked, "hook"),
        (replaced, "Identity"),
    ):
        both = nn.ModuleList([make("Bert", "Model"), model])
        with pytest.raises(fastgate.Unsupported, match=reason):
            fastgate.patch(both)
        assert type(both[0]) is transformers.BertModel and type(model) is transformers.BertModel
    for nothing in (nn.Linear(2, 2), transformers.BertLMHeadModel(decoder.config).cls):
        with pytest.raises(fastgate.NothingPatched):
            fastgate.patch(nothing)
    with pytest.raises(fastgate.NothingPatched):
        get_encoder(make("Bert", "Model"))


def test_calls_that_are_refused_name_the_way_out():
    patched = fastgate.patch(make("Bert", "Model"))
    ids = torch.randint(5, 90, (2, 6))
    calls = {
        "attention_mask": {"attention_mask": torch.ones(2, 1, 6, 6)},
        "encoder_hidden_states": {"encoder_hidden_states": torch.zeros(2, 6, 32)},
        "use_cache": {"use_cache": True},
        "is_causal": {"is_causal": True},
    }
    for name, arguments in calls.items():
        with pytest.raises(fastgate.Unsupported, match=f"{name}.*unpatch"):
            patched(ids, **arguments)
    with pytest.raises(fastgate.ArgumentError, match="exactly one"):
        patched()
    handle = patched.encoder.layer[0].output.register_forward_hook(lambda *a: None)
    with pytest.raises(fastgate.Unsupported, match="hook"):
        patched(ids)
    handle.remove()
    patched(ids)


@torch.no_grad()
def test_adapted_linears_are_called_not_bypassed():
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.5 * x.mean()

    model, patched = pair("Bert", "ForSequenceClassification")
    for each in (model, patched):
        encoder = each.bert.encoder
        for i, layer in enumerate(encoder.layer):
            for parent, name in (
                (layer.attention.self, "key"),
                (layer.attention.output, "dense"),
                (layer.output, "dense"),
            ):
                torch.manual_seed(i)
                old = getattr(parent, name)
                adapted = Adapted(old.in_features, old.out_features)
                setattr(parent, name, adapted)
        each.bert.embeddings.word_embeddings.register_forward_hook(lambda module, args, out: out * 1.5)
    inputs = batch(model, "ForSequenceClassification", lengths=(14, 14))
    assert_same(model(**inputs), patched(**inputs), inputs["attention_mask"])
    assert "called as Adapted" in str(fastgate.explain(patched))


@pytest.mark.parametrize("graphs", ["yes", 1, torch.zeros(3)], ids=["text", "one", "tensor"])
def test_graphs_is_a_flag(graphs):
    with pytest.raises(fastgate.ArgumentError, match=r"patch: graphs: got .* wanted True, False or None"):
        fastgate.patch(make("Bert", "Model"), graphs=graphs)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": 0},
        {"output_hidden_states": []},
        {"output_hidden_states": ()},
        {"output_attentions": True},
        {"output_attentions": 1, "output_hidden_states": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_same_entries_as_in_transformers(family, head, options):
    model, patched = pair(family, head, attention="eager")
    inputs = batch(model, head)
    assert list(patched(**inputs, **options)) == list(model(**inputs, **options))
    theirs, ours = (m(**inputs, **options, return_dict=False) for m in (model, patched))
    assert [type(x) for x in ours] == [type(x) for x in theirs]
    assert [len(x) for x in ours] == [len(x) for x in theirs]


@torch.no_grad()
def test_tracing_and_export_are_refused_by_name():
    patched = fastgate.patch(make("Bert", "Model", return_dict=False))
    ids = batch(patched, "Model")["input_ids"]
    with pytest.raises(fastgate.Unsupported, match=r"torch.jit.trace or torch.export.*fastgate.unpatch"):
        torch.jit.trace(patched, (ids,))
    with pytest.raises(fastgate.Unsupported, match=r"torch.jit.trace or torch.export.*fastgate.unpatch"):
        torch.export.export(patched, (ids,))
