"""Modules, weights and buffers that a user replaced, computes, or left without values."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.encoders import batch, make
from helpers.user_modules import (
    ACTIVATIONS,
    DROPOUTS,
    HEAD,
    LINEARS,
    NORMS,
    TABLES,
    WHEN,
    Doubled,
    assert_alike,
    at,
    pair,
    plain,
    run,
    spread,
    swap,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastgate


def set_to(name, value):
    return lambda module: setattr(module, name, value)


def weighty(make_module):
    """A module with weights of its own."""

    def with_new_weights(old):
        new = make_module(old)
        for parameter in new.parameters():
            nn.init.normal_(parameter, mean=1.0, std=0.2)
        return new

    return swap(with_new_weights)


def on(change):
    return lambda model, path: change(at(model, path))


MORE = {
    "eps": (NORMS, on(set_to("eps", 0.5))),
    "no weight": (NORMS, weighty(lambda m: nn.LayerNorm(32, elementwise_affine=False))),
    "no bias": (NORMS, weighty(lambda m: nn.LayerNorm(32, bias=False))),
    "another LayerNorm": (NORMS, weighty(lambda m: nn.LayerNorm(32, eps=1e-3))),
    "RMSNorm": (NORMS, weighty(lambda m: nn.RMSNorm(32))),
    "Identity": ((*NORMS, *DROPOUTS), swap(lambda m: nn.Identity())),
    "weights in place": ((*NORMS, *TABLES), on(lambda m: m.weight.data.add_(0.3))),
    "weights without a copy": (
        (*NORMS, *TABLES),
        on(lambda m: set_to("data", m.weight.data + 0.3)(m.weight)),
    ),
    "a Linear without bias": (
        LINEARS,
        weighty(lambda m: nn.Linear(m.in_features, m.out_features, bias=False)),
    ),
    "another activation": (ACTIVATIONS, swap(lambda m: nn.SiLU())),
    "tanh GELU": (ACTIVATIONS, swap(lambda m: nn.GELU(approximate="tanh"))),
    "a function": (ACTIVATIONS, swap(lambda m: torch.relu)),
    "max_norm": (TABLES, on(set_to("max_norm", 0.3))),
}
WEIGHTS = {
    "parametrised": ((*LINEARS, *NORMS, *TABLES), on(
        lambda m: parametrize.register_parametrization(m, "weight", Doubled()))),
    "weight_norm": (LINEARS, on(parametrizations.weight_norm)),
    "old weight_norm": (LINEARS, on(lambda m: nn.utils.weight_norm(m))),
    "spectral_norm": (LINEARS, on(lambda m: parametrizations.spectral_norm(m).eval())),
    "pruning mask": ((*LINEARS, *NORMS), on(lambda m: prune.l1_unstructured(m, "weight", amount=0.5))),
    "bias mask": ((*LINEARS, *NORMS), on(lambda m: prune.l1_unstructured(m, "bias", amount=0.5))),
}  # fmt: skip


def cases(table, when, count):
    """count: how many times of `when` each change of the table is made at, which take turns."""
    rows = [(path, change, how) for how, (paths, change) in table.items() for path in paths]
    return [
        pytest.param(time, path, change, id=f"{path}-{how}-{time}")
        for (path, change, how), time in spread(count, rows, when)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("when, path, change", cases(MORE, WHEN, 1))
def test_what_is_replaced_or_set(when, path, change):
    theirs, ours = pair(when, lambda model: change(model, path))
    assert_alike(theirs, ours, when)


@pytest.mark.slow
@pytest.mark.parametrize("when, path, change", cases(WEIGHTS, WHEN[:3], 1))
def test_weights_that_are_computed(when, path, change):
    def seeded(model):
        torch.manual_seed(1)
        change(model, path)

    theirs, ours = pair(when, seeded)
    assert_alike(theirs, ours, when)


class Int8(torch.Tensor):
    """A weight in 8 bits that F.linear knows, and detach, and nothing else."""

    @staticmethod
    def __new__(cls, q, scale):
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=torch.float32)

    def __init__(self, q, scale):
        self.q, self.scale = q, scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, w, bias = (*args, None)[:3]
            return func(x, w.q.float() * w.scale, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].q, args[0].scale)
        raise NotImplementedError(func)


def quantise(module):
    weight = module.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127
    q = Int8((weight / scale).round().to(torch.int8), scale)
    module.weight = nn.Parameter(q, requires_grad=False)


@pytest.mark.parametrize("when, path", spread(3, WHEN[:3], (*LINEARS, "all")))
def test_weights_of_a_tensor_subclass(when, path):
    def change(model):
        for name, module in model.bert.encoder.named_modules():
            if type(module) is nn.Linear and (path == "all" or name == path):
                quantise(module)

    theirs, ours = pair(when, change)
    assert_alike(theirs, ours, when)
    assert "called as" in str(fastgate.explain(ours))
    frozen = fastgate.freeze(ours)
    torch.testing.assert_close(run(frozen), run(theirs), rtol=1e-4, atol=1e-5)


def test_a_parameter_that_becomes_a_subclass_in_place():
    class Marked(nn.Parameter):
        pass

    model = fastgate.patch(plain())
    run(model)
    weight = model.bert.encoder.layer[0].output.dense.weight
    weight.__class__ = Marked
    assert_alike(plain(), model)
    assert "output.dense called as Linear" in " ".join(str(fastgate.explain(model)).split())


@pytest.mark.parametrize("path", ["layer.1.output.LayerNorm", "layer.0.attention.self.key", *TABLES])
@pytest.mark.parametrize("frozen", [False, True])
def test_weights_without_values_are_refused_by_name(path, frozen):
    model = fastgate.patch(plain())
    run(model)
    if frozen and "Norm" in path:
        fastgate.freeze(model)
    at(model, path).to("meta")
    with pytest.raises(fastgate.Unsupported, match=rf"{path}.weight.*meta"):
        run(model)


def test_weights_that_lose_their_values_in_place_are_refused_by_name():
    model = fastgate.patch(plain())
    run(model)
    weight = at(model, "layer.1.output.LayerNorm").weight
    torch.utils.swap_tensors(weight, nn.Parameter(torch.empty_like(weight, device="meta")))
    with pytest.raises(fastgate.Unsupported, match=r"layer.1.output.LayerNorm.weight.*meta"):
        run(model)


@pytest.mark.parametrize("path", [*LINEARS, "layer.3.attention.self.key"])
def test_a_frozen_linear_of_another_dtype_is_refused_or_read(path):
    want = run(plain())
    for dtype in (torch.bfloat16, torch.float64):
        model = fastgate.freeze(fastgate.patch(plain()))
        run(model)
        try:
            at(model, path).to(dtype)
            got = run(model)
        except fastgate.Unsupported:
            continue
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.05)


def test_an_empty_model_is_refused_by_name():
    with torch.device("meta"):
        model = make("Bert", HEAD)
    fastgate.patch(model)
    with pytest.raises(fastgate.Unsupported, match=r"BertModel.embeddings.*meta"):
        model(torch.ones(1, 4, dtype=torch.long))


@torch.no_grad()
def test_a_buffer_filled_in_place_is_seen():
    theirs = make("Bert", "ForSequenceClassification")
    ours = fastgate.patch(copy.deepcopy(theirs))
    inputs = {k: v for k, v in batch(theirs, "ForSequenceClassification").items() if k != "token_type_ids"}
    for value in (0, 1, 0):
        for model in (theirs, ours):
            model.bert.embeddings.token_type_ids.fill_(value)
        torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
@pytest.mark.parametrize("order", ["before", "after"])
@torch.no_grad()
def test_buffers_of_the_embeddings(name, order, tmp_path):
    theirs = make("Bert", "ForSequenceClassification")
    ours = copy.deepcopy(theirs)
    inputs = {k: v for k, v in batch(theirs, "ForSequenceClassification").items() if k != "token_type_ids"}
    if order == "after":
        fastgate.patch(ours)(**inputs)
    for model in (theirs, ours):
        embeddings = model.bert.embeddings
        changed = (
            embeddings.position_ids.flip(1) if name == "position_ids" else torch.ones(1, 40, dtype=torch.long)
        )
        setattr(embeddings, name, changed)
    fastgate.patch(ours)
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=0, atol=1e-5)
    with pytest.raises(fastgate.Unsupported, match=rf"save: bert.embeddings.{name}: got other values"):
        fastgate.save(ours, tmp_path / "x")
