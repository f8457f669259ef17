"""`fastgate bench`: the same real batches through Hugging Face and fastgate, interleaved, outputs compared
first."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from .checkpoint import load
from .errors import ArgumentError, FastgateError, say
from .families import base_class
from .floor import Floor
from .info import environment
from .patch import patch
from .prune import prune
from .state import encoder_state
from .tasks.load import load_task
from .tasks.model import demo_model_path, dense_model, load_tokenizer
from .tasks.task import Task
from .timing import Timing, interleave

RIVALS = ("sdpa", "eager")
TOLERANCE = 1e-4
_SHAPES = {  # hidden, layers, heads, intermediate
    "minilm": (384, 6, 12, 1536),
    "bert-base": (768, 12, 12, 3072),
    "bert-large": (1024, 24, 16, 4096),
}
ORDERS = ("data", "length")

Batch = Mapping[str, Tensor]


class OutputsDiffer(FastgateError):
    """A model to be timed does not compute what Hugging Face computes; nothing is timed."""


@dataclass(frozen=True)
class Comparison:
    """Timings of one run, by contender: `fastgate`, the rivals, and `floor`, the products alone.

    tokens: attended tokens in all batches. max_difference: largest difference of any logit from Hugging Face.
    """

    timings: dict[str, Timing]
    tokens: int
    rows: int
    padded: int
    max_difference: float
    kept: list[int]
    settings: dict[str, Any] = field(default_factory=dict)

    def ratio(self, rival: str) -> float:
        """How many times faster fastgate is than `rival`, over all batches."""
        return self.timings[rival].total / self.timings["fastgate"].total

    def to_dict(self) -> dict[str, Any]:
        """Plain data: medians in milliseconds, ratios, tokens/s, share of the floor."""
        contenders = {
            name: {
                "median_ms": 1e3 * timing.median,
                "total_ms": 1e3 * timing.total,
                "tokens_per_s": self.tokens / timing.total,
                "rows_per_s": self.rows / timing.total,
                "batches_ms": [1e3 * seconds for seconds in timing.batches],
            }
            for name, timing in self.timings.items()
        }
        return {
            "settings": self.settings,
            "kept": self.kept,
            "rows": self.rows,
            "tokens": self.tokens,
            "filled": self.tokens / self.padded,
            "max_difference": self.max_difference,
            "contenders": contenders,
            "ratio": {name: self.ratio(name) for name in self.timings if name not in ("fastgate", "floor")},
            "floor_share": self.timings["floor"].total / self.timings["fastgate"].total,
        }


def contenders(source: str | Path, task: Task, keep: Sequence[int] | None) -> tuple[Any, Any, Any]:
    """(fastgate's model, Hugging Face's unpruned one, the tokenizer) for `bench`.

    source: a size (`minilm`, `bert-base`, `bert-large`: random weights, the demo model's tokenizer), a
    fastgate checkpoint, or a model of the hub or in a folder. keep: layers whose attention stays, None for
    all.
    """
    name = str(source)
    if name in _SHAPES:
        tokenizer = load_tokenizer(demo_model_path(), task)
        reference = _random_model(name, task, len(tokenizer))
    elif (Path(name) / "fastgate.json").is_file():
        if keep is not None:
            remedy = "leave --keep out, or bench the dense model"
            raise ArgumentError(say("bench", "keep", list(keep), "none for a pruned checkpoint", remedy))
        ours = load(name)
        return ours, unpruned(ours), load_tokenizer(name, task)
    else:
        tokenizer = load_tokenizer(name, task)
        reference = dense_model(name, task)
    ours = patch(copy.deepcopy(reference).eval())
    if keep is not None:
        prune(ours, keep=list(keep), replacement="zero")
    return ours, reference.eval(), tokenizer


def _random_model(size: str, task: Task, vocabulary: int) -> Any:
    from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

    hidden, layers, heads, intermediate = _SHAPES[size]
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
    )
    config.num_labels = max(len(task.labels), 1)
    torch.manual_seed(0)
    return (BertForTokenClassification if task.kind == "tokens" else BertForSequenceClassification)(config)


def unpruned(ours: Any) -> Any:
    """A Hugging Face model with the weights of a pruned one, the missing ones random."""
    reference = base_class(ours)(copy.deepcopy(ours.config)).eval()
    reference.load_state_dict(ours.state_dict(), strict=False)
    return reference


@contextmanager
def _as_pruned(reference: Any, ours: nn.Module) -> Iterator[None]:
    """While open, layers of `reference` whose attention `ours` skips put its replacement in place of it."""
    state = encoder_state(ours)
    encoder = getattr(reference, reference.base_model_prefix, reference)

    def stand_in(module: Any, args: tuple[Tensor, Tensor], output: Tensor, replacement: Any = None) -> Tensor:
        scale, shift = (None, None) if replacement is None else replacement.scale_and_shift(1.0)
        h = args[1] if scale is None else args[1] * scale
        return module.LayerNorm(h if shift is None else h + shift)

    hooks = [
        encoder.encoder.layer[i].attention.output.register_forward_hook(
            functools.partial(stand_in, replacement=state.replacement(i))
        )
        for i, gate in enumerate(state.gates)
        if gate == 0.0
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_outputs(ours: Any, reference: Any, batches: Sequence[Batch], tolerance: float = TOLERANCE) -> float:
    """The largest difference between the logits of the two; raises OutputsDiffer beyond `tolerance`."""
    worst = 0.0
    with torch.inference_mode(), _as_pruned(reference, ours):
        for batch in batches:
            attended = batch["attention_mask"].bool()
            a, b = ours(**batch).logits, reference(**batch).logits
            difference = (a - b).abs()
            worst = max(worst, float((difference[attended] if a.dim() == 3 else difference).max()))
    if not worst <= tolerance:
        remedy = "report it with the model's config; no figure is given for outputs that differ"
        raise OutputsDiffer(
            say("bench", "logits", f"a difference of {worst:.1e}", f"at most {tolerance}", remedy)
        )
    return worst


def real_batches(
    task: Task, tokenizer: Any, *, max_length: int, batch_size: int, count: int, order: str, seed: int = 0
) -> list[Batch]:
    """`count` batches of the task's evaluation rows in the order of the data, or all rows sorted by length
    first.

    Sorted by length the batches are spread evenly from the shortest to the longest, and every batch is nearly
    full.
    """
    if order not in ORDERS:
        raise ArgumentError(say("bench", "order", repr(order), " or ".join(ORDERS), "pass one of these"))
    if batch_size < 1 or count < 1:
        got = f"batch size {batch_size}, {count} batches"
        raise ArgumentError(say("bench", "batches", got, "at least 1 of 1 row", "raise it"))
    rows = task.tokenize(tokenizer, max_length)["evaluation"].remove_columns("labels")
    whole = max(len(rows) // batch_size, 1)
    if order == "data":
        starts = [i * batch_size for i in range(min(count, whole))]
    else:
        lengths = [len(ids) for ids in rows["input_ids"]]
        rows = rows.select(sorted(range(len(rows)), key=lengths.__getitem__))
        starts = [
            whole * (2 * i + 1) // (2 * min(count, whole)) * batch_size for i in range(min(count, whole))
        ]
    keys = tokenizer.model_input_names
    return [
        dict(tokenizer.pad({key: rows[start : start + batch_size][key] for key in keys}, return_tensors="pt"))
        for start in starts
    ]


def compare(
    ours: Any,
    reference: Any,
    batches: Sequence[Batch],
    *,
    against: Sequence[str] = RIVALS,
    repeats: int = 3,
    progress: Callable[[], None] | None = None,
) -> Comparison:
    """Check that `ours` computes what `reference` does, then time both, and the products alone, on every
    batch.

    against: the attention implementations of Hugging Face to time. Raises OutputsDiffer and times nothing if
    a logit differs by more than 1e-4.
    """
    _check_rivals(against)
    device = next(ours.parameters()).device
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    worst = check_outputs(ours, reference, batches[:2])
    runs: dict[str, Callable[[Batch], object]] = {"fastgate": lambda batch: ours(**batch)}
    for name in against:
        rival = copy.deepcopy(reference)
        rival.set_attn_implementation(name)
        runs[name] = functools.partial(_run, rival)
    runs["floor"] = Floor(ours, batches)
    timings = interleave(runs, batches, repeats=repeats, device=device, progress=progress)
    state = encoder_state(ours)
    return Comparison(
        timings,
        tokens=sum(int(batch["attention_mask"].sum()) for batch in batches),
        rows=sum(batch["attention_mask"].shape[0] for batch in batches),
        padded=sum(batch["attention_mask"].numel() for batch in batches),
        max_difference=worst,
        kept=[i for i, gate in enumerate(state.gates) if gate != 0.0],
    )


def _check_rivals(against: Sequence[str]) -> None:
    unknown = [name for name in against if name not in RIVALS]
    if unknown or not against:
        got = ", ".join(unknown) or "none"
        raise ArgumentError(say("bench", "against", got, " or ".join(RIVALS), "pass one or both"))


def _run(model: Any, batch: Batch) -> object:
    return model(**batch)


def bench(
    model: str,
    task_name: str,
    data_dir: Path | None,
    *,
    against: Sequence[str],
    keep: Sequence[int] | None,
    batch_size: int,
    batches: int,
    order: str,
    threads: int | None,
    max_length: int,
    console: Console,
) -> Comparison:
    """The body of `fastgate bench`: load, check, time. `console` shows a progress bar."""
    _check_rivals(against)
    if threads is not None:
        torch.set_num_threads(threads)
    task = load_task(task_name, data_dir)
    ours, reference, tokenizer = contenders(model, task, keep)
    made = real_batches(
        task, tokenizer, max_length=max_length, batch_size=batch_size, count=batches, order=order
    )
    if torch.cuda.is_available():
        ours, reference = ours.cuda(), reference.cuda()
    with Progress(console=console, transient=True) as bar:
        job = bar.add_task("timing", total=len(made))
        found = compare(ours, reference, made, against=against, progress=lambda: bar.advance(job))
    settings = {
        "model": model,
        "task": task_name,
        "batch_size": batch_size,
        "batches": len(made),
        "order": order,
        "max_length": max_length,
        "dtype": str(next(ours.parameters()).dtype).removeprefix("torch."),
        "environment": environment(),
    }
    return replace(found, settings=settings)


def bench_table(found: Comparison) -> Table:
    """What `to_dict` says, for the screen."""
    data = found.to_dict()
    settings = data["settings"]
    threads = settings["environment"]["threads"]
    title = (
        f"{settings['model']}, {settings['task']}, batches of {settings['batch_size']} in "
        f"{settings['order']} order, {data['filled']:.0%} filled, {threads} threads, "
        f"kept {data['kept']}"
    )
    caption = f"logits within {data['max_difference']:.0e} of Hugging Face's; floor: the products alone"
    table = Table(title=title, caption=caption)
    for name in ("", "median ms a batch", "tokens/s", "fastgate is", "share of the floor"):
        table.add_column(name, justify="left" if not name else "right")
    total = found.timings["fastgate"].total
    for name, numbers in data["contenders"].items():
        ratio = f"{1e-3 * numbers['total_ms'] / total:.2f}x as fast" if name in data["ratio"] else ""
        share = f"{found.timings['floor'].total / found.timings[name].total:.0%}"
        table.add_row(name, f"{numbers['median_ms']:.1f}", f"{numbers['tokens_per_s']:,.0f}", ratio, share)
    return table
