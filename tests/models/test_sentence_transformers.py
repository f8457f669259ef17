"""A patched model of sentence-transformers against the same one unpatched: embeddings and rows computed."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import tiny_models
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules

import fastgate
from fastgate.models.handle import get_encoder

TEXTS = [
    "the film was good",
    "a story",
    "she went to paris, and he went to london in the very plot of the film it was not",
    "bad",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_models.model_folder(tmp_path_factory.mktemp("sentence") / "bert")
    from transformers import BertModel

    model = BertModel.from_pretrained(folder)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return str(folder)


def build(folder, pooling="cls", after=(), side="right", **options):
    first = modules.Transformer(folder)
    first.tokenizer.padding_side = side
    pooled = modules.Pooling(32, pooling, **options)
    return SentenceTransformer(modules=[first, pooled, *after], device="cpu").eval()


def rows(model):
    with get_encoder(model).record() as trace:
        model.encode(TEXTS)
    return trace.steps[-1].rows


def count(model):
    """Attended tokens of TEXTS, and token 0 of each, which BERT's pooler reads."""
    read = model.preprocess(TEXTS)["attention_mask"].bool()
    read[:, 0] = True
    return int(read.sum())


def assert_same(model, patched, **options):
    want = model.encode(TEXTS, convert_to_tensor=True, **options)
    got = patched.encode(TEXTS, convert_to_tensor=True, **options)
    assert want.abs().max() > 0.01
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


class Reader(modules.Pooling):
    """Somebody's own pooling: more than the first token, whatever its mode says."""

    def forward(self, features, **kwargs):
        features["sentence_embedding"] = features["token_embeddings"].sum(1)
        return features


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "pooling", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ("cls", "mean")]
)
def test_every_pooling_gives_the_same_embeddings(folder, pooling, side):
    model = build(folder, pooling, side=side)
    patched = fastgate.patch(copy.deepcopy(model))
    assert isinstance(patched, SentenceTransformer)
    assert_same(model, patched)
    assert_same(model, patched, normalize_embeddings=True)
    assert_same(model, patched, batch_size=1)
    assert_same(model, patched, prompt="the plot: ")
    assert rows(patched) == (len(TEXTS) if pooling == "cls" else count(model))


AFTER = {
    "normalise": ([modules.Normalize()], True),
    "dense": ([modules.Dense(32, 8), modules.Normalize()], True),
    "norm and dropout": ([modules.LayerNorm(32), modules.Dropout(0.1)], True),
    "dense over tokens": ([modules.Dense(32, 32, module_input_name="token_embeddings")], False),
    "pooled twice": ([modules.Pooling(32, "mean")], False),
    "of their own": ([torch.nn.Identity()], False),
}


@pytest.mark.parametrize("what", AFTER)
def test_what_stands_behind_cls_pooling(folder, what):
    after, output_rows_only = AFTER[what]
    model = build(folder, "cls", copy.deepcopy(after))
    patched = fastgate.patch(copy.deepcopy(model))
    assert_same(model, patched)
    assert rows(patched) == (len(TEXTS) if output_rows_only else count(model))
    assert fastgate.explain(patched).demand == ("start" if output_rows_only else "attended")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_prompts_left_out_of_the_pooling(folder, pooling, side):
    """CLS pooling then takes the token after the prompt: every row is read."""
    model = build(folder, pooling, side=side, include_prompt=False)
    patched = fastgate.patch(copy.deepcopy(model))
    assert_same(model, patched, prompt="the plot: ")
    assert_same(model, patched)
    assert rows(patched) == count(model)


def test_a_changed_pooling_takes_effect_when_patched_again(folder):
    model = build(folder, "cls")
    patched = fastgate.patch(copy.deepcopy(model))
    assert rows(patched) == len(TEXTS)
    for each in (model, patched):
        each.set_pooling_include_prompt(False)
    assert_same(model, fastgate.patch(patched), prompt="the plot: ")
    for each in (model, patched):
        each[1].pooling_mode = "mean"
    assert_same(model, fastgate.patch(patched))


@pytest.mark.parametrize("change", ["pooling", "prompt"])
def test_encode_notices_a_changed_pooling(folder, change):
    model = build(folder, "cls")
    patched = fastgate.patch(copy.deepcopy(model))
    assert rows(patched) == len(TEXTS)
    for each in (model, patched):
        if change == "pooling":
            each[1].pooling_mode = "mean"
        else:
            each.set_pooling_include_prompt(False)
    assert_same(model, patched, prompt="the plot: ")
    assert "encode" not in vars(fastgate.unpatch(patched))


