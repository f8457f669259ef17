"""What a model of sentence-transformers reads of the encoder inside it. Known by name; never imported."""

from __future__ import annotations

import inspect
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


class EncodeAround:
    """`encode` of a model of sentence-transformers whose encoder computes one row a sequence.

    A call that reads more, because it asks for the tokens or the pooling was changed, has all attended rows
    computed from then on.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encode: Any = type(self.model).encode  # type: ignore[attr-defined]
        if self._reads_more(encode, args, kwargs):
            for module in self.model.modules():
                runtime = module.__dict__.get("fastgate_runtime")
                if runtime is not None and runtime.demand in ("first", "start"):
                    runtime.asked = "all"
        return encode(self.model, *args, **kwargs)

    def _reads_more(self, encode: Any, args: Any, kwargs: Any) -> bool:
        names = list(inspect.signature(encode).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        return given.get("output_value", "sentence_embedding") != "sentence_embedding" or not _pools_cls(
            self.model
        )


def watch(model: nn.Module) -> None:
    """Put an EncodeAround on every model of sentence-transformers in `model` that pools one row."""
    for module in model.modules():
        if _is(module, "SentenceTransformer") and _pools_cls(module):
            module.__dict__.setdefault("encode", EncodeAround(module))


def unwatch(model: nn.Module) -> None:
    """Take the EncodeArounds away."""
    for module in model.modules():
        if isinstance(module.__dict__.get("encode"), EncodeAround):
            del module.__dict__["encode"]


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
