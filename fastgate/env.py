"""What runs here and why: `python -m fastgate.env`; and the environment that result files name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from fastgate.ops import backends
from fastgate.text_table import paragraph

PACKAGES = ("fastgate", "torch", "triton", "transformers", "accelerate", "datasets", "safetensors", "numpy")


def collect() -> dict[str, Any]:
    """Versions, the build, every op's backends with the reasons, devices and threads: plain data for JSON."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "package": str(Path(__file__).parent),
        "build": backends.build_record() or {"mode": None, "cpu": False, "reason": "not built"},
        "ops": [candidate.__dict__ for candidate in backends.candidates()],
        "devices": _devices(),
        "threads": {
            "torch": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
    }


def environment() -> dict[str, Any]:
    """Versions, processor, threads and device, for result files."""
    return {
        **{name: _version(name) for name in ("fastgate", "torch", "transformers")},
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def render(report: dict[str, Any]) -> str:
    """The text form of what `collect` returns, in lines of at most 80 columns where no path is longer."""
    build, threads = report["build"], report["threads"]
    built = "compiled CPU kernels" if build["cpu"] else f"no compiled kernels: {build['reason']}"
    built += " and CUDA kernels" if build.get("cuda") else ""
    built += f" (FASTGATE_BUILD={build['mode']})" if build["mode"] else ""
    versions = [f"{name:<13} {version or 'not installed'}" for name, version in report["versions"].items()]
    runs = {True: "runs", False: "does not run"}
    ops = [
        f"{op['op']} on {op['device']}: {op['backend']} {runs[op['chosen']]}: {op['reason']}"
        for op in report["ops"]
    ]
    omp = threads["OMP_NUM_THREADS"]
    used = f"{threads['torch']} of {threads['cores']} cores" + (f" (OMP_NUM_THREADS={omp})" if omp else "")
    parts = {
        "versions": versions,
        "build": [built, f"in {report['package']}"],
        "ops": ops,
        "devices": [f"{device['type']}: {device['name']}" for device in report["devices"]],
        "threads": [used],
    }
    lines = []
    for title, items in parts.items():
        lines += [title, *(paragraph(f"  {item}", indent=" " * 6) for item in items)]
    return "\n".join(lines)


def print_facts() -> None:
    """Print what runs here. If the reader of a pipe has gone (`| head -1`), the rest is dropped."""
    try:
        print(render(collect()), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, its family and model where several go by that name, the instruction set that
    torch uses on it, and AMX if it has that."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    first = text.split("\n\n")[0].splitlines()
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
    names = [known["model name"]] if "model name" in known else []
    if {"cpu family", "model"} <= set(known):
        names.append(f"family {known['cpu family']} model {known['model']}")
    tiles = ["AMX"] if "amx_bf16" in known.get("flags", "").split() else []
    return ", ".join([*names, platform.machine(), torch.backends.cpu.get_cpu_capability(), *tiles])


def _devices() -> list[dict[str, str]]:
    devices = [{"type": "cpu", "name": _processor()}]
    for index in range(torch.cuda.device_count()):
        devices.append({"type": "cuda", "name": torch.cuda.get_device_name(index)})
    return devices


if __name__ == "__main__":
    print_facts()
