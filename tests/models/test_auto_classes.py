"""Pruned models and the loaders of transformers: the same model with fastgate imported, an error without."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import tiny_models
from helpers.encoders import ALL, batch, draw_replacements, make

import fastgate
from fastgate.models.checkpoint_files import CONFIG, META, WEIGHTS
from fastgate.models.handle import get_encoder

pytestmark = pytest.mark.slow

HEAD = "ForSequenceClassification"
WITHOUT = """
import sys, transformers
from transformers import *
transformers.logging.set_verbosity_error()
loaders = {
    name: getattr(transformers, name).from_pretrained
    for name in ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "BertModel", "RobertaModel",
                 "BertForSequenceClassification", "BertForTokenClassification", "BertForMaskedLM")
}
loaders["pipeline"] = lambda path: pipeline("text-classification", model=path)
loaders["BertModel without safetensors"] = lambda path: BertModel.from_pretrained(path, use_safetensors=False)
for path in sys.argv[1:]:
    for name, load in loaders.items():
        try:
            load(path)
            print("LOADED", name, path)
        except (ValueError, OSError) as error:
            assert "fastgate" in str(error), error
assert "fastgate" not in sys.modules
"""


def pruned(family="Bert", head=HEAD, kind="shift", keep=(0, 2)):
    return draw_replacements(fastgate.prune(make(family, head), keep=keep, replacement=kind))


@torch.no_grad()
def same(again, model, head=HEAD):
    inputs = batch(model, head)
    for name, want in model(**inputs).items():
        if isinstance(want, torch.Tensor):
            assert torch.equal(again(**inputs)[name], want), name


@pytest.mark.parametrize("how", ["save", "save_pretrained"])
@pytest.mark.parametrize("family, head", ALL)
def test_the_auto_classes_give_the_same_model(family, head, how, tmp_path):
    model = pruned(family, head)
    fastgate.save(model, tmp_path) if how == "save" else model.save_pretrained(tmp_path)
    auto = getattr(transformers, f"AutoModel{head.removeprefix('Model')}")
    assert json.loads((tmp_path / CONFIG).read_text())["architectures"] == [family + head]
    for load in (auto.from_pretrained, type(model).from_pretrained, fastgate.load):
        again = load(tmp_path)
        assert type(again) is type(model) and type(again.config) is type(model.config)
        assert not again.training
        same(again, model, head)
        for other in (pickle.loads(pickle.dumps(again)), copy.deepcopy(again)):
            assert type(other) is type(model)
            same(other, model, head)
    for name in (family + head, f"{family}Model", f"{family}ForTokenClassification"):
        with pytest.raises(ValueError, match="pip install fastgate"):
            getattr(transformers, name).from_pretrained(tmp_path)


def test_without_fastgate_every_loader_fails(tmp_path):
    paths = [tmp_path / kind for kind in ("zero", "shift", "mean-pooling", "unfinished")]
    for path in paths[:2]:
        pruned(kind=path.name).save_pretrained(path)
    fastgate.patch(make("Bert", HEAD), pooling="mean").save_pretrained(paths[2])
    soft = fastgate.patch(make("Bert", HEAD))
    get_encoder(soft).set_gates([1.0, torch.tensor(0.5), 0.0])
    soft.save_pretrained(paths[3])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *map(str, paths)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
    for load in (transformers.AutoModelForSequenceClassification.from_pretrained, fastgate.load):
        with pytest.raises(fastgate.CheckpointError, match="still being learned"):
            load(paths[3])


@torch.no_grad()
@pytest.mark.parametrize("family, head", [("Bert", HEAD), ("XLMRoberta", "ForMaskedLM")])
def test_another_head_keeps_the_pruned_encoder(family, head, tmp_path):
    model = pruned(family, head)
    fastgate.save(model, tmp_path)
    inputs = batch(model, head)
    want = get_encoder(model).encoder(**inputs, output_hidden_states=True).last_hidden_state
    attended = inputs["attention_mask"].bool()
    for name in ("AutoModel", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering"):
        other = getattr(transformers, name).from_pretrained(
            tmp_path, num_labels=2, ignore_mismatched_sizes=True
        )
        got = get_encoder(other).encoder(**inputs).last_hidden_state
        assert torch.allclose(got[attended], want[attended], atol=1e-6), name
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_options_of_from_pretrained(tmp_path):
    model = pruned()
    fastgate.save(model, tmp_path / "sub")
    auto = transformers.AutoModelForSequenceClassification
    assert auto.from_pretrained(tmp_path / "sub", dtype=torch.bfloat16).dtype == torch.bfloat16
    same(auto.from_pretrained(tmp_path, subfolder="sub"), model)
    same(auto.from_pretrained(tmp_path / "sub", device_map="cpu"), model)
    _, info = auto.from_pretrained(tmp_path / "sub", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (
        auto.from_pretrained(tmp_path / "sub", attn_implementation="eager").config._attn_implementation
        == "eager"
    )
    assert (
        type(model).from_pretrained(tmp_path / "sub", output_attentions=False, dtype="float64").dtype
        == torch.float64
    )
    wider = auto.from_pretrained(tmp_path / "sub", num_labels=7, ignore_mismatched_sizes=True)
    assert wider.classifier.out_features == 7 and get_encoder(wider).gates == [1.0, 0.0, 1.0]
    config = transformers.AutoConfig.from_pretrained(tmp_path / "sub")
    config.save_pretrained(tmp_path / "config")
    for loaded in (config, transformers.AutoConfig.from_pretrained(tmp_path / "config")):
        with pytest.raises(ValueError, match="pip install fastgate"):
            transformers.BertForSequenceClassification.from_pretrained(tmp_path / "sub", config=loaded)
    assert get_encoder(auto.from_config(config)).gates == [1.0, 0.0, 1.0]


def change_config(path):
    data = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(data | {"hidden_act": "relu"}))


def change_weights(path):
    data = bytearray((path / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (path / WEIGHTS).write_bytes(bytes(data))


@pytest.mark.parametrize(
    "change", [change_config, change_weights, lambda p: (p / META).unlink(), lambda p: (p / WEIGHTS).unlink()]
)
def test_from_pretrained_verifies_a_folder(change, tmp_path):
    fastgate.save(pruned(), tmp_path)
    change(tmp_path)
    with pytest.raises(fastgate.CheckpointError):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_patched_model_is_saved_as_transformers_saves_it(tmp_path):
    for head in ("Model", HEAD, "ForMaskedLM"):
        model = make("Bert", head)
        model.save_pretrained(tmp_path / head / "theirs")
        fastgate.patch(model).save_pretrained(tmp_path / head / "ours")
        fastgate.save(model, tmp_path / head / "saved")
        fastgate.freeze(model).save_pretrained(tmp_path / head / "frozen")
        for name in (CONFIG, WEIGHTS):
            want = (tmp_path / head / "theirs" / name).read_bytes()
            for ours in ("ours", "saved", "frozen"):
                assert (tmp_path / head / ours / name).read_bytes() == want
        assert sorted(os.listdir(tmp_path / head / "ours")) == [CONFIG, WEIGHTS]
        same(fastgate.load(tmp_path / head / "saved"), fastgate.thaw(model), head)


def test_one_model_over_another(tmp_path):
    """Pruned, plain and pruned again in one folder: each time it is the last one, for every loader."""
    first, plain = pruned(), fastgate.patch(make("Bert", HEAD))
    first.save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    same(fastgate.load(tmp_path), plain)
    same(fastgate.patch(transformers.BertForSequenceClassification.from_pretrained(tmp_path)), plain)
    first.save_pretrained(tmp_path)
    same(fastgate.load(tmp_path), first)
    same(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path), first)


@pytest.mark.parametrize(
    "options",
    [{"max_shard_size": "10KB"}, {"max_shard_size": 10}, {"variant": "fp16"}, {"push_to_hub": True},
     {"distributed_checkpoint": True}, {"state_dict": {}}, {"max_shard_size": "big"},
     {"safe_serialization": False}],
    ids=str,
)  # fmt: skip
def test_options_without_a_place_in_the_format_are_refused(options, tmp_path):
    with pytest.raises((fastgate.Unsupported, fastgate.ArgumentError), match=next(iter(options))):
        pruned().save_pretrained(tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_a_state_dict_and_ranks(tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    model.save_pretrained(tmp_path / "half", state_dict={k: v.half() for k, v in model.state_dict().items()})
    assert fastgate.load(tmp_path / "half").dtype == torch.float16


class Own(transformers.BertPreTrainedModel):
    """A class of the user's own, as in many a paper's code."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.score = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, **inputs):
        return self.score(self.bert(**inputs).pooler_output)


