"""Processes that are ended by SIGKILL in the middle of `save`, of a training or of a sweep, and what is left.

A point is either a number of seconds or a call of the operating system: the child replaces the functions of
`os`, `shutil` and `open` that change files by ones that count, and ends itself at the n-th call, before it or
after it. What the child was doing then is done again by another process, and the end compared.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LIMIT = 300.0


class Lost(AssertionError):
    """Something was lost, doubled or changed by a kill."""


@dataclass(frozen=True)
class Point:
    """Where a child is ended: at so many seconds after it says that it begins, or at the n-th call."""

    seconds: float | None = None
    call: int | None = None
    after: bool = False

    def __str__(self) -> str:
        if self.call is None:
            return f"{self.seconds:.3f} s"
        return f"{'after' if self.after else 'before'} call {self.call}"


class Child:
    """A forked process that does `work`, in a session of its own so that no worker of its is left behind.

    This process has imported everything already, so that the child begins at once. It must not have run a
    backward pass, after which autograd does not work in forks.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any, point: Point | None = None) -> None:
        self.out, out = os.pipe()
        self.output = b""
        self.deadline = time.monotonic() + LIMIT
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            os.close(out)
            return
        status = 1
        try:
            os.setsid()
            os.close(self.out)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            os.environ["KILL_AT_CALL"] = "" if point is None or point.call is None else str(point.call)
            os.environ["KILL_AFTER"] = "1" if point is not None and point.after else ""
            work(*arguments)
            sys.stdout.flush()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def read(self) -> bool:
        """Read more of its output; whether there was any before its end. Raises Lost if it hangs."""
        ready, _, _ = select.select([self.out], [], [], max(0.0, self.deadline - time.monotonic()))
        if not ready:
            self.end()
            os.waitpid(self.pid, 0)
            raise Lost(f"no end after {LIMIT:.0f} s")
        more = os.read(self.out, 65536)
        self.output += more
        return bool(more)

    def end(self) -> None:
        for ending in (os.killpg, os.kill):
            with suppress(ProcessLookupError):
                ending(self.pid, signal.SIGKILL)

    def finish(self) -> tuple[int, str]:
        """(exit status, the end of its output)."""
        while self.read():
            pass
        os.close(self.out)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), self.output.decode(errors="replace")[-1500:]


def done(work: Callable[..., None], *arguments: Any) -> str:
    """The output of a child that came to its end."""
    status, output = Child(work, *arguments).finish()
    if status:
        raise Lost(f"it does not come to its end: {output}")
    return output


def kill_at(point: Point, work: Callable[..., None], *arguments: Any) -> bool:
    """Do `work` until the point; whether it was ended there, and had not come to its end before."""
    child = Child(work, *arguments, point=point)
    if point.seconds is not None:
        while b"begins\n" not in child.output and child.read():
            pass
        time.sleep(point.seconds)
        child.end()
    status, output = child.finish()
    if status not in (0, -signal.SIGKILL):
        raise Lost(f"the child failed by itself: {output}")
    return status != 0


def cost(work: Callable[..., None], *arguments: Any) -> tuple[float, int]:
    """Seconds and calls of `work` when nothing ends it."""
    result = json.loads(done(work, *arguments).strip().splitlines()[-1])
    return result["seconds"], result["calls"]


# In the child: count calls that change files, and end at one of them.


@contextmanager
def counting() -> Iterator[None]:
    """Inside, calls are counted, and the parent waits for the seconds to pass; then both are told."""
    sys.stdout.write("begins\n")
    sys.stdout.flush()
    at = os.environ.get("KILL_AT_CALL")
    _count(int(at) if at else None, bool(os.environ.get("KILL_AFTER")))
    start = time.perf_counter()
    yield
    print("\n" + json.dumps({"seconds": time.perf_counter() - start, "calls": _calls}))


_calls = 0


