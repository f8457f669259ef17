"""Derivatives beyond one backward: of hidden states, of gradients; and those that are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.encoders import VECTORS, batch, draw_replacements, make, padded
from torch.autograd import forward_ad

import fastgate
from fastgate import ops
from fastgate.models.handle import get_encoder
from fastgate.ops.absorbed_attention import absorbed_attention
from fastgate.ops.attention import attention
from fastgate.ops.embed_norm import embed_norm
from fastgate.ops.gated_add_norm import gated_add_norm
from fastgate.ops.linear import linear
from fastgate.ops.linear_gelu import linear_gelu
from fastgate.ops.ragged import SequenceOffsets
from fastgate.ops.shift_norm import shift_norm

pytestmark = pytest.mark.slow

OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HEADS = ("ForSequenceClassification", "ForTokenClassification", "Model")


def pair(head, **options):
    model = make("Bert", head, attention="eager", **(OFF | options))
    return model, fastgate.patch(copy.deepcopy(model))


def loss_of(model, head, out):
    """A loss of the rows that are read, the same for both models."""
    read = out.last_hidden_state if head == "Model" else out.logits
    if head != "ForSequenceClassification":
        read = read[batch(model, head)["attention_mask"].bool()]
    return read.square().sum()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("selection", [True, [0, 2, -1]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_states_get_gradients(head, as_tuple, selection, checkpointing):
    results = []
    for model in pair(head):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        inputs = batch(model, head)
        out = model(**inputs, output_hidden_states=selection, return_dict=not as_tuple)
        hidden = out[-1] if as_tuple else out.hidden_states
        states = [h for h in hidden if h is not None]
        for h in states:
            h.retain_grad()
        read = out[0] if as_tuple else (out.last_hidden_state if head == "Model" else out.logits)
        mask = inputs["attention_mask"].bool()
        (read if head == "ForSequenceClassification" else read[mask]).square().sum().backward()
        results.append([h.grad[mask] for h in states])
    assert len(results[0]) == len(results[1]) == (4 if selection is True else 3)
    for want, got in zip(*results, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", [[0], [1], []])
@pytest.mark.parametrize("replacement", ["affine", "shift"])
def test_hidden_states_of_a_pruned_model_get_gradients(keep, replacement):
    """A step along the gradient of a hidden state changes the loss as the gradient says."""
    model = draw_replacements(
        fastgate.prune(pair("ForSequenceClassification")[1], keep, replacement)
    ).double()
    inputs = batch(model, "ForSequenceClassification")
    out = model(**inputs, output_hidden_states=True)
    loss = out.logits.square().sum()
    grads = torch.autograd.grad(loss, out.hidden_states)
    step = torch.randn(grads[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = []
    for sign in (1, -1):
        handle = model.bert.embeddings.register_forward_hook(lambda m, a, h, s=sign: h + 1e-5 * s * step)
        moved.append(float(model(**inputs).logits.square().sum()))
        handle.remove()
    want = float((grads[0] * step)[inputs["attention_mask"].bool()].sum())
    assert (moved[0] - moved[1]) / 2e-5 == pytest.approx(want, rel=1e-4)


def test_gradients_of_hidden_states_and_attentions_by_grad():
    results = []
    for model in pair("ForSequenceClassification"):
        out = model(
            **batch(model, "ForSequenceClassification"), output_hidden_states=True, output_attentions=True
        )
        results.append(torch.autograd.grad(out.logits.sum(), (*out.hidden_states[1:3], out.attentions[1])))
    rows = batch(model, "ForSequenceClassification")["attention_mask"].bool()
    for place, (want, got) in enumerate(zip(*results, strict=True)):
        if place < 2:
            want, got = want[rows], got[rows]
        else:
            both = rows[:, None, :, None] & rows[:, None, None, :]
            want, got = want * both, got * both
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def second(model, head, *, inputs_only=False, dtype=torch.float32):
    """(the gradient's square, its gradients by name and of the embeddings)."""
    given = batch(model, head)
    words = model.base_model.embeddings.word_embeddings(given.pop("input_ids")).detach().requires_grad_()
    loss = loss_of(model, head, model(inputs_embeds=words, **given))
    asked = [words] if inputs_only else [words, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(loss, asked, create_graph=True, allow_unused=True)
    mask = given["attention_mask"].bool()
    penalty = grads[0][mask].square().sum() + sum(g.square().sum() for g in grads[1:] if g is not None)
    penalty.backward()
    return penalty.detach(), {n: p.grad for n, p in model.named_parameters()}, words.grad[mask]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("frozen_weights", [False, True])
def test_second_derivatives(head, dtype, frozen_weights):
    """With frozen weights the gradient that comes from above asks for none itself; it counts all the same."""
    results = []
    for model in pair(head):
        model.to(dtype).requires_grad_(not frozen_weights)
        results.append(second(model, head))
    (want, wanted, words), (got, grads, ours) = results
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours, words, rtol=1e-3, atol=1e-4 * float(words.abs().max()))
    scale = max((float(g.abs().max()) for g in wanted.values() if g is not None), default=0.0)
    for name, grad in wanted.items():
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("kind", ["affine", "shift"])
def test_second_derivatives_through_gates_and_replacements(kind, double):
    model = make("Bert", "Model", attention="eager", **OFF).double()
    patched = fastgate.patch(copy.deepcopy(model))
    state = get_encoder(patched)
    state.add_replacements(kind)
    draw_replacements(patched)
    inputs, results = batch(model, "Model"), []
    mask = inputs["attention_mask"].bool()
    values = [
        {n: p.detach().requires_grad_() for n, p in state.replacement(i).named_parameters()} for i in range(3)
    ]
    assert set(values[0]) == set(VECTORS[kind])
    for ours in (False, True):
        gates = [torch.tensor(z, dtype=torch.float64, requires_grad=True) for z in (0.3, 0.6)]
        if ours:
            state.set_gates([gates[0], 0.0, gates[1]])
            out = patched(**inputs).last_hidden_state
            weight = state.replacement(0).scale
        else:
            out, weight = padded(model, inputs, [gates[0], 0.0, gates[1]], values), values[0]["scale"]
        grads = torch.autograd.grad(out[mask].square().sum(), (*gates, weight), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (*gates, weight)))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.fixture
