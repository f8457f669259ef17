"""Finding what is not finite in a training without waiting for the device in every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.pruning.calibration import sum_over_ranks

LABELS = ("labels", "start_positions", "end_positions", "next_sentence_label")  # of transformers' heads
POSITIONS = ("start_positions", "end_positions")
IGNORED = -100  # a label that transformers' losses leave out

# Steps one after the other that a scaled loss may overflow in. A GradScaler halves its scale each time: from
# its usual 2^16 it is at 1 by then.
MAX_OVERFLOWS = 20
# Steps between two looks, where a look waits for the device or for the other processes.
STEPS_PER_LOOK = 25
SCORES_CHECKED = 4096  # the first ones of a micro-batch


def raise_not_finite(what: str, step: int | None = None) -> NoReturn:
    when = "" if step is None else f" of step {step}"
    remedy = (
        "lower the learning rate, look for batches whose own loss is NaN, or train in bfloat16 or float32; "
        "then begin anew or resume from a checkpoint"
    )
    raise ArgumentError(
        format_error("Pruner.step", "loss", f"NaN or infinity in {what}{when}", "finite numbers", remedy)
    )


# What is looked at: noted under these names, so that every rank has the same table.
TASK, SCORES, LOGITS, HIDDEN, LAGRANGIAN = TERMS = (
    "the task's loss",
    "the model's scores",
    "the distillation of scores",
    "the distillation of hidden states",
    "the Lagrangian",
)


class Finite:
    """Notes on the device which terms of a loss were finite, and looks at the notes now and then.

    A look is taken after each step on the CPU in a single process, else every STEPS_PER_LOOK steps and when
    asked.
    """

    def __init__(self) -> None:
        self._bad: dict[str, Tensor] = {}  # of the step under way: term -> 0-d bool
        self._steps: list[tuple[int, float, Tensor | None]] = []  # (step, scale, (terms,) what was bad)
        self._overflows = 0  # steps one after the other in which a scaled loss was not finite

    def note(self, term: str, value: Tensor) -> None:
        """A number of a micro-batch that should be finite."""
        self._note(term, ~torch.isfinite(value.detach()).all())

    def note_task(self, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """The task's loss on `inputs`. Where no row has a label it is NaN, the mean over none, and its
        gradient is 0: transformers goes on, and so does this."""
        loss = loss.detach()
        self._note(TASK, ~(torch.isfinite(loss).all() | is_unlabelled(inputs, loss.device)))

    def note_scores(self, scores: Tensor) -> None:
        """Scores of a micro-batch, which may mask with infinity. The first will do: a weight that is NaN
        spreads to all of them."""
        self._note(SCORES, torch.isnan(scores.detach().reshape(-1)[:SCORES_CHECKED]).any())

    def _note(self, term: str, bad: Tensor) -> None:
        before = self._bad.get(term)
        self._bad[term] = bad if before is None else before | bad

    def end_step(self, step: int, grad_scale: float, look: bool) -> None:
        """The step numbered `step` is done; look: at the notes now, on every rank alike.

        Raises ArgumentError for the first step in which something was not finite; where the loss is scaled,
        after MAX_OVERFLOWS such steps in turn.
        """
        row, waits = None, _has_several_ranks()
        if self._bad:
            no = torch.zeros((), dtype=torch.bool, device=next(iter(self._bad.values())).device)
            row = torch.stack([self._bad.get(term, no) for term in TERMS])
            waits = waits or row.device.type != "cpu"
        self._steps.append((step, grad_scale, row))
        self._bad = {}
        if look or not waits or len(self._steps) >= STEPS_PER_LOOK:
            self._look()

    def _look(self) -> None:
        steps, self._steps = self._steps, []
        noted = [row for _, _, row in steps if row is not None]
        table = torch.zeros(len(steps), len(TERMS))
        if noted:
            table[[i for i, (_, _, row) in enumerate(steps) if row is not None]] = (
                torch.stack(noted).cpu().float()
            )
        for (step, scale, _), row in zip(steps, sum_over_ranks(table).tolist(), strict=True):
            wrong = [name for name, count in zip(TERMS, row, strict=True) if count]
            self._overflows = self._overflows + 1 if wrong else 0
            if wrong and (scale == 1.0 or self._overflows > MAX_OVERFLOWS):
                raise_not_finite(" and ".join(wrong), step)


def is_unlabelled(inputs: Mapping[str, Any], device: torch.device) -> Tensor:
    """Whether one of the labels of a batch is to be ignored in every row; 0-d bool."""
    verdicts = [torch.zeros((), dtype=torch.bool, device=device)]
    length = inputs["input_ids"].shape[-1] if isinstance(inputs.get("input_ids"), Tensor) else None
    for name in LABELS:
        labels = inputs.get(name)
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            ignored = labels == IGNORED
            if name in POSITIONS and length is not None:
                ignored = labels >= length  # those of answers that were cut off
            verdicts.append(ignored.all().to(device))
    return torch.stack(verdicts).any()


def _has_several_ranks() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1
