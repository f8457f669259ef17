"""A few points of bench/robustness/kill.py: SIGKILL inside save, a training and a sweep loses nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import subprocesses

pytestmark = pytest.mark.slow

COMMAND = Path(__file__).parents[2] / "bench" / "robustness" / "kill.py"


@pytest.mark.parametrize(("what", "points"), [("save", 8), ("train", 2), ("sweep", 2)])
def test_a_kill_loses_nothing(what: str, points: int) -> None:
    """In a process of its own: its children are forks, without autograd after a backward pass."""
    environment = subprocesses.os.environ | {"PYTHONPATH": subprocesses.PACKAGE_PARENT}
    process = subprocess.run(
        [sys.executable, str(COMMAND), what, "--points", str(points)],
        cwd=subprocesses.TESTS, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr[-2000:]
    assert f"kill {what}: {points} points" in process.stdout
