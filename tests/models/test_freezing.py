"""freeze: what is packed computes what plain weights do; what freeze and a frozen model refuse."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers import encoders
from helpers.bfloat16 import PACKED_DTYPES
from helpers.frozen_models import HEADS, frozen, outputs, packed
from torch import nn

import fastgate
from fastgate.models import freezing
from fastgate.models.handle import get_encoder
from fastgate.nn.packed_linear import PackedLinear
from fastgate.ops import backends, fused_layers
from fastgate.ops.linear import Packed
from fastgate.runtime.layer import is_plain


@pytest.mark.parametrize("dtype", PACKED_DTYPES, ids=str)
@pytest.mark.parametrize("keep", [None, [0, 2], [0], []], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_the_outputs_are_the_same(head, keep, dtype):
    plain, ours = frozen(head, keep, dtype)
    batch = encoders.batch(plain, head)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for one, other in zip(outputs(plain, batch), outputs(ours, batch), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_what_is_packed():
    """Every Linear that is only multiplied with: not the absorbed attention's, not a tied decoder."""
    _, classifier = frozen(keep=[0, 1])
    names = [name for name, module in classifier.named_modules() if is_plain(module)]
    assert names == [f"bert.encoder.layer.1.attention.self.{part}" for part in ("key", "value")]
    _, tagger = frozen("ForTokenClassification")
    assert not [name for name, module in tagger.named_modules() if is_plain(module)]
    _, masked = frozen("ForMaskedLM")
    assert [n for n, module in masked.named_modules() if is_plain(module)] == ["cls.predictions.decoder"]


def test_the_weights_are_there_once():
    plain, ours = frozen("ForTokenClassification")
    left = {name for name, _ in ours.named_parameters()}
    assert not any(name.endswith("dense.weight") for name in left)
    assert len(packed(ours)) == sum(isinstance(m, nn.Linear) for m in plain.modules())


def test_freezing_twice_changes_nothing():
    _, ours = frozen()
    before = packed(ours)
    fastgate.freeze(ours)
    assert [id(module) for module in packed(ours)] == [id(module) for module in before]


def test_explain_says_nothing_new():
    plain, ours = frozen()
    assert str(fastgate.explain(plain)) == str(fastgate.explain(ours))


def test_what_freeze_refuses():
    model = encoders.make("Bert", "ForSequenceClassification")
    with pytest.raises(fastgate.NothingPatched, match=r"freeze: model.*fastgate\.patch"):
        fastgate.freeze(model)
    fastgate.patch(model)
    with pytest.raises(fastgate.ArgumentError, match=r"training mode.*model\.eval\(\)"):
        fastgate.freeze(model.train())
    with pytest.raises(fastgate.Unsupported, match=r"freeze: model: got torch\.float64 on cpu"):
        fastgate.freeze(model.eval().double())
    get_encoder(model.float()).set_gates([torch.tensor(0.5), 1.0, 1.0])
    with pytest.raises(fastgate.ArgumentError, match=r"soft gates in layers \[0\]"):
        fastgate.freeze(model)
    assert not packed(model)


def test_what_a_frozen_model_refuses():
    plain, ours = frozen()
    batch = encoders.batch(plain, "ForSequenceClassification")
    with pytest.raises(fastgate.Unsupported, match=r"autocast.*fastgate\.thaw"):  # noqa: SIM117
        with torch.no_grad(), torch.autocast("cpu"):
            ours(**batch)
    with pytest.raises(fastgate.Unsupported, match=r"freeze: model: got torch\.float64"):
        ours.double()


@pytest.mark.parametrize("head", HEADS)
def test_training_a_frozen_model_is_refused(head):
    """In training mode by the forward; in eval mode, which infers outside no_grad too, by the backward."""
    plain, ours = frozen(head)
    batch = encoders.batch(plain, head)
    out = ours(**batch)[0]
    torch.testing.assert_close(out.detach(), outputs(ours, batch)[0])
    with pytest.raises(fastgate.Unsupported, match=r"backward: model: got a frozen one.*fastgate\.thaw"):
        out.sum().backward()
    with pytest.raises(fastgate.Unsupported, match=r"forward: model: got a frozen one in training.*\.thaw"):
        ours.train()(**batch)
    with torch.no_grad():
        ours(**batch)
    fastgate.thaw(ours)(**batch)[0].sum().backward()


