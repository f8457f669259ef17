"""Attention's Triton kernels compiled for three GPUs without one: registers, spills, widths, tensor cores.

`python tests/test_attention_resources.py` compiles every variant and writes the table beside the kernels,
attention_resources.json; the suite compiles a few again and holds the whole table to the rules.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import cubins
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgate.kernels import attention

TABLE = Path(__file__).parent.parent / "kernels" / "attention_resources.json"
CAPABILITIES = (80, 90, 100)
# float16 takes bfloat16's blocks and the same instructions of another type: one is compiled beside its twin.
VARIANTS = {variant.name: variant for variant in attention.variants((torch.bfloat16, torch.float32))}
HALF = {variant.name: variant for variant in attention.variants((torch.float16,))}
# What spills, and may not grow. float32 has no tensor core: a product's operands lie in registers, and at 128
# wide there are too many of them; at 64 wide sm_80's assembler gives one register up for a fourth program.
SPILLS = {
    "forward_kernel fp32 64 tiles 32x32 sm_80",
    "backward_keys_kernel fp32 64 tiles 32x32 sm_80",
    "forward_kernel fp32 128 tiles 32x32 sm_90",
    "forward_kernel fp32 128 tiles 32x32 sm_100",
} | {
    f"backward_queries_kernel fp32 128 tiles 32x32{dropout} sm_{capability}"
    for dropout in ("", " dropout")
    for capability in CAPABILITIES
}
# The suite's own compilations: the widest forms, which spill first, and the one with two ways inside.
AGAIN = (
    ("forward_kernel bf16 128 tiles 128x32 dropout", 90),
    ("backward_keys_kernel bf16 64 tiles 32x64 dropout", 90),
    ("forward_kernel fp32 64 tiles 32x32", 90),
    ("backward_whole_kernel bf16 32 whole 32x32", 100),
)


def compiled(variant: attention.Variant, capability: int) -> dict[str, int]:
    signature, aligned = {}, {}
    for place, (name, kind) in enumerate(variant.signature.items()):
        signature[name], _, divisor = kind.partition(":")
        if divisor:
            aligned[(place,)] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(variant.kernel, signature, variant.constexprs, aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        (found,) = cubins.read(cubin).values()
    return {**found.to_dict(), "shared": kernel.metadata.shared}


def key(name: str, capability: int) -> str:
    return f"{name} sm_{capability}"


@pytest.mark.parametrize("name, capability", AGAIN)
def test_compiles_to_what_the_table_says(name, capability):
    """Registers move with the compiler's version; what may not move is held exactly."""
    found, wanted = compiled(VARIANTS[name], capability), json.loads(TABLE.read_text())[key(name, capability)]
    assert found["local"] == wanted["local"] == 0
    assert (found["tensor"] > 0) == (wanted["tensor"] > 0)
    assert found["wide"] == wanted["wide"]
    if triton.__version__ == json.loads(TABLE.read_text())["triton"]:
        assert found == wanted


def test_half_precision_compiles_to_its_twin():
    name = "forward_kernel fp16 64 whole 64x64"
    found = compiled(HALF[name], 90)
    twin = json.loads(TABLE.read_text())[key(name.replace("fp16", "bf16"), 90)]
    assert found["local"] == 0
    assert (found["tensor"], found["wide"]) == (twin["tensor"], twin["wide"])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_variant_keeps_the_rules(capability):
    table = json.loads(TABLE.read_text())
    assert set(table) == {key(name, c) for name in VARIANTS for c in CAPABILITIES} | {"triton"}, (
        f"other variants than the table's: run python {Path(__file__).name}"
    )
    for name, variant in VARIANTS.items():
        found = table[key(name, capability)]
        spills = found["local"] > 0 or found["stack"] > 0
        assert spills == (key(name, capability) in SPILLS), f"{name}: {found}"
        assert (found["tensor"] > 0) == (" fp32 " not in name), name
        # sm_80 cubins run on sm_86 and sm_89 too, which have 99 KiB.
        assert found["shared"] <= (99 if capability == 80 else 227) * 1024, name
        # Rows move 16 bytes at a time: a block of q, k and v at least, and what is written.
        threads, element = 32 * variant.num_warps, 4 if " fp32 " in name else 2
        tile = variant.constexprs["D"] * variant.constexprs.get("BLOCK", variant.constexprs.get("BLOCK_N", 0))
        assert found["wide"] >= 4 * max(1, tile * element // (16 * threads)), name


def write() -> None:
    table: dict[str, object] = {"triton": triton.__version__}
    for name, variant in VARIANTS.items():
        for capability in CAPABILITIES:
            table[key(name, capability)] = compiled(variant, capability)
            print(key(name, capability), table[key(name, capability)], flush=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in table.items())
    TABLE.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    sys.exit(write())
