"""The memory and the numbers that a captured graph or a program has taken from an encoder, and whether they
are the encoder's still.

A graph reads the memory that parameters had when it was captured, and runs the steps that modules had then;
a program holds the parameters. So before each use it is compared what a step is made from, beside what the
inspection compares: each parameter's address, dtype and strides; the numbers that are handed to kernels.
Values are not: an update in place is read by the next use.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.models.inspection import KNOWN, Inspection
from fastgate.nn.hooks import foreign_hooks, replaced_method
from fastgate.runtime.layer import PLAIN_TENSORS

NUMBERS = (
    "eps",
    "scaling",
    "attention_head_size",
    "padding_idx",
    "packed",
)
_dtype, _stride = attrgetter("dtype"), Tensor.stride


class ModuleFingerprint:
    """An inspected encoder's memory and numbers as they are now. refusal: why nothing can stand for its
    modules, or ""."""

    def __init__(self, inspection: Inspection) -> None:
        self.inspection = inspection
        modules = inspection.modules
        self.droppers = [m for m in modules if isinstance(m, nn.modules.dropout._DropoutNd)]
        # Attention reads the number of its Dropout, and asks itself whether it trains.
        self.droppers += [layer.at for layer in inspection.layers if layer.query is not None]
        self.tensors = inspection.tensors
        self.numbers = [(m.__dict__, name) for m in modules for name in NUMBERS if name in m.__dict__]
        self.refusal = self._refusal()
        self.facts = self._facts()

    def holds(self, inspection: Inspection) -> bool:
        """Whether the encoder was not inspected anew, and has this memory and these numbers still."""
        return self.inspection is inspection and self._facts() == self.facts

    def drops(self) -> bool:
        """Whether a Dropout is at work: one in training, whatever the encoder is in."""
        return any(map(attrgetter("training"), self.droppers))

    def _facts(self) -> tuple[Any, ...]:
        return (
            None if self.refusal else list(map(Tensor.data_ptr, self.tensors)),
            list(map(_dtype, self.tensors)),
            list(map(_stride, self.tensors)),
            [of[name] for of, name in self.numbers],
        )

    def _refusal(self) -> str:
        for module in self.inspection.modules:
            kind = type(module)
            if not kind.__module__.startswith(KNOWN):
                return f"a {kind.__name__} of {kind.__module__} inside"
            if foreign_hooks(module) or (replaced_method(module) and kind is not nn.ModuleList):
                return "hooks, or a replaced forward"
        if not set(self.inspection.kinds) <= set(PLAIN_TENSORS):
            return "parameters of a class of their own"
        if len({t.device for t in self.tensors}) != 1:
            return "no parameters, or on several devices"
        return ""

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device
