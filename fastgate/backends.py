"""Which implementation fills each op's slot on each kind of device here, and why another does not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgate import ops

CPU_LIBRARY = Path(__file__).parent / "libfastgate_cpu.so"
BUILD_RECORD = Path(__file__).parent / "build.json"
CPP_DTYPES = (torch.float32, torch.bfloat16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Ops that have a Triton kernel, in fastgate.kernels under their name.
TRITON_OPS = ("gated_add_norm",)


@dataclass(frozen=True)
class Candidate:
    """An implementation of an op on a device; reason: what it runs for if chosen, else why it is not."""

    op: str
    device: str
    backend: str
    chosen: bool
    reason: str


def build_record() -> dict[str, Any] | None:
    """What the build left: `mode` (FASTGATE_BUILD), `cpu` (built or not), `reason`; None without a build."""
    try:
        return json.loads(BUILD_RECORD.read_text())
    except (OSError, ValueError):
        return None


@functools.cache
def load_cpu_library() -> str:
    """Load the compiled CPU kernels; returns the reason they cannot run, empty if they can."""
    if not CPU_LIBRARY.exists():
        record = build_record()
        if record is None:
            return "no compiled library beside the package: this is a source folder that was not built"
        return (
            f"not built: {record['reason']}" if record["reason"] else f"{CPU_LIBRARY.name} has been removed"
        )
    try:
        torch.ops.load_library(str(CPU_LIBRARY))
    except OSError as error:
        return f"{CPU_LIBRARY.name} does not load under torch {torch.__version__}: {error}"
    absent = [op for op in ops.OPS if not hasattr(torch.ops.fastgate_cpu, op)]
    return f"{CPU_LIBRARY.name} was built before {', '.join(absent)} was there: build again" if absent else ""


def cpp(op: str) -> ops.Implementation:
    """The compiled CPU implementation of `op`; load_cpu_library must have succeeded."""
    library = torch.ops.fastgate_cpu
    return ops.Implementation(
        "cpp", getattr(library, op).default, getattr(library, f"{op}_backward").default, frozenset(CPP_DTYPES)
    )


@functools.cache
def missing_for_triton() -> str:
    """The reason the Triton kernels cannot run here, empty if they can. Triton is not imported for it."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip is not None:
        return "written and tested for NVIDIA devices, this torch is built for ROCm"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install fastgate[gpu]"
    return ""


def triton(op: str) -> ops.Implementation:
    """The Triton implementation of `op`, whose kernels are compiled when they first run."""
    module = importlib.import_module(f"fastgate.kernels.{op}")
    return ops.Implementation("triton", module.forward, module.backward, frozenset(TRITON_DTYPES))


def fill() -> None:
    """Put the best implementation that runs here into every slot of fastgate.ops."""
    if not load_cpu_library():
        for op in ops.OPS:
            ops.SLOTS[op, "cpu"] = cpp(op)
    if not missing_for_triton():
        for op in TRITON_OPS:
            ops.SLOTS[op, "cuda"] = triton(op)


def candidates() -> list[Candidate]:
    """Every implementation of every op on this machine: which run, for what, and why others do not."""
    found = []
    missing = load_cpu_library()
    for op in ops.OPS:
        found.append(Candidate(op, "cpu", "cpp", not missing, missing or "float32 and bfloat16"))
        rest = "every dtype, in place of cpp" if missing else "float16 and float64, which cpp does not take"
        found.append(Candidate(op, "cpu", "reference", True, rest))
        found += _accelerator_candidates(op)
    return found


def _accelerator_candidates(op: str) -> list[Candidate]:
    """On the accelerator, where there is one; Triton's row is there without one too, with its reason."""
    found, rest = [], "every dtype: this version has no compiled kernel for the device"
    if op in TRITON_OPS:
        missing = missing_for_triton()
        found.append(Candidate(op, "cuda", "triton", not missing, missing or "float32, bfloat16 and float16"))
        rest = "every dtype, in place of triton" if missing else "float64, which triton does not take"
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        name = device.type if device is not None else "accelerator"
        found.append(Candidate(op, name, "reference", True, rest))
    return found


def implementations(op: str, device_type: str = "cpu") -> list[ops.Implementation]:
    """All implementations of `op` that can run on this kind of device, side by side: the reference first."""
    found = [ops.REFERENCE[op]]
    if device_type == "cpu" and not load_cpu_library():
        found.append(cpp(op))
    if device_type == "cuda" and op in TRITON_OPS and not missing_for_triton():
        found.append(triton(op))
    return found


ops.fill_with(fill)