def _count(at: int | None, after: bool) -> None:
    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            global _calls
            _calls += 1
            is_point = _calls == at
            if is_point and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if is_point:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in (
        "replace",
        "rename",
        "link",
        "symlink",
        "unlink",
        "remove",
        "mkdir",
        "rmdir",
        "fsync",
        "chmod",
        "write",
    ):
        setattr(os, name, counted(getattr(os, name)))
    import builtins
    import io

    plain_open = builtins.open

    def counted_open(*args: Any, **kwargs: Any) -> Any:
        mode = kwargs.get("mode") or (args[1] if len(args) > 1 and isinstance(args[1], str) else "r")
        return (counted(plain_open) if set(mode) & set("wax+") else plain_open)(*args, **kwargs)

    builtins.open = counted_open  # type: ignore[assignment]
    io.open = counted_open  # type: ignore[assignment]
    import safetensors.torch

    import fastgate.models.checkpoint

    for module in (safetensors.torch, fastgate.models.checkpoint):
        if hasattr(module, "save_file"):
            module.save_file = counted(module.save_file)  # type: ignore[attr-defined]


def points(count: int, seconds: float, calls: int, seed: int) -> list[Point]:
    """Half at random times, half at random calls, each before or after; calls first one by one if few."""
    rng = random.Random(seed)
    chosen = [Point(seconds=rng.uniform(0, seconds)) for _ in range(count // 2)]
    numbers = list(range(1, calls + 1)) * (1 + count // max(calls, 1))
    rng.shuffle(numbers)
    chosen += [Point(call=number, after=rng.random() < 0.5) for number in numbers[: count - len(chosen)]]
    return chosen


# Save.


def do_save(path: Path, model: Any) -> None:
    import fastgate

    with counting():
        fastgate.save(model, path)


def model_to_save(which: int) -> Any:
    """Two models that differ in weights, in what is kept and in their heads."""
    from helpers.encoders import draw_replacements, make

    import fastgate

    torch.set_num_threads(1)
    head = ("ForSequenceClassification", "ForTokenClassification")[which]
    model = fastgate.patch(make("Bert", head, layers=3, hidden_size=64, intermediate_size=128))
    fastgate.prune(model, [which], ("affine", "shift")[which])
    if which:
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight.add_(1.0)  # type: ignore[union-attr, operator]
    return draw_replacements(model)


FOREIGN = {
    "README.md": b"mine",
    "tokenizer.json": b"{}",
    ".git/HEAD": b"ref: main",
    "onnx/model.onnx": b"\x00\x01",
}


class Saves:
    """save of one checkpoint over another, or into a new folder, ended at points."""

    def __init__(self, folder: Path) -> None:
        import fastgate

        self.folder, self.old = folder, folder / "old"
        self.models = [model_to_save(which) for which in (0, 1)]
        self.states = [dict(model.state_dict()) for model in self.models]
        fastgate.save(self.models[0], self.old)
        for name, data in FOREIGN.items():
            (self.old / name).parent.mkdir(exist_ok=True)
            (self.old / name).write_bytes(data)
        self.seconds, self.calls = cost(do_save, self._fresh("calibration", True), self.models[1])

    def _fresh(self, name: str, over: bool) -> Path:
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if over:
            shutil.copytree(self.old, place / "model")
        return place / "model"

    def try_point(self, number: int, point: Point) -> str:
        """Which model was left: old, new or nothing. Raises Lost."""
        import fastgate

        over = number % 4 != 0
        target = self._fresh("work", over)
        ended = kill_at(point, do_save, target, self.models[1])
        try:
            loaded = fastgate.load(target)
        except fastgate.CheckpointError as error:
            if over or not ended:
                raise Lost(f"nothing can be loaded: {error}") from error
            left = "nothing"
        else:
            left = self._which(loaded)
        if not ended and left != "new":
            raise Lost(f"save came to its end, and left the {left} model")
        if left == "old" and not over:
            raise Lost("the old model in a new folder")
        for name, data in FOREIGN.items() if over else ():
            if not (target / name).is_file() or (target / name).read_bytes() != data:
                raise Lost(f"{name} is gone or changed")
        # The next save mends whatever was left, and leaves nothing beside the folder.
        fastgate.save(self.models[1], target)
        if self._which(fastgate.load(target)) != "new":
            raise Lost("the next save left another model")
        beside = sorted(p.name for p in target.parent.iterdir() if p != target)
        if beside:
            raise Lost(f"left beside the folder after the next save: {', '.join(beside)}")
        return left

    def _which(self, loaded: Any) -> str:
        weights = loaded.state_dict()
        for name, state in zip(("old", "new"), self.states, strict=True):
            if weights.keys() == state.keys() and all(torch.equal(weights[key], state[key]) for key in state):
                return name
        raise Lost("a model that is neither the old one nor the new one")


# Train.


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


# Sweep.


def do_sweep(world: Path, folder: Path) -> None:
    from fastgate.training.sweep import sweep

    torch.set_num_threads(1)
    with counting():
        sweep(
            sweep_runs(world), world / "data", folder / "lines.jsonl", folder / "work", tell=lambda text: None
        )


RUNS: list[dict[str, Any]] = [{"method": "dense"}, {"method": ["learned", "random"], "sparsity": 0.67}]


def write_world(folder: Path) -> None:
    from helpers import tiny_models

    tiny_models.model_folder(folder / "model", layers=3)
    tiny_models.sentiment_folder(folder / "data", train=16, validation=16, test=16)


def sweep_runs(world: Path) -> list[Any]:
    from fastgate.training.sweep_config import expand

    quick = {"dense_epochs": 1, "dense_lr": 1e-3, "epochs": 1, "lr": 1e-3, "max_length": 16, "batch_size": 4}
    return expand({"model": str(world / "model"), "tasks": ["sst2"], "seeds": [0, 1], **quick, "runs": RUNS})


class Sweeps:
    """Sweeps ended at points, and called again."""

    def __init__(self, folder: Path) -> None:
        # Imported here, so that children begin with their work.
        import datasets  # noqa: F401
        import sklearn.metrics  # noqa: F401

        import fastgate.training.sweep  # noqa: F401
        from fastgate.pruning import SelfPruningTrainer  # noqa: F401

        self.folder, self.world = folder, folder / "world"
        write_world(self.world)
        self.seconds, self.calls = cost(do_sweep, self.world, folder / "whole")
        self.lines = self._lines(folder / "whole")

    def try_point(self, number: int, point: Point) -> str:
        """How many lines were there when the sweep was ended. Raises Lost."""
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        # Every fourth time another process works on the same sweep, and is not ended.
        other = Child(do_sweep, self.world, work) if number % 4 == 0 else None
        kill_at(point, do_sweep, self.world, work)
        if other is not None:
            status, output = other.finish()
            if status:
                raise Lost(f"the other process failed: {output}")
        before = self._lines(work, cut=True)
        done(do_sweep, self.world, work)
        after = self._lines(work)
        for key, line in before.items():
            if after.get(key) != line:
                raise Lost(f"a line of before the kill is gone or changed: {key[:200]}")
        if after.keys() != self.lines.keys():
            raise Lost(f"{len(after)} lines in the end, {len(self.lines)} without a kill")
        for key, line in after.items():
            for name in ("score", "kept", "dense_score"):
                if line[name] != self.lines[key][name]:
                    raise Lost(f"{name} {line[name]}, {self.lines[key][name]} without a kill")
        return f"{len(before)} of {len(after)} lines"

    def _lines(self, work: Path, cut: bool = False) -> dict[str, Any]:
        """Settings -> line. cut: the last one may be half a line."""
        path = work / "lines.jsonl"
        lines: dict[str, Any] = {}
        if not path.is_file():
            return lines
        texts = path.read_text().split("\n")
        for i, text in enumerate(texts):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                if text and not (cut and i == len(texts) - 1):
                    raise Lost(f"half a line is left: {text[:200]}") from None
                continue
            key = json.dumps(line["settings"], sort_keys=True)
            if key in lines:
                raise Lost(f"a line twice: {key[:200]}")
            lines[key] = line
        return lines


KINDS: dict[str, Any] = {"save": Saves, "train": Trainings, "sweep": Sweeps}
