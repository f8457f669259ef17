"""Self-pruning in the Trainer: one train(), logs, checkpoints that survive a kill, resuming bit for bit."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import subprocesses
from helpers.trainer_runs import (
    HARDEN,
    STEPS,
    arguments,
    assert_same_end,
    bert,
    config,
    end_state,
    rows,
    trainer,
)
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
)

import fastgate
from fastgate.errors import ArgumentError, CheckpointError
from fastgate.pruning import Distill, trainer_checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    found = trainer(tmp_path_factory.mktemp("whole"))
    found.train()
    return found


def test_one_train_warms_searches_hardens_and_prunes(uninterrupted):
    pruner = uninterrupted.pruner
    assert uninterrupted.state.global_step == STEPS == pruner.steps
    phases = {entry["step"]: entry["phase"] for entry in pruner.history}
    assert (
        phases[1] == "search"
        and phases[HARDEN - 1] == "search"
        and phases[HARDEN] == phases[STEPS] == "recover"
    )
    assert len(pruner.kept) == 1
    removed = [i for i in range(3) if pruner.handle.is_removed(i)]
    assert sorted(removed + pruner.kept) == [0, 1, 2]
    assert "eval_loss" in uninterrupted.evaluate()


def test_gate_history_goes_through_the_trainers_logs(uninterrupted):
    logged = [line for line in uninterrupted.state.log_history if "loss" in line]
    assert [line["step"] for line in logged] == [2, 4, 6, 8, 10, 12]
    for line in logged:
        assert 0 <= line["pruning/gate_0"] <= 1 and line["pruning/hardened"] == float(line["step"] >= HARDEN)
    targets = [line["pruning/target"] for line in logged]
    assert targets == sorted(targets) and targets[-1] == pytest.approx(2 / 3)
    assert logged[-1]["pruning/reduction"] == pytest.approx(2 / 3)
    totals = [line for line in uninterrupted.state.log_history if "train_runtime" in line]
    assert not any("pruning/target" in line for line in totals)


def test_the_finished_model_is_saved_and_loaded(uninterrupted, tmp_path):
    fastgate.save(uninterrupted.model, tmp_path / "out")
    loaded = fastgate.load(tmp_path / "out")
    model, ids = uninterrupted.model.eval(), torch.stack([row["input_ids"] for row in rows(4)])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_checkpoints_of_a_search_are_refused_and_hardened_ones_are_pruned_models(uninterrupted):
    folder = Path(uninterrupted.args.output_dir)
    for step in (2, 6):
        for load in (fastgate.load, AutoModelForSequenceClassification.from_pretrained):
            with pytest.raises(CheckpointError, match=r"still being learned.*resume with"):
                load(folder / f"checkpoint-{step}")
        with pytest.raises(ValueError, match="pip install fastgate"):
            BertForSequenceClassification.from_pretrained(folder / f"checkpoint-{step}")
    last = folder / f"checkpoint-{STEPS}"
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    want = uninterrupted.model.eval()(ids).logits
    for load in (fastgate.load, AutoModelForSequenceClassification.from_pretrained):
        torch.testing.assert_close(load(last)(ids).logits, want)
    with pytest.raises(ValueError, match="pip install fastgate"):
        BertForSequenceClassification.from_pretrained(last)


def test_exact_gates_are_unfinished_too(tmp_path):
    found = trainer(tmp_path, teacher=False, pruning=config(gates="exact"), max_steps=4, num_train_epochs=4)
    for gates in ([1.0, 1.0, 1.0], [1.0, 0.0, 1.0]):
        found.pruner.handle.set_gates(gates)
        found.save_model(tmp_path / "x")
        with pytest.raises(CheckpointError, match="still being learned"):
            fastgate.load(tmp_path / "x")
        with pytest.raises(ArgumentError, match="still being learned"):
            fastgate.save(found.model, tmp_path / "y")


def test_a_plain_trainer_goes_on_with_a_pruned_model(tmp_path):
    model = fastgate.prune(bert(), keep=[1], replacement="affine")
    whole = Trainer(model, arguments(tmp_path, max_steps=4), train_dataset=rows())
    whole.train()
    for folder in ("checkpoint-2", "checkpoint-4"):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        assert [again.bert.fastgate_runtime.gates] == [[0.0, 1.0, 0.0]]
    resumed = Trainer(
        fastgate.prune(bert(4), keep=[1], replacement="affine"),
        arguments(tmp_path, max_steps=4),
        train_dataset=rows(),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


class Counting(Trainer):
    """A subclass with a loss of its own that takes the labels out of its inputs."""

    seen = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        self.seen += 1
        return (loss, outputs) if return_outputs else loss


class PruningCounting(fastgate.SelfPruningMixin, Counting):
    pass


def test_the_mixin_works_on_any_trainer(tmp_path):
    found = trainer(
        tmp_path, PruningCounting, pruning=config(replacement="affine", distill=Distill(hidden=0.0))
    )
    found.train()
    assert found.seen == STEPS and len(found.pruner.kept) == 1
    assert set(type(found).__mro__) >= {fastgate.SelfPruningMixin, Counting, Trainer}


def test_accumulation_is_one_draw_and_one_step(tmp_path):
    found = trainer(
        tmp_path,
        teacher=False,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        save_strategy="no",
    )
    found.train()
    assert found.pruner.steps == STEPS == found.state.global_step and len(found.pruner.kept) == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_pruners_terms_weigh_one_over_an_accumulated_step(tmp_path, accumulate):
    weights = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if found.pruner.phase == "search":
                weights.append(float(found.pruner.learner._probe.grad))

    found = trainer(
        tmp_path, per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate,
        save_strategy="no", callbacks=[Watch()],
    )  # fmt: skip
    found.train()
    assert weights == [1.0] * (HARDEN - 1)


KILLED = """
import os, signal, sys
import torch
from transformers import TrainerCallback
from fastgate.pruning import trainer_checkpoints
from helpers.trainer_runs import trainer
torch.set_num_threads(1)

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "writing":
    seal = trainer_checkpoints.seal
    def kill_half_way(folder):
        if folder.name == "checkpoint-6":
            (folder / "model.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        seal(folder)
    trainer_checkpoints.seal = kill_half_way
trainer(sys.argv[1], callbacks=[Kill()]).train()
"""


@pytest.mark.parametrize(("moment", "left"), [("step", 6), ("writing", 4)])
def test_a_killed_run_resumes_to_the_same_end(uninterrupted, tmp_path, moment, left):
    subprocesses.finish(subprocesses.start(KILLED, tmp_path, moment), -signal.SIGKILL)
    assert trainer_checkpoints.last_complete(tmp_path).name == f"checkpoint-{left}"
    found = trainer(tmp_path)
    found.train(resume_from_checkpoint=True)
    assert found.state.global_step == STEPS
    assert_same_end(end_state(uninterrupted), end_state(found))


@pytest.mark.parametrize("left", [2, 6, 8, 10])
def test_resuming_from_any_checkpoint_ends_the_same(uninterrupted, left, tmp_path):
    found = trainer(tmp_path)
    found.train(resume_from_checkpoint=str(Path(uninterrupted.args.output_dir) / f"checkpoint-{left}"))
    assert_same_end(end_state(uninterrupted), end_state(found))


def test_incomplete_checkpoints_are_skipped_or_refused(uninterrupted, tmp_path):
    for step in (4, 6, 8):
        shutil.copytree(
            Path(uninterrupted.args.output_dir) / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}"
        )
    (tmp_path / "checkpoint-8" / "optimizer.pt").unlink()
    weights = tmp_path / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "checkpoint-10").mkdir()
    assert trainer_checkpoints.last_complete(tmp_path).name == "checkpoint-4"
    found = trainer(tmp_path)
    with pytest.raises(CheckpointError, match="checkpoint-6, incomplete"):
        found.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    with pytest.raises(CheckpointError, match="no folder"):
        found.train(resume_from_checkpoint=str(tmp_path / "checkpoint-99"))
    with pytest.raises(CheckpointError, match="got none in"):
        trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
    found.train(resume_from_checkpoint=True)
    assert_same_end(end_state(uninterrupted), end_state(found))


def test_a_run_of_another_length_is_not_resumed(uninterrupted, tmp_path):
    found = trainer(tmp_path, num_train_epochs=3)
    with pytest.raises(CheckpointError, match="total_steps: got 18, wanted 12"):
        found.train(resume_from_checkpoint=str(Path(uninterrupted.args.output_dir) / "checkpoint-6"))


def test_only_hardened_models_can_be_the_best(tmp_path):
    metrics = iter([0.9, 0.8, 0.7, 0.1, 0.3, 0.2])  # the dense phase scores best
    found = trainer(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True, save_total_limit=2,
    )  # fmt: skip
    found.compute_metrics = lambda prediction: {"score": next(metrics)}
    found.train()
    assert found.state.best_global_step == 10 and found.state.best_metric == 0.3
    assert found.state.best_model_checkpoint == str(tmp_path / "checkpoint-10")
    assert sorted(path.name for path in trainer_checkpoints.checkpoints(tmp_path)) == [
        "checkpoint-10",
        "checkpoint-12",
    ]
    noted = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert noted["best_model_checkpoint"] == str(tmp_path / "checkpoint-10")
    assert len(found.pruner.kept) == 1


def test_a_model_is_made_anew_for_each_trial(tmp_path):
    found = fastgate.SelfPruningTrainer(
        args=arguments(tmp_path, save_strategy="no"),
        pruning=config(),
        model_init=lambda: bert(),
        train_dataset=rows(),
    )
    for _ in range(2):
        found.train()
        assert found.pruner.model is found.model and len(found.pruner.kept) == 1


def test_what_cannot_work_is_refused(uninterrupted, tmp_path):
    with pytest.raises(ArgumentError, match=r"pruning: got 0\.8, wanted a PruningConfig"):
        trainer(tmp_path, pruning=0.8)
    with pytest.raises(ArgumentError, match=r"pruned by an earlier train\(\)"):
        uninterrupted.train()


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(fastgate.Unsupported, match="auto_find_batch_size: got set"):
        trainer(tmp_path, auto_find_batch_size=True)


def test_replacements_have_no_weight_decay(tmp_path):
    found = trainer(tmp_path)
    decayed = found.get_decay_parameter_names(found.model)
    assert decayed and not any("replacement" in name for name in decayed)
    assert found.args.ddp_find_unused_parameters is True


def test_replacements_have_a_rate_of_their_own(tmp_path):
    found = trainer(tmp_path, pruning=config(replacement="shift", replacement_lr=20.0))
    names = {id(p): name for name, p in found.model.named_parameters()}
    groups = found.create_optimizer().param_groups
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(names) == sum(len(group["params"]) for group in groups)
    assert {rate for name, rate in rates.items() if ".replacement." in name} == {2e-2}
    assert {rate for name, rate in rates.items() if ".replacement." not in name} == {1e-3}


@pytest.mark.parametrize("bf16", [False, True])
def test_a_teacher_computes_in_the_precision_its_student_trains_in(bf16, tmp_path):
    one = trainer(tmp_path, bf16=bf16, max_steps=4)
    seen = set()
    teacher = one._teacher
    teacher.bert.encoder.layer[0].intermediate.dense.register_forward_hook(
        lambda module, given, made: seen.add(made.dtype)
    )
    one.train()
    assert seen == {torch.bfloat16 if bf16 else torch.float32}
    assert {p.dtype for p in one.model.parameters()} == {torch.float32}
