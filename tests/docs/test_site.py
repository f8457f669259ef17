"""The documentation site builds without a warning, and names everything public."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fastgate
from fastgate import ops

ROOT = Path(__file__).parents[2]
REFERENCE = "".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))


@pytest.mark.parametrize("name", sorted(set(fastgate.__all__)))
def test_the_reference_has_every_public_name(name):
    assert f"::: fastgate.{name}\n" in REFERENCE


@pytest.mark.parametrize("name", sorted(name for name in ops.__all__ if name.islower()))
def test_the_reference_has_every_op(name):
    assert f"::: fastgate.ops.{name}\n" in REFERENCE


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed (the extra docs)")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed (the extra docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "quickstart" / "index.html").is_file()
