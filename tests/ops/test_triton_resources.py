"""What the Triton kernels compile to for devices that are not here: as committed, wide, no spills."""

from __future__ import annotations

import pytest
from helpers.triton_device import INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")
if INTERPRETED:
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton
from helpers import kernel_calls, triton_resources

pytestmark = pytest.mark.slow

TABLE = triton_resources.read_table()
ROWS = [
    pytest.param(op, name, counts, id=f"{op}-{name}")
    for op, part in TABLE.items()
    for name, counts in part["kernels"].items()
]


@pytest.fixture(scope="module", params=kernel_calls.OPS)
def op(request):
    return request.param


@pytest.fixture(scope="module")
def launches(op):
    return triton_resources.launches_of(op)


def test_table_is_of_these_sources_and_these_launches(op, launches):
    remedy = f"cd tests && python -m helpers.triton_resources --write {op}"
    assert TABLE[op]["sources"] == triton_resources.digest(op), remedy
    assert list(TABLE[op]["kernels"]) == list(launches), remedy


@pytest.mark.parametrize("place", range(len(triton_resources.ARCHITECTURES)))
def test_table_is_what_compiles_here(op, launches, place):
    """One kernel an architecture; `cd tests && python -m helpers.triton_resources` does them all."""
    if TABLE[op]["triton"] != triton.__version__:
        pytest.skip(f"the table is for triton {TABLE[op]['triton']}, this is {triton.__version__}")
    architecture, names = triton_resources.ARCHITECTURES[place], list(launches)
    name = names[len(names) * (2 * place + 1) // (2 * len(triton_resources.ARCHITECTURES))]
    found = launches[name].compile(architecture).to_dict()
    assert found == TABLE[op]["kernels"][name][f"sm_{architecture}"], name


@pytest.mark.parametrize(("op", "name", "counts"), ROWS)
def test_nothing_spills(op, name, counts):
    for architecture, kernel in counts.items():
        assert kernel["local"] == 0 and kernel["stack"] == 0, architecture


# Their tiles are chosen by the device: these have rules of their own, or a table that knows the large ones.
CHOOSING = ("absorbed_attention", "linear_gelu")


@pytest.mark.parametrize(("op", "name", "counts"), [row for row in ROWS if row.values[0] != CHOOSING[0]])
def test_shared_memory_fits(op, name, counts):
    """sm_80 cubins run on sm_86 and sm_89 too, which have 99 KiB a program; sm_80 itself has 163, sm_90 and
    sm_100 have 227."""
    for architecture, kernel in counts.items():
        small = 163 if op in CHOOSING else 99
        assert kernel["shared"] <= (small if architecture == "sm_80" else 227) * 1024, architecture


@pytest.mark.parametrize(("op", "name", "counts"), [row for row in ROWS if row.values[0] == "attention"])
def test_products_run_on_tensor_cores(op, name, counts):
    """Those of bfloat16 and float16; float32 keeps its precision."""
    for architecture, kernel in counts.items():
        assert (kernel["tensor"] > 0) == (" fp32 " not in name), architecture


def test_attentions_rows_move_16_bytes_at_a_time():
    """A block of each of the four that every kernel reads or writes at least; in float32, a part of a block.
    Narrow are numbers, one a row or a sequence, and biases where the layout is that of a product's result."""
    for name, one in triton_resources.launches_of("attention").items():
        given = {one.function.params[place].name: value for place, value in one.constants}
        columns = 16 if " fp32 " in name else given["D"]
        rows = given.get("BLOCK") or min(given["BLOCK_M"], given["BLOCK_N"])
        width = 4 if " fp32 " in name else 2
        accesses = max(1, columns * rows * width // (16 * 32 * dict(one.options)["num_warps"]))
        for architecture, kernel in TABLE["attention"]["kernels"][name].items():
            assert kernel["wide"] >= 4 * accesses, (name, architecture)


# Rows that do not begin at multiples of 16 bytes: read 8 bytes at a time, and one element.
NARROW_ROWS = ("12", "771")


NORMS = [row for row in ROWS if row.values[0] in ("gated_add_norm", "embed_norm", "shift_norm")]


@pytest.mark.parametrize(("op", "name", "counts"), NORMS)
def test_rows_are_read_and_written_16_bytes_at_a_time(op, name, counts):
    """Narrow are only the scalars, gate and seed, ids, neighbour flags, and the sums that a program of
    backward writes once, where it has more threads than a row has vectors; sum_kernel writes its 32 columns
    so."""
    kernel_name, hidden = name.split()[:2]
    if hidden in NARROW_ROWS:
        return
    backward = kernel_name == "backward_kernel"
    scalars = ("everything" in name) + ("everything" in name or "dropout" in name)
    sums = (
        {"gated_add_norm": 3, "embed_norm": 4, "shift_norm": 6}[op] if backward and int(hidden) <= 512 else 0
    )
    # Three ids or two neighbour flags a row, of up to four rows a thread.
    # Backward reads its own ahead, twice.
    ahead, of_rows = {"gated_add_norm": (0, 0), "embed_norm": (15, 12), "shift_norm": (6, 8)}[op]
    ids = 0 if kernel_name == "sum_kernel" else ahead if backward else of_rows
    for architecture, kernel in counts.items():
        assert kernel["wide"] > 0
        assert kernel["narrow"] <= scalars + sums + ids + (kernel_name == "sum_kernel"), architecture


@pytest.mark.parametrize(("op", "name", "counts"), [row for row in ROWS if row.values[0] == "linear_gelu"])
def test_products_run_on_tensor_cores_and_read_16_bytes_at_a_time(op, name, counts):
    """float32 has no tensor core of its precision. Narrow are the reads of the bias, one for each pair of
    columns that a thread holds of the product, and the sums that a program of backward writes once."""
    kernel_name, depth = name.split()[:2]
    for architecture, kernel in counts.items():
        assert (kernel["tensor"] > 0) == (kernel_name == "product_kernel" and "fp32 many" not in name)
        if depth not in NARROW_ROWS:
            narrow = {"product_kernel": 32, "backward_kernel": 1, "gelu_kernel": 0}[kernel_name]
            assert kernel["wide"] > 0 and kernel["narrow"] <= narrow, architecture


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
