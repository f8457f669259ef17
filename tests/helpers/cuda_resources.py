"""What nvcc makes of csrc/cuda's kernels: `cd tests && python -m helpers.cuda_resources` compares all
architectures with csrc/cuda/resources.json and fails if they differ, `--write` writes it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import cubin_stats

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
TABLE = SOURCES / "resources.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

_LAYOUT = re.compile(r"LayoutI(?P<x>\w+?)(?P<residual>f|6__half|S\d?_)Li(?P<columns>\d+)E")
_TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


def nvcc() -> str | None:
    return shutil.which("nvcc")


def nvcc_version() -> str:
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"release [\d.]+, V([\d.]+)", text)[0]


def readable(mangled: str) -> str:
    """backward_rows x=bfloat16 residual=float32 columns=8, of a kernel's mangled name."""
    kernel = re.findall(r"\d+((?:forward|backward)_rows|sum_partials)", mangled)[0]
    layout = _LAYOUT.search(mangled)
    if layout is None:
        return kernel
    x = _TYPES.get(layout["x"], "mixed")
    residual = _TYPES.get(layout["residual"], x)  # a substitution stands for x's type
    return f"{kernel} x={x} residual={residual} columns={layout['columns']}"


def compiled(architecture: str) -> dict[str, dict[str, int]]:
    """Every kernel of csrc/cuda, compiled for `architecture`: readable name -> what cubin_stats reads."""
    statistics = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(SOURCES.glob("*.cu")):
            cubin = Path(folder) / f"{source.stem}.cubin"
            command = [nvcc(), "-cubin", f"-arch={architecture}", "-std=c++17", "-O3", "-I", ROOT / "csrc"]
            subprocess.run([*command, source, "-o", cubin], check=True)
            kernels = cubin_stats.read(cubin)
            named = {readable(name): kernel.to_dict() for name, kernel in kernels.items()}
            assert len(named) == len(kernels) and not named.keys() & statistics.keys(), (
                "two kernels of one name"
            )
            statistics |= named
    return dict(sorted(statistics.items()))


def main() -> None:
    kernels = {architecture: compiled(architecture) for architecture in ARCHITECTURES}
    table = {"nvcc": nvcc_version(), "kernels": kernels}
    if "--write" in sys.argv[1:]:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    elif table != json.loads(TABLE.read_text()):
        raise SystemExit(f"{TABLE.name} differs from what nvcc {table['nvcc']} makes of the kernels")


if __name__ == "__main__":
    main()
