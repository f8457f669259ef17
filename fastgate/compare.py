"""`fastgate bench`: the same real batches through fastgate and its peers in turn, outputs compared first."""

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
from .freeze import freeze
from .info import environment
from .packing import linked_tokens
from .patch import patch
from .peers import PEERS, Batch, Peer, Run, build, twin
from .prune import prune
from .state import encoder_state
from .tasks.load import load_task
from .tasks.model import demo_model_path, dense_model, load_tokenizer
from .tasks.task import Task
from .timing import Timing, interleave

# How far logits may lie from Hugging Face's at the same precision, as a share of the largest, or of 1 if that
# is less. In bfloat16 two ways through 24 layers that round differently end a few of its last places apart.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2**-5}
SECONDS = 0.2  # of a contender on a batch, at least: small batches are run more often for steady medians
_SHAPES = {  # hidden, layers, heads, intermediate
    "minilm": (384, 6, 12, 1536),
    "bert-base": (768, 12, 12, 3072),
    "bert-large": (1024, 24, 16, 4096),
}
ORDERS = ("data", "length")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class OutputsDiffer(FastgateError):
    """A model to be timed does not compute what Hugging Face computes; nothing is timed."""


@dataclass(frozen=True)
class Comparison:
    """Timings of one run, by contender: `fastgate`, the peers, and `floor`, the products alone.

    tokens: attended tokens in all batches. max_difference: largest difference of any logit of fastgate's from
    Hugging Face's. peers: in which form each peer ran. absent: why a peer did not.
    """

    timings: dict[str, Timing]
    tokens: int
    rows: int
    padded: int
    max_difference: float
    kept: list[int]
    peers: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
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
            "peers": self.peers,
            "absent": self.absent,
            "contenders": contenders,
            "ratio": {name: self.ratio(name) for name in self.timings if name not in ("fastgate", "floor")},
            "floor_share": self.timings["floor"].total / self.timings["fastgate"].total,
        }


def contenders(
    source: str | Path, task: Task, keep: Sequence[int] | None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any, Any]:
    """(fastgate's model, Hugging Face's unpruned one, the tokenizer) for `bench`.

    source: a size (`minilm`, `bert-base`, `bert-large`: random weights, the demo model's tokenizer), a
    fastgate checkpoint, or a model of the hub or in a folder. keep: layers whose attention stays, None for
    all. dtype: of both models' parameters; they are on the GPU if there is one.
    """
    name, device = str(source), _device()
    if (Path(name) / "fastgate.json").is_file():
        if keep is not None:
            remedy = "leave --keep out, or bench the dense model"
            raise ArgumentError(say("bench", "keep", list(keep), "none for a pruned checkpoint", remedy))
        ours = load(name).to(device, dtype)
        reference = unpruned(ours).to(device, dtype)
        return ours_at_best(ours), reference, load_tokenizer(name, task)
    reference, tokenizer = dense(source, task, dtype)
    return pruned(reference, keep), reference, tokenizer


