"""The encoder at work: steps and rows counted as they run, gates, replacements, records."""

import contextlib
import copy
from unittest import mock

import pytest
import torch
from helpers.encoders import LENGTHS, VECTORS, batch, draw_replacements, make, padded
from helpers.executed_steps import KEPT_STEPS, SKIPPED_STEPS, steps_as_they_run
from torch import nn

import fastgate
from fastgate.models.handle import get_encoder


@pytest.mark.parametrize("keep", [[0], [0, 2], [1, 3], [], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_steps_and_rows_as_they_run(keep, head):
    model = fastgate.prune(make("Bert", head, layers=5), keep=keep)
    inputs = batch(model, head)
    seen = steps_as_they_run(model, inputs)
    unpadded = sum(LENGTHS)
    outputs = len(LENGTHS) if head == "ForSequenceClassification" else unpadded
    top = max(keep, default=-1)
    for i in range(5):
        ops = [op for layer, op, _ in seen if layer == i]
        rows = [n for layer, _, n in seen if layer == i]
        assert len(ops) == (len(KEPT_STEPS) if i in keep else len(SKIPPED_STEPS))
        assert any("attention" in op or "project_q" in op for op in ops) == (i in keep)
        assert set(rows) == {outputs if i >= top else unpadded}
    assert seen[0] == (-1, "embed", unpadded if keep else outputs)


def test_no_products_of_skipped_attention_are_called():
    model = fastgate.patch(make("Bert", "ForSequenceClassification", layers=3))
    get_encoder(model).set_gates([1.0, 0.0, 0.0])
    called = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "attention" in name:
            module.register_forward_hook(lambda m, a, o, name=name: called.append(name))
    with torch.no_grad():
        model(**batch(model, "ForSequenceClassification"))
    assert called and all(".layer.0." in name for name in called)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize(
    "gates", [(1, 1, 1), (0, 0, 0), (0.3, 0, 1), (0, 0.6, 0), (0.1, 0.2, 0.9), (1, 0, 0)]
)
def test_gates_and_replacements_by_the_definition(kind, gates, side):
    model = make("Bert", "ForSequenceClassification", attention="eager")
    patched = fastgate.patch(copy.deepcopy(model))
    state = get_encoder(patched)
    state.add_replacements(kind)
    inputs = batch(model, "ForSequenceClassification", side)
    draw_replacements(patched)
    values = [
        {name: p.detach().clone().requires_grad_() for name, p in state.replacement(i).named_parameters()}
        for i in range(3)
    ]
    assert all(tuple(vectors) == VECTORS[kind] for vectors in values)
    soft = [torch.tensor(float(z), requires_grad=True) for z in gates]
    ours = [t if 0 < z < 1 else float(z) for t, z in zip(soft, gates, strict=True)]
    state.set_gates(ours)
    got = patched(**inputs).logits
    hand = [torch.tensor(float(z), requires_grad=True) for z in gates]
    want = model.classifier(model.bert.pooler(padded(model.bert, inputs, hand, values)))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    weights = torch.randn_like(want)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for i, z in enumerate(gates):
        replacement = state.replacement(i)
        if 0 < z < 1:
            torch.testing.assert_close(soft[i].grad, hand[i].grad, rtol=1e-4, atol=1e-4)
        for name, parameter in replacement.named_parameters():
            if z < 1:
                torch.testing.assert_close(parameter.grad, values[i][name].grad, rtol=1e-4, atol=1e-5)
    for (name, ours_), theirs in zip(patched.named_parameters(), model.parameters(), strict=False):
        if "replacement" in name:
            break
        if ours_.grad is not None and "key.bias" not in name:
            torch.testing.assert_close(ours_.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_record_holds_what_was_computed():
    model = fastgate.patch(make("Bert", "ForSequenceClassification", layers=4))
    state = get_encoder(model)
    inputs = batch(model, "ForSequenceClassification")
    with torch.no_grad():
        whole = model(**inputs, output_hidden_states=True)
        state.set_gates([1.0, 1.0, 0.0, 0.0])
        narrow_whole = model(**inputs, output_hidden_states=True).hidden_states
        with state.record() as trace:
            model(**inputs)
    assert len(trace.hidden) == 5 and [i for i, _ in trace.attention_output] == [0, 1]
    for i, (index, rows) in enumerate(trace.hidden):
        assert len(index) == (sum(LENGTHS) if i < 2 else len(LENGTHS))
        torch.testing.assert_close(rows, narrow_whole[i].flatten(0, 1)[index], rtol=0, atol=1e-5)
    assert not torch.allclose(whole.hidden_states[4][:, 0], narrow_whole[4][:, 0])
    layer = model.bert.encoder.layer[0]
    index, h = trace.hidden[0]
    normed = layer.attention.output.LayerNorm(h + trace.attention_output[0][1])
    torch.testing.assert_close(
        layer.output(layer.intermediate(normed), normed), trace.hidden[1][1], rtol=0, atol=1e-5
    )


def test_gates_are_checked():
    model = fastgate.patch(make("Bert", "Model"))
    state = get_encoder(model)
    for gates in ([1.0], [1.0, 0.5, 1.0], [torch.ones(2), 1.0, 1.0]):
        with pytest.raises(fastgate.ArgumentError, match="gates"):
            state.set_gates(gates)
    fastgate.prune(model, keep=[0])
    with pytest.raises(fastgate.ArgumentError, match=r"gates\[1\]"):
        state.set_gates([1.0, 1.0, 0.0])


def test_training_draws_dropout_and_repeats_by_seed():
    model = fastgate.patch(make("Bert", "ForSequenceClassification")).train()
    get_encoder(model).set_gates([0.0, 1.0, 0.0])
    inputs = batch(model, "ForSequenceClassification")
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(model(**inputs).logits)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


class Adapted(nn.Linear):
    """What an adapter leaves in a Linear's place: its product and a correction."""

    def forward(self, x):
        return super().forward(x) + 0.1 * x.sum(-1, keepdim=True)


def _adapt(intermediate):
    intermediate.dense.__class__ = Adapted


def _activate(intermediate, activation):
    del intermediate.intermediate_act_fn
    intermediate.intermediate_act_fn = activation


def _hook(module):
    module.register_forward_hook(lambda module, inputs, output: output * 0.5)


# What the first half of a feed-forward block may be, and whether linear_gelu computes it.
INTERMEDIATES = {
    "gelu": ("gelu", None, True),
    "torch's gelu": ("relu", lambda block: _activate(block, nn.GELU()), True),
    "a function": ("relu", lambda block: _activate(block, nn.functional.gelu), True),
    "no bias": ("gelu", lambda block: setattr(block.dense, "bias", None), True),
    "gelu_new": ("gelu_new", None, False),
    "gelu_python": ("gelu_python", None, False),
    "relu": ("relu", None, False),
    "torch's tanh": ("relu", lambda block: _activate(block, nn.GELU("tanh")), False),
    "an adapter": ("gelu", _adapt, False),
    "a hook on the product": ("gelu", lambda block: _hook(block.dense), False),
    "a hook on the activation": ("gelu", lambda block: _hook(block.intermediate_act_fn), False),
}


@pytest.mark.parametrize("what", INTERMEDIATES)
def test_only_an_exact_gelu_after_a_plain_linear_is_fused(what, monkeypatch):
    from fastgate.runtime.steps import feed_forward

    activation, change, fused = INTERMEDIATES[what]
    model = make("Bert", "ForTokenClassification", hidden_act=activation)
    for layer in model.bert.encoder.layer:
        if change is not None:
            change(layer.intermediate)
    patched = fastgate.patch(copy.deepcopy(model))
    calls = []
    original = feed_forward.linear_gelu
    monkeypatch.setattr(
        feed_forward, "linear_gelu", lambda *of: (calls.append(of[0].shape[0]), original(*of))[1]
    )
    inputs = batch(model, "ForTokenClassification", labels=True)
    losses = [each(**inputs).loss for each in (model, patched)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    assert calls == ([sum(LENGTHS)] * 3 if fused else [])
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(patched.bert.encoder.parameters(), model.bert.encoder.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    noted = "intermediate called as BertIntermediate" in " ".join(str(fastgate.explain(patched)).split())
    assert noted != fused


def test_a_hook_on_the_blocks_backward_sees_it_run():
    """A hook on its forward is refused."""
    model = fastgate.patch(make("Bert", "ForTokenClassification"))
    seen = []
    block = model.bert.encoder.layer[1].intermediate
    block.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    model(**batch(model, "ForTokenClassification", labels=True)).loss.backward()
    assert seen == [(sum(LENGTHS), 64)]


@pytest.mark.parametrize("kind", VECTORS)
def test_a_skipped_first_norm_follows_the_embeddings_dropout(kind):
    """Inside embed_norm as its second norm, but for a vector added behind the dropout; recording keeps them
    apart: the same values either way, and the same mask."""
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = fastgate.patch(make("Bert", "ForSequenceClassification", **options)).train()
    model.bert.embeddings.dropout.p = 0.4
    state = get_encoder(model)
    state.add_replacements(kind)
    for parameter in state.replacement(0).parameters():
        nn.init.normal_(parameter, std=0.3)
    state.set_gates([0.0, 1.0, 1.0])
    inputs, results = batch(model, "ForSequenceClassification"), []
    for recording in (False, True):
        model.zero_grad()
        torch.manual_seed(4)
        with state.record() if recording else contextlib.nullcontext(), embeddings_called() as called:
            logits = model(**inputs).logits
        logits.square().sum().backward()
        assert [c["weight2"] is not None for c in called] == [kind == "zero" and not recording]
        results.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    (logits, grads), (want, want_grads) = results
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
    for name, grad in want_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5, msg=name)


@contextlib.contextmanager
def embeddings_called():
    """The keywords of every call of embed_norm that the encoder makes."""
    from fastgate.runtime.steps import embedding

    called, original = [], embedding.embed_norm

    def embed_norm(*operands, **keywords):
        called.append({"weight2": None, **keywords})
        return original(*operands, **keywords)

    with mock.patch.object(embedding, "embed_norm", embed_norm):
        yield called


@pytest.mark.parametrize(
    "option", ["max_norm", "scale_grad_by_freq", "sparse", "type padding", "dtype", "hook"]
)
def test_tables_that_do_more_than_gather_run_as_modules(option):
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = make("Bert", "ForSequenceClassification", **options)
    tables = model.bert.embeddings
    if option == "type padding":
        tables.token_type_embeddings.padding_idx = 0
    elif option == "dtype":
        tables.position_embeddings.to(torch.float64)
        tables.LayerNorm.to(torch.float64)
        tables.dropout = ToFloat()
    elif option == "hook":
        tables.word_embeddings.register_forward_hook(lambda module, args, out: out * 1.5)
    else:
        setattr(tables.word_embeddings, option, 0.5 if option == "max_norm" else True)
    patched, inputs, results = (
        fastgate.patch(copy.deepcopy(model)),
        batch(model, "ForSequenceClassification"),
        [],
    )
    for each in (model, patched):
        with embeddings_called() as called:
            logits = each.train()(**inputs).logits
        assert not called
        logits.square().sum().backward()
        results.append((logits, each.bert.embeddings.word_embeddings.weight, each.bert.embeddings))
    (want, words, _), (got, ours, embeddings) = results
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, words, rtol=0, atol=0)
    assert ours.grad.is_sparse == (option == "sparse")
    torch.testing.assert_close(ours.grad.to_dense(), words.grad.to_dense(), rtol=1e-4, atol=1e-5)
    if option == "type padding":
        assert not embeddings.token_type_embeddings.weight.grad[0].any()


class ToFloat(nn.Module):
    """In dropout's place: rows of a wider dtype back to the layers' own."""

    p = 0.0

    def forward(self, rows):
        return rows.float()


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_ids_are_embedded_in_one_op_and_given_embeddings_are_not(family):
    model = make(family, "Model")
    patched, inputs = fastgate.patch(copy.deepcopy(model)), batch(model, "Model")
    with torch.no_grad(), embeddings_called() as called:
        patched(**inputs)
        assert len(called) == 1
        words = patched.embeddings.word_embeddings(inputs.pop("input_ids"))
        got = patched(inputs_embeds=words, **inputs).last_hidden_state
        assert len(called) == 1
        want = model(inputs_embeds=words, **inputs).last_hidden_state
    rows = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[rows], want[rows], rtol=1e-5, atol=1e-5)


def test_the_key_bias_of_an_absorbed_attention_gets_a_zero_gradient():
    """It cancels in the softmax; a missing gradient would stop DDP."""
    model = fastgate.patch(make("Bert", "ForSequenceClassification", layers=2))
    model(**batch(model, "ForSequenceClassification")).logits.sum().backward()
    attention = model.bert.encoder.layer[1].attention.self
    assert torch.equal(attention.key.bias.grad, torch.zeros_like(attention.key.bias))
    assert attention.key.weight.grad.abs().max() > 0