def test_a_pooling_of_ones_own_reads_every_token(folder):
    first = modules.Transformer(folder)
    model = SentenceTransformer(modules=[first, Reader(32, "cls")], device="cpu")
    patched = fastgate.patch(copy.deepcopy(model))
    assert rows(patched) == count(model)
    alone = [text for text in TEXTS if text == "bad"]  # padding, which it also sums up, is not claimed
    want, got = (m.encode(alone, convert_to_tensor=True) for m in (model, patched))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_token_embeddings_of_a_cls_model_are_there_when_asked_for(folder, copied):
    model = build(folder, "cls")
    patched = copied(fastgate.patch(copy.deepcopy(model)))
    assert rows(patched) == len(TEXTS)
    theirs, ours = (m.encode(TEXTS, output_value="token_embeddings") for m in (model, patched))
    for want, got in zip(theirs, ours, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert_same(model, patched)


def test_a_demand_that_the_pooling_exceeds_is_refused(folder):
    with pytest.raises(fastgate.ArgumentError, match=r"patch: demand: got \"first\", wanted the rows that"):
        fastgate.patch(build(folder, "mean"), demand="first")
    patched = fastgate.patch(build(folder, "cls"), demand="first")
    assert rows(patched) == len(TEXTS)


def test_pruned_copied_pickled_and_trained(folder):
    model = fastgate.prune(build(folder, "cls"), keep=[0])
    want = model.encode(TEXTS, convert_to_tensor=True)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again.encode(TEXTS, convert_to_tensor=True), want)
        assert rows(again) == len(TEXTS)
    model, gradients = build(folder, "cls"), []
    for each in (copy.deepcopy(model), fastgate.patch(copy.deepcopy(model))):
        features = each.preprocess(TEXTS)
        embeddings = each(features)["sentence_embedding"]  # of length 1: their squares have no gradient
        (embeddings @ torch.linspace(-1, 1, embeddings.shape[1])).sum().backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    for name, got in gradients[1].items():
        if "key.bias" not in name:
            torch.testing.assert_close(got, gradients[0][name], rtol=1e-3, atol=1e-5, msg=name)


def test_saved_by_sentence_transformers(folder, tmp_path):
    model = build(folder, "cls")
    patched = fastgate.patch(copy.deepcopy(model))
    patched.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert type(again[0].model).__module__.startswith("transformers.")
    assert_same(model, again)
    assert_same(model, fastgate.patch(again))
    encoder = fastgate.load(fastgate.save(patched[0].model, tmp_path / "encoder"))
    assert fastgate.explain(encoder).demand == "attended"


def test_rows_packed_by_flash_attention_are_refused_with_the_way_out(folder):
    patched = fastgate.patch(build(folder, "mean"))
    assert not patched[0].can_flatten_inputs
    features = patched.preprocess(TEXTS[:1]) | {"cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32)}
    with pytest.raises(fastgate.Unsupported, match=r"cu_seq_lens_q.*model\[0\]\.unpad_inputs = False"):
        patched(features)


def test_expanded_queries_read_their_padding(folder):
    expansion = {"strategy": "fixed", "attend": False, "length": 24, "token": "[MASK]"}
    model = modules.Transformer(folder, query_expansion=expansion).eval()
    patched = fastgate.patch(copy.deepcopy(model))
    features = model.preprocess(TEXTS, task="query")
    assert (features["attention_mask"] == 0).any()
    with torch.no_grad():
        want, got = (m(dict(features))["token_embeddings"] for m in (model, patched))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_the_real_one(minilm_path):
    model = SentenceTransformer(minilm_path, device="cpu")
    texts = ["a fine film", "no", "and then there was, all in all, nothing left to say about it"]
    patched = fastgate.patch(copy.deepcopy(model))
    want, got = (m.encode(texts, convert_to_tensor=True) for m in (model, patched))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert fastgate.explain(patched).demand == "attended"
    model[1].pooling_mode = patched[1].pooling_mode = "cls"
    fastgate.patch(patched)
    want, got = (m.encode(texts, convert_to_tensor=True) for m in (model, patched))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert fastgate.explain(patched).demand == "start"


def test_cross_encoders_and_sparse_encoders(folder, tmp_path):
    """They have heads of transformers, whose output rows are known."""
    from sentence_transformers import CrossEncoder, SparseEncoder
    from transformers import BertForMaskedLM

    model = CrossEncoder(folder, num_labels=1, device="cpu")
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])]
    want = model.predict(pairs)
    assert abs(fastgate.patch(model).predict(pairs) - want).max() < 1e-5
    assert fastgate.explain(model).demand == "first"

    BertForMaskedLM.from_pretrained(folder).save_pretrained(tmp_path / "mlm")
    tiny_models.tokenizer(tmp_path / "mlm").save_pretrained(tmp_path / "mlm")
    sparse = SparseEncoder(str(tmp_path / "mlm"), device="cpu")
    want = sparse.encode(TEXTS, convert_to_sparse_tensor=False)
    got = fastgate.patch(sparse).encode(TEXTS, convert_to_sparse_tensor=False)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_it_is_never_imported_by_fastgate():
    code = "import sys, torch; from fastgate.models import sentence_transformers; "
    code += "sentence_transformers.output_rows_by_module(torch.nn.Linear(2, 2)); "
    code += "print('sentence_transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
