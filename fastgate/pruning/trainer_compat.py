"""The one file with private names of the Trainer of transformers and of accelerate that self-pruning uses.

`check_trainer` looks for all of them when a trainer is made, so that a version that has renamed one is
refused there and not in the middle of a training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn
from transformers import Trainer

from fastgate.errors import Unsupported, format_error
from fastgate.pruning.loss_probe import TOLERANCE

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object  # the Trainer class that the mixin is put before comes later in the order of classes

# Overridden below -> an example of the call that self-pruning makes of the method it overrides.
METHODS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "_get_output_dir": ((None,), {}),
    "_save_checkpoint": ((None, None), {}),
    "_load_from_checkpoint": (("folder",), {}),
    "_load_best_model": ((), {}),
    "_determine_best_metric": ((), {"metrics": {}, "trial": None}),
    "_issue_warnings_after_load": ((None,), {}),
}
ATTRIBUTES = (
    "model_accepts_loss_kwargs",
    "compute_loss_func",
    "is_deepspeed_enabled",
    "is_fsdp_enabled",
    "accelerator.ddp_handler",
    "accelerator.scaler",
)
_MISSING = object()


def check_trainer(trainer: TrainerOverrides) -> None:
    """Raises Unsupported if the Trainer lacks a private name that self-pruning uses, or takes other
    arguments."""
    missing = [f"Trainer.{name}" for name in ATTRIBUTES if _attribute(trainer, name) is _MISSING]
    below = super(TrainerOverrides, trainer)
    for name, (args, kwargs) in METHODS.items():
        method: Any = getattr(below, name, None)
        try:
            inspect.signature(method).bind(*args, **kwargs)
        except TypeError:  # it is not there, or takes something else
            missing.append(f"Trainer.{name}")
    if missing:
        got = f"transformers {transformers.__version__}, which has no {' and no '.join(missing)} as used here"
        wanted, remedy = (
            "a version that has",
            "install a version of transformers that fastgate is tested with",
        )
        raise Unsupported(format_error("SelfPruningTrainer", "transformers", got, wanted, remedy))


def _attribute(trainer: object, path: str) -> Any:
    value: Any = trainer
    for name in path.split("."):
        value = getattr(value, name, _MISSING)
    return value


def is_sharded(trainer: Trainer) -> bool:
    """Whether DeepSpeed or FSDP split the model."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def find_unused_parameters(trainer: Trainer) -> None:
    """Have DistributedDataParallel wait for no gradient of a skipped attention.

    The accelerator is made by now and has its own copy of the setting, which transformers turns off under
    activation checkpointing.
    """
    trainer.args.ddp_find_unused_parameters = True
    handler = trainer.accelerator.ddp_handler
    if handler is not None:
        handler.find_unused_parameters = True


def grad_scale(trainer: Trainer) -> float:
    """What the loss is multiplied by before backward, in fp16; else 1."""
    scaler = trainer.accelerator.scaler
    return 1.0 if scaler is None else float(scaler.get_scale())


def micro_batches_to_divide_by(trainer: Trainer, num_items_in_batch: Any) -> int:
    """What a mean over a micro-batch is divided by in `compute_loss`, because the Trainer will not do it.

    The Trainer divides the loss by the number of micro-batches of the step, unless it counts as normalised by
    the items in all of them: then this is that number, else 1. The weight that the loss ends up with is
    measured (`check_loss_weight`).
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # set by subclasses; new in transformers 5
    if scaled is None:
        counts_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        scaled = counts_items or trainer.compute_loss_func is not None
    if not scaled or trainer.args.gradient_accumulation_steps == 1:
        return 1
    # The last step of an epoch may have fewer micro-batches than the setting says.
    number = getattr(trainer, "current_gradient_accumulation_steps", None)
    if number is None:
        got = f"transformers {transformers.__version__}, which has no "
        got += "Trainer.current_gradient_accumulation_steps in a step"
        wanted, remedy = "a version that has", "set gradient_accumulation_steps=1"
        raise Unsupported(format_error("SelfPruningTrainer", "transformers", got, wanted, remedy))
    return int(number)


def check_loss_weight(weight: float | None, micro_batches: int) -> None:
    """Raises Unsupported if the losses of `micro_batches` were differentiated with weights that do not add up
    to 1, as `weight` says; None: not measured."""
    if weight is not None and not abs(weight - 1.0) <= TOLERANCE:
        got = f"losses of {micro_batches} micro-batches whose weights add up to {weight:.4g}"
        wanted = "1: the distillation and the Lagrangian would weigh something else than configured"
        remedy = (
            "have compute_loss of the trainer return what it was given, set loss_is_scaled_for_ga if it "
            "normalises its loss over all micro-batches, or set gradient_accumulation_steps=1"
        )
        raise Unsupported(format_error("SelfPruningTrainer", "compute_loss", got, wanted, remedy))


class TrainerOverrides(_Trainer):
    """The private methods of the Trainer that self-pruning changes; each calls a method of ours.

    No callback gives the same: callbacks come after a checkpoint was written in place and older ones were
    deleted, after a model was made the best, and after weights were loaded.
    """

    def save_whole(self, write: Callable[[], None], run_dir: Path) -> None:
        """Write a checkpoint of this step under `run_dir` by `write`, into the folder of `output_dir_for`."""
        raise NotImplementedError

    def output_dir_for(self, run_dir: Path) -> Path:
        """The folder in which `write` makes its checkpoint, of a run in `run_dir`."""
        raise NotImplementedError

    def load_whole(self, load: Callable[[], None], folder: Path) -> None:
        """Load the checkpoint in `folder`; `load`: the Trainer's part."""
        raise NotImplementedError

    def load_best(self, load: Callable[[], None]) -> None:
        """Load the weights of the best checkpoint; `load`: as the Trainer does."""
        raise NotImplementedError

    def may_be_best(self) -> bool:
        """Whether the model as it is now may become the best."""
        raise NotImplementedError

    def is_left_out(self, name: str) -> bool:
        """Whether checkpoints may lack the weight of this name."""
        raise NotImplementedError

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.output_dir_for(Path(super()._get_output_dir(trial))))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        write = super()._save_checkpoint
        self.save_whole(lambda: write(model, trial), Path(self._get_output_dir(trial)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load = super()._load_from_checkpoint
        self.load_whole(lambda: load(resume_from_checkpoint, model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.load_best(super()._load_best_model)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return self.may_be_best() and bool(super()._determine_best_metric(metrics=metrics, trial=trial))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = [name for name in load_result.missing_keys if not self.is_left_out(name)]
        load_result.missing_keys[:] = missing
        super()._issue_warnings_after_load(load_result)
