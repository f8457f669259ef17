"""For tests of bfloat16 that oneDNN multiplies: some processors cannot."""

from __future__ import annotations

import pytest
import torch

from fastgate.ops.linear import ONEDNN_DTYPES

NEEDS_BFLOAT16 = pytest.mark.skipif(
    torch.bfloat16 not in ONEDNN_DTYPES, reason="oneDNN multiplies no bfloat16 on this processor"
)
PACKED_DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=NEEDS_BFLOAT16)]
