"""What a compiled CUDA kernel is made of, read from its cubin: registers, memory, instructions."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
# Loads and stores of local memory: a spilled register, or an array that is indexed at run time.
_LOCAL = ("LDL", "STL")
# Loads, stores, and copies into shared memory that no register sees.
_DEVICE = ("LDG", "STG", "LDGSTS")
_TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA")


@dataclass(frozen=True)
class Kernel:
    """registers: a thread; stack, shared: bytes; local: loads and stores of local memory in the code;
    wide, narrow: accesses to device memory of 16 bytes a thread, of less; tensor: matrix instructions."""

    registers: int
    stack: int
    shared: int
    local: int
    wide: int
    narrow: int
    tensor: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def cuobjdump() -> Path | None:
    """The disassembler that Triton's package carries; None without Triton."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return tool if tool.exists() else None


def read(cubin: Path) -> dict[str, Kernel]:
    """Every kernel of `cubin` by its (mangled) name."""
    tool = cuobjdump()
    assert tool is not None, "cuobjdump is in Triton's package: install triton"
    used = {
        name: tuple(map(int, numbers))
        for name, *numbers in _RESOURCES.findall(_run(tool, "-res-usage", cubin))
    }
    kernels = {}
    for part in _run(tool, "-sass", cubin).split("Function : ")[1:]:
        name = part.split(None, 1)[0]
        registers, stack, shared, _ = used[name]
        kernels[name] = Kernel(registers, stack, shared, *_counts(Counter(_INSTRUCTION.findall(part))))
    return kernels


def _counts(instructions: Counter[str]) -> tuple[int, int, int, int]:
    local = wide = narrow = tensor = 0
    for instruction, count in instructions.items():
        op, *parts = instruction.split(".")
        local += count * op.startswith(_LOCAL)
        tensor += count * op.startswith(_TENSOR_CORE)
        if op in _DEVICE:
            wide += count * ("128" in parts)
            narrow += count * ("128" not in parts)
    return local, wide, narrow, tensor


def _run(tool: Path, option: str, cubin: Path) -> str:
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
