"""Which implementation fills each op's slot on each kind of device here, and why another does not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgate import ops
from fastgate.errors import ArgumentError, format_error
from fastgate.ops.embed_norm import naming_bad_ids
from fastgate.ops.fused_layers import FUSED_LAYERS_OP
from fastgate.ops.linear import PANELS, missing_for_onednn
from fastgate.ops.linear_gelu import onednn

PACKAGE = Path(__file__).parents[1]  # fastgate/
CPU_LIBRARY = PACKAGE / "libfastgate_cpu.so"
CUDA_LIBRARY = PACKAGE / "libfastgate_cuda.so"
BUILD_RECORD = PACKAGE / "build.json"
CPP_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_OPS = ("gated_add_norm", "attention", "embed_norm", "absorbed_attention", "shift_norm")
# Ops with a GPU kernel -> its languages, best first. FASTGATE_CUDA forces one where there are two.
CUDA_BACKENDS = {
    "gated_add_norm": ("cuda", "triton"),
    "attention": ("triton",),
    "linear_gelu": ("triton",),
    "embed_norm": ("triton",),
    "absorbed_attention": ("triton",),
    "shift_norm": ("triton",),
}


@dataclass(frozen=True)
class Candidate:
    """An implementation of an op on a device; reason: what it runs for if chosen, else why it is not."""

    op: str
    device: str
    backend: str
    chosen: bool
    reason: str


def build_record() -> dict[str, Any] | None:
    """What the build left: `mode` (FASTGATE_BUILD); `cpu` and `cuda`, built or not; `reason` and
    `cuda_reason`, why not. None without a build."""
    try:
        return json.loads(BUILD_RECORD.read_text())
    except (OSError, ValueError):
        return None


def _load(library: Path, reason: str, namespace: str, wanted: tuple[str, ...]) -> str:
    """Load a library that registers the ops `wanted`; returns why they cannot run, empty if they can.

    reason: the build record's key for why the library was not built."""
    if not library.exists():
        record = build_record()
        if record is None:
            return "no compiled library beside the package: this is a source folder that was not built"
        why = record.get(reason, "built before it was there: build again")
        return f"not built: {why}" if why else f"{library.name} has been removed"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return _broken(f"{library.name} does not load under torch {torch.__version__}: {error}")
    absent = [op for op in wanted if not hasattr(getattr(torch.ops, namespace), op)]
    if absent:
        return _broken(f"{library.name} was built before {', '.join(absent)} was there: build again")
    return ""


def _broken(reason: str) -> str:
    """Warn that a library that is there cannot be used; returns the reason."""
    warnings.warn(f"fastgate: other kernels run in its place: {reason}", RuntimeWarning, stacklevel=2)
    return reason


@functools.cache
def load_cpu_library() -> str:
    """Load the compiled CPU kernels; returns the reason they cannot run, empty if they can."""
    return _load(CPU_LIBRARY, "reason", "fastgate_cpu", (*CPU_OPS, PANELS, FUSED_LAYERS_OP))


@functools.cache
def load_cuda_library() -> str:
    """Load the compiled CUDA kernels; returns the reason they cannot run, empty if they can.

    They load without a GPU too."""
    return _load(CUDA_LIBRARY, "cuda_reason", "fastgate_cuda", ("gated_add_norm",))


def cpp(op: str) -> ops.Implementation:
    """The compiled CPU implementation of `op`; load_cpu_library must have succeeded."""
    library = torch.ops.fastgate_cpu
    forward = getattr(library, op).default
    if op == "embed_norm":
        forward = naming_bad_ids(forward)
    return ops.Implementation(
        "cpp", forward, getattr(library, f"{op}_backward").default, frozenset(CPP_DTYPES)
    )


