"""Linears that are replaced, adapted, quantised, parametrised or hooked, at every place of a layer: called as
they are, with Hugging Face's outputs and gradients under the same replacement."""

import copy
import warnings

import pytest
import torch
from helpers.encoders import batch, make, output_rows
from torch import nn
from torch.nn.utils import parametrizations

import fastgate

PLACES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
HEADS = ("ForSequenceClassification", "ForTokenClassification")


class LoraLinear(nn.Linear):
    """An adapter as a subclass: the product and a low-rank one."""

    def __init__(self, base, rank=2):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.down = nn.Parameter(0.2 * torch.randn(rank, base.in_features))
        self.up = nn.Parameter(0.2 * torch.randn(base.out_features, rank))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class LoraWrapper(nn.Module):
    """An adapter around a Linear, which shows the weight and the bias of what is inside, as peft's does."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.adapter = base, nn.Linear(base.in_features, base.out_features, bias=False)
        nn.init.normal_(self.adapter.weight, std=0.1)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.adapter(x)


def without_bias(linear):
    bare = nn.Linear(linear.in_features, linear.out_features, bias=False)
    bare.weight = linear.weight
    return bare


def hooked(linear):
    linear.register_forward_hook(lambda module, args, out: 0.5 * out + 0.1)
    return linear


def prehooked(linear):
    linear.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))
    return linear


def watched(linear):
    """A hook on the gradient, which changes it."""
    linear.register_full_backward_hook(lambda module, inputs, outputs: (2.0 * inputs[0],))
    return linear


def watched_before(linear):
    linear.register_full_backward_pre_hook(lambda module, outputs: (2.0 * outputs[0],))
    return linear


def replaced_forward(linear):
    linear.forward = Doubled(linear)
    return linear


class Doubled:
    def __init__(self, linear):
        self.linear = linear

    def __call__(self, x):
        return 2.0 * nn.functional.linear(x, self.linear.weight, self.linear.bias)


def weight_normed(linear):
    parametrizations.weight_norm(linear)
    with torch.no_grad():
        linear.parametrizations.weight.original0.mul_(1.3)
    return linear


REPLACED = {
    "a subclass": LoraLinear,
    "a wrapper": LoraWrapper,
    "no bias": without_bias,
    "forward hook": hooked,
    "pre-hook": prehooked,
    "backward hook": watched,
    "backward pre-hook": watched_before,
    "forward replaced": replaced_forward,
    "weight norm": weight_normed,
    "spectral norm": parametrizations.spectral_norm,
}


def replace(model, place, change):
    for i, layer in enumerate(model.base_model.encoder.layer):
        torch.manual_seed(i)
        parent, _, name = place.rpartition(".")
        owner = layer.get_submodule(parent)
        setattr(owner, name, change(getattr(owner, name)))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", REPLACED)
def test_a_replaced_linear_is_honoured(what, place, head):
    model = replace(make("Bert", head), place, REPLACED[what])
    patched = fastgate.patch(copy.deepcopy(model))
    inputs = batch(model, head, labels=True)
    results = []
    for each in (model, patched):
        out = each(**inputs)
        out.loss.backward()
        results.append((out.logits.detach(), {n: p.grad for n, p in each.named_parameters()}))
    (want, wanted), (got, gradients) = results
    mask = inputs["attention_mask"]
    want, got = output_rows("logits", want, mask), output_rows("logits", got, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    noise = 1e-5 * sum(g.square().sum() for g in wanted.values() if g is not None).sqrt().item()
    for name, gradient in wanted.items():
        if gradient is not None:  # the keys' bias has noise for a gradient, which cancels in the softmax
            error = (gradients[name] - gradient).norm().item()
            assert error <= 1e-3 * gradient.norm().item() + noise, name
    noted = "called as" in str(fastgate.explain(patched))
    assert noted == (what != "no bias")


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_an_adapter_put_in_after_patching_is_honoured(place):
    model = make("Bert", "ForSequenceClassification")
    patched = fastgate.patch(copy.deepcopy(model))
    inputs = batch(model, "ForSequenceClassification")
    before = patched(**inputs).logits
    for each in (model, patched):
        replace(each, place, LoraLinear)
    want, got = model(**inputs).logits, patched(**inputs).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert not torch.allclose(got, before, atol=1e-3)


def quantised(model, places=PLACES):
    spec = {
        f"{name}.{place}": torch.ao.quantization.default_dynamic_qconfig
        for name, module in model.named_modules()
        if name.rpartition(".")[0].endswith("encoder.layer")
        for place in places
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, spec, dtype=torch.qint8)


@pytest.mark.parametrize("place", [*PLACES, "all"])
@torch.no_grad()
def test_quantised_linears_are_honoured(place):
    """Their scale is taken from all rows of the call: where these are the same, so is the output; on fewer
    rows the error is like Hugging Face's."""
    exact = make("Bert", "ForTokenClassification")
    model = quantised(copy.deepcopy(exact), PLACES if place == "all" else (place,))
    patched = fastgate.patch(copy.deepcopy(model))
    assert sum("quantized" in type(m).__module__ for m in patched.modules()) >= 3
    assert "called as" in str(fastgate.explain(patched))
    inputs = batch(exact, "ForTokenClassification", lengths=(14, 14, 14))
    torch.testing.assert_close(patched(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-3)
    inputs = batch(exact, "ForTokenClassification")
    mask = inputs["attention_mask"].bool()
    truth, want, got = (m(**inputs).logits[mask] for m in (exact, model, patched))
    assert 0 < (got - truth).norm() <= 2.0 * (want - truth).norm()


@torch.no_grad()
def test_a_quantised_model_is_pruned_and_absorbed_without_its_weights_being_read():
    exact = make("Bert", "ForSequenceClassification")
    model = quantised(copy.deepcopy(exact))
    patched = fastgate.patch(copy.deepcopy(model))
    inputs = batch(exact, "ForSequenceClassification")
    truth, want, got = (m(**inputs).logits for m in (exact, model, patched))
    assert 0 < (got - truth).norm() <= 2.0 * (want - truth).norm()
    assert "absorbed_attention" not in fastgate.explain(patched).layers[-1].steps
    fastgate.prune(patched, keep=[0])
    fastgate.prune(exact, keep=[0])
    got, truth = patched(**inputs).logits, exact(**inputs).logits
    assert (got - truth).norm() < 0.1 * truth.norm()
