"""The gradients of the gates: finite differences, accumulation, recomputation, scaling, ranks, draws."""

import pytest
import torch
import torch.nn.functional as F
from helpers import subprocesses
from helpers.training_loop import CPU, batch, bert, loss_of, run

import fastgate
from fastgate.errors import ArgumentError
from fastgate.models.handle import get_encoder
from fastgate.nn import hard_concrete
from fastgate.pruning import Distill
from fastgate.pruning.learner import GateLearner
from fastgate.pruning.objective import Objective


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
