"""The matmul lower bound of a run: the matrix products of its steps, by themselves, at their own shapes.

Each is made the fastest way known here: on the CPU from packed weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.models.handle import get_encoder
from fastgate.ops.linear import Packed, linear, onednn_supports, pack, pack_together
from fastgate.runtime.context import ExecutedStep
from fastgate.runtime.costs import Matmul, Sizes
from fastgate.runtime.steps.attention import Attention, ProjectQKV

Batch = Mapping[str, Tensor]


class MatmulLowerBound:
    """Runs nothing but the products of a patched model's encoder for the batches it was made with.

    Which products, and on how many rows, is read from a recorded forward. Each has a weight of its own, so
    weights come from memory as often as in the model. Attention's two products run batched, sequences of one
    length together. Batches hold model inputs with an `attention_mask` (batch, length), padded on the right.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]):
        self.handle = get_encoder(model)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._tensors: dict[tuple[object, ...], Tensor] = {}
        self._weights: dict[tuple[object, ...], Tensor | Packed] = {}
        self._work: dict[int, list[tuple[Tensor, Any, bool]]] = {}
        self.flops: list[int] = []  # of each batch
        with torch.inference_mode(), self.handle.record(every_row=False) as trace:
            for batch in batches:
                model(**batch)
                self._work[id(batch)] = work = self._matmuls(batch["attention_mask"], trace.steps)
                self.flops.append(
                    sum(2 * a.numel() * b.shape[-1 if is_batched else 0] for a, b, is_batched in work)
                )

    def __call__(self, batch: Batch) -> None:
        for a, b, is_batched in self._work[id(batch)]:
            if is_batched:
                torch.bmm(a, b)
            else:
                linear(a, b)

    def _matmuls(self, mask: Tensor, steps: list[ExecutedStep]) -> list[tuple[Tensor, Any, bool]]:
        """(left operand, right operand, whether it is batched) of every product of these steps."""
        config: Any = self.handle.encoder.config
        hidden, heads, lengths = config.hidden_size, config.num_attention_heads, mask.sum(-1).tolist()
        sizes = Sizes(
            hidden=hidden,
            intermediate=config.intermediate_size,
            heads=heads,
            rows=sum(lengths),
            keys=sum(lengths),
            rows_within_halo=(sum(lengths),),
            pairs=0,
            sequences=len(lengths),
        )
        work: list[tuple[Tensor, Any, bool]] = []
        for step, rows in steps:
            if isinstance(step, Attention):
                work += self._attention(rows, lengths, heads, hidden // heads)
                continue
            matmuls = step.matmuls(rows, sizes)
            if isinstance(step, ProjectQKV) and len(set(matmuls)) == 1 and self._fuses_qkv(hidden):
                matmuls = [Matmul(rows, hidden, 3 * hidden)]
            for place, (m, inner, outer) in enumerate(matmuls):
                weight = self._weight((step.layer, step.name, place), outer, inner)
                work.append((self._tensor("x", m, inner), weight, False))
        return work

    def _attention(
        self, rows: int, lengths: Sequence[int], heads: int, width: int
    ) -> list[tuple[Tensor, Any, bool]]:
        """Scores and weighted values of the sequences, those of one length together."""
        work: list[tuple[Tensor, Any, bool]] = []
        for (n, m), count in Counter(zip(_queries(rows, lengths), lengths, strict=True)).items():
            q, k = (self._tensor(name, heads * count, length, width) for name, length in (("q", n), ("k", m)))
            work.append((q, k.transpose(1, 2), True))
            work.append((self._tensor("p", heads * count, n, m), k, True))
        return work

    def _fuses_qkv(self, hidden: int) -> bool:
        """Whether query, key and value of a frozen model are one product."""
        weight = torch.empty(hidden, hidden, device=self.device, dtype=self.dtype)
        return onednn_supports(weight, weight) and pack_together([weight] * 3)[0].fused_qkv is not None

    def _weight(self, name: object, *shape: int) -> Tensor | Packed:
        key = (name, *shape)
        if key not in self._weights:
            weight = torch.randn(*shape, device=self.device, dtype=self.dtype)
            self._weights[key] = pack(weight) if onednn_supports(weight, weight) else weight
        return self._weights[key]

    def _tensor(self, name: object, *shape: int) -> Tensor:
        key = (name, *shape)
        if key not in self._tensors:
            self._tensors[key] = torch.randn(*shape, device=self.device, dtype=self.dtype)
        return self._tensors[key]


def _queries(rows: int, lengths: Sequence[int]) -> list[int]:
    """Of each sequence, where `rows` in all are the first of each, as many of one as of another."""
    longest = max(lengths)
    most = next((n for n in range(1, longest) if sum(min(n, m) for m in lengths) >= rows), longest)
    return [min(most, length) for length in lengths]
