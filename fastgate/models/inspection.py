"""What an encoder is made of, looked at once: which modules are plain, and which must be called or refused.

The encoder runs fused ops in place of modules, so before each forward it must know that nobody has changed
them (runtime/snapshot.py).
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.errors import Unsupported, format_error
from fastgate.models import compat
from fastgate.models.architectures import FAMILIES, Family, base_class, verify_modules
from fastgate.nn.hooks import foreign_hooks, is_itself, replaced_method
from fastgate.nn.plain_modules import PLAIN_TENSORS, dropout_rate, is_plain, is_plain_dropout, is_plain_norm
from fastgate.ops import torch_compat
from fastgate.runtime.snapshot import KNOWN_PACKAGES, EncoderSnapshot

_REMEDY = "run the model as transformers does (fastgate.unpatch)"


class Inspection(EncoderSnapshot):
    """An encoder as it was found.

    Raises Unsupported for modules that are neither plain nor called, and for weights that are elsewhere.
    """

    def __init__(self, encoder: Any) -> None:
        self.family = _family(encoder)
        verify_modules("forward", encoder, self.family)
        self.config = encoder.config
        self.attention_function = compat.attention_of(encoder.config, self.family.package)
        _verify_attention(*self.attention_function)
        super().__init__(encoder, _tables(encoder.embeddings))
        self.hooked_tables = [table for table in self.tables if foreign_hooks(table)]
        self.token_type_buffer = encoder.embeddings._buffers.get("token_type_ids")
        self.token_type_changes = _changes_of(self.token_type_buffer)
        verify_places(encoder)

    @property
    def gathers(self) -> bool:
        """Whether embed_norm may stand for the embeddings now.

        The tables are of one dtype, where a hook has an output require a gradient it does so anyway, and
        dropout leaves something.
        """
        return (
            len({table.weight.dtype for table in self.tables}) == 1
            and all(table.weight.requires_grad for table in self.hooked_tables)
            and dropout_rate(self.embeddings.dropout) < 1.0
        )

    def matches(self, encoder: Any) -> bool:
        """Whether `encoder` is made of the same things still."""
        return (
            self.config is encoder.__dict__["config"]
            and super().matches(encoder)
            and compat.attention_of(self.config, self.family.package) == self.attention_function
            and _changes_of(self.token_type_buffer) == self.token_type_changes
        )


class Inspections:
    """The last inspection of an encoder, made anew when the encoder has changed."""

    def __init__(self) -> None:
        self.last: Inspection | None = None

    def of(self, encoder: Any) -> Inspection:
        """The inspection of `encoder` as it is now.

        Raises Unsupported as Inspection does, and for hooks that torch calls for every module.
        """
        if any(torch_compat.GLOBAL_HOOKS):
            _refuse_global_hooks()
        inspection = self.last
        if inspection is None or not inspection.matches(encoder):
            inspection = self.last = Inspection(encoder)
        return inspection

    def __deepcopy__(self, memo: Any) -> Inspections:
        return Inspections()

    def __reduce__(self) -> tuple[type[Inspections], tuple[()]]:
        return Inspections, ()


def _family(encoder: nn.Module) -> Family:
    package = base_class(encoder).__module__
    return next(family for family in FAMILIES if family.module.__name__ == package)


def _verify_attention(name: str, function: Any) -> None:
    """Refuse an attention function of the user's own: fastgate would compute the usual one in its place."""
    if "/" in name:  # kernels of the hub, which compute the usual
        return
    if not getattr(function, "__module__", "").startswith("transformers."):
        got = f"{name!r}, which is {getattr(function, '__qualname__', function)!r}"
        wanted = "an attention of transformers"
        remedy = f"call model.set_attn_implementation('sdpa'), or {_REMEDY}"
        raise Unsupported(format_error("forward", "config._attn_implementation", got, wanted, remedy))


def _changes_of(buffer: Tensor | None) -> int | None:
    """How often a buffer was changed in place, where torch counts that."""
    return None if buffer is None else torch_compat.version_of(buffer)


def _refuse_global_hooks() -> None:
    hook = next(hook for kind in torch_compat.GLOBAL_HOOKS for hook in kind.values())
    got = getattr(hook, "__qualname__", type(hook).__name__)
    wanted = "none, as fastgate calls few of the modules"
    remedy = f"remove the hook, or {_REMEDY}"
    raise Unsupported(
        format_error("forward", "hook on all modules (torch.nn.modules.module)", got, wanted, remedy)
    )


def _tables(embeddings: Any) -> tuple[Any, ...]:
    """The tables of words, positions and types, if embed_norm may stand for the embeddings: their own class,
    and in it nothing but tables to gather rows from, a plain LayerNorm and a plain Dropout. Else none."""
    known = [family.hf_class("Embeddings") for family in FAMILIES]
    if type(embeddings) not in known or not is_itself(embeddings):
        return ()
    inside = embeddings._modules
    tables = tuple(inside[f"{name}_embeddings"] for name in ("word", "position", "token_type"))
    plain = (
        all(_only_gathers(table) for table in tables)
        and not any(t.max_norm is not None or t.scale_grad_by_freq or t.sparse for t in tables)
        and tables[2].padding_idx is None
        and _are_zeros(embeddings._buffers.get("token_type_ids"))
        and is_plain_norm(inside["LayerNorm"])
        and is_plain_dropout(inside["dropout"])
    )
    return tables if plain else ()


def _are_zeros(types: Tensor | None) -> bool:
    """Whether every token is of type 0 where a call does not say, as transformers makes it."""
    return types is None or types.is_meta or not bool(types.any())


def _only_gathers(table: Any) -> bool:
    """An Embedding and nothing more, but for the hook that transformers adds for gradient checkpointing: it
    has the output require a gradient."""
    if is_plain(table, nn.Embedding):
        return True
    hooks = foreign_hooks(table)
    return (
        type(table) is nn.Embedding
        and type(table._parameters.get("weight")) in PLAIN_TENSORS
        and not replaced_method(table)
        and len(hooks) == len(table._forward_hooks)
        and all(compat.requires_gradients(hook) for hook in hooks)
    )


def verify_places(encoder: Any) -> None:
    """Refuse weights that fastgate reads and that are not there, or on another device than the rest."""
    name = base_class(encoder).__name__
    first: tuple[str, torch.device] | None = None
    for place, module in encoder.named_modules():
        if place.partition(".")[0] not in ("embeddings", "encoder"):
            continue
        if not type(module).__module__.startswith(KNOWN_PACKAGES) or not is_itself(module):
            continue  # it is called, and what it is, or was put around it, knows where the weights are
        for key, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is None or type(tensor) not in PLAIN_TENSORS:
                continue
            path = f"{name}.{place}.{key}"
            if tensor.is_meta:
                remedy = "load the weights, or move the model with model.to_empty and load_state_dict"
                raise Unsupported(
                    format_error("forward", path, "no values (device meta)", "a weight", remedy)
                )
            if first is None:
                first = path, tensor.device
            elif tensor.device != first[1]:
                got, wanted = f"a weight on {tensor.device}", f"{first[1]}, as {first[0]}"
                remedy = f"move the whole encoder to one device, or {_REMEDY}"
                raise Unsupported(format_error("forward", path, got, wanted, remedy))
