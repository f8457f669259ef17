"""Plots of a sweep's lines: scores against size and speed, which layers are kept, how the gates closed."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastgate.report.figures import COLOURS, label_edges, legend_below, panels, plot_style, save_figure
from fastgate.report.speedups import Speedups
from fastgate.training.sweep_results import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX"
_DODGE = 1.2  # percentage points between methods that removed the same share
_ONE_LINE = ("seed", "sparsity", "keep")  # settings that may differ between points of one line


class Group(Protocol):
    """What the plots read of a sweep_report.RunGroup."""

    task: str
    metric: str
    method: str
    removed: float
    seeds: int
    score: float
    spread: float | None
    dense: float
    speedups: tuple[float | None, ...]
    settings: Line


@dataclass(frozen=True)
class Plot:
    """A plot of the report.

    name: of its files, without .png and .svg.
    title: its heading in the report.
    caption: the sentences below it.
    """

    name: str
    title: str
    caption: str


def write_plots(lines: Sequence[Line], groups: Sequence[Any], speedups: Speedups, folder: Path) -> list[Plot]:
    """Write the plots `score`, `speed` (of the first processor with speed-ups), `survivors` and `gates`.

    groups: of the lines, by sweep_report.group_runs.
    """
    tasks = list(dict.fromkeys(group.task for group in groups))
    learned = [line for line in lines if line["method"] == "learned"]
    points = (
        "Markers are means over seeds, bars one standard deviation. Hollow markers are runs with other "
        "settings. The dotted line is the dense model."
    )
    joined = (
        "A line joins runs that differ in their target alone. Markers of one share stand side by side, so "
        "that none hides another."
    )
    plots: list[tuple[Plot, Figure]] = []
    with plot_style():
        if any(group.removed for group in groups):
            about = Plot("score", "Score against the share of the attention removed", f"{points} {joined}")
            plots.append((about, _scores(groups, tasks, removed_percent, "% of attention removed", _DODGE)))
        if any(first_speedup(group) is not None for group in groups if group.removed):
            processor = next(iter(speedups))
            about = Plot("speed", "Score against the speed-up", f"{points} Speed-ups are of {processor}.")
            plots.append((about, _scores(groups, tasks, first_speedup, "speed-up over SDPA")))
            plots[-1][1].suptitle(processor, fontsize=10)
        if learned:
            caption = "Shares are over all learned runs of a task that kept so many layers."
            about = Plot("survivors", "Layers whose attention learned gates kept", caption)
            plots.append((about, _survivors(learned, tasks)))
        if any(line["gates"] for line in learned):
            caption = (
                "The learned run that removed most, for each task. Solid: the layer's attention was kept. "
                "Dashed: it was removed."
            )
            about = Plot("gates", "Gates over the optimizer steps", caption)
            plots.append((about, _gates(learned, tasks)))
        for plot, figure in plots:
            save_figure(figure, folder / plot.name)
    return [plot for plot, _ in plots]


def removed_percent(group: Group) -> float:
    return 100 * group.removed


def first_speedup(group: Group) -> float | None:
    return next(iter(group.speedups), None)


def _scores(
    groups: Sequence[Group],
    tasks: Sequence[str],
    x_of: Callable[[Group], float | None],
    label: str,
    dodge: float = 0.0,
) -> Figure:
    """A panel a task: the scores against what `x_of` gives, a colour a method.

    dodge: between the methods along x, where they would lie on one another. With it lines join points.
    """
    methods = [m for m, _ in Counter(group.method for group in groups if group.removed).most_common()]
    figure, axes = panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        of_task = [group for group in groups if group.task == task]
        for i, method in enumerate(methods):
            of_method = [g for g in of_task if g.method == method and g.removed and x_of(g) is not None]
            look = {"color": COLOURS[i % len(COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
            _series(axis, method, of_method, x_of, (dodge * i, dodge * (i or -1)), look)
        dense = statistics.mean(group.dense for group in of_task)
        axis.axhline(dense, color="#777777", lw=1.2, ls=":", label="dense")
        axis.set_title(f"{task}, {of_task[0].metric.replace('_', ' ')}")
        if dodge:
            shares = sorted({round(100 * g.removed) for g in of_task if g.removed})
            if len(shares) <= 4:
                axis.set_xticks(shares)
            axis.margins(x=0.12)
    label_edges(axes, label, "score")
    legend_below(figure, axes)
    return figure


def _series(
    axis: Axes,
    method: str,
    groups: Sequence[Group],
    x_of: Callable[[Group], float | None],
    shifts: tuple[float, float],
    look: Mapping[str, Any],
) -> None:
    """The points of a method: those of its most frequent settings joined by a line, the others hollow.

    shifts: of the two along x. Without them no line is drawn.
    """
    runs: Counter[str] = Counter()
    for group in groups:
        runs[_settings_of_line(group)] += group.seeds
    joined = runs.most_common(1)[0][0] if runs else ""
    for is_joined, shift in zip((True, False), shifts, strict=True):
        points = sorted(
            ((x_of(g) or 0.0) + shift, g.score, g.spread or 0.0)
            for g in groups
            if (_settings_of_line(g) == joined) == is_joined
        )
        if not points:
            continue
        xs, scores, spreads = zip(*points, strict=True)
        has_line = is_joined and any(shifts) and len(set(xs)) == len(xs)
        axis.errorbar(
            xs,
            scores,
            spreads,
            ms=5,
            lw=1.2,
            ls="-" if has_line else "",
            elinewidth=1,
            mfc=look["color"] if is_joined else "white",
            label=method if is_joined else f"{method}, other settings",
            **look,
        )


def _settings_of_line(group: Group) -> str:
    """Equal for groups whose points may be joined."""
    alike = {name: value for name, value in group.settings.items() if name not in _ONE_LINE}
    return json.dumps(alike, sort_keys=True)


def _survivors(learned: Sequence[Line], tasks: Sequence[str]) -> Figure:
    """A panel a task: how often each layer is kept, a row for each number of layers kept."""
    tasks = [task for task in tasks if any(line["task"] == task for line in learned)]
    most = max(len({len(line["kept"]) for line in learned if line["task"] == task}) for task in tasks)
    figure, axes = panels(len(tasks), height=0.7 + 0.45 * most)
    for axis, task in zip(axes, tasks, strict=True):
        of_task = [line for line in learned if line["task"] == task]
        runs = Counter(len(line["kept"]) for line in of_task)
        counts, layers = sorted(runs), of_task[0]["layers"]
        shares = [
            [
                100 * statistics.mean(layer in line["kept"] for line in of_task if len(line["kept"]) == count)
                for layer in range(layers)
            ]
            for count in counts
        ]
        image = axis.imshow(shares, vmin=0, vmax=100, cmap="Blues", aspect="auto")
        axis.set_yticks(
            range(len(counts)), [f"{count} kept\n{runs[count]} runs" for count in counts], fontsize=10
        )
        axis.set_xticks(range(0, layers, 1 if layers <= 12 else 4))
        axis.grid(False)
        axis.set_title(task)
    label_edges(axes, "layer", None)
    figure.colorbar(
        image, ax=axes, location="bottom", shrink=0.6, aspect=40, label="% of the runs that kept the layer"
    )
    return figure


def _gates(learned: Sequence[Line], tasks: Sequence[str]) -> Figure:
    """A panel a task: P(open) of every gate over the steps of the run that prunes most."""
    runs = {}
    for task in tasks:
        of_task = [line for line in learned if line["task"] == task and line["gates"]]
        if of_task:
            runs[task] = max(of_task, key=lambda line: line["layers"] - len(line["kept"]))
    figure, axes = panels(len(runs), share_y=True)
    for axis, (task, run) in zip(axes, runs.items(), strict=True):
        plot_gates(axis, run["gates"], run["kept"])
        axis.set_title(f"{task}, {len(run['kept'])} kept, seed {run['seed']}")
    label_edges(axes, "optimizer step", "P(gate open)")
    legend_below(figure, axes, "layer (solid: kept, dashed: removed)", columns=12)
    return figure


def plot_gates(axis: Axes, history: Sequence[Mapping[str, Any]], kept: Sequence[int]) -> None:
    """P(open) of every layer's gate over the optimizer steps, a colour a layer, dashed where it was removed.

    history: entries with `step` and `open`.
    """
    import matplotlib

    steps, layers = [entry["step"] for entry in history], len(history[0]["open"])
    colours = matplotlib.colormaps["turbo"]
    for layer in range(layers):
        opened = [entry["open"][layer] for entry in history]
        colour = colours(0.08 + 0.84 * layer / max(layers - 1, 1))
        # A proxy without a style in the legend: whether a layer is kept differs from panel to panel.
        axis.plot(steps, opened, "-" if layer in kept else "--", lw=1.5, color=colour)
        axis.plot([], [], "-", lw=3, color=colour, label=str(layer))
    axis.set_ylim(-0.04, 1.04)
