"""Tables and plots of a sweep's lines: scores, paired differences to dense, speed, which layers survive."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fastgate.errors import DataError, format_error
from fastgate.pruning.gate_search import SEPARATED
from fastgate.report.speedups import BFLOAT16, FLOAT32, Speeds, mean_speed, measured, pooling_of, read_speeds
from fastgate.training.sweep_config import read_sweep_config
from fastgate.training.sweep_results import Line, read_lines

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
ALIKE = ("method", "replacement", "removed", "pooling")  # what a table's row says of its settings anyway


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seeds alone.

    gap: mean of score - dense score of the same seed; interval: half the width of its 95% confidence interval
    by Student's t, None for one seed. spread: standard deviation of the scores, None for one seed. speedups:
    mean times as fast as SDPA in float32, a processor each, None where a run's was not measured.
    """

    task: str
    metric: str
    method: str
    replacement: str
    removed: float
    seeds: int
    score: float
    spread: float | None
    dense: float
    gap: float
    interval: float | None
    kept: tuple[tuple[int, ...], ...]
    choices: tuple[str, ...]
    speedups: tuple[float | None, ...]
    pooling: str
    settings: Line

    @property
    def share(self) -> float:
        """Of the dense score."""
        return self.score / self.dense if self.dense else math.nan


def rows(lines: Sequence[Line], speeds: Speeds | None = None) -> list[Row]:
    """A row for each setting, by task, by share removed, by score."""
    together: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        key = {name: value for name, value in line["settings"].items() if name != "seed"}
        together[json.dumps(key, sort_keys=True)].append(line)
    found = []
    for group in together.values():
        first = group[0]
        scores, gaps = [r["score"] for r in group], [r["score"] - r["dense_score"] for r in group]
        removed = statistics.mean(1 - len(r["kept"]) / r["layers"] for r in group)
        found.append(
            Row(
                first["task"],
                first["metric"],
                first["method"],
                first["replacement"],
                removed,
                len(group),
                statistics.mean(scores),
                statistics.stdev(scores) if len(group) > 1 else None,
                statistics.mean(r["dense_score"] for r in group),
                statistics.mean(gaps),
                interval(gaps),
                tuple(tuple(r["kept"]) for r in group),
                tuple(" ".join(map(str, r["kept"])) + star(r) for r in group),
                tuple(mean_speed(group, known) for known in (speeds or {}).values()),
                pooling_of(first),
                first["settings"],
            )
        )
    return sorted(found, key=lambda r: (r.task, r.removed, -r.score))


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95% confidence interval of the mean, by Student's t; None for one value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def learned_against(lines: Sequence[Line], rival: str) -> tuple[float, float | None, int]:
    """(mean, half interval, pairs) of learned - rival over pairs of one task, seed, number of layers kept and
    all settings else, but for the share to remove; in shares of the dense score, so that tasks of different
    metrics weigh alike. Runs held to a speed or a score have no pair: no rival was held to either."""
    by_pair: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        alike = {k: v for k, v in line["settings"].items() if k not in ("method", "keep", "sparsity")}
        pair = (len(line["kept"]), json.dumps(alike, sort_keys=True))
        by_pair[pair][line["method"]].append(line["score"] / line["dense_score"])
    gaps = [
        statistics.mean(m["learned"]) - statistics.mean(m[rival])
        for m in by_pair.values()
        if "learned" in m and rival in m
    ]
    return (statistics.mean(gaps) if gaps else math.nan), interval(gaps), len(gaps)


def told_apart(row: Row, found: Sequence[Row]) -> str:
    """The settings that tell a row from those of its task, method, replacement and share: `, labels 1`."""
    like = [r for r in found if all(getattr(r, name) == getattr(row, name) for name in ALIKE)]
    names = dict.fromkeys(name for r in like for name in r.settings if name not in ("seed", "pooling"))
    differ = [name for name in names if len({json.dumps(r.settings.get(name)) for r in like}) > 1]
    given = [(name, row.settings.get(name)) for name in differ]
    return "".join(f", {name} {value}" for name, value in given if value is not None)


def times(speedup: float | None) -> str:
    """A cell: `2.7x`, or nothing where it was not measured."""
    return "" if speedup is None else f"{speedup:.1f}x"


def star(line: Line) -> str:
    """A star where the search did not tell the layers kept from the next best choice."""
    margin = margin_of(line)
    return "*" if margin is not None and margin < SEPARATED else ""


def margin_of(line: Line) -> float | None:
    """How far the search told the layers kept from the next best choice, in P(open).

    Lines of earlier versions do not say. Where a share was the target, it is taken from the last gates that
    they recorded before the gates were fixed, some steps earlier. None where it is not known.
    """
    if line.get("margin") is not None or line["method"] != "learned":
        return line.get("margin")
    kept, soft = set(line["kept"]), [g["open"] for g in line["gates"] if not set(g["open"]) <= {0, 1}]
    if line["settings"].get("sparsity") is None or not soft or not 0 < len(kept) < line["layers"]:
        return None
    last = dict(enumerate(soft[-1]))
    return float(min(last[i] for i in kept) - max(p for i, p in last.items() if i not in kept))


