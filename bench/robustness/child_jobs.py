"""Jobs in child processes that may crash, hang or run out of memory: each case is told before it begins.

A child reads one job a line from its standard input and answers with JSON lines: {"begin": case} before a
case, {"end": outcome, ...} after it, and {"done": true} after the job. A child that dies or says nothing for
too long is ended, the case it had begun is reported, and another child takes the next job.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

Answer = dict[str, Any]


class Child:
    """A process that answers jobs. limit: seconds without a line after which it is ended."""

    def __init__(self, command: list[str], limit: float) -> None:
        self.limit = limit
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "MPLBACKEND": "Agg",
        }  # fmt: skip
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._read_errors, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:  # type: ignore[union-attr]
            self.lines.put(line)
        self.lines.put(None)

    def _read_errors(self) -> None:
        for line in self.process.stderr:  # type: ignore[union-attr]
            self.errors = [*self.errors[-20:], line]

    def do(self, job: Any) -> Iterator[Answer]:
        """The answers to a job; the last one has `crash` where the child did not come to the end."""
        try:
            self.process.stdin.write(json.dumps(job) + "\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass
        begun = None
        while True:
            try:
                line = self.lines.get(timeout=self.limit)
            except queue.Empty:
                self.end()
                yield {"crash": f"no answer in {self.limit:.0f} s", "begin": begun}
                return
            if line is None:
                code = self.process.wait()
                how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                yield {"crash": how, "begin": begun, "errors": "".join(self.errors)[-1500:]}
                return
            try:
                answer = json.loads(line)
            except ValueError:
                continue  # something else was printed
            if not isinstance(answer, dict):
                continue
            if "done" in answer:
                return
            begun = answer.get("begin", begun)
            if "end" in answer:
                yield answer

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def work(
    command: list[str],
    jobs: Iterator[Any],
    workers: int,
    limit: float,
    tell: Callable[[Any, list[Answer]], None],
) -> None:
    """All jobs on so many children; `tell` gets each job's answers, one call at a time."""
    lock = threading.Lock()
    broken: list[Answer] = []

    def serve() -> None:
        child = Child(command, limit)
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                break
            answers = list(child.do(job))
            if answers and answers[-1].get("crash") and answers[-1]["begin"] is None:
                broken.append(answers[-1])  # not of a case: nothing would run
            if broken:
                break
            with lock:
                tell(job, answers)
            if any("crash" in answer for answer in answers):
                child.end()
                child = Child(command, limit)
        child.end()

    threads = [threading.Thread(target=serve) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if broken:
        sys.exit(f"a child failed before its first case: {broken[0]['crash']}\n{broken[0].get('errors', '')}")


def answer(**said: Any) -> None:
    """Of a child: one line to the parent."""
    sys.__stdout__.write(json.dumps(said) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def jobs_of_parent() -> Iterator[Any]:
    """Of a child: its jobs, one after the other."""
    for line in sys.stdin:
        yield json.loads(line)
        answer(done=True)


def bound_memory(more: int) -> None:
    """Of a child: so many bytes of address space beyond those it has now, and no core file."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
