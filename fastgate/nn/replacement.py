"""What takes the place of a pruned attention: nothing, a vector, or a scale and a vector per channel.

The token shift, which reads neighbouring rows, is in runtime/steps/token_shift.py together with its step.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgate.errors import ArgumentError, format_error
from fastgate.nn.choices import ReplacementKind

# Kind -> its class. A class registers itself by being defined.
REPLACEMENTS: dict[str, type[Replacement]] = {}


class Replacement(nn.Module):
    """r(h), which replaces the output of a pruned attention.

    kind: its name in configs. vectors: its parameters, (hidden,) each, zero at first. `shift` is the added
    vector; state dicts have it under that name. step: the step of a plan that computes it together with the
    LayerNorm behind it. None: r(h) of a row depends on that row alone and is folded into a LayerNorm.
    """

    kind: ClassVar[ReplacementKind]
    vectors: ClassVar[tuple[str, ...]]
    step: ClassVar[type[Any] | None] = None

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:  # a subclass by a user is no kind of its own
            REPLACEMENTS[cls.kind] = cls

    def __init__(self, hidden: int, dtype: torch.dtype | None = None, device: torch.device | None = None):
        super().__init__()
        for name in self.vectors:  # read as attributes: a replica of DataParallel has no parameters
            self.register_parameter(name, nn.Parameter(torch.zeros(hidden, dtype=dtype, device=device)))

    @property
    def offset(self) -> Tensor | None:
        """The added vector, (hidden,), if there is one. Its name in a state dict is `shift`."""
        return getattr(self, "shift", None)

    @property
    def reads_neighbours(self) -> bool:
        """Whether r(h) of a row reads the rows beside it. Then it cannot be folded into a LayerNorm."""
        return self.step is not None

    def forward(self, h: Tensor, has_left_neighbour: Tensor) -> Tensor:
        """r(h) of rows (rows, hidden): as many, or the one, (hidden,), that all share.

        has_left_neighbour: (rows,) bool, whether a row and the one above it are neighbours.
        """
        scale = getattr(self, "scale", None)
        r: Tensor = h.new_zeros(h.shape[1]) if self.offset is None else self.offset
        return r if scale is None else torch.addcmul(r, scale, h)

    def scale_and_offset(self, share: float | Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(a, b) so that a * h + b = h + share * r(h), where r(h) reads no neighbours. None: 1 and 0.

        share: a float, or a tensor without dimensions.
        """
        scale: Tensor | None = getattr(self, "scale", None)
        offset = self.offset
        if isinstance(share, Tensor) or share != 1.0:  # else each would be a kernel that changes nothing
            scale = None if scale is None else share * scale
            offset = None if offset is None else share * offset
        return None if scale is None else 1.0 + scale, offset

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


class Zero(Replacement):
    """r(h) = 0."""

    kind = "zero"
    vectors = ()


class Mean(Replacement):
    """r(h) = offset."""

    kind = "mean"
    vectors = ("shift",)


class Affine(Replacement):
    """r(h) = offset + scale * h, per channel."""

    kind = "affine"
    vectors = ("shift", "scale")


def make_replacement(
    kind: ReplacementKind,
    hidden: int,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Replacement:
    """A new replacement of a kind. Raises ArgumentError for another kind."""
    if kind not in REPLACEMENTS:
        wanted = " | ".join(REPLACEMENTS)
        raise ArgumentError(format_error("Replacement", "kind", repr(kind), wanted, "pass one of these"))
    return REPLACEMENTS[kind](hidden, dtype, device)


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
