"""Rows that nobody labelled: tokens swapped for others of the batch, which a teacher labels all the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def swap_tokens(inputs: Mapping[str, Any], share: float, generator: torch.Generator) -> dict[str, Any]:
    """`inputs` with about `share` of each row's tokens swapped for tokens of the same batch, drawn alike.

    inputs: `input_ids`, (batch, length) or (batch, choices, length), and where rows are padded
    `attention_mask` of that shape; without ids (a call with embeddings) nothing is swapped. The tokens at a
    row's first and last attended place are its special ones: wherever they stand they stay, and none of them
    is put in another's place. Rows keep their lengths. generator: on the host; the device is not waited for.
    """
    original, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if original is None or not original.numel():
        return dict(inputs)
    if mask is not None and mask.shape != original.shape:
        return dict(inputs)  # the model says what it takes
    ids = original.reshape(-1, original.shape[-1])  # multiple choice has (batch, choices, length)
    attended = torch.ones_like(ids) if mask is None else (mask != 0).long().reshape(ids.shape)
    begin, count = attended.argmax(1, keepdim=True), attended.sum(1, keepdim=True)
    ends = (ids.gather(1, begin), ids.gather(1, begin + (count - 1).clamp(min=0)))
    plain = attended.bool() & (ids != ends[0]) & (ids != ends[1])

    def draw() -> Tensor:
        return torch.rand(ids.shape, generator=generator).to(ids.device, non_blocking=True)

    row = (draw() * ids.shape[0]).long()
    place = begin[row, 0] + (draw() * count[row, 0]).long()
    swapped = plain & plain[row, place] & (draw() < share)
    return {**inputs, "input_ids": torch.where(swapped, ids[row, place], ids).view(original.shape)}
