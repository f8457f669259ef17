"""The floor under a run: the matrix products that a plan needs, by themselves, at their own shapes.

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
from fastgate.runtime.plan import Sizes, Step, products

Batch = Mapping[str, Tensor]


class MatmulLowerBound:
    """Runs nothing but the products of a patched model's encoder for the batches it was made with.

    Which products, and on how many rows, is read from a recorded forward. Each has a weight of its own, so
    weights come from memory as often as in the model. Attention's two products run batched, sequences of one
    length together. Batches hold model inputs with an `attention_mask` (batch, length), padded on the right.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]):
        self.state = get_encoder(model)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._made: dict[tuple, Tensor] = {}
        self._weights: dict[tuple, Tensor | Packed] = {}
        self._work: dict[int, list[tuple[Tensor, Any, bool]]] = {}
        self.flops: list[int] = []  # of each batch
        with torch.inference_mode(), self.state.record(whole=False) as record:
            for batch in batches:
                model(**batch)
                self._work[id(batch)] = work = self._products(batch["attention_mask"], record.steps)
                self.flops.append(sum(2 * a.numel() * b.shape[-1 if pairs else 0] for a, b, pairs in work))

    def __call__(self, batch: Batch) -> None:
        for a, b, pairs in self._work[id(batch)]:
            if pairs:
                torch.bmm(a, b)
            else:
                linear(a, b)

    def _products(self, mask: Tensor, steps: list[tuple[str, int, int]]) -> list[tuple[Tensor, Any, bool]]:
        config: Any = self.state.encoder.config
        hidden, inner_width, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        lengths = mask.sum(-1).tolist()
        work: list[tuple[Tensor, Any, bool]] = []
        for op, layer, rows in steps:
            if op == "attention":
                queries = _queries(rows, lengths)
                for (n, m), count in Counter(zip(queries, lengths, strict=True)).items():
                    q, k = (
                        self._tensor(s, heads * count, t, hidden // heads) for s, t in (("q", n), ("k", m))
                    )
                    work.append((q, k.transpose(1, 2), True))
                    work.append((self._tensor("p", heads * count, n, m), k, True))
                continue
            sizes = Sizes(hidden, inner_width, rows, sum(lengths), (rows,), 0, len(lengths))
            needed = products(Step(op, layer, False), sizes, heads)
            if op == "project_qkv" and len(set(needed)) == 1 and self._joins(hidden):
                needed = [(rows, hidden, 3 * hidden)]
            for place, (m, inner, outer) in enumerate(needed):
                if op == "project_down":
                    inner, outer = outer, inner
                work.append(
                    (self._tensor("x", m, inner), self._weight((layer, op, place), outer, inner), False)
                )
        return work

    def _joins(self, hidden: int) -> bool:
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
        if key not in self._made:
            self._made[key] = torch.randn(*shape, device=self.device, dtype=self.dtype)
        return self._made[key]


def _queries(rows: int, lengths: Sequence[int]) -> list[int]:
    """Of each sequence, where `rows` in all are the first of each, as many of one as of another."""
    longest = max(lengths)
    most = next((n for n in range(1, longest) if sum(min(n, m) for m in lengths) >= rows), longest)
    return [min(most, length) for length in lengths]
