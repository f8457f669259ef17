"""`fastgate bench`: fastgate and its baselines in turn on the same real batches, outputs compared first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from fastgate.benchmark.baselines import BASELINES, Baseline, Batch, build_baselines
from fastgate.benchmark.batches import check_order, real_batches
from fastgate.benchmark.equivalence import check_baselines, check_outputs
from fastgate.benchmark.matmul_bound import MatmulLowerBound
from fastgate.benchmark.model_variants import DTYPES, load_models, pruned
from fastgate.benchmark.timing import Timing, interleave
from fastgate.data.load import load_task
from fastgate.env import environment
from fastgate.errors import ArgumentError, format_error
from fastgate.models.handle import get_encoder
from fastgate.text_table import paragraph, text_table
from fastgate.training.feasibility import check_rows

SECONDS = 0.2  # of a model on a batch, at least: small batches are run more often for steady medians
FASTGATE, UNPRUNED = "fastgate", "fastgate unpruned"  # names among the timings
LOWER_BOUND, UNPRUNED_LOWER_BOUND = "lower bound", "lower bound unpruned"  # of the two


@dataclass(frozen=True)
class Comparison:
    """Timings of one run.

    timings: by name. `fastgate`, the baselines, and `lower bound`, the matmul lower bound of `fastgate`. With
        a pruned model `compare` adds `fastgate unpruned` and `lower bound unpruned`. Baselines always run the
        unpruned model.
    tokens: attended tokens in all batches.
    rows: sequences in all batches.
    padded: tokens with the padding.
    max_difference: largest difference of any logit of fastgate's from Hugging Face's.
    kept: the layers that keep their attention.
    layers: number of layers.
    baselines: in which form each baseline ran.
    absent: why a baseline did not run.
    """

    timings: dict[str, Timing]
    tokens: int
    rows: int
    padded: int
    max_difference: float
    kept: list[int]
    layers: int
    baselines: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def speedup(self, other: str, of: str = FASTGATE) -> float:
        """The time of `other` over that of `of`, both in all batches."""
        return self.timings[other].total / self.timings[of].total

    def to_dict(self) -> dict[str, Any]:
        """Plain data: medians in milliseconds, tokens/s, speed-ups, share of the matmul lower bound."""
        models = {
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
            "layers": self.layers,
            "rows": self.rows,
            "tokens": self.tokens,
            "filled": self.tokens / self.padded,
            "max_difference": self.max_difference,
            "baselines": self.baselines,
            "absent": self.absent,
            "models": models,
            "speedup": {
                name: self.speedup(name)
                for name in self.timings
                if name not in (FASTGATE, LOWER_BOUND, UNPRUNED_LOWER_BOUND)
            },
            "lower_bound_share": self.speedup(LOWER_BOUND),
        }


def compare(
    ours: Any,
    reference: Any,
    batches: Sequence[Batch],
    *,
    unpruned: Any = None,
    against: Sequence[str] = ("sdpa", "eager"),
    repeats: int = 3,
    progress: Callable[[], None] | None = None,
) -> Comparison:
    """Check that `ours` computes what `reference` does, then time both, and the matmul lower bound, on every
    batch.

    Args:
        unpruned: fastgate's model with all attention, if `ours` is pruned. It is checked and timed as well,
            so that the effects of pruning and of the runtime can be told apart.
        against: names of baselines.BASELINES. One that cannot run here, or is not right, is left out with the
            reason.

    Raises:
        OutputsDiffer: a logit differs by more than TOLERANCES. Nothing is timed.
        ArgumentError: no baseline is left.
    """
    _check_names(against)
    device = next(ours.parameters()).device
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    baselines, absent = build_baselines(against, reference, batches[0])
    models = {"": ours} if unpruned is None else {"": ours, "unpruned": unpruned}
    comparison, *others = compare_all(
        models, reference, batches, baselines, absent, repeats=repeats, progress=progress
    )
    for other in others:
        timings = {FASTGATE: comparison.timings[FASTGATE], UNPRUNED: other.timings[FASTGATE]}
        timings |= comparison.timings | {UNPRUNED_LOWER_BOUND: other.timings[LOWER_BOUND]}
        worst = max(comparison.max_difference, other.max_difference)
        comparison = replace(comparison, timings=timings, max_difference=worst)
    return comparison


def compare_all(
    models: Mapping[str, Any],
    reference: Any,
    batches: Sequence[Batch],
    baselines: Mapping[str, Baseline],
    absent: Mapping[str, str],
    *,
    repeats: int = 3,
    progress: Callable[[], None] | None = None,
) -> list[Comparison]:
    """As `compare`, for several models that share the timings of the baselines. Batches are on their device.

    baselines, absent: what build_baselines returned, whatever batch it was given. One Comparison a model, in
    their order.
    """
    device = batches[0]["attention_mask"].device
    worst = {name: check_outputs(model, reference, batches[:2]) for name, model in models.items()}
    baselines, wrong = check_baselines(baselines, reference, batches[:2])
    absent = {**absent, **wrong}
    if not baselines:
        got = "; ".join(f"{name}: {why}" for name, why in absent.items())
        raise ArgumentError(
            format_error("bench", "--against", got, "a baseline that runs here", "name another")
        )
    runs: dict[str, Callable[[Batch], object]] = {f"fastgate {n}": _call(m) for n, m in models.items()}
    runs |= {name: baseline.run for name, baseline in baselines.items()}
    runs |= {f"{LOWER_BOUND} {name}": MatmulLowerBound(model, batches) for name, model in models.items()}
    timings = interleave(
        runs, batches, repeats=repeats, seconds=SECONDS, device=device, progress=progress
    )  # fmt: skip
    return [
        Comparison(
            {
                FASTGATE: timings[f"fastgate {name}"],
                **{baseline: timings[baseline] for baseline in baselines},
                LOWER_BOUND: timings[f"{LOWER_BOUND} {name}"],
            },
            tokens=sum(int(batch["attention_mask"].sum()) for batch in batches),
            rows=sum(batch["attention_mask"].shape[0] for batch in batches),
            padded=sum(batch["attention_mask"].numel() for batch in batches),
            max_difference=worst[name],
            kept=_kept(model),
            layers=get_encoder(model).num_layers,
            baselines={name: baseline.form for name, baseline in baselines.items()},
            absent=absent,
        )
        for name, model in models.items()
    ]


def _kept(model: Any) -> list[int]:
    """The layers whose attention runs."""
    return [i for i, gate in enumerate(get_encoder(model).gates) if gate != 0.0]


def _check_names(against: Sequence[str]) -> None:
    unknown = [name for name in against if name not in BASELINES]
    if unknown or not against:
        got = ", ".join(unknown) or "none"
        raise ArgumentError(
            format_error("bench", "--against", got, " or ".join(BASELINES), "pass one or more, by commas")
        )


def _call(model: Any) -> Callable[[Batch], object]:
    return lambda batch: model(**batch)


def dtype_of(command: str, name: str) -> torch.dtype:
    """The dtype of that name. Raises ArgumentError for one that nothing is compared in."""
    if name not in DTYPES:
        raise ArgumentError(
            format_error(command, "--dtype", repr(name), " or ".join(DTYPES), "pass one of these")
        )
    return DTYPES[name]


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
    _check_names(against)
    precision = dtype_of("bench", dtype)
    if threads is not None:
        torch.set_num_threads(threads)
    check_order(order)
    task = load_task(task_name, data_dir, max_train_rows=1)
    ours, reference, tokenizer = load_models(model, task, keep, precision)
    chosen = real_batches(
        task, tokenizer, max_length=max_length, batch_size=batch_size, count=batches, order=order
    )
    check_rows("bench", "--max-length", [batch["input_ids"][0] for batch in chosen], ours)
    handle = get_encoder(ours)
    is_pruned = len(_kept(ours)) < handle.num_layers
    unpruned = pruned(reference, None, handle.runtime.pooling) if is_pruned else None
    with Progress(console=console, transient=True) as bar:
        job = bar.add_task("timing", total=len(chosen))
        comparison = compare(
            ours,
            reference,
            chosen,
            unpruned=unpruned,
            against=against,
            progress=lambda: bar.advance(job),
        )
    settings = {
        "model": model,
        "task": task_name,
        "batch_size": batch_size,
        "batches": len(chosen),
        "order": order,
        "max_length": max_length,
        "dtype": dtype,
        "environment": environment(),
    }
    return replace(comparison, settings=settings)


def bench_table(comparison: Comparison) -> str:
    """What `to_dict` says, for the screen."""
    data = comparison.to_dict()
    settings, layers = data["settings"], comparison.layers
    is_pruned = UNPRUNED in comparison.timings
    title = (
        f"{settings['model']}, {settings['dtype']}, {settings['task']}, batches of {settings['batch_size']} "
        f"in {settings['order']} order, {data['filled']:.0%} filled, "
        f"threads: {settings['environment']['threads']}"
    )
    speedup_columns = {UNPRUNED: "speed-up unpruned", FASTGATE: "speed-up pruned"}
    if not is_pruned:
        speedup_columns = {FASTGATE: "speed-up"}
    header = [
        "",
        "attention kept",
        "ms per batch",
        "tokens/s",
        *speedup_columns.values(),
        "share of lower bound",
    ]
    bounds = {FASTGATE: LOWER_BOUND, UNPRUNED: UNPRUNED_LOWER_BOUND}
    rows = []
    for name in (FASTGATE, *data["speedup"]):
        numbers = data["models"][name]
        kept = len(comparison.kept) if name == FASTGATE else layers
        share = f"{comparison.speedup(bounds[name], name):.0%}" if name in bounds else ""
        speedups = [
            f"{comparison.speedup(name, of):.2f}x" if name not in (FASTGATE, of) else ""
            for of in speedup_columns
        ]
        shown = "fastgate pruned" if name == FASTGATE and is_pruned else name
        times = [f"{numbers['median_ms']:.1f}", f"{numbers['tokens_per_s']:,.0f}"]
        rows.append([shown, f"{kept} of {layers}", *times, *speedups, share])
    notes = [paragraph(note) for note in _notes(comparison, data)]
    return "\n".join([paragraph(title), "", text_table(header, rows), "", *notes])


def _notes(comparison: Comparison, data: dict[str, Any]) -> list[str]:
    """The sentences below the table."""
    baselines = ", ".join(comparison.baselines)
    kept = ", ".join(map(str, comparison.kept))
    layers = f"attention in layers {kept}" if kept else "no attention"
    shares = [comparison.speedup(LOWER_BOUND)]
    if UNPRUNED in comparison.timings:
        first = next(iter(comparison.baselines))
        runtime, pruning = comparison.speedup(first, UNPRUNED), comparison.speedup(UNPRUNED)
        shares.append(comparison.speedup(UNPRUNED_LOWER_BOUND, UNPRUNED))
        notes = [
            f"{UNPRUNED}, {baselines} run the unpruned model. fastgate pruned runs {layers}.",
            "The columns of speed-ups are of unpruned and of pruned fastgate over the model in the row.",
            f"The runtime alone gives {runtime:.2f}x over {first}, pruning another {pruning:.2f}x, both "
            f"together {comparison.speedup(first):.2f}x.",
        ]
    else:
        notes = [
            "All rows run the unpruned model. The speed-ups of fastgate over the model in the row are of the "
            "runtime alone."
        ]
    notes += [
        f"Logits: within {data['max_difference']:.0e} of Hugging Face's.",
        "Lower bound: the time of the needed matrix products alone.",
    ]
    if round(100 * max(shares)) > 100:
        notes.append(ABOVE_LOWER_BOUND)
    notes += [f"{name}: {form}." for name, form in comparison.baselines.items()]
    return notes + [f"{name} was not timed: {why}" for name, why in comparison.absent.items()]


ABOVE_LOWER_BOUND = (
    "A share above 100% is possible because the lower bound is measured too. The speed of the machine may "
    "have changed, or fastgate's attention kernel was faster than two separate products."
)
