"""Distillation: logits at a temperature, hidden states layer to layer on the rows the student computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, say
from ..patch import patch
from ..state import encoder_state

Hidden = Sequence[tuple[Tensor, Tensor]]  # (index, rows) of the embeddings and of each layer
LABELS = ("labels", "start_positions", "end_positions", "next_sentence_label")


@dataclass(frozen=True)
class Distill:
    """How a teacher is listened to.

    logits, hidden: weights of the two terms; temperature: of the logits. labels: weight of the task's own
    loss beside them, and dropout: the student's, where a dense teacher teaches. It has learned from the
    labels already, and dropout blurs what is matched. swap: share of the tokens that are swapped for others
    of the batch in every other step, where a dense teacher teaches: rows beyond those of the task, which it
    alone labels. A model that teaches itself has nothing else to learn from: its loss and its dropout stay.
    The defaults are what was found best for texts, `for_tokens` for tagging: docs/FINDINGS.md.
    """

    logits: float = 1.0
    hidden: float = 2.0
    temperature: float = 2.0
    labels: float = 0.3
    dropout: float = 0.0
    swap: float = 0.1

    def __post_init__(self) -> None:
        for name in ("logits", "hidden", "labels"):
            if not getattr(self, name) >= 0.0:
                raise ArgumentError(
                    say("Distill", name, getattr(self, name), "0 or more", "0 turns the term off")
                )
        if not 0.0 <= self.dropout < 1.0:
            wanted = "a probability below 1"
            raise ArgumentError(say("Distill", "dropout", self.dropout, wanted, "0.1 is BERT's own"))
        if not 0.0 <= self.swap <= 1.0:
            raise ArgumentError(say("Distill", "swap", self.swap, "a share from 0 to 1", "0 swaps nothing"))
        if not self.temperature > 0.0:
            raise ArgumentError(say("Distill", "temperature", self.temperature, "above 0", "2.0 is usual"))

    @classmethod
    def for_tokens(cls) -> Distill:
        """For tagging: a label a token is much to learn from, so the student trains as its teacher did."""
        return cls(hidden=10.0, labels=1.0, dropout=0.1, swap=0.0)

    @property
    def teaches(self) -> bool:
        """Whether there is a term of it at all."""
        return bool(self.logits or self.hidden)


@dataclass
class Lesson:
    """What the teacher says about one batch."""

    logits: list[Tensor]
    hidden: list[tuple[Tensor, Tensor]]


class Teacher:
    """A frozen dense model, patched: it too computes no row nobody reads. Its outputs stay as they were."""

    def __init__(self, model: nn.Module, layers: int):
        self.model = patch(model).eval().requires_grad_(False)
        self.state = encoder_state(model)
        if self.state.num_layers != layers:
            raise ArgumentError(
                say("Pruner", "teacher", f"{self.state.num_layers} layers", f"{layers}, as the student has",
                    "distil from the dense model the student starts as")
            )  # fmt: skip

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], want_hidden: bool) -> Lesson:
        return _ask(self.model, self.state, inputs, want_hidden)


class SelfTeacher:
    """The student itself with every gate open and dropout off."""

    def __init__(self, model: nn.Module):
        self.model, self.state = model, encoder_state(model)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], want_hidden: bool) -> Lesson:
        gates, was_training, recording = self.state.gates, self.model.training, self.state.runtime.record
        self.state.set_gates([1.0] * self.state.num_layers)
        self.model.eval()
        try:
            return _ask(self.model, self.state, inputs, want_hidden)
        finally:
            self.model.train(was_training)
            self.state.set_gates(gates)
            self.state.runtime.record = recording


def _ask(model: nn.Module, state: Any, inputs: Mapping[str, Any], want_hidden: bool) -> Lesson:
    given = {name: value for name, value in inputs.items() if name not in LABELS}
    if not want_hidden:
        return Lesson(logits_of(model(**given)), [])
    with state.record() as record:
        outputs = model(**given)
    return Lesson(logits_of(outputs), record.hidden)


def logits_of(outputs: Any) -> list[Tensor]:
    """The scores a head of transformers gives, whatever their names; [] for a bare encoder."""
    names = ("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits")
    found = [outputs.get(name) for name in names] if hasattr(outputs, "get") else []
    return [value for value in found if value is not None]


def logits_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float, rows: Tensor | None = None
) -> Tensor:
    """T^2 times the KL divergence of the softened scores, student from teacher, mean over rows; 0-d.

    One score a row (regression) has no distribution: there it is the mean squared error. rows: (batch,
    length) bool, which rows to compare where there are scores a token; None: all.
    """
    total = student[0].new_zeros((), dtype=torch.float32)
    for mine, theirs in zip(student, teacher, strict=True):
        classes = mine.shape[-1]
        if rows is not None and mine.shape[:-1] == rows.shape:
            mine, theirs = mine[rows], theirs[rows]
        mine, theirs = mine.reshape(-1, classes).float(), theirs.reshape(-1, classes).float()
        if classes == 1:
            total = total + F.mse_loss(mine, theirs)
        else:
            log_p, log_q = (F.log_softmax(x / temperature, -1) for x in (mine, theirs))
            total = total + temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return total


def scored_rows(inputs: Mapping[str, Any]) -> Tensor | None:
    """(batch, length) bool, the tokens scored in training: those labelled, else those attended."""
    labels = inputs.get("labels")
    if labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        return labels != -100
    mask = inputs.get("attention_mask")
    return None if mask is None else mask.bool()


def hidden_loss(student: Hidden, teacher: Hidden, layers: Sequence[int]) -> Tensor:
    """Mean squared difference of the outputs of `layers` on the rows the student computed; 0-d.

    Rows are matched by their index. The teacher computed at least the student's rows.
    """
    terms = []
    for layer in layers:
        (index, mine), (known, theirs) = student[layer + 1], teacher[layer + 1]
        if index.shape != known.shape:
            theirs = theirs.index_select(0, torch.searchsorted(known, index))
        terms.append(F.mse_loss(mine.float(), theirs.float()))
    return torch.stack(terms).mean()
