"""The ops, a module each under its name: schema, argument checks, fake kernels, autograd.

slots.py holds what runs them.
"""

# Each leaves its reference and its schema.
from fastgate.ops import absorbed_attention, attention, embed_norm, gated_add_norm, linear_gelu, shift_norm  # noqa: F401
from fastgate.ops.registry import IMPLEMENTATIONS, REFERENCE, Implementation, implementation, register_loader

OPS = tuple(REFERENCE)

__all__ = ["IMPLEMENTATIONS", "OPS", "REFERENCE", "Implementation", "implementation", "register_loader"]
