"""The ops that fastgate's models run, as functions for everyone; set_backend chooses what runs them.

An op a module under its own name: schema, argument checks, fake kernels, autograd. registry.py knows what
runs an op, backends.py what can, and reference/ holds the mathematics.
"""

# An op's module leaves its reference and its schema. The functions hide the modules of the same name.
from fastgate.ops.absorbed_attention import absorbed_attention
from fastgate.ops.attention import attention
from fastgate.ops.embed_norm import embed_norm
from fastgate.ops.gated_add_norm import gated_add_norm
from fastgate.ops.linear import linear
from fastgate.ops.linear_gelu import linear_gelu
from fastgate.ops.ragged import SequenceOffsets
from fastgate.ops.registry import IMPLEMENTATIONS, REFERENCE, Implementation, Saving, implementation
from fastgate.ops.shift_norm import shift_norm

# isort: split
from fastgate.ops.backends import set_backend

OPS = tuple(REFERENCE)

__all__ = [
    "IMPLEMENTATIONS",
    "OPS",
    "REFERENCE",
    "Implementation",
    "Saving",
    "SequenceOffsets",
    "absorbed_attention",
    "attention",
    "embed_norm",
    "gated_add_norm",
    "implementation",
    "linear",
    "linear_gelu",
    "set_backend",
    "shift_norm",
]
