"""The processes of a sweep: the same command in each, ended when the process that started them ends.

A worker's standard input is a pipe that nobody writes to. It closes when the parent ends, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

import torch

AS_WORKER = "--as-worker"
_PDEATHSIG = 1  # linux/prctl.h: the signal that a process gets when its parent ends
_GRACE = 10.0  # seconds for workers to end after being asked to


def end_with_parent() -> None:
    """Have this process end when the one that started it does. What it was writing can be continued.

    Ctrl-C reaches every process of a terminal. Only the parent answers it, and then ends this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # This also ends a process inside one long call into a library, which no Python thread interrupts.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1):
                pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_workers(arguments: list[str], workers: int) -> list[int]:
    """Run the same command in processes that share the cores and GPUs. Returns their exit statuses."""
    cores, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for worker in range(workers):
            env = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // workers))}
            if gpus:
                env["CUDA_VISIBLE_DEVICES"] = str(worker % gpus)
            command = [sys.executable, "-m", "fastgate", *arguments, AS_WORKER]
            processes.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE))
        return [process.wait() for process in processes]
    finally:
        _end(processes)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End those that still run, after an interruption."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()
