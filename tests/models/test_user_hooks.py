"""Hooks, replaced forwards, subclasses and wrappers of a user: they run as in transformers, or it says no."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from helpers.encoders import batch, make, without_attention
from helpers.user_modules import (
    ACTIVATIONS,
    DROPOUTS,
    HEAD,
    KEPT,
    LAYERS,
    LINEARS,
    NORMS,
    TABLES,
    WHEN,
    Doubled,
    assert_alike,
    at,
    pair,
    place,
    plain,
    run,
    spread,
)
from torch import nn
from torch.nn.utils import parametrize

import fastgate

CALLED = (*NORMS, *DROPOUTS, *LINEARS, *TABLES, *ACTIVATIONS, "embeddings", "layer.1.intermediate")
PARTS = ("", ".attention", ".attention.self", ".attention.output", ".output")
NEVER_CALLED = (
    "encoder",
    *(f"layer.0{part}" for part in PARTS),
    "layer.1.attention.output",
    "layer.1.output",
)


def scaled(out):
    """Each channel by another factor: a LayerNorm behind does not take that out."""
    return out * torch.linspace(0.7, 1.3, out.shape[-1])


class Wrapped(nn.Module):
    """Calls what it wraps, and shows its attributes as adapters do."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.tensor(1.3))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args, **kwargs):
        return scaled(self.inner(*args, **kwargs)) * self.scale


def subclass(module):
    """The same module, of a subclass that scales."""

    def forward(self, *args, **kwargs):
        return scaled(super(kind, self).forward(*args, **kwargs))

    kind = type(f"Scaled{type(module).__name__}", (type(module),), {"forward": forward})
    module.__class__ = kind


def replace_forward(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: scaled(forward(*args, **kwargs))


def partial_forward(module):
    def scale(forward, *args, **kwargs):
        return scaled(forward(*args, **kwargs))

    module.forward = functools.partial(scale, module.forward)


CHANGES = {
    "hook": lambda m: m.register_forward_hook(lambda module, args, out: scaled(out)),
    "hook with kwargs": lambda m: m.register_forward_hook(
        lambda module, args, kwargs, out: scaled(out), with_kwargs=True
    ),
    "replaced forward": replace_forward,
    "partial forward": partial_forward,
    "subclass": subclass,
}
WRAP = "wrapped"


def apply(model, path, how):
    if how == WRAP:
        parent, name = place(model, path)
        setattr(parent, name, Wrapped(getattr(parent, name)))
    else:
        CHANGES[how](at(model, path))


@pytest.mark.slow
@pytest.mark.parametrize("when, path, how", spread(1, WHEN, CALLED, (*CHANGES, WRAP)))
def test_what_is_called(when, path, how):
    if path.endswith("intermediate") and how in ("subclass", WRAP):
        pytest.skip("refused, see below")
    theirs, ours = pair(when, lambda model: apply(model, path, how))
    unchanged = run(plain()) if "prune" not in when else run(without_attention(plain(), [1, 3]))
    assert (run(theirs) - unchanged).abs().max() > 1e-4
    assert_alike(theirs, ours, when)


HOOKS = ("pre hook", "backward hook", "backward pre hook")


@pytest.mark.slow
@pytest.mark.parametrize(
    "when, path, how",
    spread(2, ("before patch", "after patch", "pruned and frozen"), NEVER_CALLED, (*CHANGES, WRAP, *HOOKS)),
)
def test_what_is_never_called_is_refused_by_name(when, path, how):
    changes = {
        "pre hook": lambda m: m.register_forward_pre_hook(lambda module, args: None),
        "backward hook": lambda m: m.register_full_backward_hook(lambda module, grads, out: None),
        "backward pre hook": lambda m: m.register_full_backward_pre_hook(lambda module, grads: None),
    }
    name = path if path == "encoder" else f"encoder.{path}"

    def change(model):
        changes[how](at(model, path)) if how in changes else apply(model, path, how)

    with pytest.raises(fastgate.Unsupported, match=rf"BertModel.{name}.*unpatch"):
        run(pair(when, change)[1])


@pytest.mark.parametrize("path", ["attention.self", "attention.output.dense", "attention.output.dropout"])
def test_hooks_on_a_pruned_attention_are_refused(path):
    model = fastgate.prune(plain(), KEPT, replacement="affine")
    handle = at(model, f"layer.1.{path}").register_forward_hook(lambda *_: None)
    with pytest.raises(fastgate.Unsupported, match=rf"hook on BertModel.encoder.layer.1.{path}"):
        run(model)
    handle.remove()
    run(model)
    at(model, "layer.1.attention.replacement").register_forward_hook(lambda *_: None)
    with pytest.raises(fastgate.Unsupported, match=r"layer.1.attention.replacement"):
        run(model)
    model = fastgate.prune(plain(), KEPT, replacement="affine")
    parametrize.register_parametrization(at(model, "layer.1.attention.replacement"), "scale", Doubled())
    with pytest.raises(fastgate.Unsupported, match=r"layer.1.attention.replacement.*Parametrized"):
        run(model)


def test_an_inspected_model_goes_when_it_is_let_go():
    model = fastgate.patch(plain())
    run(model)
    weight = weakref.ref(model.bert.encoder.layer[0].output.dense.weight)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, kind", spread(1, (*NORMS, *DROPOUTS, *LINEARS, "layer.1.intermediate"), ("full", "pre"))
)
def test_backward_hooks_of_modules_that_are_called(path, kind):
    """A hook that doubles a gradient doubles it."""

    def change(model):
        module = at(model, path)
        if kind == "full":
            module.register_full_backward_hook(lambda module, grads, out: tuple(2 * g for g in grads))
        else:
            module.register_full_backward_pre_hook(lambda module, grads: tuple(2 * g for g in grads))

    for when in ("before patch", "after patch"):
        assert_alike(*pair(when, change))


