"""Python processes beside the test: the same installed copy of fastgate, one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fastgate

TESTS = Path(__file__).parent
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


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What `process` printed, once it has ended with exit status `code`."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return output
