"""Times a Linear's product on the CPU, x W^T + b: `pytest bench/kernels/bench_linear.py`.

`fastgate` is what a patched model runs, from the weight as it is; `frozen` what fastgate.freeze packs it for;
`onednn` the library's own packed form. Calls walk over as many weights as the layers of a model have, so they
come from where they would come from there. The ceiling is a copy of the weight's bytes.
"""

from __future__ import annotations

import harness
import pytest
import torch
from harness import ON_GPU, Work
from torch import Tensor
from torch.nn.functional import linear as eager

from fastgate.ops.linear import ONEDNN_ROWS, onednn_product, pack

pytestmark = pytest.mark.skipif(ON_GPU, reason="on a GPU a Linear's product is torch's own")
ROWS = (1, 16, 32, 128, 800)
SHAPES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072))
WEIGHTS = 64 << 20  # bytes of all weights: more than a core's share of a third-level cache
IMPLEMENTATIONS = ("fastgate", "frozen", "onednn", "eager")


def work(rows: int, outer: int, inner: int, dtype: torch.dtype) -> Work:
    size = dtype.itemsize
    sets = max(2, WEIGHTS // (size * outer * inner))
    x, bias = torch.randn(rows, inner, dtype=dtype), torch.randn(outer, dtype=dtype)
    weights = [(torch.randn(outer, inner) / inner**0.5).to(dtype) for _ in range(sets)]
    packed = [pack(weight) for weight in weights]
    library = [torch.ops.mkldnn._reorder_linear_weight(weight, ONEDNN_ROWS) for weight in weights]

    def fastgate(weight: Tensor) -> Tensor:
        return onednn_product(x, weight, bias)

    return Work(
        f"linear forward {rows}x{inner} to {outer} {str(dtype)[6:]}",
        {
            "fastgate": harness.inference(fastgate, [[weight] for weight in weights]),
            "frozen": harness.inference(lambda weight: weight.product(x, bias), [[w] for w in packed]),
            "onednn": harness.inference(fastgate, [[weight] for weight in library]),
            "eager": harness.inference(lambda weight: eager(x, weight, bias), [[w] for w in weights]),
        },
        size * (rows * inner + inner * outer + rows * outer),
        2 * rows * inner * outer,
        sets,
        {},
        {"copy": harness.copying(size * inner * outer, sets)},
        [eager(x.double(), weights[0].double(), bias.double())],
        1e-5 if dtype == torch.float32 else 2e-2,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("outer", "inner"), SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_forward(report, dtype, rows, outer, inner, implementation):
    report(work, (rows, outer, inner, dtype), implementation)
