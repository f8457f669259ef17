"""Baselines of `fastgate bench`: equal to Hugging Face, refused with a reason, left out when wrong."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from helpers.bfloat16 import PACKED_DTYPES
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fastgate.benchmark import baselines, compare, model_variants
from fastgate.benchmark.equivalence import check_baselines
from fastgate.errors import ArgumentError

pytestmark = pytest.mark.slow

OPTIONAL = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("openvino",)}
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "num_labels": 3,
}  # fmt: skip
MODELS = {
    "text": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "tokens": lambda: BertForTokenClassification(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES | {"type_vocab_size": 1})),
}


def reference(kind="text", dtype=torch.float32):
    """Weights large enough that a wrong mask, position or token type moves the logits."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model.to(dtype)


def batch(rows, length, kind="text"):
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    found = {"input_ids": torch.randint(3, 50, (rows, length)), "attention_mask": mask}
    if kind != "roberta":
        found["token_type_ids"] = (torch.arange(length) > length // 3).long().repeat(rows, 1)
    return found


def need(name):
    missing = [package for package in OPTIONAL.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{name}: {', '.join(missing)} is not installed (the extra baselines)")


def built(name, model, kind="text"):
    found, absent = baselines.build_baselines([name], model, batch(2, 8, kind))
    assert not absent
    return found[name]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["sdpa", "eager", "onnxruntime", "openvino"])
def test_a_baseline_gives_hugging_faces_logits_for_batches_of_any_shape(name, kind):
    need(name)
    model = reference(kind)
    baseline = built(name, model, kind)
    batches = [batch(*shape, kind) for shape in ((2, 8), (5, 13), (1, 7), (3, 62))]
    held, wrong = check_baselines({name: baseline}, model, batches)
    assert held == {name: baseline} and not wrong
    # What is compared is seen to depend on the mask and, where there are any, on the token types.
    for key in set(batches[0]) - {"input_ids"}:
        changed = [{**one, key: torch.ones_like(one[key])} for one in batches]
        outputs = [(baseline.run(a), baseline.run(b)) for a, b in zip(batches, changed, strict=True)]
        assert max((a - b).abs().max() for a, b in outputs) > 1e-3


def test_all_of_a_bert_is_fused_for_onnxruntime():
    need("onnxruntime")
    form = built("onnxruntime", reference()).form
    assert "EmbedLayerNormalization 1, Attention 3, BiasGelu 3, SkipLayerNormalization 6" in form


def test_openvino_runs_in_the_precision_of_the_model():
    need("openvino")
    model = reference(dtype=torch.bfloat16)
    found, absent = baselines.build_baselines(["openvino"], model, batch(2, 8))
    if absent:
        assert "wanted bf16" in absent["openvino"]
        return
    assert "bf16" in found["openvino"].form
    # Nothing is reported anywhere, and the module is what it was.
    from openvino.tools.ovc import telemetry_utils

    assert telemetry_utils.tm.__name__.endswith("telemetry_stub")
    assert sys.modules.get("openvino_telemetry", telemetry_utils) is not None
    assert check_baselines(found, model, [batch(4, 9)])[0]
    ours, exact = found["openvino"].run(one := batch(4, 9)), model.float()(**one).logits
    assert (ours - exact).abs().max() > 1e-5  # it rounds


def test_onnxruntime_sits_out_in_bfloat16():
    need("onnxruntime")
    found, absent = baselines.build_baselines(
        ["sdpa", "onnxruntime"], reference(dtype=torch.bfloat16), batch(2, 8)
    )
    assert list(found) == ["sdpa"] and "no matrices in bfloat16" in absent["onnxruntime"]


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_missing_package_is_a_reason_with_its_remedy(name, monkeypatch):
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda package: None)
    found, absent = baselines.build_baselines([name], reference(), batch(2, 8))
    assert not found and absent[name].endswith('pip install "fastgate[baselines]"') and name in absent[name]


