"""bench/models: models are timed and traced; the flattened model; two versions bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import subprocesses

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[2] / "bench"


def test_models_are_timed_and_traced(tmp_path):
    """Tiny ones, wherever this runs: outputs found equal, every scenario a line, the aims in a table."""
    environment = os.environ | {"PYTHONPATH": subprocesses.PACKAGE_PARENT, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, BENCH / "models" / "gpu_models.py", "--quick", "--out", tmp_path]
    found = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    first, traced, *lines = map(json.loads, (tmp_path / "models.jsonl").read_text().splitlines())
    assert first["environment"]["torch"] == torch.__version__ and traced["pruned_attention_kernels"] == 0
    assert [line["scenario"] for line in lines] == ["half padding", "batch 1, length 32", "training step"]
    for line in lines:
        rows = line["models"]
        assert {"fastgate", "fastgate {0,4,8}", "fastgate {0,1}", "sdpa", "eager", "flash varlen"} <= set(
            rows
        )
        assert all(row["ms"] > 0 for row in rows.values()) and line["largest_difference"] < 0.1
        assert set(rows["fastgate"]["speedups"]) >= {"sdpa", "eager", "flash varlen"}
        # The work that is left: both are counted from the same steps.
        assert rows["fastgate"]["tflop_per_s"] > 0 and "flash" in {*rows, *line["absent"]}
    table = (tmp_path / "models.md").read_text()
    assert "| half padding: fastgate, sdpa | >= 2.6 |" in table and "replay over its kernels" in table
    assert len(list(tmp_path.glob("trace_*.json.gz"))) == 5


@pytest.fixture
def models(monkeypatch):
    """The modules of bench/models, which find each other by name."""
    monkeypatch.syspath_prepend(str(BENCH / "models"))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCH)):
            del sys.modules[name]


def test_kernels_of_a_pruned_attention_are_counted(models):
    """12 layers of 3 steps over 5 kernels of embeddings and unpadding; and one more a layer would show."""
    import gpu_tables

    for extra in (0, 1):
        counts = {"none": 5 + 12 * (3 + extra), "none, half the layers": 5 + 6 * (3 + extra)}
        found = {"layers": 12, "feed_forward": 3, "kernels": counts}
        assert gpu_tables.pruned_attention_kernels(found) == extra


def test_the_flattened_model_is_the_padded_one(models):
    """Logits, loss and gradients; and its logits depend on where each sequence begins."""
    import flattened
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}
    padded = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes)).eval()
    for parameter in padded.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    flat = flattened.FlattenedClassifier(padded).eval()
    mask = (torch.arange(9) < torch.tensor([9, 1, 4])[:, None]).long()
    batch = {"input_ids": torch.randint(1, 50, (3, 9)) * mask, "attention_mask": mask}
    batch["labels"] = torch.tensor([0, 2, 1])
    inputs = flattened.flatten(batch)
    assert inputs["input_ids"].shape == (1, 14) and inputs["cu_seq_lens_q"].tolist() == [0, 9, 10, 14]
    want, got = padded(**batch), flat(**inputs)
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.loss, want.loss)
    want.loss.backward()
    got.loss.backward()
    query = padded.bert.encoder.layer[0].attention.self.query.weight.grad
    torch.testing.assert_close(flat.encoder.encoder.layer[0].attention.self.query.weight.grad, query)
    moved = flat(**inputs | {"cu_seq_lens_q": torch.tensor([0, 8, 10, 14])})
    assert (moved.logits - want.logits).abs().max() > 1e-3


def test_two_versions_are_compared_bit_for_bit(models):
    import same_bits

    one = {"logits": torch.tensor([1.0, 2.0]), "loss": torch.tensor(torch.nan)}
    assert same_bits.difference(one, {name: t.clone() for name, t in one.items()}) is None
    other = one | {"logits": torch.tensor([1.0, 2.0]).nextafter(torch.tensor(3.0))}
    assert "1 of 2 tensors, first logits: largest difference 2.4e-07" in same_bits.difference(one, other)
    assert "zero" not in str(same_bits.difference({"a": torch.tensor(0.0)}, {"a": torch.tensor(0.0)}))
    assert same_bits.difference({"a": torch.tensor(0.0)}, {"a": torch.tensor(-0.0)}) is not None
    assert "only new has ['b']" in same_bits.difference({}, {"b": torch.zeros(1)})
    assert same_bits.difference("KeyError: a", "KeyError: b") is None
    assert same_bits.difference("KeyError: a", "ValueError: a") is not None
    assert same_bits.difference(one, "KeyError: a") == "old ran, new KeyError: a"
    large = torch.zeros(same_bits.LARGE + 1)
    digests = [{"a": same_bits.compact(t)} for t in (large, large + 1)]
    assert same_bits.difference(digests[0], digests[0]) is None and digests[0]["a"].numel() == 32
    assert "other bits" in same_bits.difference(*digests)
