"""Numbers that are not finite stop a training, by name; an overflow now and then or no label does not."""

import pytest
import torch
import transformers
from helpers.training_loop import TOTAL, a_pruner, batch, bert, config, loss_of, run
from transformers import Trainer

import fastgate
from fastgate.errors import ArgumentError
from fastgate.models.handle import get_encoder
from fastgate.pruning import Distill, baselines, finite
from fastgate.pruning.finite import MAX_OVERFLOWS, STEPS_PER_LOOK, TASK, Finite

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("distill", [Distill(swap=0.0), None])
@pytest.mark.parametrize(("when", "known"), [(0, 2), (4, 5), (14, 16)])
def test_weights_that_become_nan_stop_the_training(when, known, distill):
    """In the warm phase, the search and the recovery; with nothing distilled the scores show it."""
    model = bert()
    pruner = a_pruner(model, bert(seed=1) if distill else None, distill=distill)
    run(pruner, model, when)
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(ArgumentError, match=r"Pruner\.step: .*got NaN or infinity in ") as error:
        run(pruner, model, TOTAL - when, first=when)
    assert f"of step {when + 1}" in str(error.value)
    assert pruner.steps == when


@pytest.mark.parametrize("steps", [0, 3])
def test_a_loss_that_is_nan_is_seen_in_the_gates(steps):
    model = bert()
    pruner = a_pruner(model, distill=None)
    run(pruner, model, 3)
    (float("nan") * loss_of(pruner, model, batch(5))).backward()
    with pytest.raises(ArgumentError, match="NaN or infinity in the gradients of the gates"):
        pruner.step()


def test_a_scaled_loss_may_overflow_now_and_then_but_not_for_ever():
    model = bert()
    pruner = a_pruner(model, distill=None, total=100, harden=0.9)
    run(pruner, model, 12)
    before = pruner.learner.log_alpha.detach().clone()

    def overflow():
        (float("inf") * loss_of(pruner, model, batch(5))).backward()
        pruner.step(grad_scale=2.0)
        model.zero_grad()

    for _ in range(MAX_OVERFLOWS):
        overflow()
    assert torch.equal(before, pruner.learner.log_alpha.detach()) and pruner.steps == 12 + MAX_OVERFLOWS
    with pytest.raises(ArgumentError, match="gradients of the gates"):
        overflow()


def test_an_overflow_between_good_steps_does_not_count():
    model = bert()
    pruner = a_pruner(model, distill=None, total=200, harden=0.9)
    run(pruner, model, 20)
    for i in range(2 * MAX_OVERFLOWS):
        ((float("inf") if i % 2 else 2.0) * loss_of(pruner, model, batch(i))).backward()
        pruner.step(grad_scale=2.0)
        model.zero_grad()
    assert pruner.steps == 20 + 2 * MAX_OVERFLOWS


@pytest.mark.parametrize("known", [True, False])
def test_a_grad_scaler_finds_its_scale_while_the_gates_are_learned(known):
    """known: the Pruner has the scaler; else `step` is told the scale."""
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    pruner = fastgate.Pruner(
        model, config(distill=Distill(swap=0.0), harden=0.9), TOTAL, bert(seed=1), optimizer=optimizer,
        scaler=scaler if known else None,
    )  # fmt: skip
    scales, moved = [], []
    for i in range(TOTAL):
        scaler.scale(loss_of(pruner, model.train(), batch(i))).backward()
        scales.append(scaler.get_scale())
        before = pruner.learner.log_alpha.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        pruner.step(None if known else scales[-1])
        moved.append(not torch.equal(before, pruner.learner.log_alpha.detach()))
        optimizer.zero_grad()
    assert scales[0] > scales[-1] and not moved[2] and moved[-4]
    assert all(torch.isfinite(p).all() for p in pruner.finalize().parameters())


def test_a_device_is_waited_for_once_in_many_steps(monkeypatch):
    monkeypatch.setattr(finite, "_has_several_ranks", lambda: True)
    noted = Finite()
    looks = []
    look = noted._look
    monkeypatch.setattr(noted, "_look", lambda: (looks.append(1), look()))
    for step in range(1, STEPS_PER_LOOK):
        noted.note(TASK, torch.tensor(float("nan") if step == 7 else 1.0))
        noted.end_step(step, 1.0, look=False)
    assert not looks
    with pytest.raises(ArgumentError, match="the task's loss of step 7,"):
        noted.end_step(STEPS_PER_LOOK, 1.0, look=False)


