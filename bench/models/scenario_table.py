"""The results of bench/models/scenarios.py as Markdown.

python bench/models/scenario_table.py [FILE]          all tables python bench/models/scenario_table.py [FILE]
--worst  what is behind a peer or below 85% of the floor, a line each
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "scenarios_cpu.jsonl"
FLOOR_AIM = 0.85
ORDERS = {"data": "data order", "length": "sorted"}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def best_peer(run: dict[str, Any], variant: dict[str, Any]) -> str:
    """The peer that `variant` is ahead of by the least."""
    return min(run["peers"], key=lambda name: variant["ratio"][name])


def render(rows: Iterable[list[str]], right_from: int) -> str:
    head, *rest = rows
    rule = ["---"] * right_from + ["---:"] * (len(head) - right_from)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rest])


def unpruned(runs: list[dict[str, Any]]) -> str:
    """A row a run: the median batch of fastgate with all attention, and how much longer each peer takes."""
    names = list(dict.fromkeys(name for run in runs for name in run["peers"]))
    rows = [["task, order, batch", "filled", "fastgate", "share of the floor", *names]]
    for run in runs:
        ours = run["fastgate"][0]
        ratios = [f"{ours['ratio'][name]:.2f}x" if name in run["peers"] else "" for name in names]
        time = milliseconds(ours["median_ms"])
        rows.append([scenario(run), f"{run['filled']:.0%}", time, f"{ours['floor_share']:.0%}", *ratios])
    return render(rows, 1)


def pruned(runs: list[dict[str, Any]], against: str) -> str:
    """A row a run, a column a choice of layers: how many times as fast as a peer, and the share of the floor.

    against: a peer, or `best` for the fastest of each run.
    """
    widest = max(runs, key=lambda run: len(run["fastgate"]))
    variants = {v["name"]: v["kept"] for v in widest["fastgate"]}
    rows = [["task, order, batch", *(f"{name}: {spans(kept)}" for name, kept in variants.items())]]
    for run in runs:
        by_name = {variant["name"]: variant for variant in run["fastgate"]}
        cells = []
        for name in variants:
            if name not in by_name:
                cells.append("")
                continue
            ours = by_name[name]
            peer = best_peer(run, ours) if against == "best" else against
            cells.append(f"{ours['ratio'][peer]:.2f}x, {ours['floor_share']:.0%}")
        rows.append([scenario(run), *cells])
    return render(rows, 1)


def tables(runs: list[dict[str, Any]]) -> str:
    """For each size, precision and processor: who ran, unpruned against each peer, the choices of layers."""
    found = []
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in runs:
        settings = run["settings"]
        key = (settings["model"], settings["dtype"], settings["environment"]["processor"])
        groups.setdefault(key, []).append(run)
    for (model, dtype, _), chosen in groups.items():
        settings = chosen[0]["settings"]
        where = settings["environment"]
        found.append(f"## {model}, {dtype}\n")
        found.append(f"{settings['threads']} threads, {where['processor']}, torch {where['torch']}.\n")
        forms = {name: peer["form"] for run in chosen for name, peer in run["peers"].items()}
        absent = {name: why for run in chosen for name, why in run["absent"].items()}
        found += [f"- {name}: {form}" for name, form in forms.items()]
        found += [f"- {name} was not timed: {why}" for name, why in absent.items()]
        found.append("\nAll attention kept; how many times longer each peer takes:\n")
        found.append(unpruned(chosen))
        for against, title in (("sdpa", "SDPA"), ("best", "the fastest peer of each run")):
            found.append(
                f"\nPruned; how many times as fast as {title}, unpruned, and the share of the floor:\n"
            )
            found.append(pruned(chosen, against))
        found.append("")
    return "\n".join(found)


def worst(runs: list[dict[str, Any]]) -> list[str]:
    """What misses an aim: behind a peer, or below FLOOR_AIM of the floor."""
    found = []
    for run in runs:
        for ours in run["fastgate"]:
            name = f"{run['settings']['model']} {run['settings']['dtype']} {scenario(run)}: {ours['name']}"
            for peer in run["peers"]:
                if ours["ratio"][peer] < 1:
                    found.append(f"{name}: {ours['ratio'][peer]:.2f}x {peer}")
            if ours["floor_share"] < FLOOR_AIM:
                found.append(f"{name}: {ours['floor_share']:.0%} of the floor")
    return found


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("--")]
    lines = read(paths[0] if paths else RESULTS)
    print("\n".join(worst(lines)) if "--worst" in sys.argv else tables(lines))
