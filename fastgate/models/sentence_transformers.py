"""What a model of sentence-transformers reads of the encoder inside it. Known by name; never imported."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn

from fastgate.nn.choices import OutputRows

# Modules that may follow the pooling. They do not read the tokens, unless `module_input_name` says so.
_MODULES_AFTER_POOLING = ("Dense", "Dropout", "LayerNorm", "Normalize")


def output_rows_by_module(model: nn.Module) -> dict[int, OutputRows]:
    """id of a module inside a sentence-transformers model -> the output rows that are read of it.

    CLS pooling takes `start`, the first attended token of each sequence. Any other pooling, and any module or
    subclass not known here, reads all attended tokens. Expanded queries read their padding too. Empty unless
    sentence-transformers is loaded.
    """
    rows: dict[int, OutputRows] = {}
    if "sentence_transformers" not in sys.modules:
        return rows
    for module in model.modules():
        if _is(module, "SentenceTransformer"):
            reads: OutputRows = "start" if _pools_cls(module) else "attended"
            rows |= {id(inside): reads for inside in module.modules()}
    for module in model.modules():
        if _is(module, "Transformer") and getattr(module, "query_expansion", None) is not None:
            rows |= {id(inside): "every" for inside in module.modules()}
    return rows


class EncodeWrapper:
    """`encode` of a sentence-transformers model whose encoder computes one row per sequence.

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

    def _reads_more(self, encode: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        names = list(inspect.signature(encode).parameters)[1:]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        value = arguments.get("output_value", "sentence_embedding")
        return value != "sentence_embedding" or not _pools_cls(self.model)


def watch(model: nn.Module) -> None:
    """Put an EncodeWrapper on every sentence-transformers model in `model` that pools one row."""
    for module in model.modules():
        if _is(module, "SentenceTransformer") and _pools_cls(module):
            module.__dict__.setdefault("encode", EncodeWrapper(module))


def unwatch(model: nn.Module) -> None:
    """Take the EncodeWrappers away."""
    for module in model.modules():
        if isinstance(module.__dict__.get("encode"), EncodeWrapper):
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
    encoder, pooling, *later = modules
    return (
        _is(encoder, "Transformer")
        and _is(pooling, "Pooling")
        and getattr(pooling, "pooling_mode", None) == "cls"
        and pooling.include_prompt
        and all(
            any(_is(module, name) for name in _MODULES_AFTER_POOLING)
            and getattr(module, "module_input_name", "sentence_embedding") == "sentence_embedding"
            for module in later
        )
    )
