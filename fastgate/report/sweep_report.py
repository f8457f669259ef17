"""The report of a sweep: scores, paired differences to dense, speed-ups, which layers are kept, plots."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fastgate.errors import DataError, format_error
from fastgate.pruning.gate_search import SEPARATED
from fastgate.report.sections import Section
from fastgate.report.speedups import (
    BFLOAT16,
    FLOAT32,
    Speedups,
    mean_speedup,
    measure_speedups,
    pooling_of,
    read_speedups,
)
from fastgate.report.sweep_plots import Plot, write_plots
from fastgate.training.sweep_config import read_sweep_config
from fastgate.training.sweep_results import Line, read_lines

ROW_NAME_FIELDS = (
    "method",
    "replacement",
    "removed",
    "pooling",
)  # what a table's row says of its settings anyway


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in their seeds alone.

    gap: mean of score - dense score of the same seed; interval: half the width of its 95% confidence interval
    by Student's t, None for one seed. spread: standard deviation of the scores, None for one seed. speedups:
    mean speed-up over SDPA in float32 on each processor, None where a run's was not measured.
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


def group_runs(lines: Sequence[Line], speedups: Speedups | None = None) -> list[RunGroup]:
    """A row for each setting, by task, by share removed, by score."""
    together: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        key = {name: value for name, value in line["settings"].items() if name != "seed"}
        together[json.dumps(key, sort_keys=True)].append(line)
    groups = []
    for group in together.values():
        first = group[0]
        scores, gaps = [r["score"] for r in group], [r["score"] - r["dense_score"] for r in group]
        removed = statistics.mean(1 - len(r["kept"]) / r["layers"] for r in group)
        groups.append(
            RunGroup(
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
                tuple(",".join(map(str, r["kept"])) + doubt_mark(r) for r in group),
                tuple(mean_speedup(group, known) for known in (speedups or {}).values()),
                pooling_of(first),
                first["settings"],
            )
        )
    return sorted(groups, key=lambda r: (r.task, r.removed, -r.score))


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95% confidence interval of the mean, by Student's t; None for one value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def learned_against(lines: Sequence[Line], control: str) -> tuple[float, float | None, int]:
    """(mean, half interval, pairs) of learned - control, in shares of the dense score.

    A pair has the same task, seed, number of layers kept and other settings, but for the share to remove. The
    shares let tasks of different metrics weigh alike. Runs with a speed or a score as target have no pair,
    because no control has such a target.
    """
    by_pair: dict[tuple[int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        alike = {k: v for k, v in line["settings"].items() if k not in ("method", "keep", "sparsity")}
        pair = (len(line["kept"]), json.dumps(alike, sort_keys=True))
        by_pair[pair][line["method"]].append(line["score"] / line["dense_score"])
    gaps = [
        statistics.mean(m["learned"]) - statistics.mean(m[control])
        for m in by_pair.values()
        if "learned" in m and control in m
    ]
    return (statistics.mean(gaps) if gaps else math.nan), interval(gaps), len(gaps)


def distinguishing_settings(row: RunGroup, others: Sequence[RunGroup]) -> str:
    """The settings that tell a row from those of its task, method, replacement and share: `, labels 1`."""
    like = [r for r in others if all(getattr(r, name) == getattr(row, name) for name in ROW_NAME_FIELDS)]
    names = dict.fromkeys(name for r in like for name in r.settings if name not in ("seed", "pooling"))
    differ = [name for name in names if len({json.dumps(r.settings.get(name)) for r in like}) > 1]
    values = [(name, row.settings.get(name)) for name in differ]
    return "".join(f", {name} {value}" for name, value in values if value is not None)


def format_speedup(speedup: float | None) -> str:
    """A cell: `2.7x`, or nothing where it was not measured."""
    return "" if speedup is None else f"{speedup:.1f}x"


def doubt_mark(line: Line) -> str:
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


def doubt_note(lines: Sequence[Line]) -> list[str]:
    """The sentence below a table that says what a star stands for; none without a star."""
    known = [line for line in lines if margin_of(line) is not None]
    marked = [line for line in known if doubt_mark(line)]
    text = (
        f"A star: in {len(marked)} of {len(known)} learned runs the search did not tell these layers from "
        "the next best choice: they are not a learned choice."
    )
    if any(line.get("margin") is None for line in marked):
        text += " Where a run did not record it, the last gates it recorded before it fixed them say so."
    return [text] if marked else []


def processor_legend(speedups: Speedups) -> list[str]:
    """The sentence below a table that says which processor a number in its header stands for."""
    named = "; ".join(f"[{i}] {name}" for i, name in enumerate(speedups, 1))
    return [f"Speed-ups over SDPA on {named}."] if speedups else []


def above_dense(shares: Sequence[float]) -> list[str]:
    """The sentence below a table with a share of the dense score above 100%."""
    text = "A share above 100% means that the pruned models scored higher than the dense ones they began as."
    return [text] if any(share > 1 for share in shares) else []


def task_sections(lines: Sequence[Line], speedups: Speedups) -> list[Section]:
    """A section with a table for each task, and one of learned gates against the controls."""
    groups = group_runs(lines, speedups)
    sections = []
    for task in dict.fromkeys(group.task for group in groups):
        of_task = [group for group in groups if group.task == task]
        seeds = max(group.seeds for group in of_task)
        notes = [
            "score: mean ± standard deviation over the seeds. gap to dense: mean difference to the dense "
            "model of the same seed ± half its 95% confidence interval.",
            *above_dense([group.share for group in of_task]),
            *processor_legend(speedups),
            *doubt_note([line for line in lines if line["task"] == task]),
        ]
        header = ["method", "removed", "kept", "score", "of dense", "gap to dense"]
        header += [f"[{i}]" for i, _ in enumerate(speedups, 1)]
        cells = [_cells(group, of_task) for group in of_task]
        title = f"{task}, {of_task[0].metric}, up to {seeds} seeds"
        sections.append(Section(title, header, cells, (0, 2), notes))
    differences = _differences_to_controls(lines)
    if differences:
        title = "learned gates against the controls, same task, seed and number of layers"
        sections.append(Section(title, notes=differences))
    return sections


def _cells(group: RunGroup, of_task: Sequence[RunGroup]) -> list[str]:
    """A row of a task's table."""
    method = f"{group.method}, {group.replacement}" if group.removed else group.method
    method += distinguishing_settings(group, of_task)
    kept = "; ".join(group.choices) if group.removed else "all"
    return [
        method if group.pooling == "first" else f"{method}, pooling {group.pooling}",
        f"{group.removed:.0%}",
        kept or "none",
        f"{group.score:.4f}" + ("" if group.spread is None else f" ± {group.spread:.4f}"),
        f"{group.share:.1%}",
        f"{group.gap:+.4f}" + ("" if group.interval is None else f" ± {group.interval:.4f}"),
        *map(format_speedup, group.speedups),
    ]


