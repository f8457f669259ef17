"""The Pruner's terms weigh 1 in the Trainer, however it scales the task's loss: that is measured."""

import pytest
import torch
from helpers.trainer_runs import arguments, bert, config, rows
from torch import nn
from transformers import Trainer, TrainerCallback

import fastgate
from fastgate.errors import Unsupported
from fastgate.pruning import trainer_compat

pytestmark = pytest.mark.slow

STEPS = 6  # of 8 rows each


def loss_of_items(outputs, labels, num_items_in_batch=None):
    """Normalised over all micro-batches of a step, if the Trainer says how many rows they have."""
    total = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def run(folder, cls=fastgate.SelfPruningTrainer, micro_batches=1, rows_a_step=8, count=48, **options):
    """A short training; the weight of the Lagrangian in each step of the search, and the trainer."""
    weights = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if trainer.pruner.phase == "search":
                weights.append(float(trainer.pruner.learner._probe.grad))

    given = {"compute_loss_func": options.pop("compute_loss_func", None)}
    model = options.pop("model", None) or bert()
    trainer = cls(
        model,
        arguments(
            folder, per_device_train_batch_size=rows_a_step // micro_batches, num_train_epochs=1,
            gradient_accumulation_steps=micro_batches, save_strategy="no",
            optim="sgd", max_grad_norm=0.0, **options,
        ),
        pruning=config(distill=fastgate.Distill(swap=0.0, labels=1.0)),
        teacher=bert(seed=5),
        train_dataset=rows(count),
        callbacks=[Watch()],
        **given,
    )  # fmt: skip
    trainer.train()
    return weights, trainer


class WithoutItems(nn.Module):
    """Its forward does not take `num_items_in_batch`: the Trainer divides the loss itself."""

    def __init__(self):
        super().__init__()
        self.bert = bert()

    def forward(self, input_ids, attention_mask, labels=None):
        return self.bert(input_ids, attention_mask=attention_mask, labels=labels)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("across_devices", [False, True])
@pytest.mark.parametrize("loss", ["of the model", "of a function", "without items"])
def test_the_pruners_terms_weigh_one(tmp_path, micro_batches, across_devices, loss):
    options = {
        "of the model": {},
        "of a function": {"compute_loss_func": loss_of_items},
        "without items": {"model": WithoutItems()},
    }[loss]
    weights, trainer = run(
        tmp_path, micro_batches=micro_batches, average_tokens_across_devices=across_devices, **options
    )
    assert trainer.model_accepts_loss_kwargs == (loss != "without items")
    assert trainer.state.global_step == STEPS and len(trainer.pruner.kept) == 1
    assert weights and weights == pytest.approx([1.0] * len(weights))


@pytest.mark.parametrize("counts_items", [True, False])
def test_accumulated_steps_end_as_whole_ones_do(tmp_path, counts_items):
    """Dropout is off and every row counts alike: the number of micro-batches changes rounding alone.

    counts_items: the loss is normalised over all of them; else the Trainer divides each mean.
    """

    def end(micro_batches):
        loss = {"compute_loss_func": loss_of_items} if counts_items else {"model": WithoutItems()}
        options = {"micro_batches": micro_batches, "train_sampling_strategy": "sequential"}
        return run(tmp_path, **options, **loss)[1]

    ends = [end(n) for n in (1, 2, 4)]
    for trainer in ends[1:]:
        assert trainer.pruner.kept == ends[0].pruner.kept
        torch.testing.assert_close(
            trainer.pruner.learner.log_alpha, ends[0].pruner.learner.log_alpha, rtol=1e-3, atol=1e-3
        )
        for name, value in ends[0].model.state_dict().items():
            torch.testing.assert_close(
                trainer.model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name
            )


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches(tmp_path):
    weights, trainer = run(tmp_path, micro_batches=4, count=44)
    assert trainer.state.global_step == STEPS
    assert weights == pytest.approx([1.0] * len(weights))


class Unscaled(Trainer):
    """Undoes the division by the number of micro-batches, as a Trainer of another library might."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.accelerator.backward, backward = self._scaled, self.accelerator.backward
        self._backward = backward
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.accelerator.backward = backward

    def _scaled(self, loss, **kwargs):
        self._backward(2.0 * loss, **kwargs)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_trainer_that_scales_the_loss_otherwise_is_refused_in_its_first_step(tmp_path, micro_batches):
    class Pruning(fastgate.SelfPruningMixin, Unscaled):
        pass

    with pytest.raises(
        Unsupported, match=f"losses of {micro_batches} micro-batches whose weights add up to 2,"
    ):
        run(tmp_path, Pruning, micro_batches=micro_batches)


def test_a_trainer_says_itself_how_its_loss_is_scaled(tmp_path):
    """A mean a micro-batch of a model that is told the number of items, and leaves it alone."""

    class Mean(Trainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    class Pruning(fastgate.SelfPruningMixin, Mean):
        pass

    if not hasattr(Trainer, "loss_is_scaled_for_ga"):
        pytest.skip("this version of transformers does not ask")
    weights, _ = run(tmp_path, Pruning, micro_batches=2)
    assert weights == pytest.approx([1.0] * len(weights))


@pytest.mark.parametrize("name", sorted(trainer_compat.METHODS))
def test_a_method_that_transformers_has_renamed_is_missed_when_a_trainer_is_made(tmp_path, monkeypatch, name):
    monkeypatch.delattr(Trainer, name)
    with pytest.raises(
        Unsupported, match=rf"got transformers [\d.]+.*, which has no Trainer\.{name} as used"
    ):
        run(tmp_path)


@pytest.mark.parametrize("name", sorted(trainer_compat.METHODS))
def test_a_method_that_takes_other_arguments_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Trainer, name, lambda self, *, another: None)
    with pytest.raises(Unsupported, match=rf"no Trainer\.{name} as used here.*install a version"):
        run(tmp_path)


def test_attributes_that_are_not_there_are_named_together(tmp_path, monkeypatch):
    init = Trainer.__init__

    def without(self, *args, **kwargs):
        init(self, *args, **kwargs)
        del self.compute_loss_func, self.model_accepts_loss_kwargs

    monkeypatch.setattr(Trainer, "__init__", without)
    message = r"no Trainer\.model_accepts_loss_kwargs and no Trainer\.compute_loss_func"
    with pytest.raises(Unsupported, match=message):
        run(tmp_path)


def test_an_unknown_number_of_micro_batches_is_refused(tmp_path):
    trainer = fastgate.SelfPruningTrainer(
        bert(),
        arguments(tmp_path, gradient_accumulation_steps=2),
        pruning=config(),
        train_dataset=rows(),
    )
    with pytest.raises(Unsupported, match=r"no Trainer\.current_gradient_accumulation_steps in a step"):
        trainer_compat.micro_batches_to_divide_by(trainer, torch.tensor(8))
    assert trainer_compat.micro_batches_to_divide_by(trainer, None) == 1