def dense(source: str | Path, task: Task, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(Hugging Face's model, the tokenizer) of a size, the hub or a folder, as `contenders` takes them."""
    name = str(source)
    if name in _SHAPES:
        tokenizer = load_tokenizer(demo_model_path(), task)
        reference = _random_model(name, task, len(tokenizer))
    else:
        tokenizer = load_tokenizer(name, task)
        reference = dense_model(name, task)
    return reference.eval().to(_device(), dtype), tokenizer


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pruned(reference: Any, keep: Sequence[int] | None) -> Any:
    """fastgate's model with the weights of a Hugging Face model, attention kept in the layers of `keep`."""
    ours = patch(twin(reference))
    if keep is not None:
        prune(ours, keep=list(keep), replacement="zero")
    return ours_at_best(ours)


def ours_at_best(model: Any) -> Any:
    """A patched model, on the device it will run on, in the form it is timed in: on the CPU frozen."""
    return freeze(model) if next(model.parameters()).device.type == "cpu" else model


def layers_of(size: str) -> int:
    """How many layers a model of one of the named sizes has."""
    return _SHAPES[size][1]


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
    linked: Tensor

    def link(module: Any, args: tuple[()], batch: Batch) -> None:
        nonlocal linked
        linked = linked_tokens(batch["attention_mask"].bool()).flatten()

    def stand_in(module: Any, args: tuple[Tensor, Tensor], output: Tensor, replacement: Any = None) -> Tensor:
        rows = args[1].flatten(0, 1)
        rows = rows if replacement is None else rows + replacement(rows, linked)
        return module.LayerNorm(rows.view_as(output))

    hooks = [reference.register_forward_pre_hook(link, with_kwargs=True)]
    hooks += [
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


def check_outputs(ours: Any, reference: Any, batches: Sequence[Batch]) -> float:
    """The largest difference between the logits of the two; raises OutputsDiffer beyond TOLERANCES."""
    with torch.inference_mode(), _as_pruned(reference, ours):
        worst, share = _difference(lambda batch: ours(**batch).logits, reference, batches)
    tolerance = TOLERANCES[reference.dtype]
    if not share <= tolerance:
        got = f"a difference of {worst:.1e}"
        remedy = "report it with the model's config; no figure is given for outputs that differ"
        raise OutputsDiffer(say("bench", "logits", got, f"at most {tolerance}", remedy))
    return worst


def _difference(run: Run, reference: Any, batches: Sequence[Batch]) -> tuple[float, float]:
    """Largest difference of logits on attended rows: as it is, and as a share of max(1, largest logit)."""
    worst = share = 0.0
    for batch in batches:
        attended = batch["attention_mask"].bool()
        a, b = run(batch).float(), reference(**batch).logits.float()
        if b.dim() == 3:
            a, b = a[attended], b[attended]
        difference = float((a - b).abs().max())
        worst, share = max(worst, difference), max(share, difference / max(1.0, float(b.abs().max())))
        if difference != difference:  # max() of Python drops a NaN
            return difference, difference
    return worst, share


def hold_peers(
    peers: Mapping[str, Peer], reference: Any, batches: Sequence[Batch]
) -> tuple[dict[str, Peer], dict[str, str]]:
    """(the peers whose logits are Hugging Face's within TOLERANCES, why the others are not timed)."""
    tolerance = TOLERANCES[reference.dtype]
    held: dict[str, Peer] = {}
    wrong: dict[str, str] = {}
    with torch.inference_mode():
        for name, peer in peers.items():
            worst, share = _difference(peer.run, reference, batches)
            if share <= tolerance:
                held[name] = peer
            else:
                wrong[name] = (
                    f"a logit differs by {worst:.1e} from Hugging Face's, at most {tolerance} is allowed"
                )
    return held, wrong


def real_batches(
    task: Task, tokenizer: Any, *, max_length: int, batch_size: int, count: int, order: str
) -> list[Batch]:
    """`count` batches of the task's evaluation rows in the order of the data, or all rows sorted by length
    first: what `choose_batches` says of them."""
    return choose_batches(
        evaluation_rows(task, tokenizer, max_length),
        tokenizer,
        batch_size=batch_size,
        count=count,
        order=order,
    )


def evaluation_rows(task: Task, tokenizer: Any, max_length: int) -> Any:
    """The model's inputs of each evaluation row of the task, as a data set."""
    return task.tokenize(tokenizer, max_length)["evaluation"].remove_columns("labels")


def choose_batches(rows: Any, tokenizer: Any, *, batch_size: int, count: int, order: str) -> list[Batch]:
    """`count` padded batches of `evaluation_rows`.

    Sorted by length the batches are spread evenly from the shortest to the longest, and every batch is nearly
    full.
    """
    if order not in ORDERS:
        raise ArgumentError(say("bench", "order", repr(order), " or ".join(ORDERS), "pass one of these"))
    if batch_size < 1 or count < 1:
        got = f"batch size {batch_size}, {count} batches"
        raise ArgumentError(say("bench", "batches", got, "at least 1 of 1 row", "raise it"))
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
    against: Sequence[str] = ("sdpa", "eager"),
    repeats: int = 3,
    progress: Callable[[], None] | None = None,
) -> Comparison:
    """Check that `ours` computes what `reference` does, then time both, and the products alone, on every
    batch.

    against: names of peers.PEERS; one that cannot run here, or is not right, is left out with the reason.
    Raises OutputsDiffer and times nothing if a logit of `ours` differs by more than TOLERANCES, ArgumentError
    if no peer is left.
    """
    _check_peers(against)
    device = next(ours.parameters()).device
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    peers, absent = build(against, reference, batches[0])
    (found,) = compare_all({"": ours}, reference, batches, peers, absent, repeats=repeats, progress=progress)
    return found


def compare_all(
    models: Mapping[str, Any],
    reference: Any,
    batches: Sequence[Batch],
    peers: Mapping[str, Peer],
    absent: Mapping[str, str],
    *,
    repeats: int = 3,
    progress: Callable[[], None] | None = None,
) -> list[Comparison]:
    """As `compare`, for several models of ours that share the peers' timings; batches on the models' device.

    peers, absent: what peers.build returned, whatever batch it was given. One Comparison a model, in their
    order.
    """
    device = batches[0]["attention_mask"].device
    worst = {name: check_outputs(model, reference, batches[:2]) for name, model in models.items()}
    peers, wrong = hold_peers(peers, reference, batches[:2])
    absent = {**absent, **wrong}
    if not peers:
        got = "; ".join(f"{name}: {why}" for name, why in absent.items())
        raise ArgumentError(say("bench", "against", got, "a peer that runs here", "name another"))
    runs: dict[str, Callable[[Batch], object]] = {f"fastgate {n}": _call(m) for n, m in models.items()}
    runs |= {name: peer.run for name, peer in peers.items()}
    runs |= {f"floor {name}": Floor(model, batches) for name, model in models.items()}
    timings = interleave(
        runs, batches, repeats=repeats, seconds=SECONDS, device=device, progress=progress
    )  # fmt: skip
    return [
        Comparison(
            {
                "fastgate": timings[f"fastgate {name}"],
                **{peer: timings[peer] for peer in peers},
                "floor": timings[f"floor {name}"],
            },
            tokens=sum(int(batch["attention_mask"].sum()) for batch in batches),
            rows=sum(batch["attention_mask"].shape[0] for batch in batches),
            padded=sum(batch["attention_mask"].numel() for batch in batches),
            max_difference=worst[name],
            kept=[i for i, gate in enumerate(encoder_state(model).gates) if gate != 0.0],
            peers={name: peer.form for name, peer in peers.items()},
            absent=absent,
        )
        for name, model in models.items()
    ]


def _check_peers(against: Sequence[str]) -> None:
    unknown = [name for name in against if name not in PEERS]
    if unknown or not against:
        got = ", ".join(unknown) or "none"
        raise ArgumentError(say("bench", "against", got, " or ".join(PEERS), "pass one or more, by commas"))


def _call(model: Any) -> Callable[[Batch], object]:
    return lambda batch: model(**batch)


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
    dtype: str = "float32",
) -> Comparison:
    """The body of `fastgate bench`: load, check, time. `console` shows a progress bar."""
    _check_peers(against)
    if dtype not in DTYPES:
        raise ArgumentError(say("bench", "dtype", repr(dtype), " or ".join(DTYPES), "pass one of these"))
    if threads is not None:
        torch.set_num_threads(threads)
    task = load_task(task_name, data_dir, max_train_rows=1)
    ours, reference, tokenizer = contenders(model, task, keep, DTYPES[dtype])
    made = real_batches(
        task, tokenizer, max_length=max_length, batch_size=batch_size, count=batches, order=order
    )
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
        "dtype": dtype,
        "environment": environment(),
    }
    return replace(found, settings=settings)


