"""LayerNorms that are called, beside gates and replacements: soft gates, chains, pruning."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.encoders import batch, draw_replacements, make, without_attention
from helpers.user_modules import DROPOUTS, HEAD, KEPT, LAYERS, NORMS, assert_alike, at, place, plain, run
from torch import nn

import fastgate


def test_soft_gates_with_modules_that_are_called():
    """With the gate at 1 nothing of the replacement is left, at 0 nothing of the attention."""
    from fastgate.models.handle import get_encoder

    inputs = batch(plain(), HEAD)
    for kind in ("affine", "shift"):
        called, fused = fastgate.patch(plain()), fastgate.patch(plain())
        for model in (called, fused):
            handle = get_encoder(model)
            handle.add_replacements(kind)
            draw_replacements(model)
            handle.set_gates([torch.tensor(0.3), 0.0, torch.tensor(0.8), 0.0])
        for path in (*NORMS[1:], *DROPOUTS[1:]):
            parent, name = place(called, path)
            setattr(parent, name, nn.Sequential(getattr(parent, name)))
        for model in (called, fused):
            model(**inputs).logits.square().sum().backward()
        torch.testing.assert_close(run(called), run(fused), rtol=1e-4, atol=1e-5)
        grads = [
            {n.replace(".0.weight", ".weight").replace(".0.bias", ".bias"): p.grad
             for n, p in model.named_parameters() if "LayerNorm" in n or "replacement" in n}
            for model in (called, fused)
        ]  # fmt: skip
        assert grads[0].keys() == grads[1].keys()
        for name, want in grads[1].items():
            torch.testing.assert_close(grads[0][name], want, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("replacement", ["zero", "mean", "affine", "shift"])
@pytest.mark.parametrize("head", [HEAD, "ForTokenClassification"])
def test_chains_with_a_norm_that_is_called(replacement, head):
    """Where one of two norms in a chain is called, the other one still is what it was."""
    fused = draw_replacements(fastgate.prune(make("Bert", head, layers=LAYERS), [0], replacement))
    inputs = batch(fused, head)
    with torch.no_grad():
        want = fused(**inputs).logits
        for path in (
            "layer.1.attention.output.LayerNorm",
            "layer.0.output.LayerNorm",
            "layer.3.output.LayerNorm",
        ):
            for frozen in (False, True):
                model = copy.deepcopy(fused)
                model = fastgate.freeze(model) if frozen else model
                at(model, path).register_forward_hook(lambda module, args, out: out.clone())
                torch.testing.assert_close(model(**inputs).logits, want, rtol=1e-4, atol=1e-5)


def test_a_wrapped_norm_can_be_pruned():
    class Bare(nn.Module):
        """No attribute of a LayerNorm."""

        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(32))

        def forward(self, x):
            return nn.functional.layer_norm(x, (32,)) * self.gain

    for replacement in ("zero", "affine", "shift"):
        theirs, ours = plain(), plain()
        for model in (theirs, ours):
            model.bert.encoder.layer[1].attention.output.LayerNorm = Bare()
        fastgate.prune(ours, KEPT, replacement)
        assert_alike(without_attention(theirs, [1, 3]), ours, "after prune")
        assert ours.bert.encoder.layer[1].attention.output.LayerNorm.gain.grad.abs().max() > 0
