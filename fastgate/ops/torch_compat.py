"""The private names of torch that fastgate uses, and whether the installed torch has them.

Other modules use a private function or class of torch under the name it has here. The attributes that every
`torch.nn.Module` and every tensor has (`ATTRIBUTES`) are read where they are needed, because a call in
between would cost time in each forward. `missing` looks all of them up; models/compat.py calls it when a
model is patched.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastgate.errors import Unsupported, format_error

# Attributes of a module and of a tensor that are read directly.
ATTRIBUTES: dict[type, tuple[str, ...]] = {
    nn.Module: (
        "_modules",
        "_parameters",
        "_buffers",
        "_non_persistent_buffers_set",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_apply",
        "_load_from_state_dict",
        "_save_to_state_dict",
    ),
    Tensor: ("_version",),
}
_NAMES = (
    "torch._C._is_tracing",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch.autograd.forward_ad._current_level",
    "torch.nn.modules.dropout._DropoutNd",
    "torch.nn.modules.module._global_forward_hooks",
    "torch.nn.modules.module._global_forward_pre_hooks",
    "torch.nn.modules.module._global_backward_hooks",
    "torch.nn.modules.module._global_backward_pre_hooks",
    "torch.utils.weak.TensorWeakRef",
)


class MissingName:
    """Stands for a name that the installed library lacks. A call of it raises Unsupported."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, *args: object, **kwargs: object) -> Any:
        library = self.path.partition(".")[0]
        remedy = "install the versions that constraints.txt names"
        raise Unsupported(format_error("fastgate", library, f"one without {self.path}", "that name", remedy))


def look_up(path: str) -> Any:
    """The object at a dotted path, such as "torch.nn.Linear"; a MissingName where there is none."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):  # the longest part of the path that is a module
        try:
            value: Any = import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for name in parts[end:]:
            if not hasattr(value, name):
                return MissingName(path)
            value = getattr(value, name)
        return value
    return MissingName(path)


def missing() -> list[str]:
    """The names of this file that the installed torch lacks."""
    absent = [path for path in _NAMES if isinstance(look_up(path), MissingName)]
    with torch.inference_mode(False):  # whose tensors have fewer attributes
        module, tensor = nn.Linear(1, 1, device="meta"), torch.empty(0, device="meta")
    for kind, example in ((nn.Module, module), (Tensor, tensor)):
        names = [name for name in ATTRIBUTES[kind] if not hasattr(example, name)]
        absent += [f"torch.{'nn.' if kind is nn.Module else ''}{kind.__name__}.{name}" for name in names]
    return absent


# Whether torch.jit.trace runs.
is_tracing: Callable[[], bool] = look_up("torch._C._is_tracing")
# How many modes of __torch_dispatch__ are at work, such as FakeTensorMode.
dispatch_modes: Callable[[], int] = look_up("torch._C._len_torch_dispatch_stack")
# The class of all of torch's Dropouts.
DropoutBase: type[nn.Module] = look_up("torch.nn.modules.dropout._DropoutNd")
# A weak reference to a tensor, which follows the tensor and not its Python object.
TensorWeakRef: Any = look_up("torch.utils.weak.TensorWeakRef")
# Hooks that torch runs with every module there is.
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    look_up("torch.nn.modules.module._global_forward_pre_hooks"),
    look_up("torch.nn.modules.module._global_forward_hooks"),
    look_up("torch.nn.modules.module._global_backward_pre_hooks"),
    look_up("torch.nn.modules.module._global_backward_hooks"),
)
# The innermost transform of torch.func, or None.
func_transform: Callable[[], Any] = look_up("torch._C._functorch.peek_interpreter_stack")
# Whether a gradient is one of the batch that `autograd.grad(is_grads_batched=True)` computes.
is_batched_gradient: Callable[[Tensor], bool] = look_up("torch._C._functorch.is_legacy_batchedtensor")


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is at work."""
    return forward_ad._current_level >= 0


def hook_dicts(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The dictionaries that hold a module's hooks: forward, forward pre, full backward, backward pre."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None for an inference tensor, where torch does not count."""
    return None if tensor.is_inference() else tensor._version
