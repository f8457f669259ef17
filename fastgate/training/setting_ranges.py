"""The ranges of numeric settings: one table for the options of commands and the keys of a sweep config."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastgate.errors import ArgumentError, format_error


@dataclass(frozen=True)
class Range:
    """Numbers from low to high. above: without low itself. below: without high itself. whole: integers."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False

    def holds(self, value: object) -> bool:
        """Whether `value` is a finite number of the range; a bool is no number."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        if not math.isfinite(value):
            return False
        over = value > self.low if self.above else value >= self.low
        return bool(over and (value < self.high if self.below else value <= self.high))

    def __str__(self) -> str:
        number = "a whole number" if self.whole else "a number"
        if self.high == math.inf:
            return f"{number} above {self.low:g}" if self.above else f"{number} of at least {self.low:g}"
        if self.above:
            end = f"below {self.high:g}" if self.below else f"at most {self.high:.10g}"
            return f"{number} above {self.low:g} and {end}"
        return f"{number} from {self.low:g} to {'below ' if self.below else ''}{self.high:.10g}"


_COUNT = Range(1, whole=True)
_RATE = Range(0, 1, above=True)
_EPOCHS = Range(0, 100_000, above=True)
_SHARE = Range(0, 1, above=True, below=True)
_PART = Range(0, 1, below=True)
_WEIGHT = Range(0)

RANGES: dict[str, Range] = {
    "sparsity": _SHARE,
    "speedup": Range(1, above=True),
    "max_drop": _SHARE,
    "epochs": _EPOCHS,
    "prune_epochs": _EPOCHS,
    "dense_epochs": _EPOCHS,
    "warmup": _PART,
    "lr": _RATE,
    "dense_lr": _RATE,
    "prune_lr": _RATE,
    "gate_lr": Range(0, above=True),
    "replacement_lr": Range(0, above=True),
    "batch_size": Range(1, 1_000_000, whole=True),
    "batches": Range(1, 1_000_000, whole=True),
    "max_length": Range(3, 1_000_000, whole=True),
    "stride": Range(0, 1_000_000, whole=True),
    "max_train_rows": _COUNT,
    "max_eval_rows": _COUNT,
    "train_rows": _COUNT,
    "eval_rows": _COUNT,
    "seed": Range(0, 2**32 - 1, whole=True),  # what numpy takes
    "workers": Range(1, 256, whole=True),
    "threads": Range(1, 1024, whole=True),
    "logits": _WEIGHT,
    "hidden": _WEIGHT,
    "labels": _WEIGHT,
    "temperature": Range(0, above=True),
    "dropout": _PART,
    "swap": Range(0, 1),
    "warm": _PART,
    "ramp": _PART,
    "harden": _PART,
}

DEFAULT_SPARSITY = 0.67  # of `fastgate finetune`

_OPTIONS = {  # that are not spelled as their field
    "sparsity": "--target-sparsity",
    "speedup": "--target-speedup",
    "dense_epochs": "--epochs",
    "dense_lr": "--lr",
}


def option_of(field: str) -> str:
    """The option of a command that sets a field: `prune_epochs` is `--prune-epochs`."""
    return _OPTIONS.get(field, "--" + field.replace("_", "-"))


def check_range(where: str, argument: str, field: str, value: object) -> None:
    """Raises ArgumentError unless `value` is None or in the range of the field, if that has one.

    argument: what the user calls it, an option or a key.
    """
    if value is not None and field in RANGES and not RANGES[field].holds(value):
        got = repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
        raise ArgumentError(format_error(where, argument, got[:80], str(RANGES[field]), "change it"))
