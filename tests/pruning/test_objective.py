"""The schedule of phases, the targets and their costs, the Lagrangian."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.batch_sizes import sizes_of
from helpers.training_loop import CPU

import fastgate
from fastgate.errors import ArgumentError
from fastgate.nn.replacement import REPLACEMENTS
from fastgate.pruning.learner import GateLearner
from fastgate.pruning.objective import Objective, costs_of, lagrangian
from fastgate.pruning.schedule import make_schedule
from fastgate.runtime.plan import flops_of, make_plan
from fastgate.runtime.unpadding import unpad


def test_the_phase_is_a_function_of_the_step():
    schedule = make_schedule(100, warm=0.05, ramp=0.25, harden=0.4)
    phases = [schedule.phase(i) for i in range(100)]
    assert [phases.index(p) for p in ("warm", "search", "recover")] == [0, 5, 40]
    shares = [schedule.target_share(i) for i in range(5, 40)]
    assert shares == sorted(shares) and 0 < shares[0] < 0.1 and shares[19] < 1.0
    assert all(share == 1.0 for share in shares[20:])


@pytest.mark.parametrize("total", [3, 4, 10])
def test_a_short_run_still_has_every_phase(total):
    schedule = make_schedule(total, 0.0, 0.0, 0.0)
    assert [schedule.phase(i) for i in range(total)] == ["warm", "search"] + ["recover"] * (total - 2)
    late = make_schedule(total, 0.9, 0.9, 0.99)
    assert {late.phase(i) for i in range(total)} == {"warm", "search", "recover"}


# -- objective


@pytest.mark.parametrize(
    ("layers", "share", "kept"), [(6, 0.67, 2), (6, 0.83, 1), (12, 0.8, 2), (12, 0.5, 6)]
)
def test_sparsity_means_whole_sublayers(layers, share, kept):
    objective = Objective(fastgate.Sparsity(share), layers)
    assert len(objective.choose(torch.rand(layers), None)) == kept
    assert objective.goal == pytest.approx(1 - kept / layers)


@pytest.mark.parametrize("replacement", ["zero", "shift"])
@pytest.mark.parametrize("demand", ["first", "asked", "every"])
def test_expected_cost_is_that_of_the_plan_it_runs_by_where_gates_are_hard(demand, replacement):
    """With the encoder's own unpadding and plan: the halo above the last attention is counted."""
    lengths, layers = [5, 7, 9], 4
    mask = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    read = {"first": torch.arange(9)[None].expand(3, 9) == 0, "asked": mask & (torch.arange(9) % 3 == 1)}
    outputs = read.get(demand)
    counts = None if outputs is None else outputs.sum(1).tolist()
    sizes = sizes_of(16, 32, 2, lengths, counts)
    costs = costs_of(sizes, layers, replacement)
    for flags in itertools.product((False, True), repeat=layers):
        step = REPLACEMENTS[replacement].step
        mixing = tuple((i, step) for i, runs in enumerate(flags) if step is not None and not runs)
        halo = sum(i > max((i for i, runs in enumerate(flags) if runs), default=-1) for i, _ in mixing)
        unpadded = unpad(3, 9, mask, outputs, CPU, halo if demand == "first" else 0)
        absorbs = unpadded.one_query_per_sequence and not unpadded.has_halo
        plan = make_plan(flags, unpadded.has_other_rows, absorbs, False, mixing, unpadded.has_halo)
        exact = flops_of(plan.steps, replace(sizes, rows_within_halo=unpadded.rows_within_halo))
        assert float(costs.total(torch.tensor(flags, dtype=torch.float64))) == pytest.approx(exact), flags


def usual_costs(layers, replacement="zero"):
    return costs_of(sizes_of(16, 32, 2, [12] * 4, [1] * 4), layers, replacement)


@pytest.mark.parametrize("replacement", ["zero", "shift"])
def test_expected_cost_is_the_mean_over_draws_and_smooth(replacement):
    costs = usual_costs(3, replacement)
    p = torch.tensor([0.9, 0.2, 0.6], dtype=torch.float64, requires_grad=True)
    mean = 0.0
    for flags in itertools.product((0.0, 1.0), repeat=3):
        z = torch.tensor(flags, dtype=torch.float64)
        mean += float(torch.where(z > 0, p, 1 - p).prod().detach() * costs.total(z))
    assert float(costs.total(p).detach()) == pytest.approx(mean)
    assert torch.autograd.gradcheck(costs.share, (p,))


