"""The kernel timings of `pytest bench --benchmark-json=FILE`: JSON lines, a table, and against the aims.

    python bench/kernels/kernel_table.py lines FILE > bench/results/kernels_h200.jsonl
    python bench/kernels/kernel_table.py table bench/results/kernels_h200.jsonl
    python bench/kernels/kernel_table.py aims bench/results/kernels_h200.jsonl

The first line is the environment; each one after it a contender of one work.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Line = dict[str, Any]


def lines(raw: Line) -> Iterator[Line]:
    """The environment, then each contender: what, microseconds, spread, rates, share of what bounds it."""
    yield {"environment": raw["machine_info"], "commit": raw["commit_info"].get("id"), "at": raw["datetime"]}
    for found in raw["benchmarks"]:
        info = found["extra_info"]
        line = {"work": found["group"], "contender": info["contender"]}
        if "host_us" in info:
            yield {**line, "host_us": round(info["host_us"], 2)}
            continue
        stats = found["stats"]
        yield {
            **line,
            "us": round(1e6 * stats["median"], 3),
            "us_iqr": round(1e6 * stats["iqr"], 3),
            "rounds": stats["rounds"],
            "how": info["how"],
            "gb_per_s": round(info["gb_per_s"], 1),
            "tflop_per_s": round(info["tflop_per_s"], 2),
            "bytes": info["bytes"],
            "flops": info["flops"],
            "bound": info["bound"],
            "share": round(info["share"], 3),
            "ceilings_us": {name: round(value, 3) for name, value in info["ceilings_us"].items()},
        }


def read(path: Path) -> tuple[Line, dict[str, dict[str, Line]]]:
    """(environment, work -> contender -> its line)."""
    first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
    works: dict[str, dict[str, Line]] = {}
    for line in rest:
        works.setdefault(line["work"], {})[line["contender"]] = line
    return first["environment"], works


def best_rival(contenders: dict[str, Line], names: tuple[str, ...] = ()) -> tuple[str, float] | None:
    """The fastest of `names` (all but fastgate's own forms, if empty), and its microseconds."""
    own = ("fastgate", "cuda", "triton", "fused", "cublas")
    times = {
        name: line["us"] for name, line in contenders.items() if (name in names if names else name not in own)
    }
    name = min(times, key=times.__getitem__, default=None)
    return None if name is None else (name, times[name])


def table(environment: Line, works: dict[str, dict[str, Line]]) -> str:
    """One row a work: fastgate's time and rate, its share of what bounds it, and its best rival."""
    head = ["work", "µs", "GB/s", "TFLOP/s", "share", "of", "best rival", "faster than it"]
    rows = [head, ["---", *["---:"] * 4, "---", "---", "---:"]]
    for work, contenders in works.items():
        ours = contenders.get("fastgate")
        if ours is None or "us" not in ours:
            continue
        rival = best_rival(contenders)
        numbers = [f"{ours['us']:.1f}", f"{ours['gb_per_s']:.0f}", f"{ours['tflop_per_s']:.1f}"]
        against = (
            ["", ""] if rival is None else [f"{rival[0]} {rival[1]:.1f} µs", f"{rival[1] / ours['us']:.2f}x"]
        )
        rows.append([work, *numbers, f"{ours['share']:.0%}", ours["bound"], *against])
    where = f"{environment['device']}, torch {environment['torch']}:"
    return "\n".join([where, "", *(f"| {' | '.join(row)} |" for row in rows)])


class Aim(NamedTuple):
    what: str
    work: str
    value: float
    wanted: float

    @property
    def met(self) -> bool:
        return self.value >= self.wanted


def aims(works: dict[str, dict[str, Line]]) -> Iterator[Aim]:
    """What the kernels are wanted to reach on an H200, where it was measured."""
    for work, contenders in works.items():
        op, *words = work.split()
        ours = contenders.get("fastgate")
        if ours is None or "us" not in ours:
            continue
        if op == "gated_add_norm" and "bf16" in words:
            rows = int(words[1].split("x")[0])
            if rows >= 32768:
                yield Aim(
                    "share of the copy rate", work, ours["share"], 0.9 if words[0] == "forward" else 0.85
                )
            rival = best_rival(contenders, ("eager", "compile", "liger"))
            if rows == 4096 and rival:
                yield Aim(f"faster than {rival[0]}", work, rival[1] / ours["us"], 1.3)
        elif op == "attention" and words[2] == "12x64":
            rival = best_rival(contenders, ("flash", "cudnn", "flex"))
            if rival:
                yield Aim(f"faster than {rival[0]}", work, rival[1] / ours["us"], 1.0)
            if words[1] == "512":
                yield Aim("TFLOP/s", work, ours["tflop_per_s"], 340 if words[0] == "forward" else 200)
        elif op == "linear_gelu" and words[0] == "forward" and "eager" in contenders:
            yield Aim("faster than eager", work, contenders["eager"]["us"] / ours["us"], 1.15)
            yield Aim("share of the product alone", work, ours["ceilings_us"]["product"] / ours["us"], 0.9)
    host = works.get("gated_add_norm host time of a call, inference", {})
    if len(host) == 2:
        value = host["layer_norm"]["host_us"] / host["fastgate"]["host_us"]
        yield Aim("host time of layer_norm over ours", "gated_add_norm, one call", value, 0.5)


def aims_table(works: dict[str, dict[str, Line]]) -> str:
    rows = [["work", "what", "found", "wanted", ""], ["---", "---", "---:", "---:", "---"]]
    for aim in aims(works):
        rows.append(
            [aim.work, aim.what, f"{aim.value:.3g}", f"{aim.wanted:.3g}", "" if aim.met else "missed"]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(what: str, path: str) -> None:
    if what == "lines":
        print("\n".join(json.dumps(line) for line in lines(json.loads(Path(path).read_text()))))
        return
    environment, works = read(Path(path))
    print({"table": table(environment, works), "aims": aims_table(works)}[what])


if __name__ == "__main__":
    main(*sys.argv[1:])
