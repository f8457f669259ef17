"""Two plots of the results of bench/models/scenarios.py, each as PNG and SVG.

    python bench/models/scenario_plots.py [FILE] [FOLDER]

writes FOLDER/speed, the speed-up over SDPA against the number of layers that keep their attention, and
FOLDER/matmul_bound, the share of the matmul lower bound against the batch size. They are of the first
precision in FILE, and matmul_bound is of the first model.
"""

from __future__ import annotations

import argparse
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import scenario_table

from fastgate.benchmark.compare import ABOVE_LOWER_BOUND
from fastgate.report.figures import COLOURS, label_edges, legend_below, panels, plot_style, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLACES = {"low": "lowest layers kept", "spread": "spread layers kept", "high": "highest layers kept"}
LOOKS = {
    "low": (COLOURS[0], "o"),
    "spread": (COLOURS[1], "s"),
    "high": (COLOURS[2], "^"),
    "all": ("#444444", "D"),
}
BASELINES = {"compile": COLOURS[3], "onnxruntime": COLOURS[4], "openvino": COLOURS[5]}
TITLES = {"sst2": "SST-2", "imdb": "IMDB", "wnut17": "WNUT-17"}


def pick(runs: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [run for run in runs if all(run["settings"][key] == value for key, value in wanted.items())]


def processor(run: dict[str, Any]) -> str:
    return str(run["settings"]["environment"]["processor"])


def short_processor(run: dict[str, Any]) -> str:
    """The processor without the words that every one has."""
    name = processor(run)
    for word in ("(R)", " Processor", ", x86_64"):
        name = name.replace(word, "")
    return name


def scenario_of(run: dict[str, Any]) -> tuple[Any, ...]:
    """What tells runs apart but for the machine; of several the last is plotted."""
    return tuple(run["settings"][key] for key in ("model", "dtype", "task", "order", "batch_size"))


def speed(runs: list[dict[str, Any]], dtype: str) -> Figure:
    """A panel a size and task: the speed-up over SDPA against the attention kept, a line a place."""
    chosen = [run for run in pick(runs, dtype=dtype) if {v["place"] for v in run["fastgate"]} >= set(PLACES)]
    figure, axes = panels(len(chosen), height=2.7, share_y=True)
    for axis, run in zip(axes, chosen, strict=True):
        whole = run["fastgate"][0]
        for place, label in PLACES.items():
            line = sorted(
                (len(v["kept"]), v["speedup"]["sdpa"]) for v in run["fastgate"] if v["place"] == place
            )
            line.append((len(whole["kept"]), whole["speedup"]["sdpa"]))
            colour, marker = LOOKS[place]
            axis.plot(*zip(*line, strict=True), marker + "-", ms=5, lw=1.5, color=colour, label=label)
        axis.axhline(1, color="#444444", lw=1.5, ls="--", label="SDPA")
        for name, colour in BASELINES.items():
            if name in run["baselines"]:
                level = run["baselines"]["sdpa"]["total_ms"] / run["baselines"][name]["total_ms"]
                label = scenario_table.TITLES[name]
                axis.axhline(level, color=colour, lw=1.5, ls="--", label=label)
        settings = run["settings"]
        axis.set_title(
            f"{settings['model']}, {TITLES[settings['task']]}, "
            f"{scenario_table.ORDERS[settings['order']]}, batches of {settings['batch_size']}\n"
            + short_processor(run)
        )
        axis.title.set_fontsize(10)
        axis.set_yscale("log")
        ticks = [1, 2, 4, 8, 16, 32]
        axis.set_yticks(ticks, [f"{tick}x" for tick in ticks])
        axis.minorticks_off()
        kept = sorted({len(v["kept"]) for v in run["fastgate"]})
        axis.set_xticks(kept)
    label_edges(axes, "attention sublayers kept", f"speed-up over SDPA,\n{dtype}")
    legend_below(figure, axes, "solid: fastgate, pruned; dashed: baselines, unpruned")
    return figure


def lower_bound(runs: list[dict[str, Any]], model: str, dtype: str) -> Figure:
    """A panel a task: share of the matmul lower bound against the batch size, a line a choice of layers.

    A line joins runs on one processor. Markers of other processors are hollow.
    """
    chosen = pick(runs, model=model, dtype=dtype, order="data")
    names = {v["name"] for run in chosen for v in run["fastgate"]}
    spread = "75% spread" if "75% spread" in names else "67% spread"
    wanted = {"all": "all", spread: "spread", "83% low": "low"}
    labels = {
        "all": "unpruned",
        spread: f"{spread[:3]} pruned, spread kept",
        "83% low": "83% pruned, lowest kept",
    }
    main = Counter(map(processor, chosen)).most_common(1)[0][0]
    tasks = [task for task in TITLES if pick(chosen, task=task)]
    figure, axes = panels(len(tasks), height=3.1, share_y=True)
    lowest = highest = 100.0
    for axis, task in zip(axes, tasks, strict=True):
        of_task = sorted(pick(chosen, task=task), key=lambda run: run["settings"]["batch_size"])
        for name, place in wanted.items():
            colour, marker = LOOKS[place]
            for is_main in (True, False):
                points = [
                    (run["settings"]["batch_size"], 100 * v["lower_bound_share"])
                    for run in of_task
                    for v in run["fastgate"]
                    if v["name"] == name and (processor(run) == main) == is_main
                ]
                if not points:
                    continue
                lowest = min(lowest, *(share for _, share in points))
                highest = max(highest, *(share for _, share in points))
                style = {"mfc": colour if is_main else "white", "color": colour, "ms": 6, "lw": 1.5}
                label = labels[name] if is_main else None
                axis.plot(*zip(*points, strict=True), marker + ("-" if is_main else ""), label=label, **style)
                if not is_main:
                    axis.plot(
                        [], [], "o", color="#777777", mfc="white", ms=6, label="hollow: another processor"
                    )
        axis.axhline(100, color="#777777", lw=1.2, ls="--", label="matmul lower bound")
        axis.set_xscale("log", base=2)
        sizes = [run["settings"]["batch_size"] for run in of_task]
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_title(TITLES[task])
    for axis in axes:
        axis.set_ylim(50 if lowest > 60 else 0, 1.08 * highest)
    label_edges(axes, "rows in a batch", "% of the lower bound")
    note = f"{model}, {dtype}, {main}."
    if round(highest) > 100:
        note += f" {ABOVE_LOWER_BOUND}"
    figure.suptitle("\n".join(textwrap.wrap(note, 95)), fontsize=10)
    legend_below(figure, axes, columns=2)
    return figure


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "file", type=Path, nargs="?", default=scenario_table.RESULTS, help="results; default: %(default)s"
    )
    p.add_argument("folder", type=Path, nargs="?", help="where to write; by default beside FILE")
    args = p.parse_args()
    runs = list({scenario_of(run): run for run in scenario_table.read(args.file)}.values())
    model, dtype = runs[0]["settings"]["model"], runs[0]["settings"]["dtype"]
    folder = args.folder or args.file.parent
    with plot_style():
        save_figure(speed(runs, dtype), folder / "speed")
        save_figure(lower_bound(runs, model, dtype), folder / "matmul_bound")


if __name__ == "__main__":
    main()
