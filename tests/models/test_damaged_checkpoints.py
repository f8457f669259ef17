"""Damaged and hostile checkpoints: always a CheckpointError that names the file, never a crash or a hang."""

import contextlib
import json
import os
import struct

import pytest
import torch
from helpers.encoders import batch, make
from safetensors.torch import load_file, save_file

import fastgate
from fastgate.models.checkpoint_files import CONFIG, META, WEIGHTS, digest_of

HEAD = "ForSequenceClassification"


@pytest.fixture
def path(tmp_path):
    return fastgate.save(fastgate.prune(make("Bert", HEAD), keep=[1], replacement="mean"), tmp_path / "x")


def seal(path):
    """Have the checksums match again, as one who means harm would."""
    meta = json.loads((path / META).read_text())
    meta["sha256"] = {name: digest_of(path / name) for name in (CONFIG, WEIGHTS)}
    (path / META).write_text(json.dumps(meta))


def configure(path, **changes):
    (path / CONFIG).write_text(json.dumps(json.loads((path / CONFIG).read_text()) | changes))
    seal(path)


def refused(path, match=""):
    with pytest.raises(fastgate.CheckpointError, match=match):
        fastgate.load(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings",
                     "intermediate_size", "num_attention_heads", "type_vocab_size")
        for value in (10**9, 2**62, 10**400, -1, 0, "3", None, True, 1.5, [3], {}, 7)
    ]
    + [
        ("num_labels", 10**9), ("num_labels", "x"), ("id2label", ["a"]), ("id2label", {"x": 1}),
        ("id2label", 3), ("hidden_act", "system"), ("hidden_act", ["gelu"]), ("dtype", "load"),
        ("dtype", ["float32"]), ("model_type", "roberta"), ("model_type", []), ("model_type", None),
        ("model_type", "gpt2"), ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("per_layer_config", {"0": {}}), ("attn_implementation", "someone/kernel"), ("is_decoder", True),
        ("add_cross_attention", True), ("__class__", "x"), ("__dict__", {}), ("to_dict", 3),
        ("layer_norm_eps", "x"), ("hidden_dropout_prob", "0.1"), ("attribute_map", {"a": "b"}),
        ("fastgate_pooling", "max"), ("fastgate", {"kept": "all"}), ("fastgate", []),
        ("fastgate", {"kept": [1], "replacement": "shift"}), ("fastgate", {"unfinished": True}),
        ("fastgate", {"interrupted": True}), ("tie_word_embeddings", "x"), ("pad_token_id", 10**9),
        ("pad_token_id", "x"),
    ],
)  # fmt: skip
def test_configs_that_lie(path, name, value):
    if value == json.loads((path / CONFIG).read_text()).get(name):
        pytest.skip("the truth")
    configure(path, **{name: value})
    if name in ("attribute_map", "tie_word_embeddings"):  # harmless where it is taken at all
        with contextlib.suppress(fastgate.CheckpointError):
            fastgate.load(path)
    else:
        refused(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"kept": [0, 1]}, {"kept": [5]}, {"kept": [-1]}, {"kept": [1, 1]}, {"kept": "1"}, {"kept": [True]},
        {"kept": [10**30]}, {"kept": None}, {"replacement": "shift"}, {"replacement": []}, {"demand": "last"},
        {"demand": ["first"]}, {"pooling": "mean"}, {"pooling": {}}, {"class": "Popen"}, {"class": None},
        {"class": "RobertaForSequenceClassification"}, {"class": "BertModel"}, {"format": 3},
        {"format": True}, {"format": "2"}, {"format": 10**30}, {"format": None}, {"sha256": "x"},
        {"sha256": {}}, {"sha256": {CONFIG: 1, WEIGHTS: 2}}, {"sha256": {"../../x": "y"}},
        {"unfinished": True},
    ],
    ids=str,
)  # fmt: skip
def test_descriptions_that_lie(path, change):
    (path / META).write_text(json.dumps(json.loads((path / META).read_text()) | change))
    refused(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [META, CONFIG])
