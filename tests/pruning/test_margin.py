"""How clearly a search told the layers apart: the margin, and a tie that is said."""

import warnings

import pytest
import torch
from helpers.training_loop import a_pruner, bert, run

import fastgate
from fastgate.pruning import Fixed
from fastgate.pruning.gate_search import SEPARATED
from fastgate.pruning.objective import Costs, Objective

pytestmark = pytest.mark.slow


def test_a_tie_is_not_a_choice():
    model = bert()
    pruner = a_pruner(model)
    with pytest.warns(UserWarning, match=r"not told the layers apart: kept \[0, 1\].*within 0\.000"):
        pruner.harden()
    assert pruner.margin == 0.0 and pruner.separated is False
    assert pruner.metrics()["pruning/margin"] == 0.0


@pytest.mark.parametrize(("gap", "separated"), [(1.0, True), (0.01, False)])
def test_the_margin_is_that_of_the_last_kept_and_the_first_dropped(gap, separated):
    pruner = a_pruner()
    pruner.learner.log_alpha.data.copy_(torch.tensor([1.0, 1.0 - gap, 2.0, -3.0]))
    p = pruner.learner.p_open.tolist()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert pruner.harden() == [0, 2]
    assert pruner.margin == pytest.approx(p[0] - p[1]) and pruner.separated is separated
    assert bool(said) is not separated
    assert (pruner.margin >= SEPARATED) is separated


@pytest.mark.parametrize("target", [Fixed((1, 2)), fastgate.Sparsity(0.95)])
def test_without_another_choice_there_is_no_margin(target):
    pruner = a_pruner(target=target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.harden()
    assert pruner.margin is None and pruner.separated is None and "pruning/margin" not in pruner.metrics()


def test_the_margin_of_a_speed_is_that_of_the_next_best_set():
    from itertools import combinations

    layers = 5
    costs = Costs(3.0, 5.0, (2.0, 4.0, 6.0, 8.0, 10.0, 1.0))
    objective = Objective(fastgate.Speedup(1.5), layers)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        p = torch.rand(layers, generator=generator, dtype=torch.float64)
        kept = objective.choose(p, costs)
        sums = []
        for count in range(layers + 1):
            for keep in combinations(range(layers), count):
                open_ = torch.zeros(layers, dtype=torch.float64)
                open_[list(keep)] = 1.0
                fits = float(costs.share(open_)) <= 1 / 1.5 + 1e-9
                if fits and not set(keep) <= set(kept):
                    sums.append(float(p[list(keep)].sum()))
        expected = float(p[kept].sum()) - max(sums) if sums else None
        assert objective.margin(p, costs) == pytest.approx(expected, abs=1e-9)


def test_the_margin_is_kept_with_the_state():
    model = bert()
    pruner = a_pruner(model)
    run(pruner, model, 15)
    assert pruner.history[-1]["margin"] == pruner.margin and pruner.history[0]["margin"] is None
    state = pruner.state_dict()
    again = a_pruner()
    again.load_state_dict(state)
    assert again.margin == pruner.margin is not None
    older = a_pruner()
    older.load_state_dict({name: value for name, value in state.items() if name != "margin"})
    assert older.margin is None and older.kept == pruner.kept


def test_gates_hardened_early_are_those_of_the_whole_target():
    """While the target still rises, exact gates are compared as it asks at its end."""
    model = bert()
    pruner = a_pruner(model, gates="exact", total=50, ramp=0.5)
    run(pruner, model, 8)
    with torch.no_grad():
        pruner.learner.log_alpha.copy_(torch.tensor([-3.0, -1.0, 2.0, 3.0]))
    assert pruner.open_probabilities == [1.0] * 4
    assert pruner.harden() == [2, 3] and pruner.separated is True