def cuda(op: str) -> ops.Implementation:
    """The compiled CUDA implementation of `op`; load_cuda_library must have succeeded."""
    library = torch.ops.fastgate_cuda
    return ops.Implementation(
        "cuda",
        getattr(library, op).default,
        getattr(library, f"{op}_backward").default,
        frozenset(GPU_DTYPES),
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
    saving = None
    if hasattr(module, "forward_saving"):
        saving = (module.forward_saving, getattr(module, "backward_saved", module.backward))
    head_dims = getattr(module, "HEAD_DIMS", None)
    return ops.Implementation(
        "triton",
        module.forward,
        module.backward,
        frozenset(GPU_DTYPES),
        saving,
        head_dims,
        getattr(module, "fits", None),
    )


# GPU language -> why it cannot run here (empty if it can), and its implementation of an op.
LANGUAGES: dict[str, tuple[Callable[[], str], Callable[[str], ops.Implementation]]] = {
    "cuda": (load_cuda_library, cuda),
    "triton": (missing_for_triton, triton),
}


def forced_language() -> str | None:
    """The value of FASTGATE_CUDA, checked: the GPU language of every op that is written in several."""
    forced = os.environ.get("FASTGATE_CUDA") or None
    if forced is not None and forced not in LANGUAGES:
        wanted = f"one of {', '.join(LANGUAGES)}"
        raise ArgumentError(
            format_error("FASTGATE_CUDA", "value", repr(forced), wanted, "unset it for the best")
        )
    return forced


def gpu_languages(op: str) -> list[tuple[str, str]]:
    """The GPU languages of `op`, best first, each with the reason it does not run here; the first without a
    reason runs."""
    forced, written = forced_language(), CUDA_BACKENDS.get(op, ())
    found = []
    for language in written:
        missing = LANGUAGES[language][0]()
        if not missing and forced in written and forced != language:
            missing = f"FASTGATE_CUDA={forced} forces the other"
        found.append((language, missing))
    return found


def fill() -> None:
    """Put the best implementation that runs here into every slot of fastgate.ops: all of them, or none if it
    raises."""
    found: dict[tuple[str, str], ops.Implementation] = {}
    if not missing_for_onednn():
        found["linear_gelu", "cpu"] = onednn()
    if not load_cpu_library():
        found.update({(op, "cpu"): cpp(op) for op in CPU_OPS})
    forced = forced_language()
    if torch.cuda.is_available():
        missing = LANGUAGES[forced][0]() if forced else ""
        if missing:
            wanted, remedy = f"one that runs: {missing}", "build it, or unset FASTGATE_CUDA"
            raise ArgumentError(format_error("FASTGATE_CUDA", "value", repr(forced), wanted, remedy))
        for op in CUDA_BACKENDS:
            runs = [language for language, missing in gpu_languages(op) if not missing]
            if runs:
                found[op, "cuda"] = LANGUAGES[runs[0]][1](op)
    ops.IMPLEMENTATIONS.update(found)


def candidates() -> list[Candidate]:
    """Every implementation of every op on this machine: which run, for what, and why others do not."""
    found = []
    missing = load_cpu_library()
    for op in ("linear", *ops.OPS):
        rest = "every dtype"
        for backend, written, why_not in (
            ("cpp", op in CPU_OPS, missing),
            ("onednn", op in ("linear", "linear_gelu"), missing_for_onednn()),
        ):
            if written:
                found.append(Candidate(op, "cpu", backend, not why_not, why_not or "float32 and bfloat16"))
                takes = f"that {backend} does not take: float16 and float64"
                rest += f", in place of {backend}" if why_not else f" {takes}"
        found.append(Candidate(op, "cpu", "reference", True, rest))
        found += _on_accelerator(op)
    return found


def _on_accelerator(op: str) -> list[Candidate]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    name = accelerator.type if accelerator is not None else "cuda"
    found, ran = [], False
    for language, missing in gpu_languages(op) if name == "cuda" else ():
        reason = missing or ("no CUDA device" if accelerator is None else "")
        if not reason and ran:
            reason = f"another runs by default: FASTGATE_CUDA={language} forces this one"
        runs = not reason
        found.append(Candidate(op, name, language, runs, reason or "float32, bfloat16 and float16"))
        ran = ran or runs
    if accelerator is not None:
        rest = "float64, which the kernels do not take" if ran else "every dtype: no kernel for the device"
        found.append(Candidate(op, name, "reference", True, rest))
    return found


def implementations(op: str, device_type: str = "cpu") -> list[ops.Implementation]:
    """All implementations of `op` that can run on this kind of device, side by side: the reference first."""
    found = [ops.REFERENCE[op]]
    if device_type == "cpu" and op in CPU_OPS and not load_cpu_library():
        found.append(cpp(op))
    if device_type == "cpu" and op == "linear_gelu" and not missing_for_onednn():
        found.append(onednn())
    if device_type == "cuda":
        for language in CUDA_BACKENDS.get(op, ()):
            missing, implementation = LANGUAGES[language]
            if not missing():
                found.append(implementation(op))
    return found


ops.register_loader(fill)
