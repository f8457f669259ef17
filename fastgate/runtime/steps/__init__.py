"""The steps of a plan, a file for each kind of sublayer.

A step knows how many rows it makes, its matrix products, how to run eagerly, and, if it begins a sublayer,
how to lower that sublayer to a part of a fused CPU call.
"""

from fastgate.runtime.steps import token_shift  # noqa: F401  registers its replacement
