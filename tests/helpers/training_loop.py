"""A tiny BERT, batches for it, a Pruner of it, and a plain training loop around a Pruner."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import fastgate

CPU = torch.device("cpu")
TOTAL = 20  # steps of a run of `a_pruner`


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


def config(**options):
    options = {"warm": 0.1, "ramp": 0.4, "harden": 0.6, "gate_lr": 0.3} | options
    return fastgate.PruningConfig(options.pop("target", fastgate.Sparsity(0.5)), **options)


def a_pruner(model=None, teacher=None, total=TOTAL, **options):
    return fastgate.Pruner(model or bert(), config(**options), total, teacher)


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


def facts(model):
    """Rates of dropout, modes and requires_grad flags: what a Pruner changes and gives back."""
    dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    return dropouts, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