def starred(lines: Sequence[Line]) -> list[str]:
    """The line under a table that says what a star stands for; without a star, no line."""
    known = [line for line in lines if margin_of(line) is not None]
    marked = [line for line in known if star(line)]
    text = (
        f"* In {len(marked)} of {len(known)} learned runs the search did not tell these layers from the next "
        "best choice: they are not a learned choice."
    )
    if any(line.get("margin") is None for line in marked):
        text += " Where a run did not record it, the last gates it recorded before it fixed them say so."
    return ["", text] if marked else []


def processors(speeds: Speeds) -> list[str]:
    """The line under a table that says which processor a number in its header stands for; none, no line."""
    named = "; ".join(f"[{i}] {name}" for i, name in enumerate(speeds, 1))
    return ["", f"Times as fast as SDPA on {named}."] if speeds else []


def tables(lines: Sequence[Line], speeds: Speeds) -> str:
    """Markdown: a table a task, and learned gates against the controls."""
    found = rows(lines, speeds)
    parts = []
    for task in dict.fromkeys(row.task for row in found):
        mine = [row for row in found if row.task == task]
        seeds = max(row.seeds for row in mine)
        parts += [f"## {task}, {mine[0].metric}, up to {seeds} seeds", ""]
        timed = "".join(f" speed-up [{i}] |" for i, _ in enumerate(speeds, 1))
        parts += ["| method | removed | kept | score | spread | of dense | gap to dense |" + timed]
        parts += ["| --- | ---: | --- | ---: | ---: | ---: | ---: |" + " ---: |" * len(speeds)]
        for row in mine:
            kept = "; ".join(row.choices) if row.removed else "all"
            gap = f"{row.gap:+.4f}" + ("" if row.interval is None else f" ± {row.interval:.4f}")
            method = f"{row.method}, {row.replacement}" if row.removed else row.method
            method += told_apart(row, mine)
            cells = [
                method if row.pooling == "first" else f"{method}, pooling {row.pooling}",
                f"{row.removed:.0%}",
                kept or "none",
                f"{row.score:.4f}",
                "" if row.spread is None else f"{row.spread:.4f}",
                f"{row.share:.1%}",
                gap,
                *map(times, row.speedups),
            ]
            parts.append(f"| {' | '.join(cells)} |")
        there = [line for line in lines if line["task"] == task]
        parts += [*processors(speeds), *starred(there), ""]
    rivals = [m for m in dict.fromkeys(line["method"] for line in lines) if m not in ("learned", "dense")]
    said = []
    for rival in rivals:
        mean, half, pairs = learned_against(lines, rival)
        if pairs:
            around = "" if half is None else f" ± {half:.1%}"
            said.append(f"- learned - {rival}: {mean:+.1%}{around} of the dense score, {pairs} pairs")
    if said:
        parts += [
            "## learned gates against the controls, same task, seed and number of layers",
            "",
            *said,
            "",
        ]
    return "\n".join(parts)


def by_task(lines: Sequence[Line], speeds: Speeds) -> str:
    """Markdown, of a recipe's lines: a row a task and share of the attention that learned gates removed.

    It says the mean over seeds of the share of the same seed's dense score, the least and the greatest, the
    number of seeds if it is not the dense model's, the choices of layers, and the mean of the speed-ups over
    SDPA in float32 and in bfloat16 on each processor, where those of all choices are known.
    """
    timed = [
        (f"{dtype} [{i}]", known, dtype)
        for i, known in enumerate(speeds.values(), 1)
        for dtype in (FLOAT32, BFLOAT16)
    ]
    parts = ["| task | metric | dense | removed | of dense | kept |" + "".join(f" {t[0]} |" for t in timed)]
    parts += ["| --- | --- | ---: | ---: | --- | --- |" + " ---: |" * len(timed)]
    for task in dict.fromkeys(line["task"] for line in lines):
        there = [line for line in lines if line["task"] == task]
        dense = [line["score"] for line in there if line["method"] == "dense"]
        cuts: dict[float, list[Line]] = defaultdict(list)
        for line in there:
            if line["method"] == "learned":
                cuts[1 - len(line["kept"]) / line["layers"]].append(line)
        for removed, cut in sorted(cuts.items() if dense else ()):
            shares = [line["score"] / line["dense_score"] for line in cut]
            around = f" ({min(shares):.1%} to {max(shares):.1%})" if shares[1:] else ""
            some = f", {len(cut)} of {len(dense)} seeds" if len(cut) != len(dense) else ""
            cells = [
                task,
                there[0]["metric"],
                f"{statistics.mean(dense):.4f}" + (f" ± {statistics.stdev(dense):.4f}" if dense[1:] else ""),
                f"{removed:.0%}",
                f"{statistics.mean(shares):.1%}{around}{some}",
                " ".join(dict.fromkeys(f"{{{','.join(map(str, one['kept']))}}}{star(one)}" for one in cut)),
                *(times(mean_speed(cut, known, dtype)) for _, known, dtype in timed),
            ]
            parts.append(f"| {' | '.join(cells)} |")
    return "\n".join([*parts, *processors(speeds), *starred(lines)]) + "\n"


