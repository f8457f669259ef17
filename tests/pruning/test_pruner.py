"""The Pruner in a plain loop: the gradients of its gates, draws, state, refusals, several processes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import subprocesses
from helpers.encoders import VECTORS
from helpers.training_loop import CPU, batch, bert, loss_of, run

import fastgate
from fastgate.errors import ArgumentError, CheckpointError
from fastgate.models.handle import get_encoder
from fastgate.nn import hard_concrete
from fastgate.pruning import Distill, Fixed
from fastgate.pruning.calibration import RIDGE
from fastgate.pruning.learner import GateLearner
from fastgate.pruning.objective import Objective

# -- the Pruner's gradients


def pruner_in_search(model, seed=3, **options):
    config = fastgate.PruningConfig(
        fastgate.Sparsity(0.5), seed=seed, warm=0.1, ramp=0.9, harden=0.9, **options
    )
    pruner = fastgate.Pruner(model, config, 20, teacher=bert(seed=9))
    run(pruner, model, 3)
    pruner.learner.log_alpha.data.fill_(0.3)
    return pruner


def test_gradient_of_the_gates_equals_finite_differences():
    model = bert()
    pruner = pruner_in_search(model, distill=Distill(swap=0.0))
    learner, inputs = pruner.learner, batch(50)
    noise = learner.generator.get_state()
    learner.multipliers.data.copy_(torch.tensor([1.5, 0.7]))

    def whole_loss(log_alpha):
        learner.log_alpha.data.copy_(log_alpha)
        learner.generator.set_state(noise)
        learner.draw(0.4, CPU)
        pruner.handle.set_gates(learner.drawn)
        prepared = pruner.prepare(inputs)
        outputs = model(**prepared)
        return outputs.loss + pruner.pruning_loss([pruner.take_forward(outputs, prepared)])

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
        get_encoder(model).set_gates([1.0, closed, 1.0, 1.0])
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
        pruner.handle.set_gates(pruner.learner.drawn)
        whole = batch(7, rows=8)
        drawn = [float(torch.as_tensor(g).detach()) for g in pruner.handle.gates]
        for rows in torch.arange(8).chunk(parts):
            inputs = {name: value[rows] for name, value in whole.items()}
            (loss_of(pruner, model, inputs) / parts).backward()
            assert [float(torch.as_tensor(g).detach()) for g in pruner.handle.gates] == drawn
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
        pruner.handle.set_gates(pruner.learner.drawn)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        loss_of(pruner, model, batch(7)).backward()
        pruner.learner.learn(1.0)
        grads.append(pruner.learner.log_alpha.grad.clone())
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_a_scaled_loss_gives_the_same_gradient_and_an_overflow_none():
    results = []
    for scale in (1.0, 1024.0):
        model = bert()
        pruner = pruner_in_search(model)
        (scale * loss_of(pruner, model, batch(8))).backward()
        pruner.step(grad_scale=scale)
        results.append(pruner.learner.log_alpha.grad.clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    model = bert()
    pruner = pruner_in_search(model)
    (float("inf") * loss_of(pruner, model, batch(8))).backward()
    before = pruner.learner.log_alpha.detach().clone()
    pruner.step(grad_scale=1024.0)
    assert torch.equal(before, pruner.learner.log_alpha.detach())


def test_step_without_the_loss_term_is_an_error():
    model = bert()
    pruner = pruner_in_search(model)
    model(**batch()).loss.backward()
    with pytest.raises(ArgumentError, match=r"Pruner\.step: pruner\.loss: got no call since the last step"):
        pruner.step()
    loss_of(pruner, model, batch())
    with pytest.raises(ArgumentError, match=r"Pruner\.step: pruner\.loss: got no gradient"):
        pruner.step()


# -- the Pruner in a plain loop


@pytest.mark.parametrize("kind", ["mean", "affine", "shift"])
def test_replacements_start_at_the_least_squares_fit(kind):
    """Each channel of an attention's output on 1, h, and the h of the tokens beside."""
    model, inputs = bert(), batch(0)
    seen = {}
    plain = copy.deepcopy(model)
    for i, layer in enumerate(plain.bert.encoder.layer):
        layer.register_forward_pre_hook(lambda m, args, i=i: seen.update({("in", i): args[0].detach()}))
        layer.attention.output.dense.register_forward_hook(
            lambda m, a, out, i=i: seen.update({("out", i): out.detach()})
        )
    plain(**inputs)
    config = fastgate.PruningConfig(fastgate.Sparsity(0.5), replacement=kind, warm=0.01, ramp=0.5, harden=0.5)
    pruner = fastgate.Pruner(model, config, 20, teacher=bert(seed=1))
    run(pruner, model, 1, lr=0.0)
    assert pruner.phase == "search"
    mask = inputs["attention_mask"].bool()
    for i in range(4):
        h, out = (seen[name, i].double() for name in ("in", "out"))
        known = h * mask[:, :, None]
        before, after = F.pad(known, (0, 0, 1, 0))[:, :-1], F.pad(known, (0, 0, 0, 1))[:, 1:]
        basis = torch.stack([torch.ones_like(h), h, before, after])[: len(VECTORS[kind])]
        rows = mask if i < 3 else mask & (torch.arange(9) == 0)  # the last runs for rows that are read
        basis, out = basis[:, rows], out[rows]
        found = torch.stack([getattr(pruner.handle.replacement(i), name) for name in VECTORS[kind]]).detach()
        residual = out - torch.einsum("irc,ic->rc", basis, found.double())
        slope = torch.einsum("irc,rc->ic", basis, residual) / len(out)
        # At the least sum of squares no basis is left in the residual, but for the ridge.
        bound = 2 * RIDGE * basis[1:].square().mean() * found[1:].abs().max() if kind != "mean" else 0.0
        assert float(slope.abs().max()) <= 1e-5 + float(bound)
        assert residual.square().mean() <= (out - out.mean(0)).square().mean() + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("replacement", VECTORS)
