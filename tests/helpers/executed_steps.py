"""What a forward runs: the steps of its plan as they run, and every op that torch dispatches."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgate.models.handle import get_encoder
from fastgate.runtime.steps import absorbed_attention, attention, feed_forward

KEPT_STEPS = tuple(step.name for step in (*attention.STEPS, *feed_forward.STEPS))
SKIPPED_STEPS = tuple(step.name for step in feed_forward.STEPS)
ABSORBED_STEPS = tuple(step.name for step in (*absorbed_attention.STEPS, *feed_forward.STEPS))


def steps_as_they_run(model, inputs):
    """(layer, step name, rows) of every step, as the executor shows them."""
    executed = []
    executor = get_encoder(model).runtime.executor
    executor.step_hook = lambda step, rows: executed.append((step.layer, step.name, rows.shape[0]))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        executor.step_hook = None
    return executed


class Ops(TorchDispatchMode):
    """Every op torch dispatches: its name and the largest number of elements among its operands."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        sizes = [a.numel() for a in args if isinstance(a, torch.Tensor)]
        self.seen.append((str(op), max(sizes, default=0)))
        return op(*args, **(kwargs or {}))