def plots(lines: Sequence[Line], speeds: Speeds, folder: Path) -> list[Path]:
    """score.svg, speed.svg (on the first processor that speeds are known of), survivors.svg and gates.svg in
    `folder`."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    found, written = rows(lines, speeds), []
    tasks = list(dict.fromkeys(row.task for row in found))
    methods = list(dict.fromkeys(row.method for row in found if row.removed))

    def figure(count: int) -> tuple[Any, Any]:
        made = Figure(figsize=(2.6 * count, 2.8), layout="constrained")
        FigureCanvasSVG(made)
        return made, made.subplots(1, count, squeeze=False)[0]

    def save(made: Any, name: str) -> None:
        made.savefig(folder / f"{name}.svg", metadata={"Date": None})
        written.append(folder / f"{name}.svg")

    for name, across, label in (
        ("score", lambda row: 100 * row.removed, "% of the attention removed"),
        ("speed", lambda row: next(iter(row.speedups), None), "times as fast as SDPA"),
    ):
        if all(across(row) is None for row in found):
            continue
        made, axes = figure(len(tasks))
        if name == "speed":
            made.suptitle(next(iter(speeds)), fontsize=7)
        for axis, task in zip(axes, tasks, strict=True):
            for method, colour in zip(methods, COLOURS * 3, strict=False):
                points = [r for r in found if r.task == task and r.method == method and across(r) is not None]
                points.sort(key=lambda row: across(row) or 0.0)
                if points:
                    axis.errorbar(
                        [across(r) for r in points], [r.score for r in points],
                        [r.spread or 0.0 for r in points], fmt="o-", ms=3, lw=1, color=colour, label=method,
                    )  # fmt: skip
            dense = [r.dense for r in found if r.task == task]
            axis.axhline(statistics.mean(dense), color="#999999", lw=0.8, ls=":")
            axis.set_title(task, fontsize=8)
            axis.set_xlabel(label, fontsize=7)
            axis.tick_params(labelsize=7)
        axes[0].set_ylabel("score (dotted: dense)", fontsize=7)
        axes[-1].legend(fontsize=6)
        save(made, name)
    learned = [line for line in lines if line["method"] == "learned"]
    if learned:
        made, axes = figure(len(tasks))
        for axis, task in zip(axes, tasks, strict=True):
            mine = [line for line in learned if line["task"] == task]
            counts = sorted({len(line["kept"]) for line in mine})
            layers = mine[0]["layers"] if mine else 1
            shares = [
                [
                    statistics.mean(layer in line["kept"] for line in mine if len(line["kept"]) == count)
                    for layer in range(layers)
                ]
                for count in counts
            ]
            if shares:
                axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
            axis.set_yticks(range(len(counts)), [f"{count} kept" for count in counts], fontsize=7)
            axis.set_xticks(range(layers))
            axis.tick_params(labelsize=7)
            axis.set_title(task, fontsize=8)
            axis.set_xlabel("layer", fontsize=7)
        save(made, "survivors")
        made, axes = figure(len(tasks))
        for axis, task in zip(axes, tasks, strict=True):
            mine = [line for line in learned if line["task"] == task and line["gates"]]
            if mine:
                run = max(mine, key=lambda line: line["layers"] - len(line["kept"]))
                steps = [entry["step"] for entry in run["gates"]]
                for layer in range(run["layers"]):
                    style = "-" if layer in run["kept"] else "--"
                    course = [entry["open"][layer] for entry in run["gates"]]
                    axis.plot(steps, course, style, lw=1, label=str(layer))
                axis.set_title(f"{task}, {len(run['kept'])} kept, seed {run['seed']}", fontsize=7)
            axis.set_xlabel("optimizer step", fontsize=7)
            axis.tick_params(labelsize=7)
        axes[0].set_ylabel("P(gate open)", fontsize=7)
        axes[-1].legend(fontsize=6, title="layer", title_fontsize=6)
        save(made, "gates")
    return written


def write(
    lines_path: Path,
    out: Path,
    data_dir: Path | None,
    measure: bool,
    console: Console,
    recipe: Path | None = None,
    dtype: str = FLOAT32,
) -> None:
    """tables.md and the plots of a sweep's lines; with `measure`, speeds.json beside the lines first, in
    `dtype`. recipe: only its lines, and one table of them in place of the others."""
    lines = read_lines(lines_path)
    if recipe is not None:
        wanted = [settings.identity for settings in read_sweep_config(recipe)]
        lines = [line for line in lines if line["settings"] in wanted]
    if not lines:
        got, remedy = f"{lines_path} without a line", "run `fastgate sweep` first, or mend the path"
        raise DataError(format_error("report", "lines", got, "results of a sweep", remedy))
    path = lines_path.with_name("speeds.json")
    speeds = measured(lines, path, data_dir, console, dtype) if measure else read_speeds(path)
    out.mkdir(parents=True, exist_ok=True)
    text = tables(lines, speeds) if recipe is None else by_task(lines, speeds)
    (out / "tables.md").write_text(text, encoding="utf-8")
    plots(lines, speeds, out)
