"""`save` refuses, by name and before anything is written, what `load` could not build again."""

import copy

import pytest
import torch
from helpers.encoders import batch, make
from torch import nn

import fastgate

HEAD = "ForSequenceClassification"


def layers(model):
    return model.bert.encoder.layer


def removed_layer(model):
    del layers(model)[2]


def shared_layer(model):
    layers(model)[2] = layers(model)[0]


def shared_weight(model):
    layers(model)[2].output.dense.weight = layers(model)[0].output.dense.weight


def uneven_heads(model):
    at = layers(model)[0].attention
    for name in ("query", "key", "value"):
        setattr(at.self, name, nn.Linear(32, 16))
    at.output.dense = nn.Linear(16, 32)
    at.self.num_attention_heads = 2


def other_head_count(model):
    at = layers(model)[0].attention.self
    at.num_attention_heads, at.attention_head_size = 2, 16


def uneven_ffn(model):
    layers(model)[1].intermediate.dense = nn.Linear(32, 40)
    layers(model)[1].output.dense = nn.Linear(40, 32)


def quantised(model):
    linear = layers(model)[1].output.dense
    layers(model)[1].output = torch.ao.quantization.quantize_dynamic(layers(model)[1].output, {nn.Linear})
    assert type(layers(model)[1].output.dense) is not type(linear)


class Subclass(torch.Tensor):
    pass


def subclass_weight(model):
    dense = layers(model)[0].output.dense
    dense.weight = nn.Parameter(torch.Tensor._make_subclass(Subclass, dense.weight.detach()))


def integer_weight(model):
    weight = layers(model)[0].output.dense.weight
    weight.requires_grad_(False).data = weight.to(torch.int8)


def extra_module(model):
    model.bert.encoder.layer[0].adapter = nn.Linear(32, 32)


def extra_parameter(model):
    model.temperature = nn.Parameter(torch.ones(1))


def other_head(model):
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 3))


def wider_head(model):
    model.classifier = nn.Linear(32, 5)


def other_activation(model):
    layers(model)[1].intermediate.intermediate_act_fn = nn.ReLU()


def other_eps(model):
    layers(model)[1].output.LayerNorm.eps = 0.1


def parametrised(model):
    torch.nn.utils.parametrizations.weight_norm(layers(model)[1].output.dense)


def weightless(model):
    layers(model)[1].output.dense.to("meta")


def hooked(model):
    layers(model)[1].output.dense.register_forward_hook(lambda module, args, output: output * 2)


def replaced_forward(model):
    linear = layers(model)[1].output.dense
    linear.forward = lambda x: x


def config_that_lies(model):
    model.config.hidden_act = "relu"


def config_that_is_no_json(model):
    model.config.note = {1, 2}


def config_subclass(model):
    model.config.__class__ = type("MyConfig", (type(model.config),), {})


def config_of_another_size(model):
    model.config.vocab_size = 91


