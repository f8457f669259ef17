"""The backends: which runs each op on each kind of device here, why another does not, and how to choose
one."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.torch_version import TorchVersion

from fastgate.errors import ArgumentError, format_error
from fastgate.ops import registry
from fastgate.ops.fused_layers import COMPILED_OP
from fastgate.ops.linear import PACKED_LINEAR, missing_for_onednn
from fastgate.ops.linear import onednn as onednn_linear
from fastgate.ops.linear_gelu import onednn as onednn_linear_gelu
from fastgate.ops.registry import REFERENCE, Implementation, Key, Saving

PACKAGE = Path(__file__).parents[1]  # fastgate/
CPU_LIBRARY = PACKAGE / "libfastgate_cpu.so"
CUDA_LIBRARY = PACKAGE / "libfastgate_cuda.so"
BUILD_RECORD = PACKAGE / "build.json"
CPP_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_OPS = ("gated_add_norm", "attention", "embed_norm", "absorbed_attention", "shift_norm")
REFERENCE_NAME = "reference"


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
        record: dict[str, Any] = json.loads(BUILD_RECORD.read_text())
    except (OSError, ValueError):
        return None
    return record


def _load(library: Path, reason: str, namespace: str, ops: tuple[str, ...]) -> str:
    """Load a library that registers `ops`; returns why they cannot run, empty if they can.

    reason: the build record's key for why the library was not built."""
    if not library.exists():
        record = build_record()
        if record is None:
            return "no compiled library beside the package: this is a source folder that was not built"
        why = record.get(reason, "built before it was there: build again")
        return f"not built: {why}" if why else f"{library.name} has been removed"
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        return _broken(f"{library.name} does not load under torch {torch.__version__}: {error}")
    absent = [op for op in ops if not hasattr(getattr(torch.ops, namespace), op)]
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
    return _load(CPU_LIBRARY, "reason", "fastgate_cpu", (*CPU_OPS, PACKED_LINEAR, COMPILED_OP))


@functools.cache
def load_cuda_library() -> str:
    """Load the compiled CUDA kernels; returns the reason they cannot run, empty if they can.

    They load without a GPU too."""
    return _load(CUDA_LIBRARY, "cuda_reason", "fastgate_cuda", ("gated_add_norm",))


def cpp(op: str) -> Implementation:
    """The compiled CPU implementation of `op`; load_cpu_library must have succeeded."""
    library = torch.ops.fastgate_cpu
    forward, backward = getattr(library, op).default, getattr(library, f"{op}_backward").default
    return Implementation("cpp", forward, backward, frozenset(CPP_DTYPES), fused=True)


def onednn(op: str) -> Implementation:
    """The implementation of `op` by oneDNN; missing_for_onednn must have found nothing."""
    return {"linear": onednn_linear, "linear_gelu": onednn_linear_gelu}[op]()


def cuda(op: str) -> Implementation:
    """The compiled CUDA implementation of `op`; load_cuda_library must have succeeded."""
    library = torch.ops.fastgate_cuda
    forward, backward = getattr(library, op).default, getattr(library, f"{op}_backward").default
    return Implementation("cuda", forward, backward, frozenset(GPU_DTYPES))


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


def _plain_kernels(kernels: ModuleType) -> Implementation:
    """Kernels that save nothing for backward."""
    return Implementation("triton", kernels.forward, kernels.backward, frozenset(GPU_DTYPES))


def _attention_kernels(kernels: ModuleType) -> Implementation:
    saving = Saving(kernels.forward_saving, kernels.backward_saved)
    head_dims: tuple[int, ...] = kernels.HEAD_DIMS

    def fits(head_dim: int) -> bool:
        return head_dim in head_dims  # of a tuple: traced sizes have no hash

    return Implementation("triton", kernels.forward, kernels.backward, frozenset(GPU_DTYPES), saving, fits)


def _absorbed_attention_kernels(kernels: ModuleType) -> Implementation:
    saving = Saving(kernels.forward_saving, kernels.backward_saved)
    return Implementation(
        "triton", kernels.forward, kernels.backward, frozenset(GPU_DTYPES), saving, kernels.fits
    )


def _linear_gelu_kernels(kernels: ModuleType) -> Implementation:
    saving = Saving(kernels.forward_saving, kernels.backward)
    return Implementation("triton", kernels.forward, kernels.backward, frozenset(GPU_DTYPES), saving)


# What each op's kernels save and fit.
TRITON_OPS: dict[str, Callable[[ModuleType], Implementation]] = {
    "gated_add_norm": _plain_kernels,
    "attention": _attention_kernels,
    "linear_gelu": _linear_gelu_kernels,
    "embed_norm": _plain_kernels,
    "absorbed_attention": _absorbed_attention_kernels,
    "shift_norm": _plain_kernels,
}


