"""absorbed_attention, the mathematics: of the rows j of one sequence, mixed by what a probe a head gives
them:

    p_j = softmax_j(scale * probe_h . x_j)     mixed_h = sum_j P_hj x_j     total_h = sum_j P_hj

with P = mask * p / (1 - dropout_p), and backwards:

    dP_hj = mask_hj / (1 - dropout_p) * (grad_mixed_h . x_j + grad_total_h)
    dS_hj = p_hj * (dP_hj - sum_k p_hk dP_hk)
    dprobe_h = scale * sum_j dS_hj x_j         dx_j = sum_h (P_hj grad_mixed_h + scale * dS_hj probe_h)

The rows of all sequences are brought to a padded grid, (sequences, longest, H).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgate.ops.ragged import SequenceOffsets
from fastgate.ops.reference.dropout import keep_mask
from fastgate.ops.reference.norm import accumulation_dtype


def _weights(
    probe: Tensor, grid: Tensor, is_row: Tensor | None, scale: float, empty: bool, dtype: torch.dtype
) -> Tensor:
    """The softmax of the scores, (sequences, heads, longest), in the accumulation dtype."""
    scores = torch.bmm(probe * scale, grid.transpose(1, 2)).to(dtype)
    if is_row is not None:
        scores = scores.masked_fill(~is_row[:, None, :], float("-inf"))
    p = scores.softmax(-1)
    return p.nan_to_num(0.0) if empty else p


def absorbed_attention_on_grid(
    probe: Tensor,
    grid: Tensor,
    scale: float,
    *,
    is_row: Tensor | None = None,
    empty: bool = False,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(mixed, total) of the module's head comment, differentiable by plain autograd.

    probe: (sequences, heads, H); grid: (sequences, longest, H), the rows x and zeros where none is; is_row:
    (sequences, longest) bool, None if all are; empty: some sequence has no row, and gets zeros; mask: bool
    (sequences, heads, longest), True where kept. Returns mixed (sequences, heads, H) in the dtype of grid and
    total (sequences, heads)
    in that of sums: float32, float64 for float64.
    """
    dtype = accumulation_dtype(probe, grid)
    p = _weights(probe, grid, is_row, scale, empty, dtype)
    if mask is not None:
        p = torch.where(mask, p / (1.0 - dropout_p), 0.0)
    return torch.bmm(p.to(grid.dtype), grid), p.sum(-1)


def absorbed_attention_on_grid_backward(
    grad_mixed: Tensor,
    grad_total: Tensor | None,
    probe: Tensor,
    grid: Tensor,
    scale: float,
    *,
    is_row: Tensor | None = None,
    empty: bool = False,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dprobe, dgrid) by the equations of the module's head comment, written out; computes the weights again.

    grad_mixed: (sequences, heads, H); grad_total: (sequences, heads), None for zeros.
    """
    dtype = accumulation_dtype(probe, grid)
    x, a, u = (t.to(dtype) for t in (grid, probe, grad_mixed))
    p = dropped = _weights(a, x, is_row, scale, empty, dtype)
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


def absorbed_attention(
    probe: Tensor,
    x: Tensor,
    keys: SequenceOffsets,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(mixed, total) of rows of an unpadded batch, for every device and dtype.

    probe: (sequences, heads, H); x: (keys.rows, H); seed: () int64 where dropout_p > 0. Returns as
    absorbed_attention_on_grid does.
    """
    is_row, empty, mask = _grid_places(probe, keys, dropout_p, seed)
    return absorbed_attention_on_grid(
        probe, keys.grid(x), scale, is_row=is_row, empty=empty, dropout_p=dropout_p, mask=mask
    )


def absorbed_attention_backward(
    grad_mixed: Tensor,
    grad_total: Tensor | None,
    probe: Tensor,
    x: Tensor,
    keys: SequenceOffsets,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dprobe, dx) of absorbed_attention, dx (keys.rows, H)."""
    is_row, empty, mask = _grid_places(probe, keys, dropout_p, seed)
    dprobe, dgrid = absorbed_attention_on_grid_backward(
        grad_mixed, grad_total, probe, keys.grid(x), scale,
        is_row=is_row, empty=empty, dropout_p=dropout_p, mask=mask,
    )  # fmt: skip
    dx = dgrid.flatten(0, 1)
    return dprobe, dx if keys.equal else dx.index_select(0, keys.padded[0])


def _grid_places(
    probe: Tensor, keys: SequenceOffsets, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor | None, bool, Tensor | None]:
    """(is_row, empty, mask) as absorbed_attention_on_grid takes them."""
    sequences, heads, _ = probe.shape
    mask = None
    if dropout_p:
        assert seed is not None
        mask = keep_mask(seed, sequences * heads, keys.longest, dropout_p)
        mask = mask.view(sequences, heads, keys.longest)
    full = keys.equal and keys.longest > 0
    return None if full else keys.padded[1], 0 in keys.lengths, mask
