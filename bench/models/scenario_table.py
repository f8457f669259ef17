"""Tables of the results of bench/models/scenarios.py.

    python bench/models/scenario_table.py [FILE] [--markdown | --worst]

prints them for a terminal of 80 columns, or as Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastgate.benchmark.compare import ABOVE_LOWER_BOUND
from fastgate.report.sections import Section

RESULTS = Path(__file__).parents[1] / "results" / "scenarios_cpu.jsonl"
LOWER_BOUND_AIM = 0.85
ORDERS = {"data": "data order", "length": "sorted"}
TITLES = {
    "sdpa": "SDPA",
    "eager": "eager",
    "compile": "compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}

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


def unpruned(runs: list[dict[str, Any]]) -> Section:
    """A row a run: the median batch of fastgate with all attention, and its speed-up over each baseline."""
    names = list(dict.fromkeys(name for run in runs for name in run["baselines"]))
    header = ["task, order, batch", "filled", "fastgate", *(TITLES[name] for name in names), "lower bound"]
    rows = []
    for run in runs:
        ours = run["fastgate"][0]
        speedups = [f"{ours['speedup'][name]:.2f}x" if name in run["baselines"] else "" for name in names]
        time = milliseconds(ours["median_ms"])
        share = f"{ours['lower_bound_share']:.0%}"
        rows.append([scenario(run), f"{run['filled']:.0%}", time, *speedups, share])
    notes = [
        "All rows run the unpruned model: the speed-ups over each baseline are of the runtime alone. "
        "fastgate: median of a batch. lower bound: time of the matmul lower bound as a share of fastgate's.",
        *above_lower_bound(ours["lower_bound_share"] for ours in (run["fastgate"][0] for run in runs)),
    ]
    return Section("Unpruned", header, rows, (0,), notes)


def pruned(runs: list[dict[str, Any]]) -> Section:
    """A row a run and choice of layers: speed-ups of pruning and runtime, share of the lower bound."""
    header = ["task, order, batch", "attention kept", "pruning alone", "over SDPA"]
    header += ["over the fastest baseline", "lower bound"]
    rows, shares = [], []
    for run in runs:
        whole = run["fastgate"][0]
        for ours in run["fastgate"][1:]:
            best = closest_baseline(run, ours)
            rows.append(
                [
                    scenario(run) if ours is run["fastgate"][1] else "",
                    spans(ours["kept"]),
                    f"{whole['total_ms'] / ours['total_ms']:.2f}x",
                    f"{ours['speedup']['sdpa']:.2f}x",
                    f"{ours['speedup'][best]:.2f}x {best}",
                    f"{ours['lower_bound_share']:.0%}",
                ]
            )
            shares.append(ours["lower_bound_share"])
    notes = [
        "Baselines run the unpruned model, fastgate the pruned one. pruning alone: speed-up over unpruned "
        "fastgate. The other speed-ups are of pruning and runtime together.",
        *above_lower_bound(shares),
    ]
    return Section("Pruned", header, rows, (0, 1), notes)


def above_lower_bound(shares: Iterable[float]) -> list[str]:
    """The sentences that a share above 100% needs."""
    return [ABOVE_LOWER_BOUND] if any(round(100 * share) > 100 for share in shares) else []


def sections(runs: list[dict[str, Any]]) -> list[Section]:
    """For each size, precision and processor: who ran, unpruned and pruned speed-ups."""
    parts = []
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in runs:
        settings = run["settings"]
        key = (settings["model"], settings["dtype"], settings["environment"]["processor"])
        groups.setdefault(key, []).append(run)
    for (model, dtype, processor), chosen in groups.items():
        settings = chosen[0]["settings"]
        forms = {name: baseline["form"] for run in chosen for name, baseline in run["baselines"].items()}
        absent = {name: why for run in chosen for name, why in run["absent"].items()}
        notes = [f"{settings['threads']} threads, {processor}, torch {settings['environment']['torch']}."]
        notes += [f"- {name}: {form}" for name, form in forms.items()]
        notes += [f"- {name} was not timed: {why}" for name, why in absent.items()]
        parts += [Section(f"{model}, {dtype}", notes=notes), unpruned(chosen), pruned(chosen)]
    return parts


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


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=Path, nargs="?", default=RESULTS, help="results; default: %(default)s")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print Markdown")
    aim = f"{LOWER_BOUND_AIM:.0%}".replace("%", "%%")
    form.add_argument(
        "--worst",
        action="store_true",
        help=f"list what is behind a baseline, or below {aim} of the lower bound",
    )
    args = p.parse_args()
    runs = read(args.file)
    if args.worst:
        print("\n".join(worst(runs)))
    else:
        print("\n".join(part.markdown() if args.markdown else part.text() for part in sections(runs)))


if __name__ == "__main__":
    main()