def test_finalised_equals_hardened(replacement):
    model = bert()
    parameters = sum(p.numel() for p in model.parameters())
    config = fastgate.PruningConfig(
        fastgate.Sparsity(0.75), replacement=replacement, warm=0.05, ramp=0.3, harden=0.5, gate_lr=0.2
    )
    pruner = fastgate.Pruner(model, config, 30, teacher=bert(seed=1))
    run(pruner, model, 30)
    assert len(pruner.kept) == 1 and pruner.phase == "recover"
    assert pruner.handle.gates == [float(i in pruner.kept) for i in range(4)]
    model.eval()
    inputs = batch(99)
    hardened = model(**inputs).logits
    assert pruner.finalize() is model
    torch.testing.assert_close(model(**inputs).logits, hardened, rtol=1e-5, atol=1e-6)
    attention = 4 * (16 * 16 + 16)
    extra = 16 * len(VECTORS[replacement])
    assert sum(p.numel() for p in model.parameters()) == parameters - 3 * (attention - extra)


def test_a_speedup_prices_the_rows_that_shifts_need_above_the_last_attention():
    """What is kept meets the target as `explain` counts it, which is not out of reach for a classifier."""
    model = bert()
    lengths = batch(0)["attention_mask"].sum(1).tolist()  # of all that the warm phase sees
    dense = fastgate.explain(fastgate.patch(copy.deepcopy(model)), lengths).flops
    config = fastgate.PruningConfig(fastgate.Speedup(1.4), warm=0.05, ramp=0.3, harden=0.5, gate_lr=0.2)
    pruner = fastgate.Pruner(model, config, 20, teacher=bert(seed=1))
    run(pruner, model, 20)
    pruned = fastgate.explain(pruner.finalize(), lengths)
    top = max(pruner.kept)
    rows = [row.live_rows for row in pruned.layers]
    assert pruned.flops <= dense / 1.4 and top < 3
    assert rows == [sum(lengths)] * top + [len(lengths) * left for left in range(4 - top, 0, -1)]
    assert pruned.flops == float(pruner.learner.costs.total(torch.tensor(pruner.open_probabilities)))


def test_history_tells_what_the_gates_did():
    model = bert()
    config = fastgate.PruningConfig(fastgate.Sparsity(0.5), warm=0.1, ramp=0.4, harden=0.6, gate_lr=0.3)
    pruner = fastgate.Pruner(model, config, 20, teacher=bert(seed=1))
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


