"""The forwards of swapped heads: which rows a call reads, and language-model heads on those rows only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgate.errors import ArgumentError, format_error
from fastgate.models import compat
from fastgate.models.architectures import Family
from fastgate.models.encoder_forward import checked_rows
from fastgate.models.handle import EncoderRuntime
from fastgate.runtime.unpadding import on_host

Arguments = dict[str, Any]  # of a call of a model, by name


def output_rows_of_call(head: nn.Module, runtime: EncoderRuntime, arguments: Arguments) -> Tensor | None:
    """(batch, length) bool, the rows that a call of a tagging or language-model head reads; None: attended.

    They are the rows asked for and the labelled ones. In evaluation, or where `patch` was asked for all, a
    loss comes with the logits of all attended rows.

    Raises ArgumentError for rows or labels of another shape than the input.
    """
    rows: Tensor | None = arguments.get("rows")
    labels: Tensor | None = arguments.get("labels")
    tokens = _tokens(arguments)
    if tokens is None or (rows is None and labels is None):
        return rows
    shape = (tokens.shape[0], tokens.shape[1])
    if rows is not None:
        rows = checked_rows(rows, shape)
    if labels is None:
        return rows
    if labels.numel() != shape[0] * shape[1]:
        got = f"shape {tuple(labels.shape)}"
        raise ArgumentError(
            format_error("forward", "labels", got, f"one a token, {shape}", "pad labels as the input is")
        )
    labelled: Tensor = (labels != -100).view(shape)
    if rows is not None:
        return rows.to(labelled.device) | labelled
    if head.training and runtime.asked != "all":
        return labelled
    mask: Tensor | None = arguments.get("attention_mask")
    return labelled | mask.to(labelled.device).bool() if mask is not None and mask.shape == shape else None


def _tokens(arguments: Arguments) -> Tensor | None:
    """What the call gives as input: (batch, length) ids, or (batch, length, hidden) embeddings."""
    ids: Tensor | None = arguments.get("input_ids")
    embeds: Tensor | None = arguments.get("inputs_embeds")
    return embeds if ids is None else ids


def masked_lm(
    head: Any, family: Family, rows: Tensor | None, arguments: Arguments, return_dict: bool | None
) -> Any:
    """What a language-model head returns for the output rows; the other rows' logits are zeros.

    The product with the vocabulary costs, in a BERT-base, more than three layers. It runs on the output rows
    only. So does the cross entropy, which is of labelled rows alone whatever is in the others.

    rows: (batch, length) bool, None: the attended ones. return_dict: as in transformers.
    """
    output = _masked_lm(head, family, rows, arguments)
    if return_dict is None:
        return_dict = getattr(head.config, "return_dict", True)
    return output if return_dict else output.to_tuple()


def _masked_lm(head: Any, family: Family, rows: Tensor | None, arguments: Arguments) -> Any:
    outputs, index = _encode(head, family, rows, arguments)
    hidden: Tensor = outputs.last_hidden_state
    flat = hidden.flatten(0, 1)
    chosen = flat if index is None else flat.index_select(0, index)
    module = head.cls if hasattr(head, "cls") else head.lm_head
    pretraining = hasattr(module, "seq_relationship")
    scores: Tensor
    relation: Any
    scores, relation = module(chosen, outputs.pooler_output) if pretraining else (module(chosen), None)
    logits = scores if index is None else _spread(scores, index, len(flat))
    logits = logits.view(*hidden.shape[:2], -1)
    labels, next_sentence = arguments.get("labels"), arguments.get("next_sentence_label")
    loss = None
    if labels is not None and (next_sentence is not None or not pretraining):
        labels = labels.to(scores.device).flatten()
        loss = F.cross_entropy(scores, labels if index is None else labels.index_select(0, index))
    recorded = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
    if not pretraining:
        return compat.MaskedLMOutput(loss=loss, logits=logits, **recorded)
    if loss is not None and next_sentence is not None:
        loss = loss + F.cross_entropy(relation.view(-1, 2), next_sentence.view(-1))
    return compat.PreTrainingOutput(
        loss=loss, prediction_logits=logits, seq_relationship_logits=relation, **recorded
    )


def _encode(
    head: Any, family: Family, rows: Tensor | None, arguments: Arguments
) -> tuple[Any, Tensor | None]:
    """What the encoder returns, and the index of the rows to run the head on (see _index)."""
    mask, tokens = arguments.get("attention_mask"), _tokens(arguments)
    passed = {name: v for name, v in arguments.items() if name not in ("labels", "next_sentence_label")}
    if tokens is not None and mask is not None and mask.shape != tokens.shape[:2]:
        mask = tokens = None  # the encoder refuses it
    if any(t is not None and t.device.type != "cpu" for t in (mask, rows)):
        # One wait for both, before the encoder, which then has none.
        mask, rows = on_host(None if mask is None else mask.bool(), rows)
        passed |= {} if mask is None else {"attention_mask": mask}
    index = None if tokens is None else _index(mask if rows is None else rows, tokens.device)
    outputs = getattr(head, family.attribute)(**(passed | {"rows": rows, "return_dict": True}))
    if outputs.hidden_states is not None or outputs.attentions is not None:
        index = None  # every row is read then
    return outputs, index


def _index(rows: Tensor | None, device: torch.device) -> Tensor | None:
    """(n,) int64 on the device: b * length + t of each row to run the head on; None: all of them.

    rows: (batch, length), None: all. On the host it is counted without a wait.
    """
    if rows is None:
        return None
    index = rows.flatten().nonzero().squeeze(1)
    return None if len(index) == rows.numel() else index.to(device, non_blocking=True)


def _spread(scores: Tensor, index: Tensor, rows: int) -> Tensor:
    """(n, vocabulary) to (rows, vocabulary), zeros where no score is; on a CPU these are never written."""
    return scores.new_zeros(rows, scores.shape[-1]).index_copy_(0, index, scores)
