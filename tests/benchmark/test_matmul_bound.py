"""The matmul lower bound: it multiplies what the plan says, and nothing else."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import fastgate
from fastgate.benchmark.matmul_bound import MatmulLowerBound

pytestmark = pytest.mark.slow


def test_the_matmul_lower_bound_is_the_products_of_the_plan():
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    model = fastgate.patch(BertForSequenceClassification(config).eval())
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": mask}
    tokens, pairs, h, i = 6, 4 * 4 + 2 * 2, 32, 64
    full = 2 * tokens * h * (4 * h + 2 * i) + 4 * pairs * h  # a whole layer
    last = 2 * 2 * h * (4 * h + 2 * i) + 2 * 2 * tokens * h * 4  # one query a sequence, absorbed
    assert MatmulLowerBound(model, [batch]).flops == [2 * full + last]
    fastgate.prune(model, keep=[0], replacement="zero")
    bound = MatmulLowerBound(model, [batch])
    assert bound.flops == [last + 2 * 2 * 2 * h * 2 * i]
    bound(batch)
    assert bound.flops[0] == fastgate.explain(model, [4, 2]).flops
    shifted = fastgate.patch(BertForSequenceClassification(config).eval())
    fastgate.prune(shifted, keep=[0], replacement="shift")
    every_row = full + 2 * 2 * tokens * h * 2 * i
    assert MatmulLowerBound(shifted, [batch]).flops[0] == fastgate.explain(shifted, [4, 2]).flops < every_row
