"""Training on a task: a dense fine-tune, and prunings of what came out of it, each done once in a folder."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgate.data.task import Task
from fastgate.models.checkpoint import load, save
from fastgate.models.checkpoint_files import META
from fastgate.pruning import PruningConfig
from fastgate.pruning.trainer_checkpoints import checkpoints, is_complete, last_complete
from fastgate.training.disk import full_disk_as_oserror, read_json, write_json
from fastgate.training.evaluate import collator_of, score
from fastgate.training.model import dense_model, quiet_loading
from fastgate.training.progress import DENSE, PRUNE, Listener

TEACHERS = ("dense", "self")  # the dense model, or the student itself with every gate open
RESULT = "result.json"


@dataclass(frozen=True)
class Fit:
    """How one phase trains.

    epochs: passes over the training rows. batch_size: rows of an optimizer step. lr: peak learning rate.
    warmup: share of the steps in which the rate rises. bf16: under autocast in bfloat16.
    """

    epochs: float
    batch_size: int = 32
    lr: float = 5e-5
    warmup: float = 0.06
    seed: int = 0
    bf16: bool = False


@dataclass
class TaskTrainer:
    """Trains a dense model and prunes it, in the folder `out`. What an earlier process finished is reused.

    rows: the task's, tokenised. With a split `held_out` models are scored on that as well. save_every: share
    of a phase between two checkpoints, None for none. The seconds in results are those of every process that
    led to the model, without the steps that were lost when one was killed.
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
        trainer, seconds = self._train(Trainer, DENSE, DENSE, fit, model)
        result = {**self._score(trainer.model, fit), "seconds": seconds}
        unfinished = self.out / "work" / "dense-model"
        shutil.rmtree(unfinished, ignore_errors=True)
        with full_disk_as_oserror(self.out), quiet_loading():
            trainer.model.save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)
            write_json(unfinished / RESULT, result)
        shutil.rmtree(folder, ignore_errors=True)  # without a result it is incomplete
        os.replace(unfinished, folder)
        return result

    def prune(
        self, pruning: PruningConfig, fit: Fit, name: str = "pruned", teacher: str = TEACHERS[0]
    ) -> dict[str, Any]:
        """Self-prune the dense model into `out`/`name`.

        teacher: what the pruning distils from, the `dense` model or the student `self`. Returns the scores,
        the layers whose attention is kept, and the gates at each step.
        """
        from transformers import set_seed

        from fastgate.pruning import SelfPruningTrainer

        folder, record = self.out / name, self.out / "work" / f"{name}.json"
        if not (folder / META).is_file():
            student = dense_model(self.out / DENSE, self.task)
            dense = copy.deepcopy(student) if teacher == "dense" else None
            set_seed(fit.seed)
            trainer, seconds = self._train(
                SelfPruningTrainer, PRUNE, name, fit, student, pruning=pruning, teacher=dense
            )
            pruner = trainer.pruner
            search = {
                "kept": pruner.kept,
                "replacement": pruning.replacement,
                "steps": pruner.history,
                "separated": pruner.separated,
                "margin": pruner.margin,
                "seconds": seconds,
                "teacher_seconds": pruner.teacher_seconds,
            }
            with full_disk_as_oserror(self.out):
                record.parent.mkdir(exist_ok=True)
                write_json(record, search)
                save(trainer.model, folder, self.tokenizer)
        model: Any = load(folder)
        if torch.cuda.is_available():
            model = model.cuda()
        layers = int(model.config.num_hidden_layers)
        return {**self._score(model, fit), "layers": layers, **read_json(record)}

    def _train(
        self, trainer_class: Any, phase: str, name: str, fit: Fit, model: Any, **options: Any
    ) -> tuple[Any, float]:
        """Train to the end, from the last complete checkpoint if there is one.

        Returns the trainer and the seconds, those before the checkpoint included.
        """
        from fastgate.training import trainer_compat

        trainer_compat.check_trainer()
        folder = self.out / "work" / name
        trainer = trainer_class(
            model=model,
            args=trainer_compat.training_arguments(folder, phase, fit, self.save_every),
            train_dataset=self.rows["train"],
            data_collator=collator_of(self.task, self.tokenizer),
            **options,
        )
        clock = trainer_compat.prepare_trainer(trainer, phase, self.listener)
        for checkpoint in checkpoints(folder):
            if not is_complete(checkpoint):  # a killed run was writing it; its number may be the highest
                shutil.rmtree(checkpoint, ignore_errors=True)
        resumes = bool(checkpoints(folder))
        with full_disk_as_oserror(self.out), quiet_loading():
            trainer.train(resume_from_checkpoint=str(last_complete(folder)) if resumes else None)
        return trainer, clock.seconds

    def _score(self, model: Any, fit: Fit) -> dict[str, Any]:
        """All scores, the main one, and the main one on the rows held out, if there are any."""
        collator, metric = collator_of(self.task, self.tokenizer), self.task.metric
        scores = score(model, self.task, self.rows["evaluation"], collator, 2 * fit.batch_size, self.listener)
        result: dict[str, Any] = {"scores": scores, "score": scores[metric]}
        if "held_out" in self.rows:
            held_out = score(
                model, self.task, self.rows["held_out"], collator, 2 * fit.batch_size, self.listener
            )
            result["held_out"] = held_out[metric]
        return result
