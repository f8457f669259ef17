"""Memory of training: the bytes that autograd keeps for a backward; the products that oneDNN keeps."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

# oneDNN's own cache, and those of torch's layer above it, one a thread and kind of product; of 1,024 each.
PRODUCT_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
COMPILED_PRODUCTS = 64


def bound_compiled_products() -> None:
    """Keep at most 64 compiled products a cache, here and in children. Call it before the first product.

    On the CPU oneDNN compiles a product for each number of rows, which after packing is another one in nearly
    every batch, and keeps it: 0.3 MB a product and cache, which lie between the activations, so that the
    memory of those cannot be used again either. A training on long texts grows by tens of megabytes a step
    that way. To compile a product anew takes a millisecond. A variable of PRODUCT_CACHES that is set stays.

    Not for a process that times or serves models: other models' products are kept there too.
    """
    for name in PRODUCT_CACHES:
        os.environ.setdefault(name, str(COMPILED_PRODUCTS))


class _Kept:
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
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        saved = _Kept(tensor)
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = step()
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = [saved.tensor.untyped_storage() for saved in kept]
    found = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in there}
    del loss  # until here its graph kept what is counted
    return sum(found.values())
