"""The controls: choices that learn nothing, or little."""

import pytest
from helpers.training_loop import batch, bert

import fastgate
from fastgate.errors import ArgumentError
from fastgate.models.handle import get_encoder
from fastgate.pruning import baselines


def test_controls():
    assert baselines.top_drop(6, 2) == [0, 1]
    assert baselines.every_other(6, 3) == [0, 2, 4]
    assert baselines.every_other(12, 3) == [0, 4, 8]
    assert baselines.random_choice(6, 3, seed=1) == baselines.random_choice(6, 3, seed=1)
    assert len({tuple(baselines.random_choice(6, 3, seed=s)) for s in range(20)}) > 5
    with pytest.raises(ArgumentError, match="keep: got 0"):
        baselines.top_drop(6, 0)


def test_greedy_closes_what_raises_the_loss_least():
    model = fastgate.patch(bert()).train()
    state, batches = get_encoder(model), [batch(1), batch(2)]
    losses = {}
    model.eval()
    for drop in range(4):
        state.set_gates([float(i != drop) for i in range(4)])
        losses[drop] = sum(float(model(**b).loss.detach()) for b in batches)
    state.set_gates([1.0] * 4)
    model.train()
    best = min(losses, key=losses.get)
    assert baselines.greedy_by_loss(model, batches, 3) == [i for i in range(4) if i != best]
    assert state.gates == [1.0] * 4 and model.training
    with pytest.raises(ArgumentError, match="batches: got 0"):
        baselines.greedy_by_loss(model, [], 2)
