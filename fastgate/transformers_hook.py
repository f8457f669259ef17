"""Registers pruned models with the Auto classes of transformers as soon as transformers is imported.

`import fastgate` alone imports neither torch nor transformers, so that it and the command line start fast.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType


def register() -> None:
    """Register now if transformers is imported already, and otherwise when it is."""
    if "transformers" in sys.modules:
        _import_models()
    else:
        sys.meta_path.insert(0, _Finder())


def _import_models() -> None:
    import fastgate.models  # noqa: F401  it registers


class _Finder(importlib.abc.MetaPathFinder):
    """Finds transformers as the other finders do, and has its loader import fastgate.models afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "transformers":
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            _call_afterwards(spec.loader)
        return spec


def _call_afterwards(loader: importlib.abc.Loader) -> None:
    execute = loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        _import_models()

    loader.exec_module = execute_and_register  # type: ignore[method-assign]
