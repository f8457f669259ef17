"""transformers' model and a patched one that a user changes alike, and what must be alike of them."""

from __future__ import annotations

import itertools

import torch
from helpers.encoders import batch, make, without_attention
from torch import nn

import fastgate

HEAD = "ForSequenceClassification"
LAYERS, KEPT = 4, [0, 2]
NORMS = ("embeddings.LayerNorm", "layer.0.output.LayerNorm", "layer.1.attention.output.LayerNorm")
NORMS += ("layer.2.attention.output.LayerNorm", "layer.3.output.LayerNorm")
DROPOUTS = ("embeddings.dropout", "layer.0.output.dropout", "layer.2.attention.output.dropout")
PROJECTIONS = tuple(f"layer.2.attention.self.{name}" for name in ("query", "key", "value"))
LINEARS = (
    *PROJECTIONS,
    "layer.0.attention.output.dense",
    "layer.1.intermediate.dense",
    "layer.0.output.dense",
)
TABLES = tuple(f"embeddings.{name}_embeddings" for name in ("word", "position", "token_type"))
ACTIVATIONS = ("layer.1.intermediate.intermediate_act_fn",)
WHEN = ("before patch", "after patch", "after prune", "after freeze", "pruned and frozen")


def place(model, path):
    """(parent, name) of a module of the encoder."""
    path = ("encoder." + path if path.startswith("layer") else path).split(".")
    return model.base_model.get_submodule(".".join(path[:-1])), path[-1]


def at(model, path):
    parent, name = place(model, path)
    return getattr(parent, name)


def plain(**options):
    return make("Bert", HEAD, layers=LAYERS, **{"hidden_dropout_prob": 0.1} | options)


def pair(when, change, **options):
    """transformers' model and ours, each with the change."""
    theirs, ours = plain(**options), plain(**options)
    change(theirs)
    if when == "before patch":
        change(ours)
    fastgate.patch(ours)
    run(ours)  # so that what is cached is there
    if "prune" in when:
        without_attention(theirs, [1, 3])
        fastgate.prune(ours, KEPT)
        run(ours)
    if "fr" in when:
        fastgate.freeze(ours)
        run(ours)
    if when != "before patch":
        change(ours)
    return theirs, ours


def run(model, **options):
    with torch.no_grad():
        return model(**batch(model, HEAD), **options).logits


def assert_alike(theirs, ours, when=""):
    """The same logits, and the same gradients wherever there are any."""
    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-4, atol=1e-5)
    if "fr" in when:
        return
    grads = []
    for model in (theirs, ours):
        model(**batch(model, HEAD)).logits.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    want, got = grads
    for name in got.keys() & want.keys():
        scale = max(float(want[name].norm()), 1e-2)
        assert float((got[name] - want[name]).norm()) <= 1e-3 * scale, name
    pruned = "attention.self", "attention.output.dense"
    missing = {name for name in want.keys() - got.keys() if not any(part in name for part in pruned)}
    assert not missing if "prune" not in when else True, missing


def spread(count, *tables):
    """Every combination of the first tables, each with `count` of the last table's, which take turns."""
    *first, last = tables
    combinations = list(itertools.product(*first))
    turns = itertools.cycle(last)
    return [(*combination, next(turns)) for combination in combinations for _ in range(count)]


def swap(make_module):
    def change(model, path):
        parent, name = place(model, path)
        torch.manual_seed(3)
        new = make_module(getattr(parent, name))
        if not isinstance(new, nn.Module):
            delattr(parent, name)
        setattr(parent, name, new)

    return change


class Doubled(nn.Module):
    def forward(self, weight):
        return 2.0 * weight
