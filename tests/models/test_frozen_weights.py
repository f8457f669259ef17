"""The weights of a frozen model: state dicts, new values, dtypes and moves; packed ones cannot go stale."""

from __future__ import annotations

import pytest
import torch
from helpers import encoders
from helpers.bfloat16 import NEEDS_BFLOAT16
from helpers.frozen_models import frozen, outputs, packed
from torch import nn

import fastgate


def test_the_state_dict_is_the_plain_models():
    plain, ours = frozen("ForTokenClassification")
    one, other = plain.state_dict(), ours.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_new_weights_are_packed_anew():
    plain, ours = frozen()
    batch = encoders.batch(plain, "ForSequenceClassification")
    before = outputs(ours, batch)[0]
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.1)
    ours.load_state_dict(plain.state_dict())
    assert not torch.allclose(outputs(ours, batch)[0], before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outputs(ours, batch)[0], outputs(plain, batch)[0], rtol=1e-4, atol=1e-5)


def test_a_state_dict_that_does_not_fit_is_refused():
    _, ours = frozen("ForTokenClassification")
    whole = ours.state_dict()
    short = {name: value for name, value in whole.items() if name != "classifier.weight"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"classifier.weight"'):
        ours.load_state_dict(short)
    with pytest.raises(RuntimeError, match=r"size mismatch for classifier.weight"):
        ours.load_state_dict({**whole, "classifier.weight": torch.zeros(2, 2)})
    assert not ours.load_state_dict(short, strict=False).unexpected_keys


@NEEDS_BFLOAT16
def test_another_dtype_is_packed_anew():
    plain, ours = frozen()
    ours.to(torch.bfloat16)
    assert {module.packed.dtype for module in packed(ours)} == {torch.bfloat16}
    batch = encoders.batch(plain, "ForSequenceClassification")
    want = outputs(plain.to(torch.bfloat16), batch)[0]
    torch.testing.assert_close(outputs(ours, batch)[0], want, rtol=0.05, atol=0.05)


@NEEDS_BFLOAT16
def test_assigned_weights_have_the_dtype_they_come_in():
    plain, ours = frozen("ForTokenClassification")
    state = {name: t.to(torch.bfloat16) for name, t in plain.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    assert {module.packed.dtype for module in packed(ours)} == {torch.bfloat16}
    fastgate.thaw(ours)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert all(torch.equal(t, state[name]) for name, t in ours.state_dict().items())


def test_moves_that_change_nothing_leave_the_packed_weights():
    """Query, key and value are one product still."""
    _, ours = frozen("ForTokenClassification")
    before = [module.packed for module in packed(ours)]
    ours.to("cpu").float().share_memory()
    assert all(module.packed is one for module, one in zip(packed(ours), before, strict=True))
    if before[0].in_panels:
        assert all(one.data.is_shared() for one in before)


def test_a_weight_set_on_a_frozen_linear_is_refused():
    """Nobody would read it."""
    plain, model = frozen()
    dense = model.bert.encoder.layer[0].output.dense
    weight = torch.zeros(32, 64)
    for value in (weight, nn.Parameter(weight)):
        with pytest.raises(fastgate.Unsupported, match=r"frozen Linear.*fastgate.thaw"):
            dense.weight = value
    with pytest.raises(fastgate.Unsupported, match=r"frozen Linear.*fastgate.thaw"):
        dense.register_parameter("weight", nn.Parameter(weight))
    batch = encoders.batch(plain, "ForSequenceClassification")
    parameters = {name: p.detach() * 1.1 for name, p in plain.named_parameters()}
    with pytest.raises(fastgate.Unsupported, match=r"frozen Linear.*fastgate.thaw"):
        torch.func.functional_call(model, parameters, (), batch)
    torch.testing.assert_close(outputs(model, batch), outputs(plain, batch), rtol=0, atol=1e-5)


def test_asking_for_a_frozen_weight_says_what_to_do():
    dense = frozen()[1].bert.encoder.layer[0].output.dense
    assert not hasattr(dense, "weight") and getattr(dense, "weight", None) is None
    with pytest.raises(fastgate.Unsupported, match=r"Linear.weight: got a packed weight.*fastgate.thaw"):
        _ = dense.weight.shape
    with pytest.raises(AttributeError, match="has no attribute 'gain'"):
        _ = dense.gain


@pytest.mark.parametrize("move", ["half", "double", "meta"])
def test_a_move_that_is_refused_moves_nothing(move):
    plain, model = frozen()
    batch = encoders.batch(plain, "ForSequenceClassification")
    want = outputs(model, batch)
    with pytest.raises(fastgate.Unsupported, match=r"fastgate.thaw"):
        model.to("meta") if move == "meta" else getattr(model, move)()
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, batch), want, strict=True))