@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff\xfe\x00", b"{} {}", b"[" * 200_000,
        b'{"a":' * 200_000, b'{"format": NaN}', b'{"format": 2, "format": 2}',
        b'{"a": ' + b"9" * 10_000 + b"}", b"\x00" * 100,
    ],
    ids=range(14),
)  # fmt: skip
def test_json_that_is_none(path, name, text):
    (path / name).write_bytes(text)
    if name == CONFIG:
        seal(path)
    refused(path, "damaged JSON|format|wrong fields|vocab_size")


def header(data: object, size: int | None = None) -> bytes:
    text = json.dumps(data).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text


ONE = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**62]}


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x00", header({}), header({}, 2**63), header({}, 2**40), header([]), header({"a": ONE}),
        header({"a": ONE | {"dtype": "X9"}}), header({"a": ONE | {"shape": [-1]}}), header({"a": 3}),
        header({"__metadata__": {"format": 3}}), b"PK\x03\x04" + b"\x00" * 100, b"\x80\x02}q\x00.",
    ],
    ids=range(13),
)  # fmt: skip
def test_weights_that_are_none(path, data):
    (path / WEIGHTS).write_bytes(data)
    refused(path, "checksum")
    seal(path)
    refused(path, f"{WEIGHTS}|as the weights have")


def test_flipped_and_cut_weights(path):
    whole = (path / WEIGHTS).read_bytes()
    for place in (*range(0, 40), len(whole) // 2, len(whole) - 1):
        (path / WEIGHTS).write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        refused(path, "checksum")
        seal(path)
        with contextlib.suppress(fastgate.CheckpointError):
            fastgate.load(path)  # one number is another: nothing can tell
        (path / WEIGHTS).write_bytes(whole[:place])
        refused(path, "checksum")
        seal(path)
        refused(path)


def test_tensors_of_another_kind(path):
    tensors = load_file(path / WEIGHTS)
    for value in (torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool), torch.zeros(3, 1)):
        save_file(tensors | {"classifier.bias": value}, path / WEIGHTS)
        seal(path)
        refused(path, "classifier.bias")


def test_a_changed_config_is_detected(path):
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | {"hidden_act": "relu"}))
    refused(path, r"config\.json: got contents that do not match their checksum")


def test_paths_that_are_no_checkpoint(path, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "an empty folder")
    refused(path / WEIGHTS, f"a file.*pass the folder {path}")
    refused(path / "nowhere", "check the path")
    refused(tmp_path, "without fastgate.json")
    make("Bert", HEAD).save_pretrained(tmp_path / "theirs")
    refused(tmp_path / "theirs", "AutoModel.from_pretrained and call fastgate.patch")
    os.replace(path, tmp_path / "pruned")
    refused(tmp_path, f"load {tmp_path / 'pruned'}")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    refused(tmp_path / "dangling", "check the path")
    for wrong in (3, None, "", b"", ["x"]):
        with pytest.raises(fastgate.ArgumentError, match="path"):
            fastgate.load(wrong)


def test_no_pickle_is_read(path):
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch stolen'\ntR.")
    (path / WEIGHTS).unlink()
    refused(path, "no such file")
    assert not (path / "stolen").exists()


@torch.no_grad()
def test_format_1_is_read(tmp_path):
    """As the version before wrote it: a config of transformers, and no checksum over it."""
    for head, demand in ((HEAD, None), ("Model", "first")):
        model = fastgate.patch(make("Bert", head), demand=demand)
        fastgate.prune(model, keep=[1], replacement="mean")
        path = fastgate.save(model, tmp_path / head)
        model.config.to_json_file(path / CONFIG, use_diff=False)
        meta = {"format": 1, "class": f"Bert{head}", "kept": [1], "replacement": "mean", "demand": demand}
        (path / META).write_text(json.dumps(meta | {"sha256": digest_of(path / WEIGHTS)}))
        again, inputs = fastgate.load(path), batch(model, head)
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])
        assert fastgate.explain(again).demand == fastgate.explain(model).demand
