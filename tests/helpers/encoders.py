"""Random encoders and heads of every family, batches for them, and what a head's outputs mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert")
HEADS = (
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForMaskedLM",
    "ForNextSentencePrediction",
    "ForPreTraining",
)
ALL = [(f, h) for f in FAMILIES for h in HEADS if hasattr(transformers, f + h)]
VOCABULARY, LENGTH = 90, 14
# Of a batch: a sequence without padding, two between, and one of a single token.
LENGTHS = (14, 9, 3, 1)
# Kind of a replacement -> the names of its parameters; `shift` is that of the offset.
VECTORS = {
    "zero": (),
    "mean": ("shift",),
    "affine": ("shift", "scale"),
    "shift": ("shift", "scale", "before", "after"),
}


def make(family: str, head: str, layers: int = 3, attention: str = "sdpa", **options: Any) -> nn.Module:
    """A random model whose weights are large enough for attention to matter, in eval mode."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    labels = 2 if "Question" in head else 3
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        max_position_embeddings=40,
        type_vocab_size=2,
        num_labels=labels,
        **(sizes | options),
    )
    config._attn_implementation = attention
    model = getattr(transformers, family + head)(config)
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
        else:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def batch(
    model: nn.Module, head: str, side: str = "right", lengths: tuple[int, ...] = LENGTHS, labels: bool = False
) -> dict[str, Tensor]:
    """input_ids, attention_mask, token_type_ids and, if asked, the labels of the head."""
    generator = torch.Generator().manual_seed(7)
    rows, length = len(lengths), max(LENGTH, *lengths)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.zeros(rows, length, dtype=torch.long)
    for i, n in enumerate(lengths):
        mask[i, :n] = 1
    if side == "left":
        mask = mask.flip(1)
    ids = torch.where(mask.bool(), ids, model.config.pad_token_id)
    types = torch.randint(0, 2, (rows, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    if head == "ForMultipleChoice":
        inputs = {name: t.view(2, -1, length) for name, t in inputs.items()}
    if labels:
        inputs |= labels_for(model, head, mask, generator)
    return inputs


def labels_for(model: nn.Module, head: str, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    rows, length = mask.shape
    some = mask.bool() & (torch.rand(mask.shape, generator=generator) < 0.6)
    some[0, 0] = True

    def classes(*shape: int, n: int) -> Tensor:
        return torch.randint(0, n, shape, generator=generator)

    if head in ("ForTokenClassification", "ForMaskedLM", "ForPreTraining"):
        n = 3 if "Token" in head else VOCABULARY
        labels = {"labels": torch.where(some, classes(rows, length, n=n), -100)}
        return labels | ({"next_sentence_label": classes(rows, n=2)} if head == "ForPreTraining" else {})
    if head == "ForQuestionAnswering":
        return {"start_positions": classes(rows, n=length), "end_positions": classes(rows, n=length)}
    return {"labels": classes(2 if head == "ForMultipleChoice" else rows, n=2)}


def output_rows(name: str, value: Tensor, mask: Tensor) -> Tensor:
    """The part of an output that is claimed equal: attended rows of a (batch, length, ...) one, else all."""
    padded = (
        value.dim() == 3
        and value.shape[:2] == mask.shape
        and name in ("last_hidden_state", "logits", "prediction_logits")
    )
    return value[mask.bool()] if padded else value


def draw_replacements(model: nn.Module) -> nn.Module:
    """Every parameter of a replacement drawn anew."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".attention.replacement." in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def padded(
    encoder: Any,
    inputs: Mapping[str, Tensor],
    gates: Sequence[float | Tensor],
    replacements: Sequence[Mapping[str, Tensor]],
) -> Tensor:
    """(batch, length, hidden): the gated encoder as it is defined, every row, from Hugging Face's modules:
    r(h)[i] = offset + scale * h[i] + before * h[i - 1] + after * h[i + 1], i and its neighbour both attended.

    encoder: with eager attention. replacements: of each layer, its vectors by name.
    """
    attended = inputs["attention_mask"].bool()
    bias = torch.where(attended, 0.0, torch.finfo(torch.float32).min)[:, None, None, :]
    below_diagonal = torch.ones(attended.shape[1], attended.shape[1]).tril(-1).triu(-1)  # 1 at (i, i - 1)
    behind = below_diagonal * attended[:, :, None] * attended[:, None, :]
    h = encoder.embeddings(inputs["input_ids"], token_type_ids=inputs["token_type_ids"])
    for layer, z, r in zip(encoder.encoder.layer, gates, replacements, strict=True):
        out = layer.attention.output
        # Where nothing is attended SDPA gives zeros, and softmax would not.
        mixed = out.dense(layer.attention.self(h, attention_mask=bias)[0] * attended.any(1)[:, None, None])
        rows = {"shift": torch.ones_like(h), "scale": h, "before": behind @ h, "after": behind.mT @ h}
        replaced = sum((vector * rows[name] for name, vector in r.items()), torch.zeros_like(h))
        h = out.LayerNorm(h + z * mixed + (1 - z) * replaced)
        h = layer.output(layer.intermediate(h), h)
    return h


def without_attention(model: nn.Module, layers: Iterable[int]) -> nn.Module:
    """A model of transformers without the attention of these layers: its LayerNorm of the input stays."""

    def skip(module: Any, args: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
        return module.LayerNorm(args[1])

    for i in layers:
        model.base_model.encoder.layer[i].attention.output.register_forward_hook(skip)
    return model
