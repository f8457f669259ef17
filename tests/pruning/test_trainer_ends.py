"""A train() that ends early, by a callback or an exception: what it says, gives back and goes on from."""

import pytest
from helpers.training_loop import facts
from transformers import TrainerCallback

from fastgate.errors import ArgumentError

pytestmark = pytest.mark.slow


class Stop(TrainerCallback):
    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.error is not None:
                raise self.error
            control.should_training_stop = True


def test_a_training_that_ends_before_hardening_says_so(tmp_path):
    from helpers.trainer_runs import trainer

    found = trainer(tmp_path, callbacks=[Stop(5)])
    found._teacher.requires_grad_(True)
    with pytest.raises(ArgumentError, match=r"train: steps: got an end after step 5 of 12, wanted 8 steps"):
        found.train()
    assert set(facts(found.model)[0]) == {0.1} and found.pruner.handle.gates == [1.0] * 3
    assert found.pruner.handle.runtime.trace is None
    found.pruner.harden()
    found.pruner.finalize()
    assert len(found.pruner.kept) == 1 and found.pruner.handle.runtime.trace is None


def test_a_training_that_ends_after_hardening_is_pruned(tmp_path):
    from helpers.trainer_runs import trainer

    found = trainer(tmp_path, callbacks=[Stop(9)])
    found.train()
    assert len(found.pruner.kept) == 1 and found.pruner.handle.is_removed(0) == (0 not in found.pruner.kept)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", [1, 5, 9])
def test_an_exception_gives_back_what_was_changed(tmp_path, error, step):
    from helpers.trainer_runs import bert as small
    from helpers.trainer_runs import trainer

    found = trainer(tmp_path, callbacks=[Stop(step, error)], save_strategy="no")
    before = facts(small(seed=5))
    with pytest.raises(type(error)):
        found.train()
    assert set(facts(found.model)[0]) == {0.1} and found.pruner.handle.runtime.trace is None
    assert facts(found._teacher) == before
    kept = found.pruner.kept
    assert found.pruner.handle.gates == ([1.0] * 3 if kept is None else [float(i in kept) for i in range(3)])


def test_a_training_goes_on_after_an_exception_as_if_there_had_been_none(tmp_path):
    from helpers.trainer_runs import assert_same_end, end_state, trainer

    whole = trainer(tmp_path / "whole")
    whole.train()
    stop = Stop(7, RuntimeError("out of memory"))
    found = trainer(tmp_path / "cut", callbacks=[stop])
    with pytest.raises(RuntimeError):
        found.train()
    stop.step = -1
    found.train(resume_from_checkpoint=True)
    assert_same_end(end_state(whole), end_state(found))


def test_too_few_steps_are_refused_before_the_first(tmp_path):
    from helpers.trainer_runs import trainer

    found = trainer(tmp_path, max_steps=2)
    with pytest.raises(ArgumentError, match="total_steps: got 2, wanted 3 or more"):
        found.train()
    assert found.pruner.steps == 0 == found.state.global_step


def test_a_second_train_says_whether_the_first_ended(tmp_path):
    from helpers.trainer_runs import trainer

    found = trainer(tmp_path, callbacks=[Stop(5, RuntimeError("out of memory"))], save_strategy="no")
    with pytest.raises(RuntimeError):
        found.train()
    message = r"trained for 4 steps by a train\(\) that did not end.*resume_from_checkpoint=True"
    with pytest.raises(ArgumentError, match=message):
        found.train()
