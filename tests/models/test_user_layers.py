"""Layers of other widths, another attention function, and feed-forward in chunks."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from helpers.encoders import batch, make
from helpers.user_modules import HEAD, LAYERS, WHEN, assert_alike, pair, plain, run
from torch import nn

import fastgate


def narrowed(model, heads=True):
    """Layer 0 with half the heads, layer 1 with a narrower feed-forward block."""
    attention, layer = model.bert.encoder.layer[0].attention, model.bert.encoder.layer[1]

    def cut(linear, rows=None, columns=None):
        weight, bias = linear.weight[:rows, :columns], linear.bias[:rows]
        new = nn.Linear(weight.shape[1], weight.shape[0])
        new.load_state_dict({"weight": weight.detach().clone(), "bias": bias.detach().clone()})
        return new

    for name in ("query", "key", "value"):
        setattr(attention.self, name, cut(getattr(attention.self, name), rows=16))
    attention.output.dense = cut(attention.output.dense, columns=16)
    if heads:
        attention.self.num_attention_heads, attention.self.all_head_size = 2, 16
    layer.intermediate.dense = cut(layer.intermediate.dense, rows=40)
    layer.output.dense = cut(layer.output.dense, columns=40)
    return model.eval()


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("when", WHEN[:4])
def test_layers_of_other_widths(when, heads):
    """transformers goes by the size of a head; the number of heads may still be the config's."""
    change = functools.partial(narrowed, heads=heads)
    theirs, ours = pair("before patch" if "fr" in when else when, change)
    if "fr" in when:
        ours = fastgate.freeze(ours)
    assert_alike(theirs, ours, when)
    out = fastgate.explain(ours, [5, 7])
    full = fastgate.explain(fastgate.patch(plain()), [5, 7])
    assert out.layers[0].flops < full.layers[0].flops and out.layers[1].flops < full.layers[1].flops
    if "prune" not in when:
        assert out.layers[1].flops == 2 * 12 * 32 * (4 * 32 + 2 * 40) + 4 * (25 + 49) * 32
        assert out.layers[0].flops == 2 * 12 * 32 * (4 * 16 + 2 * 64) + 4 * (25 + 49) * 16


def test_the_last_attention_of_another_width_is_absorbed():
    theirs, ours = plain(), fastgate.patch(plain())
    for model in (theirs, ours):
        model.bert.encoder.layer = model.bert.encoder.layer[:1]
        narrowed_first = model.bert.encoder.layer[0].attention
        for name in ("query", "key", "value"):
            old = getattr(narrowed_first.self, name)
            old.weight, old.bias = nn.Parameter(old.weight[:16]), nn.Parameter(old.bias[:16])
        dense = narrowed_first.output.dense
        dense.weight = nn.Parameter(dense.weight[:, :16])
    with pytest.raises(fastgate.Unsupported, match=r"1 layers.*4, as when"):
        run(ours)
    ours.bert.fastgate_runtime.gates = [1.0]
    assert fastgate.explain(ours).layers[0].steps[0] == "project_query"
    assert_alike(theirs, ours)


def test_an_attention_function_of_ones_own_is_refused():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def own_attention(module, query, *args, **kwargs):
        return query.transpose(1, 2), None

    model = fastgate.patch(plain())
    run(model)
    try:
        ALL_ATTENTION_FUNCTIONS["own"] = own_attention
        model.config._attn_implementation = "own"
        with pytest.raises(fastgate.Unsupported, match=r"_attn_implementation.*own"):
            run(model)
    finally:
        del ALL_ATTENTION_FUNCTIONS["own"]
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        torch.testing.assert_close(run(model), run(plain()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_an_eager_attention_that_was_replaced_is_refused(family, monkeypatch):
    def own_attention(module, query, *args, **kwargs):
        return query.transpose(1, 2), None

    model = fastgate.patch(make(family, "ForSequenceClassification"))
    inputs = batch(model, "ForSequenceClassification")
    model.set_attn_implementation("eager")
    model(**inputs)
    module = sys.modules[f"transformers.models.{family.lower()}.modeling_{family.lower()}"]
    monkeypatch.setattr(module, "eager_attention_forward", own_attention)
    with pytest.raises(fastgate.Unsupported, match=r"_attn_implementation.*eager.*own_attention"):
        model(**inputs)
    model.set_attn_implementation("sdpa")
    model(**inputs)


def test_feed_forward_in_chunks_and_outputs_by_config():
    theirs, ours = plain(chunk_size_feed_forward=2), fastgate.patch(plain(chunk_size_feed_forward=2))
    assert_alike(theirs, ours)
    for model in (theirs, ours):
        model.set_attn_implementation("eager")
        model.config.output_attentions = model.config.output_hidden_states = True
    outputs = [model(**batch(model, HEAD)) for model in (theirs, ours)]
    attended = batch(ours, HEAD)["attention_mask"].bool()
    for want, got in zip(outputs[0].hidden_states, outputs[1].hidden_states, strict=True):
        torch.testing.assert_close(got[attended], want[attended], rtol=1e-4, atol=1e-5)
    assert len(outputs[1].attentions) == LAYERS
