"""The executor of an encoder: CUDA graphs, fused CPU calls or single steps, whichever can run a forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgate.runtime import eager
from fastgate.runtime.compiled_plan import PlanCache
from fastgate.runtime.context import ForwardContext, StepHook
from fastgate.runtime.cuda_graphs import CudaGraphs
from fastgate.runtime.graph_device import DEVICES


class Executor:
    """Runs the plans of one encoder.

    graphs: CUDA graphs for inference on a GPU. None: never. plans: what frozen layers run. step_hook: called
    with (step, rows) after each step of a forward, which then runs step by step. None: nothing is called.
    """

    def __init__(self, cuda_graphs: bool = False) -> None:
        self.graphs = CudaGraphs() if cuda_graphs else None
        self.plans = PlanCache()
        self.step_hook: StepHook | None = None

    def use_graphs(self, cuda_graphs: bool) -> None:
        """Turn CUDA graphs on, which keeps those that are there, or off, which drops them."""
        self.graphs = (self.graphs or CudaGraphs()) if cuda_graphs else None

    def captures(self, device: torch.device) -> bool:
        """Whether forwards on `device` may be replayed from graphs."""
        return self.graphs is not None and device.type in DEVICES

    def run(self, context: ForwardContext) -> Tensor:
        """(batch, length, hidden), zeros in every row that is no output row."""
        if self.graphs is not None and not torch.compiler.is_compiling():
            hidden = self.graphs.replay(context)
            if hidden is not None:
                return hidden
        h = context.plan.embed.embed(context)
        compiled = self.plans.find(context, h)
        h = eager.run_layers(context, h) if compiled is None else compiled(context, h)
        return context.unpadded.pad(h, output_rows_only=True)

    def clear(self) -> None:
        """Drop what was compiled from the modules, so that weights that were dropped are freed at once."""
        self.plans.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Executor:
        return Executor(self.graphs is not None)

    def __reduce__(self) -> tuple[type[Executor], tuple[bool]]:
        return Executor, (self.graphs is not None,)
