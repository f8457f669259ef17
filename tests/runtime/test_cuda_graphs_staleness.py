"""Graphs of an encoder that changes: never stale, and captured anew only where they would be."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.encoders import batch
from helpers.fake_cuda_graph import Tape
from helpers.graph_models import CHANGES, captured, graphs_of, patched, same

import fastgate
from fastgate.models.handle import get_encoder


def test_values_changed_in_place_are_seen(stand_in):
    model, plain = patched()
    inputs = batch(model, "")
    found = captured(model, plain, inputs)
    for one in (model, plain):
        with torch.no_grad():
            one.bert.encoder.layer[0].attention.self.query.weight.mul_(0.5)
            one.bert.embeddings.LayerNorm.bias.add_(0.1)
            one.bert.encoder.layer[2].output.dense.weight.data += 0.05  # bumps no version
    same(model, plain, inputs)
    assert found.captures == 1 and found.replays == 2


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_encoder_is_captured_anew(stand_in, change):
    model, plain = patched()
    inputs = batch(model, "")
    found = captured(model, plain, inputs)
    for one in (model, plain):
        CHANGES[change](one)
    for _ in range(3):
        same(model, plain, inputs)
    assert found.captures == 2 and found.replays == 3 and not found.refused


def test_gates_that_come_back_find_their_graph(stand_in):
    model, plain = patched()
    inputs = batch(model, "")
    found = captured(model, plain, inputs)
    for gates, captures in (([1.0, 1.0, 0.0], 2), ([1.0] * 3, 2), ([1.0, 1.0, 0.0], 2)):
        for one in (model, plain):
            get_encoder(one).set_gates(gates)
        for _ in range(2):
            same(model, plain, inputs)
        assert found.captures == captures


def test_hooks_run(stand_in):
    """A hook that comes when there is a graph is not lost, and once it is gone there is a graph again."""
    model, plain = patched()
    inputs = batch(model, "")
    found = captured(model, plain, inputs)
    called = []
    handle = model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_: called.append(1))
    same(model, plain, inputs)
    same(model, plain, inputs)
    assert len(called) == 2 and found.eager_reasons["hooks, or a replaced forward"] == 2
    handle.remove()
    captured(model, plain, inputs)
    assert found.captures == 2
    with pytest.raises(fastgate.errors.Unsupported, match="hook"), torch.inference_mode():
        model.bert.encoder.layer[0].attention.self.register_forward_hook(lambda *_: None)
        model(**inputs)


def test_copies_begin_without_graphs(stand_in):
    model, plain = patched()
    inputs = batch(model, "")
    captured(model, plain, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert graphs_of(other) is not graphs_of(model) and not graphs_of(other).graphs
        captured(other, plain, inputs)
    # A replica shares what the encoder carries, but not its weights.
    replica = copy.copy(model.bert)
    replica._modules = dict(model.bert._modules, embeddings=copy.deepcopy(model.bert.embeddings))
    with torch.no_grad():
        replica.embeddings.LayerNorm.weight.mul_(2.0)
        want = plain.bert(**inputs).last_hidden_state
        assert not torch.allclose(replica(**inputs).last_hidden_state, want)
    same(model, plain, inputs)


def test_the_bench_of_a_fingerprint(stand_in):
    """Its host time is one of the smallest parts of a call: it makes no tensor and calls no op."""
    model, plain = patched()
    found = captured(model, plain, batch(model, ""))
    with Tape() as tape:
        inspection = model.bert.fastgate_runtime.inspections.of(model.bert)
        assert found.fingerprint.matches(inspection) and not found.fingerprint.drops()
    assert not tape.steps
