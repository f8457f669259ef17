"""What a captured graph or a program has taken from an encoder, and whether the encoder still has it.

A graph reads the memory that parameters had when it was captured, and runs the steps that modules had then;
a program holds the parameters. So before each use everything is compared that a step is made from: which
modules stand where, of which class, with hooks or not; which parameters, at which address, of which dtype and
strides; the numbers that are handed to kernels. Values are not: an update in place is read by the next use.
For the 199 parameters and 227 modules of BERT-base that is about 0.15 ms of the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat
from operator import attrgetter, contains, is_
from typing import Any

import torch
from torch import Tensor, nn

# Modules whose forward is known: what they compute is in their parameters and the numbers below.
KNOWN = ("torch.nn.modules.", "transformers.models.", "transformers.activations", "fastgate.")
NUMBERS = (
    "eps",
    "scaling",
    "num_attention_heads",
    "intermediate_act_fn",
    "act",
    "approximate",
    "padding_idx",
    "packed",
)
_dtype, _stride = attrgetter("dtype"), Tensor.stride


class Fingerprint:
    """An encoder's embeddings and layers as they are now. refusal: why nothing can stand for them, or ""."""

    def __init__(self, encoder: Any) -> None:
        self.roots = (encoder.embeddings, encoder.encoder)
        self.modules: list[nn.Module] = [m for root in self.roots for m in root.modules()]
        self.states = [m.__dict__ for m in self.modules]
        self.hooks = [h for m in self.modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.droppers = [m for m in self.modules if isinstance(m, nn.modules.dropout._DropoutNd)]
        self.dicts: list[list[dict[str, Any]]] = [
            [m._modules for m in self.modules],
            [m._parameters for m in self.modules],
            [m._buffers for m in self.modules],
        ]
        self.counts = list(map(len, chain(*self.dicts)))
        self.full = [of for of in chain(*self.dicts) if of]
        self.there = list(_flat(self.full))
        self.tensors: list[Tensor] = [t for t in _flat(chain(*self.dicts[1:])) if t is not None]
        self.numbers = [(m.__dict__, name) for m in self.modules for name in NUMBERS if name in m.__dict__]
        self.facts = self._facts()
        self.refusal = self._refusal()

    def holds(self, encoder: Any) -> bool:
        """Whether `encoder` is made of the same things still."""
        if self.roots[0] is not encoder.embeddings or self.roots[1] is not encoder.encoder:
            return False
        if list(map(len, chain(*self.dicts))) != self.counts:
            return False
        return all(map(is_, _flat(self.full), self.there)) and self._facts() == self.facts

    def drops(self) -> bool:
        """Whether a Dropout is at work: one in training, whatever the encoder is in."""
        return any(map(attrgetter("training"), self.droppers))

    def _facts(self) -> tuple[Any, ...]:
        return (
            list(map(type, self.modules)),
            any(self.hooks) or any(map(contains, self.states, repeat("forward"))),
            list(map(Tensor.data_ptr, self.tensors)) if not self._odd() else None,
            list(map(_dtype, self.tensors)),
            list(map(_stride, self.tensors)),
            [of[name] for of, name in self.numbers],
        )

    def _odd(self) -> bool:
        return any(kind not in (Tensor, nn.Parameter) for kind in set(map(type, self.tensors)))

    def _refusal(self) -> str:
        for module in self.modules:
            kind = type(module)
            if not kind.__module__.startswith(KNOWN):
                return f"a {kind.__name__} of {kind.__module__} inside"
        if self.facts[1]:
            return "hooks, or a replaced forward"
        if self._odd():
            return "parameters of a class of their own"
        if len({t.device for t in self.tensors}) != 1:
            return "no parameters, or on several devices"
        return ""

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


def _flat(dicts: Iterable[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(map(dict.values, dicts))
