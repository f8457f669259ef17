"""Choices of attention to keep that learn nothing, or little: the controls of learned gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, say
from ..state import encoder_state


def random_choice(layers: int, keep: int, seed: int) -> list[int]:
    """`keep` of `layers` at random."""
    _check(layers, keep)
    order = torch.randperm(layers, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[:keep])


def top_drop(layers: int, keep: int) -> list[int]:
    """Drop from the top: the lowest `keep` layers stay."""
    _check(layers, keep)
    return list(range(keep))


def every_other(layers: int, keep: int) -> list[int]:
    """`keep` layers evenly spaced from the bottom: 0, 3 for two of six."""
    _check(layers, keep)
    return [i * layers // keep for i in range(keep)]


@torch.no_grad()
def greedy_by_loss(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], keep: int) -> list[int]:
    """Close one attention after the other, each time the one that raises the loss on `batches` least.

    model: patched, every gate open, returns `.loss` for a batch with labels. Its gates and mode are left as
    they were.
    """
    state = encoder_state(model)
    _check(state.num_layers, keep)
    if not batches:
        raise ArgumentError(
            say("greedy_by_loss", "batches", 0, "one or more", "pass labelled batches of training data")
        )
    before, was_training = state.gates, model.training
    kept = list(range(state.num_layers))
    model.eval()
    try:
        while len(kept) > keep:
            losses = {drop: _loss(model, state, batches, [i for i in kept if i != drop]) for drop in kept}
            kept.remove(min(kept, key=lambda i: (losses[i], i)))
    finally:
        state.set_gates(before)
        model.train(was_training)
    return kept


def _loss(model: nn.Module, state: Any, batches: Sequence[Mapping[str, Tensor]], kept: list[int]) -> float:
    state.set_gates([1.0 if i in kept else 0.0 for i in range(state.num_layers)])
    return sum(float(model(**batch).loss) for batch in batches) / len(batches)


def _check(layers: int, keep: int) -> None:
    if not 0 < keep <= layers:
        raise ArgumentError(
            say("criteria", "keep", keep, f"1 to {layers}", "keep at least one attention, at most all")
        )
