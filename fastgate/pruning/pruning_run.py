"""PruningRun: the state of a pruning run, and what happens in each of its optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.models.handle import get_encoder
from fastgate.models.patching import patch
from fastgate.pruning import checks
from fastgate.pruning.calibration import Calibration
from fastgate.pruning.call_order import CallOrder
from fastgate.pruning.config import PruningConfig
from fastgate.pruning.distiller import Distiller
from fastgate.pruning.finite import LAGRANGIAN, Finite
from fastgate.pruning.gate_search import GateSearch
from fastgate.pruning.history import entry_of, is_logged, metrics_of
from fastgate.pruning.learner import GateLearner
from fastgate.pruning.loss_probe import LossProbe
from fastgate.pruning.objective import Fixed
from fastgate.pruning.recording import Forward, ForwardRecorder
from fastgate.pruning.replacement_training import MovementCheck
from fastgate.pruning.schedule import RECOVER, SEARCH, WARM, Phase, Schedule, make_schedule

SETTLING_STEPS = 10  # after hardening, by which the replacements in use must have moved


class PruningRun:
    """The state of a run and the parts that work on it: what happens at the end of each optimizer step.

    Its parts: `handle` on the encoder, `search` for the gates, `distiller`, `calibration`. The calls of a
    training loop, and what they mean, are in Pruner.
    """

    def __init__(self, model: nn.Module, config: PruningConfig, total: int | None, teacher: nn.Module | None):
        self.model, self.config = model, config
        self.steps = 0
        self.history: list[dict[str, Any]] = []
        self.finite, self.movement, self.probe = Finite(), MovementCheck(), LossProbe()
        self.order = CallOrder()
        self._schedule: Schedule | None = None
        if total is not None:
            self.plan_steps(total)
        checks.check_student(model)
        patch(model)
        self.handle = get_encoder(model)
        checks.check_whole(self.handle)
        self.search = GateSearch(config, self.handle.num_layers)
        self.distiller = Distiller(config.distill, model, teacher, config.seed)
        self.recorder = ForwardRecorder(self.handle)
        self.calibration = Calibration(self.handle.num_layers, self.handle.encoder.config, config.replacement)

    def plan_steps(self, total_steps: int) -> None:
        """Lay the phases over `total_steps` optimizer steps, if the Pruner was made without them.

        Raises CheckpointError if they are laid over another number already.
        """
        c = self.config
        schedule = make_schedule(total_steps, c.warm, c.ramp, c.harden)
        if isinstance(c.target, Fixed):
            schedule = schedule.without_search()
        checks.check_length(self._schedule, schedule)
        self._schedule = schedule

    @property
    def schedule(self) -> Schedule:
        """When the phases begin. Raises ArgumentError while the number of steps is unknown."""
        return checks.check_planned(self._schedule)

    @property
    def phase(self) -> Phase:
        """`warm`, `search` or `recover`."""
        return RECOVER if self.kept is not None else self.schedule.phase(self.steps)

    @property
    def kept(self) -> list[int] | None:
        """The layers whose attention stays, ascending; None until the gates are hardened."""
        return self.search.kept

    @property
    def margin(self) -> float | None:
        """How far the search has told its choice from the next best, in P(open); None before hardening."""
        return self.search.margin

    @property
    def separated(self) -> bool | None:
        """Whether `margin` is large enough to call the layers kept a choice; None without one."""
        return self.search.separated

    @property
    def open_probabilities(self) -> list[float]:
        """P(open) of each layer's gate; 0 and 1 once hardened."""
        return self.search.open_probabilities

    @property
    def learner(self) -> GateLearner:
        """What draws the gates and moves them."""
        return self.search.learner

    @property
    def teacher_seconds(self) -> float:
        """Of the teacher's forwards so far, by the host's clock; those before a resumption too."""
        return self.distiller.seconds

    @property
    def finalized(self) -> bool:
        """Whether the model is pruned for good."""
        return self.order.state == "finalized"

    @property
    def gates_now(self) -> Sequence[float | Tensor]:
        """The gates of the step under way, as the encoder takes them."""
        searches = self._schedule is not None and self.phase == SEARCH
        return self.learner.drawn if searches else self.search.settled_gates

    @property
    def device(self) -> torch.device:
        """That of the model."""
        return next(self.model.parameters()).device

    @property
    def target_now(self) -> float:
        """The reduction asked for in this step."""
        share = {WARM: 0.0, SEARCH: self.schedule.target_share(self.steps), RECOVER: 1.0}[self.phase]
        return self.search.objective.goal * share

    @property
    def reduction_now(self) -> float:
        """The expected reduction in this step."""
        return 0.0 if self.phase == WARM else self.search.reduction

    @property
    def is_swap_step(self) -> bool:
        """Whether `prepare` swaps tokens in this step."""
        return self.distiller.is_swap_step(self.steps, self.phase)

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger: target, expected reduction, multipliers, P(open) of each gate, margin."""
        return metrics_of(self)

    def begin_step(self) -> None:
        """Make ready for the first micro-batch of a step."""
        self.probe.end_step()
        self.distiller.begin_step(self.steps)
        self.handle.runtime.unfinished = self.kept is None

    def start_recording(self) -> None:
        """Record the next forward, if anything of it is needed."""
        compares = self.distiller.compares_hidden(self.kept is not None)
        if self.phase == WARM or compares:
            self.recorder.start()

    @property
    def task_weight(self) -> float:
        """Of the task's own loss in this step: 1; where a dense teacher teaches, `Distill.labels`, and 0 for
        batches with swapped tokens."""
        return self.distiller.task_weight(self.is_swap_step)

    def take(self, outputs: Any, inputs: Mapping[str, Any]) -> Forward | None:
        """The forward just run, for `pruning_loss`. None if it was to be recorded and the encoder has not
        run."""
        measured = self.calibration if self.phase == WARM else None
        forward = self.recorder.take(outputs, inputs, measured)
        if forward is not None:
            self.order.taken()
        return forward

    def take_forward(self, outputs: Any, inputs: Mapping[str, Any]) -> Forward:
        """As `take`; raises ArgumentError if the encoder has not run since `prepare`."""
        forward = self.take(outputs, inputs)
        if forward is None:
            raise self.order.no_forward()
        return forward

    def pruning_loss(self, forwards: Sequence[Forward]) -> Tensor:
        """What is added to the weighted task loss: the mean distillation loss over `forwards`, and the
        Lagrangian; 0-d float32 on the model's device.

        Forwards without gradient are only measured. Raises Unsupported if there is something to distil and
        none has a gradient.
        """
        if not self.steps:
            checks.check_trainable(self.model, self.handle)
        total = torch.zeros((), device=self.device)
        if self.phase == SEARCH:
            total = self.learner.term()
            self.finite.note(LAGRANGIAN, total)
        total = self.distiller.add_to(total, forwards, self.kept is not None, self.finite)
        return self.probe.add_to(total)

    def harden_gates(self, stacklevel: int) -> list[int]:
        """Fix every gate at 0 or 1 for good; returns the layers kept."""
        if self.kept is None:
            self.search.harden(stacklevel + 1)
            self.handle.set_gates(self.open_probabilities)
            self.handle.runtime.unfinished = False
        assert self.kept is not None
        return self.kept

    def end_step(self, grad_scale: float) -> None:
        """An optimizer step is done: move the gates, then draw or harden those of the next one."""
        schedule = self.schedule
        step = self.steps + 1
        self.finite.end_step(step, grad_scale, look=step in schedule.marks)
        if self.phase == SEARCH:
            self.learner.learn(grad_scale)
        self.steps = step
        if self.kept is None:
            self._next_gates(schedule)
        self.begin_step()
        if is_logged(self.steps, schedule.total, schedule.marks):
            self.history.append(entry_of(self))
        if self.steps == min(schedule.harden + SETTLING_STEPS, schedule.total):
            self.movement.finish(self.handle, self.kept or [], stacklevel=3)

    def _next_gates(self, schedule: Schedule) -> None:
        if self.steps == schedule.begin:
            self.calibration.start(self.handle)
            self.movement.start(self.handle)
            self.search.start(self.calibration.costs)
        if self.steps >= schedule.harden:
            self.harden_gates(stacklevel=4)
        elif self.phase == SEARCH:
            self.learner.draw(self.target_now, self.device)
            self.handle.set_gates(self.learner.drawn)
