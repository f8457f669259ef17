"""What fastgate relies on in transformers' Trainer beyond its documented interface, in one place.

- `ExportableState`: a callback that has a `state()` is written into every checkpoint, under its class name.
- `warmup_steps` and `save_steps` below 1 are shares of all steps.

`check_trainer` raises Unsupported where transformers behaves differently. Importing this module imports the
Trainer, which is slow: import it inside functions.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers import trainer_callback as callbacks

from fastgate.errors import CheckpointError, Unsupported, format_error
from fastgate.pruning.trainer_checkpoints import rotate, seal
from fastgate.training.progress import DENSE, Listener, Progress

if TYPE_CHECKING:
    from fastgate.training.phases import Fit

__all__ = ["Clock", "ProgressCallback", "Trainer", "check_trainer", "prepare_trainer", "training_arguments"]

_ExportableState: Any = getattr(callbacks, "ExportableState", object)


@cache
def check_trainer() -> None:
    """Raises Unsupported for a version of transformers whose Trainer does not do what this module needs."""
    reason = None
    if _ExportableState is object:
        reason = "no trainer_callback.ExportableState"
    else:
        arguments = TrainingArguments(
            output_dir="unused", warmup_steps=0.1, save_steps=0.1, report_to="none", use_cpu=True
        )
        state: Any = TrainerState(stateful_callbacks=[Clock()])
        state.compute_steps(arguments, 200)
        if arguments.get_warmup_steps(200) != 20:
            reason = "warmup_steps below 1 that are no share of all steps"
        elif state.save_steps != 20:
            reason = "save_steps below 1 that are no share of all steps"
        elif "before" not in state.stateful_callbacks.get("Clock", {}).get("attributes", {}):
            reason = "callback states that are not kept by class name"
    if reason is not None:
        got, wanted = f"version {transformers.__version__} with {reason}", "a Trainer as in transformers 5"
        remedy = 'run pip install "transformers>=5.23,<6", or report the version to fastgate'
        raise Unsupported(format_error("training", "transformers", got, wanted, remedy))


def training_arguments(folder: Path, phase: str, fit: Fit, save_every: float | None) -> TrainingArguments:
    """The Trainer's arguments for a phase whose checkpoints go to `folder`.

    save_every: share of the phase between two checkpoints, None for none.
    """
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=fit.epochs,
        per_device_train_batch_size=fit.batch_size,
        learning_rate=fit.lr,
        warmup_steps=fit.warmup,
        weight_decay=0.01,
        seed=fit.seed,
        bf16=fit.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no" if save_every is None else "steps",
        save_steps=save_every or 500,
        # A dense checkpoint is complete once it is sealed. Only then may the one before it be deleted.
        save_total_limit=None if phase == DENSE else 1,
        logging_steps=10,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def prepare_trainer(trainer: Trainer, phase: str, listener: Listener | None) -> Clock:
    """Silence a trainer and have it tell `listener` how far it is. Returns the clock of its training."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback(phase, trainer, listener))
    clock = Clock()
    trainer.add_callback(clock)
    return clock


class ProgressCallback(TrainerCallback):
    """Tells a listener how far training is. Seals and rotates the checkpoints of the dense phase."""

    def __init__(self, phase: str, trainer: Trainer, listener: Listener | None):
        self.phase, self.listener = phase, listener
        self.trainer: Any = trainer  # SelfPruningTrainer has a `pruner`
        self.loss: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.listener is not None:
            pruner = getattr(self.trainer, "pruner", None)
            gates = tuple(pruner.open_probabilities) if pruner is not None else ()
            stage = pruner.phase if pruner is not None else ""
            self.listener(Progress(self.phase, state.global_step, state.max_steps, self.loss, gates, stage))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.phase == DENSE:
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            seal(saved)
            rotate(saved.parent, 1, None, saved)


class Clock(TrainerCallback, _ExportableState):  # type: ignore[misc]  # it may be missing
    """Counts the seconds of a training and keeps them in its checkpoints, under the name of this class."""

    def __init__(self) -> None:
        self.before, self.start = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of this training, those of earlier sittings included."""
        return self.before + time.perf_counter() - self.start

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"before": self.seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            try:
                self.before = float(state.stateful_callbacks["Clock"]["attributes"]["before"])
            except (KeyError, TypeError) as error:
                got, wanted = "a trainer_state.json without the state of Clock", "a checkpoint of fastgate"
                remedy = "begin again in another folder"
                raise CheckpointError(format_error("training", "resume", got, wanted, remedy)) from error
