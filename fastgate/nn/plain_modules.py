"""Whether a module is one of torch's and nothing more, so that an op may stand for it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastgate.nn.hooks import is_itself
from fastgate.nn.transformers_names import wrapped_gelu

PLAIN_TENSORS = (Tensor, nn.Parameter)
WEIGHTED = (nn.Linear, nn.LayerNorm, nn.Embedding)


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """A `kind` and nothing more: no subclass, no hooks, no replaced methods, no tensor subclass among the
    parameters, and a weight where the class has one."""
    if type(module) is not kind or not is_itself(module):
        return False
    parameters = module._parameters
    if kind in WEIGHTED and parameters.get("weight") is None:
        return False
    return all(p is None or type(p) in PLAIN_TENSORS for p in parameters.values())


def is_plain_norm(module: Any) -> bool:
    """A plain LayerNorm over the last dimension with weight and bias."""
    return (
        is_plain(module, nn.LayerNorm)
        and module._parameters.get("bias") is not None
        and tuple(module.normalized_shape) == tuple(module.weight.shape)
        and module.weight.dim() == 1
    )


def is_plain_dropout(module: Any) -> bool:
    """A plain Dropout, or the Identity that often takes its place."""
    return is_plain(module, nn.Dropout) or is_plain(module, nn.Identity)


def is_exact_gelu(activation: Any) -> bool:
    """x Phi(x) by torch, or by the module that transformers puts around it, and nothing more."""
    if not isinstance(activation, nn.Module):
        return activation is F.gelu
    if type(activation) is nn.GELU:
        return activation.approximate == "none" and is_itself(activation)
    return wrapped_gelu(activation) is F.gelu and is_itself(activation)


def dropout_rate(module: Any) -> float:
    """The rate that a plain dropout drops at now."""
    return module.p if module.training and type(module) is nn.Dropout else 0.0
