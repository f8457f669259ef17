"""Two plots of the results of bench/models/scenarios.py.

    python bench/models/scenario_plots.py [FILE] [FOLDER]

writes FOLDER/speed.svg, the speed-up over SDPA against the number of layers that keep their attention, and
FOLDER/floor.svg, the share of the matmul lower bound against the batch size.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import scenario_table

COLOURS = {"all": "#444444", "low": "#0072b2", "spread": "#d55e00", "high": "#009e73"}
WORDS = {"low": "the lowest", "spread": "spread", "high": "the highest"}
TITLES = {"sst2": "SST-2", "imdb": "IMDB", "wnut17": "WNUT-17"}


def pick(runs: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [run for run in runs if all(run["settings"][key] == value for key, value in wanted.items())]


def title(run: dict[str, Any]) -> str:
    settings = run["settings"]
    order = scenario_table.ORDERS[settings["order"]]
    return f"{TITLES[settings['task']]}, {order}, batches of {settings['batch_size']}"


def scenario_of(run: dict[str, Any]) -> tuple[Any, ...]:
    """What tells runs apart but for the machine; of several the last is plotted."""
    return tuple(run["settings"][key] for key in ("model", "dtype", "task", "order", "batch_size"))


def speed(runs: list[dict[str, Any]], dtype: str) -> plt.Figure:
    """A panel a size and task: the speed-up over SDPA against the attention kept, a line a place."""
    panels = [run for run in pick(runs, dtype=dtype) if {v["place"] for v in run["fastgate"]} >= set(WORDS)]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.1 * len(panels), 3.3), sharey=True, layout="constrained", squeeze=False
    )
    for axis, run in zip(axes[0], panels, strict=True):
        whole = run["fastgate"][0]
        for place, word in WORDS.items():
            line = sorted(
                (len(v["kept"]), v["speedup"]["sdpa"]) for v in run["fastgate"] if v["place"] == place
            )
            line.append((len(whole["kept"]), whole["speedup"]["sdpa"]))
            axis.plot(*zip(*line, strict=True), "o-", ms=4, lw=1.3, color=COLOURS[place], label=word)
        for name, baseline in run["baselines"].items():
            if name not in ("sdpa", "eager"):
                level = run["baselines"]["sdpa"]["total_ms"] / baseline["total_ms"]
                axis.axhline(level, color="#999999", lw=0.8, ls=":")
                axis.annotate(
                    name, (1, level), xycoords=("axes fraction", "data"), fontsize=6, ha="right", va="bottom"
                )
        axis.axhline(1, color="#999999", lw=0.8)
        axis.set(
            title=f"{run['settings']['model']}, {title(run)}", xlabel="attention sublayers kept", yscale="log"
        )
        axis.title.set_fontsize(8)
        ticks = [1, 2, 4, 8, 16, 32]
        axis.set_yticks(ticks, [f"{tick}x" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.2)
    axes[0][0].set_ylabel(f"speed-up over SDPA, {dtype}", fontsize=8)
    axes[0][-1].legend(title="which are kept", fontsize=7, title_fontsize=7)
    return figure


def lower_bound(runs: list[dict[str, Any]], model: str, dtype: str) -> plt.Figure:
    """A panel a task: share of the matmul lower bound against the batch size, a line a choice of layers."""
    names = {v["name"] for run in pick(runs, model=model) for v in run["fastgate"]}
    spread = "75% spread" if "75% spread" in names else "67% spread"
    wanted = {"all": "all", spread: "spread", "83% low": "low"}
    tasks = [task for task in TITLES if pick(runs, model=model, dtype=dtype, task=task, order="data")]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(3.1 * len(tasks), 2.8), sharey=True, layout="constrained", squeeze=False
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        chosen = sorted(
            pick(runs, model=model, dtype=dtype, task=task, order="data"),
            key=lambda run: run["settings"]["batch_size"],
        )
        sizes = [run["settings"]["batch_size"] for run in chosen]
        for name, place in wanted.items():
            shares = [
                100 * v["lower_bound_share"] for run in chosen for v in run["fastgate"] if v["name"] == name
            ]
            if len(shares) == len(sizes):
                axis.plot(sizes, shares, "o-", ms=4, lw=1.3, color=COLOURS[place], label=name)
        axis.axhline(100 * scenario_table.LOWER_BOUND_AIM, color="#999999", lw=0.8, ls=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_title(TITLES[task], fontsize=8)
        axis.set_xlabel("rows in a batch", fontsize=8)
        axis.set_ylim(0, 110)
        axis.grid(alpha=0.2)
    axes[0][0].set_ylabel(f"% of the lower bound, {model}, {dtype}", fontsize=8)
    axes[0][-1].legend(title="pruned, kept", fontsize=7, title_fontsize=7)
    return figure


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else scenario_table.RESULTS
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else path.parent
    runs = list({scenario_of(run): run for run in scenario_table.read(path)}.values())
    model, dtype = runs[0]["settings"]["model"], runs[0]["settings"]["dtype"]
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "fastgate", "font.size": 8}
    for name, figure in (("speed", speed(runs, dtype)), ("floor", lower_bound(runs, model, dtype))):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
