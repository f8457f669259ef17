"""Models and teachers that a Pruner refuses: adapters, wrappers, frozen ones, other labels."""

import pytest
from helpers.training_loop import a_pruner, bert
from torch import nn

import fastgate
from fastgate.errors import ArgumentError, Unsupported
from fastgate.pruning import Distill

pytestmark = pytest.mark.slow


class Adapter(nn.Linear):
    """As a layer that PEFT puts into a model."""

    __module__ = "peft.tuners.lora.layer"


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_with_adapters_is_refused(whole):
    model = bert()
    if whole:
        model = nn.Sequential(model)
        model.__class__ = type("PeftModel", (nn.Sequential,), {"__module__": "peft.peft_model"})
    else:
        query = model.bert.encoder.layer[1].attention.self.query
        query.__class__ = Adapter
    with pytest.raises(Unsupported, match=r"a \w+ of PEFT.*merge_and_unload.*fastgate\.save"):
        a_pruner(model)


def test_a_wrapper_that_shares_gradients_comes_after_the_pruner():
    """It would not share those of the replacements."""
    with pytest.raises(Unsupported, match="got a model inside DataParallel, wanted the model itself"):
        a_pruner(nn.DataParallel(bert()))


def test_lora_is_refused_and_what_it_is_merged_into_is_not():
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query", "value"], r=2))
    for model in (made, made.base_model.model):
        with pytest.raises(Unsupported, match="merge_and_unload"):
            a_pruner(model)
    a_pruner(made.merge_and_unload().requires_grad_(True))


def test_a_frozen_model_is_refused():
    model = fastgate.freeze(fastgate.patch(bert().eval()))
    with pytest.raises(ArgumentError, match=r"model: got .* frozen, wanted a model to train.*fastgate\.thaw"):
        a_pruner(model)
    a_pruner(fastgate.thaw(model))


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        (["NEG", "POS"], ["POS", "NEG"], False),
        (["NEG", "POS"], ["neg", "pos"], True),
        (["NEG", "POS"], ["LABEL_0", "LABEL_1"], True),
        (["LABEL_0", "LABEL_1"], ["LABEL_0", "LABEL_1"], True),
    ],
)
def test_a_teacher_has_the_labels_in_the_same_order(mine, theirs, same):
    model, teacher = bert(), bert(seed=1)
    for one, names in ((model, mine), (teacher, theirs)):
        one.config.id2label = dict(enumerate(names))
    if same:
        a_pruner(model, teacher)
        return
    with pytest.raises(ArgumentError, match=r"teacher: got the labels \['pos', 'neg'\], wanted"):
        a_pruner(model, teacher)
    a_pruner(model, teacher, distill=Distill(logits=0.0))
