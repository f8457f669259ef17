"""A device that is not there: tensors that lie on the CPU but say otherwise, and a count of the waits for it.

Whatever brings values from such a tensor to the host, or whose result's shape depends on them, would stop
the host until a GPU has come that far.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

REMOTE = torch.device("meta")  # of all kinds that are not built in, the one that slicing takes
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave", "is_nonzero")


class Remote(Tensor):
    """A CPU tensor `held` that says it is on REMOTE."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Remote:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=REMOTE, requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} on the device outside of `Waits`")


class Waits(TorchDispatchMode):
    """While entered, REMOTE is there. waits: what waited for it, counted."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        remote = any(isinstance(t, Remote) for t in tensors)
        name = function.overloadpacket.__name__
        to = kwargs.get("device")
        there = remote if to is None else torch.device(to).type == REMOTE.type
        if remote and name == "copy_" and not isinstance(args[0], Remote):
            self.waits["copy_"] += 1
            there = False
        elif remote and (name in WAITS or not there):
            self.waits[name] += 1
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        plain = tree_map(lambda leaf: leaf.held if isinstance(leaf, Remote) else leaf, (args, kwargs))
        found = function(*plain[0], **plain[1])
        if not there:
            return found
        originals = {id(leaf.held): leaf for leaf in tensors if isinstance(leaf, Remote)}
        return tree_map(
            lambda leaf: originals.get(id(leaf), Remote(leaf)) if isinstance(leaf, Tensor) else leaf, found
        )


def on_remote(model: nn.Module) -> nn.Module:
    """Its parameters and buffers moved there, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = Remote(parameter.detach())  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Remote(buffer)
    return model