def double():
    """float64 is what torch makes of numbers while the test runs."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def numbers(*shape, seed=0):
    drawn = torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape))
    )
    return drawn.requires_grad_()


def test_every_ops_second_derivative(monkeypatch):
    """Each op through the autograd function that compiled kernels use, in float64."""
    for op in ("attention", "absorbed_attention", "linear_gelu"):
        reference = ops.REFERENCE[op]
        import dataclasses

        monkeypatch.setitem(
            ops.IMPLEMENTATIONS, (op, "cpu"), dataclasses.replace(reference, backend="like a kernel")
        )
    h, vector = 6, lambda seed: numbers(6, seed=seed)
    rows = SequenceOffsets((3, 2), torch.device("cpu"))
    has_left_neighbour = torch.tensor([False, True, True, False, True])
    ids = torch.tensor([1, 0, 2, 1, 3])
    checks = {
        gated_add_norm: lambda x, r, w, b, g, s: gated_add_norm(x, r, w, b, 1e-5, gate=g, scale=s, bias=b),
        embed_norm: lambda t, p, y, w, b: embed_norm(ids, ids, None, t, p, y, w, b, 1e-5, padding_idx=0),
        shift_norm: lambda x, s, w: shift_norm(x, has_left_neighbour, s, s, w, s, w, s, 1e-5),
        linear: linear,
        linear_gelu: linear_gelu,
        attention: lambda q, k, v, b: attention(
            q, k, v, rows, rows, 2, 0.5, q_bias=b, k_bias=b.detach(), v_bias=b
        ),
        absorbed_attention: lambda q, x, k, v, b: absorbed_attention(q, x, k, v, b, rows, 2, 0.5),
    }
    x, square = numbers(5, h), numbers(h, h)
    operands = {
        gated_add_norm: (x, numbers(5, h, seed=9), vector(1), vector(2), numbers(), vector(3)),
        embed_norm: (numbers(4, h), numbers(4, h, seed=1), numbers(2, h), vector(1), vector(2)),
        shift_norm: (x, vector(1), vector(2)),
        linear: (x, square),
        linear_gelu: (x, square, vector(1)),
        attention: (x, numbers(5, h, seed=1), numbers(5, h, seed=2), vector(3)),
        absorbed_attention: (numbers(2, h), x, square, numbers(h, h, seed=1), vector(2)),
    }
    for op, function in checks.items():
        if op is embed_norm:  # the row of padding has no gradient, so its own difference is another
            grads = torch.autograd.grad(
                function(*operands[op]).square().sum(), operands[op], create_graph=True
            )
            assert not grads[0][0].any() and grads[0][1].any()
            penalty = sum(g.square().sum() for g in grads)
            again = torch.autograd.grad(penalty, operands[op])
            assert not again[0][0].any() and all(g.any() for g in again)
            continue
        assert torch.autograd.gradgradcheck(function, operands[op]), op


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_a_dropped_rows_second_derivative(dropout_p):
    """The mask of the second derivative is that of the first."""
    x, residual, weight, bias = numbers(5, 6), numbers(5, 6, seed=1), numbers(6, seed=1), numbers(6, seed=2)

    def run(x, residual):
        torch.manual_seed(3)
        return gated_add_norm(x, residual, weight, bias, 1e-5, dropout_p=dropout_p)

    assert torch.autograd.gradgradcheck(run, (x, residual))


def test_an_operand_made_of_another_counts_once():
    """x is made of residual: each gradient is of the operand alone."""
    results = []
    for run in (
        gated_add_norm,
        lambda x, r, w, b, eps: torch.nn.functional.layer_norm(x + r, (6,), w, b, eps),
    ):
        residual, weight, bias = numbers(5, 6), numbers(6, seed=1), numbers(6, seed=2)
        y = run(residual.sin(), residual, weight, bias, 1e-5)
        (grad,) = torch.autograd.grad(y.square().sum(), residual, create_graph=True)
        results.append((grad, torch.autograd.grad(grad.square().sum(), residual)[0]))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_a_hessian_vector_product():
    results = []
    for model in pair("ForSequenceClassification"):
        inputs = batch(model, "ForSequenceClassification")
        words = model.base_model.embeddings.word_embeddings(inputs.pop("input_ids")).detach()

        def loss(words, model=model, inputs=inputs):
            return model(inputs_embeds=words, **inputs).logits.square().sum()

        results.append(torch.autograd.functional.hvp(loss, words, torch.ones_like(words))[1])
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(results[1][mask], results[0][mask], rtol=1e-3, atol=1e-3)


def test_gradients_in_batches():
    results = []
    for model in pair("ForSequenceClassification"):
        inputs = batch(model, "ForSequenceClassification")
        words = model.base_model.embeddings.word_embeddings(inputs.pop("input_ids")).detach().requires_grad_()
        logits = model(inputs_embeds=words, **inputs).logits[0]
        results.append(torch.autograd.grad(logits, words, torch.eye(3), is_grads_batched=True)[0])
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(results[1][:, mask], results[0][:, mask], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_other_kinds_of_derivatives_are_refused_by_name(frozen):
    """A compiled kernel would drop a tangent without a word."""
    model = pair("ForSequenceClassification")[1]
    inputs = batch(model, "ForSequenceClassification")
    words = model.base_model.embeddings.word_embeddings(inputs.pop("input_ids")).detach()
    if frozen:
        fastgate.freeze(model)

    def logits(words):
        return model(inputs_embeds=words, **inputs).logits

    calls = {
        "jvp": lambda: torch.func.jvp(logits, (words,), (torch.ones_like(words),)),
        "grad": lambda: torch.func.grad(lambda w: logits(w).sum())(words),
        "vmap": lambda: torch.func.vmap(logits)(words[None]),
    }
    for call in calls.values():
        with pytest.raises(fastgate.Unsupported, match=r"torch.func or forward-mode.*unpatch"):
            call()
    with forward_ad.dual_level(), pytest.raises(fastgate.Unsupported, match="forward-mode"):
        logits(forward_ad.make_dual(words, torch.ones_like(words)))
    with torch.no_grad():
        logits(words)


def test_parameters_given_to_functional_call():
    """Without a transform they are what any parameters are."""
    theirs, ours = pair("ForSequenceClassification")
    doubled = {name: (2 * p.detach()).requires_grad_() for name, p in theirs.named_parameters()}
    inputs, results = batch(ours, "ForSequenceClassification"), []
    for model in (theirs, ours):
        logits = torch.func.functional_call(model, doubled, (), inputs).logits
        results.append(
            (logits, *torch.autograd.grad(logits.sum(), list(doubled.values()), materialize_grads=True))
        )
    names = ("logits", *doubled)
    for name, want, got in zip(names, *results, strict=True):
        scale = max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * scale, msg=name)
