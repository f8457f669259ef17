"""Modules that the user changed: what they do in transformers they do in a patched model, or it says no."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import sys
import weakref

import pytest
import torch
from helpers.encoders import batch, draw_replacements, make, without_attention
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

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
CALLED = (*NORMS, *DROPOUTS, *LINEARS, *TABLES, *ACTIVATIONS, "embeddings", "layer.1.intermediate")
PARTS = ("", ".attention", ".attention.self", ".attention.output", ".output")
NEVER_CALLED = (
    "encoder",
    *(f"layer.0{part}" for part in PARTS),
    "layer.1.attention.output",
    "layer.1.output",
)
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


def spread(count, *tables):
    """Every combination of the first tables, each with `count` of the last table's, which take turns."""
    *first, last = tables
    combinations = list(itertools.product(*first))
    turns = itertools.cycle(last)
    return [(*combination, next(turns)) for combination in combinations for _ in range(count)]


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


def set_to(name, value):
    return lambda module: setattr(module, name, value)


def swap(make_module):
    def change(model, path):
        parent, name = place(model, path)
        torch.manual_seed(3)
        new = make_module(getattr(parent, name))
        if not isinstance(new, nn.Module):
            delattr(parent, name)
        setattr(parent, name, new)

    return change


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


class Doubled(nn.Module):
    def forward(self, weight):
        return 2.0 * weight


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


@pytest.mark.parametrize("path", DROPOUTS)
@pytest.mark.parametrize("when", ["before patch", "after patch"])
def test_another_dropout_is_called_in_training(when, path):
    class Ones(nn.Module):
        """Drops the second half of the channels, whatever it is told."""

        def forward(self, x):
            assert self.training
            return torch.cat((x[..., :16], 0.0 * x[..., 16:]), -1)

    theirs, ours = pair(when, lambda model: swap(lambda m: Ones())(model, path))
    off = {"p": 0.0}
    for model in (theirs, ours):
        model.train()
        for module in model.modules():
            module.__dict__.update(off if isinstance(module, nn.Dropout) else {})
    logits = [model(**batch(model, HEAD)).logits for model in (theirs, ours)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", [*DROPOUTS, "layer.0.attention.self.dropout"])
def test_a_dropout_of_one_drops_everything(path):
    model = fastgate.patch(plain(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    theirs = plain(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for each in (theirs, model):
        at(each, path).p = 1.0
        each.train()
    if "self" in path:
        with pytest.raises(fastgate.FastgateError, match="dropout_p"):
            run(model)
    else:
        torch.testing.assert_close(run(model), run(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["layer.0.attention.self", "layer.0.attention.self.dropout", *DROPOUTS])
@pytest.mark.parametrize("frozen", [False, True])
def test_training_of_one_module_only(path, frozen):
    """Attention drops when it trains itself; its Dropout is never called and its mode says nothing."""
    model, theirs = fastgate.patch(plain()), plain()
    if frozen:
        fastgate.freeze(model)
    drops = []
    for each in (theirs, model):
        want = run(each)
        at(each, path).training = True
        torch.manual_seed(0)
        drops.append(bool((run(each) - want).abs().max() > 1e-5))
    assert drops[0] == drops[1] == (path != "layer.0.attention.self.dropout")


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
    assert "output.dense called as Linear" in str(fastgate.explain(model))


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


def test_soft_gates_with_modules_that_are_called():
    """With the gate at 1 nothing of the replacement is left, at 0 nothing of the attention."""
    from fastgate.models.handle import get_encoder

    inputs = batch(plain(), HEAD)
    for kind in ("affine", "shift"):
        called, fused = fastgate.patch(plain()), fastgate.patch(plain())
        for model in (called, fused):
            handle = get_encoder(model)
            handle.add_replacements(kind)
            draw_replacements(model)
            handle.set_gates([torch.tensor(0.3), 0.0, torch.tensor(0.8), 0.0])
        for path in (*NORMS[1:], *DROPOUTS[1:]):
            parent, name = place(called, path)
            setattr(parent, name, nn.Sequential(getattr(parent, name)))
        for model in (called, fused):
            model(**inputs).logits.square().sum().backward()
        torch.testing.assert_close(run(called), run(fused), rtol=1e-4, atol=1e-5)
        grads = [
            {n.replace(".0.weight", ".weight").replace(".0.bias", ".bias"): p.grad
             for n, p in model.named_parameters() if "LayerNorm" in n or "replacement" in n}
            for model in (called, fused)
        ]  # fmt: skip
        assert grads[0].keys() == grads[1].keys()
        for name, want in grads[1].items():
            torch.testing.assert_close(grads[0][name], want, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("replacement", ["zero", "mean", "affine", "shift"])
@pytest.mark.parametrize("head", [HEAD, "ForTokenClassification"])
def test_chains_with_a_norm_that_is_called(replacement, head):
    """Where one of two norms in a chain is called, the other one still is what it was."""
    fused = draw_replacements(fastgate.prune(make("Bert", head, layers=LAYERS), [0], replacement))
    inputs = batch(fused, head)
    with torch.no_grad():
        want = fused(**inputs).logits
        for path in (
            "layer.1.attention.output.LayerNorm",
            "layer.0.output.LayerNorm",
            "layer.3.output.LayerNorm",
        ):
            for frozen in (False, True):
                model = copy.deepcopy(fused)
                model = fastgate.freeze(model) if frozen else model
                at(model, path).register_forward_hook(lambda module, args, out: out.clone())
                torch.testing.assert_close(model(**inputs).logits, want, rtol=1e-4, atol=1e-5)


def test_a_wrapped_norm_can_be_pruned():
    class Bare(nn.Module):
        """No attribute of a LayerNorm."""

        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(32))

        def forward(self, x):
            return nn.functional.layer_norm(x, (32,)) * self.gain

    for replacement in ("zero", "affine", "shift"):
        theirs, ours = plain(), plain()
        for model in (theirs, ours):
            model.bert.encoder.layer[1].attention.output.LayerNorm = Bare()
        fastgate.prune(ours, KEPT, replacement)
        assert_alike(without_attention(theirs, [1, 3]), ours, "after prune")
        assert ours.bert.encoder.layer[1].attention.output.LayerNorm.gain.grad.abs().max() > 0


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
