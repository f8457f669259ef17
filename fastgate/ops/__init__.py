"""The ops, a module each under its name: schema, argument checks, fake kernels, autograd.

slots.py holds what runs them.
"""

from . import absorbed_attention, attention, gated_add_norm  # noqa: F401  each leaves its reference and its schema
from .slots import REFERENCE, SLOTS, Implementation, fill_with, implementation

OPS = tuple(REFERENCE)

__all__ = ["OPS", "REFERENCE", "SLOTS", "Implementation", "fill_with", "implementation"]