def test_gates_that_are_nan_stop_the_training():
    model = bert()
    pruner = a_pruner(model, distill=None)
    run(pruner, model, 4)
    pruner.learner.multipliers.data.fill_(float("inf"))
    with pytest.raises(ArgumentError, match="NaN or infinity in"):
        run(pruner, model, 3, first=4)


def test_nothing_measured_is_an_error():
    model = bert(head=transformers.BertForTokenClassification)
    pruner = a_pruner(model, distill=None)
    with pytest.raises(ArgumentError, match=r"measured: got no row.*whose attention_mask is not 0"):
        for i in range(3):
            padding = batch(i)
            padding["attention_mask"] = torch.zeros_like(padding["attention_mask"])
            padding["labels"] = torch.full_like(padding["input_ids"], -100)
            loss_of(pruner, model, padding).backward()
            pruner.step()


def test_a_choice_by_a_loss_that_is_nan_is_refused():
    model = fastgate.patch(bert().train())
    unlabelled = {name: value for name, value in batch().items() if name != "labels"}
    with pytest.raises(ArgumentError, match="greedy_by_loss: batches: got no loss"):
        baselines.greedy_by_loss(model, [unlabelled], 2)
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(ArgumentError, match="got a loss of nan"):
        baselines.greedy_by_loss(model, [batch()], 2)
    assert get_encoder(model).gates == [1.0] * 4 and model.training


def test_a_task_loss_that_is_nan_stops_the_trainer(tmp_path):
    from helpers.trainer_runs import trainer

    class Bad(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = outputs.loss * (float("nan") if self.state.global_step == 9 else 1.0)
            return (loss, outputs) if return_outputs else loss

    class Pruning(fastgate.SelfPruningMixin, Bad):
        pass

    found = trainer(tmp_path, Pruning, save_strategy="no")
    with pytest.raises(ArgumentError, match="NaN or infinity in the task's loss of step 10"):
        found.train()


def unlabelled(name):
    """Rows of which every third batch of 8 has no label: a head, and its data."""
    from helpers.trainer_runs import rows

    found = rows()
    for i, row in enumerate(found):
        none, ids = i // 8 % 3 == 1, row["input_ids"]
        if name == "QuestionAnswering":
            del row["labels"]
            row["start_positions"], row["end_positions"] = (8, 8) if none else (1, 2)
        elif name == "SequenceClassification":
            row["labels"] = -100 if none else row["labels"]
        else:
            row["labels"] = torch.full_like(ids, -100) if none else ids % 2
    return getattr(transformers, f"BertFor{name}"), found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("TokenClassification", {}),
        (
            "TokenClassification",
            {"gradient_accumulation_steps": 3, "num_train_epochs": 5, "save_strategy": "no"},
        ),
        ("TokenClassification", {"label_smoothing_factor": 0.1}),
        ("MaskedLM", {}),
        ("SequenceClassification", {}),
        ("QuestionAnswering", {}),
    ],
)
def test_batches_without_labels_do_not_stop_the_trainer(tmp_path, name, options):
    """Their loss is NaN and its gradient 0: the Trainer of transformers goes on."""
    from helpers.trainer_runs import arguments
    from helpers.trainer_runs import bert as small
    from helpers.trainer_runs import config as pruning

    head, data = unlabelled(name)
    given = {"train_sampling_strategy": "sequential", "save_strategy": "no"} | options
    found = fastgate.SelfPruningTrainer(
        head(small().config), arguments(tmp_path, **given), pruning=pruning(), train_dataset=data
    )
    found.train()
    assert len(found.pruner.kept) == 1
    assert all(torch.isfinite(p).all() for p in found.model.parameters())


def test_a_nan_beside_labels_is_none_of_a_batch_without_them():
    noted = Finite()
    labels = torch.tensor([[-100, -100], [-100, -100]])
    noted.note_task(torch.tensor(float("nan")), {"labels": labels})
    noted.end_step(1, 1.0, look=True)
    labels[0, 0] = 1
    noted.note_task(torch.tensor(float("nan")), {"labels": labels})
    with pytest.raises(ArgumentError, match="the task's loss of step 2"):
        noted.end_step(2, 1.0, look=True)
