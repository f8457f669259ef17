"""A tiny BERT, batches for it, and a plain training loop around a Pruner."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification

CPU = torch.device("cpu")


def bert(layers=4, dropout=0.0, seed=0, head=BertForSequenceClassification):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
    )
    return head(config)


def batch(seed=0, rows=6, length=9):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (rows, length), generator=g)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=g)
    lengths[0] = length
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(length) < lengths).long(),
        "labels": (ids[:, 1] > 20).long(),
    }


def loss_of(pruner, model, inputs):
    """The complete loss of one batch."""
    inputs = pruner.prepare(inputs)
    return pruner.loss(model(**inputs), inputs)


def pruning_loss_of(pruner, model, inputs, **options):
    """What the Pruner adds to the task's loss of one batch."""
    inputs = pruner.prepare(inputs)
    outputs = model(**inputs, **options)
    return pruner.pruning_loss([pruner.take_forward(outputs, inputs)])


def run(pruner, model, steps, first=0, lr=1e-3):
    """Train `steps` optimizer steps, one batch each, in a plain loop."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for i in range(first, first + steps):
        loss_of(pruner, model, batch(i)).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