@pytest.mark.parametrize(
    ("factor", "replacement"),
    [
        (1.3, "zero"),
        (2.0, "zero"),
        (5.0, "zero"),
        (1.3, "shift"),
        (1.6, "shift"),
        (1.9, "shift"),
        (3.0, "shift"),
    ],
)
def test_speedup_picks_the_best_set_within_its_cost(factor, replacement):
    costs, objective = usual_costs(5, replacement), Objective(fastgate.Speedup(factor), 5)
    for seed in range(5):
        p = torch.rand(5, generator=torch.Generator().manual_seed(seed))
        within = []
        for flags in itertools.product((0.0, 1.0), repeat=5):
            z = torch.tensor(flags, dtype=torch.float64)
            if float(costs.share(z)) <= 1 / factor:
                within.append(float((p * z).sum()))
        kept = objective.choose(p, costs)
        assert float(p[kept].sum()) == pytest.approx(max(within))


@pytest.mark.parametrize("replacement", ["zero", "shift"])
def test_speedup_out_of_reach_is_an_error(replacement):
    costs = costs_of(sizes_of(16, 32, 2, [3, 3]), 3, replacement)
    with pytest.raises(ArgumentError, match=r"Speedup: factor: got 50.0, wanted at most \d.*feed-forward"):
        Objective(fastgate.Speedup(50.0), 3).choose(torch.ones(3), costs)


def test_lagrangian_value_and_directions():
    one = torch.ones((), requires_grad=True)
    reduction = torch.tensor(0.3, requires_grad=True)
    value = lagrangian(reduction, 0.5, 2 * one, 3 * one)
    assert float(value.detach()) == pytest.approx(2 * 0.2 + 3 * 0.04)
    value.backward()
    assert reduction.grad < 0  # too little is gone: going down the term removes more


@pytest.mark.slow
@pytest.mark.parametrize("target", [fastgate.Sparsity(0.5), fastgate.Speedup(3.0)])
def test_the_lagrangian_drives_the_gates_to_the_target(target):
    objective = Objective(target, 6)
    learner = GateLearner(objective, 0.05, 0)
    learner.costs = usual_costs(6)
    for _ in range(400):
        learner.draw(objective.goal, CPU)
        learner.term().backward()
        learner.learn(1.0)
    assert float(objective.reduction(learner.p_open, learner.costs)) == pytest.approx(
        objective.goal, abs=0.06
    )


def test_no_gate_is_ever_certain():
    learner = GateLearner(Objective(fastgate.Sparsity(0.5), 2), 0.5, 0)
    for _ in range(40):
        learner.draw(0.5, CPU)
        first, second = (torch.as_tensor(z) for z in learner.drawn)
        (9 * second - 9 * first + learner.term()).backward()
        learner.learn(1.0)
    assert float(learner.p_open[0]) < 0.985 and float(learner.p_open[1]) > 0.01


def test_exact_gates_find_the_layers_that_count():
    """The loss falls with the gates of layers 1 and 4, by little with 2, not with the others."""
    objective = Objective(fastgate.Sparsity(0.67), 6)
    learner = GateLearner(objective, 0.05, 0, exact=True)
    for _ in range(300):
        learner.draw(objective.goal, CPU)
        z = [torch.as_tensor(gate) for gate in learner.drawn]
        assert sum(float(gate.detach()) for gate in z) == 2.0
        (-1.0 * z[1] - 1.0 * z[4] - 0.2 * z[2] + learner.term()).backward()
        learner.learn(1.0)
    assert objective.choose(learner.p_open, None) == [1, 4]
    assert learner.multipliers.tolist() == [0.0, 0.0]


def test_exact_gates_close_one_after_the_other():
    learner = GateLearner(Objective(fastgate.Sparsity(0.67), 6), 0.05, 0, exact=True)
    counts = []
    for target in (0.0, 0.1, 0.2, 0.4, 0.67):
        learner.draw(target, CPU)
        counts.append(sum(float(torch.as_tensor(gate).detach()) > 0 for gate in learner.drawn))
    assert counts == [6, 5, 5, 4, 2]
