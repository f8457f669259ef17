"""The JSON lines of `fastgate bench --json` as a Markdown table.

python bench/speed_table.py bench/results/speed_cpu.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def spans(layers: list[int]) -> str:
    """[0, 1, 2, 3, 8] -> 0-3, 8"""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


def table(lines: list[str]) -> str:
    """One row a line: the median batch of fastgate and of its rivals, the ratios, the share of the floor."""
    runs = [json.loads(line) for line in lines]
    rivals = list(runs[0]["ratio"])
    head = ["attention kept", "batches", "filled", "fastgate", *rivals, "ratio", "share of the floor"]
    rows = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for run in runs:
        order = {"data": "in data order", "length": "sorted by length"}[run["settings"]["order"]]
        times = [f"{run['contenders'][name]['median_ms']:.0f} ms" for name in ("fastgate", *rivals)]
        ratios = " / ".join(f"{run['ratio'][name]:.2f}x" for name in rivals)
        row = [spans(run["kept"]), order, f"{run['filled']:.0%}", *times, ratios, f"{run['floor_share']:.0%}"]
        rows.append(row)
    first = runs[0]["settings"]
    where = first["environment"]
    head_line = (
        f"{first['model']}, {first['task']}, {first['dtype']}, batches of {first['batch_size']}, "
        f"{where['threads']} threads, {where['processor']}, torch {where['torch']}, "
        f"transformers {where['transformers']}:"
    )
    return "\n".join([head_line, "", *(f"| {' | '.join(row)} |" for row in rows)])


if __name__ == "__main__":
    print(table(Path(sys.argv[1]).read_text().splitlines()))