def _differences_to_controls(lines: Sequence[Line]) -> list[str]:
    """A list item for each control that has pairs with learned gates."""
    controls = [m for m in dict.fromkeys(line["method"] for line in lines) if m not in ("learned", "dense")]
    items = []
    for control in controls:
        mean, half, pairs = learned_against(lines, control)
        if pairs:
            around = "" if half is None else f" ± {half:.1%}"
            items.append(f"- learned - {control}: {mean:+.1%}{around} of the dense score, {pairs} pairs")
    return items


def recipe_sections(lines: Sequence[Line], speedups: Speedups) -> list[Section]:
    """A table of the scores of a recipe's lines and one of their speed-ups.

    Each has a row for every task and share of the attention that learned gates removed. The scores are means
    over the seeds, in shares of the same seed's dense score. The speed-ups are means over the seeds, where
    those of all choices of layers are known.
    """
    precisions = [
        (f"{dtype} [{i}]", known, dtype)
        for i, known in enumerate(speedups.values(), 1)
        for dtype in (FLOAT32, BFLOAT16)
    ]
    scores, speeds, shares = [], [], []
    for task in dict.fromkeys(line["task"] for line in lines):
        of_task = [line for line in lines if line["task"] == task]
        dense = [line["score"] for line in of_task if line["method"] == "dense"]
        cuts: dict[float, list[Line]] = defaultdict(list)
        for line in of_task:
            if line["method"] == "learned":
                cuts[1 - len(line["kept"]) / line["layers"]].append(line)
        for removed, cut in sorted(cuts.items() if dense else ()):
            scores.append(_recipe_cells(dense, removed, cut))
            timed = [format_speedup(mean_speedup(cut, known, dtype)) for _, known, dtype in precisions]
            speeds.append([task, f"{removed:.0%}", *timed])
            shares += [line["score"] / line["dense_score"] for line in cut]
    header = ["task", "metric", "dense", "removed", "of dense", "kept"]
    notes = [
        "of dense: share of the dense score of the same seed, mean and range over the seeds. kept: layers "
        "whose attention was kept, each choice once.",
        *above_dense(shares),
        *doubt_note(lines),
    ]
    sections = [Section("Scores", header, scores, (0, 1, 4, 5), notes)]
    if speedups:
        header = ["task", "removed", *(name for name, _, _ in precisions)]
        sections.append(Section("Speed-ups", header, speeds, (0,), processor_legend(speedups)))
    return sections


