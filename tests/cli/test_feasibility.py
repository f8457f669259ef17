"""What a model cannot reach is told before training: a speedup, a length."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_models
from helpers.commands import call

import fastgate
from fastgate.training import feasibility

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a model."""
    folder = tmp_path_factory.mktemp("feasibility")
    tiny_models.model_folder(folder / "model")
    return folder


@pytest.mark.parametrize("kind, pooling", [("text", "mean"), ("pair", "first"), ("tokens", "first")])
def test_the_highest_speedup_is_the_one_that_pruning_counts(world, tmp_path, monkeypatch, kind, pooling):
    """Before training it is told from the lengths of the rows; the Pruner measures forwards."""
    from fastgate.pruning.objective import Objective

    many, label = range(24), [0, 1] * 12
    rows = {
        "text": [{"text": "good film " * (1 + i % 5), "label": label[i]} for i in many],
        "pair": [{"text": "good film", "text_pair": "bad " * (1 + i % 7), "label": label[i]} for i in many],
        "tokens": [{"tokens": ["she", "went"] * (1 + i % 4), "tags": ["x", "y"] * (1 + i % 4)} for i in many],
    }[kind]
    path = tiny_models.write_rows(tmp_path / "rows.jsonl", rows)
    told, counted = [], []
    highest, choose = feasibility.highest_speedup, Objective.choose
    monkeypatch.setattr(feasibility, "highest_speedup", lambda *a: told.append(highest(*a)) or told[-1])
    monkeypatch.setattr(
        Objective, "choose", lambda self, p, costs: counted.append(costs) or choose(self, p, costs)
    )
    call(
        "finetune", "--model", world / "model", "--task-type", kind, "--train", path, "--validation", path,
        "--target-speedup", 1.2, "--epochs", 1, "--prune-epochs", 3, "--batch-size", 24, "--max-length", 24,
        "--pooling", pooling, "--out", tmp_path / "out",
    )  # fmt: skip
    assert told == [pytest.approx(float(1 / counted[0].share(torch.zeros(3).double())), rel=1e-9)]


def test_roberta_has_positions_behind_that_of_its_padding(world, tmp_path):
    from transformers import RobertaConfig, RobertaModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=99, max_position_embeddings=40, pad_token_id=6, **sizes)
    model = fastgate.patch(RobertaModel(config))
    feasibility.check_length("finetune", "--max-length", 33, model)
    with pytest.raises(fastgate.errors.ArgumentError, match="--max-length: got 34, wanted 3 to 33"):
        feasibility.check_length("finetune", "--max-length", 34, model)
