"""A sample of what bench/robustness/fuzz.py does: damaged checkpoints and data files are refused or read."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import fuzz_checkpoints, fuzz_data

CASES = 200


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> fuzz_checkpoints.Originals:
    return fuzz_checkpoints.Originals(tmp_path_factory.mktemp("originals"))


@pytest.mark.slow
def test_damaged_checkpoints(originals: fuzz_checkpoints.Originals) -> None:
    outcomes = {fuzz_checkpoints.run_case(seed, originals)[0] for seed in range(CASES)}
    assert {"refused", "loaded the same"} <= outcomes


def test_damaged_data_files(tmp_path: Path) -> None:
    outcomes = {fuzz_data.run_case(seed, tmp_path)[0] for seed in range(CASES)}
    assert {"refused", "read"} <= outcomes
