"""Records a forward of the student between `prepare` and `loss`: hidden states and attention outputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgate.models.handle import EncoderHandle
from fastgate.pruning.calibration import Calibration
from fastgate.runtime.context import ActivationTrace


@dataclass
class Forward:
    """A forward of the student: its batch, its outputs and its hidden states, (index, rows) of the embeddings
    and of each layer. has_gradient: autograd recorded it."""

    inputs: Mapping[str, Any]
    outputs: Any
    hidden: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    has_gradient: bool = True


class ForwardRecorder:
    """Has the encoder record one forward at a time."""

    def __init__(self, handle: EncoderHandle):
        self._handle = handle
        self._open = ExitStack()
        self._trace: ActivationTrace | None = None

    def start(self) -> None:
        """Record from now on, what ran before is forgotten."""
        self.stop()
        self._trace = self._open.enter_context(self._handle.record())

    def stop(self) -> None:
        """Record nothing any more."""
        self._open.close()
        self._trace = None

    @property
    def forwards(self) -> int:
        """How many forwards there were since recording began."""
        return 0 if self._trace is None else self._trace.forwards

    def take(
        self, outputs: Any, inputs: Mapping[str, Any], calibration: Calibration | None
    ) -> Forward | None:
        """The forward just run; recording ends. None if one was to be recorded and the encoder has not run.

        calibration: where what the forward computed is added to, if anywhere.
        """
        trace = self._trace
        if trace is not None and not trace.hidden:
            return None
        self.stop()
        forward = Forward(inputs, outputs, has_gradient=torch.is_grad_enabled())
        if trace is not None:
            if calibration is not None:
                calibration.add(trace)
            if forward.has_gradient:
                forward.hidden = trace.hidden
            # What computes activations again in the backward holds the trace: it must not hold their graph.
            trace.clear()
        return forward
