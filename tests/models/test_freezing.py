"""freeze and thaw: packed weights compute what plain ones do, cannot go stale, and are given back."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import warnings
import weakref
from unittest import mock

import pytest
import torch
from helpers import encoders
from torch import nn

import fastgate
from fastgate.models.handle import get_encoder
from fastgate.nn.packed_linear import PackedLinear
from fastgate.ops import backends, fused_layers
from fastgate.ops.linear import Packed
from fastgate.runtime.layer import is_plain

HEADS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")


def frozen(head="ForSequenceClassification", keep=None, dtype=torch.float32, family="Bert"):
    model = fastgate.patch(encoders.make(family, head).to(dtype))
    if keep is not None:
        fastgate.prune(model, keep=keep)
    return model, fastgate.freeze(copy.deepcopy(model))


def packed(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def outputs(model, batch):
    with torch.inference_mode():
        return model(**batch).to_tuple()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
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


def test_the_state_dict_is_the_plain_models():
    plain, ours = frozen("ForTokenClassification")
    one, other = plain.state_dict(), ours.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_new_weights_are_packed_anew():
    plain, ours = frozen()
    batch = encoders.batch(plain, "ForSequenceClassification")
    before = outputs(ours, batch)[0]
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.1)
    ours.load_state_dict(plain.state_dict())
    assert not torch.allclose(outputs(ours, batch)[0], before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outputs(ours, batch)[0], outputs(plain, batch)[0], rtol=1e-4, atol=1e-5)


def test_a_state_dict_that_does_not_fit_is_refused():
    _, ours = frozen("ForTokenClassification")
    whole = ours.state_dict()
    short = {name: value for name, value in whole.items() if name != "classifier.weight"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"classifier.weight"'):
        ours.load_state_dict(short)
    with pytest.raises(RuntimeError, match=r"size mismatch for classifier.weight"):
        ours.load_state_dict({**whole, "classifier.weight": torch.zeros(2, 2)})
    assert not ours.load_state_dict(short, strict=False).unexpected_keys


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_frozen_and_apart(way):
    plain, ours = frozen()
    batch = encoders.batch(plain, "ForSequenceClassification")
    other = way(ours)
    assert len(packed(other)) == len(packed(ours)) > 0
    assert torch.equal(outputs(other, batch)[0], outputs(ours, batch)[0])
    other.load_state_dict({name: torch.zeros_like(t) for name, t in other.state_dict().items()})
    torch.testing.assert_close(outputs(ours, batch)[0], outputs(plain, batch)[0], rtol=1e-4, atol=1e-5)


def test_another_dtype_is_packed_anew():
    plain, ours = frozen()
    ours.to(torch.bfloat16)
    assert {module.packed.dtype for module in packed(ours)} == {torch.bfloat16}
    batch = encoders.batch(plain, "ForSequenceClassification")
    want = outputs(plain.to(torch.bfloat16), batch)[0]
    torch.testing.assert_close(outputs(ours, batch)[0], want, rtol=0.05, atol=0.05)


def test_save_and_load(tmp_path):
    plain, ours = frozen(keep=[1])
    fastgate.save(ours, tmp_path / "saved")
    batch = encoders.batch(plain, "ForSequenceClassification")
    loaded = fastgate.load(tmp_path / "saved")
    assert not packed(loaded)
    torch.testing.assert_close(outputs(loaded, batch)[0], outputs(plain, batch)[0])


@pytest.mark.parametrize("keep", [None, [1]], ids=str)
def test_thaw_gives_the_linears_back(keep):
    plain, ours = frozen(keep=keep)
    state = torch.get_rng_state()
    assert fastgate.thaw(ours) is ours
    assert torch.equal(state, torch.get_rng_state())
    assert not packed(ours) and all(p.requires_grad for p in ours.parameters())
    for (name, one), (_, other) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    batch = encoders.batch(plain, "ForSequenceClassification", labels=True)
    ours(**batch).loss.backward()
    assert fastgate.thaw(plain) is plain


def test_unpatch_thaws_too():
    _, ours = frozen()
    fastgate.unpatch(ours)
    assert not packed(ours) and not hasattr(ours.bert, "fastgate_runtime")


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


CHANGES = {
    "nothing": lambda model: model,
    "frozen twice": fastgate.freeze,
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "run": lambda model: (model(**encoders.batch(model, "ForTokenClassification")), model)[1],
    "another dtype": lambda model: model.to(torch.bfloat16),
    "loaded": lambda model: (model.load_state_dict(model.state_dict()), model)[1],
}


@pytest.mark.parametrize("back", [fastgate.thaw, fastgate.unpatch], ids=["thaw", "unpatch"])
@pytest.mark.parametrize("change", CHANGES)
def test_requires_grad_stays_as_it_was(change, back):
    model = fastgate.patch(encoders.make("Bert", "ForTokenClassification"))
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    fastgate.freeze(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()}.items() <= before.items()
    model = back(CHANGES[change](model))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_an_optimizer_made_before_freeze_trains_after_thaw():
    """Modules and parameters are the ones they were, in their order."""
    model = fastgate.patch(encoders.make("Bert", "ForSequenceClassification"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    fastgate.thaw(fastgate.freeze(model))
    for before, after in ((modules, model.named_modules()), (parameters, model.named_parameters())):
        for (name, one), (same, other) in zip(before, after, strict=True):
            assert name == same and one is other
    batch = encoders.batch(model, "ForSequenceClassification", labels=True)
    first = model(**batch).loss
    first.backward()
    optimizer.step()
    assert model(**batch).loss < first


def test_a_parameter_that_is_held_has_what_the_frozen_model_had():
    plain, ours = frozen("ForTokenClassification")
    fastgate.thaw(ours)
    held = dict(ours.named_parameters())
    fastgate.freeze(ours)
    new = {name: t + 1 for name, t in plain.state_dict().items()}
    ours.load_state_dict(new)
    fastgate.thaw(ours)
    for name, parameter in ours.named_parameters():
        assert parameter is held[name] and torch.equal(parameter, new[name])
    fastgate.freeze(ours.to(torch.bfloat16))
    assert {p.dtype for p in fastgate.thaw(ours.float()).parameters()} == {torch.float32}


def test_a_change_of_a_held_parameter_is_kept_and_said():
    plain = fastgate.patch(encoders.make("Bert", "ForSequenceClassification"))
    held = plain.bert.encoder.layer[1].output.dense.weight
    fastgate.freeze(plain)
    with torch.no_grad():
        held.add_(1.0)
    want = held.clone()
    with pytest.warns(RuntimeWarning, match=r"thaw: bert\.encoder\.layer\.1\.output\.dense\.weight changed"):
        fastgate.thaw(plain)
    weight = plain.bert.encoder.layer[1].output.dense.weight
    assert weight is held and torch.equal(weight, want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastgate.thaw(fastgate.freeze(plain))
    fastgate.freeze(plain)
    new = {name: t * 2 for name, t in plain.state_dict().items()}
    with torch.no_grad():
        held.add_(1.0)
    plain.load_state_dict(new)
    with pytest.warns(RuntimeWarning, match="changed while"):
        fastgate.thaw(plain)
    assert torch.equal(held, new["bert.encoder.layer.1.output.dense.weight"])


def test_weights_are_freed_that_nobody_holds():
    plain, _ = frozen("ForTokenClassification")
    weight = weakref.ref(plain.classifier.weight)
    fastgate.freeze(plain)
    gc.collect()
    assert weight() is None


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


def test_assigned_weights_have_the_dtype_they_come_in():
    plain, ours = frozen("ForTokenClassification")
    state = {name: t.to(torch.bfloat16) for name, t in plain.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    assert {module.packed.dtype for module in packed(ours)} == {torch.bfloat16}
    fastgate.thaw(ours)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert all(torch.equal(t, state[name]) for name, t in ours.state_dict().items())


def test_moves_that_change_nothing_leave_the_packed_weights():
    """Query, key and value are one product still."""
    _, ours = frozen("ForTokenClassification")
    before = [module.packed for module in packed(ours)]
    ours.to("cpu").float().share_memory()
    assert all(module.packed is one for module, one in zip(packed(ours), before, strict=True))
    if before[0].in_panels:
        assert all(one.data.is_shared() for one in before)


def test_a_frozen_model_in_a_file(tmp_path):
    plain, ours = frozen()
    torch.save(ours, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    batch = encoders.batch(plain, "ForSequenceClassification")
    assert torch.equal(outputs(loaded, batch)[0], outputs(ours, batch)[0])
    fastgate.thaw(loaded)
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in loaded.state_dict().items())


def test_panels_are_packed_anew_for_a_processor_without_them():
    _, ours = frozen("ForTokenClassification")
    state = pickle.dumps(ours)
    with mock.patch.object(importlib.import_module("fastgate.ops.linear"), "interleaving", return_value=0):
        unpickled = pickle.loads(state)
        assert not any(module.packed.in_panels for module in packed(unpickled))
        again = pickle.dumps(unpickled)
    back = pickle.loads(again)
    for model in (unpickled, back):
        assert all(torch.equal(t, ours.state_dict()[name]) for name, t in model.state_dict().items())


def answer(models, batch, queue):
    queue.put({name: outputs(model, batch)[0].numpy() for name, model in models.items()})


def sent():
    """Models by name, plain, pruned and frozen, in both layouts of packed weights."""
    models = {}
    for keep in (None, [1]):
        for layout in ("plain", "panels", "onednn"):
            model = fastgate.patch(encoders.make("Bert", "ForSequenceClassification"))
            if keep is not None:
                fastgate.prune(model, keep=keep, replacement="shift")
            if layout == "panels":
                fastgate.freeze(model)
            if layout == "onednn":
                with mock.patch.object(
                    importlib.import_module("fastgate.ops.linear"), "interleaving", return_value=0
                ):
                    fastgate.freeze(model)
            models[f"{layout}, {keep}"] = model
    return models


@pytest.mark.slow
@pytest.mark.parametrize("strategy", sorted(torch.multiprocessing.get_all_sharing_strategies()))
def test_models_go_to_a_spawned_process(strategy):
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(strategy)
    try:
        models = sent()
        batch = encoders.batch(models["plain, None"], "ForSequenceClassification")
        want = {name: outputs(model, batch)[0] for name, model in models.items()}
        context = torch.multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        process = context.Process(target=answer, args=(models, batch, queue))
        process.start()
        got = queue.get()
        process.join(60)
        assert process.exitcode == 0
        for name, logits in want.items():
            torch.testing.assert_close(torch.from_numpy(got[name]), logits, rtol=1e-5, atol=1e-5)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


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


def test_a_weight_set_on_a_frozen_linear_is_refused():
    """Nobody would read it."""
    plain, model = frozen()
    dense = model.bert.encoder.layer[0].output.dense
    weight = torch.zeros(32, 64)
    for value in (weight, nn.Parameter(weight)):
        with pytest.raises(fastgate.Unsupported, match=r"frozen Linear.*fastgate.thaw"):
            dense.weight = value
    with pytest.raises(fastgate.Unsupported, match=r"frozen Linear.*fastgate.thaw"):
        dense.register_parameter("weight", nn.Parameter(weight))
    batch = encoders.batch(plain, "ForSequenceClassification")
    parameters = {name: p.detach() * 1.1 for name, p in plain.named_parameters()}
    with pytest.raises(fastgate.Unsupported, match=r"frozen Linear.*fastgate.thaw"):
        torch.func.functional_call(model, parameters, (), batch)
    torch.testing.assert_close(outputs(model, batch), outputs(plain, batch), rtol=0, atol=1e-5)


def test_asking_for_a_frozen_weight_says_what_to_do():
    dense = frozen()[1].bert.encoder.layer[0].output.dense
    assert not hasattr(dense, "weight") and getattr(dense, "weight", None) is None
    with pytest.raises(fastgate.Unsupported, match=r"Linear.weight: got a packed weight.*fastgate.thaw"):
        _ = dense.weight.shape
    with pytest.raises(AttributeError, match="has no attribute 'gain'"):
        _ = dense.gain


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("how", ["model", "each"])
@pytest.mark.parametrize("held", [False, True])
def test_requires_grad_set_while_frozen_holds_after_thaw(flag, how, held):
    model = fastgate.patch(encoders.make("Bert", "ForSequenceClassification")).requires_grad_(not flag)
    parameters = list(model.parameters()) if held else []
    fastgate.freeze(model)
    if how == "model":
        model.requires_grad_(flag)
    else:
        for parameter in model.parameters():
            parameter.requires_grad = flag
    assert model(**encoders.batch(model, "ForSequenceClassification")).logits.requires_grad is flag
    fastgate.thaw(model)
    assert {p.requires_grad for p in model.parameters()} == {flag}
    assert not held or all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize("move", ["half", "double", "meta"])
def test_a_move_that_is_refused_moves_nothing(move):
    plain, model = frozen()
    batch = encoders.batch(plain, "ForSequenceClassification")
    want = outputs(model, batch)
    with pytest.raises(fastgate.Unsupported, match=r"fastgate.thaw"):
        model.to("meta") if move == "meta" else getattr(model, move)()
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, batch), want, strict=True))
