"""save and load: the same model back, crashes that cost nothing, and damage named for what it is."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from helpers.encoders import ALL, batch, make
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import fastgate
from fastgate.models import atomic_files, checkpoint
from fastgate.models.checkpoint_files import CONFIG, META, WEIGHTS


@pytest.fixture
def saved(tmp_path):
    model = fastgate.prune(make("Bert", "ForSequenceClassification"), keep=[1], replacement="shift")
    for name, parameter in model.named_parameters():
        if "replacement" in name:
            torch.nn.init.normal_(parameter)
    return model, fastgate.save(model, tmp_path / "checkpoint")


@pytest.mark.slow
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


def test_skipped_but_unpruned_attention_and_dtype(tmp_path):
    from fastgate.models.handle import get_encoder

    model = fastgate.patch(make("Bert", "ForMaskedLM")).to(torch.bfloat16)
    get_encoder(model).set_gates([1.0, 0.0, 1.0])
    again = fastgate.load(fastgate.save(model, tmp_path / "x"))
    assert again.dtype == torch.bfloat16 and get_encoder(again).gates == [1.0, 0.0, 1.0]
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    get_encoder(model).set_gates([1.0, torch.tensor(0.5), 1.0])
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
    from fastgate.models.checkpoint_files import digest_of

    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)
    rewrite(path, sha256={name: digest_of(path / name) for name in (CONFIG, WEIGHTS)})


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


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_files_of_others_stay(saved, tmp_path, minilm_path):
    model, path = saved
    others = {".git/HEAD": "ref", "README.md": "card", "onnx/model.onnx": "o", "tokenizer.json": "{}"}
    for name, text in others.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    for again in (fastgate.save, lambda m, p: m.save_pretrained(p)):
        again(model, path)
        assert {name: (path / name).read_text() for name in others} == others
        assert set(os.listdir(path)) == {CONFIG, META, WEIGHTS, ".git", "README.md", "onnx", "tokenizer.json"}
    clone = tmp_path / "clone"  # of a new repository
    (clone / ".git").mkdir(parents=True)
    (clone / ".gitattributes").write_text("*.safetensors filter=lfs")
    fastgate.load(fastgate.save(model, clone))


def test_a_model_of_transformers_is_not_overwritten(saved, tmp_path):
    model, _ = saved
    make("Bert", "Model").save_pretrained(tmp_path / "theirs")
    before = tree(tmp_path / "theirs")
    with pytest.raises(fastgate.ArgumentError, match=r"a config\.json that fastgate did not write"):
        fastgate.save(model, tmp_path / "theirs")
    assert tree(tmp_path / "theirs") == before


def test_paths_of_every_kind(saved, tmp_path, monkeypatch):
    model, _ = saved
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "link").symlink_to(tmp_path / "here", target_is_directory=True)
    for path in (".", "~/models/x", "relative/y/", tmp_path / "link", f"{tmp_path}/link/", "../up"):
        for _ in range(2):
            fastgate.load(fastgate.save(model, path))
            fastgate.load(path)
    assert sorted(os.listdir(tmp_path / "here")) == [CONFIG, META, WEIGHTS, "relative"]
    assert (tmp_path / "home" / "models" / "x" / WEIGHTS).is_file()
    assert (tmp_path / "link").is_symlink()
    for wrong in (3, None, "", b""):
        with pytest.raises(fastgate.ArgumentError, match="path"):
            fastgate.save(model, wrong)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(saved, tmp_path, mask):
    before = os.umask(mask)
    try:
        paths = [fastgate.save(saved[0], tmp_path / "x"), tmp_path / "y"]
        saved[0].save_pretrained(paths[1])
    finally:
        os.umask(before)
    for path in paths:
        assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~mask}
        assert path.stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("file", [CONFIG, META, WEIGHTS, "interrupted.json"])
def test_a_full_disk_changes_nothing(saved, tmp_path, monkeypatch, file):
    """Whatever file it is that does not fit."""
    model, path = saved
    before = tree(path)
    write_text, save_file = Path.write_text, checkpoint.save_file

    def full(target, *args, **kwargs):
        if target.name == file:
            target = Path("/dev/full")
        return write_text(target, *args, **kwargs)

    def full_file(tensors, target, metadata):
        if target.name == file:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, target, metadata)

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(checkpoint, "save_file", full_file)
    for target in (path, tmp_path / "new" / "x"):
        with pytest.raises(OSError, match="No space left"):
            fastgate.save(model, target)
    assert tree(path) == before and sorted(os.listdir(path)) == [CONFIG, META, WEIGHTS]
    assert not (tmp_path / "new").exists()


def test_an_interrupted_save_is_the_new_model_or_an_error(saved, tmp_path, monkeypatch):
    """Committed, and killed while files moved: fastgate reads the new model, transformers an error."""
    model, path = saved
    torch.nn.init.normal_(model.classifier.bias)
    moved = []

    def move(source, target, name):
        moved.append(name)
        if len(moved) > 2:
            raise KeyboardInterrupt
        original(source, target, name)

    original = atomic_files._move
    monkeypatch.setattr(atomic_files, "_move", move)
    with pytest.raises(KeyboardInterrupt):
        fastgate.save(model, path)
    monkeypatch.undo()
    assert atomic_files.is_interrupted(path)
    names = tree(path)
    assert torch.equal(fastgate.load(path).classifier.bias, model.classifier.bias)
    assert tree(path) == names  # a folder that cannot be written is read the same
    for _ in range(2):
        with pytest.raises(ValueError, match="fastgate"):
            transformers.BertForSequenceClassification.from_pretrained(path)
        if atomic_files.is_interrupted(path):
            with pytest.raises(fastgate.CheckpointError, match="load it again"):
                transformers.AutoModelForSequenceClassification.from_pretrained(path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    assert torch.equal(again.classifier.bias, model.classifier.bias)
    assert sorted(os.listdir(path)) == [CONFIG, META, WEIGHTS]


@pytest.mark.slow
def test_a_reader_beside_a_writer_finds_one_model_or_the_other(tmp_path):
    models = [fastgate.prune(make("Bert", "ForSequenceClassification"), keep=keep) for keep in ([1], [0, 2])]
    torch.nn.init.ones_(models[1].classifier.bias)
    fastgate.save(models[0], tmp_path)
    writer = os.fork()
    if writer == 0:
        for i in range(60):
            fastgate.save(models[i % 2], tmp_path)
        os._exit(0)
    seen = set()
    while os.waitpid(writer, os.WNOHANG)[0] == 0:
        model = fastgate.load(tmp_path)
        last = torch.equal(model.classifier.bias, models[1].classifier.bias)
        assert model.bert.fastgate_runtime.gates == ([1.0, 0.0, 1.0] if last else [0.0, 1.0, 0.0])
        seen.add(last)
    assert seen and sorted(os.listdir(tmp_path)) == [CONFIG, META, WEIGHTS]


@pytest.mark.parametrize("tokenizer", ["bert", 3, True, "model", "config", "class"])
def test_what_is_no_tokenizer_is_refused_before_anything_is_written(saved, tmp_path, tokenizer):
    """The files of a model or a config would take the place of the checkpoint's own."""
    model, _ = saved
    kinds = {"model": model, "config": model.config, "class": transformers.BertTokenizerFast}
    with pytest.raises(fastgate.ArgumentError, match=r"save: tokenizer: got .*AutoTokenizer"):
        fastgate.save(model, tmp_path / "new", kinds.get(tokenizer, tokenizer))
    assert not (tmp_path / "new").exists()


def test_paths_that_cannot_be_are_refused(saved, tmp_path):
    model, path = saved
    for wrong in (path / META / "x", tmp_path / ("a" * 500), "a\0b"):
        with pytest.raises(fastgate.ArgumentError, match="save: path: got"):
            fastgate.save(model, wrong)
    with pytest.raises(fastgate.CheckpointError, match="load: aaa"):
        fastgate.load("a" * 5000)


def test_errors_name_the_call_that_was_made(saved, tmp_path):
    dense = make("Bert", "ForSequenceClassification")
    for name, call in {
        "save": lambda: fastgate.save(dense, tmp_path / "x"),
        "explain": lambda: fastgate.explain(dense),
        "freeze": lambda: fastgate.freeze(dense),
    }.items():
        with pytest.raises(fastgate.NothingPatched, match=rf"^{name}: model: got unpatched"):
            call()


@torch.no_grad()
def test_loaded_on_the_cpu_whatever_the_default_device_is(saved):
    model, path = saved
    with torch.device("meta"):
        again = fastgate.load(path)
    inputs = batch(model, "ForSequenceClassification")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
