"""The tasks fastgate knows by name: where each lives, its columns, its labels and its metric."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastgate.errors import DataError, format_error

KINDS = ("text", "pair", "regression", "tokens")


@dataclass(frozen=True)
class Spec:
    """What has to be known to read a data set as a task.

    Args:
        kind: `text` (one text, one class), `pair` (two texts, one class), `regression` (one or two texts, a
            number) or `tokens` (a list of words, a tag for each).
        columns: the input columns.
        target: the label column.
        metric: name of the main score.
        labels: class names in the order of the ids, where the data set fixes them.
        evaluate_on: splits that are scored together, if they exist and have labels.
        hub: name of the hub's data set, None for data that only its owners may distribute.
        hub_config, hub_revision: which version of it.
        named: labels can only be `labels` or their ids, so no training rows are needed to know them.
        folder: where the files are, if not under the task's own name.
    """

    kind: str
    columns: tuple[str, ...]
    target: str = "label"
    metric: str = "accuracy"
    labels: tuple[str, ...] = ()
    evaluate_on: tuple[str, ...] = ("validation",)
    hub: str | None = "nyu-mll/glue"
    hub_config: str | None = None
    hub_revision: str | None = None
    named: bool = False
    folder: str | None = None


_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
# Converted copies: data sets that were published as scripts are read from the hub's own parquet branch.
_PARQUET = "refs/convert/parquet"

_UD_EWT = Spec(
    "tokens",
    ("tokens",),
    target="upos",
    metric="token_accuracy",
    evaluate_on=("test",),
    hub="universal-dependencies/universal_dependencies",
    hub_config="en_ewt",
    hub_revision=_PARQUET,
)

CATALOG: dict[str, Spec] = {
    "sst2": Spec("text", ("sentence",), labels=("negative", "positive"), evaluate_on=("validation", "test")),
    "cola": Spec("text", ("sentence",), metric="matthews", labels=("unacceptable", "acceptable")),
    "mrpc": Spec("pair", _SENTENCES, metric="f1", labels=("not_equivalent", "equivalent")),
    "stsb": Spec("regression", _SENTENCES, metric="spearman"),
    "qqp": Spec("pair", ("question1", "question2"), metric="f1", labels=("not_duplicate", "duplicate")),
    "mnli": Spec(
        "pair",
        ("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        evaluate_on=("validation_matched",),
    ),
    "qnli": Spec("pair", ("question", "sentence"), labels=_ENTAILMENT),
    "rte": Spec("pair", _SENTENCES, labels=_ENTAILMENT),
    "wnli": Spec("pair", _SENTENCES, labels=("not_entailment", "entailment")),
    "imdb": Spec("text", ("text",), labels=("neg", "pos"), evaluate_on=("test",), hub="stanfordnlp/imdb"),
    "conll2003": Spec(
        "tokens",
        ("tokens",),
        target="ner_tags",
        metric="entity_f1",
        evaluate_on=("test",),
        hub="eriktks/conll2003",
        hub_revision=_PARQUET,
    ),
    "wnut17": Spec(
        "tokens",
        ("tokens",),
        target="ner_tags",
        metric="entity_f1",
        evaluate_on=("test",),
        hub="leondz/wnut_17",
        hub_revision=_PARQUET,
    ),
    "ptb": Spec(
        "tokens", ("tokens",), target="tags", metric="token_accuracy", evaluate_on=("test",), hub=None
    ),
    "ud_ewt": _UD_EWT,
    "ud_ewt_xpos": replace(_UD_EWT, target="xpos", folder="ud_ewt"),
}


def check_name(name: str) -> None:
    """Raises DataError for a task that is not in the catalogue."""
    if name not in CATALOG:
        remedy = "pick one of them, or pass your own files with --task-type, --train and --validation"
        raise DataError(
            format_error("fastgate", "--task", repr(name), "one of " + ", ".join(CATALOG), remedy)
        )


def check_kind(kind: str) -> None:
    """Raises DataError for an unknown kind of task."""
    if kind not in KINDS:
        remedy = "choose the one that fits the label column"
        raise DataError(
            format_error("fastgate", "--task-type", repr(kind), "one of " + ", ".join(KINDS), remedy)
        )


def hub_config(name: str, spec: Spec) -> str | None:
    """The configuration of the hub's data set: GLUE calls each by the task's name."""
    return name if spec.hub == "nyu-mll/glue" else spec.hub_config
