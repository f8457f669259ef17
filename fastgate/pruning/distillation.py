"""Distillation: logits at a temperature, hidden states layer to layer on the rows the student computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgate.errors import ArgumentError, format_error
from fastgate.models.architectures import base_class
from fastgate.models.handle import EncoderHandle, get_encoder
from fastgate.models.patching import patch
from fastgate.pruning.finite import IGNORED, LABELS
from fastgate.pruning.modes import evaluating
from fastgate.pruning.numbers import number
from fastgate.pruning.sentences import is_sentence_model

Hidden = Sequence[tuple[Tensor, Tensor]]  # (index, rows) of the embeddings and of each layer
SCORES = ("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits", "scores")
EMBEDDING = "sentence_embedding"  # the output of a model of sentence-transformers
REGRESSION, MULTI_LABEL, ONE_LABEL = (
    "regression",
    "multi_label_classification",
    "single_label_classification",
)  # as transformers names them in `config.problem_type`


@dataclass(frozen=True)
class Distill:
    """How much a teacher counts, and how.

    Scores of a single-label head are compared by the divergence of their softmax, those of a multi-label
    head by that of each label's sigmoid, those of a regression by the squared difference. Embeddings of
    sentence-transformers are compared by one minus their cosine, with the weight of `logits`. The defaults
    are what was found best for texts, those of `for_tokens` for tagging.

    Args:
        logits: Weight of the comparison of scores.
        hidden: Weight of the comparison of hidden states, layer by layer.
        temperature: Of the scores.
        labels: Weight of the task's own loss, where a dense teacher teaches: it has learned from the labels
            already. A model that teaches itself has nothing else to learn from, and keeps its loss.
        dropout: The student's, where a dense teacher teaches: dropout blurs what is compared.
        swap: Share of the tokens that are swapped for others of the batch in every other step, where a dense
            teacher teaches: rows beyond those of the task, which it alone labels.
    """

    logits: float = 1.0
    hidden: float = 2.0
    temperature: float = 2.0
    labels: float = 0.3
    dropout: float = 0.0
    swap: float = 0.1

    def __post_init__(self) -> None:
        for name in ("logits", "hidden", "labels"):
            self._check(name, "0 or more", "0 turns the term off", lambda x: x >= 0.0)
        self._check("dropout", "a probability below 1", "0.1 is BERT's own", lambda x: 0.0 <= x < 1.0)
        self._check("swap", "a share from 0 to 1", "0 swaps nothing", lambda x: 0.0 <= x <= 1.0)
        self._check("temperature", "above 0", "2.0 is usual", lambda x: x > 0.0)

    def _check(self, name: str, wanted: str, remedy: str, fits: Callable[[float], bool]) -> None:
        object.__setattr__(self, name, number("Distill", name, getattr(self, name), wanted, remedy, fits))

    @classmethod
    def for_tokens(cls) -> Distill:
        """For tagging: a label a token is much to learn from, so the student trains as its teacher did."""
        return cls(hidden=10.0, labels=1.0, dropout=0.1, swap=0.0)

    @property
    def teaches(self) -> bool:
        """Whether there is a term of it at all."""
        return bool(self.logits or self.hidden)


@dataclass
class TeacherOutputs:
    """What the teacher says about one batch: its outputs and its hidden states."""

    outputs: Any
    hidden: list[tuple[Tensor, Tensor]]


class Teacher:
    """A frozen dense model, patched: it too computes no row nobody reads. Its outputs stay as they were.

    student: the patched model it teaches. Raises ArgumentError if its scores, or with `distill.hidden` its
    hidden states, cannot be compared with the student's. `release` gives its mode and flags back.
    """

    def __init__(self, model: nn.Module, student: nn.Module, distill: Distill):
        _check_shared(model, student)
        self.model = patch(model)
        self.handle = get_encoder(model)
        _check_alike(model, student, distill)

    def engage(self) -> None:
        """Put it in eval mode and freeze it."""
        modes = {name: module.training for name, module in self.model.named_modules()}
        flags = {name: p.requires_grad for name, p in self.model.named_parameters()}
        *_, teachers = _at_work.setdefault(self.model, (modes, flags, weakref.WeakSet()))
        teachers.add(self)
        self.model.eval().requires_grad_(False)

    def release(self) -> None:
        """Give every module its mode back, and every parameter its flag, once no other Pruner needs it."""
        modes, flags, teachers = _at_work.get(self.model, ({}, {}, weakref.WeakSet()))
        teachers.discard(self)
        if teachers or self.model not in _at_work:
            return
        del _at_work[self.model]
        for name, module in self.model.named_modules():
            module.training = modes.get(name, module.training)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], want_hidden: bool) -> TeacherOutputs:
        return _teacher_forward(self.model, self.handle, inputs, want_hidden)


# A model that teaches -> its modes and its flags before it did, by name, and the Teachers at work with it.
_at_work: weakref.WeakKeyDictionary[
    nn.Module, tuple[dict[str, bool], dict[str, bool], weakref.WeakSet[Teacher]]
] = weakref.WeakKeyDictionary()


class SelfTeacher:
    """The student itself with every gate open and dropout off."""

    def __init__(self, model: nn.Module):
        self.model, self.handle = model, get_encoder(model)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], want_hidden: bool) -> TeacherOutputs:
        gates, recording = self.handle.gates, self.handle.runtime.trace
        self.handle.set_gates([1.0] * self.handle.num_layers)
        try:
            with evaluating(self.model):
                return _teacher_forward(self.model, self.handle, inputs, want_hidden)
        finally:
            self.handle.set_gates(gates)
            self.handle.runtime.trace = recording


def _check_shared(teacher: nn.Module, student: nn.Module) -> None:
    own = {id(p) for p in student.parameters()}
    if any(id(p) in own for p in teacher.parameters()):
        remedy = "pass copy.deepcopy(model), or None to distil from the model with its gates open"
        got = "a model that shares weights with the student"
        raise ArgumentError(format_error("Pruner", "teacher", got, "a model of its own weights", remedy))


def _check_alike(teacher: nn.Module, student: nn.Module, distill: Distill) -> None:
    """Refuse a teacher whose scores or hidden states have another form than the student's."""
    handles = get_encoder(student), get_encoder(teacher)
    own, other = (handle.encoder.config for handle in handles)
    facts = [("entries in the vocabulary", other.vocab_size, own.vocab_size)]
    if distill.hidden:
        facts += [
            ("layers", handles[1].num_layers, handles[0].num_layers),
            ("hidden units", other.hidden_size, own.hidden_size),
        ]
    for what, got, wanted in facts:
        if got != wanted:
            remedy = "distil from the dense model the student starts as"
            if what != "entries in the vocabulary":
                remedy += ", or pass Distill(hidden=0.0)"
            raise ArgumentError(
                format_error("Pruner", "teacher", f"{got} {what}", f"{wanted}, as the student has", remedy)
            )
    heads = [_head(model) for model in (teacher, student)]
    if distill.logits and heads[0] != heads[1]:
        remedy = "distil from a model with the student's head, or pass Distill(logits=0.0)"
        raise ArgumentError(
            format_error("Pruner", "teacher", heads[0], f"{heads[1]}, as the student has", remedy)
        )
    names = [_label_names(model) for model in (teacher, student)]
    if distill.logits and names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
        remedy = "use a teacher whose config.id2label has the student's order, or pass Distill(logits=0.0)"
        wanted = f"{names[1]}, as the student has"
        raise ArgumentError(format_error("Pruner", "teacher", f"the labels {names[0]}", wanted, remedy))


