"""What `load` would build from a config, and where a model differs from it."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastgate.errors import Unsupported, format_error
from fastgate.models.architectures import base_class
from fastgate.models.checkpoint_config import KEY, Layout, is_pruned, plain_config, read_layout
from fastgate.models.handle import get_encoder
from fastgate.models.patching import patch
from fastgate.models.pruning import prune, refuse_adapters
from fastgate.models.swapped_classes import SWAPPED
from fastgate.nn.packed_linear import PackedLinear
from fastgate.nn.replacement import REPLACEMENTS

M = TypeVar("M", bound=nn.Module)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Numbers of a module that a config decides and that no weight shows.
_NUMBERS = ("eps", "num_attention_heads", "attention_head_size", "scaling", "padding_idx")
# Buffers that are not saved, from one of the same shape.
_BUFFERS = {
    "position_ids": lambda like: torch.arange(like.shape[-1], device="cpu").expand(like.shape),
    "token_type_ids": lambda like: torch.zeros(like.shape, dtype=torch.long, device="cpu"),
}
_REMEDY = "undo the change before saving, or save the weights with torch.save(model.state_dict(), path)"


def build(cls: type[M], config: PreTrainedConfig, layout: Layout) -> M:
    """A patched and pruned model of a class of transformers, on the meta device: shapes without values."""
    with torch.device("meta"):
        return arrange(cls(config), layout)


def arrange(model: M, layout: Layout) -> M:
    """Patch and prune a dense model as `layout` says, in place; returns the model."""
    patch(model, demand=layout.demand)
    if len(layout.kept) < get_encoder(model).num_layers:
        prune(model, layout.kept, layout.replacement)
    return model


def fill(model: M, tensors: dict[str, Tensor]) -> M:
    """Give a model that `build` made its weights, on the CPU, and the buffers that are not saved."""
    groups = shared(model.state_dict(keep_vars=True))
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    named = {other: tensor for name, tensor in copies.items() for other in groups[name]}
    model.load_state_dict(named, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, _BUFFERS[name](buffer))
    return model.eval()


def check(model: nn.Module, rebuilt: nn.Module, unused: tuple[str, ...]) -> None:
    """Refuse, by name, what differs from `rebuilt`, the model that `load` would build.

    unused: prefixes of names in `model` that are not saved. Raises Unsupported.
    """
    refuse_adapters("save", model)
    modules, wanted = _modules(model, unused), _modules(rebuilt, unused)
    for name in [*modules, *wanted]:
        got, expected = modules.get(name), wanted.get(name)
        if _kind(got) is not _kind(expected):
            raise Unsupported(format_error("save", name, _named(got), _named(expected), _REMEDY))
        for number in _NUMBERS:
            value, other = getattr(got, number, None), getattr(expected, number, None)
            if value != other:
                raise Unsupported(
                    format_error("save", f"{name}.{number}", value, f"{other}, as in config", _REMEDY)
                )
        _check_buffers(name, got)
    _check_tensors(_tensors(model, unused), _tensors(rebuilt, unused))


def _check_buffers(name: str, module: nn.Module | None) -> None:
    """Refuse other values in buffers that are not saved than those that `fill` gives them."""
    for key in () if module is None else module._non_persistent_buffers_set & _BUFFERS.keys():
        buffer = module._buffers[key]  # type: ignore[union-attr]
        if buffer is None or buffer.is_meta or torch.equal(buffer.cpu(), _BUFFERS[key](buffer)):
            continue
        remedy = f"pass {key} to each call instead"
        raise Unsupported(
            format_error("save", f"{name}.{key}", "other values", "those of transformers", remedy)
        )


def check_hooks(model: nn.Module) -> None:
    """Refuse hooks and replaced forwards, which no file can hold; those of transformers may stay."""
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        foreign = [hook for hook in hooks if not _is_of_a_library(hook)]
        replaced = module.__dict__.get("forward")
        if foreign or (replaced is not None and not _is_of_a_library(replaced)):
            got = "a replaced forward"
            if foreign:
                got = f"the hook {getattr(foreign[0], '__qualname__', foreign[0])}"
            where, remedy = name or type(model).__name__, "remove it to save, and add it again after loading"
            raise Unsupported(format_error("save", where, got, "a module without one", remedy))


def _is_of_a_library(hook: Any) -> bool:
    hook = getattr(hook, "func", hook)  # functools.partial
    package = str(getattr(hook, "__module__", "")).partition(".")[0]
    return package in ("transformers", "accelerate", "torch", "fastgate")


def _modules(model: nn.Module, unused: tuple[str, ...]) -> dict[str, nn.Module]:
    """Name -> module, without replacements: their kind is saved, and their tensors are compared."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if not f"{name}.".startswith(unused) and type(module) not in REPLACEMENTS.values()
    }


