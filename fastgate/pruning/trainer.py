"""Self-pruning in the Trainer of transformers: a mixin for any subclass, and the plain Trainer with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from fastgate.errors import ArgumentError, Unsupported, format_error
from fastgate.models import checkpoint
from fastgate.pruning import trainer_checkpoints
from fastgate.pruning.config import PruningConfig
from fastgate.pruning.pruner import Pruner
from fastgate.pruning.sentences import is_sentence_model, watching

STATE_FILE = "pruning.pt"
LEFT_OUT = "left_out"  # its entry for weights that the model's own file has not


class SelfPruningMixin:
    """Put before a Trainer class: `class MyPruningTrainer(SelfPruningMixin, MyTrainer)`.

    One `train()` warms up, searches, hardens and recovers; the phase is a function of the step. What the
    gates do is logged beside the loss. Evaluations before hardening do not count for the best model.
    Checkpoints appear whole or not at all, and resuming continues the same run: gates, multipliers and
    generators are as they were. After `train()` the model is pruned (`fastgate.save(trainer.model, path)`
    saves it); `trainer.pruner` has the history. A training that ends before the gates are hardened raises
    ArgumentError.

    Trainers of sentence-transformers are known too: what their losses run of the model is distilled forward
    by forward, hidden states and embeddings or scores. Losses that cache gradients need
    `PruningConfig(distill=None)`.

    pruning: a PruningConfig. teacher: a dense model fine-tuned on the task, to distil from; None: the model
    itself.
    """

    def __init__(self, *args: Any, pruning: PruningConfig, teacher: nn.Module | None = None, **kwargs: Any):
        if not isinstance(pruning, PruningConfig):
            raise ArgumentError(
                format_error(
                    "SelfPruningTrainer",
                    "pruning",
                    repr(pruning),
                    "a PruningConfig",
                    "pass fastgate.PruningConfig(target=...)",
                )
            )
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self._refuse_settings()
        self._find_unused_parameters()
        self._pruning, self._teacher = pruning, teacher
        self._aside = False
        self._attach()
        if trainer.optimizer is not None and self.pruner.misses(trainer.optimizer):
            got = "an optimizer without the replacements' parameters, which the trainer has just added"
            remedy = "pass optimizer_cls_and_kwargs=(torch.optim.AdamW, {...}), or override create_optimizer"
            self.pruner.detach()
            wanted = "none, or one made after them"
            raise ArgumentError(format_error("SelfPruningTrainer", "optimizers", got, wanted, remedy))
        trainer.add_callback(_StepGates(self))

    def _find_unused_parameters(self) -> None:
        """A skipped attention has no gradient in that step: DistributedDataParallel must not wait for one.

        The accelerator is made by now and has its own copy of the setting, which transformers turns off under
        activation checkpointing.
        """
        trainer: Any = self
        trainer.args.ddp_find_unused_parameters = True
        handler = getattr(trainer.accelerator, "ddp_handler", None)
        if handler is not None:
            handler.find_unused_parameters = True

    def _refuse_settings(self) -> None:
        trainer: Any = self
        if trainer.args.world_size > 1:
            self._refuse_distributed_settings()
        sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        for name, bad, remedy in (
            (
                "args.n_gpu",
                trainer.args.n_gpu > 1,
                "give each process one GPU: torchrun or accelerate launch",
            ),
            ("args.auto_find_batch_size", trainer.args.auto_find_batch_size, "set the batch size"),
            ("args.deepspeed, args.fsdp", sharded, "train on one device or with torchrun (DDP)"),
        ):
            if bad:
                wanted = "one whole model a process and a number of steps known from the start"
                raise Unsupported(format_error("SelfPruningTrainer", name, "set", wanted, remedy))

    def _refuse_distributed_settings(self) -> None:
        args: Any = self.args  # type: ignore[attr-defined]
        # transformers has renamed gradient checkpointing.
        kind = "activation" if hasattr(args, "activation_checkpointing") else "gradient"
        checkpointing = getattr(args, f"{kind}_checkpointing")
        settings = getattr(args, f"{kind}_checkpointing_kwargs") or {}
        for name, bad, wanted, remedy in (
            (
                "args.ddp_find_unused_parameters",
                args.ddp_find_unused_parameters is False,
                "None or True: a skipped attention has no gradient",
                "leave it out",
            ),
            (
                "args.ddp_static_graph",
                args.ddp_static_graph,
                "None or False: which attention runs changes from step to step",
                "leave it out",
            ),
            (
                f"args.{kind}_checkpointing_kwargs",
                checkpointing and settings.get("use_reentrant", False),
                "checkpointing that is not reentrant: DistributedDataParallel looks for unused parameters",
                'pass {"use_reentrant": False}',
            ),
        ):
            if bad:
                got = "use_reentrant=True" if "kwargs" in name else getattr(args, name.split(".")[1])
                raise Unsupported(format_error("SelfPruningTrainer", name, got, wanted, remedy))

    def _attach(self) -> None:
        trainer: Any = self
        self.pruner = Pruner(trainer.model, self._pruning, None, self._teacher)
        if self._teacher is not None:
            self._teacher.to(trainer.args.device)
        self.pruner.attach()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model: nn.Module = super().call_model_init(trial)  # type: ignore[misc]
        if hasattr(self, "_pruning"):  # a new model for a new trial: it needs gates of its own
            self.pruner.release()
            self.pruner = Pruner(model, self._pruning, None, self._teacher).attach()
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train, and prunes at the end; True resumes from the newest complete checkpoint."""
        trainer: Any = self
        output_dir = Path(trainer.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(trainer_checkpoints.last_complete(output_dir))
        elif resume_from_checkpoint:
            trainer_checkpoints.check_complete(Path(resume_from_checkpoint))
        if self.pruner.steps and not resume_from_checkpoint and trainer.model_init is None:
            self._refuse_second_training()
        self.pruner.engage()
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
            self._check_hardened()
        except BaseException:
            self.pruner.release()
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
        pruner, state = self.pruner, self.state  # type: ignore[attr-defined]
        if pruner.kept is None:
            got = f"an end after step {pruner.steps} of {state.max_steps}"
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
        trainer: Any = self
        below = super().compute_loss  # type: ignore[misc]
        if not model.training:
            return below(model, inputs, return_outputs, *args, **kwargs)
        if is_sentence_model(trainer.model):
            batch: dict[str, Any] = {}
            with watching(trainer.model, self.pruner) as forwards:
                loss, outputs = below(model, inputs, True, *args, **kwargs)
        else:
            inputs = self.pruner.prepare(inputs)
            batch = dict(inputs)  # some Trainers take the labels out
            loss, outputs = below(model, inputs, True, *args, **kwargs)
        self.pruner.finite.note_task(loss, batch)
        with trainer.accelerator.autocast():  # which it puts around the model's forward alone
            if is_sentence_model(trainer.model):
                added = self.pruner.loss_of(forwards)
            else:
                added = self.pruner.loss(outputs, batch)
        loss = self.pruner.task_weight * loss + added / self._loss_divisor(*args, **kwargs)
        return (loss, outputs) if return_outputs else loss

    def _loss_divisor(self, num_items_in_batch: Any = None) -> int:
        """What the Pruner's terms, a mean a batch, are divided by here because the Trainer will not do it."""
        trainer: Any = self
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            accepts = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = accepts or trainer.compute_loss_func is not None
        return getattr(trainer, "current_gradient_accumulation_steps", 1) if scaled else 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer.log; lines with a training loss carry the gates too."""
        if "loss" in logs and "learning_rate" in logs:
            logs.update(self.pruner.metrics())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.create_optimizer; the replacements' parameters are then a group with its own rate."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        self.pruner.set_rates(optimizer)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)  # type: ignore[misc]
        return [name for name in names if ".attention.replacement." not in name]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if self.pruner.kept is None:
            return False  # a model that is not pruned yet is not what is looked for
        return bool(super()._determine_best_metric(metrics=metrics, trial=trial))  # type: ignore[misc]

    # -- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return str(Path(folder) / trainer_checkpoints.ASIDE) if self._aside else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint and the Pruner's state, written aside and renamed when it is whole."""
        trainer: Any = self
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{trainer.state.global_step}"
        aside = run_dir / trainer_checkpoints.ASIDE / name
        if trainer.args.should_save:
            shutil.rmtree(aside.parent, ignore_errors=True)  # what a killed run left
        trainer.accelerator.wait_for_everyone()
        self._aside = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._aside = False
        trainer.accelerator.wait_for_everyone()
        if trainer.state.best_global_step:  # on every rank, since each of them loads it
            best = run_dir / f"checkpoint-{trainer.state.best_global_step}"
            if best.name == name or best.is_dir():
                trainer.state.best_model_checkpoint = str(best)
        if trainer.args.should_save:
            torch.save(self.pruner.state_dict() | {LEFT_OUT: self._left_out()}, aside / STATE_FILE)
            trainer.state.save_to_json(str(aside / "trainer_state.json"))
            trainer_checkpoints.seal(aside)
            trainer_checkpoints.publish(aside, run_dir / name)
            shutil.rmtree(aside.parent, ignore_errors=True)
            best = trainer.state.best_model_checkpoint
            trainer_checkpoints.rotate(run_dir, trainer.args.save_total_limit, best, run_dir / name)
        trainer.accelerator.wait_for_everyone()

    def _left_out(self) -> dict[str, torch.Tensor]:
        """What the model has in training and its checkpoint leaves out; all of it where the model is no
        model of transformers, whose own loader would refuse an unfinished one."""
        model = self.pruner.model
        names: tuple[str, ...] = ("",)
        if isinstance(model, PreTrainedModel):
            names = checkpoint.unused_names(model, checkpoint.layout_of(self.pruner.state))
        state = model.state_dict()
        return {name: tensor.cpu().clone() for name, tensor in state.items() if name.startswith(names)}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.pruner.model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        self.pruner.load_state_dict(self._load_left_out(resume_from_checkpoint))

    def _load_left_out(self, folder: str) -> dict[str, Any]:
        """Give the model the weights of `_left_out`; returns the rest of the Pruner's file."""
        state: dict[str, Any] = torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True)
        self.pruner.model.load_state_dict(state.get(LEFT_OUT, {}), strict=False)
        return state

    def _load_best_model(self) -> None:
        if isinstance(self.pruner.model, PreTrainedModel):
            super()._load_best_model()  # type: ignore[misc]
        else:
            self._load_left_out(self.state.best_model_checkpoint)  # type: ignore[attr-defined]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As in Trainer, but for what a checkpoint of a hardened model leaves out."""
        parts = (".attention.self.", ".attention.output.dense.", ".attention.replacement.")
        missing = [name for name in load_result.missing_keys if not any(part in name for part in parts)]
        load_result.missing_keys[:] = missing
        super()._issue_warnings_after_load(load_result)  # type: ignore[misc]


class _StepGates(TrainerCallback):
    """Tells the Pruner how long the run is and when an optimizer step is done."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.grad_scale = 1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.pruner.plan_steps(state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scaler = self.trainer.accelerator.scaler
        self.grad_scale = 1.0 if scaler is None else scaler.get_scale()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.pruner.step(self.grad_scale)


class SelfPruningTrainer(SelfPruningMixin, Trainer):
    """The Trainer that prunes while it fine-tunes: `SelfPruningTrainer(model, args, pruning=...)`."""
