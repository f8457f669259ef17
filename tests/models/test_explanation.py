"""What `explain` says of a model, and what it cannot take."""

import numpy
import pytest
import torch
from helpers.encoders import make
from torch import nn

import fastgate

HEAD = "ForSequenceClassification"


@pytest.mark.parametrize("model", ["a/path", None, 3, {"a": 1}])
def test_what_is_no_model(model):
    with pytest.raises(fastgate.ArgumentError, match=r"explain: model.*fastgate.patch"):
        fastgate.explain(model)


def test_a_model_that_is_not_patched():
    for model in (make("Bert", HEAD), nn.Linear(2, 2)):
        with pytest.raises(fastgate.NothingPatched):
            fastgate.explain(model)


@pytest.mark.parametrize("lengths", [[], 5, [0], [-1, 3], [1.5], "abc", [[3]], [None], torch.zeros(0)])
def test_lengths_that_are_no_batch(lengths):
    model = fastgate.patch(make("Bert", HEAD))
    with pytest.raises(fastgate.ArgumentError, match="explain: lengths"):
        fastgate.explain(model, lengths)


def test_whole_numbers_of_every_kind_are_lengths():
    model = fastgate.patch(make("Bert", HEAD))
    want = fastgate.explain(model, [5, 3])
    assert want.unpadded_rows == 8 and want.output_rows == 2
    for lengths in ((5, 3), numpy.array([5, 3]), torch.tensor([5, 3]), iter([5, 3]), range(5, 1, -2)):
        assert fastgate.explain(model, lengths) == want


def test_what_would_be_refused_is_refused():
    model = fastgate.patch(make("Bert", HEAD))
    model.bert.encoder.layer[1].attention.register_forward_hook(lambda *_: None)
    with pytest.raises(fastgate.Unsupported, match=r"layer.1.attention"):
        fastgate.explain(model)


def test_modules_that_are_called_are_named():
    model = fastgate.patch(make("Bert", HEAD))
    layer = model.bert.encoder.layer[1]
    layer.output.LayerNorm = nn.Sequential(layer.output.LayerNorm)
    layer.attention.output.dropout = nn.Dropout1d(0.1)
    layer.attention.self.query = nn.Sequential(layer.attention.self.query)
    notes = fastgate.explain(model).layers[1].notes
    assert notes == (
        "attention.self.query called as Sequential",
        "attention.output.dropout called as Dropout1d",
        "output.LayerNorm called as Sequential",
    )
    assert not fastgate.explain(model).layers[0].notes


def test_shares_are_of_the_tokens_alone_where_padding_is_computed_too():
    """A head for questions reads every row: more is computed than the unpruned model needs for the tokens."""
    model = fastgate.patch(make("Bert", "ForQuestionAnswering"))
    tokens = fastgate.patch(make("Bert", "ForTokenClassification"))
    lengths = [3, 12, 20]
    assert fastgate.explain(tokens, lengths).flops_share == 1.0
    share = fastgate.explain(model, lengths).flops_share
    assert share == fastgate.explain(model, lengths).flops / fastgate.explain(tokens, lengths).flops > 1.4


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([32] * 8, "batch: 8 sequences of 32 tokens"),
        ([7], "batch: 1 sequence of 7 tokens"),
        ([8, 16, 32], "batch: 3 sequences of 8, 16, 32 tokens"),
        (range(1, 11), "batch: 10 sequences of 1 to 10 tokens, 5.5 on average"),
    ],
)
def test_the_text_says_which_lengths_it_refers_to(lengths, words):
    explanation = fastgate.explain(fastgate.patch(make("Bert", HEAD)), lengths)
    assert str(explanation).splitlines()[0] == words
    assert explanation.lengths == tuple(lengths) == tuple(explanation.to_dict()["lengths"])


@pytest.mark.parametrize(("prefix", "head"), [("Bert", HEAD), ("Roberta", "ForTokenClassification")])
def test_a_sequence_beyond_the_position_table_is_refused(prefix, head):
    """RoBERTa's first positions belong to the padding."""
    model = fastgate.patch(make(prefix, head)).eval()
    config = model.config
    limit = config.max_position_embeddings - (config.pad_token_id + 1 if prefix == "Roberta" else 0)
    assert fastgate.explain(model, [3, limit]).unpadded_rows == 3 + limit
    ids = torch.full((1, limit), 7)
    model(input_ids=ids)  # as long as a forward takes
    with pytest.raises(
        fastgate.ArgumentError, match=rf"got a sequence of {limit + 1} tokens, wanted at most {limit}"
    ):
        fastgate.explain(model, [3, limit + 1])


def test_a_share_above_100_percent_is_explained():
    question = fastgate.patch(make("Bert", "ForQuestionAnswering"))
    assert "The share is above 100% because" in str(fastgate.explain(question, [3, 12, 20]))
    assert "above 100%" not in str(fastgate.explain(question, [12, 12]))


def test_the_text_fits_in_80_columns_and_says_every_note():
    model = fastgate.patch(make("Bert", HEAD))
    layer = model.bert.encoder.layer[1]
    layer.output.LayerNorm = nn.Sequential(layer.output.LayerNorm)
    layer.attention.output.dropout = nn.Dropout1d(0.1)
    layer.attention.self.query = nn.Sequential(layer.attention.self.query)
    explanation = fastgate.explain(model, range(1, 30))
    text = str(explanation)
    assert max(map(len, text.splitlines())) <= 80 and "\u2026" not in text
    words = set(text.replace(",", "").split())
    assert all(set(note.split()) <= words for note in explanation.layers[1].notes)
