"""The tables of gpu_models.py: one a scenario, the aims and whether they are met, and counts of kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastgate.report.markdown import markdown_table

Line = dict[str, Any]


def pruned_attention_kernels(found: dict[str, Any]) -> float:
    """Kernels a pruned attention costs: what a layer without one adds, less its feed-forward steps."""
    n, half = found["kernels"], found["layers"] // 2
    return (n["none"] - n["none, half the layers"]) / half - found["feed_forward"]


AIMS: tuple[tuple[str, str, str, float], ...] = (
    ("half padding", "fastgate", "sdpa", 2.6),
    ("half padding", "fastgate", "flash varlen", 1.0),
    ("half padding", "fastgate", "tflop_per_s", 520.0),
    ("half padding", "fastgate {0,4,8}", "sdpa", 4.5),
    ("half padding", "fastgate {0,1}", "sdpa", 12.0),
    ("batch 1, length 32", "fastgate", "eager", 5.0),
    ("batch 1, length 32", "fastgate", "replay over its kernels", 1.3),
    ("training step", "fastgate", "sdpa", 2.0),
)


def tables(lines: Sequence[Line], kernels: Line | None) -> str:
    """Markdown: a table a scenario, the aims, and how many kernels a forward launches."""
    parts = []
    for line in lines:
        if "failed" in line:
            parts += [f"### {line['scenario']}: not timed, {line['failed']}", ""]
            continue
        parts += [f"### {line['scenario']}: {line['rows']} rows, {line['filled']:.0%} filled", ""]
        header = ["", "ms", "TFLOP/s", "speed-up over", "replay µs", "its kernels µs"]
        rows = [_cells(name, row) for name, row in line["models"].items()]
        parts += [markdown_table(header, rows, (0, 3)), ""]
        parts += [*(f"{name}: {why}" for name, why in line["absent"].items()), ""]
    parts.append(markdown_table(["aim", "wanted", "measured", "met"], aims(lines), (0, 3)))
    if kernels is not None:
        counts = ", ".join(f"{name}: {n}" for name, n in kernels["kernels"].items())
        steps, cost = kernels["feed_forward"], pruned_attention_kernels(kernels)
        parts += ["", f"Kernels of a forward by the attentions kept: {counts}.", ""]
        parts += [f"A layer's feed-forward steps are {steps} kernels, a pruned attention {cost:g}."]
    return "\n".join(parts) + "\n"


def _cells(name: str, row: Line) -> list[str]:
    speedups = ", ".join(f"{other} {x:.2f}x" for other, x in row.get("speedups", {}).items())
    rate = f"{row['tflop_per_s']:.1f}" if "tflop_per_s" in row else ""
    replay = [f"{row[key]:.1f}" if key in row else "" for key in ("replay_us", "kernels_us")]
    return [name, f"{row['ms']:.3f}", rate, speedups, *replay]


def aims(lines: Sequence[Line]) -> Iterator[list[str]]:
    """A row an aim: what, at least or at most how much, how much it is, and whether that is met."""
    for scenario, model, what, wanted in AIMS:
        value = measured(lines, scenario, model, what)
        at_most = what.startswith("replay")
        met = "" if value is None else "yes" if (value <= wanted if at_most else value >= wanted) else "no"
        limit = f"{'<=' if at_most else '>='} {wanted}"
        yield [f"{scenario}: {model}, {what}", limit, "" if value is None else f"{value:.2f}", met]


def measured(lines: Sequence[Line], scenario: str, model: str, what: str) -> float | None:
    for line in lines:
        if line["scenario"] == scenario and model in line.get("models", ()):
            row = line["models"][model]
            if what.startswith("replay"):
                return row["replay_us"] / row["kernels_us"] if row.get("kernels_us") else None
            return row.get(what, row["speedups"].get(what))
    return None
