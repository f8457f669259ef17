"""Memory of training: the bytes that autograd keeps for a backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn


class _SavedTensor:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()  # with its graph, an op's own output would keep itself alive


def saved_bytes(step: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward of what `step()` returns, each storage once.

    step: one forward that ends in a loss, e.g. `lambda: model(**batch).loss`; it is called once, and no
    backward. Parameters and buffers of `model`, which are there anyway, do not count; what is worked out anew
    in the backward (dropout masks, gradient checkpointing) does not either. A step's peak is higher by what
    the backward itself allocates.
    """
    alive: weakref.WeakSet[_SavedTensor] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _SavedTensor:
        saved = _SavedTensor(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = step()
    of_model = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = [saved.tensor.untyped_storage() for saved in alive]
    sizes = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in of_model}
    del loss  # until here its graph kept what is counted
    return sum(sizes.values())
