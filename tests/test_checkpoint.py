"""save and load: the same model back, crashes that cost nothing, and damage named for what it is."""

import json
import os
from pathlib import Path

import pytest
import torch
from encoders import ALL, batch, make
from safetensors.torch import load_file, save_file

import fastgate
from fastgate import checkpoint
from fastgate.checkpoint import CONFIG, META, WEIGHTS


@pytest.fixture
def saved(tmp_path):
    model = fastgate.prune(make("Bert", "ForSequenceClassification"), keep=[1], replacement="shift")
    for name, parameter in model.named_parameters():
        if "replacement" in name:
            torch.nn.init.normal_(parameter)
    return model, fastgate.save(model, tmp_path / "checkpoint")


@pytest.mark.parametrize("family, head", ALL)
@torch.no_grad()
def test_the_same_model_comes_back(family, head, tmp_path):
    model = fastgate.prune(make(family, head), keep=[0, 2], replacement="mean")
    inputs = batch(model, head)
    again = fastgate.load(fastgate.save(model, tmp_path / "x"))
    assert type(again) is type(model) and not again.training
    for name, want in model(**inputs).items():
        if isinstance(want, torch.Tensor):
            assert torch.equal(again(**inputs)[name], want)


@torch.no_grad()
def test_only_what_is_left_is_written(saved):
    model, path = saved
    names = set(load_file(path / WEIGHTS))
    assert not any(
        f"layer.{i}.attention.self" in n or f"layer.{i}.attention.output.dense" in n
        for n in names
        for i in (0, 2)
    )
    assert sum(t.numel() for t in load_file(path / WEIGHTS).values()) == sum(
        p.numel() for p in model.parameters()
    )
    inputs = batch(model, "ForSequenceClassification")
    assert torch.equal(fastgate.load(path)(**inputs).logits, model(**inputs).logits)
    assert sorted(os.listdir(path.parent)) == ["checkpoint"]


def test_closed_but_unpruned_gates_and_dtype(tmp_path):
    from fastgate.state import encoder_state

    model = fastgate.patch(make("Bert", "ForMaskedLM")).to(torch.bfloat16)
    encoder_state(model).set_gates([1.0, 0.0, 1.0])
    again = fastgate.load(fastgate.save(model, tmp_path / "x"))
    assert again.dtype == torch.bfloat16 and encoder_state(again).gates == [1.0, 0.0, 1.0]
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    encoder_state(model).set_gates([1.0, torch.tensor(0.5), 1.0])
    with pytest.raises(fastgate.ArgumentError, match="harden"):
        fastgate.save(model, tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_a_crash_while_writing_leaves_the_former_checkpoint(saved, monkeypatch):
    model, path = saved
    before = {name: (path / name).read_bytes() for name in (META, CONFIG, WEIGHTS)}

    def cut(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", cut)
    with pytest.raises(OSError, match="disk full"):
        fastgate.save(model, path)
    assert {name: (path / name).read_bytes() for name in before} == before and os.listdir(path.parent) == [
        "checkpoint"
    ]
    monkeypatch.undo()
    fastgate.save(model, path)
    fastgate.load(path)


def test_save_does_not_overwrite_what_is_no_checkpoint(saved, tmp_path):
    model, _ = saved
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "mine" / WEIGHTS).write_text("of somebody else")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "mine", tmp_path / "file"):
        with pytest.raises(fastgate.ArgumentError, match="path"):
            fastgate.save(model, path)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert (tmp_path / "mine" / WEIGHTS).read_text() == "of somebody else"
    with pytest.raises(fastgate.NothingPatched):
        fastgate.save(make("Bert", "Model"), tmp_path / "z")


def rewrite(path, **changes):
    data = json.loads((path / META).read_text()) | changes
    (path / META).write_text(json.dumps(data))


def with_tensors(path, change):
    from fastgate.checkpoint import _digest

    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)
    rewrite(path, sha256={name: _digest(path / name) for name in (CONFIG, WEIGHTS)})


def truncated(path):
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])


def flipped(path):
    data = bytearray((path / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (path / WEIGHTS).write_bytes(bytes(data))


DAMAGE = {
    "checksum": truncated,
    "checksum ": flipped,
    "upgrade": lambda path: rewrite(path, format=3),
    "wrong fields": lambda path: rewrite(path, kept="all"),
    "wrong fields ": lambda path: rewrite(path, demand="last"),
    "shapes": lambda path: with_tensors(path, lambda t: t.update({"classifier.bias": torch.zeros(7)})),
    "missing": lambda path: with_tensors(path, lambda t: t.pop("classifier.bias")),
    "unknown": lambda path: with_tensors(path, lambda t: t.update(stranger=torch.zeros(1))),
    "keep": lambda path: rewrite(path, kept=[9]),
    "class": lambda path: rewrite(path, **{"class": "Popen"}),
    "damaged JSON": lambda path: (path / META).write_text("{"),
    "no such file": lambda path: (path / WEIGHTS).unlink(),
    "no such file ": lambda path: (path / CONFIG).unlink(),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named(saved, message):
    _, path = saved
    DAMAGE[message](path)
    with pytest.raises(fastgate.CheckpointError, match=message.strip()):
        fastgate.load(path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(fastgate.CheckpointError, match="check the path"):
        fastgate.load(tmp_path / "nowhere")


def test_tokenizer_goes_along(saved, tmp_path, minilm_path):
    from transformers import AutoTokenizer

    model, _ = saved
    path = fastgate.save(model, tmp_path / "with", tokenizer=AutoTokenizer.from_pretrained(minilm_path))
    assert AutoTokenizer.from_pretrained(path)("gate")["input_ids"]
