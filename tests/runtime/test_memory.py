"""Memory: what autograd keeps in training, by hand and against Hugging Face; gradient checkpointing; what
oneDNN keeps."""

import copy
import os

import pytest
import torch
from helpers.bfloat16 import NEEDS_BFLOAT16
from helpers.encoders import LENGTHS, batch, make
from helpers.subprocesses import finish, start
from torch import nn

import fastgate
from fastgate.benchmark.memory import saved_bytes
from fastgate.models.handle import get_encoder
from fastgate.nn import hard_concrete
from fastgate.ops.linear import missing_for_onednn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def test_bytes_by_hand():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    # The first product keeps x, tanh its output, which the second product keeps too.
    assert saved_bytes(lambda: model(x).sum(), model) == 4 * (5 * 8 + 5 * 16)
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert saved_bytes(lambda: frozen(x).sum(), frozen) == 0
    y = x.clone().requires_grad_()
    assert saved_bytes(lambda: frozen(y).sum(), frozen) == 4 * 5 * 16, "weights are no activations"

    def dropped():
        model(x).exp()  # a graph nobody keeps
        return model(x).sum()

    assert saved_bytes(dropped, model) == 4 * (5 * 8 + 5 * 16)


def step(model, inputs):
    return saved_bytes(lambda: model(**inputs).loss, model)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"])
