"""Self-pruning in the Trainer of transformers: a mixin for any subclass, and the plain Trainer with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from fastgate.errors import ArgumentError, format_error
from fastgate.extras import need
from fastgate.pruning import trainer_checkpoints, trainer_compat
from fastgate.pruning.config import PruningConfig
from fastgate.pruning.pruner import Pruner
from fastgate.pruning.recording import Forward
from fastgate.pruning.replacement_training import is_missing
from fastgate.pruning.sentences import is_sentence_model, watching
from fastgate.pruning.trainer_saving import CheckpointingMixin
from fastgate.pruning.trainer_settings import refuse_settings


class SelfPruningMixin(CheckpointingMixin):
    """Put before a Trainer class: `class MyPruningTrainer(SelfPruningMixin, MyTrainer)`.

    One `train()` warms up, searches, hardens and recovers; the phase is a function of the step. The state of
    the gates is logged beside the loss. Evaluations before hardening do not count for the best model.
    Checkpoints appear whole or not at all, and resuming continues the same run: gates, multipliers and
    generators are as they were. After `train()` the model is pruned, and `fastgate.save(trainer.model, path)`
    saves it. A training that ends before the gates are hardened raises ArgumentError.

    The distillation and the Lagrangian weigh the same whatever `gradient_accumulation_steps` is. That is
    measured in the first step. A Trainer that scales the loss otherwise raises Unsupported.

    Trainers of sentence-transformers are supported: each forward of their losses is distilled, hidden states
    and embeddings or scores. Losses that cache gradients need `PruningConfig(distill=None)`.

    Args:
        *args: Those of the Trainer class below.
        pruning: How to prune.
        teacher: A dense model fine-tuned on the task, to distil from. None: the model itself.
        **kwargs: Those of the Trainer class below.

    Attributes:
        pruner: The Pruner, with its history.

    Raises:
        ArgumentError: For a `pruning` of another type, and for an optimizer without the replacements'
            parameters.
    """

    def __init__(self, *args: Any, pruning: PruningConfig, teacher: nn.Module | None = None, **kwargs: Any):
        if not isinstance(pruning, PruningConfig):
            wanted, remedy = "a PruningConfig", "pass fastgate.PruningConfig(target=...)"
            raise ArgumentError(format_error("SelfPruningTrainer", "pruning", repr(pruning), wanted, remedy))
        need("SelfPruningTrainer", "train", "accelerate")
        super().__init__(*args, **kwargs)
        trainer_compat.check_trainer(self)
        refuse_settings(self)
        trainer_compat.find_unused_parameters(self)
        self._pruning, self._teacher = pruning, teacher
        if isinstance(teacher, nn.Module):
            teacher.to(self.args.device)
        self.pruner = Pruner(cast(nn.Module, self.model), pruning, None, teacher)
        if self.optimizer is not None and is_missing(self.optimizer, self.pruner.handle):
            got = "an optimizer without the replacements' parameters, which the trainer has just added"
            remedy = "pass optimizer_cls_and_kwargs=(torch.optim.AdamW, {...}), or override create_optimizer"
            self.pruner.detach()
            wanted = "none, or one made after them"
            raise ArgumentError(format_error("SelfPruningTrainer", "optimizers", got, wanted, remedy))
        self.add_callback(_StepGates(self))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As Trainer.call_model_init; a new model for a new trial needs gates of its own."""
        model: nn.Module = super().call_model_init(trial)
        if hasattr(self, "_pruning"):
            self.pruner.close()
            self.pruner = Pruner(model, self._pruning, None, self._teacher)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train, and prunes at the end; True resumes from the newest complete checkpoint."""
        output_dir = Path(self.args.output_dir or "")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(trainer_checkpoints.last_complete(output_dir))
        elif resume_from_checkpoint:
            trainer_checkpoints.check_complete(Path(resume_from_checkpoint))
        if self.pruner.steps and not resume_from_checkpoint and self.model_init is None:
            self._refuse_second_training()
        if not self.pruner.finalized:
            self.pruner.reopen()
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            self._check_hardened()
        except BaseException:
            self.pruner.close()
            raise
        self.pruner.finalize()
        return result

    def _refuse_second_training(self) -> None:
        got, remedy = "pruned by an earlier train()", "make a new trainer"
        if not self.pruner.finalized:
            got = f"trained for {self.pruner.steps} steps by a train() that did not end"
            remedy += " with the dense model, or go on with train(resume_from_checkpoint=True)"
        raise ArgumentError(format_error("train", "model", got, "a dense model", remedy))

    def _check_hardened(self) -> None:
        pruner = self.pruner
        if pruner.kept is None:
            got = f"an end after step {pruner.steps} of {self.state.max_steps}"
            wanted = f"{pruner.schedule.harden} steps or more, after which the gates are hardened"
            remedy = (
                "go on with train(resume_from_checkpoint=True), check the callback or the data that ended "
                "it, or call trainer.pruner.harden() and trainer.pruner.finalize() to prune as far as it is"
            )
            raise ArgumentError(format_error("train", "steps", got, wanted, remedy))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """The loss of the class below, in training weighted and with the Pruner's terms."""
        below = super().compute_loss
        if not model.training:
            return below(model, inputs, return_outputs, *args, **kwargs)
        if is_sentence_model(self.pruner.model):
            batch: dict[str, Any] = {}
            forwards: list[Forward] | None
            with watching(self.pruner.model, self.pruner) as forwards:
                loss, outputs = below(model, inputs, True, *args, **kwargs)
        else:
            inputs = self.pruner.prepare(inputs)
            batch = dict(inputs)  # some Trainers take the labels out
            loss, outputs = below(model, inputs, True, *args, **kwargs)
            forwards = None
        self.pruner.finite.note_task(loss, batch)
        with self.accelerator.autocast():  # which it puts around the model's forward alone
            if forwards is None:
                forwards = [self.pruner.take_forward(outputs, batch)]
            added = self.pruner.pruning_loss(forwards)
        loss = self.pruner.task_weight * loss + added / self._divisor(*args, **kwargs)
        return (loss, outputs) if return_outputs else loss

    def _divisor(self, num_items_in_batch: torch.Tensor | int | None = None) -> int:
        return trainer_compat.micro_batches_to_divide_by(self, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer.log; lines with a training loss carry the gates too."""
        if "loss" in logs and "learning_rate" in logs:
            logs.update(self.pruner.metrics())
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer.create_optimizer; the replacements' parameters are then a group with its own rate."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        self.pruner.prepare_optimizer(optimizer)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As Trainer.get_decay_parameter_names; replacements have no weight decay."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if ".attention.replacement." not in name]


class _StepGates(TrainerCallback):
    """Tells the Pruner how long the run is, and when an optimizer step is done."""

    def __init__(self, trainer: SelfPruningMixin):
        self.trainer = trainer
        self.grad_scale = 1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.pruner.plan_steps(state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.grad_scale = trainer_compat.grad_scale(self.trainer)
        probe = self.trainer.pruner.probe
        trainer_compat.check_loss_weight(probe.weight(self.grad_scale), probe.losses)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.pruner.step(self.grad_scale)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.pruner.close()


class SelfPruningTrainer(SelfPruningMixin, Trainer):
    """The Trainer of transformers that prunes while it fine-tunes: `SelfPruningTrainer(model, args,
    pruning=...)`.

    Arguments and attributes are those of `transformers.Trainer` and of `SelfPruningMixin`.
    """
