"""Another dropout probability for the time of a training; the model's own comes back whatever happens."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import nn


class DropoutOverride:
    """Sets `p` of every nn.Dropout in a model while it is on.

    If the object is garbage collected while it is on, the probabilities are restored as well: a Pruner that
    is lost in an exception does not leave the model without its dropout.
    """

    def __init__(self) -> None:
        self._probabilities: dict[nn.Dropout, float] = {}
        self._when_lost: weakref.finalize[..., DropoutOverride] | None = None

    def apply(self, model: nn.Module, p: float) -> None:
        """Set the probability of every dropout in `model` to `p`; nothing if it is on already."""
        if self._when_lost is not None:
            return
        self._probabilities = {m: m.p for m in model.modules() if isinstance(m, nn.Dropout)}
        self._when_lost = weakref.finalize(self, _restore, weakref.WeakKeyDictionary(self._probabilities))
        for module in self._probabilities:
            module.p = p

    def restore(self) -> None:
        """Give every dropout its own probability back."""
        if self._when_lost is not None:
            self._when_lost.detach()
        _restore(self._probabilities)
        self._probabilities, self._when_lost = {}, None


def _restore(probabilities: Mapping[nn.Dropout, float]) -> None:
    for module, p in probabilities.items():
        module.p = p
