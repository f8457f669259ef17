"""CUDA graphs imitated on the CPU: what a body did to memory is done again to the same memory.

The ops that a body calls are recorded with the memory of their operands, and a replay runs them anew from
that memory into the memory of their results: like a graph it knows no Python, sees values that changed in
place, and misses whatever was put elsewhere. Attention is an op that reads the ends of sequences when it
runs, as the GPU's kernels do, and leaves NaN in the rows after the last of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastgate import ops
from fastgate.ops import registry
from fastgate.runtime.graph_device import DEVICES


def tensors_of(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Tape(TorchDispatchMode):
    """Records while it is entered; replay() runs the record."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        # Aliases: a parameter that is given other memory later is not followed.
        args, kwargs, kept = tree_map(
            lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs or {}, out)
        )
        self.steps.append((function, args, kwargs, kept))
        return out

    def replay(self) -> None:
        for function, args, kwargs, kept in self.steps:
            found = function(*args, **kwargs)
            given = {t.untyped_storage().data_ptr() for t in tensors_of((args, kwargs))}
            for new, old in zip(tensors_of(found), tensors_of(kept), strict=True):
                if old.untyped_storage().data_ptr() not in given:  # neither a view nor written in place
                    old.copy_(new)


class Pretended:
    """The device that graphs are captured on. fail: what capture raises."""

    busy_now = False
    fail: Exception | None = None
    drained = 0

    def __init__(self, device: torch.device) -> None:
        self.inside = threading.Lock()
        self.results: list[Tensor] = []

    @staticmethod
    def busy(device: torch.device) -> bool:
        return Pretended.busy_now

    @contextmanager
    def use(self) -> Iterator[None]:
        assert self.inside.acquire(blocking=False), "two calls at once in one memory"
        try:
            yield
        finally:
            for result in self.results:
                result.fill_(float("nan"))  # what a call returned must not lie here
            self.inside.release()

    def capture(self, body: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        body()
        if self.fail is not None:
            raise self.fail
        tape = Tape()
        with tape:
            out = body()
        self.results.append(out)
        return tape.replay, out

    def drain(self) -> None:
        Pretended.drained += 1


@torch.library.custom_op("fastgate_tests::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None,
    cu_q: Tensor, cu_k: Tensor, heads: int, scale: float,
) -> Tensor:  # fmt: skip
    n, m = int(cu_q[-1]), int(cu_k[-1])
    assert (cu_q.diff() >= 0).all() and n <= q.shape[0] and m <= k.shape[0] and cu_q.shape == cu_k.shape
    out = torch.full_like(q, float("nan"))
    out[:n] = ops.REFERENCE["attention"].forward(
        q[:n], k[:m], v[:m], q_bias, k_bias, v_bias, cu_q, cu_k, heads, scale, 0.0, None
    )
    return out


@torch.library.custom_op("fastgate_tests::absorbed_attention", mutates_args=())
def _absorbed(probe: Tensor, x: Tensor, cu: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    assert cu.numel() == probe.shape[0] + 1 and int(cu[-1]) <= x.shape[0]
    return ops.REFERENCE["absorbed_attention"].forward(probe, x[: int(cu[-1])], cu, scale, 0.0, None)


@contextmanager
def pretended() -> Iterator[type[Pretended]]:
    """While open, graphs run on the CPU, with attention that finds its rows as a GPU's does."""
    ops.implementation("attention", "cpu", torch.float32)  # the first call loads the registry
    before, devices = dict(registry.IMPLEMENTATIONS), dict(DEVICES)
    drawn = {
        "attention": lambda *o: torch.ops.fastgate_tests.attention(*o[:10]),
        "absorbed_attention": lambda *o: torch.ops.fastgate_tests.absorbed_attention(*o[:4]),
    }
    for op, forward in drawn.items():
        registry.IMPLEMENTATIONS[op, "cpu"] = replace(ops.REFERENCE[op], backend="by ends", forward=forward)
    DEVICES["cpu"] = Pretended
    Pretended.busy_now, Pretended.fail, Pretended.drained = False, None, 0
    try:
        yield Pretended
    finally:
        registry.IMPLEMENTATIONS.clear()
        registry.IMPLEMENTATIONS.update(before)
        DEVICES.clear()
        DEVICES.update(devices)
