"""Processes that are ended by SIGKILL at a point of their work.

A point is either a number of seconds or a call of the operating system: the child replaces the functions of
`os`, `shutil` and `open` that change files by ones that count, and ends itself at the n-th call, before it or
after it.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

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