def _label_names(model: nn.Module) -> list[str]:
    """The names of a head's classes in their order, as its config has them."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    return [str(names[i]).lower() for i in sorted(names)]


def _head(model: nn.Module) -> str:
    """The kind of scores a model gives, in words: `ForSequenceClassification with 3 labels`."""
    for module in model.modules():
        name = base_class(module).__name__
        _, separator, kind = name.partition("For")
        config: Any = getattr(module, "config", None)
        if separator and config is not None:
            counted = kind in ("SequenceClassification", "TokenClassification")
            return f"For{kind}" + (f" with {config.num_labels} labels" if counted else "")
    return "no head"


def _teacher_forward(
    model: nn.Module, handle: EncoderHandle, inputs: Mapping[str, Any], want_hidden: bool
) -> TeacherOutputs:
    unlabelled = {name: value for name, value in inputs.items() if name not in LABELS}

    def outputs() -> Any:
        return model(unlabelled) if is_sentence_model(model) else model(**unlabelled)

    if not want_hidden:
        return TeacherOutputs(outputs(), [])
    with handle.record() as trace:
        return TeacherOutputs(outputs(), trace.hidden)


def scores_of(outputs: Any) -> dict[str, Tensor]:
    """The scores a head gives, by their names in transformers or sentence-transformers; {} for a bare
    encoder."""
    scores = {name: outputs.get(name) for name in SCORES} if hasattr(outputs, "get") else {}
    return {name: value for name, value in scores.items() if isinstance(value, Tensor)}


def problem_of(model: nn.Module, name: str, scores: Tensor, inputs: Mapping[str, Any]) -> str:
    """What the scores called `name` are, by transformers' names of problems.

    Only a head that scores whole sequences has a choice: its config says, else the labels do, as in
    transformers. All others score exclusive classes, tokens or positions.
    """
    head = base_class(model).__name__
    whole = name in ("logits", "scores") and scores.dim() == 2
    if not whole or head.endswith(("ForMultipleChoice", "ForNextSentencePrediction")):
        return ONE_LABEL
    told = getattr(getattr(model, "config", None), "problem_type", None)
    if told in (REGRESSION, MULTI_LABEL):
        return str(told)
    if scores.shape[-1] == 1:
        return REGRESSION
    labels = inputs.get("labels")
    each = isinstance(labels, Tensor) and labels.is_floating_point() and labels.shape == scores.shape
    return MULTI_LABEL if told is None and each else ONE_LABEL


def scores_loss(
    student: Tensor, teacher: Tensor, temperature: float, problem: str, rows: Tensor | None = None
) -> Tensor:
    """How far the student's scores are from the teacher's, mean over rows; 0-d float32, 0 without a row.

    problem: ONE_LABEL: T^2 times the KL divergence of the softened scores, student from teacher. MULTI_LABEL:
    the same of each label's two outcomes, mean over labels. REGRESSION: the mean squared error. rows: (batch,
    length) bool, which rows to compare where there are scores a token; None: all.
    """
    if student.shape[0] != teacher.shape[0]:
        got, wanted = f"{teacher.shape[0]} rows", f"the {student.shape[0]} that the outputs are of"
        raise ArgumentError(
            format_error("Pruner.loss", "inputs", got, wanted, "pass the batch that the model ran on")
        )
    if student.shape != teacher.shape:
        got = f"scores of shape {tuple(teacher.shape)}"
        remedy = "distil from a model with the student's head and labels, or pass Distill(logits=0.0)"
        raise ArgumentError(
            format_error("Pruner", "teacher", got, f"{tuple(student.shape)}, as the student's", remedy)
        )
    classes = student.shape[-1]
    if rows is not None and student.shape[:-1] == rows.shape:
        student, teacher = student[rows], teacher[rows]
    student, teacher = student.reshape(-1, classes).float(), teacher.reshape(-1, classes).float()
    if not student.numel():
        return student.sum()  # a mean over no row would be NaN
    if problem == REGRESSION:
        return F.mse_loss(student, teacher)
    student, teacher = student / temperature, teacher / temperature
    if problem == MULTI_LABEL:
        p = torch.sigmoid(teacher)
        yes = F.logsigmoid(teacher) - F.logsigmoid(student)
        no = F.logsigmoid(-teacher) - F.logsigmoid(-student)
        return temperature**2 * (p * yes + (1 - p) * no).mean()
    log_p, log_q = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def outputs_loss(
    model: nn.Module, outputs: Any, taught: Any, inputs: Mapping[str, Any], temperature: float
) -> Tensor | None:
    """The sum over all scores, and embeddings of sentences, of the student's outputs; None if it has none.

    model: the student. outputs, taught: what student and teacher gave for `inputs`.
    """
    student, teacher = scores_of(outputs), scores_of(taught)
    if student.keys() != teacher.keys():
        got = f"the scores {sorted(teacher)}"
        remedy = "distil from a model with the student's head, or pass Distill(logits=0.0)"
        raise ArgumentError(
            format_error("Pruner", "teacher", got, f"{sorted(student)}, as the student's", remedy)
        )
    rows = scored_rows(inputs)
    terms = [
        scores_loss(value, teacher[name], temperature, problem_of(model, name, value, inputs), rows)
        for name, value in student.items()
    ]
    if is_sentence_model(model) and isinstance(outputs.get(EMBEDDING), Tensor):
        terms.append(embedding_loss(outputs[EMBEDDING], taught[EMBEDDING]))
    return torch.stack(terms).sum() if terms else None


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of the student's and the teacher's embedding, mean over rows; 0-d float32."""
    if student.shape != teacher.shape:
        got = f"embeddings of shape {tuple(teacher.shape)}"
        remedy = "distil from a model of the student's size, or pass Distill(logits=0.0)"
        raise ArgumentError(
            format_error("Pruner", "teacher", got, f"{tuple(student.shape)}, as the student's", remedy)
        )
    student, teacher = student.float(), teacher.float()
    return 1.0 - F.cosine_similarity(student, teacher, -1).mean() if student.numel() else student.sum()