def test_a_patched_model_keeps_less_than_hugging_faces_and_a_pruned_one_less_again(head):
    model = make("Bert", head, layers=6).train()
    inputs = batch(model, head, lengths=(30, 20, 9, 1), labels=True)
    patched = fastgate.patch(copy.deepcopy(model)).train()
    theirs, ours = step(model, inputs), step(patched, inputs)
    assert ours < 0.6 * theirs  # half of the batch is padding
    state = get_encoder(patched)
    state.set_gates([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    closed = step(patched, inputs)
    assert closed < 0.8 * ours
    assert step(fastgate.prune(patched, keep=[0, 4]).train(), inputs) == closed


def test_bytes_of_a_pruned_layer_by_hand():
    """Per row: its input, the intermediate product's output before and after the activation, the sum that the
    norms are of; of these the last one is also the next layer's input up to the norm."""
    hidden, inner, rows = 32, 64, sum(LENGTHS)
    counts = []
    for layers in (3, 4, 5):
        model = fastgate.prune(make("Bert", "ForTokenClassification", layers=layers, **NO_DROPOUT), keep=[0])
        inputs = batch(model, "ForTokenClassification")
        counts.append(saved_bytes(lambda m=model, i=inputs: m.train()(**i).logits.sum(), model))
    a_layer = counts[1] - counts[0]
    assert counts[2] - counts[1] == a_layer
    # input, product, activation, and the second product, whose sum with the input is formed anew; statistics.
    most = 4 * rows * (2 * hidden + 2 * inner + 4)
    assert a_layer <= most


def loss_and_gradients(model, inputs, seed=3, between=None):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**inputs).loss
    if between is not None:
        between()
    loss.backward()
    return loss.detach(), {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same(first, second):
    torch.testing.assert_close(first[0], second[0], rtol=1e-6, atol=1e-6)
    for name, want in first[1].items():
        got = second[1][name]
        assert (want is None) == (got is None), name
        if want is not None:
            torch.testing.assert_close(
                got, want, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("keep", [None, (0, 2), (1,), ()])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"])
def test_gradient_checkpointing_changes_nothing_but_the_memory(head, dropout, keep, reentrant):
    options = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = fastgate.patch(make("Bert", head, **options)).train()
    if keep is not None:
        fastgate.prune(model, keep=keep).train()
    inputs = batch(model, head, labels=True)
    want, bytes_before = loss_and_gradients(model, inputs), step(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(want, loss_and_gradients(model, inputs))
    assert step(model, inputs) < bytes_before
    model.gradient_checkpointing_disable()
    assert_same(want, loss_and_gradients(model, inputs))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_one_draw_of_the_gates_is_seen_by_both_passes(dropout, reentrant):
    """Layers are computed anew with the gates of their forward, whatever was drawn since."""
    options = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = fastgate.patch(make("Bert", "ForSequenceClassification", layers=5, **options)).train()
    state = get_encoder(model)
    state.add_replacements("affine")
    for parameter in (p for i in range(5) for p in state.replacement(i).parameters()):
        nn.init.normal_(parameter, std=0.2)
    inputs = batch(model, "ForSequenceClassification", labels=True)
    drawn = hard_concrete.draw(torch.full((5,), 0.2), torch.Generator().manual_seed(2))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        leaves = [z.clone().requires_grad_() if 0 < z < 1 else z.item() for z in drawn]
        assert {type(z) for z in leaves} == {torch.Tensor, float} and 0.0 in leaves
        state.set_gates(leaves)
        found = loss_and_gradients(model, inputs, between=lambda: state.set_gates([1.0, 0.0, 1.0, 1.0, 0.0]))
        results.append((found, [z.grad for z in leaves if isinstance(z, torch.Tensor)]))
    (want, gate_wanted), (got, gate_got) = results
    assert_same(want, got)
    for a, b in zip(gate_wanted, gate_got, strict=True):
        assert a.abs() > 0
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_above_frozen_embeddings(reentrant):
    """transformers' hook has them require a gradient, without which a reentrant checkpoint gives none."""
    model = make("Bert", "ForSequenceClassification", **NO_DROPOUT).train()
    model.bert.embeddings.requires_grad_(False)
    patched = fastgate.patch(copy.deepcopy(model))
    inputs = batch(model, "ForSequenceClassification", labels=True)
    want = loss_and_gradients(patched, inputs)
    patched.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    patched.enable_input_require_grads()
    assert_same(want, loss_and_gradients(patched, inputs))
    assert want[1]["bert.encoder.layer.0.output.dense.weight"].abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_recorded_hidden_states_carry_gradients_under_checkpointing(reentrant):
    """As the distillation of hidden states needs them; the second pass records nothing again."""
    model = fastgate.patch(make("Bert", "ForSequenceClassification", **NO_DROPOUT)).train()
    inputs = batch(model, "ForSequenceClassification", labels=True)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        with get_encoder(model).record() as record:
            loss = model(**inputs).loss + sum(h.square().mean() for _, h in record.hidden)
            assert len(record.hidden) == 4
            loss.backward()
            assert len(record.hidden) == 4
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert_same(*results)


PRODUCTS = """
import os, sys
import torch
from fastgate.ops import onednn_shapes
from fastgate.ops.linear import linear

if sys.argv[2] == "each":
    onednn_shapes.MAX_EXACT_PRODUCTS = 10**9
dtype, train = getattr(torch, sys.argv[3]), sys.argv[1] == "train"
weight = torch.randn(256, 64, dtype=dtype, requires_grad=train)
torch.nn.functional.linear(torch.randn(4, 64).bfloat16(), torch.randn(8, 64).bfloat16())  # oneDNN is at work

def compute(rows):
    y = linear(torch.randn(rows, 64, dtype=dtype, requires_grad=train), weight)
    if train:
        y.sum().backward()

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

for rows in range(2, 402):
    compute(rows)
before = resident()
for rows in range(402, 802):
    compute(rows)
print(resident() - before)
"""


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=NEEDS_BFLOAT16)])
@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.skipif(missing_for_onednn() != "", reason="no oneDNN")
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_numbers_of_rows_seldom_seen_do_not_pile_up(mode, dtype):
    children = [start(PRODUCTS, mode, which, dtype) for which in ("few", "each")]
    bound, grown = (int(finish(child)) for child in children)
    assert grown > 400 * 100_000, "oneDNN keeps no compiled product here: nothing to bound"
    assert bound < grown / 5
