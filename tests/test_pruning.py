"""Learning the gates: schedule, objective, Lagrangian, distillation, the Pruner in a plain loop, controls."""

import copy
import itertools

import children
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

import fastgate
from fastgate import gates
from fastgate.errors import ArgumentError, CheckpointError
from fastgate.plan import flops, make_plan, sizes_of
from fastgate.pruning import Distill, Fixed, criteria
from fastgate.pruning.distill import SelfTeacher, Teacher, hidden_loss, logits_loss, scored_rows
from fastgate.pruning.learner import GateLearner
from fastgate.pruning.objective import Objective, costs_of, lagrangian
from fastgate.pruning.schedule import make_schedule
from fastgate.state import encoder_state

CPU = torch.device("cpu")


def bert(layers=4, dropout=0.0, seed=0, head=BertForSequenceClassification):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
    )
    return head(config)


def batch(seed=0, rows=6, length=9):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (rows, length), generator=g)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=g)
    lengths[0] = length
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(length) < lengths).long(),
        "labels": (ids[:, 1] > 20).long(),
    }


def run(pruner, model, steps, first=0, lr=1e-3):
    """Train `steps` optimizer steps, one batch each, in a plain loop."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for i in range(first, first + steps):
        inputs = batch(i)
        outputs = model(**inputs)
        (outputs.loss + pruner.loss(outputs, inputs)).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()


# -- schedule


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


@pytest.mark.parametrize(("demanded", "narrow"), [([1, 1, 1], True), ([2, 3, 4], True), (None, False)])
def test_expected_cost_is_the_plans_flops_where_gates_are_hard(demanded, narrow):
    sizes = sizes_of(16, 32, [5, 7, 9], demanded)
    single = demanded == [1, 1, 1]
    costs = costs_of(sizes, 2, narrow, single)
    for flags in itertools.product((False, True), repeat=4):
        plan = make_plan(flags, narrow, single, False)
        exact = sum(flops(step, sizes, 2) for step in plan.steps)
        assert float(costs.total(torch.tensor(flags, dtype=torch.float64))) == pytest.approx(exact)


def test_expected_cost_is_the_mean_over_draws_and_smooth():
    costs = costs_of(sizes_of(16, 32, [8, 8], [1, 1]), 2, True, True)
    p = torch.tensor([0.9, 0.2, 0.6], dtype=torch.float64, requires_grad=True)
    mean = 0.0
    for flags in itertools.product((0.0, 1.0), repeat=3):
        z = torch.tensor(flags, dtype=torch.float64)
        mean += float(torch.where(z > 0, p, 1 - p).prod().detach() * costs.total(z))
    assert float(costs.total(p).detach()) == pytest.approx(mean)
    assert torch.autograd.gradcheck(costs.share, (p,))


@pytest.mark.parametrize("factor", [1.3, 2.0, 5.0])
def test_speedup_picks_the_best_set_within_its_cost(factor):
    costs = costs_of(sizes_of(16, 32, [12] * 4, [1] * 4), 2, True, True)
    objective = Objective(fastgate.Speedup(factor), 5)
    for seed in range(5):
        p = torch.rand(5, generator=torch.Generator().manual_seed(seed))
        within = []
        for flags in itertools.product((0.0, 1.0), repeat=5):
            z = torch.tensor(flags, dtype=torch.float64)
            if float(costs.share(z)) <= 1 / factor:
                within.append(float((p * z).sum()))
        kept = objective.choose(p, costs)
        assert float(p[kept].sum()) == pytest.approx(max(within))


def test_speedup_out_of_reach_is_an_error():
    costs = costs_of(sizes_of(16, 32, [3, 3]), 2, False, False)
    with pytest.raises(ArgumentError, match=r"Speedup: factor: got 50.0, wanted at most \d"):
        Objective(fastgate.Speedup(50.0), 3).choose(torch.ones(3), costs)


def test_lagrangian_value_and_directions():
    one = torch.ones((), requires_grad=True)
    reduction = torch.tensor(0.3, requires_grad=True)
    value = lagrangian(reduction, 0.5, 2 * one, 3 * one)
    assert float(value.detach()) == pytest.approx(2 * 0.2 + 3 * 0.04)
    value.backward()
    assert reduction.grad < 0  # too little is gone: going down the term removes more


@pytest.mark.parametrize("target", [fastgate.Sparsity(0.5), fastgate.Speedup(3.0)])
def test_the_lagrangian_drives_the_gates_to_the_target(target):
    objective = Objective(target, 6)
    learner = GateLearner(objective, 0.05, 0)
    learner.costs = costs_of(sizes_of(16, 32, [12] * 4, [1] * 4), 2, True, True)
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


# -- the Pruner's gradients


def pruner_in_search(model, seed=3, **options):
    config = fastgate.PruningConfig(
        fastgate.Sparsity(0.5), seed=seed, warm=0.1, ramp=0.9, harden=0.9, **options
    )
    pruner = fastgate.Pruner(model, config, 20, teacher=bert(seed=9)).attach()
    run(pruner, model, 3)
    pruner.learner.log_alpha.data.fill_(0.3)
    return pruner


def test_gradient_of_the_gates_equals_finite_differences():
    model = bert()
    pruner = pruner_in_search(model)
    learner, inputs = pruner.learner, batch(50)
    noise = learner.generator.get_state()
    learner.multipliers.data.copy_(torch.tensor([1.5, 0.7]))

    def whole_loss(log_alpha):
        learner.log_alpha.data.copy_(log_alpha)
        learner.generator.set_state(noise)
        learner.draw(0.4, CPU)
        pruner.state.set_gates(learner.drawn)
        outputs = model(**inputs)
        return outputs.loss + pruner.loss(outputs, inputs)

    start = torch.tensor([-2.0, 0.3, 0.2, 4.0])
    whole_loss(start).backward()
    learner.learn(1.0)
    found = learner.log_alpha.grad.clone()
    between = [0.0 < z < 1.0 for z in learner.state_dict()["z"].tolist()]
    assert any(between) and not all(between)
    h = 1e-2
    for i in range(4):
        step = h * F.one_hot(torch.tensor(i), 4)
        up, down = (float(whole_loss(start + sign * step).detach()) for sign in (1, -1))
        assert float(found[i]) == pytest.approx((up - down) / (2 * h), rel=0.03, abs=2e-3), i


def test_a_skipped_attention_is_exact_in_the_gradient():
    def gradients(closed):
        model = fastgate.patch(bert())
        encoder_state(model).set_gates([1.0, closed, 1.0, 1.0])
        model(**batch()).loss.backward()
        return dict(model.named_parameters())

    skipped, multiplied = gradients(0.0), gradients(torch.tensor(0.0))
    for name, parameter in skipped.items():
        gone = "layer.1.attention.self" in name or "layer.1.attention.output.dense" in name
        assert (parameter.grad is None) == gone, name
        other = multiplied[name].grad
        if gone:
            assert torch.count_nonzero(other) == 0, name
        else:
            torch.testing.assert_close(parameter.grad, other, rtol=1e-5, atol=1e-6)


def test_accumulated_micro_batches_see_one_draw_and_weigh_as_one_batch():
    grads = []
    for parts in (1, 2):
        model = bert()
        pruner = pruner_in_search(model, distill=None)
        pruner.learner.draw(0.4, CPU)
        pruner.state.set_gates(pruner.learner.drawn)
        whole = batch(7, rows=8)
        drawn = [float(torch.as_tensor(g).detach()) for g in pruner.state.gates]
        for rows in torch.arange(8).chunk(parts):
            inputs = {name: value[rows] for name, value in whole.items()}
            outputs = model(**inputs)
            ((outputs.loss + pruner.loss(outputs, inputs)) / parts).backward()
            assert [float(torch.as_tensor(g).detach()) for g in pruner.state.gates] == drawn
        pruner.learner.learn(1.0)
        grads.append(pruner.learner.log_alpha.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_see_the_same_draw(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = bert()
        pruner = pruner_in_search(model)
        pruner.learner.draw(0.4, CPU)
        pruner.state.set_gates(pruner.learner.drawn)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        inputs = batch(7)
        outputs = model(**inputs)
        (outputs.loss + pruner.loss(outputs, inputs)).backward()
        pruner.learner.learn(1.0)
        grads.append(pruner.learner.log_alpha.grad.clone())
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_a_scaled_loss_gives_the_same_gradient_and_an_overflow_none():
    results = []
    for scale in (1.0, 1024.0):
        model = bert()
        pruner = pruner_in_search(model)
        inputs = batch(8)
        outputs = model(**inputs)
        (scale * (outputs.loss + pruner.loss(outputs, inputs))).backward()
        pruner.step(grad_scale=scale)
        results.append(pruner.learner.log_alpha.grad.clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    model = bert()
    pruner = pruner_in_search(model)
    outputs = model(**batch(8))
    (float("inf") * (outputs.loss + pruner.loss(outputs, batch(8)))).backward()
    before = pruner.learner.log_alpha.detach().clone()
    pruner.step()
    assert torch.equal(before, pruner.learner.log_alpha.detach())


def test_step_without_the_loss_term_is_an_error():
    model = bert()
    pruner = pruner_in_search(model)
    model(**batch()).loss.backward()
    with pytest.raises(ArgumentError, match=r"Pruner\.step: pruner\.loss: got no gradient"):
        pruner.step()


# -- distillation


def test_hidden_rows_are_matched_by_index():
    student, teacher = fastgate.patch(bert()), bert(seed=1)
    state = encoder_state(student)
    state.set_gates([0.0, 1.0, 0.0, 0.0])
    inputs = batch()
    with state.record() as record:
        student(**inputs)
    expected = teacher(**inputs, output_hidden_states=True).hidden_states
    lesson = Teacher(teacher, 4)(inputs, want_hidden=True)
    terms = []
    for layer in range(4):
        index, mine = record.hidden[layer + 1]
        assert index.numel() == (int(inputs["attention_mask"].sum()) if layer < 1 else 6)
        terms.append(F.mse_loss(mine, expected[layer + 1].reshape(-1, 16)[index]))
    found = hidden_loss(record.hidden, lesson.hidden, range(4))
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-4, atol=1e-6)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_logits_loss_is_the_softened_divergence():
    mine, theirs = torch.randn(5, 3), torch.randn(5, 3)
    p, q = F.softmax(theirs / 2, -1), F.softmax(mine / 2, -1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(logits_loss([mine], [theirs], 2.0), expected)
    torch.testing.assert_close(
        logits_loss([mine[:, :1]], [theirs[:, :1]], 2.0), F.mse_loss(mine[:, :1], theirs[:, :1])
    )


def test_token_scores_are_compared_on_labelled_rows_only():
    mine, theirs = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    labels = torch.tensor([[-100, 1, -100, 2], [0, -100, -100, -100]])
    rows = scored_rows({"labels": labels})
    torch.testing.assert_close(
        logits_loss([mine], [theirs], 2.0, rows), logits_loss([mine[rows]], [theirs[rows]], 2.0)
    )
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(scored_rows({"attention_mask": mask}), mask.bool())


def test_a_token_model_learns_too():
    model, teacher = bert(head=BertForTokenClassification), bert(seed=1, head=BertForTokenClassification)
    config = fastgate.PruningConfig(fastgate.Sparsity(0.5), warm=0.1, ramp=0.3, harden=0.5)
    pruner = fastgate.Pruner(model, config, 10, teacher).attach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for i in range(10):
        inputs = batch(i)
        inputs["labels"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"] % 2, -100)
        outputs = model(**inputs)
        loss = outputs.loss + pruner.loss(outputs, inputs)
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert len(pruner.kept) == 2


def test_the_model_as_its_own_teacher_is_left_as_it_was():
    model = fastgate.patch(bert(dropout=0.5)).train()
    state = encoder_state(model)
    inputs = batch()
    gate = torch.tensor(0.4, requires_grad=True)
    state.set_gates([gate, 0.0, 1.0, 0.0])
    lesson = SelfTeacher(model)(inputs, want_hidden=True)
    assert state.gates == [gate, 0.0, 1.0, 0.0] and model.training
    assert not lesson.logits[0].requires_grad and len(lesson.hidden) == 5
    dense = bert(dropout=0.5).eval()
    torch.testing.assert_close(lesson.logits[0], dense(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_self_distillation_prunes_and_ends_at_hardening():
    model = bert()
    config = fastgate.PruningConfig(fastgate.Sparsity(0.5), warm=0.1, ramp=0.3, harden=0.5)
    pruner = fastgate.Pruner(model, config, 10).attach()
    run(pruner, model, 10)
    inputs = batch(3)
    outputs = model(**inputs)
    assert float(pruner.loss(outputs, inputs)) == 0.0 and len(pruner.kept) == 2


# -- the Pruner in a plain loop


@pytest.mark.parametrize("kind", ["mean", "affine"])
def test_replacements_start_at_the_measured_mean(kind):
    model, inputs = bert(), batch(0)
    seen = {}
    plain = copy.deepcopy(model)
    for i, layer in enumerate(plain.bert.encoder.layer):
        layer.attention.output.dense.register_forward_hook(
            lambda m, a, out, i=i: seen.update({i: out.detach()})
        )
    plain(**inputs)
    config = fastgate.PruningConfig(fastgate.Sparsity(0.5), replacement=kind, warm=0.01, ramp=0.5, harden=0.5)
    pruner = fastgate.Pruner(model, config, 20, teacher=bert(seed=1)).attach()
    run(pruner, model, 1, lr=0.0)
    assert pruner.phase == "search"
    mask = inputs["attention_mask"].bool()
    for i in range(4):
        rows = (
            seen[i][mask] if i < 3 else seen[i][:, 0]
        )  # the last attention runs for the rows the head reads
        replacement = pruner.state.replacement(i)
        torch.testing.assert_close(replacement.shift.detach(), rows.mean(0), rtol=1e-4, atol=1e-5)
        assert kind == "mean" or torch.count_nonzero(replacement.scale) == 0


@pytest.mark.parametrize("replacement", ["zero", "mean", "affine"])
def test_finalised_equals_hardened(replacement):
    model = bert()
    parameters = sum(p.numel() for p in model.parameters())
    config = fastgate.PruningConfig(
        fastgate.Sparsity(0.75), replacement=replacement, warm=0.05, ramp=0.3, harden=0.5, gate_lr=0.2
    )
    pruner = fastgate.Pruner(model, config, 30, teacher=bert(seed=1)).attach()
    run(pruner, model, 30)
    assert len(pruner.kept) == 1 and pruner.phase == "recover"
    assert pruner.state.gates == [float(i in pruner.kept) for i in range(4)]
    model.eval()
    inputs = batch(99)
    hardened = model(**inputs).logits
    assert pruner.finalize() is model
    torch.testing.assert_close(model(**inputs).logits, hardened, rtol=1e-5, atol=1e-6)
    attention = 4 * (16 * 16 + 16)
    extra = {"zero": 0, "mean": 16, "affine": 32}[replacement]
    assert sum(p.numel() for p in model.parameters()) == parameters - 3 * (attention - extra)


def test_history_tells_what_the_gates_did():
    model = bert()
    config = fastgate.PruningConfig(fastgate.Sparsity(0.5), warm=0.1, ramp=0.4, harden=0.6, gate_lr=0.3)
    pruner = fastgate.Pruner(model, config, 20, teacher=bert(seed=1)).attach()
    run(pruner, model, 20)
    assert [entry["step"] for entry in pruner.history] == list(range(1, 21))
    phases = [entry["phase"] for entry in pruner.history]
    assert phases == sorted(phases, key=["warm", "search", "recover"].index) and set(phases) == {
        "warm",
        "search",
        "recover",
    }
    targets = [entry["target"] for entry in pruner.history]
    assert targets == sorted(targets) and targets[-1] == 0.5
    assert pruner.history[-1]["reduction"] == 0.5
    assert all(0 <= g <= 1 for entry in pruner.history for g in entry["gates"] + entry["open"])
    assert pruner.metrics()["pruning/hardened"] == 1.0


@pytest.mark.parametrize("at", [0, 1, 4, 9, 14])
def test_state_round_trip_continues_bit_for_bit(at):
    def fresh():
        model = bert(dropout=0.1)
        config = fastgate.PruningConfig(fastgate.Speedup(1.5), warm=0.1, ramp=0.4, harden=0.6, gate_lr=0.3)
        return model, fastgate.Pruner(model, config, 20, teacher=bert(seed=1)).attach()

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
    state = fastgate.Pruner(bert(), config, 50).attach().state_dict()
    with pytest.raises(CheckpointError, match="total_steps: got 50, wanted 60"):
        fastgate.Pruner(bert(), config, 60).attach().load_state_dict(state)
    with pytest.raises(CheckpointError, match="got 4 gates, wanted the state of 3 gates"):
        fastgate.Pruner(bert(layers=3), config, 50).attach().load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"got no \['learner'\]"):
        fastgate.Pruner(bert(), config, 50).attach().load_state_dict(
            {k: v for k, v in state.items() if k != "learner"}
        )


def test_a_fixed_choice_is_kept_from_the_first_closing():
    model = bert()
    pruner = fastgate.Pruner(model, fastgate.PruningConfig(Fixed((2, 0))), 20, teacher=bert(seed=1)).attach()
    run(pruner, model, 1)
    assert pruner.kept == [0, 2] and pruner.phase == "recover" and pruner.state.gates == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fastgate.Sparsity(1.0), "Sparsity: share: got 1.0"),
        (lambda: fastgate.Sparsity(float("nan")), "Sparsity: share"),
        (lambda: fastgate.Speedup(0.5), "Speedup: factor: got 0.5"),
        (lambda: fastgate.PruningConfig(0.8), r"target: got 0.8, wanted Sparsity"),
        (
            lambda: fastgate.PruningConfig(fastgate.Sparsity(0.5), replacement="median"),
            "replacement: got 'median'",
        ),
        (lambda: fastgate.PruningConfig(fastgate.Sparsity(0.5), harden=1.0), "warm, ramp, harden"),
        (lambda: fastgate.PruningConfig(fastgate.Sparsity(0.5), warm=0.5), "warm, ramp, harden"),
        (lambda: fastgate.PruningConfig(fastgate.Sparsity(0.5), gate_lr=0.0), "gate_lr: got 0.0"),
        (lambda: fastgate.PruningConfig(fastgate.Sparsity(0.5), distill=1.0), "distill: got 1.0"),
        (lambda: Distill(logits=-1.0), "Distill: logits: got -1.0"),
        (lambda: Distill(temperature=0.0), "Distill: temperature"),
        (lambda: fastgate.Pruner(bert(), fastgate.PruningConfig(Fixed((7,))), 9).attach(), "Fixed: keep"),
        (lambda: fastgate.Pruner(bert(), fastgate.PruningConfig(Fixed((1,))), 2), "total_steps: got 2"),
        (lambda: fastgate.Pruner(bert(), fastgate.PruningConfig(Fixed((1,))), 9).step(), "not attached"),
        (
            lambda: fastgate.Pruner(bert(), fastgate.PruningConfig(fastgate.Speedup(2)), 9).attach().harden(),
            "costs",
        ),
        (
            lambda: fastgate.Pruner(bert(), fastgate.PruningConfig(Fixed((1,))), 9).attach().finalize(),
            "not hardened",
        ),
        (
            lambda: fastgate.Pruner(bert(), fastgate.PruningConfig(Fixed((1,))), 9, bert(layers=3)).attach(),
            "teacher: got 3 layers, wanted 4",
        ),
        (
            lambda: fastgate.Pruner(
                fastgate.prune(bert(), keep=[0]), fastgate.PruningConfig(Fixed((1,))), 9
            ).attach(),
            r"layers \[1, 2, 3\] pruned",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_the_model_is_no_teacher_of_itself_by_name():
    model = bert()
    with pytest.raises(ArgumentError, match="teacher: got the model itself"):
        fastgate.Pruner(model, fastgate.PruningConfig(fastgate.Sparsity(0.5)), 9, teacher=model)


# -- controls


def test_controls():
    assert criteria.top_drop(6, 2) == [0, 1]
    assert criteria.every_other(6, 3) == [0, 2, 4]
    assert criteria.every_other(12, 3) == [0, 4, 8]
    assert criteria.random_choice(6, 3, seed=1) == criteria.random_choice(6, 3, seed=1)
    assert len({tuple(criteria.random_choice(6, 3, seed=s)) for s in range(20)}) > 5
    with pytest.raises(ArgumentError, match="keep: got 0"):
        criteria.top_drop(6, 0)


def test_greedy_closes_what_raises_the_loss_least():
    model = fastgate.patch(bert()).train()
    state, batches = encoder_state(model), [batch(1), batch(2)]
    losses = {}
    model.eval()
    for drop in range(4):
        state.set_gates([float(i != drop) for i in range(4)])
        losses[drop] = sum(float(model(**b).loss.detach()) for b in batches)
    state.set_gates([1.0] * 4)
    model.train()
    best = min(losses, key=losses.get)
    assert criteria.greedy_by_loss(model, batches, 3) == [i for i in range(4) if i != best]
    assert state.gates == [1.0] * 4 and model.training
    with pytest.raises(ArgumentError, match="batches: got 0"):
        criteria.greedy_by_loss(model, [], 2)


# -- several processes


RANKS = """
import sys, torch, torch.distributed as dist
from fastgate.pruning import Sparsity
from fastgate.pruning.learner import GateLearner
from fastgate.pruning.objective import Objective
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
learner = GateLearner(Objective(Sparsity(0.5), 4), 0.1, 0)
for _ in range(30):
    learner.draw(0.5, torch.device("cpu"))
    own = sum((rank + 1.0) * (i - 1) * z for i, z in enumerate(learner.drawn))
    (own + learner.term()).backward()
    learner.learn(1.0)
print(learner.log_alpha.tolist(), learner.multipliers.tolist())
"""


def test_every_rank_moves_its_gates_alike(tmp_path):
    ranks = [children.start(RANKS, rank, tmp_path / "store") for rank in (0, 1)]
    outputs = [children.finish(rank) for rank in ranks]
    assert outputs[0] == outputs[1] and outputs[0].startswith("[")


def test_draws_come_from_the_gates_distribution():
    learner = GateLearner(Objective(fastgate.Sparsity(0.5), 4), 0.1, 5)
    learner.draw(0.1, CPU)
    expected = gates.draw(torch.full((4,), 2.5), torch.Generator().manual_seed(5))
    drawn = [float(torch.as_tensor(z).detach()) for z in learner.drawn]
    assert drawn == expected.tolist()
    assert [isinstance(z, float) for z in learner.drawn] == [z in (0.0, 1.0) for z in drawn]
