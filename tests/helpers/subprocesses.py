"""Python processes beside the test: the same installed copy of fastgate, one thread."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

import fastgate

TESTS = Path(__file__).parents[1]
# The source folder of fastgate, which may have no compiled library, must not stand before the installed copy.
PACKAGE_PARENT = str(Path(fastgate.__file__).parents[1])


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Run `code` with `arguments` in sys.argv. Its folder is tests/, so that helpers are found."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": PACKAGE_PARENT,
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=TESTS,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Runs the function of a module of tests/ once for each of the other arguments, a JSON list of its own, in
# processes that fork from one that has imported all of it. One that fails ends the others.
_FORKING = """
import importlib, json, os, signal, sys, traceback
module, name, imports, *calls = sys.argv[1:]
for other in imports.split():
    importlib.import_module(other)
function = getattr(importlib.import_module(module), name)
running, failed = set(), 0
for call in calls:
    child = os.fork()
    if not child:
        try:
            function(*json.loads(call))
        except BaseException:
            traceback.print_exc()
            failed = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failed)
    running.add(child)
while running:
    child, status = os.wait()
    running.discard(child)
    if status and not failed:
        failed = 1
        for other in running:
            os.kill(other, signal.SIGKILL)
sys.exit(failed)
"""


def fork(module: str, name: str, *calls: list[object], imports: str = "") -> None:
    """Call `module.name` in a process for each of `calls`, side by side: what is imported, the most of their
    work, is imported once. imports: modules that `module` only imports when it is used."""
    finish(start(_FORKING, module, name, imports, *[json.dumps(call) for call in calls]))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def join(rank: int, world: int, port: int) -> None:
    """Be rank `rank` of `world` processes, for the trainer that is made next."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")


def leave() -> None:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What `process` printed, once it has ended with exit status `code`."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return output
