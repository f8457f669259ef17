"""The calls of a plain loop: their order, the batches, losses and scales they take, accumulated losses."""

import contextlib
import warnings

import pytest
import torch
import transformers
from helpers.training_loop import TOTAL, a_pruner, batch, bert, config, loss_of, run
from torch import nn

import fastgate
from fastgate.errors import ArgumentError
from fastgate.pruning import Distill

pytestmark = pytest.mark.slow


def test_calls_out_of_order_are_refused():
    model = bert()
    pruner = fastgate.Pruner(model, config(), TOTAL)
    inputs = batch()
    outputs = model(**inputs)
    with pytest.raises(ArgumentError, match=r"pruner\.prepare: got no prepare\(\) since the last loss"):
        pruner.loss(outputs, inputs)
    with pytest.raises(ArgumentError, match=r"pruner\.loss: got no call since the last step"):
        pruner.step()
    inputs = pruner.prepare(inputs)
    with pytest.raises(ArgumentError, match=r"outputs: got no forward since prepare\(\)"):
        pruner.loss(outputs, inputs)
    loss = pruner.loss(model(**inputs), inputs)
    with pytest.raises(ArgumentError, match=r"got no prepare\(\) since the last loss.*pruner\.prepare"):
        pruner.loss(outputs, inputs)
    with pytest.raises(ArgumentError, match=r"pruner\.loss: got no gradient"):
        pruner.step()
    with pytest.raises(
        ArgumentError, match="got not hardened after 0 steps, wanted gates hardened in step 12"
    ):
        pruner.finalize()
    pruner.prepare(inputs)  # a batch that is left out
    loss.backward()
    pruner.step()
    run(pruner, model, TOTAL - 1, first=1)
    pruner.finalize()
    pruner.finalize()  # which changes nothing
    for call in (
        lambda: pruner.loss(outputs, inputs),
        lambda: pruner.prepare({}),
        pruner.step,
        pruner.detach,
    ):
        with pytest.raises(ArgumentError, match="pruner: got finalized"):
            call()
    assert pruner.metrics()["pruning/hardened"] == 1.0 and pruner.state_dict()["kept"] == pruner.kept


def test_a_batch_as_it_was_before_prepare_is_refused():
    """In a step in which tokens are swapped: the teacher would see others than the student."""
    model = bert()
    pruner = a_pruner(model, bert(seed=1))
    run(pruner, model, 3)
    inputs = batch(3)
    prepared = pruner.prepare(inputs)
    outputs = model(**prepared)
    for unprepared in (inputs, dict(inputs)):
        with pytest.raises(ArgumentError, match=r"batch: got the batch as it was before prepare\(\)"):
            pruner.loss(outputs, unprepared)
    assert torch.isfinite(pruner.loss(outputs, {**prepared}))


@pytest.mark.parametrize("call", ["prepare", "loss"])
def test_a_batch_is_a_dict(call):
    model = bert()
    pruner = a_pruner(model, bert(seed=1))
    outputs = model.train()(**batch())
    for inputs in (None, batch()["input_ids"], list(batch().values())):
        with pytest.raises(ArgumentError, match=rf"Pruner\.{call}: inputs: got"):
            pruner.prepare(inputs) if call == "prepare" else pruner.loss(outputs, inputs)


def test_outputs_of_another_batch_are_refused():
    model = bert()
    pruner = a_pruner(model, bert(seed=1))
    outputs = model.train()(**pruner.prepare(batch(rows=6)))
    with pytest.raises(ArgumentError, match="inputs: got 4 rows, wanted the 6 that the outputs are of"):
        pruner.loss(outputs, batch(rows=4))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), "2", True])
def test_a_scale_is_a_positive_number(scale):
    with pytest.raises(ArgumentError, match="step: grad_scale: got"):
        a_pruner().step(scale)


class Named(nn.Module):
    """A model of the user's own, whose arguments have names of their own."""

    def __init__(self, seed):
        super().__init__()
        self.encoder = bert(seed=seed, head=transformers.BertModel)
        self.head = nn.Linear(16, 2)

    def forward(self, ids, mask, target=None):
        logits = self.head(self.encoder(ids, attention_mask=mask).last_hidden_state[:, 0])
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, target)}


def test_inputs_may_have_other_names():
    """What is measured is what it is under the usual ones; that no token can be swapped is said."""
    measured = []
    for named in (True, False):
        model = Named(0) if named else bert(seed=0)
        pruner = a_pruner(model, Named(1) if named else bert(seed=1))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for i in range(4):
            inputs = batch(i)
            if named:
                inputs = dict(zip(("ids", "mask", "target"), inputs.values(), strict=True))
            said = (
                pytest.warns(UserWarning, match="no token is swapped.*input_ids")
                if named and i == 3
                else None
            )
            with said or contextlib.nullcontext():
                inputs = pruner.prepare(inputs)
            outputs = model(**inputs)
            pruner.loss(outputs, inputs).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        measured.append(pruner.calibration.sizes[[0, 2, 3]])
    assert torch.equal(*measured)


def test_a_task_loss_of_ones_own_takes_the_place_of_the_models():
    losses = []
    for own in (False, True):
        model = bert()
        pruner = a_pruner(model, bert(seed=1), distill=Distill(labels=0.3))
        inputs = dict(pruner.prepare(batch()))
        outputs = model(**inputs)
        known = outputs.loss.detach()
        task_loss = 2.0 * outputs.loss if own else None
        losses.append(pruner.loss(outputs, inputs, task_loss).detach())
    torch.testing.assert_close(losses[1] - losses[0], 0.3 * known, rtol=1e-4, atol=1e-5)
    for wrong in (0.5, torch.ones(2)):
        with pytest.raises(ArgumentError, match=r"task_loss: got .*, wanted a 0-d tensor"):
            pruner.loss(model(**pruner.prepare(inputs)), inputs, wrong)
    with pytest.raises(
        ArgumentError, match=r"outputs: got no loss.*pruner\.loss\(outputs, batch, task_loss\)"
    ):
        pruner.loss(model(**pruner.prepare({**inputs, "labels": None})), inputs)


def test_labels_that_weigh_nothing_need_not_be_there():
    model = bert()
    pruner = a_pruner(model, bert(seed=1), distill=Distill(labels=0.0))
    unlabelled = {name: value for name, value in batch().items() if name != "labels"}
    loss = loss_of(pruner, model, unlabelled)
    loss.backward()
    pruner.step()
    labelled = bert()
    other = loss_of(a_pruner(labelled, bert(seed=1), distill=Distill(labels=0.0)), labelled, batch())
    assert torch.equal(loss, other)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulated_losses_weigh_as_one(parts):
    """Divided by their number nothing is said, and the end is that of whole batches; else it is said once."""

    def train(divisor):
        model = bert()
        pruner = a_pruner(model, bert(seed=1), distill=Distill(swap=0.0))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        pruner.prepare_optimizer(optimizer)
        for i in range(TOTAL):
            whole = batch(i, rows=8)
            for rows in torch.arange(8).chunk(parts):
                inputs = {name: value[rows] for name, value in whole.items()}
                # Hidden states are compared by the mean over all tokens.
                (loss_of(pruner, model.train(), inputs) / divisor).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        return pruner

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Pruner.step")
        pruner = train(parts)
    assert pruner.steps == TOTAL and len(pruner.kept) == 2
    if parts > 1:
        with pytest.warns(UserWarning, match=f"add up to {parts}, not to 1. Divide") as said:
            train(1)
        assert sum("add up to" in str(warning.message) for warning in said) == 1