def test_every_output_refuses_a_backward():
    _, ours = frozen("Model")
    batch = encoders.batch(ours, "Model")
    for options in ({"output_hidden_states": True}, {"return_dict": False}):
        out = ours(**batch, **options)
        values = out if isinstance(out, tuple) else (*out.to_tuple()[:2], *out.hidden_states)
        for value in values:
            with pytest.raises(fastgate.Unsupported, match=r"fastgate\.thaw"):
                value.sum().backward(retain_graph=True)
    embeds = torch.randn(2, 5, 32, requires_grad=True)
    with pytest.raises(fastgate.Unsupported, match=r"fastgate\.thaw"):
        ours.requires_grad_(False)(inputs_embeds=embeds)[0].sum().backward()


def test_what_reads_a_frozen_models_outputs_can_be_trained():
    """Where none of the model's own parameters asks for a gradient."""
    model = fastgate.patch(encoders.make("Bert", "Model")).requires_grad_(False)
    ours, head = fastgate.freeze(model), nn.Linear(32, 2)
    out = ours(**encoders.batch(model, "Model"))
    assert not out.last_hidden_state.requires_grad
    head(out.pooler_output).sum().backward()
    assert head.weight.grad.abs().sum() > 0


def test_a_linear_in_two_places_stays_one():
    model = fastgate.patch(encoders.make("Bert", "ForSequenceClassification"))
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense = layers[0].intermediate.dense
    layers[1].attention.self.key = layers[1].attention.self.query
    batch = encoders.batch(model, "ForSequenceClassification")
    want = outputs(model, batch)[0]
    fastgate.freeze(model)
    torch.testing.assert_close(outputs(model, batch)[0], want, rtol=1e-4, atol=1e-5)
    assert isinstance(layers[0].intermediate.dense, PackedLinear)
    fastgate.thaw(model)
    assert layers[1].intermediate.dense is layers[0].intermediate.dense
    assert layers[1].attention.self.key is layers[1].attention.self.query
    torch.testing.assert_close(outputs(model, batch)[0], want)


def attention_of(model, layer):
    return get_encoder(model).layers[layer].attention.self


@pytest.mark.skipif(backends.load_cpu_library() != "", reason=backends.load_cpu_library())
def test_query_key_and_value_are_one_product():
    """In the same memory, in place of three; and each by itself again once one of them is another."""
    plain, ours = frozen("ForTokenClassification")
    at = attention_of(ours, 1)
    fused_qkv = at.query.packed.fused_qkv
    assert fused_qkv is at.key.packed.fused_qkv is at.value.packed.fused_qkv and fused_qkv.shape == (96, 32)
    assert at.key.packed.data.data_ptr() == fused_qkv.data[1:].data_ptr()
    batch = encoders.batch(plain, "ForTokenClassification")
    shapes = []
    with (
        mock.patch.object(fused_layers, "runs", return_value=False),
        mock.patch.object(Packed, "product", autospec=True, side_effect=Packed.product) as products,
    ):
        outputs(ours, batch)
        shapes = [call.args[0].shape for call in products.call_args_list]
    assert shapes.count((96, 32)) == 3 and shapes.count((32, 32)) == 3
    changed = {
        name: t * 1.1
        for name, t in plain.state_dict().items()
        if name.endswith("1.attention.self.key.weight")
    }
    for model in (plain, ours):
        model.load_state_dict(changed, strict=False)
    assert at.key.packed.fused_qkv is None and at.query.packed.fused_qkv is fused_qkv
    torch.testing.assert_close(outputs(ours, batch)[0], outputs(plain, batch)[0], rtol=1e-4, atol=1e-5)


def test_attention_probabilities_of_one_product():
    plain, ours = frozen("ForTokenClassification")
    batch = encoders.batch(plain, "ForTokenClassification") | {"output_attentions": True}
    for model in (plain, ours):
        model.config._attn_implementation = "eager"
    for one, other in zip(outputs(plain, batch)[-1], outputs(ours, batch)[-1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", [fastgate.freeze, fastgate.thaw])
@pytest.mark.parametrize("model", ["x", None, 3, nn.Linear, {}], ids=str)
def test_what_is_no_model_is_one_error(call, model):
    with pytest.raises(
        fastgate.ArgumentError, match=rf"{call.__name__}: model: got .* wanted a torch.nn.Module"
    ):
        call(model)


def test_bfloat16_is_refused_where_the_processor_cannot_multiply_it(monkeypatch):
    monkeypatch.setattr(freezing, "ONEDNN_DTYPES", frozenset([torch.float32]))
    ours = fastgate.patch(encoders.make("Bert", "ForSequenceClassification")).to(torch.bfloat16)
    with pytest.raises(fastgate.Unsupported, match=r"torch.bfloat16 on cpu.*AVX512.*model.float\(\)"):
        fastgate.freeze(ours)
    fastgate.freeze(ours.float())
