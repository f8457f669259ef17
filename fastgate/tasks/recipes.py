"""The recipe of `fastgate finetune`: dense fine-tune, self-prune with the dense model as teacher, score."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import load, save
from ..errors import ArgumentError, say
from ..info import environment
from ..patch import patch, unpatch
from ..pruning import PruningConfig, Sparsity, Speedup
from ..pruning.checkpoints import checkpoints, is_complete, last_complete, seal
from ..pruning.objective import Target
from .model import dense_model, load_tokenizer, quiet_loading
from .score import score
from .task import Task

DENSE, PRUNE = "dense", "prune"
USUAL_SEARCH = 300  # steps of search that the usual rate of the gates suits
_RUN, _RESULT, _HISTORY = "run.json", "result.json", "history.json"
_OWN = ("dense", "pruned", "work", _RUN, _RESULT, _HISTORY, "report.md", "gates.png")


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of a run; a resumed run has to have the same.

    target: share of the attention sublayers to remove (`sparsity`) or how many times cheaper the encoder
    shall be (`speedup`), one of the two. epochs, prune_epochs: passes over the training rows, dense and
    pruning. batch_size: rows an optimizer step. max_length: tokens a row is cut at. warmup: share of the
    steps of each phase.
    """

    model: str
    task: str
    sparsity: float | None = 0.8
    speedup: float | None = None
    epochs: float = 3.0
    prune_epochs: float = 3.0
    batch_size: int = 32
    lr: float = 5e-5
    max_length: int = 128
    seed: int = 0
    warmup: float = 0.06
    data: dict[str, Any] = field(default_factory=dict)

    def pruning(self, steps: int) -> PruningConfig:
        """How to prune in that many optimizer steps. A short search moves its gates faster."""
        if (self.sparsity is None) == (self.speedup is None):
            got = "both" if self.sparsity is not None else "neither"
            remedy = "pass one of --target-sparsity and --target-speedup"
            raise ArgumentError(say("finetune", "target", got, "a sparsity or a speedup", remedy))
        target: Target = Speedup(self.speedup) if self.speedup is not None else Sparsity(self.sparsity or 0.0)
        usual = PruningConfig(target=target, seed=self.seed)
        search = max(1.0, (usual.harden - usual.warm) * steps)
        return replace(usual, gate_lr=usual.gate_lr * min(8.0, max(1.0, USUAL_SEARCH / search)))


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


