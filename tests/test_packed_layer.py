"""Halves of frozen layers in one compiled call: which run so, and that they compute what their steps do."""

from __future__ import annotations

from unittest import mock

import encoders
import pytest
import torch
from test_counts import Ops
from torch import nn

import fastgate
from fastgate import backends
from fastgate.ops import packed_layer, slots

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
        with mock.patch.object(packed_layer, "runs", return_value=False):
            return model(**batch).logits


def calls(model, head):
    """The compiled ops of the encoder in the order they run, and every op at all."""
    with torch.inference_mode(), Ops() as mode:
        model(**encoders.batch(model, head))
    seen = [name for name, _ in mode.seen]
    return [name.split(".")[1] for name in seen if name.startswith("fastgate_cpu.packed_")], seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [[0, 1, 2, 3, 4], [0, 2], [4], []], ids=str)
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_a_half_is_one_call(head, keep, dtype):
    """But for absorbed attention in bfloat16: its key and value weights are not in panels."""
    ran, seen = calls(frozen(head, keep, dtype), head)
    expected, steps = [], ["packed_linear"] * 2  # of query and output
    for i in range(LAYERS):
        if i in keep:
            absorbed = ["packed_absorbed_attention"] if dtype == torch.float32 else steps
            last = head == "ForSequenceClassification" and i == keep[-1]
            expected += absorbed if last else ["packed_attention"]
        expected.append("packed_feed_forward")
    assert ran[: len(expected)] == expected
    assert set(ran[len(expected) :]) == {"packed_linear"}  # the head's
    assert dtype != torch.float32 or not any("gated_add_norm" in n or ".attention" in n for n in seen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("replacement", ["zero", "mean", "affine"])
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


@pytest.mark.parametrize("op", packed_layer.OPS)
def test_a_forced_reference_is_what_runs(op):
    head = "ForSequenceClassification"
    model = frozen(head)
    with mock.patch.dict(slots.SLOTS):
        del slots.SLOTS[op, "cpu"]
        ran, _ = calls(model, head)
    assert set(ran) == {"packed_linear"}


def operands(**changes):
    hidden = 32
    panels = torch.zeros(1, hidden, 32)
    vector = torch.zeros(hidden)
    given = {
        "h": torch.zeros(5, hidden), "wanted": torch.tensor([0, 3]), "query": panels, "q_bias": vector,
        "key": torch.zeros(hidden, hidden), "value": torch.zeros(hidden, hidden), "v_bias": vector,
        "cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32), "heads": 4, "scale": 1.0,
        "output": panels, "output_bias": vector, "weight": vector, "norm_bias": vector, "eps": 1e-12,
    }  # fmt: skip
    return (given | changes).values()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"wanted": torch.tensor([0, 5])}, "got row 5, wanted one of 5"),
        ({"wanted": torch.tensor([0, -1])}, "got row -1, wanted one of 5"),
        ({"wanted": torch.tensor([0, 3], dtype=torch.int32)}, "wanted .*int64"),
        ({"key": torch.zeros(32, 16)}, "got shapes or dtypes that do not fit"),
        ({"v_bias": torch.zeros(16)}, "got shapes or dtypes that do not fit"),
        ({"heads": 5}, "got shapes or dtypes that do not fit"),
        ({"heads": 0}, "got shapes or dtypes that do not fit"),
        ({"wanted": torch.tensor([0])}, "absorbed_attention: probe, x: got shapes that do not fit"),
        ({"key": torch.zeros(32, 32, dtype=torch.float64)}, "got shapes or dtypes that do not fit"),
    ],
)
def test_operands_that_do_not_fit_are_refused(changes, message):
    call = torch.ops.fastgate_cpu.packed_absorbed_attention
    assert call(*operands()).shape == (2, 32)
    with pytest.raises(RuntimeError, match=message):
        call(*operands(**changes))


def test_halves_refuse_what_does_not_fit():
    call = torch.ops.fastgate_cpu.packed_attention
    vector, panels = torch.zeros(32), torch.zeros(1, 32, 32)
    cu = torch.tensor([0, 5], dtype=torch.int32)
    rest = (None, None, None, cu, 4, 1.0, panels, None, vector, vector, 1e-12)
    assert call(torch.zeros(5, 32), torch.zeros(3, 32, 32), *rest).shape == (5, 32)
    for h, qkv in (
        (torch.zeros(5, 16), torch.zeros(3, 32, 32)),
        (torch.zeros(5, 32), panels),
        (torch.zeros(32), panels),
    ):
        with pytest.raises(RuntimeError, match="wanted"):
            call(h, qkv, *rest)
