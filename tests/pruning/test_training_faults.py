"""What goes wrong in a training is said, and what a training changed is given back."""

import contextlib
import copy
import gc
import warnings

import numpy as np
import pytest
import torch
import transformers
from helpers.training_loop import batch, bert, loss_of, run
from torch import nn
from transformers import Trainer, TrainerCallback

import fastgate
from fastgate.errors import ArgumentError, CheckpointError, Unsupported
from fastgate.models.handle import get_encoder
from fastgate.pruning import Distill, Fixed, baselines, finite
from fastgate.pruning.finite import MAX_OVERFLOWS, STEPS_PER_LOOK, TASK, Finite
from fastgate.pruning.gate_search import SEPARATED
from fastgate.pruning.objective import Costs, Objective

pytestmark = pytest.mark.slow

TOTAL = 20


def config(**options):
    options = {"warm": 0.1, "ramp": 0.4, "harden": 0.6, "gate_lr": 0.3} | options
    return fastgate.PruningConfig(options.pop("target", fastgate.Sparsity(0.5)), **options)


def a_pruner(model=None, teacher=None, total=TOTAL, **options):
    return fastgate.Pruner(model or bert(), config(**options), total, teacher)


# -- numbers that are not finite


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


# -- optimizers


def rates(model, optimizer):
    """Parameter -> (its learning rate, its weight decay), each of them once in the optimizer."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer.param_groups
    settings = [(id(p), group["lr"], group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(settings) == len({p for p, *_ in settings}) == len(names)
    return {names[p]: tuple(rest) for p, *rest in settings}


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("ratio", [1.0, 20.0])
def test_an_optimizer_gets_the_replacements_whenever_it_is_made(made, ratio):
    model = bert()
    settings = config(replacement_lr=ratio)
    if made == "before":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        fastgate.Pruner(model, settings, TOTAL, optimizer=optimizer)
    else:
        pruner = fastgate.Pruner(model, settings, TOTAL)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        pruner.prepare_optimizer(optimizer)
    for name, setting in rates(model, optimizer).items():
        assert setting == (ratio * 1e-3 if ".replacement." in name else 1e-3, 0.1), name


def test_added_replacements_have_the_settings_of_the_norm_beside_them():
    model = bert()
    named = dict(model.named_parameters())
    plain = [p for name, p in named.items() if "LayerNorm" in name or name.endswith("bias")]
    decayed = [p for name, p in named.items() if not ("LayerNorm" in name or name.endswith("bias"))]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 2e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    fastgate.Pruner(model, config(replacement_lr=10.0), TOTAL, optimizer=optimizer)
    assert {setting for name, setting in rates(model, optimizer).items() if ".replacement." in name} == {
        (2e-2, 0.0)
    }
    replaced = bert()
    optimizer = torch.optim.AdamW(replaced.parameters())
    fastgate.Pruner(replaced, config(replacement="zero"), TOTAL, optimizer=optimizer)
    assert len(optimizer.param_groups) == 1  # there is nothing to add


@pytest.mark.parametrize("made", ["before", "after"])
def test_a_scheduler_is_made_after_the_rates_are_set(made):
    model = bert(dropout=0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if made == "before":
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        with pytest.raises(
            ArgumentError, match=r"got an optimizer that has a scheduler.*before the scheduler"
        ):
            fastgate.Pruner(model, config(), TOTAL, bert(seed=1), optimizer=optimizer)
        assert len(optimizer.param_groups) == 1 and set(facts(model)[0]) == {0.4}
        assert not any("replacement" in name for name, _ in model.named_parameters())
        return
    pruner = fastgate.Pruner(model, config(), TOTAL, optimizer=optimizer)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    pruner.prepare_optimizer(optimizer)  # which changes nothing
    assert len(optimizer.param_groups) == 2


def test_a_model_with_nothing_to_train_is_refused():
    """As PEFT leaves it after merge_and_unload()."""
    model = bert().requires_grad_(False)
    pruner = a_pruner(model)
    with pytest.raises(ArgumentError, match=r"every weight with requires_grad False.*requires_grad_\(True\)"):
        run(pruner, model.train(), 1)
    model = bert()
    model.bert.requires_grad_(False)
    run(a_pruner(model), model, 3)


def test_rates_are_set_once():
    model = bert()
    pruner = a_pruner(model, replacement_lr=20.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        pruner.prepare_optimizer(optimizer)
        assert sorted(group["lr"] for group in optimizer.param_groups) == [1e-3, 2e-2]


@pytest.mark.parametrize("target", [fastgate.Sparsity(0.5), Fixed((1, 2))])
def test_replacements_that_never_train_are_noticed(target):
    """By who does not give the Pruner the optimizer."""
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner = a_pruner(model, target=target)

    def loop():
        for i in range(TOTAL):
            loss_of(pruner, model, batch(i)).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match="no replacement has moved since the warm phase"):
        loop()
    for trained in (target, Fixed(tuple(range(4)))):  # with every attention kept there is none to train
        model = bert()
        pruner = a_pruner(model, target=trained)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Pruner: no replacement")
            run(pruner, model, TOTAL)


def test_a_trainer_with_an_optimizer_made_before_is_refused(tmp_path):
    from helpers.trainer_runs import arguments, rows
    from helpers.trainer_runs import bert as small
    from helpers.trainer_runs import config as pruning

    model = small()
    optimizers = (torch.optim.AdamW(model.parameters()), None)
    with pytest.raises(
        ArgumentError, match=r"optimizers: got an optimizer without .*optimizer_cls_and_kwargs"
    ):
        fastgate.SelfPruningTrainer(
            model, arguments(tmp_path), pruning=pruning(), train_dataset=rows(), optimizers=optimizers
        )
    assert not any("replacement" in name for name, _ in model.named_parameters())


# -- ends that are no ends


class Stop(TrainerCallback):
    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.error is not None:
                raise self.error
            control.should_training_stop = True


def facts(model):
    dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    return dropouts, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def test_a_training_that_ends_before_hardening_says_so(tmp_path):
    from helpers.trainer_runs import trainer

    found = trainer(tmp_path, callbacks=[Stop(5)])
    found._teacher.requires_grad_(True)
    with pytest.raises(ArgumentError, match=r"train: steps: got an end after step 5 of 12, wanted 8 steps"):
        found.train()
    assert set(facts(found.model)[0]) == {0.1} and found.pruner.handle.gates == [1.0] * 3
    assert found.pruner.handle.runtime.trace is None
    found.pruner.harden()
    found.pruner.finalize()
    assert len(found.pruner.kept) == 1 and found.pruner.handle.runtime.trace is None


def test_a_training_that_ends_after_hardening_is_pruned(tmp_path):
    from helpers.trainer_runs import trainer

    found = trainer(tmp_path, callbacks=[Stop(9)])
    found.train()
    assert len(found.pruner.kept) == 1 and found.pruner.handle.is_removed(0) == (0 not in found.pruner.kept)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", [1, 5, 9])
def test_an_exception_gives_back_what_was_changed(tmp_path, error, step):
    from helpers.trainer_runs import bert as small
    from helpers.trainer_runs import trainer

    found = trainer(tmp_path, callbacks=[Stop(step, error)], save_strategy="no")
    before = facts(small(seed=5))
    with pytest.raises(type(error)):
        found.train()
    assert set(facts(found.model)[0]) == {0.1} and found.pruner.handle.runtime.trace is None
    assert facts(found._teacher) == before
    kept = found.pruner.kept
    assert found.pruner.handle.gates == ([1.0] * 3 if kept is None else [float(i in kept) for i in range(3)])


def test_a_training_goes_on_after_an_exception_as_if_there_had_been_none(tmp_path):
    from helpers.trainer_runs import assert_same_end, end_state, trainer

    whole = trainer(tmp_path / "whole")
    whole.train()
    stop = Stop(7, RuntimeError("out of memory"))
    found = trainer(tmp_path / "cut", callbacks=[stop])
    with pytest.raises(RuntimeError):
        found.train()
    stop.step = -1
    found.train(resume_from_checkpoint=True)
    assert_same_end(end_state(whole), end_state(found))


def test_too_few_steps_are_refused_before_the_first(tmp_path):
    from helpers.trainer_runs import trainer

    found = trainer(tmp_path, max_steps=2)
    with pytest.raises(ArgumentError, match="total_steps: got 2, wanted 3 or more"):
        found.train()
    assert found.pruner.steps == 0 == found.state.global_step


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


def test_a_second_train_says_whether_the_first_ended(tmp_path):
    from helpers.trainer_runs import trainer

    found = trainer(tmp_path, callbacks=[Stop(5, RuntimeError("out of memory"))], save_strategy="no")
    with pytest.raises(RuntimeError):
        found.train()
    message = r"trained for 4 steps by a train\(\) that did not end.*resume_from_checkpoint=True"
    with pytest.raises(ArgumentError, match=message):
        found.train()


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


@pytest.mark.parametrize("train", [True, False])
def test_a_model_is_copied_between_forward_and_loss(train):
    model = bert()
    pruner = a_pruner(model)
    inputs = pruner.prepare(batch())
    outputs = model.train(train)(**inputs)
    other = copy.deepcopy(model)
    assert torch.isfinite(pruner.loss(outputs, inputs))
    torch.testing.assert_close(other(**inputs).logits, outputs.logits)


class Named(nn.Module):
    """A model of the user's own, whose arguments have names of their own."""

    def __init__(self, seed):
        super().__init__()
        self.encoder = bert(seed=seed, head=transformers.BertModel)
        self.head = nn.Linear(16, 2)

    def forward(self, ids, mask, target=None):
        logits = self.head(self.encoder(ids, attention_mask=mask).last_hidden_state[:, 0])
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, target)}


