"""Training on a task: a dense fine-tune, and prunings of what came out of it, each done once in a folder."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgate.data.task import Task
from fastgate.models.checkpoint import load, save
from fastgate.pruning import PruningConfig
from fastgate.pruning.trainer_checkpoints import checkpoints, is_complete, last_complete, rotate, seal
from fastgate.training.disk import full_disk_told, read_json, write_json
from fastgate.training.evaluate import score
from fastgate.training.model import dense_model, quiet_loading

DENSE, PRUNE = "dense", "prune"
TEACHERS = ("dense", "self")  # the dense model, or the student itself with every gate open
RESULT = "result.json"


@dataclass(frozen=True)
class Fit:
    """How one phase trains.

    epochs: passes over the training rows; batch_size: rows an optimizer step; lr: the peak; warmup: share of
    the steps in which it is reached; bf16: under autocast in bfloat16.
    """

    epochs: float
    batch_size: int = 32
    lr: float = 5e-5
    warmup: float = 0.06
    seed: int = 0
    bf16: bool = False


@dataclass(frozen=True)
class Progress:
    """Where a training is: phase `dense` or `prune`, optimizer steps, the last loss, P(open) of each gate."""

    phase: str
    step: int
    total: int
    loss: float | None = None
    gates: tuple[float, ...] = ()
    stage: str = ""


Listener = Callable[[Progress], None]


@dataclass
class Training:
    """A dense model and what is pruned from it, in the folder `out`; what was done before is found again.

    rows: the task's, tokenised; with a split `held_out` models are scored on that as well. save_every: share
    of a phase between two checkpoints, None for none. The seconds in results are those of every sitting that
    led to the model; steps that a kill lost are not among them.
    """

    task: Task
    out: Path
    tokenizer: Any
    rows: Any
    listener: Listener | None = None
    save_every: float | None = 0.1

    def dense(self, model: Any, fit: Fit) -> dict[str, Any]:
        """Fine-tune the dense model into `out`/dense; returns its scores."""
        from transformers import Trainer, set_seed

        folder = self.out / DENSE
        if (folder / RESULT).is_file():
            return dict(read_json(folder / RESULT))
        set_seed(fit.seed)
        trainer = self._trainer(Trainer, DENSE, DENSE, fit, model)
        seconds = self._train(trainer)
        result = {**self._scored(trainer.model, fit), "seconds": seconds}
        aside = self.out / "work" / "dense-model"
        shutil.rmtree(aside, ignore_errors=True)
        with full_disk_told(self.out), quiet_loading():
            trainer.model.save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)
            write_json(aside / RESULT, result)
        shutil.rmtree(folder, ignore_errors=True)  # without a result it is not whole
        os.replace(aside, folder)
        return result

    def prune(
        self, pruning: PruningConfig, fit: Fit, name: str = "pruned", teacher: str = TEACHERS[0]
    ) -> dict[str, Any]:
        """Self-prune the dense model into `out`/`name`; returns scores, what was kept, the gates' course.

        teacher: whom a distillation listens to, the `dense` model or the student `self`.
        """
        from transformers import set_seed

        from fastgate.pruning import SelfPruningTrainer

        folder, notes = self.out / name, self.out / "work" / f"{name}.json"
        if not (folder / "fastgate.json").is_file():
            student = dense_model(self.out / DENSE, self.task)
            dense = dense_model(self.out / DENSE, self.task) if teacher == "dense" else None
            set_seed(fit.seed)
            trainer = self._trainer(
                SelfPruningTrainer, PRUNE, name, fit, student, pruning=pruning, teacher=dense
            )
            seconds = self._train(trainer)
            pruner = trainer.pruner
            noted = {"kept": pruner.kept, "replacement": pruning.replacement, "steps": pruner.history}
            noted |= {"separated": pruner.separated, "margin": pruner.margin}
            with full_disk_told(self.out):
                notes.parent.mkdir(exist_ok=True)
                write_json(notes, {**noted, "seconds": seconds, "teacher_seconds": pruner.teacher_seconds})
                save(trainer.model, folder, self.tokenizer)
        model: Any = load(folder)
        if torch.cuda.is_available():
            model = model.cuda()
        layers = int(model.config.num_hidden_layers)
        return {**self._scored(model, fit), "layers": layers, **read_json(notes)}

    def _arguments(self, phase: str, name: str, fit: Fit) -> Any:
        from transformers import TrainingArguments

        return TrainingArguments(
            output_dir=str(self.out / "work" / name),
            num_train_epochs=fit.epochs,
            per_device_train_batch_size=fit.batch_size,
            learning_rate=fit.lr,
            warmup_steps=fit.warmup,
            weight_decay=0.01,
            seed=fit.seed,
            bf16=fit.bf16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no" if self.save_every is None else "steps",
            save_steps=self.save_every or 500,
            # A dense checkpoint is whole once it is sealed, and only then may the one before go.
            save_total_limit=None if phase == DENSE else 1,
            logging_steps=10,
            disable_tqdm=True,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )

    def _trainer(self, kind: Any, phase: str, name: str, fit: Fit, model: Any, **extra: Any) -> Any:
        from transformers import PrinterCallback

        trainer = kind(
            model=model,
            args=self._arguments(phase, name, fit),
            train_dataset=self.rows["train"],
            data_collator=self.task.collator(self.tokenizer),
            **extra,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_listening()(phase, trainer, self.listener))
        return trainer

    def _train(self, trainer: Any) -> float:
        """Train to the end, from the last whole checkpoint if there is one; seconds, up to that included."""
        folder = Path(trainer.args.output_dir)
        for found in checkpoints(folder):
            if not is_complete(found):  # what a killed run was writing; its number may be the highest
                shutil.rmtree(found, ignore_errors=True)
        whole = bool(checkpoints(folder))
        clock = _clock()()
        trainer.add_callback(clock)
        with full_disk_told(self.out), quiet_loading():
            trainer.train(resume_from_checkpoint=str(last_complete(folder)) if whole else None)
        return float(clock.seconds)

    def _scored(self, model: Any, fit: Fit) -> dict[str, Any]:
        """All scores, the main one, and the main one on the rows held out, if there are any."""
        collator, metric = self.task.collator(self.tokenizer), self.task.metric
        scores = score(model, self.task, self.rows["evaluation"], collator, 2 * fit.batch_size)
        found: dict[str, Any] = {"scores": scores, "score": scores[metric]}
        if "held_out" in self.rows:
            apart = score(model, self.task, self.rows["held_out"], collator, 2 * fit.batch_size)
            found["held_out"] = apart[metric]
        return found


def _listening() -> type:
    """The Trainer callback that tells a listener how far training is, and that seals and rotates the dense
    phase's checkpoints."""
    from transformers import TrainerCallback

    class Listening(TrainerCallback):
        def __init__(self, phase: str, trainer: Any, listener: Listener | None):
            self.phase, self.trainer, self.listener = phase, trainer, listener
            self.loss: float | None = None

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.loss = (logs or {}).get("loss", self.loss)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.listener is not None:
                pruner = getattr(self.trainer, "pruner", None)
                gates = tuple(pruner.open_probabilities) if pruner is not None else ()
                stage = pruner.phase if pruner is not None else ""
                step = state.global_step
                self.listener(Progress(self.phase, step, state.max_steps, self.loss, gates, stage))

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.phase == DENSE:
                saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                seal(saved)
                rotate(saved.parent, 1, None, saved)

    return Listening


def _clock() -> type:
    """The Trainer callback that counts the seconds of a training and keeps them in its checkpoints."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class Clock(TrainerCallback, ExportableState):
        def __init__(self) -> None:
            self.before, self.start = 0.0, time.perf_counter()

        @property
        def seconds(self) -> float:
            return self.before + time.perf_counter() - self.start

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"before": self.seconds}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step:
                self.before = state.stateful_callbacks["Clock"]["attributes"]["before"]

    return Clock
