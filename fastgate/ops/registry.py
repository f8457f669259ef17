"""The registry: which implementation runs an op on a kind of device; the reference where none does.

An op's public function calls the implementation directly on plain tensors, through an autograd function only
if a gradient is requested. Where torch traces, it calls the registered op. A registered autograd formula
costs 8 microseconds a call without a gradient, and 200 with one for the many arguments of gated_add_norm.

Backends are described in backends.py, which leaves a loader here. It runs before the first op.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LIBRARY = torch.library.Library("fastgate", "DEF")  # type: ignore[no-untyped-call]


class Saving(NamedTuple):
    """A forward that also returns what spares backward work, and the backward that takes it.

    The op's module says what is saved.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


@dataclass(frozen=True)
class Implementation:
    """One backend's functions for one op, and what they take.

    backend: its name, as set_backend takes it.
    forward, backward: take the arguments of the op's schema by position.
    dtypes: of the op's floating operands.
    saving: where it saves something for backward.
    fits: decides by an op's operands, given by name: `head_dim` for attention, `probe` for
        absorbed_attention, `x` and `weight` for linear and linear_gelu. None: it takes all of them.
    fused: fused_layers.py calls the same code.
    """

    backend: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    dtypes: frozenset[torch.dtype]
    saving: Saving | None = None
    fits: Callable[..., bool] | None = None
    fused: bool = False

    def supports(self, dtypes: Iterable[torch.dtype], operands: Mapping[str, Any] | None = None) -> bool:
        """Whether it runs a call whose floating operands have these dtypes.

        operands: what `fits` is asked about. Without them the dtypes alone decide.
        """
        if not self.dtypes.issuperset(dtypes):
            return False
        return not operands or self.fits is None or self.fits(**operands)


Key = tuple[str, str]  # (op, device type)
# Each op's module leaves its own here.
REFERENCE: dict[str, Implementation] = {}
# What runs; the reference runs what is not in it.
IMPLEMENTATIONS: dict[Key, Implementation] = {}
# What `select` has put in place of the defaults.
_selected: dict[Key, Implementation] = {}
_defaults: dict[Key, Implementation] = {}
_loader: Callable[[], Mapping[Key, Implementation]] | None = None
_lock = threading.RLock()


def register_loader(loader: Callable[[], Mapping[Key, Implementation]]) -> None:
    """Leave the function that finds the default implementations. It is called before the first op runs.

    An op raises what the loader raises, and the next op calls it again.
    """
    global _loader
    with _lock:
        _loader = loader


def load_defaults() -> None:
    """Call the loader once, in the thread that comes first; the others wait for it."""
    global _loader
    with _lock:
        if _loader is not None:
            loaded = _loader()
            _defaults.update(loaded)
            IMPLEMENTATIONS.update({**loaded, **_selected})
            _loader = None


def implementation(op: str, device_type: str, *dtypes: torch.dtype, **operands: Any) -> Implementation:
    """The implementation that runs `op` on tensors of these dtypes on this kind of device.

    operands: as Implementation.supports takes them.
    """
    if _loader is not None:
        load_defaults()
    chosen = IMPLEMENTATIONS.get((op, device_type))
    # Without operands the dtypes decide, and a call of `supports` would cost a tenth of a microsecond.
    if chosen is None or not chosen.dtypes.issuperset(dtypes):
        return REFERENCE[op]
    if operands and chosen.fits is not None and not chosen.fits(**operands):
        return REFERENCE[op]
    return chosen


def select(op: str, device_type: str, implementation: Implementation | None) -> None:
    """Run `op` on this kind of device by an implementation, where that supports the call.

    None: by the default again.
    """
    with _lock:
        load_defaults()
        key = (op, device_type)
        if implementation is None:
            _selected.pop(key, None)
            implementation = _defaults.get(key)
        else:
            _selected[key] = implementation
        if implementation is None:
            IMPLEMENTATIONS.pop(key, None)
        else:
            IMPLEMENTATIONS[key] = implementation


def selected(op: str, device_type: str) -> Implementation | None:
    """What `select` put in place of the default, None for the default."""
    return _selected.get((op, device_type))


def reference_is_selected(op: str, device_type: str) -> bool:
    """Whether `select` put the reference in place of the default."""
    return _selected.get((op, device_type)) is REFERENCE[op]


def selections() -> tuple[tuple[Key, str], ...]:
    """All that `select` put in place of defaults: ((op, device type), backend) in order.

    For the key of a CUDA graph, whose kernels are chosen once.
    """
    chosen = tuple(_selected.items())  # at once: another thread may select meanwhile
    return tuple(sorted((key, implementation.backend) for key, implementation in chosen)) if chosen else ()


def define_op(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an op of torch.ops.fastgate.

    schema: begins with the op's name. function: runs it on every kind of device. fake: gives outputs without
    elements, for tracing.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fastgate::{name}", fake, lib=LIBRARY)


def bypasses_dispatcher(tensor: Tensor) -> bool:
    """Whether implementations may be called without the dispatcher: nothing traces, no tensor subclass."""
    return type(tensor) is Tensor and not torch.compiler.is_compiling()


def draw_seed(op: str, dropout_p: float, device: torch.device) -> Tensor | None:
    """The () int64 seed of a dropout mask, from torch's default generator; None if nothing is dropped."""
    if dropout_p == 0.0:
        return None
    if not 0.0 <= dropout_p < 1.0:
        raise ArgumentError(
            format_error(
                op, "dropout_p", dropout_p, "0 <= dropout_p < 1", "pass a gate of 0 to drop everything"
            )
        )
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
