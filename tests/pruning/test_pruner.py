"""The Pruner in a plain loop: what it fits, prices, keeps and tells, and what it does not hold."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.encoders import VECTORS
from helpers.training_loop import batch, bert, run

import fastgate
from fastgate.pruning import Distill, Fixed
from fastgate.pruning.calibration import RIDGE


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


def test_a_fixed_choice_is_kept_from_the_first_closing():
    model = bert()
    pruner = fastgate.Pruner(model, fastgate.PruningConfig(Fixed((2, 0))), 20, teacher=bert(seed=1))
    run(pruner, model, 1)
    assert pruner.kept == [0, 2] and pruner.phase == "recover" and pruner.handle.gates == [1.0, 0.0, 1.0, 0.0]


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
