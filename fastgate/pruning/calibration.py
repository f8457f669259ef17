"""What the warm phase measures: what each replacement starts as, and the batch sizes costs depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.models.handle import EncoderHandle
from fastgate.nn.choices import ReplacementKind
from fastgate.nn.protocols import BertLikeConfig
from fastgate.pruning.objective import Costs, costs_of
from fastgate.runtime.context import ActivationTrace
from fastgate.runtime.costs import Sizes

RIDGE = 1e-3  # of the mean square of a channel


class Calibration:
    """Sums over the rows computed while every gate is open: small, on the host, saved with the Pruner."""

    def __init__(self, layers: int, config: BertLikeConfig, replacement: ReplacementKind):
        """config: the encoder's. replacement: its kind."""
        self.config, self.replacement = config, replacement
        # Normal equations of each channel: attention output on 1, h[i], h[i - 1], h[i + 1].
        self.gram = torch.zeros(layers, 4, 4, config.hidden_size, dtype=torch.float64)
        self.right = torch.zeros(layers, 4, config.hidden_size, dtype=torch.float64)
        # Unpadded rows, output rows, query-key pairs, sequences.
        self.sizes = torch.zeros(4, dtype=torch.float64)
        self.costs: Costs | None = None

    def add(self, trace: ActivationTrace) -> None:
        """Add a forward that `trace` holds."""
        length = trace.length
        with torch.no_grad():
            for layer, rows in dict(trace.attention_output).items():  # recomputed ones come first
                basis = _basis(*trace.hidden[layer], trace.hidden[layer + 1][0], length)
                self.gram[layer] += torch.einsum("irc,jrc->ijc", basis, basis).cpu()
                self.right[layer] += torch.einsum("irc,rc->ic", basis, rows.float()).cpu()
        unpadded, outputs = trace.hidden[0][0], trace.hidden[-1][0]
        lengths = torch.bincount(unpadded // length).double().cpu()
        self.sizes += torch.tensor(
            [unpadded.numel(), outputs.numel(), float(lengths.square().sum()), float((lengths > 0).sum())],
            dtype=torch.float64,
        )

    @torch.no_grad()
    def start(self, handle: EncoderHandle) -> None:
        """Start each replacement at the least-squares fit to its attention's output, as far as its kind can
        express that, and price the layers; on every rank alike.

        Raises ArgumentError if no row was measured, or what was measured is not finite.
        """
        parts = (self.gram, self.right, self.sizes)
        total = sum_over_ranks(torch.cat([part.flatten() for part in parts]))
        if not bool(torch.isfinite(total).all()) or not float(total[-self.sizes.numel()]):
            got = "no row" if bool(torch.isfinite(total).all()) else "NaN or infinity"
            remedy = "train on batches whose attention_mask is not 0, and check the model's weights"
            needed = "finite hidden states of the warm phase"
            raise ArgumentError(format_error("Pruner.step", "measured", got, needed, remedy))
        sums = torch.split(total, [part.numel() for part in parts])
        self.gram, self.right, self.sizes = (a.view_as(b) for a, b in zip(sums, parts, strict=True))
        for layer in range(handle.num_layers):
            replacement = handle.replacement(layer)
            rows = float(self.gram[layer, 0, 0, 0])
            if replacement is None or not rows:
                continue
            vectors = list(replacement.parameters())
            n = len(vectors)
            gram, right = self.gram[layer, :n, :n].permute(2, 0, 1) / rows, self.right[layer, :n].t() / rows
            ridge = torch.diag(torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)[:n]) * RIDGE
            scale = gram.diagonal(dim1=1, dim2=2)[:, 1:].mean() if n > 1 else 1.0
            solution = torch.linalg.solve(gram + ridge * scale, right).unbind(1)
            for parameter, value in zip(vectors, solution, strict=True):
                parameter.copy_(value)
        self._price()

    def _price(self) -> None:
        rows, output_rows, pairs, sequences = (int(n) for n in self.sizes.tolist())
        sizes = Sizes(
            hidden=self.config.hidden_size,
            intermediate=self.config.intermediate_size,
            heads=self.config.num_attention_heads,
            rows=rows,
            keys=rows,
            rows_within_halo=(output_rows,),
            pairs=pairs,
            sequences=sequences,
        )
        self.costs = costs_of(sizes, self.gram.shape[0], self.replacement)

    def state_dict(self) -> dict[str, Any]:
        return {
            "gram": self.gram.clone(),
            "right": self.right.clone(),
            "sizes": self.sizes.clone(),
            "priced": self.costs is not None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.gram, self.right, self.sizes = (state[name].clone() for name in ("gram", "right", "sizes"))
        if state["priced"]:
            self._price()


def _basis(index: Tensor, h: Tensor, wanted: Tensor, length: int) -> Tensor:
    """(4, rows, hidden): 1, h[i], h[i - 1], h[i + 1] of the `wanted` rows; 0 where there is no neighbour.

    index: (rows,) places of h's rows in the padded batch of sequences of `length`.
    """
    h = h.detach().float()
    beside = ((index[1:] - index[:-1] == 1) & (index[1:] // length == index[:-1] // length))[:, None]
    before, after = torch.zeros_like(h), torch.zeros_like(h)
    before[1:] = torch.where(beside, h[:-1], 0.0)
    after[:-1] = torch.where(beside, h[1:], 0.0)
    basis = torch.stack([torch.ones_like(h), h, before, after])
    return basis if wanted.shape == index.shape else basis[:, torch.searchsorted(index, wanted)]


def sum_over_ranks(numbers: Tensor) -> Tensor:
    """The sum of a host tensor over the processes of torch.distributed, if there are several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return numbers
    # NCCL reduces device tensors only.
    on = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    moved = numbers.to(on)
    torch.distributed.all_reduce(moved)
    return moved.cpu()


def mean_over_ranks(numbers: Tensor) -> Tensor:
    """The mean of a host tensor over the processes of torch.distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return numbers
    return sum_over_ranks(numbers) / torch.distributed.get_world_size()
