"""Dropouts that a user replaced, or whose rate or mode is their own."""

from __future__ import annotations

import pytest
import torch
from helpers.encoders import batch
from helpers.user_modules import DROPOUTS, HEAD, at, pair, plain, run, swap
from torch import nn

import fastgate


@pytest.mark.parametrize("path", DROPOUTS)
@pytest.mark.parametrize("when", ["before patch", "after patch"])
def test_another_dropout_is_called_in_training(when, path):
    class Ones(nn.Module):
        """Drops the second half of the channels, whatever it is told."""

        def forward(self, x):
            assert self.training
            return torch.cat((x[..., :16], 0.0 * x[..., 16:]), -1)

    theirs, ours = pair(when, lambda model: swap(lambda m: Ones())(model, path))
    off = {"p": 0.0}
    for model in (theirs, ours):
        model.train()
        for module in model.modules():
            module.__dict__.update(off if isinstance(module, nn.Dropout) else {})
    logits = [model(**batch(model, HEAD)).logits for model in (theirs, ours)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", [*DROPOUTS, "layer.0.attention.self.dropout"])
def test_a_dropout_of_one_drops_everything(path):
    model = fastgate.patch(plain(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    theirs = plain(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for each in (theirs, model):
        at(each, path).p = 1.0
        each.train()
    if "self" in path:
        with pytest.raises(fastgate.FastgateError, match="dropout_p"):
            run(model)
    else:
        torch.testing.assert_close(run(model), run(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["layer.0.attention.self", "layer.0.attention.self.dropout", *DROPOUTS])
@pytest.mark.parametrize("frozen", [False, True])
def test_training_of_one_module_only(path, frozen):
    """Attention drops when it trains itself; its Dropout is never called and its mode says nothing."""
    model, theirs = fastgate.patch(plain()), plain()
    if frozen:
        fastgate.freeze(model)
    drops = []
    for each in (theirs, model):
        want = run(each)
        at(each, path).training = True
        torch.manual_seed(0)
        drops.append(bool((run(each) - want).abs().max() > 1e-5))
    assert drops[0] == drops[1] == (path != "layer.0.attention.self.dropout")