@torch.no_grad()
def test_a_class_of_the_users_own_is_not_read_as_a_whole_model(tmp_path):
    torch.manual_seed(0)
    model = Own(make("Bert", "Model").config).eval()
    fastgate.patch(model)
    model.save_pretrained(tmp_path / "plain")
    Own.from_pretrained(tmp_path / "plain")
    fastgate.prune(model, keep=[1])
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        shutil.rmtree(tmp_path / "pruned", ignore_errors=True)
        one.save_pretrained(tmp_path / "pruned")
        with pytest.raises(ValueError, match="pip install fastgate"):
            Own.from_pretrained(tmp_path / "pruned")
    with pytest.raises(fastgate.CheckpointError, match=r"Own.*load_state_dict"):
        fastgate.load(tmp_path / "pruned")
    inputs = batch(model, "Model")
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "pruned")
    assert torch.allclose(encoder(**inputs).pooler_output, model.bert(**inputs).pooler_output, atol=1e-6)
    again = fastgate.prune(Own(model.config), keep=[1]).eval()
    from safetensors.torch import load_file

    again.load_state_dict(load_file(tmp_path / "pruned" / WEIGHTS))
    assert torch.equal(again(**inputs), model(**inputs))
    restored = fastgate.unpatch(fastgate.patch(Own(model.config)))
    assert "save_pretrained" not in restored.__dict__


