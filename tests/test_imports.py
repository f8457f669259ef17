"""Which room may import which: read from the sources with ast, so that imports inside functions count too."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from helpers import subprocesses

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastgate"

# Room -> the rooms it may import. Every room may import errors and itself.
LOW = {
    "errors": set(),
    "reference": set(),
    "gates": set(),
    "plan": set(),
    "packing": set(),
    "replacement": {"reference"},
    "kernels": set(),
    "ops": {"reference", "packing"},
    "backends": {"ops", "kernels"},
    "info": {"backends"},
    "hooks": set(),
    "families": {"hooks", "replacement"},
    "packed": {"ops"},
    "layer": {"hooks", "ops", "packed", "replacement"},
    "inspection": {"families", "hooks", "layer"},
    "run": {"inspection", "layer", "packing", "plan"},
    "fingerprint": {"hooks", "inspection", "layer"},
    "program": {"fingerprint", "layer", "ops", "plan", "run"},
    "encoder": {"layer", "ops", "plan", "run"},
    "graphs": {"encoder", "fingerprint", "packing", "run"},
    "state": {"families", "graphs", "inspection", "layer", "program", "replacement", "run"},
    "forward": {"encoder", "inspection", "layer", "ops", "packing", "plan", "run", "state"},
    "freeze": {"families", "layer", "ops", "packed", "state"},
    "heads": {"families", "forward", "packing", "state"},
    "sentence": set(),
    "memory": set(),
    "commit": set(),
    "patch": {"families", "forward", "freeze", "graphs", "heads", "packed", "sentence", "state"},
}
MODEL = set(LOW) - {"kernels", "backends", "info"}
MIDDLE = {
    "prune": MODEL,
    "explain": MODEL,
    "configs": MODEL,
    "structure": MODEL | {"prune", "configs"},
    "checkpoint_files": MODEL | {"configs", "commit", "structure"},
    "checkpoint": MODEL | {"prune", "configs", "structure", "checkpoint_files"},
    "pretrained": MODEL | {"prune", "configs", "structure", "checkpoint", "checkpoint_files"},
    "export": MODEL | {"prune"},
    "pruning": MODEL | {"prune", "checkpoint"},
}
ARROWS = {**LOW, **MIDDLE}
TORCH_ONLY = (
    "errors",
    "reference",
    "gates",
    "plan",
    "packing",
    "replacement",
    "ops",
    "packed",
    "layer",
    "run",
    "encoder",
    "sentence",
    "memory",
    "commit",
)


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def room_of(path: Path) -> str:
    """fastgate/runtime/plan.py -> plan; fastgate/pruning/x.py -> pruning."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, relative imports resolved, wherever they stand."""
    package = ["fastgate", *path.relative_to(PACKAGE).parts[:-1]] if path.is_relative_to(PACKAGE) else []
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def rooms_imported(path: Path) -> set[str]:
    """Rooms of fastgate that a file imports; names that are no room (functions, constants) are left out."""
    rooms = {module.split(".")[1] for module in imported(path) if module.startswith("fastgate.")}
    return {room for room in rooms if (PACKAGE / f"{room}.py").exists() or (PACKAGE / room).is_dir()}


MODULES = sources(PACKAGE)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_lies_below_it(path):
    room = room_of(path)
    allowed = ARROWS.get(room)
    if allowed is None:  # the top: anything but the other way round, which the rooms below are held to
        return
    assert rooms_imported(path) <= allowed | {"errors", room}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_tests_or_bench(path):
    assert not {module.split(".")[0] for module in imported(path)} & {"tests", "bench", "conftest", "cases"}


@pytest.mark.parametrize("room", TORCH_ONLY)
def test_low_rooms_need_torch_and_the_standard_library_only(room):
    paths = sources(PACKAGE / room) or [PACKAGE / f"{room}.py"]
    packages = {module.split(".")[0] for path in paths for module in imported(path)}
    assert packages <= set(sys.stdlib_module_names) | {"torch", "fastgate"}


def test_kernels_never_import_transformers():
    for path in sources(ROOT / "kernels"):
        packages = {module.split(".")[0] for module in imported(path)}
        assert packages <= set(sys.stdlib_module_names) | {"torch", "triton", "fastgate"}
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "it would hide Hugging Face's package of that name"
    )


def test_compiled_sources_include_torch_and_the_systems_libraries_only():
    for path in (*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp")):
        for line in path.read_text().splitlines():
            if line.startswith("#include <"):
                name = line.split("<")[1].split(">")[0]
                assert name.startswith(("torch/", "sys/")) or "/" not in name, (path, line)
                assert "Python.h" not in line and "ATen" not in line


def test_a_relative_import_is_resolved():
    found = imported(PACKAGE / "patch.py")
    assert "fastgate.models.architectures" in found and "torch" in found


def test_importing_fastgate_leaves_the_library_and_the_trainer_alone():
    """Libraries are loaded at the first op, the Trainer at the first use."""
    code = "import sys, torch, fastgate; print('transformers.trainer' in sys.modules, fastgate.ops.IMPLEMENTATIONS)"
    assert subprocesses.finish(subprocesses.start(code)).split(maxsplit=1) == ["False", "{}\n"]