def test_inputs_may_have_other_names():
    """What is measured is what it is under the usual ones; that no token can be swapped is said."""
    measured = []
    for named in (True, False):
        model = Named(0) if named else bert(seed=0)
        pruner = a_pruner(model, Named(1) if named else bert(seed=1))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for i in range(4):
            inputs = batch(i)
            if named:
                inputs = dict(zip(("ids", "mask", "target"), inputs.values(), strict=True))
            said = (
                pytest.warns(UserWarning, match="no token is swapped.*input_ids")
                if named and i == 3
                else None
            )
            with said or contextlib.nullcontext():
                inputs = pruner.prepare(inputs)
            outputs = model(**inputs)
            pruner.loss(outputs, inputs).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        measured.append(pruner.calibration.sizes[[0, 2, 3]])
    assert torch.equal(*measured)


# -- what a run is given


@pytest.mark.parametrize("call", ["prepare", "loss"])
def test_a_batch_is_a_dict(call):
    model = bert()
    pruner = a_pruner(model, bert(seed=1))
    outputs = model.train()(**batch())
    for inputs in (None, batch()["input_ids"], list(batch().values())):
        with pytest.raises(ArgumentError, match=rf"Pruner\.{call}: inputs: got"):
            pruner.prepare(inputs) if call == "prepare" else pruner.loss(outputs, inputs)


