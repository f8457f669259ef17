"""What a Pruner refuses, with the reason: settings, arguments, a second forward, outputs without gradient."""

import pytest
import torch
from helpers.training_loop import batch, bert

import fastgate
from fastgate.errors import ArgumentError
from fastgate.pruning import Distill, Fixed


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
