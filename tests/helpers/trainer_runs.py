"""A short self-pruning run in the Trainer: its model, rows, arguments, and what two runs must end with."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

import fastgate

STEPS, HARDEN = 12, 8


def bert(seed=0):
    set_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )


def rows(count=48):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (count, 8), generator=g)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[1] > 20)} for row in ids
    ]


def config(**options):
    target = options.pop("target", fastgate.Sparsity(0.67))
    return fastgate.PruningConfig(target, warm=0.1, ramp=0.4, harden=HARDEN / STEPS, gate_lr=0.3, **options)


def arguments(folder, **options):
    given = dict(
        output_dir=str(folder), per_device_train_batch_size=8, num_train_epochs=2, logging_steps=2,
        save_strategy="steps", save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, seed=3,
        learning_rate=1e-3,
    )  # fmt: skip
    return TrainingArguments(**(given | options))


def trainer(folder, cls=fastgate.SelfPruningTrainer, teacher=True, pruning=None, callbacks=None, **options):
    return cls(
        bert(),
        arguments(folder, **options),
        pruning=pruning or config(),
        teacher=bert(seed=5) if teacher else None,
        train_dataset=rows(),
        eval_dataset=rows(16),
        callbacks=callbacks,
    )


def end_state(found):
    return found.model.state_dict(), found.pruner.state_dict()


def assert_same_end(first, second):
    (weights, state), (other_weights, other_state) = first, second
    assert weights.keys() == other_weights.keys()
    for name in weights:
        assert torch.equal(weights[name], other_weights[name]), name
    assert state["kept"] == other_state["kept"] and state["history"] == other_state["history"]
    for name in ("log_alpha", "multipliers", "generator"):
        assert torch.equal(state["learner"][name], other_state["learner"][name]), name
