"""Wall time of a self-pruning run beside a dense fine-tune of Hugging Face, the same steps on the same rows.

    python bench/models/training.py --data-dir DATA > bench/results/training_cpu.jsonl
    python bench/models/training.py --data-dir DATA --model bert-base --steps 30 >> bench/results/training_cpu.jsonl

Runs take turns, `--rounds` times: `sdpa`, Hugging Face's model in its Trainer; `patched`, the same after
fastgate.patch; `self_pruning`, a SelfPruningTrainer with a dense teacher, search and recovery together. The
teacher's forwards are taken out of the last one's seconds and stand apart. One JSON line: median seconds, the
seconds of each round, the bytes that autograd keeps for a step of each on one batch, the environment.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

import fastgate
from fastgate.benchmark.memory import saved_bytes
from fastgate.benchmark.model_variants import dense as dense_and_tokenizer
from fastgate.data import load_task
from fastgate.env import environment
from fastgate.training.evaluate import collator_of
from fastgate.training.model import demo_model_path


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data-dir", required=True)
    p.add_argument("--task", default="sst2")
    p.add_argument("--model", help="a size of `fastgate bench`, or a model; default: the demo extra's MiniLM")
    p.add_argument("--steps", type=int, default=200, help="optimizer steps of every run")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--max-length", type=int, default=128)
    p.add_argument("--sparsity", type=float, default=0.67)
    p.add_argument("--threads", type=int, default=2)
    return p.parse_args(given)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """What the module says, as plain data."""
    torch.set_num_threads(given.threads)
    task = load_task(given.task, given.data_dir)
    dense, tokenizer = dense_and_tokenizer(given.model or str(demo_model_path()), task)
    rows = task.tokenize(tokenizer, given.max_length)["train"]
    rows = rows.shuffle(seed=0).select(range(min(len(rows), given.steps * given.batch)))
    collator = collator_of(task, tokenizer)

    def run(name: str, folder: str) -> tuple[float, float, list[int] | None]:
        """(seconds without the teacher's, the teacher's, layers kept) of one run."""
        set_seed(0)
        args = TrainingArguments(
            output_dir=folder, max_steps=given.steps, per_device_train_batch_size=given.batch,
            learning_rate=5e-5, save_strategy="no", logging_steps=given.steps, report_to=[],
            disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        model = copy.deepcopy(dense)
        options: dict[str, Any] = {"args": args, "train_dataset": rows, "data_collator": collator}
        if name == "self_pruning":
            config = fastgate.PruningConfig(target=fastgate.Sparsity(given.sparsity))
            teacher = copy.deepcopy(dense)
            trainer: Any = fastgate.SelfPruningTrainer(model, **options, pruning=config, teacher=teacher)
        else:
            trainer = Trainer(fastgate.patch(model) if name == "patched" else model, **options)
        trainer.remove_callback(PrinterCallback)  # standard output is for the line of results
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        if name != "self_pruning":
            return seconds, 0.0, None
        return seconds - trainer.pruner.teacher_seconds, trainer.pruner.teacher_seconds, trainer.pruner.kept

    names = ("sdpa", "patched", "self_pruning")
    found: dict[str, list[Any]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.rounds):
            for name in names[turn % 3 :] + names[: turn % 3]:
                found[name].append(run(name, folder))
    batch = collator([rows[i] for i in range(given.batch)])
    kept = found["self_pruning"][0][2]
    pruned = fastgate.prune(copy.deepcopy(dense), keep=kept)
    seconds = {name: statistics.median(run[0] for run in runs) for name, runs in found.items()}
    return {
        "task": given.task, "model": given.model or "minilm, pre-trained", "steps": given.steps,
        "batch_size": given.batch, "max_length": given.max_length, "sparsity": given.sparsity, "kept": kept,
        "seconds": seconds,
        "rounds": {name: [run[0] for run in runs] for name, runs in found.items()},
        "teacher_seconds": statistics.median(run[1] for run in found["self_pruning"]),
        "times_dense": {name: seconds[name] / seconds["sdpa"] for name in names[1:]},
        "saved_bytes": {
            "sdpa": kept_for_backward(copy.deepcopy(dense), batch),
            "patched": kept_for_backward(fastgate.patch(copy.deepcopy(dense)), batch),
            "pruned": kept_for_backward(pruned, batch),
        },
        "environment": environment(),
    }  # fmt: skip


def kept_for_backward(model: Any, batch: Any) -> int:
    """Bytes autograd keeps for one training step of `model` on `batch`."""
    step: Callable[[], torch.Tensor] = lambda: model(**batch).loss  # noqa: E731
    return saved_bytes(step, model.train())


if __name__ == "__main__":
    print(json.dumps(measure(arguments())))