def test_outputs_of_another_batch_are_refused():
    model = bert()
    pruner = a_pruner(model, bert(seed=1))
    outputs = model.train()(**pruner.prepare(batch(rows=6)))
    with pytest.raises(ArgumentError, match="inputs: got 4 rows, wanted the 6 that the outputs are of"):
        pruner.loss(outputs, batch(rows=4))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), "2", True])
def test_a_scale_is_a_positive_number(scale):
    with pytest.raises(ArgumentError, match="step: grad_scale: got"):
        a_pruner().step(scale)


@pytest.mark.parametrize("state", [None, {}, {"steps": 1}, {"learner": None}])
def test_a_state_of_something_else_is_refused(state):
    with pytest.raises(CheckpointError, match="load_state_dict: state: got no"):
        a_pruner().load_state_dict(state)


def test_gates_hardened_early_are_those_of_the_whole_target():
    """While the target still rises, exact gates are compared as it asks at its end."""
    model = bert()
    pruner = a_pruner(model, gates="exact", total=50, ramp=0.5)
    run(pruner, model, 8)
    with torch.no_grad():
        pruner.learner.log_alpha.copy_(torch.tensor([-3.0, -1.0, 2.0, 3.0]))
    assert pruner.open_probabilities == [1.0] * 4
    assert pruner.harden() == [2, 3] and pruner.separated is True