def _recipe_cells(dense: Sequence[float], removed: float, cut: Sequence[Line]) -> list[str]:
    """A row of a recipe's scores, of the runs with one share removed."""
    shares = [line["score"] / line["dense_score"] for line in cut]
    around = f" ({min(shares):.1%} to {max(shares):.1%})" if shares[1:] else ""
    some = f", {len(cut)} of {len(dense)} seeds" if len(cut) != len(dense) else ""
    choices = dict.fromkeys(f"{{{','.join(map(str, line['kept']))}}}{doubt_mark(line)}" for line in cut)
    return [
        cut[0]["task"],
        cut[0]["metric"],
        f"{statistics.mean(dense):.4f}" + (f" ± {statistics.stdev(dense):.4f}" if dense[1:] else ""),
        f"{removed:.0%}",
        f"{statistics.mean(shares):.1%}{around}{some}",
        " ".join(choices),
    ]


def write_sweep_report(
    lines_path: Path,
    out: Path,
    data_dir: Path | None,
    measure: bool,
    console: Console,
    recipe: Path | None = None,
    dtype: str = FLOAT32,
) -> str:
    """Write report.md and the plots of a sweep's lines. Returns its tables as text for a terminal.

    measure: first time what speeds.json beside the lines does not have, in `dtype`. recipe: report only its
    lines, in one table of scores and one of speed-ups.
    """
    lines = read_lines(lines_path, "report")
    if recipe is not None:
        wanted = [settings.identity for settings in read_sweep_config(recipe)]
        lines = [line for line in lines if line["settings"] in wanted]
    if not lines:
        got, remedy = f"{lines_path} without a line", "run `fastgate sweep` first, or mend the path"
        raise DataError(format_error("report", "LINES", got, "results of a sweep", remedy))
    path = lines_path.with_name("speeds.json")
    speedups = measure_speedups(lines, path, data_dir, console, dtype) if measure else read_speedups(path)
    out.mkdir(parents=True, exist_ok=True)
    sections = (task_sections if recipe is None else recipe_sections)(lines, speedups)
    plots = write_plots(lines, group_runs(lines, speedups), speedups, out)
    parts = [f"# Report of {lines_path.name}\n", *(section.markdown() for section in sections)]
    (out / "report.md").write_text("\n".join([*parts, *map(_plot_markdown, plots)]), encoding="utf-8")
    return "\n".join(section.text() for section in sections)


def _plot_markdown(plot: Plot) -> str:
    """The part of report.md that shows a plot."""
    name = plot.name
    return f"## {plot.title}\n\n![{plot.title}]({name}.png)\n\n{plot.caption} [As SVG]({name}.svg).\n"
