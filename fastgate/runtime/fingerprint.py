"""The memory and the numbers that a CUDA graph or a compiled plan has taken from an encoder, and whether they
are the encoder's still.

A graph reads the memory that parameters had when it was captured, and runs the steps that modules had then. A
compiled plan holds the parameters. So before each use more is compared than the snapshot compares: each
parameter's address, dtype and strides, and the numbers that are handed to kernels. Values are not compared:
an update in place is read by the next use.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.nn.hooks import foreign_hooks, replaced_method
from fastgate.nn.plain_modules import PLAIN_TENSORS
from fastgate.ops.torch_compat import DropoutBase
from fastgate.runtime.snapshot import KNOWN_PACKAGES, EncoderSnapshot

NUMBER_ATTRIBUTES = (
    "eps",
    "scaling",
    "attention_head_size",
    "padding_idx",
    "packed",
)
_dtype, _stride = attrgetter("dtype"), Tensor.stride


class ModuleFingerprint:
    """An encoder's memory and numbers as they are now.

    refusal: why nothing can stand for its modules, or "".
    """

    def __init__(self, snapshot: EncoderSnapshot) -> None:
        self.snapshot = snapshot
        modules = snapshot.modules
        self._dropouts = [m for m in modules if isinstance(m, DropoutBase)]
        # Attention reads the number of its Dropout, and asks itself whether it trains.
        self._dropouts += [layer.attention for layer in snapshot.layers if layer.query is not None]
        self.tensors = snapshot.tensors
        self._numbers = [
            (m.__dict__, name) for m in modules for name in NUMBER_ATTRIBUTES if name in m.__dict__
        ]
        self.refusal = self._refusal()
        self._known_facts = self._facts()

    def matches(self, snapshot: EncoderSnapshot) -> bool:
        """Whether the snapshot is the same, and the encoder has this memory and these numbers still."""
        return self.snapshot is snapshot and self._facts() == self._known_facts

    def drops(self) -> bool:
        """Whether a Dropout is at work: one in training, whatever the encoder is in."""
        return any(map(attrgetter("training"), self._dropouts))

    def _facts(self) -> tuple[Any, ...]:
        return (
            None if self.refusal else list(map(Tensor.data_ptr, self.tensors)),
            list(map(_dtype, self.tensors)),
            list(map(_stride, self.tensors)),
            [attributes[name] for attributes, name in self._numbers],
        )

    def _refusal(self) -> str:
        for module in self.snapshot.modules:
            kind = type(module)
            if not kind.__module__.startswith(KNOWN_PACKAGES):
                return f"a {kind.__name__} of {kind.__module__} inside"
            if foreign_hooks(module) or (replaced_method(module) and kind is not nn.ModuleList):
                return "hooks, or a replaced forward"
        if not set(self.snapshot.tensor_types) <= set(PLAIN_TENSORS):
            return "parameters of a class of their own"
        if len({t.device for t in self.tensors}) != 1:
            return "no parameters, or on several devices"
        return ""

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device
