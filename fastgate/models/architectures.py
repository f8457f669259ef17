"""Where BERT, RoBERTa and their kin keep embeddings, layers and heads, and which rows each head reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastgate.errors import Unsupported, format_error
from fastgate.models import compat
from fastgate.nn.choices import OutputRows
from fastgate.nn.hooks import foreign_hooks, replaced_method, shadowed_method
from fastgate.nn.replacement import REPLACEMENTS, Replacement

# A class without its prefix -> the rows it reads. `every` is there for the softmax of question answering,
# which goes over padding too. sentence_transformers.py knows what its models read.
OUTPUT_ROWS: dict[str, OutputRows] = {
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
    """A family of transformers: its package, and the attribute of its heads that is the encoder."""

    package: str
    attribute: str

    @property
    def prefix(self) -> str:
        return compat.PREFIXES[self.package]

    @property
    def module(self) -> ModuleType:
        """The module of transformers that has the classes."""
        return compat.modeling_module(self.package)

    def hf_class(self, name: str) -> type[nn.Module]:
        """The class of transformers, e.g. `hf_class("Layer")` is BertLayer."""
        cls: type[nn.Module] = getattr(self.module, self.prefix + name)
        return cls

    def models(self) -> dict[str, OutputRows]:
        """Class name -> the rows it reads, for the encoder and the heads that this family has."""
        names = {self.prefix + name: rows for name, rows in OUTPUT_ROWS.items()}
        return {name: rows for name, rows in names.items() if hasattr(self.module, name)}


FAMILIES = (
    Family("bert", "bert"),
    Family("roberta", "roberta"),
    Family("xlm_roberta", "roberta"),
    Family("camembert", "roberta"),
)


_COUNT_FROM_PADDING = ("roberta", "xlm_roberta", "camembert")


def longest_row(config: PreTrainedConfig) -> int:
    """The most tokens that a row may have. RoBERTa counts positions from the one after its padding id."""
    positions = int(config.max_position_embeddings)
    if str(config.model_type).removeprefix("fastgate_").replace("-", "_") not in _COUNT_FROM_PADDING:
        return positions
    return positions - int(config.pad_token_id) - 1


@dataclass
class LocatedEncoder:
    """An encoder inside a model: the module, its family, the head above it and the rows that the head reads
    (None without a known head)."""

    encoder: nn.Module
    family: Family
    reads: OutputRows | None
    head: nn.Module | None


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class of transformers behind a module, swapped or not."""
    cls = type(module)
    return cls.__mro__[1] if "fastgate_output_rows" in cls.__dict__ else cls


def find_encoders(model: nn.Module) -> Iterator[LocatedEncoder]:
    """Every encoder of a known family in `model`, patched or not, each once."""
    heads: dict[int, nn.Module] = {}
    for module in model.modules():
        cls = base_class(module)
        family = _family_of(cls)
        if family is None:
            continue
        if cls.__name__ != family.prefix + "Model":
            heads[id(getattr(module, family.attribute))] = module
        else:
            head = heads.get(id(module))
            reads = None if head is None else family.models()[base_class(head).__name__]
            yield LocatedEncoder(module, family, reads, head)


def _family_of(cls: type[nn.Module]) -> Family | None:
    """The family whose encoder or head a class of transformers is."""
    for family in FAMILIES:
        if cls.__module__ == family.module.__name__ and cls.__name__ in family.models():
            return family
    return None


def is_known_class(cls: type[nn.Module]) -> bool:
    """Whether a class is an encoder or a head of transformers that fastgate knows."""
    return _family_of(cls) is not None


def class_named(name: str) -> type[PreTrainedModel] | None:
    """The encoder or head of transformers of this name; None if fastgate knows none."""
    for family in FAMILIES:
        if name in family.models():
            cls: type[PreTrainedModel] = getattr(family.module, name)
            return cls
    return None


# Settings of a config that fastgate has no form for -> what it wants, and the way out.
_REFUSED_SETTINGS = {
    "is_decoder": ("an encoder", "load it with is_decoder=False"),
    "add_cross_attention": ("self-attention only", "load it with add_cross_attention=False"),
    "is_causal": ("attention both ways", "leave this model unpatched"),
}


def verify(located: LocatedEncoder) -> None:
    """Refuse, with the reason and the way out, an encoder fastgate would not run as transformers does."""
    encoder, family = located.encoder, located.family
    name = base_class(encoder).__name__
    for setting, (wanted, remedy) in _REFUSED_SETTINGS.items():
        if getattr(encoder.config, setting, False):
            raise Unsupported(format_error("patch", f"{name}.config.{setting}", True, wanted, remedy))
    if type(encoder) is base_class(encoder) and shadowed_method(encoder):
        # It was bound to the class before: the class that `patch` puts in would never be called.
        where = f"{name}.{shadowed_method(encoder)}"
        remedy = "undo it before fastgate.patch (accelerate: remove_hook_from_module), or do it after"
        raise Unsupported(format_error("patch", where, "a replaced method", f"{name}'s own", remedy))
    verify_modules("patch", encoder, family)


# Modules of a layer whose forward fastgate replaces, and the class each must be.
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
    if compat.MASK_METHOD in encoder.__dict__:
        _refuse_method(where, f"{name}.{compat.MASK_METHOD}")
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
    """Refuse hooks on what is left of a pruned attention, and on its replacement."""
    if hasattr(attention.self, "fastgate_removed"):
        for name in ("dropout", "dense"):
            _reject_hooks(where, f"{path}.output.{name}", getattr(attention.output, name))
    if hasattr(attention, "replacement"):
        kind = getattr(type(attention.replacement), "kind", "")
        expected = REPLACEMENTS.get(kind, Replacement)  # a subclass by a user is none of them
        _expect(where, f"{path}.replacement", attention.replacement, expected)


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