@pytest.mark.parametrize(
    ("steps", "options", "name"),
    [
        (1, {"replacement": "mean"}, "replacement"),
        (5, {"target": fastgate.Sparsity(0.25)}, "target"),
        (5, {"gates": "exact"}, "gates"),
        (15, {"target": Fixed((0,))}, "target"),
    ],
)
def test_a_run_is_resumed_with_the_settings_it_began_with(steps, options, name):
    model = bert()
    pruner = a_pruner(model)
    run(pruner, model, steps)
    with pytest.raises(CheckpointError, match=name):
        a_pruner(**options).load_state_dict(pruner.state_dict())


def test_the_target_may_change_while_nothing_is_learned_and_older_states_are_known():
    model = bert()
    pruner = a_pruner(model)
    run(pruner, model, 1)
    a_pruner(target=fastgate.Sparsity(0.25)).load_state_dict(pruner.state_dict())
    run(pruner, model, 4, first=1)
    older = {name: value for name, value in pruner.state_dict().items() if name != "settings"}
    a_pruner(target=fastgate.Sparsity(0.25)).load_state_dict(older)


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        (["NEG", "POS"], ["POS", "NEG"], False),
        (["NEG", "POS"], ["neg", "pos"], True),
        (["NEG", "POS"], ["LABEL_0", "LABEL_1"], True),
        (["LABEL_0", "LABEL_1"], ["LABEL_0", "LABEL_1"], True),
    ],
)
def test_a_teacher_has_the_labels_in_the_same_order(mine, theirs, same):
    model, teacher = bert(), bert(seed=1)
    for one, names in ((model, mine), (teacher, theirs)):
        one.config.id2label = dict(enumerate(names))
    if same:
        a_pruner(model, teacher)
        return
    with pytest.raises(ArgumentError, match=r"teacher: got the labels \['pos', 'neg'\], wanted"):
        a_pruner(model, teacher)
    a_pruner(model, teacher, distill=Distill(logits=0.0))


# -- the order of calls


def test_calls_out_of_order_are_refused():
    model = bert()
    pruner = fastgate.Pruner(model, config(), TOTAL)
    inputs = batch()
    outputs = model(**inputs)
    with pytest.raises(ArgumentError, match=r"pruner\.prepare: got no prepare\(\) since the last loss"):
        pruner.loss(outputs, inputs)
    with pytest.raises(ArgumentError, match=r"pruner\.loss: got no call since the last step"):
        pruner.step()
    inputs = pruner.prepare(inputs)
    with pytest.raises(ArgumentError, match=r"outputs: got no forward since prepare\(\)"):
        pruner.loss(outputs, inputs)
    loss = pruner.loss(model(**inputs), inputs)
    with pytest.raises(ArgumentError, match=r"got no prepare\(\) since the last loss.*pruner\.prepare"):
        pruner.loss(outputs, inputs)
    with pytest.raises(ArgumentError, match=r"pruner\.loss: got no gradient"):
        pruner.step()
    with pytest.raises(
        ArgumentError, match="got not hardened after 0 steps, wanted gates hardened in step 12"
    ):
        pruner.finalize()
    pruner.prepare(inputs)  # a batch that is left out
    loss.backward()
    pruner.step()
    run(pruner, model, TOTAL - 1, first=1)
    pruner.finalize()
    pruner.finalize()  # which changes nothing
    for call in (
        lambda: pruner.loss(outputs, inputs),
        lambda: pruner.prepare({}),
        pruner.step,
        pruner.detach,
    ):
        with pytest.raises(ArgumentError, match="pruner: got finalized"):
            call()
    assert pruner.metrics()["pruning/hardened"] == 1.0 and pruner.state_dict()["kept"] == pruner.kept


