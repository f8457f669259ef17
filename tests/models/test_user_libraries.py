"""What other libraries do to a model: PEFT's adapters, accelerate's offload, Linears without a gradient."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from helpers.encoders import batch, make
from helpers.user_modules import HEAD, plain, run
from torch import nn

import fastgate


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3", "LayerNorms", "prompt", "saved modules"])
def test_adapters_of_peft(kind, first):
    peft = pytest.importorskip("peft")
    configs = {
        "LoRA": lambda: peft.LoraConfig(target_modules=["query", "dense"], init_lora_weights=False),
        "DoRA": lambda: peft.LoraConfig(target_modules=["value"], use_dora=True, init_lora_weights=False),
        "IA3": lambda: peft.IA3Config(target_modules=["key"], feedforward_modules=[], init_ia3_weights=False),
        "LayerNorms": lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]),
        "prompt": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
        "saved modules": lambda: peft.LoraConfig(
            target_modules=["key"], modules_to_save=["LayerNorm", "word_embeddings"]
        ),
    }

    def adapted(model):
        torch.manual_seed(0)
        model = peft.get_peft_model(model, configs[kind]())
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
        return model

    ours = fastgate.patch(adapted(plain())) if first else adapted(fastgate.patch(plain()))
    theirs, results = adapted(plain()), []
    for model in (theirs, ours):
        logits = model(**batch(plain(), HEAD)).logits
        logits.square().sum().backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (want, wanted), (got, grads) = results
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        scale = max(float(wanted[name].norm()), 1e-2)
        assert float((grad - wanted[name]).norm()) <= 1e-3 * scale, name


class _NoGradient(torch.autograd.Function):
    """A product without a gradient of its input, as quantised Linears are."""

    @staticmethod
    def forward(ctx, x, module):
        return nn.Linear.forward(module, x)

    @staticmethod
    def backward(ctx, grad):
        return None, None


@pytest.mark.parametrize("keep", [None, [0]], ids=str)
@pytest.mark.parametrize("place", ["attention.output.dense", "output.dense", "attention.self.query"])
def test_modules_without_a_gradient(place, keep):
    theirs = make("Bert", "ForTokenClassification")
    ours = fastgate.patch(copy.deepcopy(theirs))
    if keep is not None:
        fastgate.prune(ours, keep=keep)
    inputs = batch(theirs, "ForTokenClassification")
    for model in (theirs, ours):
        for layer in model.bert.encoder.layer:
            for name, module in layer.named_modules():
                if name == place and isinstance(module, nn.Linear):
                    module.forward = functools.partial(lambda module, x: _NoGradient.apply(x, module), module)
        logits = model(**inputs).logits
        logits[inputs["attention_mask"].bool()].square().sum().backward()
    if keep is None:
        for (name, want), got in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            if want.grad is not None and "key.bias" not in name:
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_offload_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    want = run(plain())
    for first in (True, False):
        model = plain() if first else fastgate.patch(plain())
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        model = fastgate.patch(model) if first else model
        torch.testing.assert_close(run(model), want, rtol=1e-4, atol=1e-5)
        assert model.bert.encoder.layer[0].output.dense.weight.is_meta
    whole = fastgate.patch(plain())
    accelerate.hooks.add_hook_to_module(whole.bert.encoder.layer[1], accelerate.hooks.ModelHook())
    with pytest.raises(fastgate.Unsupported, match=r"layer.1.forward"):
        run(whole)
    accelerate.hooks.remove_hook_from_module(whole.bert.encoder.layer[1])
    torch.testing.assert_close(run(whole), want, rtol=1e-4, atol=1e-5)
    top = make("Bert", "Model")
    accelerate.hooks.add_hook_to_module(top, accelerate.hooks.ModelHook())
    with pytest.raises(fastgate.Unsupported, match=r"BertModel.forward"):
        fastgate.patch(top)
