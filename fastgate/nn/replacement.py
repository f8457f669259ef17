"""What takes the place of a pruned attention: nothing, a vector, a scale per channel, or a token shift."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgate.errors import ArgumentError, format_error
from fastgate.nn.choices import REPLACEMENT_KINDS, ReplacementKind
from fastgate.ops.reference import neighbours

KINDS = REPLACEMENT_KINDS


class Replacement(nn.Module):
    """r(h)[i] = offset + scale * h[i] + before * h[i - 1] + after * h[i + 1], per channel.

    kind: `zero` (no parameters), `mean` (the offset), `affine` (offset and scale), `shift`, the token shift
    (all four). Parameters: (hidden,), zero at first. State dicts hold the offset under the name `shift`.
    Neighbours are tokens side by side in one sequence, both attended; one that is missing counts as zero. So
    neither padding nor the choice of output rows changes a value.

    Raises ArgumentError for another kind.
    """

    shift: nn.Parameter | None
    scale: nn.Parameter | None
    before: nn.Parameter | None
    after: nn.Parameter | None

    def __init__(
        self,
        kind: ReplacementKind,
        hidden: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        if kind not in REPLACEMENT_KINDS:
            wanted = " | ".join(REPLACEMENT_KINDS)
            raise ArgumentError(format_error("Replacement", "kind", repr(kind), wanted, "pass one of these"))
        self.kind: ReplacementKind = kind

        def vector(present: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(hidden, dtype=dtype, device=device)) if present else None

        self.shift = vector(kind != "zero")
        self.scale = vector(kind in ("affine", "shift"))
        self.before = vector(kind == "shift")
        self.after = vector(kind == "shift")

    @property
    def offset(self) -> Tensor | None:
        """The added vector, (hidden,); None for `zero`. Its name in a state dict is `shift`."""
        return self.shift

    @property
    def reads_neighbours(self) -> bool:
        """Whether r(h) of a row reads the rows beside it. Then it cannot be folded into a LayerNorm."""
        return self.before is not None

    def forward(self, h: Tensor, has_left_neighbour: Tensor) -> Tensor:
        """r(h) of rows (rows, hidden): as many, or for `zero` and `mean` the one, (hidden,), that all share.

        has_left_neighbour: (rows,) bool, whether a row and the one above it are neighbours.
        """
        r: Tensor = h.new_zeros(h.shape[1]) if self.offset is None else self.offset
        if self.scale is not None:
            r = torch.addcmul(r, self.scale, h)
        if self.before is not None and self.after is not None:
            above, below = neighbours(h, has_left_neighbour)
            r = torch.addcmul(torch.addcmul(r, self.before, above), self.after, below)
        return r

    def scale_and_offset(self, share: float | Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(a, b) so that a * h + b = h + share * r(h), but for a token shift; None stands for 1 and 0.

        share: a float, or a tensor without dimensions.
        """
        scale: Tensor | None = self.scale
        offset: Tensor | None = self.offset
        if isinstance(share, Tensor) or share != 1.0:  # else each would be a kernel that changes nothing
            scale = None if scale is None else share * scale
            offset = None if offset is None else share * offset
        return None if scale is None else 1.0 + scale, offset

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


class Removed(nn.Module):
    """Takes the place of the weights of a pruned attention. A call raises ArgumentError."""

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
