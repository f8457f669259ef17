"""What a Pruner changed is given back: by finalize, detach, an exception, or when it is lost."""

import copy
import gc

import pytest
import torch
from helpers.training_loop import TOTAL, a_pruner, batch, bert, config, facts, loss_of, run
from torch import nn

import fastgate
from fastgate.errors import ArgumentError
from fastgate.models.handle import get_encoder
from fastgate.pruning import baselines

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("teaches", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 6, 15])
def test_detach_leaves_a_dense_model_with_the_weights_it_has(tmp_path, teaches, steps):
    model = bert(dropout=0.4).train()
    teacher = bert(dropout=0.4, seed=1).train() if teaches else None
    names = list(model.state_dict())
    teacher_before = facts(teacher) if teaches else None
    pruner = a_pruner(model, teacher)
    run(pruner, model, steps)
    assert pruner.detach() is model
    assert list(model.state_dict()) == names and set(facts(model)[0]) == {0.4}
    assert get_encoder(model).gates == [1.0] * 4 and get_encoder(model).runtime.trace is None
    if teaches:
        assert facts(teacher) == teacher_before
    plain = bert(dropout=0.4)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(**batch()).logits, plain.eval()(**batch()).logits)
    fastgate.save(model, tmp_path / "saved")
    fastgate.unpatch(model)


def test_finalize_gives_the_teacher_back():
    model, teacher = bert(), bert(seed=1).train()
    teacher.bert.embeddings.requires_grad_(False)
    before = facts(teacher)
    pruner = a_pruner(model, teacher)
    run(pruner, model, TOTAL)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    pruner.finalize()
    assert facts(teacher) == before


def test_a_module_the_user_keeps_in_eval_mode_stays_so():
    """While the model teaches itself, and after a choice by the loss."""
    model = bert(dropout=0.5).train()
    model.bert.embeddings.eval()
    pruner = a_pruner(model)
    loss_of(pruner, model, batch())
    assert model.training and not model.bert.embeddings.dropout.training
    pruner.detach()
    baselines.greedy_by_loss(model, [batch()], 3)
    assert model.training and not model.bert.embeddings.dropout.training


def test_a_teacher_of_two_is_given_back_by_the_second():
    teacher = bert(seed=1, dropout=0.4).train()
    before = facts(teacher)
    models = [bert(), bert()]
    pruners = [a_pruner(model, teacher) for model in models]
    for pruner, model in zip(pruners, models, strict=True):
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        run(pruner, model, TOTAL)
        pruner.finalize()
    assert facts(teacher) == before


@pytest.mark.parametrize("steps", [0, 3])
def test_a_pruner_that_is_lost_gives_dropout_back(steps):
    model = bert(dropout=0.4)
    pruner = a_pruner(model, bert(seed=1))
    run(pruner, model, steps)
    assert set(facts(model)[0]) == {0.0}
    del pruner
    gc.collect()
    assert set(facts(model)[0]) == {0.4}


def test_a_detached_pruner_does_not_begin_again():
    model = bert()
    pruner = a_pruner(model)
    run(pruner, model, 3)
    pruner.detach()
    for call in (
        pruner.step,
        pruner.harden,
        pruner.finalize,
        pruner.reopen,
        pruner.state_dict,
        pruner.detach,
    ):
        with pytest.raises(ArgumentError, match=r"got detached.*make a new Pruner"):
            call()
    a_pruner(model).detach()
    run(a_pruner(model), model, TOTAL)


@pytest.mark.parametrize("steps", [0, 3, 15])
def test_an_exception_in_a_loop_gives_back_what_was_changed(steps):
    model, teacher = bert(dropout=0.4), bert(seed=1).train()
    before = facts(teacher)
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        fastgate.Pruner(model, config(), TOTAL, teacher) as pruner,
    ):
        assert set(facts(model)[0]) == {0.0}
        run(pruner, model, steps)
        if steps:  # what is measured in the warm phase stays measured
            (7.0 * loss_of(pruner, model, batch())).backward()
        pruner.prepare(batch())
        raise RuntimeError("out of memory")
    assert set(facts(model)[0]) == {0.4} and facts(teacher) == before
    assert get_encoder(model).runtime.trace is None
    for call in (lambda: pruner.prepare(batch()), pruner.step):
        with pytest.raises(ArgumentError, match=r"pruner: got closed.*reopen\(\)"):
            call()
    pruner.reopen()
    model.zero_grad()
    assert set(facts(model)[0]) == {0.0}
    run(pruner, model, TOTAL - steps, first=steps)
    whole = bert(dropout=0.4)
    other = a_pruner(whole, bert(seed=1))
    run(other, whole, steps)
    run(other, whole, TOTAL - steps, first=steps)
    assert pruner.history == other.history and pruner.kept == other.kept
    pruner.finalize()
    pruner.close()  # which changes nothing
    assert set(facts(model)[0]) == {0.4} and facts(teacher) == before


def test_two_pruners_of_one_model():
    model = bert(dropout=0.4)
    first = a_pruner(model, bert(seed=1))
    second = a_pruner(model, bert(seed=1))  # the first had not begun
    run(second, model, 4)
    with pytest.raises(ArgumentError, match="a model that another Pruner has trained for 4 steps"):
        a_pruner(model)
    second.detach()
    third = a_pruner(model)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.4}
    with pytest.raises(ArgumentError, match="got detached"):
        first.step()
    run(third, model, TOTAL)
    third.finalize()


@pytest.mark.parametrize("train", [True, False])
def test_a_model_is_copied_between_forward_and_loss(train):
    model = bert()
    pruner = a_pruner(model)
    inputs = pruner.prepare(batch())
    outputs = model.train(train)(**inputs)
    other = copy.deepcopy(model)
    assert torch.isfinite(pruner.loss(outputs, inputs))
    torch.testing.assert_close(other(**inputs).logits, outputs.logits)


def test_a_copy_of_a_model_under_a_pruner_is_pruned_by_itself():
    model = bert()
    pruner = a_pruner(model)
    run(pruner, model, 4)
    other = copy.deepcopy(model)
    found = a_pruner(other)
    run(found, other, TOTAL)
    assert len(found.kept) == 2 and pruner.steps == 4
