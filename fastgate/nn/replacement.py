"""What stands in for a skipped attention: nothing, a vector, a scale a channel, or a mix of neighbours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgate.errors import ArgumentError, format_error
from fastgate.ops.reference import neighbours

KINDS = ("zero", "mean", "affine", "shift")


class Replacement(nn.Module):
    """r(h)[i] = shift + scale * h[i] + before * h[i - 1] + after * h[i + 1], per channel.

    kind: `zero` (no parameters), `mean` (`shift`), `affine` (`shift` and `scale`), `shift` (all four).
    Parameters: (hidden,), zero at first. Neighbours are tokens side by side in one sequence, both attended;
    one that is missing counts as zero. So neither padding nor the rows that are demanded change a value.
    """

    def __init__(
        self, kind: str, hidden: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ):
        super().__init__()
        if kind not in KINDS:
            raise ArgumentError(
                format_error("Replacement", "kind", repr(kind), " | ".join(KINDS), "pass one of these")
            )
        self.kind = kind

        def vector(present: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(hidden, dtype=dtype, device=device)) if present else None

        self.shift = vector(kind != "zero")
        self.scale = vector(kind in ("affine", "shift"))
        self.before = vector(kind == "shift")
        self.after = vector(kind == "shift")

    @property
    def reads_neighbours(self) -> bool:
        """Whether r(h) of a row reads the rows beside it: then no LayerNorm can take it in."""
        return self.before is not None

    def forward(self, h: Tensor, linked: Tensor) -> Tensor:
        """r(h) of rows (rows, hidden): as many, or for `zero` and `mean` the one, (hidden,), that all share.

        linked: (rows,) bool, whether a row and the one above it are neighbours.
        """
        r: Tensor = h.new_zeros(h.shape[1]) if self.shift is None else self.shift
        if self.scale is not None:
            r = torch.addcmul(r, self.scale, h)
        if self.before is not None and self.after is not None:
            above, below = neighbours(h, linked)
            r = torch.addcmul(torch.addcmul(r, self.before, above), self.after, below)
        return r

    def scale_and_shift(self, share: float | Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(a, b) so that a * h + b = h + share * r(h), but for `shift`; None stands for 1 and 0."""
        scale: Tensor | None = self.scale
        shift: Tensor | None = self.shift
        if isinstance(share, Tensor) or share != 1.0:  # else each would be a kernel that changes nothing
            scale = None if scale is None else share * scale
            shift = None if shift is None else share * shift
        return None if scale is None else 1.0 + scale, shift

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


class Removed(nn.Module):
    """Stands where a pruned attention's weights were."""

    fastgate_removed = True

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        raise ArgumentError(
            format_error(
                "forward",
                "attention",
                "a call to a pruned attention",
                "a forward of the whole patched encoder",
                "call the model, not its parts",
            )
        )
