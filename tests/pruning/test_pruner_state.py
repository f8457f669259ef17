"""The state of a Pruner: a run goes on bit for bit, and the state of another run is refused."""

import copy

import pytest
import torch
from helpers.training_loop import a_pruner, bert, run

import fastgate
from fastgate.errors import CheckpointError
from fastgate.pruning import Fixed


@pytest.mark.slow
@pytest.mark.parametrize("replacement", ["mean", "shift"])
@pytest.mark.parametrize("at", [0, 1, 4, 9, 14])
def test_state_round_trip_continues_bit_for_bit(at, replacement):
    def fresh():
        model = bert(dropout=0.1)
        config = fastgate.PruningConfig(
            fastgate.Speedup(1.5), replacement, warm=0.1, ramp=0.4, harden=0.6, gate_lr=0.3
        )
        return model, fastgate.Pruner(model, config, 20, teacher=bert(seed=1))

    model, pruner = fresh()
    run(pruner, model, at)
    weights, state, noise = copy.deepcopy(model.state_dict()), pruner.state_dict(), torch.get_rng_state()
    run(pruner, model, 20 - at, first=at)

    again, resumed = fresh()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    torch.set_rng_state(noise)
    run(resumed, again, 20 - at, first=at)
    assert resumed.kept == pruner.kept and resumed.history == pruner.history
    assert torch.equal(resumed.learner.log_alpha, pruner.learner.log_alpha)
    assert torch.equal(resumed.learner.multipliers, pruner.learner.multipliers)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_state_of_another_run_is_refused():
    config = fastgate.PruningConfig(fastgate.Sparsity(0.5))
    state = fastgate.Pruner(bert(), config, 50).state_dict()
    with pytest.raises(CheckpointError, match="total_steps: got 50, wanted 60"):
        fastgate.Pruner(bert(), config, 60).load_state_dict(state)
    with pytest.raises(CheckpointError, match="got 4 gates, wanted the state of 3 gates"):
        fastgate.Pruner(bert(layers=3), config, 50).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"got no \['learner'\]"):
        fastgate.Pruner(bert(), config, 50).load_state_dict(
            {k: v for k, v in state.items() if k != "learner"}
        )


@pytest.mark.slow
@pytest.mark.parametrize("state", [None, {}, {"steps": 1}, {"learner": None}])
def test_a_state_of_something_else_is_refused(state):
    with pytest.raises(CheckpointError, match="load_state_dict: state: got no"):
        a_pruner().load_state_dict(state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "options", "name"),
    [
        (1, {"replacement": "mean"}, "replacement"),
        (5, {"target": fastgate.Sparsity(0.25)}, "target"),
        (5, {"gates": "exact"}, "gates"),
        (15, {"target": Fixed((0,))}, "target"),
    ],
)
def test_a_run_is_resumed_with_the_settings_it_began_with(steps, options, name):
    model = bert()
    pruner = a_pruner(model)
    run(pruner, model, steps)
    with pytest.raises(CheckpointError, match=name):
        a_pruner(**options).load_state_dict(pruner.state_dict())


@pytest.mark.slow
def test_the_target_may_change_while_nothing_is_learned_and_older_states_are_known():
    model = bert()
    pruner = a_pruner(model)
    run(pruner, model, 1)
    a_pruner(target=fastgate.Sparsity(0.25)).load_state_dict(pruner.state_dict())
    run(pruner, model, 4, first=1)
    older = {name: value for name, value in pruner.state_dict().items() if name != "settings"}
    a_pruner(target=fastgate.Sparsity(0.25)).load_state_dict(older)
