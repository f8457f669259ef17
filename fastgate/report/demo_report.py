"""The end of a demo: one table of its models, report.md, and a picture of the gates over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
from rich.table import Table

from fastgate.report.markdown import markdown_table


@dataclass(frozen=True)
class ModelResult:
    """A model of the demo: one line of the table.

    score: the task's main metric. kept, layers: attention sublayers that run, of all. parameters: their
    number. checkpoint_bytes: size of the weights on disk. latency_ms: median milliseconds of one row by
    itself. rows_per_s, tokens_per_s: over the same batches for every model.
    """

    name: str
    score: float
    kept: int
    layers: int
    parameters: int
    checkpoint_bytes: int
    latency_ms: float
    rows_per_s: float
    tokens_per_s: float


def _cells(results: Sequence[ModelResult], metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text; the first model is what the others are compared with."""
    header = ["", metric, "kept", "params", "on disk", "one row", "", "rows/s", ""]
    base = results[0]
    rows = [
        [
            c.name,
            f"{c.score:.4f}",
            f"{c.kept} of {c.layers}",
            f"{c.parameters / 1e6:.1f}M",
            f"{c.checkpoint_bytes / 1e6:.1f}MB",
            f"{c.latency_ms:.1f}ms",
            f"{base.latency_ms / c.latency_ms:.1f}x",
            f"{c.rows_per_s:,.0f}",
            f"{c.rows_per_s / base.rows_per_s:.1f}x",
        ]
        for c in results
    ]
    return header, rows


def table(results: Sequence[ModelResult], metric: str, title: str) -> Table:
    """The table for the screen."""
    header, rows = _cells(results, metric)
    screen_table = Table(title=title, box=rich.box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for i, name in enumerate(header):
        screen_table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        screen_table.add_row(*row)
    return screen_table


def as_markdown(results: Sequence[ModelResult], metric: str) -> str:
    """The same table in Markdown."""
    return markdown_table(*_cells(results, metric))


def standard_error(metric: str, score: float, rows: int) -> float | None:
    """Of a share of `rows` independent rows (accuracy); None for other metrics."""
    return math.sqrt(score * (1 - score) / rows) if metric == "accuracy" and rows else None


def write_demo_report(
    path: Path, title: str, results: Sequence[ModelResult], result: Mapping[str, Any], notes: Sequence[str]
) -> None:
    """Write report.md: the table, what was kept, the settings and the environment. `result` is finetune's."""
    metric, rows = result["metric"], result["rows"]["evaluation"]
    error = standard_error(metric, result["dense"]["score"], rows)
    spread = "" if error is None else f"; one standard error of the dense score is {error:.4f}"
    lines = [f"# {title}", "", as_markdown(results, metric), ""]
    lines += ["kept: attention sublayers that run. one row: median latency of a batch of one.", ""]
    lines += [
        f"Scores on {rows} rows that were not trained on{spread}. Speed is against {results[0].name}.",
        "",
    ]
    lines += [f"Attention kept in layers {result['pruned']['kept']}. {how_chosen(result['pruned'])}", ""]
    lines += ["![gates](gates.png)", ""]
    lines += [f"- {note}" for note in notes]
    lines += [f"- {key}: {value}" for key, value in result["settings"].items() if value not in (None, {})]
    lines += [f"- {key}: {value}" for key, value in result["environment"].items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def how_chosen(pruned: Mapping[str, Any]) -> str:
    """A sentence on whether the search has told the layers kept from the next best choice. pruned: that part
    of finetune's result."""
    margin = pruned.get("margin")
    if margin is None:
        return "There was no other choice to tell these layers from."
    if pruned["separated"]:
        return f"The search has told them from the next best choice, by {margin:.2f} in P(open)."
    return (
        f"The search has NOT told them from the next best choice, which is within {margin:.3f} in P(open): "
        "do not read them as learned. Search for more steps, or with another gate_lr."
    )


def gate_picture(history: Sequence[Mapping[str, Any]], kept: Sequence[int], path: Path) -> None:
    """PNG of P(open) of every layer's gate over the optimizer steps, and the reduction beside its target."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = [entry["step"] for entry in history]
    layers = len(history[0]["open"])
    for layer in range(layers):
        style = "-" if layer in kept else "--"
        gate = [entry["open"][layer] for entry in history]
        above.plot(steps, gate, style, label=f"layer {layer}" + (" (kept)" if layer in kept else ""))
    above.set_ylabel("probability that the gate is open")
    above.set_ylim(-0.03, 1.03)
    above.legend(fontsize="small", ncols=max(1, layers // 6))
    below.plot(steps, [entry["reduction"] for entry in history], label="expected")
    below.plot(steps, [entry["target"] for entry in history], ":", label="target")
    below.set_ylabel("reduction")
    below.set_xlabel("optimizer step")
    below.legend(fontsize="small")
    figure.savefig(path, dpi=120)
