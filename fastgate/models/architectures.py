"""Where BERT, RoBERTa and their kin keep embeddings, layers and heads, and which rows each head reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from torch import nn

from fastgate.errors import Unsupported, format_error
from fastgate.nn.hooks import foreign_hooks, replaced_method, shadowed_method
from fastgate.nn.replacement import Replacement

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
            format_error(
                "patch", f"{name}.config.is_decoder", True, "an encoder", "load it with is_decoder=False"
            )
        )
    if getattr(config, "add_cross_attention", False):
        raise Unsupported(
            format_error(
                "patch",
                f"{name}.config.add_cross_attention",
                True,
                "self-attention only",
                "load it with add_cross_attention=False",
            )
        )
    if getattr(config, "is_causal", False):
        raise Unsupported(
            format_error(
                "patch", f"{name}.config.is_causal", True, "attention both ways", "leave this model unpatched"
            )
        )
    if type(encoder) is base_class(encoder) and shadowed_method(encoder):
        # It was bound to the class before: the class that `patch` puts in would never be called.
        raise Unsupported(
            format_error(
                "patch",
                f"{name}.{shadowed_method(encoder)}",
                "a replaced method",
                f"{name}'s own",
                "undo it before fastgate.patch (accelerate: remove_hook_from_module), or do it after",
            )
        )
    verify_modules("patch", encoder, family)


# Modules of a layer whose forward fastgate stands in for, and the class each must be.
LAYER_MODULES = {
    "": "Layer",
    "attention": "Attention",
    "attention.self": "SelfAttention",
    "attention.output": "SelfOutput",
    "intermediate": "Intermediate",
    "output": "Output",
}
CALLED = "intermediate"  # it reads and makes one row at a time, so it is called where it is not plain


def verify_modules(where: str, encoder: Any, family: Family) -> None:
    """Refuse, by name, a module that never runs as one and is not what transformers made it: the encoder,
    its layers and their parts. Their LayerNorms, Dropouts, Linears and activations, and the embeddings, are
    called where they are not plain.

    where: the call that the error names.
    """
    name = base_class(encoder).__name__
    if "_create_attention_masks" in encoder.__dict__:
        _refuse_method(where, f"{name}._create_attention_masks")
    _expect(where, f"{name}.encoder", encoder.encoder, family.hf_class("Encoder"))
    layers = encoder.encoder.layer
    if type(layers) is not nn.ModuleList:
        _refuse_class(where, f"{name}.encoder.layer", layers, nn.ModuleList)
    for i, layer in enumerate(layers):
        for path, suffix in LAYER_MODULES.items():
            at = f"{name}.encoder.layer.{i}.{path}".rstrip(".")
            module, cls = layer.get_submodule(path), family.hf_class(suffix)
            if path != CALLED:
                _expect(where, at, module, cls)
            elif type(module) is not cls:
                _refuse_class(where, at, module, cls)
        _verify_pruned(where, f"{name}.encoder.layer.{i}.attention", layer.attention)


def _verify_pruned(where: str, path: str, attention: Any) -> None:
    """Refuse hooks on what is left of a pruned attention, and on what stands in its place."""
    if hasattr(attention.self, "fastgate_removed"):
        for name in ("dropout", "dense"):
            _reject_hooks(where, f"{path}.output.{name}", getattr(attention.output, name))
    if hasattr(attention, "replacement"):
        _expect(where, f"{path}.replacement", attention.replacement, Replacement)


def _expect(where: str, path: str, module: Any, cls: type) -> None:
    if type(module) is not cls and not getattr(type(module), "fastgate_removed", False):
        _refuse_class(where, path, module, cls)
    _reject_hooks(where, path, module)


def _refuse_class(where: str, path: str, module: Any, cls: type) -> NoReturn:
    remedy = f"undo the replacement, or {_WAY_OUT}"
    raise Unsupported(format_error(where, path, type(module).__name__, cls.__name__, remedy))


_WAY_OUT = "run the model as transformers does (fastgate.unpatch)"


def _reject_hooks(where: str, path: str, module: nn.Module) -> None:
    """Refuse hooks, and methods in place of the module's own, that would never run."""
    hooks = foreign_hooks(module)
    if hooks:
        wanted = "none, as fastgate never calls this module"
        remedy = f"remove the hook, move it to a LayerNorm, Dropout or Linear, or {_WAY_OUT}"
        named = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
        raise Unsupported(format_error(where, f"hook on {path}", named, wanted, remedy))
    method = replaced_method(module)
    if method:
        _refuse_method(where, f"{path}.{method}")


def _refuse_method(where: str, path: str) -> NoReturn:
    remedy = f"undo the replacement, or {_WAY_OUT}"
    wanted = "none, as fastgate never calls this method"
    raise Unsupported(format_error(where, path, "a replaced method", wanted, remedy))


def activation(layer: Any) -> Any:
    """The activation between the two products of the feed-forward part."""
    return layer.intermediate.intermediate_act_fn
