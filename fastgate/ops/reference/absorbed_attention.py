"""absorbed_attention, the mathematics, on a padded grid of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgate.ops.reference.norm import accumulation_dtype


def _weights(
    probe: Tensor, grid: Tensor, there: Tensor | None, scale: float, empty: bool, dtype: torch.dtype
) -> Tensor:
    """The softmax of the scores, (sequences, heads, longest), in the accumulation dtype."""
    scores = torch.bmm(probe * scale, grid.transpose(1, 2)).to(dtype)
    if there is not None:
        scores = scores.masked_fill(~there[:, None, :], float("-inf"))
    p = scores.softmax(-1)
    return p.nan_to_num(0.0) if empty else p


def absorbed_attention(
    probe: Tensor,
    grid: Tensor,
    scale: float,
    *,
    there: Tensor | None = None,
    empty: bool = False,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows mixed by the weights that a probe a head gives them, with rows j of one sequence and head h:

        p_j = softmax_j(scale * probe_h . x_j)     mixed_h = sum_j P_hj x_j     total_h = sum_j P_hj

    where P = mask * p / (1 - dropout_p). probe: (sequences, heads, H); grid: (sequences, longest, H), the
    rows x and zeros where none is; there: (sequences, longest) bool, None if all are; empty: some sequence
    has no row, and gets zeros; mask: bool (sequences, heads, longest), True where kept. Returns mixed
    (sequences, heads, H) in the dtype of grid and total (sequences, heads) in that of sums: float32, float64
    for float64. Differentiable by plain autograd.
    """
    dtype = accumulation_dtype(probe, grid)
    p = _weights(probe, grid, there, scale, empty, dtype)
    if mask is not None:
        p = torch.where(mask, p / (1.0 - dropout_p), 0.0)
    return torch.bmm(p.to(grid.dtype), grid), p.sum(-1)


def absorbed_attention_backward(
    grad_mixed: Tensor,
    grad_total: Tensor | None,
    probe: Tensor,
    grid: Tensor,
    scale: float,
    *,
    there: Tensor | None = None,
    empty: bool = False,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dprobe, dgrid) of absorbed_attention, written out; computes the weights again.

    dP_hj = mask_hj / (1 - dropout_p) * (grad_mixed_h . x_j + grad_total_h)
    dS_hj = p_hj * (dP_hj - sum_k p_hk dP_hk)
    dprobe_h = scale * sum_j dS_hj x_j         dx_j = sum_h (P_hj grad_mixed_h + scale * dS_hj probe_h)
    """
    dtype = accumulation_dtype(probe, grid)
    x, a, u = (t.to(dtype) for t in (grid, probe, grad_mixed))
    p = dropped = _weights(a, x, there, scale, empty, dtype)
    dp = torch.bmm(u, x.transpose(1, 2))
    if grad_total is not None:
        dp = dp + grad_total.to(dtype).unsqueeze(-1)
    if mask is not None:
        dropped = torch.where(mask, p / (1.0 - dropout_p), 0.0)
        dp = torch.where(mask, dp / (1.0 - dropout_p), 0.0)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    dprobe = torch.bmm(ds, x)
    dx = torch.bmm(dropped.transpose(1, 2), u) + torch.bmm(ds.transpose(1, 2), a)
    return dprobe.to(probe.dtype), dx.to(grid.dtype)
