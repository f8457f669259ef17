"""Score of learned gates beside dense, random and fixed choices on a task, one JSON line a run.

    python bench/sst2_prune.py --data-dir DATA --work WORK learned:0.67 learned:0.83 random:2 fixed:1,4 dense

`learned:S` learns which share S of the attention goes; `random:K` keeps K layers at random, `top:K` the
lowest K, `spaced:K` evenly spaced ones, `fixed:A,B` those named; `dense` trains the unpruned model on, for
the same steps with the same distillation. All start from one dense fine-tuned model, kept in WORK/dense,
which is also their teacher.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import fastgate
from fastgate.info import environment
from fastgate.pruning import Distill, Fixed, criteria
from fastgate.tasks import dense_model, load_task, load_tokenizer
from fastgate.tasks.model import demo_model_path


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="learned:S, random:K, top:K, spaced:K, fixed:A,B or dense")
    p.add_argument("--data-dir", required=True)
    p.add_argument("--work", required=True, help="folder for the dense model and the Trainer's output")
    p.add_argument("--out", default=str(Path(__file__).parent / "results" / "sst2_prune.jsonl"))
    p.add_argument("--task", default="sst2")
    p.add_argument("--evaluate-on", nargs="+", default=["validation", "test"])
    p.add_argument("--model", default=None, help="default: the demo extra's MiniLM")
    p.add_argument("--rows", type=int, default=20_000, help="training rows, by a seeded shuffle")
    p.add_argument("--max-length", type=int, default=128)
    p.add_argument("--dense-epochs", type=float, default=2)
    p.add_argument("--epochs", type=float, default=1.5, help="of a pruning run, search and recovery together")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--lr", type=float, default=1e-4)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--replacement", default=None)
    p.add_argument("--hidden", type=float, default=None, help="weight of the hidden-state distillation")
    p.add_argument("--harden", type=float, default=None)
    p.add_argument("--gate-lr", type=float, default=None)
    p.add_argument("--note", default="", help="what was different in this run, for the table")
    p.add_argument("--threads", type=int, default=1)
    return p.parse_args()


class Bench:
    """The task, its tokenised rows, and the dense model all runs start from."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.task = load_task(args.task, args.data_dir, evaluate_on=args.evaluate_on)
        self.model_name = args.model or str(demo_model_path())
        self.tokenizer = load_tokenizer(self.model_name, self.task)
        self.data = self.task.tokenize(self.tokenizer, args.max_length)
        chosen = list(range(len(self.data["train"])))
        random.Random(args.seed).shuffle(chosen)
        self.data["train"] = self.data["train"].select(chosen[: args.rows])
        self.layers = 0

    def training_arguments(self, epochs: float) -> TrainingArguments:
        a = self.args
        return TrainingArguments(
            output_dir=str(Path(a.work) / "trainer"), num_train_epochs=epochs, learning_rate=a.lr,
            per_device_train_batch_size=a.batch, per_device_eval_batch_size=64, warmup_steps=0.06,
            weight_decay=0.01, save_strategy="no", eval_strategy="no", logging_steps=50, report_to=[],
            disable_tqdm=True, use_cpu=True, seed=a.seed,
        )  # fmt: skip

    def trainer(self, cls: type, model: Any, epochs: float, **extra: Any) -> Any:
        return cls(
            model=model, args=self.training_arguments(epochs), train_dataset=self.data["train"],
            eval_dataset=self.data["evaluation"], data_collator=self.task.collator(self.tokenizer),
            compute_metrics=self.task.metrics, **extra,
        )  # fmt: skip

    def score(self, trainer: Any) -> float:
        return float(trainer.evaluate()[f"eval_{self.task.metric}"])

    def dense(self) -> tuple[Any, float, float]:
        """The dense fine-tuned model, its score, the seconds its training took; trained once, then read."""
        folder = Path(self.args.work) / "dense"
        if not (folder / "score.json").is_file():
            model = fastgate.patch(dense_model(self.model_name, self.task))
            trainer = self.trainer(Trainer, model, self.args.dense_epochs)
            began = time.perf_counter()
            trainer.train()
            noted = {"seconds": time.perf_counter() - began, "score": self.score(trainer)}
            model.save_pretrained(folder)
            (folder / "score.json").write_text(json.dumps(noted))
        noted = json.loads((folder / "score.json").read_text())
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        self.layers = model.config.num_hidden_layers
        return model, noted["score"], noted["seconds"]

    def config(self, run: str) -> fastgate.PruningConfig:
        kind, _, value = run.partition(":")
        layers, given = self.layers, self.args
        chosen = {
            "learned": lambda: fastgate.Sparsity(float(value)),
            "random": lambda: Fixed(tuple(criteria.random_choice(layers, int(value), given.seed))),
            "top": lambda: Fixed(tuple(criteria.top_drop(layers, int(value)))),
            "spaced": lambda: Fixed(tuple(criteria.every_other(layers, int(value)))),
            "fixed": lambda: Fixed(tuple(int(i) for i in value.split(","))),
            "dense": lambda: Fixed(tuple(range(layers))),
        }[kind]()
        options: dict[str, Any] = {"seed": given.seed}
        options |= {
            k: v for k in ("replacement", "harden", "gate_lr") if (v := getattr(given, k)) is not None
        }
        if given.hidden is not None:
            options["distill"] = Distill(hidden=given.hidden)
        return fastgate.PruningConfig(chosen, **options)

    def run(self, run: str) -> dict[str, Any]:
        model, dense_score, dense_seconds = self.dense()
        config, teacher = self.config(run), copy.deepcopy(model)
        trainer = self.trainer(
            fastgate.SelfPruningTrainer, model, self.args.epochs, pruning=config, teacher=teacher
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        score = self.score(trainer)
        kept = trainer.pruner.kept
        return {
            "task": self.args.task, "model": Path(self.model_name).parent.name, "method": run.split(":")[0],
            "replacement": config.replacement, "target": round(1 - len(kept) / self.layers, 4), "kept": kept,
            "seed": self.args.seed, "metric": self.task.metric, "score": round(score, 4),
            "dense_score": round(dense_score, 4), "train_seconds": round(seconds),
            "dense_train_seconds": round(dense_seconds), "rows": len(self.data["train"]),
            "evaluated": len(self.data["evaluation"]), "epochs": self.args.epochs, "lr": self.args.lr,
            "config": {k: repr(v) for k, v in vars(config).items()},
            "gates": [h for h in trainer.pruner.history if h["step"] % 50 == 0],
            "note": self.args.note, "environment": environment(),
        }  # fmt: skip


def write_table(results: Path) -> None:
    """The JSON lines of `results` as a Markdown table beside it."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    names = ("method", "kept", "replacement", "epochs", "seed", "score", "dense", "gap", "seconds", "note")
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for r in rows:
        gap = r["score"] - r["dense_score"]
        kept = ", ".join(map(str, r["kept"]))
        lines.append(
            f"| {r['method']} | {kept} | {r['replacement']} | {r['epochs']} | {r['seed']} | {r['score']:.4f} "
            f"| {r['dense_score']:.4f} | {gap:+.4f} | {r['train_seconds']} | {r['note']} |"
        )
    first = rows[0]
    head = (
        f"# {first['task']}, {first['model']}: {first['rows']} training rows, {first['evaluated']} scored\n\n"
        f"Metric: {first['metric']}. Made by `bench/sst2_prune.py`; the gates' course and the machine are in "
        f"`{results.name}`. Seconds are of the pruning run, teacher included.\n\n"
    )
    results.with_suffix(".md").write_text(head + "\n".join(lines) + "\n")


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    transformers.set_seed(args.seed)
    bench = Bench(args)
    for run in args.runs:
        result = bench.run(run)
        print(
            json.dumps({k: result[k] for k in ("method", "kept", "score", "dense_score", "train_seconds")}),
            flush=True,
        )
        with open(args.out, "a") as out:
            out.write(json.dumps(result) + "\n")
        write_table(Path(args.out))


if __name__ == "__main__":
    main()
