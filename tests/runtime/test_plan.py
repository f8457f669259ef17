"""The plan: seven steps a kept layer, three a skipped one, rows by liveness, costs by hand."""

from dataclasses import replace

import pytest
from helpers.batch_sizes import sizes_of
from helpers.executed_steps import ABSORBED_STEPS, KEPT_STEPS, SKIPPED_STEPS
from hypothesis import given
from hypothesis import strategies as st

from fastgate.runtime.plan import flops_of, make_plan
from fastgate.runtime.steps.token_shift import TokenShiftNorm


def names(plan, layer):
    return [step.name for step in plan.of_layer(layer)]


def test_kept_layers_are_seven_steps_and_skipped_ones_three():
    plan = make_plan(
        (True, False, False, True), output_rows_only=False, one_query_per_sequence=False, capture=False
    )
    assert names(plan, 0) == list(KEPT_STEPS) and len(KEPT_STEPS) == 7
    assert names(plan, 1) == names(plan, 2) == list(SKIPPED_STEPS) and len(SKIPPED_STEPS) == 3
    assert plan.of_layer(0)[-1].takes_next_norm and not plan.of_layer(2)[-1].takes_next_norm
    assert plan.kept == (0, 3)


def test_the_last_attention_is_absorbed_where_one_row_a_sequence_is_read():
    plan = make_plan((True, True, False), output_rows_only=True, one_query_per_sequence=True, capture=False)
    assert names(plan, 0) == list(KEPT_STEPS)
    assert names(plan, 1) == list(ABSORBED_STEPS)
    assert not any(step.output_rows_only for step in plan.of_layer(0)) and all(
        step.output_rows_only for step in plan.of_layer(1)
    )


def test_a_shift_is_a_step_and_keeps_the_rows_below_it_alive():
    plan = make_plan(
        (True, False, False, False),
        output_rows_only=True,
        one_query_per_sequence=True,
        capture=False,
        mixing=((2, TokenShiftNorm),),
    )
    assert names(plan, 0) == list(KEPT_STEPS) and names(plan, 1) == names(plan, 3) == list(SKIPPED_STEPS)
    assert names(plan, 2) == ["shift_norm", *SKIPPED_STEPS]
    assert [step.output_rows_only for step in plan.steps] == [False] * (1 + 7 + 3) + [True] * (4 + 3)
    assert [plan.of_layer(i)[-1].takes_next_norm for i in range(4)] == [True, False, True, False]
    assert plan.kept == (0,)
    sizes = sizes_of(8, 32, 2, (3, 5), (1, 1))
    assert flops_of(plan.of_layer(2), sizes) == 2 * (2 * 2 * 8 * 32)
    assert flops_of(plan.of_layer(1), sizes) == 2 * (2 * 8 * 8 * 32)


def test_a_shift_above_the_last_attention_leaves_out_a_row_to_either_side():
    plan = make_plan(
        (True, False, False, False),
        output_rows_only=True,
        one_query_per_sequence=False,
        capture=False,
        mixing=((1, TokenShiftNorm), (3, TokenShiftNorm)),
        has_halo=True,
    )
    assert [step.output_rows_only for step in plan.steps] == [False] + [True] * (7 + 4 + 3 + 4)
    assert [step.halo for step in plan.steps] == [0] + [2] * 7 + [1] * (4 + 3) + [0] * 4
    sizes = replace(sizes_of(8, 32, 2, (3, 5), (1, 1)), rows_within_halo=(2, 4, 6))
    rows = [flops_of(plan.of_layer(i)[-3:], sizes) / (2 * 2 * 8 * 32) for i in range(4)]
    assert rows == [6, 4, 4, 2]
    assert (
        make_plan((False,) * 2, True, False, False, ((0, TokenShiftNorm), (1, TokenShiftNorm)), has_halo=True)
        .steps[0]
        .halo
        == 2
    )
    assert all(
        not step.halo for step in make_plan((True, False), False, False, False, ((1, TokenShiftNorm),)).steps
    )


LAYER = st.sampled_from(["attends", "shifts", "neither"])


@given(st.lists(LAYER, min_size=1, max_size=12), st.booleans(), st.booleans(), st.booleans())
def test_liveness(layers, output_rows_only, one_query_per_sequence, capture):
    attends = tuple(what == "attends" for what in layers)
    mixing = tuple((i, TokenShiftNorm) for i, what in enumerate(layers) if what == "shifts")
    plan = make_plan(attends, output_rows_only, one_query_per_sequence and output_rows_only, capture, mixing)
    last = max((i for i, what in enumerate(layers) if what != "neither"), default=-1)
    for step in plan.steps:
        assert step.output_rows_only == (output_rows_only and step.layer >= last)
    for i, what in enumerate(layers):
        assert any("attention" in name for name in names(plan, i)) == (what == "attends")
        absorbs = what == "attends" and output_rows_only and one_query_per_sequence and i == last
        assert ("absorbed_attention" in names(plan, i)) == absorbs
        # A skipped attention's norm runs once: within the step before, or by itself; after a shift by itself.
        before = plan.of_layer(i - 1)[-1] if i else plan.embed
        assert (before.takes_next_norm, "skip_norm" in names(plan, i)) == {
            "attends": (False, False),
            "shifts": (False, False),
            "neither": (not capture, capture),
        }[what]
        assert ("shift_norm" in names(plan, i)) == (what == "shifts")
    assert not (capture and any(getattr(step, "takes_next_norm", False) for step in plan.steps))


def test_costs_by_hand():
    sizes = sizes_of(8, 32, 2, (3, 5), (1, 1))
    assert (sizes.rows, sizes.output_rows, sizes.pairs) == (8, 2, 34)
    plan = make_plan((True, False), output_rows_only=True, one_query_per_sequence=True, capture=False)
    cost = {step.name: flops_of((step,), sizes) for step in plan.of_layer(0)}
    assert cost["project_query"] == 2 * 2 * 8 * 8
    assert cost["absorbed_attention"] == 2 * (2 * 2 * 8 * 8) + 2 * (2 * 8 * 8 * 2)
    assert cost["intermediate"] == cost["project_down"] == 2 * 2 * 8 * 32
    assert cost["attention_norm"] == 0
    whole = make_plan((True,), output_rows_only=False, one_query_per_sequence=False, capture=False)
    assert flops_of(whole.steps, sizes) == 8 * (8 * 8 * 8 + 4 * 8 * 32) + 4 * 34 * 8


@pytest.mark.parametrize("kept, share", [((0, 1), 0.2), ((0, 4, 8), 0.8), (tuple(range(12)), 1.0)])
def test_where_the_kept_layers_lie_decides_the_cost(kept, share):
    sizes = sizes_of(768, 3072, 12, (25,) * 32, (1,) * 32)
    plan = make_plan(
        tuple(i in kept for i in range(12)), output_rows_only=True, one_query_per_sequence=True, capture=False
    )
    dense = make_plan((True,) * 12, output_rows_only=True, one_query_per_sequence=True, capture=False)
    total, most = (flops_of(each.steps, sizes) for each in (plan, dense))
    assert total <= share * most
    assert all(
        m > 0 and k > 0 and n > 0 for step in plan.steps for m, k, n in step.matmuls(step.rows(sizes), sizes)
    )
