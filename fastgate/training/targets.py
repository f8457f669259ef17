"""What a run removes: one target, and how files of settings and options name it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fastgate.errors import ArgumentError, format_error
from fastgate.pruning import Fixed, Sparsity, Speedup
from fastgate.training.setting_ranges import DEFAULT_SPARSITY


@dataclass(frozen=True)
class MaxDrop:
    """Remove as much attention as costs at most `share`, in (0, 1), of the dense model's score."""

    share: float

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            remedy = "0.01 allows the score to fall by 1%"
            raise ArgumentError(
                format_error("MaxDrop", "share", self.share, "a number between 0 and 1", remedy)
            )

    def lowest_score(self, dense: float) -> float:
        """The lowest score that is within the budget, for the dense model's score."""
        return dense - self.share * abs(dense)


RunTarget = Sparsity | Speedup | MaxDrop | Fixed
DEFAULT_TARGET = Sparsity(DEFAULT_SPARSITY)

# A number under one of these keys, in a file of settings, is that target.
TARGET_KEYS: dict[str, type[Sparsity] | type[Speedup] | type[MaxDrop]] = {
    "sparsity": Sparsity,
    "speedup": Speedup,
    "max_drop": MaxDrop,
}


def removed_of(target: Sparsity, layers: int) -> int:
    """How many of `layers` attention sublayers a sparsity removes."""
    return math.floor(target.share * layers + 0.5)


def describe_target(target: RunTarget, layers: int) -> str:
    """What a run removes from a model of so many layers, as a phrase."""
    if isinstance(target, Sparsity):
        removed = removed_of(target, layers)
        return f"remove {removed} of {layers} attention sublayers, {removed / layers:.0%}"
    if isinstance(target, Speedup):
        return f"divide the FLOPs of the encoder by {target.factor:g}"
    if isinstance(target, MaxDrop):
        allowed = f"a loss of {100 * target.share:g}% of the score"
        return f"remove as many of {layers} attention sublayers as {allowed} allows"
    return f"keep the attention of layers {', '.join(map(str, target.keep))} of {layers}"


def key_of(target: RunTarget) -> str:
    """The key that a file of settings has for the target: one of TARGET_KEYS, or `keep`."""
    return next((key for key, kind in TARGET_KEYS.items() if isinstance(target, kind)), "keep")


def number_of(target: RunTarget | None) -> float | None:
    """The share or factor of a target, None for Fixed and for no target."""
    if isinstance(target, Speedup):
        return target.factor
    return target.share if isinstance(target, Sparsity | MaxDrop) else None


def target_settings(target: RunTarget | None) -> dict[str, float | None]:
    """As files of settings hold a target: each of TARGET_KEYS with its number, None for the others."""
    return {key: number_of(target) if isinstance(target, kind) else None for key, kind in TARGET_KEYS.items()}


def targets_in(settings: Mapping[str, float | None]) -> list[RunTarget]:
    """Every target that has a number in `settings`; it is up to the caller to want one.

    Raises ArgumentError for a number that the target cannot have.
    """
    numbers = ((kind, settings.get(key)) for key, kind in TARGET_KEYS.items())
    return [kind(number) for kind, number in numbers if number is not None]
