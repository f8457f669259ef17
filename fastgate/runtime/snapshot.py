"""An encoder's modules as they were at one moment, and whether they are the same still.

To look at each module takes a millisecond. To see that nothing has changed takes some microseconds, because
what could change is kept in flat lists, which C code compares. Numbers and values (rates of dropout, eps, the
weights' own values) are not compared: they are read at each use.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

from fastgate.nn.hooks import hook_dicts
from fastgate.nn.protocols import BertLikeEncoder
from fastgate.runtime.layer import Layer

# Attributes that decide whether a module is plain, and may be set at any time.
DECISIVE_ATTRIBUTES = (
    "forward",
    "act",
    "approximate",
    "intermediate_act_fn",
    "normalized_shape",
    "max_norm",
    "scale_grad_by_freq",
    "sparse",
)
# Modules whose forward is known: what they compute is in their parameters and a few numbers.
KNOWN_PACKAGES = ("torch.nn.modules.", "transformers.models.", "transformers.activations", "fastgate.")


class EncoderSnapshot:
    """The modules of an encoder.

    embeddings, layer_stack: its two parts. layers: its layers. tables: of words, positions and types, where
    ids may be gathered from them. Empty: the embeddings are called as a module. modules, tensors: all of
    them, once each.
    """

    def __init__(self, encoder: BertLikeEncoder, tables: tuple[Any, ...] = ()) -> None:
        self.embeddings: Any = encoder.embeddings
        self.layer_stack: Any = encoder.encoder
        self.tables = tables
        self.layers = tuple(Layer.of(layer) for layer in encoder.encoder.layer)
        self.removed = tuple(i for i, layer in enumerate(self.layers) if layer.query is None)
        roots: tuple[Any, ...] = (self.embeddings, self.layer_stack)
        self.modules: list[nn.Module] = list(dict.fromkeys(m for root in roots for m in root.modules()))
        self._size = len(encoder.__dict__)  # the dictionary itself leads here, and would keep itself alive
        self._attributes = [m.__dict__ for m in self.modules]
        self._attribute_counts = list(map(len, self._attributes))
        self._types = list(map(type, self.modules))
        self._classes: list[Any] = list(dict.fromkeys(self._types))
        self._forwards = [kind.forward for kind in self._classes]
        members: list[list[dict[str, Any]]] = [[m._modules, m._parameters, m._buffers] for m in self.modules]
        self._members = [members_of for members_of in chain.from_iterable(members) if members_of]
        self._values = list(_flat(self._members))
        self.tensors: list[Tensor] = list(dict.fromkeys(t for t in self._values if isinstance(t, Tensor)))
        self.tensor_types = list(map(type, self.tensors))
        hooks = [hooks_of for m in self.modules for hooks_of in hook_dicts(m)]
        self._without_hooks = [hooks_of for hooks_of in hooks if not hooks_of]
        self._with_hooks = [(hooks_of, tuple(hooks_of)) for hooks_of in hooks if hooks_of]
        self._decisive = [
            (attributes, name, attributes[name])
            for attributes in self._attributes
            for name in DECISIVE_ATTRIBUTES
            if name in attributes
        ]

    def matches(self, encoder: Any) -> bool:
        """Whether `encoder` is made of the same things still."""
        attributes, modules = encoder.__dict__, encoder._modules
        values = list(_flat(self._members))
        return (
            self.embeddings is modules["embeddings"]
            and self.layer_stack is modules["encoder"]
            and self._size == len(attributes)
            and len(values) == len(self._values)
            and all(map(is_, values, self._values))
            and list(map(len, self._attributes)) == self._attribute_counts
            and list(map(type, self.modules)) == self._types
            and list(map(type, self.tensors)) == self.tensor_types
            and not any(self._without_hooks)
            and all(tuple(hooks) == keys for hooks, keys in self._with_hooks)
            and all(attributes_of.get(name) is value for attributes_of, name, value in self._decisive)
            and all(kind.forward is own for kind, own in zip(self._classes, self._forwards, strict=True))
        )


def _flat(dicts: Iterable[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(map(dict.values, dicts))
