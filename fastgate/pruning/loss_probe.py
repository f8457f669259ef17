"""Measures the weight that backward gave a loss: a zero in the loss, whose gradient is that weight."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

TOLERANCE = 1e-2  # of a sum of weights


class LossProbe:
    """One zero an optimizer step, added to the loss of each of its micro-batches.

    Its gradient is the sum of the weights the losses were differentiated with: 1 if each of n micro-batches
    was divided by n, times the scale of a GradScaler. Loss and gradients stay what they are, bit for bit.
    """

    def __init__(self) -> None:
        self._leaf: Tensor | None = None
        self._measured: set[int] = set()  # numbers of micro-batches whose weight has been read
        self.losses = 0  # of the step under way

    def add_to(self, loss: Tensor) -> Tensor:
        """`loss`, 0-d, and the zero."""
        if not torch.is_grad_enabled():
            return loss
        if self._leaf is None:
            self._leaf = torch.zeros((), device=loss.device, requires_grad=True)
        self.losses += 1
        return loss + self._leaf

    @property
    def has_gradient(self) -> bool:
        """Whether a loss of this step was differentiated."""
        return self._leaf is not None and self._leaf.grad is not None

    def weight(self, grad_scale: float) -> float | None:
        """The sum of the weights in this step, relative to `grad_scale`; 0.0 without a backward.

        None for a step with a number of micro-batches that was measured before: reading it waits for the
        device.
        """
        if self.losses in self._measured:
            return None
        self._measured.add(self.losses)
        if self._leaf is None or self._leaf.grad is None:
            return 0.0
        return float(self._leaf.grad) / grad_scale

    def check(self, grad_scale: float, stacklevel: int) -> None:
        """Warn if the weights do not add up to `grad_scale`. A scaled loss may have overflowed."""
        losses, weight = self.losses, self.weight(grad_scale)
        if weight is not None and math.isfinite(weight) and abs(weight - 1.0) > TOLERANCE:
            warnings.warn(
                "Pruner.step: the losses of this step were differentiated with weights that add up to "
                f"{weight:.4g}, not to 1. Divide the loss of each micro-batch by their number ({losses} "
                "here), and pass scaler= to the Pruner, or grad_scale to step, if the loss is scaled.",
                stacklevel=stacklevel + 1,
            )

    def end_step(self) -> None:
        """The next loss is the first of a new step."""
        self._leaf, self.losses = None, 0
