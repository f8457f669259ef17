"""The private names of transformers that fastgate uses, and the check that the installed libraries have them.

No other module of fastgate names them, with two exceptions: nn/transformers_names.py has those that packages
without transformers need, and two modules named `trainer_compat` have those of its Trainer. Private names of
torch are in ops/torch_compat.py. `check`, which `patch` calls, looks all of them up once per process. So a
library that has renamed one gives one clear error, and no wrong result.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from fastgate.errors import Unsupported, format_error
from fastgate.nn import transformers_names
from fastgate.ops import torch_compat
from fastgate.ops.torch_compat import MissingName, look_up

# What is tested, as in pyproject.toml.
TESTED = {"transformers": ">=5.23,<6", "accelerate": ">=1.1", "torch": ">=2.11"}
# A package of transformers -> the prefix of its classes.
PREFIXES = {"bert": "Bert", "roberta": "Roberta", "xlm_roberta": "XLMRoberta", "camembert": "Camembert"}
# The classes of an encoder's parts, without the prefix.
CLASSES = (
    "Model",
    "Embeddings",
    "Encoder",
    "Layer",
    "Attention",
    "SelfAttention",
    "SelfOutput",
    "Intermediate",
    "Output",
    "Pooler",
)
# Attributes of a layer and of embeddings that are read by name; nn/protocols.py has their types.
LAYER_ATTRIBUTES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.self.dropout",
    "attention.self.num_attention_heads",
    "attention.self.attention_head_size",
    "attention.self.scaling",
    "attention.output.dense",
    "attention.output.dropout",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "intermediate.intermediate_act_fn",
    "output.dense",
    "output.dropout",
    "output.LayerNorm",
    transformers_names.CHECKPOINTING_FLAG,
)
EMBEDDING_ATTRIBUTES = (
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "LayerNorm",
    "dropout",
    "position_ids",
)
# Of embeddings that count positions from the padding on: two methods and an attribute.
_IDS_FROM_TOKENS = "create_position_ids_from_input_ids"
_IDS_FROM_EMBEDS = "create_position_ids_from_inputs_embeds"
_PADDING = "padding_idx"

# The entry of a config that names the file of the weights: transformers refuses a name that is no file.
WEIGHTS_ENTRY = "transformers_weights"
# The method of an encoder that makes its masks; fastgate never calls it.
MASK_METHOD = "_create_attention_masks"
_ATTENTION_ENTRY = "_attn_implementation_internal"
_GRADIENT_HOOK = "make_inputs_require_grads"
_TIED_NAMES = "all_tied_weights_keys"
_HAS_ADAPTERS = "_hf_peft_config_loaded"
_MODEL_MAPPING = "_model_mapping"
_GELU = f"{transformers_names.GELU_MODULE}.{transformers_names.GELU_CLASS}"
_NAMES = (
    transformers_names.OUTPUT_CAPTURING,
    _GELU,
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get",
    "transformers.modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions",
    "transformers.modeling_outputs.MaskedLMOutput",
    "transformers.models.bert.modeling_bert.BertForPreTrainingOutput",
    "transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING.register",
    f"transformers.AutoModel.{_MODEL_MAPPING}.register",
    f"transformers.PreTrainedModel.{_HAS_ADAPTERS}",
    "transformers.PreTrainedModel.tie_weights",
    "transformers.PreTrainedConfig.__post_init__",
    "transformers.PreTrainedConfig.validate",
)
# Functions of transformers -> the name that they give a hook, or read from a config or a module.
_MENTIONS = {
    "transformers.PreTrainedModel.enable_input_require_grads": _GRADIENT_HOOK,
    "transformers.PreTrainedModel._set_gradient_checkpointing": transformers_names.CHECKPOINTING_FUNCTION,
    "transformers.PreTrainedModel.from_pretrained": WEIGHTS_ENTRY,
    "transformers.PreTrainedModel.post_init": _TIED_NAMES,
    "transformers.PreTrainedConfig._attn_implementation": _ATTENTION_ENTRY,
}


# -- the check


@functools.cache
def check() -> None:
    """Refuse installed libraries that lack a name fastgate uses; nothing happens at later calls.

    Raises Unsupported, naming the library, its version and what it lacks.
    """
    names = [*_missing_in_transformers(), *torch_compat.missing()]
    if not names:
        return
    libraries = list(dict.fromkeys(name.partition(".")[0] for name in names))
    got = " and ".join(f"{library} {_installed(library)}" for library in libraries)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    wanted = f"one that has {', '.join(names[:3])}{more}, which fastgate uses"
    ranges = " ".join(f'"{library}{TESTED[library]}"' for library in libraries)
    remedy = f"install a version that fastgate is tested with (constraints.txt; pip install {ranges})"
    raise Unsupported(format_error("patch", "installed libraries", got, wanted, remedy))


def _installed(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "(of unknown version)"


def _missing_in_transformers() -> Iterator[str]:
    for path in _NAMES:
        if isinstance(look_up(path), MissingName):
            yield path
    gelu = look_up(_GELU)
    if not isinstance(gelu, MissingName) and not hasattr(gelu(), transformers_names.GELU_FUNCTION):
        yield f"{_GELU}().{transformers_names.GELU_FUNCTION}"
    for path, name in _MENTIONS.items():
        if not _mentions(look_up(path), name):
            yield f"{path} with {name}"
    for package, prefix in PREFIXES.items():
        yield from _missing_in_family(package, prefix)


def _mentions(function: Any, name: str) -> bool:
    """Whether the code of a function, or of one defined in it, has the name, as an attribute or as text."""
    function = getattr(function, "fget", function)  # of a property
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    codes = [getattr(getattr(function, "__func__", function), "__code__", None)]
    while codes:
        code = codes.pop()
        if code is None:
            continue
        if name == code.co_name or name in code.co_names or name in code.co_varnames:
            return True
        if name in code.co_consts:
            return True
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return False


def _missing_in_family(package: str, prefix: str) -> Iterator[str]:
    module_name = f"transformers.models.{package}.modeling_{package}"
    try:
        module = modeling_module(package)
    except ImportError:
        yield module_name
        return
    classes = [name for name in CLASSES if not hasattr(module, prefix + name)]
    yield from (f"{module_name}.{prefix}{name}" for name in classes)
    if not hasattr(module, "eager_attention_forward"):
        yield f"{module_name}.eager_attention_forward"
    if classes:
        return
    model = getattr(module, prefix + "Model")
    if not hasattr(model, MASK_METHOD):
        yield f"{module_name}.{prefix}Model.{MASK_METHOD}"
    sizes = {
        "vocab_size": 3,
        "hidden_size": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 2,
        "max_position_embeddings": 4,
        "type_vocab_size": 1,
    }
    config = model.config_class(**sizes)
    for name, attributes in (("Layer", LAYER_ATTRIBUTES), ("Embeddings", EMBEDDING_ATTRIBUTES)):
        with torch.device("meta"):
            part = getattr(module, prefix + name)(config)
        paths = (path for path in attributes if not _has(part, path))
        yield from (f"{module_name}.{prefix}{name}().{path}" for path in paths)
        if name == "Embeddings" and package != "bert":
            methods = (_IDS_FROM_TOKENS, _IDS_FROM_EMBEDS, _PADDING)
            yield from (f"{module_name}.{prefix}{name}().{path}" for path in methods if not _has(part, path))


def _has(module: nn.Module, path: str) -> bool:
    value: Any = module
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


# -- what other modules call


@functools.cache
def modeling_module(package: str) -> ModuleType:
    """The module of transformers with the classes of a family, such as `bert`."""
    return import_module(f"transformers.models.{package}.modeling_{package}")


def attention_of(config: Any, package: str) -> tuple[str, Any]:
    """The name of the attention that a config asks for, and the function that transformers calls for it."""
    name = config.__dict__.get(_ATTENTION_ENTRY) or "eager"
    if name == "eager":
        return name, modeling_module(package).eager_attention_forward
    return name, ALL_ATTENTION_FUNCTIONS.get(name)


@functools.cache
def cache_arguments() -> dict[str, int]:
    """The argument that says an encoder has no cache, by its name in the embeddings of this transformers."""
    parameters = inspect.signature(modeling_module("bert").BertEmbeddings.forward).parameters
    return {name: 0 for name in ("past_key_values_length", "cache_length") if name in parameters}


def requires_gradients(hook: Any) -> bool:
    """Whether a hook is that of `enable_input_require_grads`, which has an output require a gradient."""
    return str(getattr(hook, "__qualname__", "")).endswith(_GRADIENT_HOOK)


def position_ids_of(embeddings: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """(1 or batch, at least length) int64: the positions that transformers gives the tokens of a call.

    input_ids: (batch, length). inputs_embeds: (batch, length, hidden), where there are no ids.
    """
    positions: Tensor
    if not hasattr(embeddings, _IDS_FROM_TOKENS):
        length = (inputs_embeds if input_ids is None else input_ids).shape[1]  # type: ignore[union-attr]
        positions = embeddings.position_ids[:, :length]
    elif input_ids is not None:
        positions = getattr(embeddings, _IDS_FROM_TOKENS)(input_ids, getattr(embeddings, _PADDING))
    else:
        positions = getattr(embeddings, _IDS_FROM_EMBEDS)(inputs_embeds, getattr(embeddings, _PADDING))
    return positions


def tied_names(model: nn.Module) -> dict[str, str]:
    """Name of a tied tensor -> the name under which transformers saves it."""
    return dict(getattr(model, _TIED_NAMES, None) or {})


def has_adapters(model: nn.Module) -> bool:
    """Whether transformers has loaded adapters of PEFT into the model."""
    return bool(getattr(model, _HAS_ADAPTERS, False))


def auto_model_mappings() -> Iterator[Any]:
    """Of each AutoModel class, the mapping from a config class to a model class."""
    for name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), _MODEL_MAPPING, None)
        if name.startswith("AutoModel") and mapping is not None:
            yield mapping


ALL_ATTENTION_FUNCTIONS: Any = look_up("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS")
TOKENIZER_MAPPING: Any = look_up("transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING")
EncoderOutput: Any = look_up("transformers.modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions")
MaskedLMOutput: Any = look_up("transformers.modeling_outputs.MaskedLMOutput")
PreTrainingOutput: Any = look_up("transformers.models.bert.modeling_bert.BertForPreTrainingOutput")
