"""The model and the call of a random case, and the changes that are made alike on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from helpers import random_changes as changes
from helpers.encoders import VECTORS
from helpers.random_cases import DTYPES, MASK_DTYPES, TOKEN_HEADS, Case
from torch import Tensor, nn


def build(case: Case, dtype: torch.dtype) -> nn.Module:
    """The model of transformers, weights large enough for attention to matter, in the case's dtype."""
    torch.manual_seed(case.seed)
    first = case.pad + 1 if case.family != "Bert" else 0
    config = getattr(transformers, f"{case.family}Config")(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        intermediate_size=case.ffn,
        hidden_act=case.activation,
        max_position_embeddings=first + case.length + case.spare_positions,
        type_vocab_size=case.types,
        pad_token_id=case.pad,
        layer_norm_eps=case.eps,
        hidden_dropout_prob=0.0 if case.mode == "train" else case.hidden_dropout,
        attention_probs_dropout_prob=0.0 if case.mode == "train" else case.attention_dropout,
        num_labels=case.labels,
        chunk_size_feed_forward=case.chunk,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = case.attention
    kind = getattr(transformers, case.family + case.head)
    model = kind(config) if case.head != "Model" else kind(config, add_pooling_layer=case.pooler)
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
        else:
            nn.init.normal_(parameter, std=0.3)
    model = model.to(DTYPES[case.dtype]).to(dtype)
    return model.train(case.mode == "train")


@dataclass
class Call:
    inputs: dict[str, Tensor]
    mask: Tensor  # (batch, length) bool: attended
    requested: Tensor | None  # the rows asked for
    labelled: Tensor | None


def call_of(case: Case, dtype: torch.dtype) -> Call:
    g = torch.Generator().manual_seed(case.seed + 1)
    choices = 2 if case.head == "ForMultipleChoice" else 1
    rows, length = case.batch * choices, case.length
    shape = (rows, length)
    mask = torch.ones(shape, dtype=torch.bool)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=g)
    places = torch.arange(length)[None]
    if case.mask == "right":
        mask = places < lengths
    elif case.mask == "left":
        mask = places >= length - lengths
    elif case.mask in ("random", "some_empty"):
        mask = torch.rand(shape, generator=g) < 0.6
        mask[:, int(torch.randint(0, length, (), generator=g))] = True
        if case.mask == "some_empty":
            mask[rows // 2] = False
    elif case.mask == "all_empty":
        mask = torch.zeros(shape, dtype=torch.bool)
    inputs: dict[str, Tensor] = {}
    if case.embeds:
        inputs["inputs_embeds"] = (
            torch.randn(*shape, case.hidden, generator=g).to(DTYPES[case.dtype]).to(dtype)
        )
    else:
        inputs["input_ids"] = torch.randint(0, case.vocabulary, shape, generator=g)
    if case.mask != "none":
        inputs["attention_mask"] = mask.to(MASK_DTYPES[case.mask_dtype])
    if case.token_types:
        inputs["token_type_ids"] = torch.randint(0, case.types, shape, generator=g)
    if case.position_ids:
        inputs["position_ids"] = torch.randint(0, length, shape, generator=g)
    labelled = None
    if choices > 1:
        inputs = {name: value.view(case.batch, choices, *value.shape[1:]) for name, value in inputs.items()}
    if case.with_labels:
        some = torch.rand(shape, generator=g) < 0.5
        some[0, 0] = True
        several = max(case.labels, 2)
        if case.head in TOKEN_HEADS:
            labelled = some
            top = case.labels if "Token" in case.head else case.vocabulary
            inputs["labels"] = torch.where(some, torch.randint(0, top, shape, generator=g), -100)
            if case.head == "ForPreTraining":
                inputs["next_sentence_label"] = torch.randint(0, 2, (rows,), generator=g)
        elif case.head == "ForQuestionAnswering":
            for name in ("start_positions", "end_positions"):
                inputs[name] = torch.randint(0, length, (rows,), generator=g)
        elif case.head == "ForSequenceClassification" and case.labels == 1:
            inputs["labels"] = torch.randn(rows, generator=g).to(DTYPES[case.dtype]).to(dtype)
        elif case.head != "Model":
            top = several if case.head == "ForSequenceClassification" else 2
            inputs["labels"] = torch.randint(0, top, (case.batch,), generator=g)
    requested = torch.rand(shape, generator=g) < 0.5 if case.rows else None
    return Call(inputs, mask, requested, labelled)


def read_rows(case: Case, call: Call) -> Tensor | None:
    """(batch, length) bool: the rows of the last hidden state, or of a token head's logits, that are read."""
    if case.hidden_states or case.attentions:
        return None
    if case.head == "Model":
        if call.requested is not None:
            return call.requested
        if case.demand == "first":
            return torch.arange(case.length).eq(0).expand(call.mask.shape)
        return call.mask
    if case.head in TOKEN_HEADS:
        if call.requested is not None:
            return call.requested if call.labelled is None else call.requested | call.labelled
        if call.labelled is not None and case.mode == "train" and case.demand != "all":
            return call.labelled
        return call.mask if call.labelled is None else call.mask | call.labelled
    return None


def make_changes(case: Case, when: str, model: nn.Module, names: list[str | None]) -> None:
    """names: where each change of the case is made; None, or a module that was pruned away: nowhere."""
    for change, name in zip(case.changes, names, strict=True):
        if change.when == when and name is not None and _is_there(model, name):
            changes.CHANGES[change.kind][0](model, name)


def _is_there(model: nn.Module, name: str) -> bool:
    try:
        return not hasattr(model.get_submodule(name), "fastgate_removed")
    except AttributeError:
        return False


def names_of(case: Case, model: nn.Module) -> list[str | None]:
    names: list[str | None] = []
    for change in case.changes:
        possible = changes.places(model, change.kind)
        names.append(possible[change.place % len(possible)] if possible else None)
    return names


def vectors_of(case: Case, layer: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The values of a layer's replacement."""
    g = torch.Generator().manual_seed(case.seed + 7 + layer)
    return {
        name: (torch.randint(-32, 33, (case.hidden,), generator=g) / 64).to(dtype)
        for name in VECTORS[case.replacement]
    }


def remove_attention(case: Case, model: nn.Module, mask: Tensor, dtype: torch.dtype) -> None:
    """The reference for `prune`: the attention of transformers' layer gives N1(h + r(h))."""
    both = (mask[:, 1:] & mask[:, :-1])[..., None]  # a token and the one before it, both attended
    for i, layer in enumerate(model.base_model.encoder.layer):  # type: ignore[union-attr, arg-type]
        if i in case.kept:
            continue
        vectors = {name: nn.Parameter(value) for name, value in vectors_of(case, i, dtype).items()}
        layer.attention.vectors = nn.ParameterDict(vectors)

        def forward(h: Tensor, *args: Any, attention: Any = layer.attention, **kwargs: Any) -> Any:
            v = attention.vectors
            edge = torch.zeros_like(h[:, :1])
            total = h + v["shift"] if "shift" in v else h
            if "scale" in v:
                total = total + v["scale"] * h
            if "before" in v:
                total = total + v["before"] * torch.cat([edge, torch.where(both, h[:, :-1], 0)], 1)
                total = total + v["after"] * torch.cat([torch.where(both, h[:, 1:], 0), edge], 1)
            return attention.output.LayerNorm(total), None

        layer.attention.forward = forward


def fill_replacements(case: Case, model: nn.Module, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for i, layer in enumerate(model.base_model.encoder.layer):  # type: ignore[union-attr, arg-type]
            if i not in case.kept:
                for name, value in vectors_of(case, i, dtype).items():
                    getattr(layer.attention.replacement, name).copy_(value)
