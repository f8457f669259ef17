"""Where BERT, RoBERTa and their kin keep embeddings, layers and heads, and which rows each head reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from .errors import Unsupported, say

# Rows a head reads. first: token 0 of each sequence. attended: what the mask keeps. labelled: rows with a
# label in training, attended ones otherwise. every: padding too, as the softmax of question answering does.
# (sentence.py has one more, start: the first attended token of each sequence.)
DEMANDS = {
    "Model": "attended",
    "ForSequenceClassification": "first",
    "ForMultipleChoice": "first",
    "ForNextSentencePrediction": "first",
    "ForTokenClassification": "labelled",
    "ForMaskedLM": "labelled",
    "ForPreTraining": "labelled",
    "ForQuestionAnswering": "every",
}


@dataclass(frozen=True)
class Family:
    """A family of transformers: its package, the prefix of its classes, the attribute of its heads."""

    package: str
    prefix: str
    attribute: str

    @property
    def module(self) -> Any:
        return import_module(f"transformers.models.{self.package}.modeling_{self.package}")

    def hf_class(self, name: str) -> type[nn.Module]:
        """The class of transformers, e.g. `hf_class("Layer")` is BertLayer."""
        found: type[nn.Module] = getattr(self.module, self.prefix + name)
        return found

    def heads(self) -> dict[str, str]:
        """Class name -> demand, for the heads this family has."""
        return {self.prefix + n: d for n, d in DEMANDS.items() if hasattr(self.module, self.prefix + n)}


FAMILIES = (
    Family("bert", "Bert", "bert"),
    Family("roberta", "Roberta", "roberta"),
    Family("xlm_roberta", "XLMRoberta", "roberta"),
    Family("camembert", "Camembert", "roberta"),
)


@dataclass
class Found:
    """An encoder inside a model: the module, its family, the head above it and what that reads (or None)."""

    encoder: nn.Module
    family: Family
    reads: str | None
    head: nn.Module | None


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class of transformers behind a module, swapped or not."""
    cls = type(module)
    return cls.__mro__[1] if "fastgate_demand" in cls.__dict__ else cls


def find_encoders(model: nn.Module) -> Iterator[Found]:
    """Every encoder of a known family in `model`, patched or not, each once."""
    heads: dict[int, nn.Module] = {}
    for module in model.modules():
        for family in FAMILIES:
            known = base_class(module)
            if known.__module__ == family.module.__name__ and known.__name__ in family.heads():
                if known.__name__ != family.prefix + "Model":
                    heads[id(getattr(module, family.attribute))] = module
                else:
                    head = heads.get(id(module))
                    reads = None if head is None else family.heads()[base_class(head).__name__]
                    yield Found(module, family, reads, head)


def verify(found: Found) -> None:
    """Refuse, with the reason and the way out, an encoder fastgate would not run as transformers does."""
    encoder, family = found.encoder, found.family
    config: Any = encoder.config
    name = base_class(encoder).__name__
    if getattr(config, "is_decoder", False):
        raise Unsupported(
            say("patch", f"{name}.config.is_decoder", True, "an encoder", "load it with is_decoder=False")
        )
    if getattr(config, "add_cross_attention", False):
        raise Unsupported(
            say(
                "patch",
                f"{name}.config.add_cross_attention",
                True,
                "self-attention only",
                "load it with add_cross_attention=False",
            )
        )
    if getattr(config, "is_causal", False):
        raise Unsupported(
            say(
                "patch", f"{name}.config.is_causal", True, "attention both ways", "leave this model unpatched"
            )
        )
    expected = {"embeddings": "Embeddings", "encoder": "Encoder"}
    for attribute, suffix in expected.items():
        _expect(f"{name}.{attribute}", getattr(encoder, attribute), family.hf_class(suffix))
    _expect(f"{name}.embeddings.LayerNorm", encoder.embeddings.LayerNorm, nn.LayerNorm)  # type: ignore[union-attr]
    for i, layer in enumerate(encoder.encoder.layer):  # type: ignore[union-attr, arg-type]
        where = f"{name}.encoder.layer.{i}"
        for path, suffix in LAYER_MODULES.items():
            _expect(f"{where}.{path}".rstrip("."), layer.get_submodule(path), family.hf_class(suffix))
        for path in ("attention.output.LayerNorm", "output.LayerNorm"):
            _expect(f"{where}.{path}", layer.get_submodule(path), nn.LayerNorm)


# Modules of a layer whose forward fastgate stands in for, and the class each must be.
LAYER_MODULES = {
    "": "Layer",
    "attention": "Attention",
    "attention.self": "SelfAttention",
    "attention.output": "SelfOutput",
    "intermediate": "Intermediate",
    "output": "Output",
}


def _expect(where: str, module: Any, cls: type) -> None:
    if type(module) is not cls and not getattr(type(module), "fastgate_removed", False):
        raise Unsupported(
            say(
                "patch",
                where,
                type(module).__name__,
                cls.__name__,
                "undo the replacement before fastgate.patch, or leave this model unpatched",
            )
        )
    reject_hooks(where, module)


def is_untouched(module: nn.Module) -> bool:
    """No forward hooks of any kind, no replaced forward: nothing that reject_hooks would look at."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def reject_hooks(where: str, module: nn.Module) -> None:
    """Refuse hooks that would never run. transformers' own recording hooks are exempt."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    foreign = [
        h for h in hooks if not getattr(h, "__qualname__", "").startswith("install_output_capuring_hook")
    ]
    if foreign or "forward" in module.__dict__:
        raise Unsupported(
            say(
                "fastgate",
                f"hook on {where}",
                getattr(foreign[0], "__qualname__", "a hook") if foreign else "a replaced forward",
                "none, as this module's own forward does not run",
                "remove the hook, or call fastgate.unpatch(model) first",
            )
        )


def activation(layer: Any) -> Any:
    """The activation between the two products of the feed-forward part."""
    return layer.intermediate.intermediate_act_fn
