"""A self-pruning training ended by SIGKILL and resumed by another process, and the end compared."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from helpers.killed_processes import Lost, Point, cost, counting, done, kill_at


def do_train(folder: Path, out: Path) -> None:
    run = training(str(folder))
    with counting():
        run.train(resume_from_checkpoint=True if has_checkpoint(str(folder)) else None)
        write_end(run, str(out))


def training(folder: str) -> Any:
    """A self-pruning run of twelve steps that saves at every second one."""
    import transformers
    from helpers.trainer_runs import trainer

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    return trainer(Path(folder), logging_steps=1, save_total_limit=2)


def has_checkpoint(folder: str) -> bool:
    from fastgate.errors import CheckpointError
    from fastgate.pruning.trainer_checkpoints import last_complete

    try:
        last_complete(Path(folder))
    except CheckpointError:
        return False
    return True


def write_end(run: Any, out: str) -> None:
    """Weights and gates at the end of a run; the whole file or none."""
    state = run.pruner.state_dict()
    learner = {k: v for k, v in state["learner"].items() if isinstance(v, torch.Tensor)}
    end_of_run = {
        "weights": run.model.state_dict(),
        "learner": learner,
        "kept": state["kept"],
        "history": state["history"],
    }
    torch.save(end_of_run, out + ".writing")
    os.rename(out + ".writing", out)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class Trainings:
    """Self-pruning runs ended at points, and resumed."""

    def __init__(self, folder: Path) -> None:
        import helpers.trainer_runs  # noqa: F401  here, so that children begin with their work

        self.folder = folder
        out = folder / "whole.pt"
        self.seconds, self.calls = cost(do_train, folder / "whole", out)
        self.end = torch.load(out, weights_only=True)

    def try_point(self, number: int, point: Point) -> str:
        """How the run went on: from its checkpoint, from the start, or it was over. Raises Lost."""
        work, out = self.folder / "work", self.folder / "work.pt"
        shutil.rmtree(work, ignore_errors=True)
        out.unlink(missing_ok=True)
        kill_at(point, do_train, work, out)
        if number % 3 == 0 and not out.exists():  # once more, while it resumes
            kill_at(Point(seconds=(point.seconds or self.seconds) / 2), do_train, work, out)
        outcome = "over"
        if not out.exists():
            outcome = "resumed" if has_checkpoint(str(work)) else "begun anew"
            done(do_train, work, out)
        if not same(torch.load(out, weights_only=True), self.end):
            raise Lost(f"{outcome}, it ends with other weights or gates")
        return outcome
