"""The end of a demo: one table of its models, report.md, and a plot of the gates over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgate.report.figures import COLOURS, legend_below, plot_style, save_figure
from fastgate.report.sections import Section
from fastgate.report.sweep_plots import plot_gates


@dataclass(frozen=True)
class ModelResult:
    """A model of the demo: one row of the table.

    name: as the table shows it.
    score: the task's main metric.
    kept: attention sublayers that run.
    layers: attention sublayers of the unpruned model.
    parameters: their number.
    checkpoint_bytes: size of the weights on disk.
    latency_ms: median milliseconds of one row by itself.
    rows_per_s: rows a second, over the same batches for every model.
    tokens_per_s: tokens a second, over the same batches.
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


def demo_section(results: Sequence[ModelResult], metric: str, title: str) -> Section:
    """The table of a demo. The first model is the one that the speed-ups are over."""
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
    header = ["", metric.replace("_", " "), "kept", "params", "on disk", "one row", "", "rows/s", ""]
    notes = [
        "kept: attention sublayers that run. one row: median latency of a batch of one. The columns after "
        f"one row and rows/s are speed-ups over {base.name}. Where all attention is kept, they are of the "
        "runtime alone."
    ]
    return Section(title, header, rows, (0,), notes)


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
    lines = [f"# {title}", "", demo_section(results, metric, "").markdown()]
    lines += [f"Scores on {rows} rows that were not trained on{spread}.", ""]
    lines += [f"Attention kept in layers {result['pruned']['kept']}. {how_chosen(result['pruned'])}", ""]
    lines += ["![gates](gates.png)", "", f"{GATES_CAPTION} [As SVG](gates.svg).", ""]
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


GATES_CAPTION = (
    "Above: the probability that each layer's gate is open. Solid: the layer's attention was kept. Dashed: "
    "it was removed. Below: the share of the attention that is expected to be removed, and the target."
)


def gate_picture(history: Sequence[Mapping[str, Any]], kept: Sequence[int], path: Path) -> None:
    """PNG and SVG of P(open) of every layer's gate over the optimizer steps, and the reduction beside its
    target."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with plot_style():
        figure = Figure(figsize=(9.6, 6), layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        plot_gates(above, history, kept)
        above.set_ylabel("P(gate open)")
        steps = [entry["step"] for entry in history]
        below.plot(steps, [entry["reduction"] for entry in history], color=COLOURS[-1], label="expected")
        below.plot(steps, [entry["target"] for entry in history], ":", color=COLOURS[1], label="target")
        below.set_ylabel("removed")
        below.set_xlabel("optimizer step")
        below.legend()
        legend_below(figure, [above], "layer (solid: kept, dashed: removed)", columns=12)
        save_figure(figure, path)
