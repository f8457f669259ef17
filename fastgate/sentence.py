"""What a model of sentence-transformers reads of the encoder inside it. Known by name; never imported."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

# Modules that may follow the pooling without a look at the tokens, unless told to by `module_input_name`.
_AFTER = ("Dense", "Dropout", "LayerNorm", "Normalize")


def rows_read(model: nn.Module) -> dict[int, str]:
    """id of a module inside a sentence-transformers model -> the rows (families.DEMANDS) that are read of it.

    `start`: the first attended token of each sequence, which is what CLS pooling takes there. Any other
    pooling, and any module or subclass not known here, reads all attended tokens; expanded queries read
    their padding too. Empty unless sentence-transformers is loaded.
    """
    found: dict[int, str] = {}
    if "sentence_transformers" not in sys.modules:
        return found
    for module in model.modules():
        if _is(module, "SentenceTransformer"):
            reads = "start" if _pools_cls(module) else "attended"
            found |= {id(inside): reads for inside in module.modules()}
    for module in model.modules():
        if _is(module, "Transformer") and getattr(module, "query_expansion", None) is not None:
            found |= {id(inside): "every" for inside in module.modules()}
    return found


def _is(module: Any, name: str) -> bool:
    """Exactly a class of sentence-transformers: a subclass may read more."""
    cls = type(module)
    return cls.__name__ == name and cls.__module__.partition(".")[0] == "sentence_transformers"


def _pools_cls(model: Any) -> bool:
    """Whether nothing but CLS pooling reads the tokens. Without the prompt it would take a later token."""
    modules = list(model.children())
    if len(modules) < 2:
        return False
    encoder, pooling, *after = modules
    return (
        _is(encoder, "Transformer")
        and _is(pooling, "Pooling")
        and getattr(pooling, "pooling_mode", None) == "cls"
        and pooling.include_prompt
        and all(
            any(_is(module, name) for name in _AFTER)
            and getattr(module, "module_input_name", "sentence_embedding") == "sentence_embedding"
            for module in after
        )
    )