def test_a_batch_as_it_was_before_prepare_is_refused():
    """In a step in which tokens are swapped: the teacher would see others than the student."""
    model = bert()
    pruner = a_pruner(model, bert(seed=1))
    run(pruner, model, 3)
    inputs = batch(3)
    prepared = pruner.prepare(inputs)
    outputs = model(**prepared)
    for unprepared in (inputs, dict(inputs)):
        with pytest.raises(ArgumentError, match=r"batch: got the batch as it was before prepare\(\)"):
            pruner.loss(outputs, unprepared)
    assert torch.isfinite(pruner.loss(outputs, {**prepared}))


def test_a_task_loss_of_ones_own_takes_the_place_of_the_models():
    losses = []
    for own in (False, True):
        model = bert()
        pruner = a_pruner(model, bert(seed=1), distill=Distill(labels=0.3))
        inputs = dict(pruner.prepare(batch()))
        outputs = model(**inputs)
        known = outputs.loss.detach()
        task_loss = 2.0 * outputs.loss if own else None
        losses.append(pruner.loss(outputs, inputs, task_loss).detach())
    torch.testing.assert_close(losses[1] - losses[0], 0.3 * known, rtol=1e-4, atol=1e-5)
    for wrong in (0.5, torch.ones(2)):
        with pytest.raises(ArgumentError, match=r"task_loss: got .*, wanted a 0-d tensor"):
            pruner.loss(model(**pruner.prepare(inputs)), inputs, wrong)
    with pytest.raises(
        ArgumentError, match=r"outputs: got no loss.*pruner\.loss\(outputs, batch, task_loss\)"
    ):
        pruner.loss(model(**pruner.prepare({**inputs, "labels": None})), inputs)


def test_labels_that_weigh_nothing_need_not_be_there():
    model = bert()
    pruner = a_pruner(model, bert(seed=1), distill=Distill(labels=0.0))
    unlabelled = {name: value for name, value in batch().items() if name != "labels"}
    loss = loss_of(pruner, model, unlabelled)
    loss.backward()
    pruner.step()
    labelled = bert()
    other = loss_of(a_pruner(labelled, bert(seed=1), distill=Distill(labels=0.0)), labelled, batch())
    assert torch.equal(loss, other)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulated_losses_weigh_as_one(parts):
    """Divided by their number nothing is said, and the end is that of whole batches; else it is said once."""

    def train(divisor):
        model = bert()
        pruner = a_pruner(model, bert(seed=1), distill=Distill(swap=0.0))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        pruner.prepare_optimizer(optimizer)
        for i in range(TOTAL):
            whole = batch(i, rows=8)
            for rows in torch.arange(8).chunk(parts):
                inputs = {name: value[rows] for name, value in whole.items()}
                # Hidden states are compared by the mean over all tokens.
                (loss_of(pruner, model.train(), inputs) / divisor).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        return pruner

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Pruner.step")
        pruner = train(parts)
    assert pruner.steps == TOTAL and len(pruner.kept) == 2
    if parts > 1:
        with pytest.warns(UserWarning, match=f"add up to {parts}, not to 1. Divide") as said:
            train(1)
        assert sum("add up to" in str(warning.message) for warning in said) == 1


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


# -- models that cannot be pruned


class Adapter(nn.Linear):
    """As a layer that PEFT puts into a model."""

    __module__ = "peft.tuners.lora.layer"


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_with_adapters_is_refused(whole):
    model = bert()
    if whole:
        model = nn.Sequential(model)
        model.__class__ = type("PeftModel", (nn.Sequential,), {"__module__": "peft.peft_model"})
    else:
        query = model.bert.encoder.layer[1].attention.self.query
        query.__class__ = Adapter
    with pytest.raises(Unsupported, match=r"a \w+ of PEFT.*merge_and_unload.*fastgate\.save"):
        a_pruner(model)


def test_a_wrapper_that_shares_gradients_comes_after_the_pruner():
    """It would not share those of the replacements."""
    with pytest.raises(Unsupported, match="got a model inside DataParallel, wanted the model itself"):
        a_pruner(nn.DataParallel(bert()))


