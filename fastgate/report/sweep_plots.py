"""Plots of a sweep's lines: scores against size and speed, which layers are kept, how the gates closed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastgate.report.speedups import Speedups
from fastgate.training.sweep_results import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")


class Group(Protocol):
    """What the plots read of a sweep_report.RunGroup."""

    task: str
    method: str
    removed: float
    score: float
    spread: float | None
    dense: float
    speedups: tuple[float | None, ...]


def write_plots(lines: Sequence[Line], groups: Sequence[Any], speedups: Speedups, folder: Path) -> list[Path]:
    """Writes score.svg, speed.svg (of the first processor with speed-ups), survivors.svg and gates.svg.

    groups: of the lines, by sweep_report.group_runs. Returns the paths of the files.
    """
    tasks = list(dict.fromkeys(group.task for group in groups))
    figures = {
        "score": _scores(groups, tasks, lambda group: 100 * group.removed, "% of the attention removed")
    }
    if any(first_speedup(group) is not None for group in groups):
        figures["speed"] = _scores(groups, tasks, first_speedup, "speed-up over SDPA")
        figures["speed"].suptitle(next(iter(speedups)), fontsize=7)
    learned = [line for line in lines if line["method"] == "learned"]
    if learned:
        figures["survivors"] = _survivors(learned, tasks)
        figures["gates"] = _gates(learned, tasks)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def first_speedup(group: Group) -> float | None:
    return next(iter(group.speedups), None)


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    """A figure with so many axes side by side."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * count, 2.8), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _scores(
    groups: Sequence[Group], tasks: Sequence[str], x_of: Callable[[Group], float | None], label: str
) -> Figure:
    """A panel a task: the scores against what `x_of` gives, a line a method."""
    methods = dict.fromkeys(group.method for group in groups if group.removed)
    figure, axes = _panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        of_task = [group for group in groups if group.task == task]
        for method, colour in zip(methods, COLOURS * 3, strict=False):
            points = [
                (x, group.score, group.spread or 0.0)
                for group in of_task
                if group.method == method and (x := x_of(group)) is not None
            ]
            if points:
                xs, scores, spreads = zip(*sorted(points, key=lambda point: point[0]), strict=True)
                axis.errorbar(xs, scores, spreads, fmt="o-", ms=3, lw=1, color=colour, label=method)
        axis.axhline(statistics.mean(group.dense for group in of_task), color="#999999", lw=0.8, ls=":")
        _finish(axis, task, label)
    axes[0].set_ylabel("score (dotted: dense)", fontsize=7)
    axes[-1].legend(fontsize=6)
    return figure


def _survivors(learned: Sequence[Line], tasks: Sequence[str]) -> Figure:
    """A panel a task: how often each layer is kept, a row for each number of layers kept."""
    figure, axes = _panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        of_task = [line for line in learned if line["task"] == task]
        counts = sorted({len(line["kept"]) for line in of_task})
        layers = of_task[0]["layers"] if of_task else 1
        shares = [
            [
                statistics.mean(layer in line["kept"] for line in of_task if len(line["kept"]) == count)
                for layer in range(layers)
            ]
            for count in counts
        ]
        if shares:
            axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axis.set_yticks(range(len(counts)), [f"{count} kept" for count in counts], fontsize=7)
        axis.set_xticks(range(layers))
        _finish(axis, task, "layer")
    return figure


def _gates(learned: Sequence[Line], tasks: Sequence[str]) -> Figure:
    """A panel a task: P(open) of every gate over the steps of the run that prunes most."""
    figure, axes = _panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        runs = [line for line in learned if line["task"] == task and line["gates"]]
        title = ""
        if runs:
            run = max(runs, key=lambda line: line["layers"] - len(line["kept"]))
            steps = [entry["step"] for entry in run["gates"]]
            for layer in range(run["layers"]):
                style = "-" if layer in run["kept"] else "--"
                opened = [entry["open"][layer] for entry in run["gates"]]
                axis.plot(steps, opened, style, lw=1, label=str(layer))
            title = f"{task}, {len(run['kept'])} kept, seed {run['seed']}"
        _finish(axis, title, "optimizer step")
    axes[0].set_ylabel("P(gate open)", fontsize=7)
    axes[-1].legend(fontsize=6, title="layer", title_fontsize=6)
    return figure


def _finish(axis: Axes, title: str, label: str) -> None:
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(label, fontsize=7)
    axis.tick_params(labelsize=7)
