"""Distiller: the teacher of a run, what it changes in the student, and the distillation term of the loss."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.errors import ArgumentError, Unsupported, format_error
from fastgate.pruning.distillation import (
    Distill,
    SelfTeacher,
    Teacher,
    TeacherOutputs,
    hidden_loss,
    outputs_loss,
    scores_of,
)
from fastgate.pruning.dropout_override import DropoutOverride
from fastgate.pruning.finite import HIDDEN, LOGITS, Finite
from fastgate.pruning.recording import Forward
from fastgate.pruning.schedule import WARM, Phase
from fastgate.pruning.token_swap import swap_tokens


class Distiller:
    """Distillation from a dense model, or from the student itself with every gate open.

    settings: None for no distillation. teacher: the dense model; None: the student itself. seed: of the
    tokens that are swapped. seconds: of the teacher's forwards so far, by the host's clock.
    """

    def __init__(self, settings: Distill | None, student: nn.Module, teacher: nn.Module | None, seed: int):
        self.settings = Distill(logits=0.0, hidden=0.0, swap=0.0) if settings is None else settings
        self.student = student
        self.seconds = 0.0
        self._seed = seed
        self._teacher: Teacher | SelfTeacher | None = None
        if settings is not None:
            self._teacher = (
                SelfTeacher(student) if teacher is None else Teacher(teacher, student, self.settings)
            )
        self._dropout = DropoutOverride()
        self.begin_step(0)

    def engage(self) -> None:
        """Put the teacher in eval mode and freeze it; give the student the dropout it is taught with."""
        if isinstance(self._teacher, Teacher):
            self._teacher.engage()
        if self._has_dense_teacher:
            self._dropout.apply(self.student, self.settings.dropout)

    def close(self) -> None:
        """Give the student's dropout, the teacher's mode and its flags back."""
        self._dropout.restore()
        if isinstance(self._teacher, Teacher):
            self._teacher.release()

    @property
    def _has_dense_teacher(self) -> bool:
        """Whether a dense teacher teaches, by logits or hidden states."""
        return isinstance(self._teacher, Teacher) and self.settings.teaches

    def distils(self, hardened: bool) -> bool:
        """Whether there is a teacher now. The model teaches itself until hardening only: from then on its
        closed attention is not trained."""
        return self._teacher is not None and not (hardened and isinstance(self._teacher, SelfTeacher))

    def compares_hidden(self, hardened: bool) -> bool:
        """Whether the student's hidden states are needed now."""
        return self.distils(hardened) and self.settings.hidden > 0

    # -- swapped tokens

    def begin_step(self, step: int) -> None:
        """Seed the swapped tokens of a step by its number, so that a resumed run swaps as the whole one."""
        self._swapping = torch.Generator().manual_seed((self._seed * 1_000_003 + step) % 2**63)

    def is_swap_step(self, step: int, phase: Phase) -> bool:
        """Whether tokens are swapped in this step; none are while attention is measured."""
        if not self._has_dense_teacher or self.settings.swap == 0.0 or step % 2 == 0:
            return False
        return phase != WARM

    def swap(self, inputs: Mapping[str, Any], stacklevel: int) -> Mapping[str, Any]:
        """The batch with some of its tokens swapped; warns if it has no `input_ids`."""
        if inputs.get("input_ids") is None:
            warnings.warn(
                "Pruner.prepare: no token is swapped although Distill.swap is not 0, as the batch has no "
                "input_ids. Pass them by that name, or Distill(swap=0.0), which counts every row's label.",
                stacklevel=stacklevel + 1,
            )
        return swap_tokens(inputs, self.settings.swap, self._swapping)

    def task_weight(self, is_swap_step: bool) -> float:
        """The weight of the task's own loss."""
        if not self._has_dense_teacher:
            return 1.0
        return 0.0 if is_swap_step else self.settings.labels

    # -- the loss

    def add_to(self, total: Tensor, forwards: Sequence[Forward], hardened: bool, finite: Finite) -> Tensor:
        """`total`, 0-d, and the mean distillation loss over the forwards that have a gradient.

        Raises Unsupported if there is something to distil and none has one.
        """
        distils = self.distils(hardened)
        taught = [forward for forward in forwards if forward.has_gradient]
        if distils and not taught:
            got = "forwards without gradient" if forwards else "a loss that does not run the model"
            remedy = "use a loss that is not a cached one, or pass PruningConfig(distill=None)"
            raise Unsupported(format_error("Pruner.loss", "distill", got, "a forward to distil into", remedy))
        for forward in taught:
            for scores in scores_of(forward.outputs).values():
                finite.note_scores(scores)
            if distils:
                total = total + self._loss(forward, total.device, finite) / len(taught)
        return total

    def _loss(self, forward: Forward, device: torch.device, finite: Finite) -> Tensor:
        settings = self.settings
        taught = self._run_teacher(forward)
        total = torch.zeros((), device=device)
        if settings.logits:
            difference = outputs_loss(
                self.student, forward.outputs, taught.outputs, forward.inputs, settings.temperature
            )
            if difference is None and not settings.hidden:
                remedy = "pass Distill(hidden=1.0), or PruningConfig(distill=None)"
                got = "outputs without scores, and no weight for hidden states"
                raise ArgumentError(
                    format_error("Pruner.loss", "distill", got, "something to distil", remedy)
                )
            if difference is not None:
                total = total + settings.logits * difference
                finite.note(LOGITS, difference)
        if settings.hidden:
            difference = hidden_loss(forward.hidden, taught.hidden, range(len(forward.hidden) - 1))
            total = total + settings.hidden * difference
            finite.note(HIDDEN, difference)
        return total

    def _run_teacher(self, forward: Forward) -> TeacherOutputs:
        """What the teacher makes of the batch of a forward."""
        assert self._teacher is not None
        if self.settings.logits and not hasattr(forward.outputs, "get"):
            remedy = "pass return_dict=True to the model, or Distill(logits=0.0)"
            wanted = "an output of transformers, or a dict with the scores as `logits`"
            got = type(forward.outputs).__name__
            raise ArgumentError(format_error("Pruner.loss", "outputs", got, wanted, remedy))
        start = time.perf_counter()
        taught = self._teacher(forward.inputs, want_hidden=self.settings.hidden > 0)
        self.seconds += time.perf_counter() - start
        return taught
