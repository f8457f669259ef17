"""Frozen models that are copied, pickled, saved, or sent to another process or processor."""

from __future__ import annotations

import copy
import importlib
import pickle
from unittest import mock

import pytest
import torch
from helpers import encoders
from helpers.frozen_models import frozen, outputs, packed

import fastgate


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_frozen_and_apart(way):
    plain, ours = frozen()
    batch = encoders.batch(plain, "ForSequenceClassification")
    other = way(ours)
    assert len(packed(other)) == len(packed(ours)) > 0
    assert torch.equal(outputs(other, batch)[0], outputs(ours, batch)[0])
    other.load_state_dict({name: torch.zeros_like(t) for name, t in other.state_dict().items()})
    torch.testing.assert_close(outputs(ours, batch)[0], outputs(plain, batch)[0], rtol=1e-4, atol=1e-5)


def test_save_and_load(tmp_path):
    plain, ours = frozen(keep=[1])
    fastgate.save(ours, tmp_path / "saved")
    batch = encoders.batch(plain, "ForSequenceClassification")
    loaded = fastgate.load(tmp_path / "saved")
    assert not packed(loaded)
    torch.testing.assert_close(outputs(loaded, batch)[0], outputs(plain, batch)[0])


def test_a_frozen_model_in_a_file(tmp_path):
    plain, ours = frozen()
    torch.save(ours, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    batch = encoders.batch(plain, "ForSequenceClassification")
    assert torch.equal(outputs(loaded, batch)[0], outputs(ours, batch)[0])
    fastgate.thaw(loaded)
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in loaded.state_dict().items())


def test_panels_are_packed_anew_for_a_processor_without_them():
    _, ours = frozen("ForTokenClassification")
    state = pickle.dumps(ours)
    with mock.patch.object(importlib.import_module("fastgate.ops.linear"), "interleaving", return_value=0):
        unpickled = pickle.loads(state)
        assert not any(module.packed.in_panels for module in packed(unpickled))
        again = pickle.dumps(unpickled)
    back = pickle.loads(again)
    for model in (unpickled, back):
        assert all(torch.equal(t, ours.state_dict()[name]) for name, t in model.state_dict().items())


def answer(models, batch, queue):
    queue.put({name: outputs(model, batch)[0].numpy() for name, model in models.items()})


def sent():
    """Models by name, plain, pruned and frozen, in both layouts of packed weights."""
    models = {}
    for keep in (None, [1]):
        for layout in ("plain", "panels", "onednn"):
            model = fastgate.patch(encoders.make("Bert", "ForSequenceClassification"))
            if keep is not None:
                fastgate.prune(model, keep=keep, replacement="shift")
            if layout == "panels":
                fastgate.freeze(model)
            if layout == "onednn":
                with mock.patch.object(
                    importlib.import_module("fastgate.ops.linear"), "interleaving", return_value=0
                ):
                    fastgate.freeze(model)
            models[f"{layout}, {keep}"] = model
    return models


@pytest.mark.slow
@pytest.mark.parametrize("strategy", sorted(torch.multiprocessing.get_all_sharing_strategies()))
def test_models_go_to_a_spawned_process(strategy):
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(strategy)
    try:
        models = sent()
        batch = encoders.batch(models["plain, None"], "ForSequenceClassification")
        want = {name: outputs(model, batch)[0] for name, model in models.items()}
        context = torch.multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        process = context.Process(target=answer, args=(models, batch, queue))
        process.start()
        got = queue.get()
        process.join(60)
        assert process.exitcode == 0
        for name, logits in want.items():
            torch.testing.assert_close(torch.from_numpy(got[name]), logits, rtol=1e-5, atol=1e-5)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
