"""Models of sentence-transformers in training: their losses call the model themselves, once or more a step.

Known by name; never imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from fastgate.pruning.pruner import Pruner
    from fastgate.pruning.recording import Forward


def is_sentence_model(model: nn.Module) -> bool:
    """Whether `model` is a SentenceTransformer, a CrossEncoder or a kin: called with one dict of features."""
    return any(
        cls.__module__.partition(".")[0] == "sentence_transformers" and cls.__name__ == "BaseModel"
        for cls in type(model).__mro__
    )


@contextmanager
def watching(model: nn.Module, pruner: Pruner) -> Iterator[list[Forward]]:
    """While open, every forward of `model` runs on what `pruner.prepare` makes of its features; yields the
    list that `pruner.take` fills with them. Forwards without gradient are in it too.

    Some losses (MatryoshkaLoss, AdaptiveLayerLoss) replace forwards while they run, to cut outputs short or
    to give those of an earlier one again: such outputs are left out, and so are forwards that did not run the
    encoder.
    """
    forwards: list[Forward] = []
    features: list[dict[str, Any]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs["input"]
        prepared = pruner.prepare(inputs)
        if prepared is not inputs:
            inputs.update(prepared)
        features.append(dict(inputs))  # the modules write their outputs into the dict they are given

    def after(module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        replaced = any("forward" in part.__dict__ for part in (module, *module.children()))
        taken = pruner.take({} if replaced else outputs, features.pop())
        if taken is not None:
            forwards.append(taken)

    hooks = (model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after))
    try:
        yield forwards
    finally:
        for hook in hooks:
            hook.remove()