def _write_json(path: Path, data: Any) -> None:
    """Whole or not at all."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(json.dumps(data, indent=2) + "\n")
    os.replace(aside, path)


def read_result(out: Path) -> dict[str, Any]:
    """What `finetune` wrote to `out`/result.json."""
    found: dict[str, Any] = json.loads((out / _RESULT).read_text())
    return found


def clear(out: Path) -> None:
    """Remove what an earlier run left in `out`, and nothing else."""
    if (out / _RUN).is_file():
        for name in _OWN:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _prepare(out: Path, recipe: Recipe, resume: bool) -> None:
    """Make the output folder, or see that it holds the same run."""
    if out.exists() and not out.is_dir():
        raise ArgumentError(say("finetune", "out", f"{out}, a file", "a folder", "choose another path"))
    wanted = json.loads(json.dumps(asdict(recipe)))
    if not (out / _RUN).is_file():
        if out.is_dir() and any(out.iterdir()):
            raise ArgumentError(say("finetune", "out", f"{out}, not empty", "a new folder", "choose another"))
        out.mkdir(parents=True, exist_ok=True)
        _write_json(out / _RUN, wanted)
        return
    if not resume:
        remedy = "pass --resume to go on with it, or choose another folder"
        raise ArgumentError(say("finetune", "out", f"{out}, which holds a run", "a new folder", remedy))
    found = json.loads((out / _RUN).read_text())
    other = [f"{key} {found.get(key)!r}" for key in wanted if found.get(key) != wanted[key]]
    if other:
        remedy = "resume with the settings the run began with"
        now = ", ".join(f"{key} {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key])
        raise ArgumentError(say("finetune", "resume", now, ", ".join(other), remedy))


def finetune(
    recipe: Recipe,
    task: Task,
    out: str | Path,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    save_every: float | None = 0.1,
) -> dict[str, Any]:
    """Run the recipe in the folder `out` and return what `result.json` then holds.

    Written to `out`: `dense` (Hugging Face's format), `pruned` (fastgate's), `history.json` (the gates over
    the steps), `result.json`. save_every: share of a phase between two checkpoints, None for none. A run that
    was killed goes on from its last checkpoint with `resume`. Raises ArgumentError for a folder in other use,
    DataError for bad data.
    """
    from transformers import set_seed

    out = Path(out)
    steps = math.ceil(math.ceil(len(task.train) / recipe.batch_size) * recipe.prune_epochs)
    pruning = recipe.pruning(steps)
    tokenizer = load_tokenizer(recipe.model, task)
    set_seed(recipe.seed)  # the head is new
    model = dense_model(recipe.model, task)
    _check_length(recipe, model.config)
    patch(model)  # refuses models that fastgate does not know before anything is written
    _prepare(out, recipe, resume)
    if (out / _RESULT).is_file():
        return read_result(out)
    rows = task.tokenize(tokenizer, recipe.max_length)
    run = _Run(recipe, task, out, tokenizer, rows, listener, save_every)
    dense = run.dense(model)
    pruned = run.prune(pruning)
    result = {
        "environment": environment(),
        "settings": json.loads(json.dumps(asdict(recipe))),
        "rows": {split: len(found) for split, found in rows.items()},
        "labels": list(task.labels),
        "metric": task.metric,
        "dense": dense,
        "pruned": pruned,
    }
    _write_json(out / _RESULT, result)
    shutil.rmtree(out / "work", ignore_errors=True)
    return result


def _check_length(recipe: Recipe, config: Any) -> None:
    limit = config.max_position_embeddings - (2 if config.model_type != "bert" else 0)
    if not 3 <= recipe.max_length <= limit:
        raise ArgumentError(
            say("finetune", "max_length", recipe.max_length, f"3 to {limit} tokens", "set --max-length")
        )


@dataclass
class _Run:
    """The two phases of one run, each done once and found again on resume."""

    recipe: Recipe
    task: Task
    out: Path
    tokenizer: Any
    rows: Any
    listener: Listener | None
    save_every: float | None

    def arguments(self, phase: str, epochs: float) -> Any:
        from transformers import TrainingArguments

        r = self.recipe
        return TrainingArguments(
            output_dir=str(self.out / "work" / phase),
            num_train_epochs=epochs,
            per_device_train_batch_size=r.batch_size,
            learning_rate=r.lr,
            warmup_steps=r.warmup,
            weight_decay=0.01,
            seed=r.seed,
            save_strategy="no" if self.save_every is None else "steps",
            save_steps=self.save_every or 500,
            save_total_limit=1,
            logging_steps=10,
            disable_tqdm=True,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )

    def trainer(self, kind: Any, phase: str, epochs: float, model: Any, **extra: Any) -> Any:
        from transformers import PrinterCallback

        trainer = kind(
            model=model,
            args=self.arguments(phase, epochs),
            train_dataset=self.rows["train"],
            data_collator=self.task.collator(self.tokenizer),
            **extra,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_listening()(phase, trainer, self.listener))
        return trainer

    def train(self, trainer: Any) -> float:
        """Train to the end, from the last whole checkpoint if there is one; seconds of this sitting."""
        folder = Path(trainer.args.output_dir)
        whole = any(is_complete(found) for found in checkpoints(folder))
        start = time.perf_counter()
        with quiet_loading():
            trainer.train(resume_from_checkpoint=str(last_complete(folder)) if whole else None)
        return time.perf_counter() - start

    def scored(self, model: Any) -> dict[str, float]:
        rows = self.rows["evaluation"]
        return score(model, self.task, rows, self.task.collator(self.tokenizer), 2 * self.recipe.batch_size)

    def dense(self, model: Any) -> dict[str, Any]:
        """Fine-tune the dense model into `out`/dense; returns its scores."""
        from transformers import Trainer, set_seed

        folder = self.out / "dense"
        if (folder / _RESULT).is_file():
            return read_result(folder)
        set_seed(self.recipe.seed)
        trainer = self.trainer(Trainer, DENSE, self.recipe.epochs, model)
        seconds = self.train(trainer)
        scores = self.scored(trainer.model)
        result = {"scores": scores, "score": scores[self.task.metric], "seconds": seconds}
        aside = self.out / "work" / "dense-model"
        shutil.rmtree(aside, ignore_errors=True)
        with quiet_loading():
            plain: Any = unpatch(trainer.model)
            plain.save_pretrained(aside)
        self.tokenizer.save_pretrained(aside)
        _write_json(aside / _RESULT, result)
        os.replace(aside, folder)
        return result

    def prune(self, pruning: PruningConfig) -> dict[str, Any]:
        """Self-prune the dense model into `out`/pruned; returns its scores and what was kept."""
        from transformers import set_seed

        from ..pruning import SelfPruningTrainer

        folder, seconds = self.out / "pruned", None
        if not (folder / "fastgate.json").is_file():
            student, teacher = (dense_model(self.out / "dense", self.task) for _ in range(2))
            set_seed(self.recipe.seed)
            trainer = self.trainer(
                SelfPruningTrainer,
                PRUNE,
                self.recipe.prune_epochs,
                student,
                pruning=pruning,
                teacher=teacher,
            )
            seconds = self.train(trainer)
            notes = {
                "kept": trainer.pruner.kept,
                "seconds": seconds,
                "teacher_seconds": trainer.pruner.teacher_seconds,
                "steps": trainer.pruner.history,
            }
            _write_json(self.out / _HISTORY, notes)
            save(trainer.model, folder, self.tokenizer)
        notes = json.loads((self.out / _HISTORY).read_text())
        model: Any = load(folder)
        if torch.cuda.is_available():
            model = model.cuda()
        scores = self.scored(model)
        return {
            "scores": scores,
            "score": scores[self.task.metric],
            "seconds": notes["seconds"],
            "teacher_seconds": notes["teacher_seconds"],
            "kept": notes["kept"],
            "layers": int(model.config.num_hidden_layers),
        }


def _listening() -> type:
    """The Trainer callback that tells a listener how far training is and seals the dense phase's
    checkpoints."""
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
                seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return Listening