def scored_rows(inputs: Mapping[str, Any]) -> Tensor | None:
    """(batch, length) bool, the tokens scored in training: those labelled, else those attended."""
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        rows = labels != IGNORED
        # The teacher is not told the labels: it computes no row that is padding, labelled or not.
        return rows & mask.bool() if mask is not None and mask.shape == rows.shape else rows
    return None if mask is None else mask.bool()


def hidden_loss(student: Hidden, teacher: Hidden, layers: Sequence[int]) -> Tensor:
    """Mean squared difference of the outputs of `layers` on the rows the student computed; 0-d.

    Rows are matched by their index. A row that the teacher did not compute, labelled padding, counts as
    equal; a layer without a row as 0.
    """
    terms = []
    for layer in layers:
        (index, rows), (known, taught) = student[layer + 1], teacher[layer + 1]
        rows = rows.float()
        if not (rows.numel() and taught.numel()):
            terms.append(rows.sum() * 0.0)
            continue
        if index.shape != known.shape:
            place = torch.searchsorted(known, index).clamp(max=known.numel() - 1)
            taught = torch.where(
                (known[place] == index)[:, None], taught.index_select(0, place).float(), rows.detach()
            )
        terms.append(F.mse_loss(rows, taught.float()))
    return torch.stack(terms).mean()