def triton(op: str) -> Implementation:
    """The Triton implementation of `op`, whose kernels are compiled when they first run."""
    return TRITON_OPS[op](importlib.import_module(f"fastgate.kernels.{op}"))


@dataclass(frozen=True)
class Backend:
    """A way to run some ops on one kind of device.

    Args:
        name: as set_backend takes it.
        device_type: "cpu" or "cuda".
        ops: the ops it has.
        missing: the reason it cannot run here, empty if it can.
        load: its implementation of an op, where nothing is missing.
        dtypes: those it takes, in words.
        versions: the oldest version of each package that it runs with.
    """

    name: str
    device_type: str
    ops: tuple[str, ...]
    missing: Callable[[], str]
    load: Callable[[str], Implementation]
    dtypes: str
    versions: Mapping[str, str] = field(default_factory=dict)

    def why_not(self) -> str:
        """The reason it cannot run here, empty if it can."""
        return self.missing() or _old_package(self.versions)


def _old_package(versions: Mapping[str, str]) -> str:
    """Which installed package is older than it must be, empty if none is."""
    for name, oldest in versions.items():
        try:
            installed = torch.__version__ if name == "torch" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # part of another package, such as a build of torch
        if TorchVersion(installed) < oldest:
            return f"needs {name} {oldest}, {installed} is installed: pip install --upgrade {name}"
    return ""


# Best first for each kind of device.
BACKENDS = (
    Backend("cpp", "cpu", CPU_OPS, lambda: load_cpu_library(), cpp, "float32 and bfloat16"),
    Backend(
        "onednn", "cpu", ("linear", "linear_gelu"), missing_for_onednn, onednn,
        "float32, and bfloat16 on processors with AVX512 or AVX-NE-CONVERT",
    ),
    Backend(
        "cuda", "cuda", ("gated_add_norm",), lambda: load_cuda_library(), cuda,
        "float32, bfloat16 and float16",
    ),
    Backend(
        "triton", "cuda", tuple(TRITON_OPS), lambda: missing_for_triton(), triton,
        "float32, bfloat16 and float16", {"triton": "3.6"},
    ),
)  # fmt: skip
GPU_LANGUAGES = {backend.name: backend for backend in BACKENDS if backend.device_type == "cuda"}


def backends_of(op: str, device_type: str) -> list[Backend]:
    """The backends of an op on a kind of device, best first."""
    return [backend for backend in BACKENDS if backend.device_type == device_type and op in backend.ops]


def forced_language() -> str | None:
    """The value of FASTGATE_CUDA, checked: the GPU language of every op that is written in several."""
    forced = os.environ.get("FASTGATE_CUDA") or None
    if forced is not None and forced not in GPU_LANGUAGES:
        wanted = f"one of {', '.join(GPU_LANGUAGES)}"
        raise ArgumentError(
            format_error("FASTGATE_CUDA", "value", repr(forced), wanted, "unset it for the best")
        )
    return forced


def _why_not_by_default(op: str, backend: Backend) -> str:
    """The reason a backend is not an op's default, apart from the better ones; empty if there is none."""
    reason = backend.why_not()
    forced = forced_language() if backend.device_type == "cuda" else None
    if not reason and forced not in (None, backend.name) and op in GPU_LANGUAGES[str(forced)].ops:
        return f"FASTGATE_CUDA={forced} forces the other"
    return reason


def load_defaults() -> dict[Key, Implementation]:
    """The best implementation of every op that runs here, by op and kind of device.

    Raises:
        ArgumentError: if FASTGATE_CUDA names a language that cannot run.
    """
    forced = forced_language()
    device_types = ["cpu"]
    if torch.cuda.is_available():
        device_types.append("cuda")
        reason = GPU_LANGUAGES[forced].why_not() if forced else ""
        if reason:
            wanted, remedy = f"one that runs: {reason}", "build it, or unset FASTGATE_CUDA"
            raise ArgumentError(format_error("FASTGATE_CUDA", "value", repr(forced), wanted, remedy))
    defaults: dict[Key, Implementation] = {}
    for device_type in device_types:
        for op in REFERENCE:
            able = [b for b in backends_of(op, device_type) if not _why_not_by_default(op, b)]
            if able:
                defaults[op, device_type] = able[0].load(op)
    return defaults


