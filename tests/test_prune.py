"""prune and explain: weights gone, outputs those of closed gates, tables that add up."""

import copy

import pytest
import torch
from encoders import VECTORS, batch, make

import fastgate
from fastgate.state import encoder_state


@pytest.mark.parametrize("replacement", VECTORS)
@torch.no_grad()
def test_pruned_equals_closed_gates_and_loses_weights(replacement):
    model = fastgate.patch(make("Roberta", "ForSequenceClassification", layers=4))
    inputs = batch(model, "ForSequenceClassification")
    state = encoder_state(model)
    state.add_replacements(replacement)
    for name, parameter in model.named_parameters():
        if "replacement" in name:
            parameter.normal_()
    state.set_gates([0.0, 1.0, 0.0, 0.0])
    want = model(**inputs).logits
    before = sum(p.numel() for p in model.parameters())
    pruned = fastgate.prune(model, keep=[1], replacement=replacement)
    assert pruned is model and torch.equal(model(**inputs).logits, want)
    extra = len(VECTORS[replacement]) * 32
    assert sum(p.numel() for p in model.parameters()) == before - 3 * 4 * (32 * 32 + 32) - extra
    assert not any(".layer.1.attention.replacement" in name for name in model.state_dict())
    fastgate.prune(model, keep=[], replacement=replacement)
    assert encoder_state(model).gates == [0.0] * 4 and torch.isfinite(model(**inputs).logits).all()


def test_keeping_everything_changes_nothing():
    model = make("Bert", "ForTokenClassification")
    inputs = batch(model, "ForTokenClassification")
    with torch.no_grad():
        want = fastgate.patch(copy.deepcopy(model))(**inputs).logits
        assert torch.equal(fastgate.prune(model, keep=range(3))(**inputs).logits, want)


def test_what_prune_refuses():
    model = make("Bert", "Model")
    for keep in ([3], [-1], [0, 99], ["0"], [True]):
        with pytest.raises(fastgate.ArgumentError, match="keep"):
            fastgate.prune(model, keep=keep)
    with pytest.raises(fastgate.ArgumentError, match="replacement"):
        fastgate.prune(model, keep=[0], replacement="median")
    fastgate.prune(model, keep=[0, 2])
    with pytest.raises(fastgate.ArgumentError, match="still there"):
        fastgate.prune(model, keep=[1])
    with pytest.raises(fastgate.Unsupported, match="unpatch"):
        fastgate.unpatch(model)
    with pytest.raises(fastgate.ArgumentError, match="pruned attention"):
        model.encoder.layer[1].attention.self(torch.zeros(1, 2, 32))


def test_explain_adds_up():
    model = fastgate.patch(make("Bert", "ForSequenceClassification", layers=4))
    lengths = [14, 9, 3, 1]
    dense = fastgate.explain(model, lengths)
    assert [row.live_rows for row in dense.layers] == [27, 27, 27, 4] and dense.kept == (0, 1, 2, 3)
    fastgate.prune(model, keep=[1], replacement="mean")
    told = fastgate.explain(model, lengths)
    assert [row.attention for row in told.layers] == ["removed", "kept", "removed", "removed"]
    assert [row.live_rows for row in told.layers] == [27, 4, 4, 4]
    assert [len(row.steps) for row in told.layers] == [3, 7, 3, 3]
    assert told.flops == sum(row.flops for row in told.layers) < dense.flops
    assert told.layers[0].flops == 2 * 27 * 2 * 32 * 64 and told.layers[3].flops == 2 * 4 * 2 * 32 * 64
    text, data = str(told), told.to_dict()
    assert "replaced by mean" in text and "absorbed" in text and data["layers"][1]["gate"] == 1.0
    with pytest.raises(fastgate.NothingPatched):
        fastgate.explain(make("Bert", "Model"))
