"""FinetuneConfig and targets: one config for the command line, sweeps and Python."""

from __future__ import annotations

import json

import pytest

from fastgate.errors import ArgumentError
from fastgate.pruning import Distill, Fixed, PruningConfig, Sparsity, Speedup
from fastgate.pruning.objective import Objective
from fastgate.training.config import FinetuneConfig, PruningOptions
from fastgate.training.phases import Fit
from fastgate.training.targets import (
    MaxDrop,
    describe_target,
    key_of,
    number_of,
    removed_of,
    target_settings,
    targets_in,
)

TARGETS = [
    (Sparsity(0.5), "sparsity", 0.5),
    (Speedup(2.0), "speedup", 2.0),
    (MaxDrop(0.02), "max_drop", 0.02),
    (Fixed((0, 2)), "keep", None),
]


@pytest.mark.parametrize("target, key, number", TARGETS)
def test_a_target_has_one_key_and_number_in_files(target, key, number):
    assert key_of(target) == key and number_of(target) == number
    settings = target_settings(target)
    assert list(settings) == ["sparsity", "speedup", "max_drop"]
    assert {name for name, value in settings.items() if value is not None} == {key} - {"keep"}
    assert targets_in(settings) == ([target] if key != "keep" else [])


@pytest.mark.parametrize(
    "target, layers, text",
    [
        (Sparsity(0.67), 6, "remove 4 of 6 attention sublayers, 67%"),
        (Sparsity(0.67), 12, "remove 8 of 12 attention sublayers, 67%"),
        (Sparsity(0.5), 3, "remove 2 of 3 attention sublayers, 67%"),
        (Speedup(2.5), 6, "divide the FLOPs of the encoder by 2.5"),
        (MaxDrop(0.01), 6, "remove as many of 6 attention sublayers as a loss of 1% of the score allows"),
        (Fixed((0, 2)), 6, "keep the attention of layers 0, 2 of 6"),
    ],
)
def test_a_target_in_words_has_whole_layers(target, layers, text):
    assert describe_target(target, layers) == text


@pytest.mark.parametrize("layers", [1, 3, 6, 12, 24])
def test_the_layers_that_are_announced_are_those_that_the_objective_removes(layers):
    for percent in range(50, 100, 5):
        target = Sparsity(percent / 100)
        assert Objective(target, layers).removed == removed_of(target, layers)


def test_a_number_that_a_target_cannot_have_is_refused():
    for key, number in (("sparsity", 1.0), ("speedup", 1.0), ("max_drop", 0.0)):
        with pytest.raises(ArgumentError):
            targets_in({key: number})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 0}, "FinetuneConfig: batch_size: got 0, wanted a whole number from 1"),
        ({"dense_lr": 0.0}, "FinetuneConfig: dense_lr: got 0.0"),
        ({"prune_lr": 2.0}, "FinetuneConfig: prune_lr: got 2.0"),
        ({"prune_epochs": float("nan")}, "FinetuneConfig: prune_epochs: got nan"),
        ({"warmup": 1.0}, "FinetuneConfig: warmup: got 1.0"),
        ({"seed": -1}, "FinetuneConfig: seed: got -1"),
        ({"pooling": "max"}, "FinetuneConfig: pooling: got 'max', wanted one of first, mean"),
    ],
)
def test_a_config_is_checked_when_it_is_made(changes, message):
    with pytest.raises(ArgumentError, match=message):
        FinetuneConfig(model="m", task="sst2", **changes)


def test_the_settings_of_a_run_are_flat_json():
    config = FinetuneConfig(model="m", task="sst2", dense_epochs=2.0, data={"data_dir": "d"})
    settings = config.to_settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings == {
        "model": "m", "task": "sst2", "sparsity": 0.67, "speedup": None, "max_drop": None, "max_length": 128,
        "stride": None, "pooling": "first", "batch_size": 32, "lr": 5e-5, "bf16": False, "seed": 0,
        "epochs": 2.0, "prune_epochs": 3.0, "warmup": 0.06, "data": {"data_dir": "d"},
    }  # fmt: skip


def test_settings_that_the_command_line_lacks_are_kept_where_they_differ():
    config = FinetuneConfig(
        model="m",
        task="sst2",
        target=Fixed((1,)),
        prune_lr=1e-4,
        pruning=PruningOptions(gate_lr=0.1, swap=0.2),
    )
    settings = config.to_settings()
    assert {key: settings[key] for key in ("keep", "prune_lr", "gate_lr", "swap")} == {
        "keep": [1], "prune_lr": 1e-4, "gate_lr": 0.1, "swap": 0.2,
    }  # fmt: skip
    assert settings["sparsity"] is None and "teacher" not in settings


def test_each_phase_has_its_own_epochs_and_rate():
    config = FinetuneConfig(
        model="m", task="sst2", dense_epochs=1.0, prune_epochs=2.0, dense_lr=1e-3, prune_lr=1e-4, seed=3
    )
    assert config.dense_fit == Fit(1.0, 32, 1e-3, 0.06, 3, False)
    assert config.prune_fit == Fit(2.0, 32, 1e-4, 0.06, 3, False)


def test_a_short_search_moves_its_gates_faster():
    config = FinetuneConfig(model="m", task="sst2")
    usual = PruningConfig.gate_lr
    rates = [config.with_gate_lr_for(steps).pruning.gate_lr for steps in (10_000, 536, 1)]
    assert rates[0] == usual and usual < rates[1] < 8 * usual and rates[2] == 8 * usual
    own = FinetuneConfig(model="m", task="sst2", pruning=PruningOptions(gate_lr=0.15))
    assert own.with_gate_lr_for(1) is own


def test_pruning_options_reach_the_pruning_config():
    config = FinetuneConfig(
        model="m", task="sst2", seed=5, pruning=PruningOptions(hidden=0, logits=0, harden=0.4)
    )
    pruning = config.pruning_config("text", Sparsity(0.5))
    assert (pruning.distill, pruning.harden, pruning.seed) == (None, 0.4, 5)
    assert FinetuneConfig(model="m", task="t").pruning_config("tokens", Sparsity(0.5)).distill == (
        Distill.for_tokens()
    )