def bench_table(found: Comparison) -> Table:
    """What `to_dict` says, for the screen."""
    data = found.to_dict()
    settings = data["settings"]
    threads = settings["environment"]["threads"]
    title = (
        f"{settings['model']}, {settings['dtype']}, {settings['task']}, "
        f"batches of {settings['batch_size']} in {settings['order']} order, {data['filled']:.0%} filled, "
        f"{threads} threads, kept {data['kept']}"
    )
    caption = "\n".join(
        [
            f"logits within {data['max_difference']:.0e} of Hugging Face's; floor: the products alone",
            *data["peers"].values(),
            *(f"{name} was not timed: {why}" for name, why in data["absent"].items()),
        ]
    )
    table = Table(title=title, caption=caption)
    for name in ("", "median ms a batch", "tokens/s", "fastgate is", "share of the floor"):
        table.add_column(name, justify="left" if not name else "right")
    total = found.timings["fastgate"].total
    for name, numbers in data["contenders"].items():
        ratio = f"{1e-3 * numbers['total_ms'] / total:.2f}x as fast" if name in data["ratio"] else ""
        share = f"{found.timings['floor'].total / found.timings[name].total:.0%}"
        table.add_row(name, f"{numbers['median_ms']:.1f}", f"{numbers['tokens_per_s']:,.0f}", ratio, share)
    return table
