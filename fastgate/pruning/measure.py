"""What the warm phase measures: the mean of each attention's output, and the batch sizes costs depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..plan import Sizes
from ..run import Record
from .objective import Costs, costs_of


class Measured:
    """Sums over the rows computed while every gate is open: small, on the host, saved with the Pruner."""

    def __init__(self, layers: int, config: Any, mixes: bool):
        """config: the encoder's. mixes: what stands in for an attention mixes tokens."""
        self.config, self.mixes = config, mixes
        self.sums = torch.zeros(layers, config.hidden_size, dtype=torch.float64)
        self.rows = torch.zeros(layers, dtype=torch.float64)
        self.sizes = torch.zeros(
            4, dtype=torch.float64
        )  # rows packed, rows demanded, query-key pairs, sequences
        self.costs: Costs | None = None

    def add(self, record: Record, inputs: Mapping[str, Any]) -> None:
        """Add a forward that `record` holds."""
        for layer, rows in record.attention_output:
            self.sums[layer] += rows.detach().sum(0, dtype=torch.float32).cpu()
            self.rows[layer] += rows.shape[0]
        length = (
            inputs["input_ids"].shape[-1]
            if inputs.get("input_ids") is not None
            else inputs["inputs_embeds"].shape[-2]
        )
        packed, demanded = record.hidden[0][0], record.hidden[-1][0]
        lengths = torch.bincount(packed // length).double().cpu()
        self.sizes += torch.tensor(
            [packed.numel(), demanded.numel(), float(lengths.square().sum()), float((lengths > 0).sum())],
            dtype=torch.float64,
        )

    @torch.no_grad()
    def start(self, state: Any) -> None:
        """Start each replacement at the mean attention output and price the layers, on every rank alike."""
        total = sum_over_ranks(torch.cat([self.sums.flatten(), self.rows, self.sizes]))
        sums, rows, sizes = total.split([self.sums.numel(), self.rows.numel(), self.sizes.numel()])
        self.sums, self.rows, self.sizes = sums.view_as(self.sums), rows, sizes
        for layer in range(state.num_layers):
            replacement = state.replacement(layer)
            if replacement is not None and replacement.shift is not None and self.rows[layer] > 0:
                replacement.shift.copy_(self.sums[layer] / self.rows[layer])
        self._price()

    def _price(self) -> None:
        packed, demanded, pairs, sequences = (int(n) for n in self.sizes.tolist())
        config = self.config
        sizes = Sizes(
            config.hidden_size, config.intermediate_size, packed, packed, demanded, pairs, sequences
        )
        narrow, single = demanded < packed, demanded == sequences
        self.costs = costs_of(sizes, config.num_attention_heads, narrow, single, self.mixes)

    def state_dict(self) -> dict[str, Any]:
        return {
            "sums": self.sums.clone(),
            "rows": self.rows.clone(),
            "sizes": self.sizes.clone(),
            "priced": self.costs is not None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums, self.rows, self.sizes = (state[name].clone() for name in ("sums", "rows", "sizes"))
        if state["priced"]:
            self._price()


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
