"""Triton kernels compiled for devices that are not here, and the table of what they are made of.

From tests/: compare kernels/resources.json with what compiles now, and write it anew, all or some ops' part.

    python -m helpers.triton_resources
    python -m helpers.triton_resources --write [OP ...]

The table holds every kernel that the calls of tests/helpers/kernel_calls.py launch, for every architecture.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import triton
from helpers import cubin_stats, kernel_calls
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgate.kernels import launch

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "kernels" / "resources.json"
ARCHITECTURES = (80, 90, 100)
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """A kernel as launched: what decides its machine code."""

    function: object
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, object], ...]  # by place
    aligned: tuple[int, ...]  # places of pointers and numbers that are multiples of 16
    options: tuple[tuple[str, object], ...]

    @staticmethod
    def of(function: object, arguments: tuple, named: dict) -> Launch:
        """As Triton reads the arguments of a launch; tensors begin at multiples of 16 bytes."""
        values = dict(zip([parameter.name for parameter in function.params], arguments, strict=False))
        options = {}
        for name, value in named.items():
            (values if name in {p.name for p in function.params} else options)[name] = value
        signature, constants, aligned = [], [], []
        for place, parameter in enumerate(function.params):
            value = values.get(parameter.name, parameter.default)
            free = not parameter.do_not_specialize and isinstance(value, int)
            if parameter.is_constexpr or value is None or (free and value == 1):
                signature.append((parameter.name, "constexpr"))
                constants.append((place, value))
                continue
            if isinstance(value, torch.Tensor):
                kind, even = "*" + TYPES[value.dtype], True
            else:
                number = {bool: "u1", int: "i32", float: "fp32"}[type(value)]
                kind, even = parameter.annotation_type or number, free and value % 16 == 0
            signature.append((parameter.name, kind))
            if even:
                aligned.append(place)
        return Launch(
            function, tuple(signature), tuple(constants), tuple(aligned), tuple(sorted(options.items()))
        )

    def compile(self, architecture: int) -> cubin_stats.Kernel:
        source = ASTSource(
            self.function,
            dict(self.signature),
            {(place,): value for place, value in self.constants},
            {(place,): [["tt.divisibility", 16]] for place in self.aligned},
        )
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options=dict(self.options))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            (kernel,) = cubin_stats.read(Path(file.name)).values()
        # The cubin knows of static shared memory only; Triton asks for its own at the launch.
        return replace(kernel, shared=compiled.metadata.shared)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches in the order they are asked for, none of them made."""
    launches: list[Launch] = []

    def by_key(self, grid, key, arguments, num_warps, num_stages=3, maxnreg=None):
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, **launch.OPTIONS}
        record(self.function, *arguments, **options)

    def record(function, *arguments, grid=None, warmup=False, **named):
        launches.append(Launch.of(function, arguments, named))

    with (
        mock.patch.object(launch.Kernel, "launch", by_key),
        mock.patch.object(triton.JITFunction, "run", record),
    ):
        yield launches


def launches_of(op: str) -> dict[str, Launch]:
    """Each kernel once, named by itself and the first call that launches it."""
    found: dict[Launch, str] = {}
    for name, call in kernel_calls.OPS[op]():
        with recording() as launches:
            call()
        for one in launches:
            found.setdefault(one, f"{one.function.__name__} {name}")
    return {name: one for one, name in found.items()}


def digest(op: str) -> str:
    """Of the sources that an op's kernels come from: a table made from others is out of date."""
    texts = [(ROOT / "kernels" / f"{stem}.py").read_bytes() for stem in sorted(sources(op))]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def sources(stem: str, found: set[str] | None = None) -> set[str]:
    """A file of kernels and all those it imports, by their stems."""
    found = {stem} if found is None else found | {stem}
    text = (ROOT / "kernels" / f"{stem}.py").read_text()
    for imported in re.findall(r"^from fastgate\.kernels\.(\w+) import", text, re.MULTILINE):
        if imported not in found:
            found = sources(imported, found)
    return found


def compiled(op: str) -> dict[str, object]:
    """The op's part of the table."""
    kernels = {
        name: {f"sm_{cc}": one.compile(cc).to_dict() for cc in ARCHITECTURES}
        for name, one in launches_of(op).items()
    }
    return {"triton": triton.__version__, "sources": digest(op), "kernels": kernels}


def read_table() -> dict[str, dict]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write_table(table: dict[str, dict]) -> None:
    """One line a kernel and architecture, so that a difference can be read."""
    text = json.dumps(dict(sorted(table.items())), indent=1)
    for flat in ("registers", "stack", "shared", "local", "wide", "narrow"):
        text = text.replace("{\n     " + f'"{flat}"', "{" + f'"{flat}"')
    lines = text.split("\n")
    joined: list[str] = []
    for line in lines:
        if joined and (line.startswith("     ") or (line.startswith("    }") and "{" in joined[-1])):
            joined[-1] += (" " if joined[-1].endswith(",") else "") + line.strip()
        else:
            joined.append(line)
    TABLE.write_text("\n".join(joined) + "\n")


def main(arguments: list[str]) -> int:
    write, names = arguments[:1] == ["--write"], arguments[1:] or list(kernel_calls.OPS)
    table = read_table()
    current = {op: compiled(op) for op in names}
    if write:
        write_table({**table, **current})
        return 0
    changed = [op for op in names if table.get(op) != current[op]]
    for op in changed:
        remedy = f"cd tests && python -m helpers.triton_resources --write {op}"
        print(f"{op}: kernels/resources.json is out of date: {remedy}")
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
