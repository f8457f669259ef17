"""What stands in for a skipped attention: nothing, a vector, or a vector and a scale a channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import ArgumentError, say

KINDS = ("zero", "mean", "affine")


class Replacement(nn.Module):
    """r(h) = shift + scale * h, per channel (DESIGN: the replacement of a gated attention).

    kind: `zero` (no parameters), `mean` (`shift`), `affine` (`shift` and `scale`). Parameters: (hidden,),
    zero at first.
    """

    def __init__(
        self, kind: str, hidden: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ):
        super().__init__()
        if kind not in KINDS:
            raise ArgumentError(
                say("Replacement", "kind", repr(kind), " | ".join(KINDS), "pass one of these")
            )
        self.kind = kind

        def vector(present: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(hidden, dtype=dtype, device=device)) if present else None

        self.shift = vector(kind != "zero")
        self.scale = vector(kind == "affine")

    def scale_and_shift(self, share: float | Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(a, b) so that a * h + b = h + share * r(h); None stands for 1 and 0."""
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
            say(
                "forward",
                "attention",
                "a call to a pruned attention",
                "a forward of the whole patched encoder",
                "call the model, not its parts",
            )
        )
