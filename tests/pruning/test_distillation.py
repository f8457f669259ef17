"""Distillation: which rows are compared, with what loss, from which teacher."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.training_loop import batch, bert, loss_of, pruning_loss_of, run
from transformers import BertForTokenClassification

import fastgate
from fastgate.errors import ArgumentError
from fastgate.models.handle import get_encoder
from fastgate.pruning import Distill
from fastgate.pruning.distillation import (
    MULTI_LABEL,
    ONE_LABEL,
    REGRESSION,
    SelfTeacher,
    Teacher,
    hidden_loss,
    scored_rows,
    scores_loss,
)


def test_hidden_rows_are_matched_by_index():
    student, teacher = fastgate.patch(bert()), bert(seed=1)
    state = get_encoder(student)
    state.set_gates([0.0, 1.0, 0.0, 0.0])
    inputs = batch()
    with state.record() as record:
        student(**inputs)
    expected = teacher(**inputs, output_hidden_states=True).hidden_states
    taught = Teacher(teacher, student, Distill())
    taught.engage()
    lesson = taught(inputs, want_hidden=True)
    terms = []
    for layer in range(4):
        index, mine = record.hidden[layer + 1]
        assert index.numel() == (int(inputs["attention_mask"].sum()) if layer < 1 else 6)
        terms.append(F.mse_loss(mine, expected[layer + 1].reshape(-1, 16)[index]))
    found = hidden_loss(record.hidden, lesson.hidden, range(4))
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-4, atol=1e-6)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_logits_loss_is_the_softened_divergence():
    mine, theirs = torch.randn(5, 3), torch.randn(5, 3)
    p, q = F.softmax(theirs / 2, -1), F.softmax(mine / 2, -1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(scores_loss(mine, theirs, 2.0, ONE_LABEL), expected)
    torch.testing.assert_close(scores_loss(mine, theirs, 2.0, REGRESSION), F.mse_loss(mine, theirs))
    p, q = torch.sigmoid(theirs / 2), torch.sigmoid(mine / 2)
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(scores_loss(mine, theirs, 2.0, MULTI_LABEL), expected)


def test_token_scores_are_compared_on_labelled_rows_only():
    mine, theirs = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    labels = torch.tensor([[-100, 1, -100, 2], [0, -100, -100, -100]])
    rows = scored_rows({"labels": labels})
    torch.testing.assert_close(
        scores_loss(mine, theirs, 2.0, ONE_LABEL, rows),
        scores_loss(mine[rows], theirs[rows], 2.0, ONE_LABEL),
    )
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(scored_rows({"attention_mask": mask}), mask.bool())


def test_a_token_model_learns_too():
    model, teacher = bert(head=BertForTokenClassification), bert(seed=1, head=BertForTokenClassification)
    config = fastgate.PruningConfig(fastgate.Sparsity(0.5), warm=0.1, ramp=0.3, harden=0.5)
    pruner = fastgate.Pruner(model, config, 10, teacher)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for i in range(10):
        inputs = batch(i)
        inputs["labels"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"] % 2, -100)
        loss = loss_of(pruner, model, inputs)
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert len(pruner.kept) == 2


def test_the_model_as_its_own_teacher_is_left_as_it_was():
    model = fastgate.patch(bert(dropout=0.5)).train()
    state = get_encoder(model)
    inputs = batch()
    gate = torch.tensor(0.4, requires_grad=True)
    state.set_gates([gate, 0.0, 1.0, 0.0])
    lesson = SelfTeacher(model)(inputs, want_hidden=True)
    assert state.gates == [gate, 0.0, 1.0, 0.0] and model.training
    assert not lesson.outputs.logits.requires_grad and len(lesson.hidden) == 5
    dense = bert(dropout=0.5).eval()
    torch.testing.assert_close(lesson.outputs.logits, dense(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_self_distillation_prunes_and_ends_at_hardening():
    model = bert()
    config = fastgate.PruningConfig(fastgate.Sparsity(0.5), warm=0.1, ramp=0.3, harden=0.5)
    pruner = fastgate.Pruner(model, config, 10)
    run(pruner, model, 10)
    assert float(pruning_loss_of(pruner, model, batch(3))) == 0.0 and len(pruner.kept) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "distill, taught, weight, dropout",
    [
        (Distill(), True, 0.3, 0.0),
        (Distill.for_tokens(), True, 1.0, 0.1),
        (Distill(labels=0.5, dropout=0.2), True, 0.5, 0.2),
        (Distill(), False, 1.0, 0.4),  # it teaches itself
        (Distill(logits=0.0, hidden=0.0), True, 1.0, 0.4),  # nobody teaches
        (None, True, 1.0, 0.4),
    ],
)
def test_labels_and_dropout_where_a_dense_teacher_teaches(distill, taught, weight, dropout):
    model, teacher = bert(dropout=0.4), bert(dropout=0.4, seed=1)
    config = fastgate.PruningConfig(fastgate.Sparsity(0.5), warm=0.1, ramp=0.3, harden=0.5, distill=distill)
    pruner = fastgate.Pruner(model, config, 10, teacher if taught else None)
    drops = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert pruner.task_weight == weight and {m.p for m in drops} == {dropout}
    run(pruner, model, 10)
    assert {m.p for m in drops} == {dropout}
    pruner.finalize()
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.4}


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    """Without a word of the labels: while every gate is open no weight has a gradient."""
    model = bert(dropout=0.4)
    config = fastgate.PruningConfig(
        fastgate.Sparsity(0.5), distill=Distill(labels=0.0), warm=0.3, ramp=0.4, harden=0.5
    )
    pruner = fastgate.Pruner(model, config, 10, copy.deepcopy(model))
    inputs = pruner.prepare(batch())
    outputs = model.train()(**inputs)
    assert float(outputs.loss.detach()) > 0.1
    pruner.loss(outputs, inputs).backward()
    found = [p.grad.abs().max() for p in model.parameters() if p.grad is not None]
    assert found and float(torch.stack(found).max()) < 1e-5


@pytest.mark.parametrize(
    "wrong", [{"labels": -1.0}, {"dropout": 1.0}, {"dropout": -0.1}, {"swap": 1.1}, {"swap": -0.1}]
)
def test_weights_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ArgumentError, match=f"Distill: {next(iter(wrong))}: got"):
        Distill(**wrong)
