"""The replacements in an optimizer: their rates, in every order of calls; that they train at all."""

import warnings

import pytest
import torch
from helpers.training_loop import TOTAL, a_pruner, batch, bert, config, facts, loss_of, run

import fastgate
from fastgate.errors import ArgumentError
from fastgate.pruning import Fixed

pytestmark = pytest.mark.slow


def rates(model, optimizer):
    """Parameter -> (its learning rate, its weight decay), each of them once in the optimizer."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer.param_groups
    settings = [(id(p), group["lr"], group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(settings) == len({p for p, *_ in settings}) == len(names)
    return {names[p]: tuple(rest) for p, *rest in settings}


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("ratio", [1.0, 20.0])
def test_an_optimizer_gets_the_replacements_whenever_it_is_made(made, ratio):
    model = bert()
    settings = config(replacement_lr=ratio)
    if made == "before":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        fastgate.Pruner(model, settings, TOTAL, optimizer=optimizer)
    else:
        pruner = fastgate.Pruner(model, settings, TOTAL)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        pruner.prepare_optimizer(optimizer)
    for name, setting in rates(model, optimizer).items():
        assert setting == (ratio * 1e-3 if ".replacement." in name else 1e-3, 0.1), name


def test_added_replacements_have_the_settings_of_the_norm_beside_them():
    model = bert()
    named = dict(model.named_parameters())
    plain = [p for name, p in named.items() if "LayerNorm" in name or name.endswith("bias")]
    decayed = [p for name, p in named.items() if not ("LayerNorm" in name or name.endswith("bias"))]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 2e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    fastgate.Pruner(model, config(replacement_lr=10.0), TOTAL, optimizer=optimizer)
    assert {setting for name, setting in rates(model, optimizer).items() if ".replacement." in name} == {
        (2e-2, 0.0)
    }
    replaced = bert()
    optimizer = torch.optim.AdamW(replaced.parameters())
    fastgate.Pruner(replaced, config(replacement="zero"), TOTAL, optimizer=optimizer)
    assert len(optimizer.param_groups) == 1  # there is nothing to add


@pytest.mark.parametrize("made", ["before", "after"])
def test_a_scheduler_is_made_after_the_rates_are_set(made):
    model = bert(dropout=0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if made == "before":
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        with pytest.raises(
            ArgumentError, match=r"got an optimizer that has a scheduler.*before the scheduler"
        ):
            fastgate.Pruner(model, config(), TOTAL, bert(seed=1), optimizer=optimizer)
        assert len(optimizer.param_groups) == 1 and set(facts(model)[0]) == {0.4}
        assert not any("replacement" in name for name, _ in model.named_parameters())
        return
    pruner = fastgate.Pruner(model, config(), TOTAL, optimizer=optimizer)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    pruner.prepare_optimizer(optimizer)  # which changes nothing
    assert len(optimizer.param_groups) == 2


def test_a_model_with_nothing_to_train_is_refused():
    """As PEFT leaves it after merge_and_unload()."""
    model = bert().requires_grad_(False)
    pruner = a_pruner(model)
    with pytest.raises(ArgumentError, match=r"every weight with requires_grad False.*requires_grad_\(True\)"):
        run(pruner, model.train(), 1)
    model = bert()
    model.bert.requires_grad_(False)
    run(a_pruner(model), model, 3)


def test_rates_are_set_once():
    model = bert()
    pruner = a_pruner(model, replacement_lr=20.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        pruner.prepare_optimizer(optimizer)
        assert sorted(group["lr"] for group in optimizer.param_groups) == [1e-3, 2e-2]


@pytest.mark.parametrize("target", [fastgate.Sparsity(0.5), Fixed((1, 2))])
def test_replacements_that_never_train_are_noticed(target):
    """By who does not give the Pruner the optimizer."""
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner = a_pruner(model, target=target)

    def loop():
        for i in range(TOTAL):
            loss_of(pruner, model, batch(i)).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match="no replacement has moved since the warm phase"):
        loop()
    for trained in (target, Fixed(tuple(range(4)))):  # with every attention kept there is none to train
        model = bert()
        pruner = a_pruner(model, target=trained)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Pruner: no replacement")
            run(pruner, model, TOTAL)


def test_a_trainer_with_an_optimizer_made_before_is_refused(tmp_path):
    from helpers.trainer_runs import arguments, rows
    from helpers.trainer_runs import bert as small
    from helpers.trainer_runs import config as pruning

    model = small()
    optimizers = (torch.optim.AdamW(model.parameters()), None)
    with pytest.raises(
        ArgumentError, match=r"optimizers: got an optimizer without .*optimizer_cls_and_kwargs"
    ):
        fastgate.SelfPruningTrainer(
            model, arguments(tmp_path), pruning=pruning(), train_dataset=rows(), optimizers=optimizers
        )
    assert not any("replacement" in name for name, _ in model.named_parameters())
