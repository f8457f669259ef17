"""The phase of a pruning run as a function of the step: nothing else remembers where training is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastgate.errors import ArgumentError, format_error
from fastgate.pruning.numbers import integer

Phase = Literal["warm", "search", "recover"]
WARM: Literal["warm"] = "warm"
SEARCH: Literal["search"] = "search"
RECOVER: Literal["recover"] = "recover"


@dataclass(frozen=True)
class Schedule:
    """Steps at which things happen, of `total` optimizer steps counted from 0.

    [0, begin) is `warm`: every gate is open, the attention outputs are measured for the replacements.
    [begin, harden) is `search`: gates are drawn; the target rises linearly until `ramp` and is held from
    there. [harden, total) is `recover`: gates are fixed at 0 and 1, the pruned model is fine-tuned.
    """

    total: int
    begin: int
    ramp: int
    harden: int

    @property
    def marks(self) -> tuple[int, int, int]:
        """The numbers of steps after which a phase ends."""
        return self.begin, self.harden, self.total

    def phase(self, step: int) -> Phase:
        """`warm`, `search` or `recover`: the phase of the optimizer step numbered `step`."""
        return WARM if step < self.begin else SEARCH if step < self.harden else RECOVER

    def target_share(self, step: int) -> float:
        """The share of the target asked for at `step`, rising from 0 to 1."""
        if step >= self.ramp:
            return 1.0
        return max(0.0, (step + 1 - self.begin) / (self.ramp + 1 - self.begin))

    def without_search(self) -> Schedule:
        """The schedule of a run with nothing to search for: gates are hardened when the warm phase ends."""
        return Schedule(self.total, self.begin, self.begin, self.begin)


def make_schedule(total: int, warm: float, ramp: float, harden: float) -> Schedule:
    """A schedule of `total` steps from shares of it: end of the warm phase, end of the ramp, hardening.

    There is at least one warm step to measure in, and at least one step to recover in.
    """
    remedy = "train for more steps or use smaller batches"
    total = integer("Pruner", "total_steps", total, "3 or more: one a phase", remedy, lambda n: n >= 3)
    if not 0.0 <= warm <= ramp <= harden < 1.0:
        wanted, remedy = "0 <= warm <= ramp <= harden < 1", "give each as a share of all steps"
        raise ArgumentError(
            format_error("PruningConfig", "warm, ramp, harden", (warm, ramp, harden), wanted, remedy)
        )
    begin = min(max(1, round(warm * total)), total - 2)
    hard = min(max(begin + 1, round(harden * total)), total - 1)
    return Schedule(total, begin, min(max(begin, round(ramp * total)), hard), hard)
