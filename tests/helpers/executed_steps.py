"""What a forward runs: the steps of its plan as they run, and every op that torch dispatches."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def steps_as_they_run(model, inputs):
    """(layer, op, rows) of every step, counted at the encoder's own functions, with no recording plan."""
    from fastgate.runtime import executor

    seen = []
    original = executor._note

    def note(run, step, out):
        seen.append((step.layer, step.op, out.shape[0]))
        original(run, step, out)

    executor._note = note
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        executor._note = original
    return seen


class Ops(TorchDispatchMode):
    """Every op torch dispatches: its name and the largest number of elements among its operands."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        sizes = [a.numel() for a in args if isinstance(a, torch.Tensor)]
        self.seen.append((str(op), max(sizes, default=0)))
        return op(*args, **(kwargs or {}))
