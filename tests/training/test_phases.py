"""Training on a task in several sittings: the seconds of all of them are in the results."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_models

import fastgate
from fastgate.data import load_task
from fastgate.models.patching import patch
from fastgate.pruning import distiller, trainer_checkpoints
from fastgate.training import dense_model, load_tokenizer, phases, trainer_compat

pytestmark = pytest.mark.slow

STEPS = 12
FIT = phases.Fit(epochs=1, batch_size=4, lr=1e-3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(the folder of a model, its tokenizer, a task, the task's rows)."""
    folder = tmp_path_factory.mktemp("training")
    source = tiny_models.model_folder(folder / "model")
    tiny_models.sentiment_folder(folder / "data", **dict.fromkeys(("train", "validation", "test"), 4 * STEPS))
    task = load_task("sst2", folder / "data")
    tokenizer = load_tokenizer(source, task)
    return source, tokenizer, task, task.tokenize(tokenizer, 24)


class Killed(Exception):
    """Stands for the end of a process."""


def train(world, out, monkeypatch, kills=()):
    """Dense and pruned results by a clock that goes on by 10 s a step and 1 s whenever the Pruner reads it.

    kills: {phase: step at whose end the sitting is cut off}. Checkpoints come every three steps.
    """
    source, tokenizer, task, rows = world
    now = [1000.0]

    def ticking(seconds):
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(trainer_compat, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(distiller, "time", SimpleNamespace(perf_counter=lambda: ticking(1.0)))
    left = dict(kills)

    def listen(progress):
        ticking(10.0)
        if left.get(progress.phase) == progress.step:
            del left[progress.phase]
            raise Killed

    def sitting(phase):
        own = phases.TaskTrainer(task, out, tokenizer, rows, listen, save_every=0.25)
        if phase == phases.DENSE:
            torch.manual_seed(0)  # of the new head
            return own.dense(patch(dense_model(source, task)), FIT)
        return own.prune(fastgate.PruningConfig(fastgate.Sparsity(0.67)), FIT)

    results = {}
    for phase in (phases.DENSE, phases.PRUNE):
        if phase in left:
            with pytest.raises(Killed):
                sitting(phase)
            now[0] += 5000.0  # nobody trains
        results[phase] = sitting(phase)
        assert sitting(phase) == results[phase]  # read again
    return results


def test_seconds_are_those_of_every_sitting(world, tmp_path, monkeypatch):
    whole = train(world, tmp_path / "whole", monkeypatch)
    cut = train(world, tmp_path / "cut", monkeypatch, {"dense": 8, "prune": 11})
    for results in (whole, cut):
        assert results["dense"]["seconds"] == 10.0 * STEPS
        assert results["prune"]["teacher_seconds"] == 1.0 * STEPS
        assert results["prune"]["seconds"] == 12.0 * STEPS
    assert whole["prune"]["kept"] == cut["prune"]["kept"]
    assert whole["dense"]["scores"] == cut["dense"]["scores"]


def test_what_a_killed_run_was_writing_is_in_nobodys_way(world, tmp_path):
    """A checkpoint that is not whole and has a higher number: if it stayed, the new one would be deleted."""
    source, tokenizer, task, rows = world
    left = tmp_path / "work" / "dense" / f"checkpoint-{STEPS}"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    own = phases.TaskTrainer(task, tmp_path, tokenizer, rows, save_every=0.25)
    own.dense(patch(dense_model(source, task)), FIT)
    assert [path.name for path in trainer_checkpoints.checkpoints(left.parent)] == [left.name]
    assert trainer_checkpoints.is_complete(left)


def test_there_is_a_whole_dense_checkpoint_at_any_moment(world, tmp_path, monkeypatch):
    source, tokenizer, task, rows = world
    folder, seal, seen = tmp_path / "work" / "dense", trainer_compat.seal, []

    def watching(saved):
        seen.append(any(map(trainer_checkpoints.is_complete, trainer_checkpoints.checkpoints(folder))))
        seal(saved)

    monkeypatch.setattr(trainer_compat, "seal", watching)
    phases.TaskTrainer(task, tmp_path, tokenizer, rows, save_every=0.25).dense(
        patch(dense_model(source, task)), FIT
    )
    assert seen == [False, True, True, True]
    assert len(trainer_checkpoints.checkpoints(folder)) == 1


def test_a_checkpoint_just_saved_stays_whatever_the_numbers_of_an_earlier_run(tmp_path):
    for step in (3, 6, 500):
        (tmp_path / f"checkpoint-{step}").mkdir()
    trainer_checkpoints.rotate(tmp_path, 1, None, tmp_path / "checkpoint-6")
    assert [path.name for path in trainer_checkpoints.checkpoints(tmp_path)] == [
        "checkpoint-6",
        "checkpoint-500",
    ]