@pytest.mark.parametrize("path", [*LINEARS, "layer.1.output.LayerNorm", "layer.1.output.dropout"])
def test_a_hook_inside_a_layer_sees_unpadded_rows(path):
    model, seen = fastgate.patch(make("Bert", "ForTokenClassification", layers=LAYERS)), []
    at(model, path).register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    inputs = batch(model, "ForTokenClassification")
    with torch.no_grad():
        model(**inputs)
    ((rows, out),) = seen
    assert rows.shape[0] == out.shape[0] == int(inputs["attention_mask"].sum()) and rows.dim() == 2


def test_hooks_on_model_head_and_pooler_run_as_ever():
    def change(model):
        for module in (model.bert, model.bert.pooler):
            module.register_forward_pre_hook(lambda module, args: None)
        model.bert.register_forward_hook(
            lambda module, args, out: type(out)(**{k: 1.3 * v for k, v in out.items() if v is not None})
        )
        model.bert.pooler.dense.register_forward_hook(lambda module, args, out: out + 0.1)
        model.bert.pooler.register_full_backward_hook(lambda module, grads, out: tuple(2 * g for g in grads))
        model.classifier.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "token_type_ids": None}), with_kwargs=True
        )

    for when in WHEN:
        assert_alike(*pair(when, change), when)


def test_hooks_of_all_modules_are_refused():
    model, ran = fastgate.patch(plain()), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(fastgate.Unsupported, match=r"all modules.*unpatch"):
            run(model)
    finally:
        handle.remove()
    run(model)


def test_a_forward_replaced_on_the_class(monkeypatch):
    theirs, ours = plain(), fastgate.patch(plain())
    run(ours)
    forward = nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: 1.3 * forward(self, x))
    assert_alike(theirs, ours)
    monkeypatch.undo()
    assert_alike(theirs, ours)
    kind = type(theirs.bert.encoder.layer[0].attention.self)
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: None)
    with pytest.raises(fastgate.Unsupported, match=r"attention.self.forward"):
        run(ours)


def test_a_change_is_seen_and_its_removal_too():
    theirs, ours = plain(), fastgate.patch(plain())
    for path in (*NORMS, *DROPOUTS, *LINEARS):
        for how in ("hook", "replaced forward"):
            handles = [CHANGES[how](at(model, path)) for model in (theirs, ours)]
            torch.testing.assert_close(run(ours), run(theirs), rtol=1e-4, atol=1e-5)
            for model, handle in zip((theirs, ours), handles, strict=True):
                handle.remove() if handle else delattr(at(model, path), "forward")
            torch.testing.assert_close(run(ours), run(theirs), rtol=1e-4, atol=1e-5)


def test_a_modules_own_forward_set_on_it_changes_nothing():
    """accelerate leaves it behind when it takes its hooks away."""
    model = plain()
    for module in model.bert.encoder.modules():
        if not isinstance(module, nn.ModuleList):
            module.forward = module.forward
    fastgate.patch(model)
    assert_alike(plain(), model)
    assert "called as" not in str(fastgate.explain(model))


def test_capture_hooks_of_transformers_are_no_hooks(monkeypatch):
    """They stay in a model that returned hidden states once; they are known by where they come from."""
    model = plain()
    model(**batch(model, HEAD), output_hidden_states=True, output_attentions=False)
    hooks = [h for m in model.modules() for h in m._forward_hooks.values()]
    assert len(hooks) >= LAYERS
    for hook in hooks:
        hook.__qualname__ = "another.name"
    fastgate.freeze(fastgate.patch(model))
    assert_alike(plain(), model, "frozen")
    cache = model.bert.fastgate_runtime.executor.plans
    (compiled,) = cache.plans
    run(model)
    assert compiled.is_cached and cache.plans == [compiled]
