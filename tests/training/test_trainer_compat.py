"""What fastgate needs of transformers' Trainer is checked, and the error names the version."""

from __future__ import annotations

import pytest
import transformers
from transformers import TrainerState, TrainingArguments

from fastgate.errors import CheckpointError, Unsupported
from fastgate.training import trainer_compat


@pytest.fixture(autouse=True)
def _check_again():
    trainer_compat.check_trainer.cache_clear()
    yield
    trainer_compat.check_trainer.cache_clear()


def test_the_installed_trainer_is_supported():
    trainer_compat.check_trainer()


def _without_ratios(self, args, max_steps):
    self.save_steps = 500


@pytest.mark.parametrize(
    "owner, name, value, reason",
    [
        (trainer_compat, "_ExportableState", object, "no trainer_callback.ExportableState"),
        (TrainingArguments, "get_warmup_steps", lambda self, steps: 0, "warmup_steps below 1"),
        (TrainerState, "compute_steps", _without_ratios, "save_steps below 1"),
        (trainer_compat.Clock, "state", lambda self: {}, "callback states"),
    ],
)
def test_another_trainer_is_refused_by_its_version(monkeypatch, owner, name, value, reason):
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(Unsupported, match=f"version {transformers.__version__} with .*{reason}"):
        trainer_compat.check_trainer()


def test_a_checkpoint_without_the_clock_is_refused():
    state = TrainerState(global_step=3, stateful_callbacks=[])
    with pytest.raises(CheckpointError, match="without the state of Clock"):
        trainer_compat.Clock().on_train_begin(None, state, None)
