"""Whether a module does what its class says: hooks, and methods replaced on the module or on its class."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from fastgate.nn.transformers_names import is_output_capturing
from fastgate.ops.torch_compat import GLOBAL_HOOKS as GLOBAL_HOOKS
from fastgate.ops.torch_compat import hook_dicts as hook_dicts


def foreign_hooks(module: nn.Module) -> list[Any]:
    """Hooks of every kind on a module, but for transformers' own that record outputs."""
    hooks = [hook for kind in hook_dicts(module) for hook in kind.values()]
    return [hook for hook in hooks if not is_output_capturing(hook)]


def replaced_method(module: nn.Module) -> str:
    """The name of a method that was replaced, on this module or (`forward`) on its class; "" if none was."""
    kind = type(module)
    if getattr(kind.forward, "__module__", None) != kind.__module__:
        return "forward"
    return shadowed_method(module)


def shadowed_method(module: nn.Module) -> str:
    """The name of a method of the class that an attribute of the module hides; "" if there is none."""
    kind = type(module)
    for name, value in module.__dict__.items():
        own = getattr(kind, name, None)
        if inspect.isfunction(own) and not _is_bound(value, own, module):
            return name
    return ""


def _is_bound(value: Any, function: Any, module: nn.Module) -> bool:
    """A module's own method, set on it as an attribute, changes nothing."""
    return getattr(value, "__func__", None) is function and getattr(value, "__self__", None) is module


def is_itself(module: nn.Module) -> bool:
    """No hooks, no replaced methods: a call is its class's forward."""
    return not foreign_hooks(module) and not replaced_method(module)
