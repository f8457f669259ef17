"""Choices of attention to keep that learn nothing, or little: the baselines of learned gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastgate.errors import ArgumentError, format_error
from fastgate.models.handle import EncoderHandle, get_encoder
from fastgate.pruning.modes import evaluating
from fastgate.pruning.numbers import integer


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
    handle = get_encoder(model)
    _check(handle.num_layers, keep)
    if not batches:
        raise ArgumentError(
            format_error(
                "greedy_by_loss", "batches", 0, "one or more", "pass labelled batches of training data"
            )
        )
    gates = handle.gates
    kept = list(range(handle.num_layers))
    try:
        with evaluating(model):
            while len(kept) > keep:
                losses = {
                    drop: _loss(model, handle, batches, [i for i in kept if i != drop]) for drop in kept
                }
                kept.remove(min(kept, key=lambda i: (losses[i], i)))
    finally:
        handle.set_gates(gates)
    return kept


def _loss(
    model: nn.Module, handle: EncoderHandle, batches: Sequence[Mapping[str, Tensor]], kept: list[int]
) -> float:
    """The mean loss with only `kept` running. Raises ArgumentError if it is not a number: no layer would then
    be better than another."""
    handle.set_gates([1.0 if i in kept else 0.0 for i in range(handle.num_layers)])
    losses = [model(**batch).loss for batch in batches]
    mean = math.nan if None in losses else sum(float(loss) for loss in losses) / len(losses)
    if not math.isfinite(mean):
        got = "no loss" if None in losses else f"a loss of {mean}"
        remedy = "pass batches with labels, and a model whose weights are finite"
        raise ArgumentError(format_error("greedy_by_loss", "batches", got, "a finite loss", remedy))
    return mean


def _check(layers: int, keep: int) -> None:
    remedy = "keep at least one attention, at most all"
    integer("baselines", "keep", keep, f"1 to {layers}", remedy, lambda k: 0 < k <= layers)