def set_backend(op: str, name: str | None, *, device: str | torch.device | None = None) -> None:
    """Choose the implementation that runs an op in this process, from the next call on.

    Calls that the implementation does not take, such as those of another dtype, run the reference. The choice
    comes before FASTGATE_CUDA. A frozen model runs a reference that was chosen for `linear` or `linear_gelu`
    from weights that it unpacks at every call. It may be called from any thread; calls that are under way
    keep what they have.

    Args:
        op: the op's name, such as "attention".
        name: a backend's name, as `python -m fastgate.env` lists them, or "reference"; None: the default
            again. Of `linear`, the row `cpp` there is for packed weights and cannot be chosen.
        device: the kind of device, such as "cuda"; None: every one where the op has that backend.

    Raises:
        ArgumentError: for an op or a backend that is not known, and for one that cannot run here, with the
            reason.

    Example:
        >>> fastgate.ops.set_backend("attention", "reference")
        >>> fastgate.ops.set_backend("attention", None)
    """
    if op not in REFERENCE:
        wanted = f"one of {', '.join(REFERENCE)}"
        raise ArgumentError(format_error("set_backend", "op", repr(op), wanted, "pass the name of an op"))
    device_types = _device_types(op, device)
    if name is None or name == REFERENCE_NAME:
        for device_type in device_types:
            registry.select(op, device_type, None if name is None else REFERENCE[op])
        return
    named = [b for d in device_types for b in backends_of(op, d) if b.name == name]
    if not named:
        known = [b.name for d in device_types for b in backends_of(op, d)]
        wanted = (
            f"one of {', '.join((*known, REFERENCE_NAME))}, or None, for {op} on {', '.join(device_types)}"
        )
        remedy = "see python -m fastgate.env"
        raise ArgumentError(format_error("set_backend", "name", repr(name), wanted, remedy))
    reasons = [backend.why_not() for backend in named]
    if all(reasons):
        wanted, remedy = f"one that runs here: {'; '.join(reasons)}", "see python -m fastgate.env"
        raise ArgumentError(format_error("set_backend", "name", repr(name), wanted, remedy))
    for backend, reason in zip(named, reasons, strict=True):
        if not reason:
            registry.select(op, backend.device_type, backend.load(op))


def _device_types(op: str, device: str | torch.device | None) -> tuple[str, ...]:
    """The kinds of devices to choose for: the one that is asked for, or all on which the op has a backend."""
    have = tuple(dict.fromkeys(backend.device_type for backend in BACKENDS if op in backend.ops))
    if device is None:
        return have
    try:
        device_type = torch.device(device).type
    except RuntimeError:
        device_type = str(device)
    if device_type not in have:
        wanted = f"one of {', '.join(have)}, where {op} has a backend to choose"
        remedy = "leave it out: elsewhere the reference runs"
        raise ArgumentError(format_error("set_backend", "device", repr(device), wanted, remedy))
    return (device_type,)


def candidates() -> list[Candidate]:
    """Every implementation of every op on this machine: which run, for what, and why others do not."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device_types = ("cpu", accelerator.type if accelerator is not None else "cuda")
    return [
        candidate
        for op in REFERENCE
        for device_type in device_types
        for candidate in _candidates_on(op, device_type, accelerator is not None)
    ]


def _candidates_on(op: str, device_type: str, has_accelerator: bool) -> list[Candidate]:
    listed: list[Candidate] = []
    selected, runs = registry.selected(op, device_type), ""
    for backend in backends_of(op, device_type):
        reason = _why_not_by_default(op, backend)
        if not reason and device_type == "cuda" and not has_accelerator:
            reason = "no CUDA device"
        if selected is not None:
            reason = "" if backend.name == selected.backend else f"set_backend chose {selected.backend}"
        elif not reason and runs:
            reason = f"another runs by default: FASTGATE_CUDA={backend.name} forces this one"
        runs = runs or ("" if reason else backend.name)
        listed.append(Candidate(op, device_type, backend.name, not reason, reason or backend.dtypes))
    if op == "linear" and device_type == "cpu":
        missing = load_cpu_library()
        listed.insert(0, Candidate(op, "cpu", "cpp", not missing, missing or "weights that freeze packed"))
    if device_type == "cpu" or has_accelerator:
        listed.append(Candidate(op, device_type, REFERENCE_NAME, True, _rest(op, device_type, runs)))
    return listed


def _rest(op: str, device_type: str, runs: str) -> str:
    """What the reference runs beside a backend."""
    written = {backend.name: backend for backend in backends_of(op, device_type)}
    if runs:
        taken = written[runs].load(op).dtypes
        *first, last = [str(dtype).removeprefix("torch.") for dtype in registry.DTYPES if dtype not in taken]
        return f"what {runs} does not take: {', '.join(first)}{' and ' if first else ''}{last}"
    if registry.reference_is_selected(op, device_type):
        return "every dtype: set_backend chose it"
    return (
        f"every dtype, in place of {next(iter(written))}"
        if written
        else "every dtype: no kernel for the device"
    )


def implementations(op: str, device_type: str = "cpu") -> list[Implementation]:
    """All implementations of `op` that can run on this kind of device, side by side: the reference first."""
    able = [backend for backend in backends_of(op, device_type) if not backend.why_not()]
    return [REFERENCE[op], *(backend.load(op) for backend in able)]


registry.register_loader(load_defaults)