def test_compile_freezes_the_weights_and_reads_dynamic_shapes(monkeypatch):
    """torch.compile stood in for: what it is asked, and that a shape's first call is one that may compile."""
    import torch._inductor.config as inductor

    asked, frozen = [], []

    def compiled(model, **options):
        asked.append(options)

        def call(**inputs):
            frozen.append(inductor.freezing)
            return model(**inputs)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    model = reference()
    baseline = built("compile", model)
    one, other = batch(2, 8), batch(1, 8)
    outputs = [baseline.run(x) for x in (one, other, other)]
    assert asked == [{"dynamic": True}] and frozen == [True, False, True, False]
    torch.testing.assert_close(outputs[1], model(**other).logits)


def test_a_copy_shares_weights_and_not_the_attention():
    model = reference()
    copy_sharing_weights = baselines.copy_sharing_weights(model, "eager")
    assert (
        copy_sharing_weights.config._attn_implementation == "eager"
        and model.config._attn_implementation == "sdpa"
    )
    assert all(a is b for a, b in zip(model.parameters(), copy_sharing_weights.parameters(), strict=True))


def changed_baseline(change):
    """A baseline whose logits are Hugging Face's, changed."""
    model = reference()
    return model, baselines.Baseline(lambda one: change(model(**one).logits), "changed")


@pytest.mark.parametrize("added", [1e-2, torch.nan, torch.inf])
def test_a_baseline_that_is_wrong_sits_out(added):
    model, wrong = changed_baseline(lambda logits: logits + torch.tensor([0.0, added, 0.0]))
    held, why = check_baselines({"wrong": wrong}, model, [batch(2, 8)])
    assert not held and "from Hugging Face's" in why["wrong"]


def test_only_attended_rows_of_a_tagging_baseline_are_compared():
    model = reference("tokens")
    one = batch(2, 8)
    padding = baselines.Baseline(
        lambda b: model(**b).logits + (1 - b["attention_mask"][..., None]), "differs in padding"
    )
    attended = baselines.Baseline(
        lambda b: model(**b).logits + b["attention_mask"][..., None], "differs elsewhere"
    )
    held, wrong = check_baselines({"padding": padding, "attended": attended}, model, [one])
    assert list(held) == ["padding"] and list(wrong) == ["attended"]


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_choices_of_layers_share_the_timings_of_the_baselines(dtype, monkeypatch):
    monkeypatch.setattr(compare, "SECONDS", 0.0)
    model = reference("tokens", dtype)
    models = {"all": model_variants.pruned(model, None), "one": model_variants.pruned(model, [1])}
    batches = [batch(3, 8), batch(2, 5)]
    built_baselines, absent = baselines.build_baselines(["sdpa"], model, batches[0])
    wrong = baselines.Baseline(lambda one: model(**one).logits + 1, "wrong")
    found = compare.compare_all(
        models,
        model,
        batches,
        built_baselines | {"other": wrong},
        {**absent, "third": "no package"},
        repeats=1,
    )
    whole, one = (comparison.to_dict() for comparison in found)
    assert (whole["kept"], one["kept"]) == ([0, 1, 2], [1])
    assert whole["models"]["sdpa"] == one["models"]["sdpa"]
    assert whole["models"]["fastgate"] != one["models"]["fastgate"]
    assert set(one["speedup"]) == {"sdpa"} and one["absent"]["third"] == "no package"
    assert "at most" in one["absent"]["other"] and one["baselines"] == {
        "sdpa": "transformers, sdpa attention"
    }
    shown = compare.bench_table(compare.replace(found[1], settings=SETTINGS))
    assert "third was not timed: no package" in shown


SETTINGS = {
    "model": "m", "task": "t", "batch_size": 3, "order": "data", "dtype": "float32",
    "environment": {"threads": 1},
}  # fmt: skip


def test_no_baseline_that_runs_is_an_error_with_the_reasons(monkeypatch):
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda package: None)
    model = reference()
    with pytest.raises(ArgumentError, match=r"openvino: no package openvino.*a baseline that runs here"):
        compare.compare(model_variants.pruned(model, None), model, [batch(2, 8)], against=["openvino"])
    with pytest.raises(ArgumentError, match="got flash, wanted sdpa or eager or compile"):
        compare.compare(model, model, [], against=["flash"])
