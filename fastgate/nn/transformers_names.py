"""Private names of transformers that packages below `models` need. They know them as text, because they
import torch only.

models/compat.py checks that the installed transformers has each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# The module whose hooks record outputs inside transformers' own forwards, and do nothing elsewhere.
OUTPUT_CAPTURING = "transformers.utils.output_capturing"
# The module that transformers puts around a GELU, and the attribute that holds the function it calls.
GELU_MODULE, GELU_CLASS, GELU_FUNCTION = "transformers.activations", "GELUActivation", "act"
# Of a layer: whether it is computed anew in the backward, and the function that does so.
CHECKPOINTING_FLAG, CHECKPOINTING_FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"
# Modules of transformers whose forward is known: what they compute is in their parameters and a few numbers.
MODEL_MODULES, ACTIVATION_MODULE = "transformers.models.", GELU_MODULE


def is_output_capturing(hook: Any) -> bool:
    """Whether a hook is one of transformers' own that record outputs."""
    return getattr(hook, "__module__", None) == OUTPUT_CAPTURING


def wrapped_gelu(activation: Any) -> Any:
    """The function that a GELU of transformers calls; None for any other module."""
    kind = type(activation)
    if (kind.__module__, kind.__qualname__) != (GELU_MODULE, GELU_CLASS):
        return None
    return getattr(activation, GELU_FUNCTION)


def is_checkpointed(layer: Any) -> bool:
    """Whether gradient checkpointing is on for a layer."""
    return bool(getattr(layer, CHECKPOINTING_FLAG))


def checkpoint_function(layer: Any) -> Callable[..., Any]:
    """What runs a function of a layer so that it is computed anew in the backward."""
    function: Callable[..., Any] = getattr(layer, CHECKPOINTING_FUNCTION)
    return function
