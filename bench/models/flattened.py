"""The baseline `flash varlen`: transformers' own encoder on a flattened batch, without padding.

sentence-transformers 6 and transformers' DataCollatorWithFlattening do the same: the sequences of a batch
stand one after another in one row, position ids start anew in each, and `cu_seq_lens_q` tells the attention
function where each begins. Here that function is torch's `varlen_attn` (torch 2.10 and newer), registered
with transformers' AttentionInterface, so that no other package is needed. The batch is flattened before the
timing, as a collator does it. sentence-transformers does not flatten for classifiers, because their pooler
reads token 0 of a row; here the encoder runs without its pooler, which is then given the first token of each
sequence.

torch's varlen_attn has no dropout: in training this baseline leaves the dropout of attention out.

Tried on the CPU, with attention per sequence in place of varlen_attn. Not tried: varlen_attn itself, which
needs a GPU; it is compared with SDPA's logits there before it is timed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.modeling_outputs import SequenceClassifierOutput

ATTENTION = "fastgate_bench_varlen"


def missing() -> str | None:
    """Why the baseline does not run on this machine's GPU; None if it does."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn"
    return None


def flatten(batch: dict[str, Tensor]) -> dict[str, Any]:
    """A padded batch (padding on the right) as one row (1, tokens), with what tells the sequences apart."""
    mask = batch["attention_mask"].bool()
    lengths = mask.sum(-1)
    ends = functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    longest = int(lengths.max())
    flat = {
        "input_ids": batch["input_ids"][mask][None],
        "position_ids": positions[mask][None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return flat | ({"labels": batch["labels"]} if "labels" in batch else {})


def per_sequence(query: Tensor, key: Tensor, value: Tensor, ends: Tensor) -> Tensor:
    """What varlen_attn computes, (tokens, heads, head size), by one SDPA call per sequence."""
    pieces = []
    for start, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        pieces.append(functional.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(pieces)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query, key and value are (1, heads, tokens, head size)."""
    assert attention_mask is None, "a flattened batch has no mask"
    # The scale is the default of varlen_attn and SDPA. Not all versions of varlen_attn take one.
    assert scaling is None or abs(scaling - query.shape[-1] ** -0.5) < 1e-9, f"scale {scaling}"
    rows = [t.squeeze(0).transpose(0, 1).contiguous() for t in (query, key, value)]
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = cu_seq_lens_q, max_length_q
        mixed: Any = varlen_attn(*rows, ends, ends, longest, longest)
    else:
        mixed = per_sequence(*rows, cu_seq_lens_q)
    return mixed[None], None


class FlattenedClassifier(nn.Module):
    """A BertForSequenceClassification on the flattened batches of `flatten`; its weights are copies."""

    def __init__(self, reference: nn.Module):
        super().__init__()
        AttentionInterface.register(ATTENTION, varlen_attention)
        model: Any = copy.deepcopy(reference)
        model.set_attn_implementation(ATTENTION)
        # A pooler reads token 0 of a row, which is one sequence's only: it is called on all first tokens.
        self.pooler, model.bert.pooler = model.bert.pooler, None
        self.encoder, self.dropout, self.classifier = model.bert, model.dropout, model.classifier

    def forward(self, labels: Tensor | None = None, **flat: Any) -> SequenceClassifierOutput:
        hidden = self.encoder(**flat).last_hidden_state
        first = hidden[0, flat["cu_seq_lens_q"][:-1]]
        logits = self.classifier(self.dropout(self.pooler(first[:, None])))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
