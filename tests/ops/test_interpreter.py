"""Every Triton kernel's tests in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import pytest
from helpers import subprocesses

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton", reason="triton is not installed")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    reason = f"the interpreter of Triton {triton.__version__} stumbles over the scalars of NumPy 2.4"
    pytest.skip(reason, allow_module_level=True)
FOLDER = subprocesses.TESTS / "ops"
# Those that run kernels: test_triton_resources.py compiles them.
FILES = sorted(path.name for path in FOLDER.glob("test_triton_*.py") if "resources" not in path.name)
assert FILES, f"{FOLDER}: no test_triton_*.py is left, so no Triton kernel would be tested without a GPU"
RUN = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name):
    process = subprocesses.start(RUN, f"ops/{name}")
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and " passed" in output, output + errors
