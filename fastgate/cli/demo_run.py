"""`fastgate demo`: the main job on real text in minutes: dense fine-tune, self-prune, compare."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastgate.benchmark.baselines import Batch
from fastgate.benchmark.equivalence import check_outputs
from fastgate.benchmark.model_variants import freeze_on_cpu, unpruned
from fastgate.benchmark.timing import interleave
from fastgate.cli.progress import Display
from fastgate.data import Task, load_task
from fastgate.data.docstrings import docstring_task
from fastgate.models.checkpoint import load
from fastgate.models.patching import patch
from fastgate.pruning import Sparsity
from fastgate.report.demo_report import ModelResult, demo_section, gate_picture, how_chosen, write_demo_report
from fastgate.training import dense_model, load_tokenizer
from fastgate.training.config import FinetuneConfig, PruningOptions
from fastgate.training.finetune import finetune
from fastgate.training.model import demo_model_path
from fastgate.training.run_folder import clear

SPARSITY = 0.67  # four of the six attention sublayers
BATCHES, LATENCY_ROWS = 8, 24
MAX_LENGTH = 48
TRAIN_ROWS = 6000  # of a task of the catalogue
# With a higher rate the search of some 50 steps overshoots its target. Then all gates are closed completely,
# and the search no longer tells the layers apart.
GATE_LR = 0.15


def demo_config(task: str, model: str, seed: int) -> FinetuneConfig:
    """The demo's settings, for a small model and some minutes on two CPU cores."""
    return FinetuneConfig(
        model=model,
        task=task,
        target=Sparsity(SPARSITY),
        dense_epochs=1,
        prune_epochs=2,
        dense_lr=3e-4,
        prune_lr=3e-4,
        max_length=MAX_LENGTH,
        seed=seed,
        warmup=0.1,
        pruning=PruningOptions(gate_lr=GATE_LR),
    )


def run_demo(
    out: Path, console: Console, *, task_name: str | None = None, data_dir: Path | None = None, seed: int = 0
) -> dict[str, Any]:
    """Run the demo in the folder `out`, which replaces an earlier demo there. Returns what it measured.

    Writes `out`/pruned (the checkpoint), report.md, gates.png, gates.svg, result.json. The corpus is the
    docstrings of the installed packages, or the task `task_name` of the catalogue, from `data_dir` or the
    hub.
    """
    started = time.perf_counter()
    model_path = demo_model_path()
    if task_name is None:
        console.print("Reading the docstrings of the installed packages ...")
        task = docstring_task()
    else:
        task = load_task(task_name, data_dir, max_train_rows=TRAIN_ROWS, seed=seed)
    kinds = f"{len(task.labels)} classes: {', '.join(task.labels)}" if task.labels else "a number a row"
    console.print(
        f"{task.name}: {len(task.train)} training rows, {len(task.evaluation)} to score on; {kinds}"
    )
    clear(out)
    with Display(console) as display:
        config = demo_config(task.name, str(model_path), seed)
        result = finetune(
            config, task, out, listener=display, tell=console.print, announce=console.print, save_every=None
        )
    console.print("Timing the same rows on Hugging Face and on fastgate, in turn ...")
    results, worst = measure(out, task, result)
    seconds = time.perf_counter() - started
    history = json.loads((out / "history.json").read_text(encoding="utf-8"))
    gate_picture(history["steps"], history["kept"], out / "gates.png")
    notes = [
        "Hugging Face runs its SDPA attention",
        f"batches of {config.batch_size} evaluation rows in order, float32; medians of interleaved runs",
        f"logits equal Hugging Face's within {worst:.0e}, checked before timing",
        "the pruned model saw the training rows again while pruning, with the dense model as teacher",
        f"the whole demo took {seconds:.0f} s",
    ]
    title = f"fastgate demo: {task.name}, MiniLM-L6"
    write_demo_report(out / "report.md", title, results, result, notes)
    console.print(demo_section(results, task.metric, title).text(), soft_wrap=True)
    kept = result["pruned"]["kept"]
    console.print(
        f"attention kept in layers {kept}; {seconds:.0f} s in all; see {out}/report.md, {out}/gates.png"
    )
    console.print(how_chosen(result["pruned"]))
    console.print(f"the pruned model: fastgate.load({str(out / 'pruned')!r})")
    return {**result, "models": [vars(c) for c in results], "seconds": seconds}


def measure(out: Path, task: Task, result: dict[str, Any]) -> tuple[list[ModelResult], float]:
    """Hugging Face's dense model, fastgate's and the pruned one on the same rows; the largest difference."""
    tokenizer = load_tokenizer(out / "dense", task)
    reference: Any = dense_model(out / "dense", task).eval()
    dense: Any = patch(copy.deepcopy(reference))
    pruned: Any = load(out / "pruned")
    if torch.cuda.is_available():
        reference, dense, pruned = (model.cuda() for model in (reference, dense, pruned))
    models = {"Hugging Face": reference, "fastgate dense": dense, "fastgate pruned": pruned}
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    for ours in (dense, pruned):
        freeze_on_cpu(ours)
    device = next(reference.parameters()).device
    rows = task.tokenize(tokenizer, result["settings"]["max_length"])["evaluation"].remove_columns("labels")

    def batches(size: int, count: int) -> list[Batch]:
        chosen: list[Batch] = []
        for start in range(0, min(size * count, max(len(rows) - size, 0) + 1), size):
            chunk = rows[start : start + size]
            chosen.append({k: v.to(device) for k, v in tokenizer.pad(chunk, return_tensors="pt").items()})
        return chosen

    many, single = batches(result["settings"]["batch_size"], BATCHES), batches(1, LATENCY_ROWS)
    pairs = ((dense, reference), (pruned, unpruned(pruned).to(device)))
    worst = max(check_outputs(ours, theirs, many[:2]) for ours, theirs in pairs)
    runs: dict[str, Callable[[Batch], object]] = {name: _call(model) for name, model in models.items()}
    throughput = interleave(runs, many, device=device)
    latency = interleave(runs, single, device=device)
    layers = result["pruned"]["layers"]
    folders = {"Hugging Face": "dense", "fastgate dense": "dense", "fastgate pruned": "pruned"}
    results = []
    for name in models:
        phase = folders[name]
        weights = out / phase / "model.safetensors"
        results.append(
            ModelResult(
                name=name,
                score=result[phase]["score"],
                kept=layers if phase == "dense" else len(result["pruned"]["kept"]),
                layers=layers,
                parameters=parameters[name],
                checkpoint_bytes=weights.stat().st_size,
                latency_ms=1e3 * latency[name].median,
                rows_per_s=_rows(many) / throughput[name].total,
                tokens_per_s=_tokens(many) / throughput[name].total,
            )
        )
    return results, worst


def _call(model: Any) -> Callable[[Batch], object]:
    return lambda batch: model(**batch)


def _rows(batches: Sequence[Batch]) -> int:
    return sum(batch["attention_mask"].shape[0] for batch in batches)


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)
