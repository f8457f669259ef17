"""The roofline of the kernel timings: TFLOP/s or GB/s of each work against its FLOPs a byte.

    python bench/kernels/roofline.py bench/results/kernels_h200.jsonl bench/results/roofline_h200.png

The two roofs are the fastest copy and the fastest product of the same run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import kernel_table
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

# Operations of a norm an element, that it has a place on the axis of FLOPs; products have their own count.
NORM_FLOPS_A_BYTE = 2.0


def roofs(works: dict[str, dict[str, kernel_table.Line]]) -> tuple[float, float]:
    """(bytes a second of the fastest copy, FLOPs a second of the fastest product; 0 where none was timed)."""
    copies, products = [0.0], [0.0]
    for implementations in works.values():
        for line in implementations.values():
            ceilings = line.get("ceilings_us", {})
            if "copy" in ceilings:
                copies.append(line["bytes"] / (1e-6 * ceilings["copy"]))
            if "product" in ceilings:
                products.append(line["flops"] / (1e-6 * ceilings["product"]))
    return max(copies), max(products)


def points(works: dict[str, dict[str, kernel_table.Line]]) -> dict[str, list[tuple[float, float, str]]]:
    """op and direction -> (FLOPs a byte, FLOPs a second, work) of fastgate's timings."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for work, implementations in works.items():
        line = implementations.get("fastgate", {})
        if "us" not in line:
            continue
        flops = line["flops"] or NORM_FLOPS_A_BYTE * line["bytes"]
        name = " ".join(work.split()[:2])
        found.setdefault(name, []).append((flops / line["bytes"], flops / (1e-6 * line["us"]), work))
    return found


def draw(path: Path, picture: Path) -> None:
    environment, works = kernel_table.read(path)
    rate, peak = roofs(works)
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, where in points(works).items():
        axes.scatter([p[0] for p in where], [p[1] / 1e12 for p in where], s=14, label=name)
    x = np.logspace(-1, 4, 200)
    roof = x * rate if not peak else np.minimum(x * rate, peak)
    axes.plot(x, roof / 1e12, color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s")
    axes.set_title(f"{environment['device']}: copy {rate / 1e9:.0f} GB/s, product {peak / 1e12:.0f} TFLOP/s")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