def test_a_fixed_choice_is_kept_from_the_first_closing():
    model = bert()
    pruner = fastgate.Pruner(model, fastgate.PruningConfig(Fixed((2, 0))), 20, teacher=bert(seed=1))
    run(pruner, model, 1)
    assert pruner.kept == [0, 2] and pruner.phase == "recover" and pruner.handle.gates == [1.0, 0.0, 1.0, 0.0]


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
        (lambda: fastgate.Pruner(bert(), fastgate.PruningConfig(Fixed((7,))), 9), "Fixed: keep"),
        (lambda: fastgate.Pruner(bert(), fastgate.PruningConfig(Fixed((1,))), 2), "total_steps: got 2"),
        (lambda: fastgate.Pruner(bert(), fastgate.PruningConfig(Fixed((1,))), 9).step(), "got no call"),
        (
            lambda: fastgate.Pruner(bert(), fastgate.PruningConfig(fastgate.Speedup(2)), 9).harden(),
            "costs",
        ),
        (
            lambda: fastgate.Pruner(bert(), fastgate.PruningConfig(Fixed((1,))), 9).finalize(),
            "not hardened",
        ),
        (
            lambda: fastgate.Pruner(bert(), fastgate.PruningConfig(Fixed((1,))), 9, bert(layers=3)),
            "teacher: got 3 layers, wanted 4",
        ),
        (
            lambda: fastgate.Pruner(fastgate.prune(bert(), keep=[0]), fastgate.PruningConfig(Fixed((1,))), 9),
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
dist.barrier()
dist.destroy_process_group()  # else gloo's thread may outlive the interpreter, which aborts the process
"""


@pytest.mark.slow
def test_every_rank_moves_its_gates_alike(tmp_path):
    ranks = [subprocesses.start(RANKS, rank, tmp_path / "store") for rank in (0, 1)]
    outputs = [subprocesses.finish(rank) for rank in ranks]
    assert outputs[0] == outputs[1] and outputs[0].startswith("[")


def test_draws_come_from_the_gates_distribution():
    learner = GateLearner(Objective(fastgate.Sparsity(0.5), 4), 0.1, 5)
    learner.draw(0.1, CPU)
    expected = hard_concrete.draw(torch.full((4,), 2.5), torch.Generator().manual_seed(5))
    drawn = [float(torch.as_tensor(z).detach()) for z in learner.drawn]
    assert drawn == expected.tolist()
    assert [isinstance(z, float) for z in learner.drawn] == [z in (0.0, 1.0) for z in drawn]


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_no_forward_is_held_beyond_its_step(reentrant):
    """What computes activations again in the backward holds the forward: it must not hold the graph too."""
    import gc

    from fastgate.runtime.context import ForwardContext

    model, teacher = bert().train(), bert()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    pruner = fastgate.Pruner(
        model, fastgate.PruningConfig(fastgate.Sparsity(0.5)), 40, teacher, optimizer=optimizer
    )
    gc.collect()
    held = [sum(isinstance(o, ForwardContext) for o in gc.get_objects())]
    for i in range(3):
        inputs = pruner.prepare(batch(i))
        loss = pruner.loss(model(**inputs), inputs)
        loss.backward()
        del loss
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        gc.collect()
        held.append(sum(isinstance(o, ForwardContext) for o in gc.get_objects()))
    assert held[-1] <= held[0] + 1 and held[-1] <= held[1]


def test_a_second_forward_before_loss_is_refused():
    """Its activations would be compared with the teacher's for the first."""
    model = bert().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    pruner = fastgate.Pruner(
        model, fastgate.PruningConfig(fastgate.Sparsity(0.5)), 40, bert(), optimizer=optimizer
    )
    inputs = pruner.prepare(batch(0))
    outputs = model(**inputs)
    with torch.no_grad():
        model(**batch(1))
    with pytest.raises(ArgumentError, match=r"outputs: got 2 forwards .* wanted one; evaluate before"):
        pruner.loss(outputs, inputs)


def test_outputs_without_a_gradient_are_refused():
    model = bert().train()
    config = fastgate.PruningConfig(fastgate.Sparsity(0.5), distill=None)
    pruner = fastgate.Pruner(model, config, 40, optimizer=torch.optim.AdamW(model.parameters()))
    inputs = pruner.prepare(batch(0))
    with torch.no_grad():
        outputs = model(**inputs)
    with pytest.raises(ArgumentError, match=r"outputs: got a loss without a gradient.*no_grad"):
        pruner.loss(outputs, inputs)


@pytest.mark.parametrize("optimizer", [3, "adam"])
def test_what_is_no_optimizer_is_refused(optimizer):
    with pytest.raises(ArgumentError, match=r"Pruner: optimizer: got .*wanted a torch.optim.Optimizer"):
        fastgate.Pruner(bert(), fastgate.PruningConfig(fastgate.Sparsity(0.5)), 40, optimizer=optimizer)


def test_a_batch_without_a_label_adds_no_task_loss():
    """transformers' mean over no label is NaN."""
    from helpers import encoders

    model = encoders.make("Bert", "ForTokenClassification").train()
    optimizer = torch.optim.AdamW(model.parameters())
    config = fastgate.PruningConfig(fastgate.Sparsity(0.5), distill=Distill.for_tokens())
    pruner = fastgate.Pruner(model, config, 40, copy.deepcopy(model), optimizer=optimizer)
    inputs = encoders.batch(model, "ForTokenClassification", labels=True)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    inputs = pruner.prepare(inputs)
    outputs = model(**inputs)
    assert outputs.loss.isnan()
    loss = pruner.loss(outputs, inputs)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
