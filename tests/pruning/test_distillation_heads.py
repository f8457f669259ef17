"""Distillation for every head of transformers: its own loss, its own rows, also where a batch has none."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers.training_loop import batch, bert, pruning_loss_of
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

import fastgate
from fastgate.errors import ArgumentError
from fastgate.pruning import Distill
from fastgate.pruning.distillation import hidden_loss, scored_rows
from fastgate.pruning.token_swap import swap_tokens

pytestmark = pytest.mark.slow


def head(cls=BertForSequenceClassification, seed=0, **settings):
    """A BERT of four layers without dropout under the head; settings: of its config."""
    config = bert().config
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    return cls(config)


def pruner_of(model, teacher, distill=None, total=50):
    distill = distill or Distill(logits=1.0, hidden=0.0, swap=0.0)
    config = fastgate.PruningConfig(fastgate.Sparsity(0.5), distill=distill, warm=0.1)
    return fastgate.Pruner(model, config, total, teacher)


def token_labels(inputs, share=2):
    labels = inputs["input_ids"] % 2
    return torch.where((inputs["input_ids"] % share == 0) & inputs["attention_mask"].bool(), labels, -100)


def inputs_of(cls):
    inputs = batch()
    del inputs["labels"]
    rows = inputs["input_ids"].shape[0]
    if cls is BertForMultipleChoice:
        inputs = {name: value.view(2, 3, -1) for name, value in inputs.items()}
        return inputs | {"labels": torch.tensor([0, 2])}
    if cls in (BertForTokenClassification, BertForMaskedLM):
        return inputs | {"labels": token_labels(inputs)}
    if cls is BertForPreTraining:
        return inputs | {"labels": token_labels(inputs), "next_sentence_label": torch.arange(rows) % 2}
    if cls is BertForQuestionAnswering:
        return inputs | {
            "start_positions": torch.zeros(rows).long(),
            "end_positions": torch.ones(rows).long(),
        }
    if cls is BertModel:
        return inputs
    return inputs | {"labels": torch.arange(rows) % 2}


HEADS = [
    BertForSequenceClassification,
    BertForTokenClassification,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
]


def softened(mine, theirs, temperature=2.0):
    p, q = F.softmax(theirs / temperature, -1), F.softmax(mine / temperature, -1)
    return temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()


def rows_scored(cls, outputs, inputs):
    """Each tensor of scores, (rows, classes), of the rows that are scored."""
    labels, mask = inputs.get("labels"), inputs["attention_mask"].bool()
    for name in ("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits"):
        scores = outputs.get(name)
        if scores is None:
            continue
        if scores.dim() == 3:
            scores = scores[mask & (labels != -100)]
        yield scores.reshape(-1, scores.shape[-1])


@pytest.mark.parametrize("cls", HEADS)
def test_the_scores_of_each_head_are_compared_as_it_is_trained(cls):
    model, teacher = head(cls), head(cls, seed=7)
    plain = [copy.deepcopy(one) for one in (model, teacher)]
    inputs = inputs_of(cls)
    pruner = pruner_of(model, teacher)
    model.train()
    found = pruning_loss_of(pruner, model, inputs)
    pairs = zip(*(list(rows_scored(cls, one(**inputs), inputs)) for one in plain), strict=True)
    torch.testing.assert_close(found, sum(softened(m, t) for m, t in pairs), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cls", [*HEADS, BertModel])
@pytest.mark.parametrize("distill", [Distill(), Distill.for_tokens()])
def test_a_copy_has_nothing_to_teach_and_another_model_has(cls, distill):
    inputs = inputs_of(cls)
    terms = []
    for seed in (0, 7):
        model = head(cls)
        pruner = pruner_of(model, head(cls, seed=seed), distill)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train()
        loss = pruning_loss_of(pruner, model, inputs)
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        terms.append(float(loss))
    assert terms[0] == pytest.approx(0.0, abs=1e-6) and terms[1] > 1e-2


@pytest.mark.parametrize("told", [True, False])
def test_labels_of_a_multi_label_head_are_compared_one_by_one(told):
    """Whether the config says so or, as in transformers, the labels do."""
    settings = {"num_labels": 3} | ({"problem_type": "multi_label_classification"} if told else {})
    model = head(**settings)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher.classifier.bias += 5.0  # which a softmax does not see
    inputs = batch()
    inputs["labels"] = torch.eye(3).repeat(2, 1)
    plain = copy.deepcopy(model)(**inputs).logits, copy.deepcopy(teacher)(**inputs).logits
    mine, theirs = (torch.sigmoid(x / 2) for x in plain)
    each = F.binary_cross_entropy(mine, theirs) - F.binary_cross_entropy(theirs, theirs)
    pruner = pruner_of(model, teacher)
    found = pruning_loss_of(pruner, model.train(), inputs)
    torch.testing.assert_close(found, 4 * each, rtol=1e-4, atol=1e-6)


def test_one_label_alone_is_a_sigmoid_where_the_config_says_so():
    model = head(num_labels=1, problem_type="multi_label_classification")
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher.classifier.bias += 3.0
    inputs = batch()
    inputs["labels"] = torch.ones(6, 1)
    mine, theirs = (copy.deepcopy(one)(**inputs).logits / 2 for one in (model, teacher))
    p, q = torch.sigmoid(theirs), torch.sigmoid(mine)
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    pruner = pruner_of(model, teacher)
    torch.testing.assert_close(pruning_loss_of(pruner, model.train(), inputs), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{"num_labels": 1}, {"num_labels": 3, "problem_type": "regression"}])
def test_regressions_are_compared_by_the_squared_difference(settings):
    model = head(**settings)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher.classifier.bias += 0.5
    inputs = batch()
    inputs["labels"] = torch.zeros(6, settings["num_labels"])
    pruner = pruner_of(model, teacher)
    found = pruning_loss_of(pruner, model.train(), inputs)
    torch.testing.assert_close(found, torch.tensor(0.25), rtol=1e-4, atol=1e-6)


# -- batches without rows


@pytest.mark.parametrize("cls", [BertForTokenClassification, BertForMaskedLM, BertForPreTraining])
@pytest.mark.parametrize(
    "distill", [Distill(), Distill.for_tokens(), Distill(logits=0.0), Distill(hidden=0.0)]
)
@pytest.mark.parametrize("teaches", [True, False])
def test_a_batch_without_a_label_is_finite(cls, distill, teaches):
    model = head(cls)
    pruner = pruner_of(model, head(cls, seed=7) if teaches else None, distill)
    inputs = inputs_of(cls)
    inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
    loss = pruning_loss_of(pruner, model.train(), inputs)
    assert torch.isfinite(loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("cls", [*HEADS, BertModel])
def test_a_batch_of_padding_alone_is_finite(cls):
    model = head(cls)
    pruner = pruner_of(model, head(cls, seed=7), Distill())
    inputs = inputs_of(cls)
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    inputs = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    loss = pruning_loss_of(pruner, model.train(), inputs)
    assert torch.isfinite(loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_whole_training_with_batches_without_labels_ends_finite():
    model = head(BertForTokenClassification)
    pruner = pruner_of(model, head(BertForTokenClassification, seed=7), Distill.for_tokens(), total=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner.prepare_optimizer(optimizer)
    model.train()
    for i in range(20):
        inputs = batch(i)
        inputs["labels"] = token_labels(inputs) if i % 3 else torch.full_like(inputs["input_ids"], -100)
        inputs = pruner.prepare(inputs)
        outputs = model(**inputs)
        pruner.loss(outputs, inputs, outputs.loss if i % 3 else torch.zeros(())).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert len(pruner.kept) == 2 and all(torch.isfinite(p).all() for p in pruner.finalize().parameters())


def test_labelled_padding_is_not_distilled():
    """The teacher, which does not know the labels, computes no padding: nothing may be matched with it."""
    model, teacher = head(BertForTokenClassification), head(BertForTokenClassification, seed=7)
    inputs = batch()
    inputs["labels"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"] % 2, -100)
    padding = copy.deepcopy(inputs)
    padding["labels"] = padding["input_ids"] % 2
    assert torch.equal(scored_rows(padding), inputs["attention_mask"].bool())
    pruner = pruner_of(model, teacher, Distill(hidden=0.0, swap=0.0))
    model.train()
    found = [pruning_loss_of(pruner, model, one) for one in (inputs, padding)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_hidden_rows_that_the_teacher_lacks_count_as_equal():
    mine = (torch.tensor([0, 1, 5]), torch.ones(3, 2))
    theirs = (torch.tensor([0, 1]), torch.zeros(2, 2))
    found = hidden_loss([mine, mine], [theirs, theirs], [0])
    assert float(found) == pytest.approx(2 / 3)
    none = (torch.tensor([], dtype=torch.long), torch.zeros(0, 2))
    assert float(hidden_loss([none, none], [theirs, theirs], [0])) == 0.0
    assert float(hidden_loss([mine, mine], [none, none], [0])) == 0.0


def test_choices_are_swapped_as_rows():
    inputs = inputs_of(BertForMultipleChoice)
    flat = {name: value.reshape(6, -1) for name, value in inputs.items() if name != "labels"}
    swapped = swap_tokens(inputs, 0.5, torch.Generator().manual_seed(0))["input_ids"]
    expected = swap_tokens(flat, 0.5, torch.Generator().manual_seed(0))["input_ids"]
    assert torch.equal(swapped.reshape(6, -1), expected) and not torch.equal(swapped, inputs["input_ids"])


# -- teachers that cannot be compared


@pytest.mark.parametrize(
    ("student", "teacher", "distill", "message"),
    [
        ({"num_labels": 2}, {"num_labels": 3}, Distill(), "with 3 labels, wanted .* with 2 labels"),
        ({}, {"vocab_size": 41}, Distill(), "41 entries in the vocabulary, wanted 40"),
        ({}, {"hidden_size": 32}, Distill(), "32 hidden units, wanted 16"),
        ({}, {"num_hidden_layers": 3}, Distill(), "3 layers, wanted 4"),
        ({}, {"cls": BertForTokenClassification}, Distill(), "ForTokenClassification with 2 labels, wanted"),
        ({}, {"cls": BertModel}, Distill(), "got no head"),
    ],
)
def test_a_teacher_that_cannot_be_compared_is_refused_at_once(student, teacher, distill, message):
    model = head(**student)
    with pytest.raises(ArgumentError, match=f"Pruner: teacher: .*{message}"):
        pruner_of(model, head(**teacher), distill)


@pytest.mark.parametrize("other", [{"num_hidden_layers": 3}, {"hidden_size": 32}])
def test_a_teacher_of_another_shape_teaches_scores(other):
    model = head()
    pruner = pruner_of(model, head(seed=7, **other), Distill(hidden=0.0, swap=0.0))
    inputs = batch()
    assert float(pruning_loss_of(pruner, model.train(), inputs).detach()) > 0.0


def test_a_teacher_with_the_students_weights_is_refused():
    model = head()
    other = BertForSequenceClassification(model.config)
    other.bert = model.bert
    with pytest.raises(ArgumentError, match="teacher: got a model that shares weights"):
        pruner_of(model, other)
    assert all(p.requires_grad for p in model.parameters())


def test_a_tuple_of_outputs_is_refused():
    model = head()
    pruner = pruner_of(model, head(seed=7))
    inputs = batch()
    with pytest.raises(ArgumentError, match=r"outputs: got tuple, wanted .*return_dict=True"):
        pruning_loss_of(pruner, model.train(), inputs, return_dict=False)


def test_nothing_to_distil_is_refused():
    model = head(BertModel)
    pruner = pruner_of(model, head(BertModel, seed=7), Distill(hidden=0.0, swap=0.0))
    inputs = inputs_of(BertModel)
    with pytest.raises(ArgumentError, match="distill: got outputs without scores"):
        pruning_loss_of(pruner, model.train(), inputs)


def test_roberta_heads_are_known_too():
    config = transformers.RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.RobertaForTokenClassification(config)
    config = copy.deepcopy(config)
    config.num_labels = 4
    with pytest.raises(ArgumentError, match="with 4 labels, wanted ForTokenClassification with 3 labels"):
        pruner_of(model, transformers.RobertaForTokenClassification(config))
