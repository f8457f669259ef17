"""The layers of a frozen encoder in one call: which run so, and that they compute what their steps do."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
from helpers import encoders
from helpers.executed_steps import Ops
from torch import nn

import fastgate
from fastgate.models.handle import get_encoder
from fastgate.ops import backends, fused_layers, registry

pytestmark = pytest.mark.skipif(backends.load_cpu_library() != "", reason=backends.load_cpu_library())
LAYERS = 5


DTYPES = [torch.float32] + ([torch.bfloat16] if torch.ops.fastgate_cpu.packs_bfloat16() else [])


def frozen(head="ForSequenceClassification", keep=None, dtype=torch.float32, **options):
    model = fastgate.patch(encoders.make("Bert", head, layers=LAYERS).to(dtype))
    if keep is not None:
        fastgate.prune(model, keep=keep, **options)
    return fastgate.freeze(model)


def logits(model, head, steps=False, **changes):
    """steps: one after another."""
    batch = encoders.batch(model, head) | changes
    with torch.inference_mode():
        if not steps:
            return model(**batch).logits
        with mock.patch.object(fused_layers, "runs", return_value=False):
            return model(**batch).logits


def calls(model, head):
    """The compiled ops of the encoder in the order they run, and every op at all."""
    with torch.inference_mode(), Ops() as mode:
        model(**encoders.batch(model, head))
    seen = [name for name, _ in mode.seen]
    ran = [name.split(".")[1] for name in seen if name.startswith("fastgate_cpu.")]
    return [name for name in ran if name in ("fused_layers", "packed_linear")], seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("replacement", ["zero", "shift"])
@pytest.mark.parametrize("keep", [[0, 1, 2, 3, 4], [0, 2], [4], []], ids=str)
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_all_layers_are_one_call(head, keep, replacement, dtype):
    ran, seen = calls(frozen(head, keep, dtype, replacement=replacement), head)
    assert ran[0] == "fused_layers"
    if replacement == "shift" and head == "ForSequenceClassification" and keep == [0, 2]:
        # With shifts above it the last attention is neither absorbed nor of all rows: it runs by its steps.
        assert ran.count("fused_layers") == 2
        return
    assert set(ran[1:]) == {"packed_linear"}  # the head's
    assert not any("norm" in name.removesuffix("embed_norm.default") or "attention" in name for name in seen)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("replacement", encoders.VECTORS)
@pytest.mark.parametrize("keep", [None, [0, 1, 2, 3, 4], [0, 2], [4], []], ids=str)
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_it_computes_what_the_steps_compute(head, keep, replacement, dtype):
    model = frozen(head, keep, dtype, **({} if keep is None else {"replacement": replacement}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "replacement" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    bound = 1e-5 if dtype == torch.float32 else 0.03
    ours, steps = logits(model, head), logits(model, head, steps=True)
    torch.testing.assert_close(ours, steps, rtol=bound, atol=bound)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "keep, replacement", [([0, 2], "shift"), ([0, 2, 4], "shift"), ([0, 4], "zero"), ([], "zero")]
)
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("lengths", [(32, 20, 31, 18, 1, 20, 39, 38), (3,) * 70], ids=["some", "many"])
def test_threads_share_a_batch_without_a_trace(head, keep, replacement, dtype, lengths):
    model = encoders.draw_replacements(frozen(head, keep, dtype, replacement=replacement))
    batch, found = encoders.batch(model, head, lengths=lengths), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(logits(model, head, **batch))
    assert torch.equal(*found)


def test_a_shift_to_fewer_rows_runs_by_itself():
    head = "ForTokenClassification"
    model = frozen(head, [0, 1], replacement="shift")
    batch = encoders.batch(model, head)
    some = batch["attention_mask"].bool() & (torch.arange(batch["attention_mask"].shape[1]) % 3 == 1)
    with torch.inference_mode(), Ops() as mode:
        got = model(**batch, rows=some).logits
    ran = [name for name, _ in mode.seen if "fused_layers" in name or "shift_norm" in name]
    assert [name.split(".")[1] for name in ran] == ["fused_layers", "shift_norm", "fused_layers"]
    torch.testing.assert_close(got[some], logits(model, head)[some], rtol=1e-5, atol=1e-5)


def test_a_sequence_without_attended_tokens():
    head = "ForSequenceClassification"
    model = frozen(head)
    mask = encoders.batch(model, head)["attention_mask"].clone()
    mask[1] = 0
    ours = logits(model, head, attention_mask=mask)
    torch.testing.assert_close(ours, logits(model, head, True, attention_mask=mask), rtol=1e-5, atol=1e-5)


def replace(parent, name):
    old = getattr(parent, name)
    linear = nn.Linear(old.in_features, old.out_features).requires_grad_(False).eval()
    setattr(parent, name, linear)


def hook(parent, name):
    getattr(parent, name).register_forward_hook(lambda module, args, output: output * 1.5)


@pytest.mark.parametrize("change", [replace, hook])
@pytest.mark.parametrize(
    "path",
    [
        "attention.self.query",
        "attention.self.key",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ],
)
@pytest.mark.parametrize("layer", [1, LAYERS - 1])
def test_what_is_replaced_or_hooked_is_honoured(layer, path, change):
    head = "ForSequenceClassification"
    model = frozen(head)
    before = logits(model, head)
    *way, name = path.split(".")
    parent = model.bert.encoder.layer[layer].get_submodule(".".join(way))
    torch.manual_seed(1)
    change(parent, name)
    after = logits(model, head)
    torch.testing.assert_close(after, logits(model, head, steps=True), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-4)


@pytest.mark.parametrize("op", fused_layers.OPS)
def test_a_forced_reference_is_what_runs(op):
    head = "ForSequenceClassification"
    model = frozen(head)
    with mock.patch.dict(registry.IMPLEMENTATIONS):
        del registry.IMPLEMENTATIONS[op, "cpu"]
        ran, _ = calls(model, head)
    assert set(ran) == {"packed_linear"}


def compiled_plan(model):
    """The one that the encoder of a model has compiled."""
    (compiled,) = model.bert.fastgate_runtime.executor.plans.plans
    return compiled


def test_a_plan_is_compiled_once_and_copies_compile_their_own():
    head = "ForSequenceClassification"
    model = frozen(head, keep=[0, 2])
    before = logits(model, head)
    compiled = compiled_plan(model)
    assert torch.equal(logits(model, head), before)
    assert compiled_plan(model) is compiled
    other = copy.deepcopy(model)
    assert not other.bert.fastgate_runtime.executor.plans.plans
    torch.testing.assert_close(logits(other, head), before, rtol=1e-5, atol=1e-5)
    assert compiled_plan(other) is not compiled
    assert not pickle.loads(pickle.dumps(model)).bert.fastgate_runtime.executor.plans.plans


@pytest.mark.parametrize("name", ["output.LayerNorm.weight", "intermediate.dense.bias", "replacement.shift"])
def test_a_value_changed_in_place_is_read_by_the_next_call(name):
    head = "ForSequenceClassification"
    model = frozen(head, keep=[0, 2], replacement="mean")
    before = logits(model, head)
    compiled = compiled_plan(model)
    for path, parameter in model.named_parameters():
        if path.endswith(name):
            parameter.data.add_(torch.linspace(0, 1, parameter.numel()))
    after = logits(model, head)
    assert compiled_plan(model) is compiled
    torch.testing.assert_close(after, logits(model, head, steps=True), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-4)


def test_compiled_plans_are_cached_by_plan_and_bounded():
    head = "ForTokenClassification"
    model = frozen(head)
    batch = encoders.batch(model, head)
    rows = batch["attention_mask"].bool() & (torch.arange(batch["attention_mask"].shape[1]) < 4)
    cache = model.bert.fastgate_runtime.executor.plans
    with torch.inference_mode():
        whole = model(**batch).logits
        some = model(**batch, rows=rows).logits
        assert len(cache.plans) == 2
        torch.testing.assert_close(some[rows], whole[rows], rtol=1e-5, atol=1e-5)
        with mock.patch("fastgate.runtime.compiled_plan.MAX_CACHED_PLANS", 2):
            get_encoder(model).set_gates([1.0, 0.0, 1.0, 1.0, 1.0])
            model(**batch)
    assert len(cache.plans) == 1


ATTENTION, ABSORBED, FEED_FORWARD, SHIFT_NORM = range(4)
ALL_ROWS = fused_layers.ALL_ROWS
HIDDEN = 32
PANELS, VECTOR = torch.zeros(1, HIDDEN, 32), torch.zeros(HIDDEN)
SQUARE = torch.zeros(HIDDEN, HIDDEN)
END = [PANELS, VECTOR, VECTOR, VECTOR]  # product, its bias, LayerNorm
OPERANDS = {
    ATTENTION: [torch.zeros(3, HIDDEN, 32), None, None, None, *END],
    ABSORBED: [PANELS, VECTOR, SQUARE, SQUARE, VECTOR, *END],
    FEED_FORWARD: [
        torch.zeros(2, HIDDEN, 32),
        None,
        torch.zeros(1, 64, 32),
        None,
        VECTOR,
        VECTOR,
        None,
        None,
    ],
    SHIFT_NORM: [VECTOR] * 6,
}
SIZES = {ATTENTION: 4, ABSORBED: 4, FEED_FORWARD: 64, SHIFT_NORM: ALL_ROWS}


def call(kind, changes=None, **others):
    """A half alone; changes: place -> another operand."""
    operands = [(changes or {}).get(place, given) for place, given in enumerate(OPERANDS[kind])]
    given = {
        "h": torch.zeros(5, HIDDEN), "operands": operands,
        "kinds": [kind, SIZES[kind]], "numbers": [1e-12, 1.0],
        "cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32), "output_rows": torch.tensor([0, 3]),
        "neighbours": [torch.tensor([False, True, True, False, True])],
    }  # fmt: skip
    return getattr(torch.ops.fastgate_cpu, fused_layers.COMPILED_OP)(**(given | others))


# kind, rows that come of it, places of the vector that is added to them and of the LayerNorm's weight
ALONE = [
    (ATTENTION, range(5), 5, 6),
    (ABSORBED, (0, 3), 6, 7),
    (FEED_FORWARD, range(5), 3, 4),
    (SHIFT_NORM, range(5), 0, 4),
]


@pytest.mark.parametrize("kind, rows, added, norm", ALONE)
def test_a_half_alone(kind, rows, added, norm):
    """All products are zero: what is left is LayerNorm(h + bias) of its rows."""
    h, (vector, weight, bias) = torch.randn(5, HIDDEN), torch.randn(3, HIDDEN)
    y = call(kind, {added: vector, norm: weight, norm + 1: bias}, h=h)
    want = torch.nn.functional.layer_norm(h[list(rows)] + vector, (HIDDEN,), weight, bias, 1e-12)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes, others, message",
    [
        ({}, {"output_rows": torch.tensor([0, 5])}, "got row 5, wanted one of 5"),
        ({}, {"output_rows": torch.tensor([0, -1])}, "got row -1, wanted one of 5"),
        ({}, {"output_rows": torch.tensor([0, 3], dtype=torch.int32)}, "wanted .*int64"),
        ({}, {"output_rows": None}, "got shapes or dtypes that do not fit"),
        ({}, {"output_rows": torch.tensor([0])}, "absorbed_attention: probe, x: got shapes that do not fit"),
        ({}, {"kinds": [ABSORBED, 5]}, "got shapes or dtypes that do not fit"),
        ({}, {"kinds": [ABSORBED, 0]}, "got shapes or dtypes that do not fit"),
        ({2: torch.zeros(32, 16)}, {}, "got shapes or dtypes that do not fit"),
        ({2: SQUARE.double()}, {}, "got shapes or dtypes that do not fit"),
        ({4: torch.zeros(16)}, {}, "got shapes or dtypes that do not fit"),
        ({0: None}, {}, "operands: got none at place 0, wanted a tensor"),
        ({}, {"kinds": [ABSORBED, 4, ABSORBED, 4], "numbers": [1.0] * 4}, "operands: got 9, wanted more"),
        ({}, {"kinds": [], "numbers": []}, "operands: got 9, wanted 0"),
        ({}, {"kinds": [4, 4]}, "kinds: got 4, wanted 0 to 3"),
        ({}, {"kinds": [ABSORBED]}, "wanted .*two and two a half"),
        ({}, {"h": torch.zeros(HIDDEN)}, "got 1 dimensions"),
    ],
)
def test_operands_that_do_not_fit_are_refused(changes, others, message):
    with pytest.raises(RuntimeError, match=message):
        call(ABSORBED, changes, **others)


@pytest.mark.parametrize(
    "others", [{"h": torch.zeros(5, 16)}, {"operands": [PANELS, *OPERANDS[ATTENTION][1:]]}]
)
def test_a_half_refuses_what_does_not_fit(others):
    with pytest.raises(RuntimeError, match="wanted"):
        call(ATTENTION, **others)


def test_a_shift_needs_its_neighbours():
    linked, nearer = torch.tensor([False, True, True, False, True]), torch.tensor([0, 1, 3])
    fewer = {"kinds": [SHIFT_NORM, 1], "neighbours": [linked[:3], nearer[:1], linked, nearer]}
    assert torch.equal(call(SHIFT_NORM, **fewer), call(SHIFT_NORM)[nearer])
    for wrong in (
        {"neighbours": []},
        fewer | {"neighbours": [linked] * 3},
        fewer | {"neighbours": [linked] * 4},
    ):
        with pytest.raises(
            RuntimeError, match=r"neighbours: got \d .*wanted .rows,. bool, or that and int64 rows"
        ):
            call(SHIFT_NORM, **wrong)
    with pytest.raises(RuntimeError, match="shift_norm: x, has_left_neighbour"):
        call(SHIFT_NORM, neighbours=[torch.zeros(4, dtype=torch.bool)])
    with pytest.raises(RuntimeError, match="got row 5, wanted one of 5"):
        call(SHIFT_NORM, **fewer | {"neighbours": [linked, nearer, linked, torch.tensor([0, 5])]})
