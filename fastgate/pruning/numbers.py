"""Checking the numbers of a configuration: finite, no booleans, plain floats whatever they were given as."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch

from fastgate.errors import ArgumentError, format_error


def number(
    where: str, name: str, value: Any, wanted: str, remedy: str, fits: Callable[[float], bool]
) -> float:
    """`value` as a float. Numbers of numpy and 0-d tensors are taken too; what is not finite, True, text and
    what does not fit raise ArgumentError."""
    plain = _plain(value)
    if not isinstance(plain, Real) or not math.isfinite(plain) or not fits(float(plain)):
        raise ArgumentError(format_error(where, name, repr(value), wanted, remedy))
    return float(plain)


def integer(where: str, name: str, value: Any, wanted: str, remedy: str, fits: Callable[[int], bool]) -> int:
    """`value` as an int, as `number`; 3.0 is not one."""
    plain = _plain(value)
    if not isinstance(plain, Integral) or not fits(int(plain)):
        raise ArgumentError(format_error(where, name, repr(value), wanted, remedy))
    return int(plain)


def _plain(value: Any) -> Any:
    """What is inside a 0-d tensor or array; None for booleans, which Python counts as integers."""
    if isinstance(value, torch.Tensor) or hasattr(value, "ndim"):
        value = value.item() if value.ndim == 0 else None
    return None if isinstance(value, bool) else value
