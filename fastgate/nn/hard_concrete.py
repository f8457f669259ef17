"""The distributions of the gates: drawing on the host, probabilities, the mean.

A gate is `z = clamp(s * (ZETA - GAMMA) + GAMMA, 0, 1)` with `s = sigmoid((logit(u) + log_alpha) / BETA)` and
u uniform in (0, 1) (Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization",
2018). It is exactly 0, exactly 1, or between; where it is clipped its gradient is exactly zero.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error

GAMMA, ZETA = -0.1, 1.1  # the stretch: the probability mass outside [0, 1] is clipped onto 0 and 1
BETA = 2.0 / 3.0  # temperature
_LOGIT_OFFSET = BETA * math.log(-GAMMA / ZETA)  # P(z > 0) = sigmoid(log_alpha - _LOGIT_OFFSET)


def draw(log_alpha: Tensor, generator: torch.Generator) -> Tensor:
    """One draw of every gate: values in [0, 1], shape and dtype of `log_alpha`, differentiable in it.

    `log_alpha` and `generator` live on the CPU, so that deciding which sublayers to skip waits for no device
    and every process with the same seed draws the same gates.
    """
    if log_alpha.device.type != "cpu" or generator.device.type != "cpu":
        raise ArgumentError(
            format_error(
                "hard_concrete.draw",
                "log_alpha",
                f"{log_alpha.device.type}, generator {generator.device.type}",
                "both on the CPU",
                "move log_alpha to the CPU and use torch.Generator()",
            )
        )
    # fp64 noise whatever log_alpha's dtype: u is never 0 or 1 exactly after the clamp, so logit(u) is finite.
    u = torch.rand(log_alpha.shape, generator=generator, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)
    s = torch.sigmoid((torch.logit(u).to(log_alpha.dtype) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def draw_exact(log_alpha: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    """One draw with exactly `keep` gates at 1 and the others at 0; as `draw` otherwise.

    The `keep` largest of log_alpha + Gumbel noise: without replacement, in proportion to exp(log_alpha)
    (Kool, van Hoof, Welling, "Stochastic Beams and Where to Find Them", 2019). Straight-through (Bengio,
    Leonard, Courville 2013): the gradient is that of sigmoid((log_alpha + noise - t) / BETA), with t half way
    between the last kept and the first dropped.
    """
    if not 0 <= keep <= log_alpha.numel():
        raise ArgumentError(
            format_error(
                "hard_concrete.draw_exact",
                "keep",
                keep,
                f"0 to {log_alpha.numel()}",
                "keep at most all of them",
            )
        )
    u = torch.rand(log_alpha.shape, generator=generator, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)
    scores = log_alpha - torch.log(-torch.log(u)).to(log_alpha.dtype)
    if keep in (0, log_alpha.numel()):
        return 0.0 * scores + float(keep > 0)
    ordered = scores.sort(descending=True).values
    soft = torch.sigmoid((scores - (ordered[keep - 1] + ordered[keep]) / 2) / BETA)
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


def p_open(log_alpha: Tensor) -> Tensor:
    """P(z > 0), the probability that the sublayer runs at all."""
    return torch.sigmoid(log_alpha - _LOGIT_OFFSET)


def expected(log_alpha: Tensor) -> Tensor:
    """E[z], as the integral over t in [0, 1] of P(z > t)."""
    points, weights = _quadrature()
    points, weights = points.to(log_alpha.dtype), weights.to(log_alpha.dtype)
    threshold = torch.logit((points - GAMMA) / (ZETA - GAMMA))
    return (torch.sigmoid(log_alpha.unsqueeze(-1) - BETA * threshold) * weights).sum(-1)


def harden(scores: Tensor, keep: int) -> list[int]:
    """The indices of the `keep` largest scores, ascending; of equal scores the lower index is kept."""
    if not 0 <= keep <= scores.numel():
        raise ArgumentError(
            format_error(
                "hard_concrete.harden",
                "keep",
                keep,
                f"0 to {scores.numel()}",
                "ask for at most as many as there are gates",
            )
        )
    order = sorted(range(scores.numel()), key=lambda i: (-float(scores[i]), i))
    return sorted(order[:keep])


@functools.cache
def _quadrature() -> tuple[Tensor, Tensor]:
    """32 Gauss-Legendre points and weights on [0, 1], from the Jacobi matrix (Golub and Welsch 1969)."""
    k = torch.arange(1, 32, dtype=torch.float64)
    off = k / torch.sqrt(4 * k * k - 1)
    points, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (points + 1) / 2, vectors[0] ** 2
