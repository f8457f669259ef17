"""The models that `fastgate bench` compares: fastgate's, and Hugging Face's of the same weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastgate.benchmark.baselines import copy_sharing_weights
from fastgate.data.task import Task
from fastgate.errors import ArgumentError, format_error
from fastgate.models.architectures import base_class
from fastgate.models.checkpoint import load
from fastgate.models.freezing import freeze
from fastgate.models.patching import patch
from fastgate.models.pruning import prune
from fastgate.nn.choices import Pooling, ReplacementKind
from fastgate.training.model import demo_model_path, dense_model, load_tokenizer

_SHAPES = {  # hidden, layers, heads, intermediate
    "minilm": (384, 6, 12, 1536),
    "bert-base": (768, 12, 12, 3072),
    "bert-large": (1024, 24, 16, 4096),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_models(
    source: str | Path,
    task: Task,
    keep: Sequence[int] | None,
    dtype: torch.dtype = torch.float32,
    pooling: Pooling | None = None,
    replacement: ReplacementKind = "zero",
) -> tuple[Any, Any, Any]:
    """(fastgate's model, Hugging Face's unpruned one, the tokenizer) for `bench`.

    source: a size (`minilm`, `bert-base`, `bert-large`: random weights, the demo model's tokenizer), a
    fastgate checkpoint, or a model of the hub or in a folder. keep: layers whose attention stays, None for
    all. dtype: of both models' parameters; they are on the GPU if there is one. pooling: of fastgate's, None
    for what the source says. replacement: what takes the place of a pruned attention (fastgate.prune).
    Raises ArgumentError for layers that the model does not have.
    """
    name, device = os.path.expanduser(source), _device()
    if (Path(name) / "fastgate.json").is_file():
        if keep is not None:
            remedy = "leave --keep out, or bench the dense model"
            raise ArgumentError(
                format_error("bench", "--keep", list(keep), "none for a pruned checkpoint", remedy)
            )
        ours: Any = load(name)
        ours = ours.to(device, dtype)
        reference = unpruned(ours).to(device, dtype)
        return freeze_on_cpu(ours), reference, load_tokenizer(name, task)
    reference, tokenizer = dense(name, task, dtype)
    layers = int(reference.config.num_hidden_layers)
    if keep is not None and not all(0 <= layer < layers for layer in keep):
        got, wanted = ",".join(map(str, keep)), f"layers from 0 to {layers - 1}"
        raise ArgumentError(format_error("bench", "--keep", got, wanted, "name layers that the model has"))
    return pruned(reference, keep, pooling, replacement), reference, tokenizer


def dense(source: str | Path, task: Task, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(Hugging Face's model, the tokenizer) of a size, the hub or a folder, as `load_models` takes them."""
    name = str(source)
    if name in _SHAPES:
        tokenizer = load_tokenizer(demo_model_path(), task)
        reference = _random_model(name, task, len(tokenizer))
    else:
        tokenizer = load_tokenizer(name, task)
        reference = dense_model(name, task)
    return reference.eval().to(_device(), dtype), tokenizer


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pruned(
    reference: Any,
    keep: Sequence[int] | None,
    pooling: Pooling | None = None,
    replacement: ReplacementKind = "zero",
) -> Any:
    """fastgate's model with the weights of a Hugging Face model, attention kept in the layers of `keep`."""
    ours = patch(copy_sharing_weights(reference), pooling=pooling)
    if keep is not None:
        prune(ours, keep=list(keep), replacement=replacement)
    return freeze_on_cpu(ours)


def freeze_on_cpu(model: Any) -> Any:
    """A patched model, on the device it will run on, in the form it is timed in: on the CPU frozen."""
    return freeze(model) if next(model.parameters()).device.type == "cpu" else model


def layers_of(size: str) -> int:
    """How many layers a model of one of the named sizes has."""
    return _SHAPES[size][1]


def _random_model(size: str, task: Task, vocabulary: int) -> Any:
    from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

    hidden, layers, heads, intermediate = _SHAPES[size]
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
    )
    config.num_labels = max(len(task.labels), 1)
    torch.manual_seed(0)
    return (BertForTokenClassification if task.kind == "tokens" else BertForSequenceClassification)(config)


def unpruned(ours: Any) -> Any:
    """A Hugging Face model with the weights of a pruned one, the missing ones random."""
    reference = base_class(ours)(copy.deepcopy(ours.config)).eval()
    reference.load_state_dict(ours.state_dict(), strict=False)
    return reference