def test_lora_is_refused_and_what_it_is_merged_into_is_not():
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query", "value"], r=2))
    for model in (made, made.base_model.model):
        with pytest.raises(Unsupported, match="merge_and_unload"):
            a_pruner(model)
    a_pruner(made.merge_and_unload().requires_grad_(True))


def test_a_frozen_model_is_refused():
    model = fastgate.freeze(fastgate.patch(bert().eval()))
    with pytest.raises(ArgumentError, match=r"model: got .* frozen, wanted a model to train.*fastgate\.thaw"):
        a_pruner(model)
    a_pruner(fastgate.thaw(model))


# -- searches that choose nothing


def test_a_tie_is_not_a_choice():
    model = bert()
    pruner = a_pruner(model)
    with pytest.warns(UserWarning, match=r"not told the layers apart: kept \[0, 1\].*within 0\.000"):
        pruner.harden()
    assert pruner.margin == 0.0 and pruner.separated is False
    assert pruner.metrics()["pruning/margin"] == 0.0


@pytest.mark.parametrize(("gap", "separated"), [(1.0, True), (0.01, False)])
def test_the_margin_is_that_of_the_last_kept_and_the_first_dropped(gap, separated):
    pruner = a_pruner()
    pruner.learner.log_alpha.data.copy_(torch.tensor([1.0, 1.0 - gap, 2.0, -3.0]))
    p = pruner.learner.p_open.tolist()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert pruner.harden() == [0, 2]
    assert pruner.margin == pytest.approx(p[0] - p[1]) and pruner.separated is separated
    assert bool(said) is not separated
    assert (pruner.margin >= SEPARATED) is separated


@pytest.mark.parametrize("target", [Fixed((1, 2)), fastgate.Sparsity(0.95)])
def test_without_another_choice_there_is_no_margin(target):
    pruner = a_pruner(target=target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.harden()
    assert pruner.margin is None and pruner.separated is None and "pruning/margin" not in pruner.metrics()


def test_the_margin_of_a_speed_is_that_of_the_next_best_set():
    from itertools import combinations

    layers = 5
    costs = Costs(3.0, 5.0, (2.0, 4.0, 6.0, 8.0, 10.0, 1.0))
    objective = Objective(fastgate.Speedup(1.5), layers)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        p = torch.rand(layers, generator=generator, dtype=torch.float64)
        kept = objective.choose(p, costs)
        sums = []
        for count in range(layers + 1):
            for keep in combinations(range(layers), count):
                open_ = torch.zeros(layers, dtype=torch.float64)
                open_[list(keep)] = 1.0
                fits = float(costs.share(open_)) <= 1 / 1.5 + 1e-9
                if fits and not set(keep) <= set(kept):
                    sums.append(float(p[list(keep)].sum()))
        expected = float(p[kept].sum()) - max(sums) if sums else None
        assert objective.margin(p, costs) == pytest.approx(expected, abs=1e-9)


def test_the_margin_is_kept_with_the_state():
    model = bert()
    pruner = a_pruner(model)
    run(pruner, model, 15)
    assert pruner.history[-1]["margin"] == pruner.margin and pruner.history[0]["margin"] is None
    state = pruner.state_dict()
    again = a_pruner()
    again.load_state_dict(state)
    assert again.margin == pruner.margin is not None
    older = a_pruner()
    older.load_state_dict({name: value for name, value in state.items() if name != "margin"})
    assert older.margin is None and older.kept == pruner.kept


# -- numbers


NUMBERS = [
    (fastgate.Sparsity, "share", 0.5, [1.0, 0.0, -0.5, 2]),
    (fastgate.Speedup, "factor", 2.0, [1.0, 0.5, -2.0]),
    (Distill, "logits", 0.5, [-0.1]),
    (Distill, "hidden", 0.5, [-0.1]),
    (Distill, "labels", 0.5, [-0.1]),
    (Distill, "temperature", 2.0, [0.0, -1.0]),
    (Distill, "dropout", 0.5, [1.0, -0.1]),
    (Distill, "swap", 0.5, [1.1, -0.1]),
    (lambda **kw: config(**kw), "gate_lr", 0.5, [0.0, -1.0]),
    (lambda **kw: config(**kw), "replacement_lr", 2.0, [0.0, -1.0]),
    (lambda **kw: config(**{"harden": 0.6} | kw), "warm", 0.1, []),
    (lambda **kw: config(**kw), "ramp", 0.5, []),
    (lambda **kw: config(**kw), "harden", 0.5, []),
]
NO_NUMBERS = [
    float("nan"),
    float("inf"),
    -float("inf"),
    True,
    "0.5",
    None,
    [0.5],
    1j,
    np.bool_(True),
    np.ones(2),
]


@pytest.mark.parametrize(("make", "name", "good", "bad"), NUMBERS)
def test_settings_are_finite_numbers_and_nothing_else(make, name, good, bad):
    for value in [*NO_NUMBERS, *bad, torch.tensor(float("nan")), np.float32("inf")]:
        with pytest.raises(ArgumentError, match=f"{name}: got "):
            make(**{name: value})
    for value in (good, np.float64(good), np.float32(good), torch.tensor(good)):
        found = make(**{name: value})
        assert type(getattr(found, name)) is float and getattr(found, name) == pytest.approx(good)


@pytest.mark.parametrize("seed", [True, 1.5, "0", None, float("nan"), 2**64])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ArgumentError, match="PruningConfig: seed: got"):
        config(seed=seed)
    assert type(config(seed=np.int64(3)).seed) is int


