"""Settings of pruning: every number is finite, of its kind and in its range, every argument of its type."""

import numpy as np
import pytest
import torch
from helpers.training_loop import TOTAL, a_pruner, batch, bert, config

import fastgate
from fastgate.errors import ArgumentError
from fastgate.pruning import Distill, Fixed, baselines

pytestmark = pytest.mark.slow

NUMBERS = [
    (fastgate.Sparsity, "share", 0.5, [1.0, 0.0, -0.5, 2]),
    (fastgate.Speedup, "factor", 2.0, [1.0, 0.5, -2.0]),
    (Distill, "logits", 0.5, [-0.1]),
    (Distill, "hidden", 0.5, [-0.1]),
    (Distill, "labels", 0.5, [-0.1]),
    (Distill, "temperature", 2.0, [0.0, -1.0]),
    (Distill, "dropout", 0.5, [1.0, -0.1]),
    (Distill, "swap", 0.5, [1.1, -0.1]),
    (lambda **kw: config(**kw), "gate_lr", 0.5, [0.0, -1.0]),
    (lambda **kw: config(**kw), "replacement_lr", 2.0, [0.0, -1.0]),
    (lambda **kw: config(**{"harden": 0.6} | kw), "warm", 0.1, []),
    (lambda **kw: config(**kw), "ramp", 0.5, []),
    (lambda **kw: config(**kw), "harden", 0.5, []),
]


NO_NUMBERS = [
    float("nan"),
    float("inf"),
    -float("inf"),
    True,
    "0.5",
    None,
    [0.5],
    1j,
    np.bool_(True),
    np.ones(2),
]


@pytest.mark.parametrize(("make", "name", "good", "bad"), NUMBERS)
def test_settings_are_finite_numbers_and_nothing_else(make, name, good, bad):
    for value in [*NO_NUMBERS, *bad, torch.tensor(float("nan")), np.float32("inf")]:
        with pytest.raises(ArgumentError, match=f"{name}: got "):
            make(**{name: value})
    for value in (good, np.float64(good), np.float32(good), torch.tensor(good)):
        found = make(**{name: value})
        assert type(getattr(found, name)) is float and getattr(found, name) == pytest.approx(good)


@pytest.mark.parametrize("seed", [True, 1.5, "0", None, float("nan"), 2**64])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ArgumentError, match="PruningConfig: seed: got"):
        config(seed=seed)
    assert type(config(seed=np.int64(3)).seed) is int


@pytest.mark.parametrize("total", [2, 0, -1, 2.5, True, "20", float("nan"), None])
def test_a_run_has_a_whole_number_of_steps(total):
    if total is None:
        with pytest.raises(ArgumentError, match="total_steps: got None"):
            a_pruner(total=None).prepare(batch())
        return
    with pytest.raises(ArgumentError, match="total_steps: got"):
        a_pruner(total=total)
    assert a_pruner(total=np.int64(20)).schedule.total == 20


@pytest.mark.parametrize("keep", [1, "01", None, (0.5,), (True,), ("0",), (-1,), (None,)])
def test_layers_chosen_by_hand_are_indices(keep):
    with pytest.raises(ArgumentError, match="Fixed: keep: got"):
        Fixed(keep)
    assert Fixed([np.int64(2), torch.tensor(0)]).keep == (2, 0)


@pytest.mark.parametrize("keep", [True, 1.5, "2", None, 0, 5])
def test_a_number_of_layers_is_whole(keep):
    with pytest.raises(ArgumentError, match="baselines: keep: got"):
        baselines.top_drop(4, keep)


def test_a_share_that_removes_nothing_is_refused():
    with pytest.raises(
        ArgumentError, match=r"share: got 0\.1, which removes none of 4, wanted 0\.125 or more"
    ):
        a_pruner(target=fastgate.Sparsity(0.1))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("config", 0.5), ("teacher", "bert-base"), ("model", "bert-base"), ("model", None)],
)
def test_arguments_of_another_kind_are_refused(tmp_path, argument, value):
    from helpers.trainer_runs import arguments, rows

    given = {"model": bert(), "config": config(), "teacher": None} | {argument: value}
    with pytest.raises(ArgumentError, match=f"Pruner: {argument}: got {value!r}"):
        fastgate.Pruner(given["model"], given["config"], TOTAL, given["teacher"])
    if argument == "teacher":
        with pytest.raises(ArgumentError, match="Pruner: teacher: got 'bert-base'"):
            fastgate.SelfPruningTrainer(
                bert(), arguments(tmp_path), pruning=config(), teacher=value, train_dataset=rows()
            )
