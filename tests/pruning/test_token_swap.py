"""Rows with swapped tokens: which tokens, in which steps, and that a resumed run swaps the same."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.training_loop import batch, bert

import fastgate
from fastgate.pruning import Distill
from fastgate.pruning.token_swap import swap_tokens

CLS, SEP, PAD = 101, 102, 0


def rows():
    """A pair with two separators, a single text, a row padded on the left, one of special tokens alone."""
    ids = [
        [CLS, 11, 12, SEP, 13, 14, SEP],
        [CLS, 21, 22, 23, SEP, PAD, PAD],
        [PAD, PAD, CLS, 31, 32, 33, SEP],
        [CLS, SEP, PAD, PAD, PAD, PAD, PAD],
    ]
    ids = torch.tensor(ids * 8)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": torch.arange(len(ids))}


def swapped(inputs, share, seed=0):
    return swap_tokens(inputs, share, torch.Generator().manual_seed(seed))


def test_special_tokens_and_padding_stay_and_are_put_nowhere():
    inputs = rows()
    before = inputs["input_ids"]
    found = swapped(inputs, 1.0)
    after = found["input_ids"]
    special = (before == CLS) | (before == SEP) | (before == PAD)
    assert torch.equal(after[special], before[special])
    assert set(after[~special].tolist()) <= set(before[~special].tolist())
    assert found["labels"] is inputs["labels"] and found["attention_mask"] is inputs["attention_mask"]
    assert not torch.equal(after, before) and inputs["input_ids"] is before


def test_about_the_share_asked_for_is_swapped_and_from_any_row():
    ids = torch.arange(1, 1 + 64 * 32).view(64, 32)
    after = swapped({"input_ids": ids}, 0.3)["input_ids"]
    moved = after != ids
    assert not moved[:, 0].any() and not moved[:, -1].any()
    assert 0.25 < float(moved[:, 1:-1].float().mean()) < 0.31
    rows_of = (after[moved] - 1) // 32
    assert len(rows_of.unique()) > 32 and rows_of.float().mean().sub(31.5).abs() < 5


def test_nothing_asked_for_or_no_ids_is_nothing_swapped():
    inputs = rows()
    assert torch.equal(swapped(inputs, 0.0)["input_ids"], inputs["input_ids"])
    assert swapped({"inputs_embeds": 1}, 1.0) == {"inputs_embeds": 1}


def pruner_of(distill, taught=True):
    model = bert()
    config = fastgate.PruningConfig(fastgate.Sparsity(0.5), warm=0.2, ramp=0.4, harden=0.6, distill=distill)
    return model, fastgate.Pruner(model, config, 10, bert(seed=1) if taught else None)


def course(model, pruner, steps, first=0):
    """Per step: whether tokens were swapped, and the weight of the task's own loss."""
    found = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    for i in range(first, first + steps):
        plain = batch(i)
        inputs = pruner.prepare(plain)
        found.append((inputs["input_ids"].tolist() != plain["input_ids"].tolist(), pruner.task_weight))
        outputs = model(**inputs)
        pruner.loss(outputs, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    return found


def test_every_other_step_once_the_attention_is_measured_and_labels_count_nothing_there():
    found = course(*pruner_of(Distill(labels=0.5, swap=0.5)), 10)
    assert found == [(False, 0.5)] * 3 + [(True, 0.0), (False, 0.5)] * 3 + [(True, 0.0)]


@pytest.mark.parametrize(
    "distill, taught",
    [(Distill(swap=0.0), True), (Distill(swap=0.5), False), (Distill(logits=0, hidden=0, swap=0.5), True)],
)
def test_nobody_to_label_them_is_nothing_swapped(distill, taught):
    assert not any(was for was, _ in course(*pruner_of(distill, taught), 10))


def test_a_resumed_run_swaps_as_the_whole_one_did():
    model, pruner = pruner_of(Distill(swap=0.5))
    course(model, pruner, 7)
    state = copy.deepcopy(pruner.state_dict())
    _, resumed = pruner_of(Distill(swap=0.5))
    resumed.load_state_dict(state)
    one, two = pruner.prepare(batch(7)), resumed.prepare(batch(7))
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert not torch.equal(one["input_ids"], batch(7)["input_ids"])
