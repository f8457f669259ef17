"""thaw: Linears, parameters and their requires_grad are given back, and changes meanwhile are kept."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from helpers import encoders
from helpers.bfloat16 import NEEDS_BFLOAT16
from helpers.frozen_models import frozen, packed

import fastgate


@pytest.mark.parametrize("keep", [None, [1]], ids=str)
def test_thaw_gives_the_linears_back(keep):
    plain, ours = frozen(keep=keep)
    state = torch.get_rng_state()
    assert fastgate.thaw(ours) is ours
    assert torch.equal(state, torch.get_rng_state())
    assert not packed(ours) and all(p.requires_grad for p in ours.parameters())
    for (name, one), (_, other) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    batch = encoders.batch(plain, "ForSequenceClassification", labels=True)
    ours(**batch).loss.backward()
    assert fastgate.thaw(plain) is plain


def test_unpatch_thaws_too():
    _, ours = frozen()
    fastgate.unpatch(ours)
    assert not packed(ours) and not hasattr(ours.bert, "fastgate_runtime")


CHANGES = {
    "nothing": lambda model: model,
    "frozen twice": fastgate.freeze,
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "run": lambda model: (model(**encoders.batch(model, "ForTokenClassification")), model)[1],
    "another dtype": lambda model: model.to(torch.bfloat16),
    "loaded": lambda model: (model.load_state_dict(model.state_dict()), model)[1],
}


@pytest.mark.parametrize("back", [fastgate.thaw, fastgate.unpatch], ids=["thaw", "unpatch"])
@pytest.mark.parametrize(
    "change", [pytest.param(c, marks=NEEDS_BFLOAT16 if c == "another dtype" else ()) for c in CHANGES]
)
def test_requires_grad_stays_as_it_was(change, back):
    model = fastgate.patch(encoders.make("Bert", "ForTokenClassification"))
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    fastgate.freeze(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()}.items() <= before.items()
    model = back(CHANGES[change](model))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_an_optimizer_made_before_freeze_trains_after_thaw():
    """Modules and parameters are the ones they were, in their order."""
    model = fastgate.patch(encoders.make("Bert", "ForSequenceClassification"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    fastgate.thaw(fastgate.freeze(model))
    for before, after in ((modules, model.named_modules()), (parameters, model.named_parameters())):
        for (name, one), (same, other) in zip(before, after, strict=True):
            assert name == same and one is other
    batch = encoders.batch(model, "ForSequenceClassification", labels=True)
    first = model(**batch).loss
    first.backward()
    optimizer.step()
    assert model(**batch).loss < first


@NEEDS_BFLOAT16
def test_a_parameter_that_is_held_has_what_the_frozen_model_had():
    plain, ours = frozen("ForTokenClassification")
    fastgate.thaw(ours)
    held = dict(ours.named_parameters())
    fastgate.freeze(ours)
    new = {name: t + 1 for name, t in plain.state_dict().items()}
    ours.load_state_dict(new)
    fastgate.thaw(ours)
    for name, parameter in ours.named_parameters():
        assert parameter is held[name] and torch.equal(parameter, new[name])
    fastgate.freeze(ours.to(torch.bfloat16))
    assert {p.dtype for p in fastgate.thaw(ours.float()).parameters()} == {torch.float32}


def test_a_change_of_a_held_parameter_is_kept_and_said():
    plain = fastgate.patch(encoders.make("Bert", "ForSequenceClassification"))
    held = plain.bert.encoder.layer[1].output.dense.weight
    fastgate.freeze(plain)
    with torch.no_grad():
        held.add_(1.0)
    want = held.clone()
    with pytest.warns(RuntimeWarning, match=r"thaw: bert\.encoder\.layer\.1\.output\.dense\.weight changed"):
        fastgate.thaw(plain)
    weight = plain.bert.encoder.layer[1].output.dense.weight
    assert weight is held and torch.equal(weight, want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastgate.thaw(fastgate.freeze(plain))
    fastgate.freeze(plain)
    new = {name: t * 2 for name, t in plain.state_dict().items()}
    with torch.no_grad():
        held.add_(1.0)
    plain.load_state_dict(new)
    with pytest.warns(RuntimeWarning, match="changed while"):
        fastgate.thaw(plain)
    assert torch.equal(held, new["bert.encoder.layer.1.output.dense.weight"])


def test_weights_are_freed_that_nobody_holds():
    plain, _ = frozen("ForTokenClassification")
    weight = weakref.ref(plain.classifier.weight)
    fastgate.freeze(plain)
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("how", ["model", "each"])
@pytest.mark.parametrize("held", [False, True])
def test_requires_grad_set_while_frozen_holds_after_thaw(flag, how, held):
    model = fastgate.patch(encoders.make("Bert", "ForSequenceClassification")).requires_grad_(not flag)
    parameters = list(model.parameters()) if held else []
    fastgate.freeze(model)
    if how == "model":
        model.requires_grad_(flag)
    else:
        for parameter in model.parameters():
            parameter.requires_grad = flag
    assert model(**encoders.batch(model, "ForSequenceClassification")).logits.requires_grad is flag
    fastgate.thaw(model)
    assert {p.requires_grad for p in model.parameters()} == {flag}
    assert not held or all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
