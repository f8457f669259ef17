"""The results of bench/models/scenarios.py as Markdown.

python bench/models/scenario_table.py [FILE]          all tables
python bench/models/scenario_table.py [FILE] --worst  a line each: what is behind a baseline, or below 85%
                                                      of the matmul lower bound
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastgate.report.markdown import markdown_table

RESULTS = Path(__file__).parents[1] / "results" / "scenarios_cpu.jsonl"
LOWER_BOUND_AIM = 0.85
ORDERS = {"data": "data order", "length": "sorted"}


# Names of earlier result files, and what they are called now.
EARLIER_NAMES = {
    "peers": "baselines",
    "ratio": "speedup",
    "floor": "lower_bound",
    "floor_share": "lower_bound_share",
}


def read(path: Path) -> list[dict[str, Any]]:
    """A dictionary per line, in the names of today."""
    return [with_new_names(json.loads(line)) for line in path.read_text().splitlines()]


def with_new_names(line: dict[str, Any]) -> dict[str, Any]:
    renamed = {EARLIER_NAMES.get(name, name): value for name, value in line.items()}
    renamed["fastgate"] = [
        {EARLIER_NAMES.get(name, name): value for name, value in variant.items()}
        for variant in line["fastgate"]
    ]
    return renamed


def spans(layers: list[int]) -> str:
    """[0, 1, 2, 3, 8] -> 0-3, 8"""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


def milliseconds(value: float) -> str:
    return f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


def scenario(run: dict[str, Any]) -> str:
    settings = run["settings"]
    return f"{settings['task']}, {ORDERS[settings['order']]}, {settings['batch_size']}"


def closest_baseline(run: dict[str, Any], variant: dict[str, Any]) -> str:
    """The baseline that `variant` is ahead of by the least."""
    return min(run["baselines"], key=lambda name: variant["speedup"][name])


def unpruned(runs: list[dict[str, Any]]) -> str:
    """A row a run: the median batch of fastgate with all attention, and its speed-up over each baseline."""
    names = list(dict.fromkeys(name for run in runs for name in run["baselines"]))
    header = ["task, order, batch", "filled", "fastgate", "share of the lower bound", *names]
    rows = []
    for run in runs:
        ours = run["fastgate"][0]
        ratios = [f"{ours['speedup'][name]:.2f}x" if name in run["baselines"] else "" for name in names]
        time = milliseconds(ours["median_ms"])
        rows.append(
            [scenario(run), f"{run['filled']:.0%}", time, f"{ours['lower_bound_share']:.0%}", *ratios]
        )
    return markdown_table(header, rows)


def pruned(runs: list[dict[str, Any]], against: str) -> str:
    """A row a run, a column a choice of layers: speed-up over a baseline, share of the lower bound.

    against: a baseline, or `best` for the fastest of each run.
    """
    widest = max(runs, key=lambda run: len(run["fastgate"]))
    variants = {v["name"]: v["kept"] for v in widest["fastgate"]}
    header = ["task, order, batch", *(f"{name}: {spans(kept)}" for name, kept in variants.items())]
    rows = []
    for run in runs:
        by_name = {variant["name"]: variant for variant in run["fastgate"]}
        cells = []
        for name in variants:
            if name not in by_name:
                cells.append("")
                continue
            ours = by_name[name]
            baseline = closest_baseline(run, ours) if against == "best" else against
            cells.append(f"{ours['speedup'][baseline]:.2f}x, {ours['lower_bound_share']:.0%}")
        rows.append([scenario(run), *cells])
    return markdown_table(header, rows)


def tables(runs: list[dict[str, Any]]) -> str:
    """For each size, precision and processor: who ran, unpruned and pruned speed-ups."""
    parts = []
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in runs:
        settings = run["settings"]
        key = (settings["model"], settings["dtype"], settings["environment"]["processor"])
        groups.setdefault(key, []).append(run)
    for (model, dtype, _), chosen in groups.items():
        settings = chosen[0]["settings"]
        where = settings["environment"]
        parts.append(f"## {model}, {dtype}\n")
        parts.append(f"{settings['threads']} threads, {where['processor']}, torch {where['torch']}.\n")
        forms = {name: baseline["form"] for run in chosen for name, baseline in run["baselines"].items()}
        absent = {name: why for run in chosen for name, why in run["absent"].items()}
        parts += [f"- {name}: {form}" for name, form in forms.items()]
        parts += [f"- {name} was not timed: {why}" for name, why in absent.items()]
        parts.append("\nAll attention kept; speed-ups over each baseline:\n")
        parts.append(unpruned(chosen))
        for against, title in (("sdpa", "SDPA"), ("best", "the fastest baseline of each run")):
            parts.append(
                f"\nPruned; speed-ups over {title}, unpruned, and shares of the matmul lower bound:\n"
            )
            parts.append(pruned(chosen, against))
        parts.append("")
    return "\n".join(parts)


def worst(runs: list[dict[str, Any]]) -> list[str]:
    """What misses an aim: behind a baseline, or below LOWER_BOUND_AIM of the matmul lower bound."""
    missed = []
    for run in runs:
        for ours in run["fastgate"]:
            name = f"{run['settings']['model']} {run['settings']['dtype']} {scenario(run)}: {ours['name']}"
            for baseline in run["baselines"]:
                if ours["speedup"][baseline] < 1:
                    missed.append(f"{name}: {ours['speedup'][baseline]:.2f}x {baseline}")
            if ours["lower_bound_share"] < LOWER_BOUND_AIM:
                missed.append(f"{name}: {ours['lower_bound_share']:.0%} of the lower bound")
    return missed


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("--")]
    lines = read(paths[0] if paths else RESULTS)
    print("\n".join(worst(lines)) if "--worst" in sys.argv else tables(lines))