@pytest.mark.parametrize("total", [2, 0, -1, 2.5, True, "20", float("nan"), None])
def test_a_run_has_a_whole_number_of_steps(total):
    if total is None:
        with pytest.raises(ArgumentError, match="total_steps: got None"):
            a_pruner(total=None).prepare(batch())
        return
    with pytest.raises(ArgumentError, match="total_steps: got"):
        a_pruner(total=total)
    assert a_pruner(total=np.int64(20)).schedule.total == 20


@pytest.mark.parametrize("keep", [1, "01", None, (0.5,), (True,), ("0",), (-1,), (None,)])
def test_layers_chosen_by_hand_are_indices(keep):
    with pytest.raises(ArgumentError, match="Fixed: keep: got"):
        Fixed(keep)
    assert Fixed([np.int64(2), torch.tensor(0)]).keep == (2, 0)


@pytest.mark.parametrize("keep", [True, 1.5, "2", None, 0, 5])
def test_a_number_of_layers_is_whole(keep):
    with pytest.raises(ArgumentError, match="baselines: keep: got"):
        baselines.top_drop(4, keep)


def test_a_share_that_removes_nothing_is_refused():
    with pytest.raises(
        ArgumentError, match=r"share: got 0\.1, which removes none of 4, wanted 0\.125 or more"
    ):
        a_pruner(target=fastgate.Sparsity(0.1))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("config", 0.5), ("teacher", "bert-base"), ("model", "bert-base"), ("model", None)],
)
def test_arguments_of_another_kind_are_refused(tmp_path, argument, value):
    from helpers.trainer_runs import arguments, rows

    given = {"model": bert(), "config": config(), "teacher": None} | {argument: value}
    with pytest.raises(ArgumentError, match=f"Pruner: {argument}: got {value!r}"):
        fastgate.Pruner(given["model"], given["config"], TOTAL, given["teacher"])
    if argument == "teacher":
        with pytest.raises(ArgumentError, match="Pruner: teacher: got 'bert-base'"):
            fastgate.SelfPruningTrainer(
                bert(), arguments(tmp_path), pruning=config(), teacher=value, train_dataset=rows()
            )


def test_a_copy_of_a_model_under_a_pruner_is_pruned_by_itself():
    model = bert()
    pruner = a_pruner(model)
    run(pruner, model, 4)
    other = copy.deepcopy(model)
    found = a_pruner(other)
    run(found, other, TOTAL)
    assert len(found.kept) == 2 and pruner.steps == 4