def _kind(module: nn.Module | None) -> type[nn.Module] | None:
    """The class that the state dict is of: a Linear's stays what it is when `freeze` packs it."""
    if module is None:
        return None
    return nn.Linear if type(module) is PackedLinear else base_class(module)


def _named(module: nn.Module | None) -> str:
    if module is None:
        return "no such module"
    cls = base_class(module) if type(module) is not PackedLinear else nn.Linear
    return cls.__name__ if cls.__module__.startswith(("torch.nn.modules", "transformers")) else str(cls)


def _tensors(model: nn.Module, unused: tuple[str, ...]) -> dict[str, Any]:
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if not name.startswith(unused)}


def _check_tensors(tensors: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in [*tensors, *wanted]:
        if name not in wanted or name not in tensors:
            got, expected = ("a tensor", "none") if name in tensors else ("none", "a tensor")
            raise Unsupported(format_error("save", name, got, f"{expected}, as the config has it", _REMEDY))
        got, expected = tensors[name], wanted[name]
        if type(got) not in (nn.Parameter, Tensor):
            remedy = "save the model before it is quantised or sharded"
            raise Unsupported(format_error("save", name, type(got).__name__, "an ordinary tensor", remedy))
        if got.device.type == "meta":
            remedy = "load the model without offloading"
            raise Unsupported(
                format_error("save", name, "no values on this device", "the weights in memory", remedy)
            )
        if got.shape != expected.shape:
            shapes = tuple(got.shape), f"{tuple(expected.shape)}, as the config has it"
            raise Unsupported(format_error("save", name, *shapes, _REMEDY))
        if got.dtype != expected.dtype and (got.dtype not in DTYPES or expected.dtype not in DTYPES):
            raise Unsupported(
                format_error("save", name, got.dtype, "float32, bfloat16, float16 or float64", _REMEDY)
            )
    for group, other in _unlike_groups(tensors, wanted):
        got = f"shared by {', '.join(group)}" if len(group) > 1 else "a weight of its own"
        expected = f"shared by {', '.join(other)}" if len(other) > 1 else "a weight of its own"
        remedy = "give each layer its own weights (copy.deepcopy), or set config.tie_word_embeddings as it is"
        raise Unsupported(format_error("save", group[0], got, expected, remedy))


def _unlike_groups(tensors: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[list[str], list[str]]]:
    """Names that are one parameter in one model and not in the other."""
    groups, others = shared(tensors), shared(wanted)
    for name in tensors:
        if groups[name] != others[name]:
            yield groups[name], others[name]


def shared(tensors: dict[str, Any]) -> dict[str, list[str]]:
    """Name -> all names of the same parameter, in the order of the state dict."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        names[id(tensor)].append(name)
    return {name: names[id(tensor)] for name, tensor in tensors.items()}


def _constructor(hf: type[nn.Module]) -> Any:
    """`__init__` of a swapped class: what it makes is patched, and pruned if the config says so."""

    @functools.wraps(hf.__init__)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        plain = plain_config(config)
        hf.__init__(self, plain, *args, **kwargs)
        layout = Layout(tuple(range(plain.num_hidden_layers)))
        if is_pruned(config):
            layout = read_layout(getattr(config, KEY, None), "config.json", plain.num_hidden_layers)
        # A loader of transformers may read any row, whatever the rows were that fastgate.patch was told.
        arrange(self, replace(layout, demand=None if layout.demand == "first" else layout.demand))

    return init


for _hf, _swapped in SWAPPED.items():
    _swapped.__init__ = _constructor(_hf)  # type: ignore[method-assign]
