"""Every op's mathematics in plain torch, forward and backward: the truth each backend is measured against.

An op a file.
"""

from fastgate.ops.reference.absorbed_attention import absorbed_attention, absorbed_attention_backward
from fastgate.ops.reference.attention import attention, attention_backward
from fastgate.ops.reference.dropout import dropout_threshold, keep_mask, philox
from fastgate.ops.reference.embed_norm import embed_norm, embed_norm_backward
from fastgate.ops.reference.gated_add_norm import gated_add_norm, gated_add_norm_backward
from fastgate.ops.reference.linear_gelu import linear_gelu, linear_gelu_backward
from fastgate.ops.reference.shift_norm import neighbours, shift_norm, shift_norm_backward

__all__ = [
    "absorbed_attention",
    "absorbed_attention_backward",
    "attention",
    "attention_backward",
    "dropout_threshold",
    "embed_norm",
    "embed_norm_backward",
    "gated_add_norm",
    "gated_add_norm_backward",
    "keep_mask",
    "linear_gelu",
    "linear_gelu_backward",
    "neighbours",
    "philox",
    "shift_norm",
    "shift_norm_backward",
]
