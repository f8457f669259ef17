"""What every run on a task is told: model, rows, batches, and how much attention to remove."""

from __future__ import annotations

from dataclasses import dataclass

from fastgate.pruning import Sparsity, Speedup
from fastgate.training.max_drop import MaxDrop

TARGETS = ("sparsity", "speedup", "max_drop")


@dataclass(frozen=True, kw_only=True)
class Job:
    """The part that `fastgate finetune` and the runs of a sweep share.

    model: a name of the hub, or a folder. task: its name. How much to remove, one of three: `sparsity`, the
    share of the attention sublayers; `speedup`, how many times cheaper the encoder shall be; `max_drop`, the
    share of the dense score that the cut may cost (budget.py). max_length: tokens a row is cut at, or with
    `stride` its windows' length (Task.tokenize). pooling: what the pooler of a classifier reads, `first` or
    `mean` (fastgate.patch). batch_size: rows an optimizer step. lr: the peak. bf16: train under autocast in
    bfloat16; weights, and scores, stay in float32. seed: of everything drawn.
    """

    model: str
    task: str
    sparsity: float | None = None
    speedup: float | None = None
    max_drop: float | None = None
    max_length: int = 128
    stride: int | None = None
    pooling: str = "first"
    batch_size: int = 32
    lr: float = 5e-5
    bf16: bool = False
    seed: int = 0

    @property
    def given(self) -> list[str]:
        """Names of those of TARGETS that are set."""
        return [name for name in TARGETS if getattr(self, name) is not None]

    @property
    def target(self) -> Sparsity | Speedup | MaxDrop:
        """What is to be removed. Raises ArgumentError for a number out of its range."""
        if self.max_drop is not None:
            return MaxDrop(self.max_drop)
        return Speedup(self.speedup) if self.speedup is not None else Sparsity(self.sparsity or 0.0)