def test_a_pipeline_and_its_tokenizer(tmp_path):
    base = tiny_models.model_folder(tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    fastgate.save(fastgate.prune(model.eval(), keep=[1]), tmp_path / "x", tokenizer)
    (tmp_path / "x" / "tokenizer_config.json").unlink()  # then the model_type decides
    text = "good film two three"
    ours = transformers.pipeline("text-classification", model=str(tmp_path / "x"))
    theirs = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    assert ours(text) == theirs(text)
    hidden = transformers.pipeline("feature-extraction", model=str(tmp_path / "x"))(text)
    assert len(hidden[0]) == len(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sentence_transformers(pooling, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    first = modules.Transformer(str(tiny_models.model_folder(tmp_path / "base")))
    model = SentenceTransformer(modules=[first, modules.Pooling(32, pooling)], device="cpu")
    draw_replacements(fastgate.prune(model, keep=[0], replacement="shift"))
    texts = ["good film story", "bad"]
    want = model.encode(texts)
    model.save_pretrained(str(tmp_path / "x"))
    again = SentenceTransformer(str(tmp_path / "x"), device="cpu")
    assert abs(again.encode(texts) - want).max() < 1e-6
    assert abs(fastgate.patch(again).encode(texts) - want).max() < 1e-6
    with pytest.raises(fastgate.ArgumentError, match=r"its own save_pretrained\(path\)"):
        fastgate.save(model, tmp_path / "y")


def test_a_demand_for_the_first_row_does_not_reach_other_loaders(tmp_path):
    """They may read any row, so every attended one must be computed."""
    model = fastgate.prune(fastgate.patch(make("Bert", "Model"), demand="first"), keep=[1])
    fastgate.save(model, tmp_path)
    assert fastgate.explain(fastgate.load(tmp_path)).demand == "first"
    assert fastgate.explain(transformers.AutoModel.from_pretrained(tmp_path)).demand == "attended"
