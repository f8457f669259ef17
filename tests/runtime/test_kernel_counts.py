"""Steps, ops and kernels counted as they run: seven steps a kept layer, three a pruned one, not one op for an
attention that was pruned, in inference and in training with drawn gates."""

import itertools
from contextlib import contextmanager

import pytest
import torch
from helpers.encoders import LENGTHS, batch, make
from helpers.executed_steps import ABSORBED_STEPS, KEPT_STEPS, SKIPPED_STEPS, Ops
from torch import nn

import fastgate
from fastgate.models.handle import get_encoder
from fastgate.nn import hard_concrete

LAYERS = 9
KEEP = {"all": range(LAYERS), "spread": (0, 4, 8), "low": (0, 1), "one": (3,), "none": ()}


@contextmanager
def counted(model):
    """(layer, step, ops since the step before) of every step that runs, in order."""
    steps, mode, executor = [], Ops(), get_encoder(model).runtime.executor

    def count(step, rows):
        steps.append((step.layer, step.name, mode.seen))
        mode.seen = []

    executor.step_hook = count
    try:
        with mode:
            yield steps
    finally:
        executor.step_hook = None


def of_layer(steps, layer):
    """(names of its steps, its ops)."""
    mine = [(op, ops) for at, op, ops in steps if at == layer]
    return tuple(op for op, _ in mine), [op for _, ops in mine for op in ops]


def names(ops):
    return [name for name, _ in ops]


def second_half(steps, layer):
    """The ops of a kept layer's feed-forward part."""
    return [op for at, step, ops in steps if at == layer and step in SKIPPED_STEPS for op in ops]


@pytest.mark.parametrize("which", KEEP)
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("training", [False, True])
def test_a_pruned_attention_calls_no_op(which, head, training):
    keep = list(KEEP[which])
    model = fastgate.prune(make("Bert", head, layers=LAYERS), keep=keep).train(training)
    inputs = batch(model, head, labels=training)
    with torch.set_grad_enabled(training), counted(model) as steps:
        model(**inputs)
    absorbed = max(keep, default=-1) if head == "ForSequenceClassification" else None
    assert [s for at, s, _ in steps if at == -1] == ["embed"]
    for i in range(LAYERS):
        ran, ops = of_layer(steps, i)
        assert ran == (ABSORBED_STEPS if i == absorbed else KEPT_STEPS if i in keep else SKIPPED_STEPS)
        reference = keep[0] if keep else 0
        if i not in keep:
            assert names(ops) == names(second_half(steps, reference)), "an op of its own"
    assert len(steps) == 1 + 7 * len(keep) + 3 * (LAYERS - len(keep))


@pytest.mark.parametrize("kind, most", [("mean", 1), ("affine", 4)])
@torch.no_grad()
def test_a_replacement_costs_ops_on_single_vectors(kind, most):
    """It is folded into the weight and the bias of the LayerNorm before."""
    model = fastgate.prune(make("Bert", "ForSequenceClassification", layers=4), keep=[0], replacement=kind)
    with counted(model) as steps:
        model(**batch(model, "ForSequenceClassification"))
    plain = names(of_layer(steps, 3)[1])  # no attention follows the last layer
    for i in (1, 2):
        extra = [op for op in of_layer(steps, i)[1] if op[0] not in plain]
        assert len(extra) == most and all(size == model.config.hidden_size for _, size in extra)


@pytest.mark.parametrize("seed", range(4))
def test_drawn_gates_decide_the_steps_of_a_training_step(seed):
    model = fastgate.patch(make("Bert", "ForSequenceClassification", layers=LAYERS)).train()
    generator = torch.Generator().manual_seed(seed)
    log_alpha = torch.full((LAYERS,), -0.3, requires_grad=True)
    drawn = hard_concrete.draw(log_alpha, generator)
    values = [z.item() if z.item() in (0.0, 1.0) else z for z in drawn.unbind()]
    get_encoder(model).set_gates(values)
    inputs = batch(model, "ForSequenceClassification", labels=True)
    with counted(model) as steps:
        loss = model(**inputs).loss
    closed = [i for i, z in enumerate(values) if not isinstance(z, torch.Tensor) and z == 0.0]
    top = max(i for i in range(LAYERS) if i not in closed)
    assert closed and len(closed) < LAYERS - 1
    shape = second_half(steps, top)
    for i in range(LAYERS):
        ran, ops = of_layer(steps, i)
        assert ran == (SKIPPED_STEPS if i in closed else ABSORBED_STEPS if i == top else KEPT_STEPS)
        if i in closed:
            assert names(ops) == names(shape)
    loss.backward()
    for i, layer in enumerate(model.bert.encoder.layer):
        for linear in (layer.attention.self.query, layer.attention.output.dense):
            assert (linear.weight.grad is None) == (i in closed)
        assert layer.output.dense.weight.grad is not None
        assert layer.attention.output.LayerNorm.weight.grad is not None


def test_the_backward_of_a_closed_gate_has_no_op_for_its_attention():
    """One more skipped layer costs, forward and backward, what its feed-forward part costs."""

    def ops(layers, gates):
        model = fastgate.patch(make("Bert", "ForTokenClassification", layers=layers)).train()
        get_encoder(model).set_gates(gates)
        inputs = batch(model, "ForTokenClassification", labels=True)
        with Ops() as mode:
            model(**inputs).loss.backward()
        return len(mode.seen)

    counts = [ops(2 + extra, [1.0, 1.0] + [0.0] * extra) for extra in range(4)]
    first, second, third = (b - a for a, b in itertools.pairwise(counts))
    assert second == third  # the first one also gives the layer before a second norm
    kept = ops(3, [1.0] * 3) - counts[0]
    assert max(first, second) < kept


@pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP)
@torch.no_grad()
def test_products_called_are_those_of_the_plan(keep):
    """Six a kept layer, two a pruned one. (Hooks are seen to: with them no attention is absorbed.)"""
    model = fastgate.prune(make("Bert", "ForSequenceClassification", layers=LAYERS), keep=keep)
    called = []
    for name, module in model.bert.encoder.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, a, o, name=name: called.append((name, len(a[0]))))
    model(**batch(model, "ForSequenceClassification"))
    packed, top = sum(LENGTHS), max(keep, default=-1)
    assert len(called) == 6 * len(keep) + 2 * (LAYERS - len(keep))
    for name, rows in called:
        layer = int(name.split(".")[1])
        below = layer < top or (layer == top and name.endswith(("key", "value")))
        assert rows == (packed if below else len(LENGTHS)), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_the_profiler_sees_no_kernel_of_a_pruned_attention():
    def kernels(layers, keep):
        model = fastgate.prune(make("Bert", "ForSequenceClassification", layers=layers), keep=keep).cuda()
        inputs = {n: t.cuda() for n, t in batch(model, "ForSequenceClassification").items()}
        for _ in range(2):
            model(**inputs)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            model(**inputs)
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        found = [e.name.lower() for e in profile.events() if e.device_type == on_device]
        return [name for name in found if not name.startswith(("memcpy", "memset"))]

    base, more, most = (kernels(layers, [0, 2]) for layers in (4, 5, 6))
    attention = [sum("attention" in name for name in found) for found in (base, more, most)]
    assert attention[0] == attention[1] == attention[2] > 0
    assert len(most) - len(more) == len(more) - len(base) <= 5  # two products, a norm, perhaps split products
    assert not any("attention" in name for name in kernels(4, []))
