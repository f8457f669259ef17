"""A table of the kernel timings that `pytest bench/kernels --lines FILE` writes, and the aims they meet.

    python bench/kernels/kernel_table.py lines JSON > FILE    (JSON: from pytest's --benchmark-json=JSON)
    python bench/kernels/kernel_table.py table bench/results/kernels_h200.jsonl
    python bench/kernels/kernel_table.py aims bench/results/kernels_h200.jsonl

The first line of FILE is the environment; each one after it an implementation of one work.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastgate.report.markdown import markdown_table

Line = dict[str, Any]


def lines(raw: Line) -> Iterator[Line]:
    """The lines of a file of pytest-benchmark's: the environment, then each implementation."""
    yield {"environment": raw["machine_info"], "commit": raw["commit_info"].get("id"), "at": raw["datetime"]}
    for result in raw["benchmarks"]:
        yield line_of(result["group"], result["extra_info"], result["stats"])


def line_of(work: str, info: Line, stats: Line) -> Line:
    """One implementation: what, microseconds, spread, rates, share of what bounds it.

    info: pytest-benchmark's extra_info. stats: `median` and `iqr` in seconds, and `rounds`.
    """
    line = {"work": work, "implementation": info["implementation"]}
    if "host_us" in info:
        return {**line, "host_us": round(info["host_us"], 2)}
    return {
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
    """(environment, work -> implementation -> its line)."""
    first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
    works: dict[str, dict[str, Line]] = {}
    for line in rest:
        works.setdefault(line["work"], {})[line["implementation"]] = line
    return first["environment"], works


def fastest_baseline(
    implementations: dict[str, Line], names: tuple[str, ...] = ()
) -> tuple[str, float] | None:
    """The fastest of `names` (all but fastgate's own forms, if empty), and its microseconds."""
    own = ("fastgate", "cuda", "triton", "fused", "cublas")
    times = {
        name: line["us"]
        for name, line in implementations.items()
        if (name in names if names else name not in own)
    }
    name = min(times, key=times.__getitem__, default=None)
    return None if name is None else (name, times[name])


def table(environment: Line, works: dict[str, dict[str, Line]]) -> str:
    """One row a work: fastgate's time and rate, its share of what bounds it, and its fastest baseline."""
    header = ["work", "µs", "GB/s", "TFLOP/s", "share", "of", "fastest baseline", "speed-up"]
    rows = []
    for work, implementations in works.items():
        ours = implementations.get("fastgate")
        if ours is None or "us" not in ours:
            continue
        baseline = fastest_baseline(implementations)
        numbers = [f"{ours['us']:.1f}", f"{ours['gb_per_s']:.0f}", f"{ours['tflop_per_s']:.1f}"]
        against = (
            ["", ""]
            if baseline is None
            else [f"{baseline[0]} {baseline[1]:.1f} µs", f"{baseline[1] / ours['us']:.2f}x"]
        )
        rows.append([work, *numbers, f"{ours['share']:.0%}", ours["bound"], *against])
    where = f"{environment['device']}, torch {environment['torch']}:"
    return f"{where}\n\n{markdown_table(header, rows, (0, 5, 6))}"


class Aim(NamedTuple):
    what: str
    work: str
    value: float
    wanted: float

    @property
    def met(self) -> bool:
        return self.value >= self.wanted


def aims(works: dict[str, dict[str, Line]]) -> Iterator[Aim]:
    """The aims of the kernels on an H200, where they were measured."""
    for work, implementations in works.items():
        op, *words = work.split()
        ours = implementations.get("fastgate")
        if ours is None or "us" not in ours:
            continue
        if op == "gated_add_norm" and "bf16" in words:
            rows = int(words[1].split("x")[0])
            if rows >= 32768:
                yield Aim(
                    "share of the copy rate", work, ours["share"], 0.9 if words[0] == "forward" else 0.85
                )
            baseline = fastest_baseline(implementations, ("eager", "compile", "liger"))
            if rows == 4096 and baseline:
                yield Aim(f"faster than {baseline[0]}", work, baseline[1] / ours["us"], 1.3)
        elif op == "attention" and words[2] == "12x64":
            baseline = fastest_baseline(implementations, ("flash", "cudnn", "flex"))
            if baseline:
                yield Aim(f"faster than {baseline[0]}", work, baseline[1] / ours["us"], 1.0)
            if words[1] == "512":
                yield Aim("TFLOP/s", work, ours["tflop_per_s"], 340 if words[0] == "forward" else 200)
        elif op == "linear_gelu" and words[0] == "forward" and "eager" in implementations:
            yield Aim("faster than eager", work, implementations["eager"]["us"] / ours["us"], 1.15)
            yield Aim("share of the product alone", work, ours["ceilings_us"]["product"] / ours["us"], 0.9)
    host = works.get("gated_add_norm host time of a call, inference", {})
    if len(host) == 2:
        value = host["layer_norm"]["host_us"] / host["fastgate"]["host_us"]
        yield Aim("host time of layer_norm over ours", "gated_add_norm, one call", value, 0.5)


def aims_table(works: dict[str, dict[str, Line]]) -> str:
    rows = [
        [aim.work, aim.what, f"{aim.value:.3g}", f"{aim.wanted:.3g}", "" if aim.met else "missed"]
        for aim in aims(works)
    ]
    return markdown_table(["work", "what", "measured", "wanted", ""], rows, (0, 1, 4))


def main(what: str, path: str) -> None:
    if what == "lines":
        print("\n".join(json.dumps(line) for line in lines(json.loads(Path(path).read_text()))))
        return
    environment, works = read(Path(path))
    print({"table": table(environment, works), "aims": aims_table(works)}[what])


if __name__ == "__main__":
    main(*sys.argv[1:])
