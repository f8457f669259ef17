"""prune and explain: weights removed, the outputs of skipped attention, tables that add up."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from helpers.encoders import VECTORS, batch, make

import fastgate
from fastgate.models.handle import get_encoder


@pytest.mark.parametrize("replacement", VECTORS)
@torch.no_grad()
def test_pruned_equals_skipped_attention_and_loses_weights(replacement):
    model = fastgate.patch(make("Roberta", "ForSequenceClassification", layers=4))
    inputs = batch(model, "ForSequenceClassification")
    handle = get_encoder(model)
    handle.add_replacements(replacement)
    for name, parameter in model.named_parameters():
        if "replacement" in name:
            parameter.normal_()
    handle.set_gates([0.0, 1.0, 0.0, 0.0])
    want = model(**inputs).logits
    before = sum(p.numel() for p in model.parameters())
    pruned = fastgate.prune(model, keep=[1], replacement=replacement)
    assert pruned is model and torch.equal(model(**inputs).logits, want)
    extra = len(VECTORS[replacement]) * 32
    assert sum(p.numel() for p in model.parameters()) == before - 3 * 4 * (32 * 32 + 32) - extra
    assert not any(".layer.1.attention.replacement" in name for name in model.state_dict())
    fastgate.prune(model, keep=[], replacement=replacement)
    assert get_encoder(model).gates == [0.0] * 4 and torch.isfinite(model(**inputs).logits).all()


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


@pytest.mark.parametrize(
    "keep",
    [[np.int64(0), np.int32(2)], torch.tensor([0, 2]), np.array([0, 2]), [torch.tensor(0), 2], {0, 2},
     range(0, 3, 2), (i for i in (0, 2))],
)  # fmt: skip
def test_integers_of_any_library_are_layers(keep):
    model = fastgate.prune(make("Bert", "Model"), keep=keep)
    assert get_encoder(model).gates == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "keep",
    [3, "02", None, torch.tensor(2), np.array(2), [True], [np.bool_(True)], [torch.tensor(True)], [1.0],
     torch.tensor([0.5]), [9], [-1], [None], [[0]]],
    ids=repr,
)  # fmt: skip
def test_what_is_no_list_of_layers_is_refused_and_nothing_changed(keep):
    model = fastgate.patch(make("Bert", "Model"))
    with pytest.raises(fastgate.ArgumentError, match=r"prune: keep: got .* from 0 to 2"):
        fastgate.prune(model, keep=keep)
    assert get_encoder(model).gates == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("call", [fastgate.patch, fastgate.unpatch, lambda m: fastgate.prune(m, keep=[0])])
def test_a_name_is_no_model(call):
    with pytest.raises(fastgate.ArgumentError, match=r"got 'bert-base-uncased', wanted a torch.nn.Module"):
        call("bert-base-uncased")


def test_layers_that_are_one_module_are_pruned_together_or_not_at_all():
    model = make("Bert", "Model")
    model.encoder.layer[2] = model.encoder.layer[0]
    with pytest.raises(fastgate.Unsupported, match=r"layers \[2\] that share"):
        fastgate.prune(model, keep=[0, 1])
    assert hasattr(model.encoder.layer[0].attention.self, "query")
    fastgate.prune(model, keep=[1])


def test_adapters_of_peft_are_merged_first(tmp_path):
    """As get_peft_model leaves them: a module of PEFT in the place of a Linear."""
    model = fastgate.patch(make("Bert", "Model"))
    lora = type("Linear", (torch.nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model.encoder.layer[0].attention.self.query = lora(32, 32)
    for call in (lambda: fastgate.prune(model, keep=[1]), lambda: fastgate.save(model, tmp_path / "x")):
        with pytest.raises(fastgate.Unsupported, match=r"a Linear of PEFT.*merge_and_unload\(\)"):
            call()
    assert not (tmp_path / "x").exists() and get_encoder(model).gates == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("options", [{"keep": [9]}, {"keep": None}, {"keep": [1], "replacement": "none"}])
def test_a_refused_prune_changes_nothing(options):
    model = make("Bert", "ForSequenceClassification")
    kind = type(model)
    with pytest.raises(fastgate.ArgumentError, match="prune"):
        fastgate.prune(model, **options)
    assert type(model) is kind and not hasattr(model.bert, "fastgate_runtime")


@torch.no_grad()
def test_what_was_dropped_is_freed_at_once():
    model = fastgate.patch(make("Bert", "Model"))
    model(**batch(model, "Model"))
    attention = model.encoder.layer[0].attention
    query, dense = (
        weakref.ref(m.weight) for m in (attention.self.query, model.encoder.layer[1].output.dense)
    )
    del attention
    fastgate.prune(model, keep=[1])
    model(**batch(model, "Model"))
    fastgate.freeze(model)
    gc.collect()
    assert query() is None and dense() is None


@pytest.mark.parametrize("change", ["dense layer", "dense attention", "swap"])
@torch.no_grad()
def test_layers_put_in_the_place_of_pruned_ones_are_refused(change, tmp_path):
    """Their gates are those of the layers before: attention would not run, or is not there."""
    model = fastgate.prune(make("Bert", "Model"), keep=[1])
    inputs = batch(model, "Model")
    want = model(**inputs).last_hidden_state
    layers, dense = model.encoder.layer, make("Bert", "Model").encoder.layer
    before = layers[0], layers[0].attention, layers[1]
    if change == "dense layer":
        layers[0] = dense[0]
    elif change == "dense attention":
        layers[0].attention = dense[0].attention
    else:
        layers[0], layers[1] = layers[1], layers[0]
    calls = (
        lambda: model(**inputs),
        lambda: fastgate.explain(model),
        lambda: fastgate.save(model, tmp_path / "x"),
    )
    for call in calls:
        with pytest.raises(fastgate.Unsupported, match=r"encoder.layer: got attention pruned in layers"):
            call()
    layers[0], layers[1] = before[0], before[2]
    layers[0].attention = before[1]
    assert torch.equal(model(**inputs).last_hidden_state, want)


@pytest.mark.parametrize("keep", [[0], [0, 1, 2]], ids=str)
def test_weights_of_another_pruning_are_refused(keep):
    """Without `strict`, as a Trainer resumes, torch would leave the attention as it is and say nothing."""
    source = fastgate.prune(make("Bert", "ForSequenceClassification"), keep=[1]).state_dict()
    model = fastgate.prune(make("Bert", "ForSequenceClassification"), keep=keep)
    weight = model.bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight.add_(1)
    before = weight.clone()
    for strict in (True, False):
        with pytest.raises(
            fastgate.CheckpointError, match=r"got attention of layers \[1\] and none of layers"
        ):
            model.load_state_dict(source, strict=strict)
    encoder = {name.removeprefix("bert."): tensor for name, tensor in source.items()}
    with pytest.raises(RuntimeError, match="load_state_dict"):
        model.bert.load_state_dict(encoder, strict=False)
    assert torch.equal(weight, before)


def test_parts_of_a_state_dict_and_dense_weights_are_loaded():
    dense = make("Bert", "ForSequenceClassification").state_dict()
    model = fastgate.prune(make("Bert", "ForSequenceClassification"), keep=[1])
    model.load_state_dict(dense, strict=False)
    model.load_state_dict(
        {n: t for n, t in dense.items() if "LayerNorm" in n or ".layer.1." in n}, strict=False
    )
    model.load_state_dict({n: t for n, t in dense.items() if "attention" not in n}, strict=False)
