"""What the Triton kernels compile to for devices that are not here: as committed, wide, no spills."""

from __future__ import annotations

import pytest
from triton_device import INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")
if INTERPRETED:
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import resources
import triton
import variants

TABLE = resources.read_table()
ROWS = [
    pytest.param(op, name, counts, id=f"{op}-{name}")
    for op, part in TABLE.items()
    for name, counts in part["kernels"].items()
]


@pytest.fixture(scope="module", params=variants.OPS)
def op(request):
    return request.param


@pytest.fixture(scope="module")
def launches(op):
    return resources.launches_of(op)


def test_table_is_of_these_sources_and_these_launches(op, launches):
    remedy = f"python tests/resources.py --write {op}"
    assert TABLE[op]["sources"] == resources.digest(op), remedy
    assert list(TABLE[op]["kernels"]) == list(launches), remedy


@pytest.mark.parametrize("place", range(len(resources.ARCHITECTURES)))
def test_table_is_what_compiles_here(op, launches, place):
    """One kernel an architecture; `python tests/resources.py` does them all."""
    if TABLE[op]["triton"] != triton.__version__:
        pytest.skip(f"the table is for triton {TABLE[op]['triton']}, this is {triton.__version__}")
    architecture, names = resources.ARCHITECTURES[place], list(launches)
    name = names[len(names) * (2 * place + 1) // (2 * len(resources.ARCHITECTURES))]
    found = launches[name].compile(architecture).to_dict()
    assert found == TABLE[op]["kernels"][name][f"sm_{architecture}"], name


@pytest.mark.parametrize(("op", "name", "counts"), ROWS)
def test_nothing_spills(op, name, counts):
    for architecture, kernel in counts.items():
        assert kernel["local"] == 0 and kernel["stack"] == 0, architecture


# Rows that do not begin at multiples of 16 bytes: read 8 bytes at a time, and one element.
NARROW_ROWS = ("12", "771")


@pytest.mark.parametrize(("op", "name", "counts"), [row for row in ROWS if row.values[0] == "gated_add_norm"])
def test_rows_are_read_and_written_16_bytes_at_a_time(op, name, counts):
    """Narrow are only the scalars, gate and seed, and the sums that a program of backward writes once, where
    it has more threads than a row has vectors; sum_kernel writes its 32 columns so."""
    kernel_name, hidden = name.split()[:2]
    if hidden in NARROW_ROWS:
        return
    for architecture, kernel in counts.items():
        assert kernel["wide"] > 0
        scalars = ("everything" in name) + ("everything" in name or "dropout" in name)
        sums = 3 if kernel_name == "backward_kernel" and int(hidden) <= 512 else 0
        assert kernel["narrow"] <= scalars + sums + (kernel_name == "sum_kernel"), architecture


@pytest.mark.parametrize(
    ("op", "name", "counts"), [row for row in ROWS if row.values[0] == "absorbed_attention"]
)
def test_absorbed_attention_keeps_its_rules(op, name, counts):
    """Products of 16-bit numbers on tensor cores; rows and probes 16 bytes at a time: narrow are lengths, the
    seed and what is one number a head; programs fit the shared memory they were chosen for."""
    kernel_name = name.split()[0]
    for architecture, kernel in counts.items():
        assert (kernel["tensor"] > 0) == (
            " bf16 " in name and kernel_name.startswith(("forward", "backward"))
        )
        # rows_kernel reads two weights a row and head.
        assert kernel["wide"] > 0 and kernel["narrow"] <= (16 if " fp32 " in name else 9), architecture
        small = "163 KB" in name or kernel_name != "forward_kernel"
        assert kernel["shared"] <= (163 if small else 227) * 1024, architecture