CHANGES = {
    removed_layer: "2 layers, wanted 3",
    shared_layer: r"layer\.0.*shared by|encoder\.layer: got attention pruned in layers \[\]",
    shared_weight: r"layer\.0\.output\.dense\.weight: got shared by",
    uneven_heads: r"layer\.0\.attention",
    other_head_count: r"layer\.0\.attention\.self\.num_attention_heads: got 2",
    uneven_ffn: r"layer\.1\.intermediate\.dense\.weight: got \(40, 32\)",
    quantised: r"layer\.1\.output\.dense: got .*wanted Linear",
    subclass_weight: r"layer\.0\.output\.dense\.weight: got Subclass",
    integer_weight: r"layer\.0\.output\.dense\.weight: got torch\.int8",
    extra_module: r"layer\.0\.adapter: got Linear, wanted no such module",
    extra_parameter: "temperature: got a tensor, wanted none",
    other_head: "classifier: got Sequential, wanted Linear",
    wider_head: r"classifier\.weight: got \(5, 32\)",
    other_activation: r"layer\.1\.intermediate\.intermediate_act_fn: got ReLU",
    other_eps: r"layer\.1\.output\.LayerNorm\.eps: got 0\.1",
    parametrised: r"layer\.1\.output\.dense",
    weightless: r"layer\.1\.output\.dense\.weight: got no values",
    hooked: r"layer\.1\.output\.dense: got the hook hooked",
    replaced_forward: r"layer\.1\.output\.dense: got a replaced forward",
    config_that_lies: "intermediate_act_fn",
    config_that_is_no_json: "JSON",
    config_subclass: "MyConfig",
    config_of_another_size: r"word_embeddings\.weight: got \(90, 32\)",
}


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before patch", "after prune", "never pruned"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_load_could_not_build_is_refused_by_name(change, when, tmp_path):
    model = make("Bert", HEAD)
    try:
        if when == "before patch":
            change(model)
        fastgate.patch(model)
        if when != "never pruned":
            fastgate.prune(model, keep=[0, 1])
        if when != "before patch":
            change(model)
    except fastgate.Unsupported:
        return  # refused even earlier
    if change is removed_layer and when != "never pruned":
        pytest.skip("the pruned layer is gone, as its gate knows")
    with pytest.raises(fastgate.Unsupported, match=CHANGES[change]):
        fastgate.save(model, tmp_path / "a" / "x")
    assert not (tmp_path / "a").exists()


@torch.no_grad()
def test_what_config_describes_is_saved(tmp_path):
    """Changes that the config tells of, and tied weights, stay what they are."""
    for head in ("ForMaskedLM", "ForPreTraining"):
        model = fastgate.prune(make("Bert", head), keep=[1])
        inputs = batch(model, head)
        again = fastgate.load(fastgate.save(model, tmp_path / head))
        decoder, words = again.cls.predictions.decoder.weight, again.bert.embeddings.word_embeddings.weight
        assert decoder is words
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    untied = make("Bert", "ForMaskedLM", tie_word_embeddings=False)
    fastgate.prune(untied, keep=[1])
    again = fastgate.load(fastgate.save(untied, tmp_path / "untied"))
    assert torch.equal(again.cls.predictions.decoder.weight, untied.cls.predictions.decoder.weight)
    assert again.cls.predictions.decoder.weight is not again.bert.embeddings.word_embeddings.weight
    untied.config.tie_word_embeddings = True
    with pytest.raises(fastgate.Unsupported, match="shared by"):
        fastgate.save(untied, tmp_path / "y")


@torch.no_grad()
def test_mixed_dtypes_stay(tmp_path):
    model = fastgate.prune(make("Bert", HEAD).to(torch.bfloat16), keep=[1])
    model.classifier.float()
    again = fastgate.load(fastgate.save(model, tmp_path / "x"))
    assert {n: p.dtype for n, p in again.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }


def test_weights_that_share_memory_only_are_saved_apart(tmp_path):
    model = fastgate.prune(make("Bert", HEAD), keep=[0, 1])
    first, second = (layers(model)[i].output.dense.weight for i in (0, 1))
    second.data = first.data
    again = fastgate.load(fastgate.save(model, tmp_path / "x"))
    assert torch.equal(layers(again)[1].output.dense.weight, first)


@pytest.mark.slow
def test_models_around_the_model_are_named(tmp_path):
    model = fastgate.prune(make("Bert", HEAD), keep=[1])
    with pytest.raises(fastgate.ArgumentError, match=r"model\.module"):
        fastgate.save(nn.DataParallel(model), tmp_path / "x")
    with pytest.raises(fastgate.ArgumentError, match="_orig_mod"):
        fastgate.save(torch.compile(model), tmp_path / "x")
    with pytest.raises(fastgate.ArgumentError, match="the encoder inside it"):
        fastgate.save(nn.Sequential(copy.deepcopy(model.bert)), tmp_path / "x")
    with pytest.raises(fastgate.ArgumentError, match=r"a torch\.nn\.Module"):
        fastgate.save("model", tmp_path / "x")
