"""The plan: which steps an encoder runs on which rows, for given gates and row demand. No tensors.

Nothing mixes tokens but attention, and a `shift` in its place. So liveness is decided from the top down:
above the last layer that mixes, only the demanded rows are computed. (For one row a sequence a `shift` is
followed exactly: it needs a row more to either side than is read of it, so above the last attention the rows
grow fewer from shift to shift.) A kept layer is seven steps. A skipped attention is none: its LayerNorm runs
inside the step that made its input, which leaves three. A `shift` in its place is one, which makes four.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

KEPT_STEPS = (
    "project_qkv",
    "attention",
    "project_output",
    "attention_norm",
    "intermediate",
    "project_down",
    "output_norm",
)
SKIPPED_STEPS = KEPT_STEPS[4:]


@dataclass(frozen=True)
class Step:
    """One thing the encoder does.

    op: `embed`, `skip_norm` (the LayerNorm of a skipped attention by itself), `shift_norm` (the same, of a
    replacement that reads neighbouring rows), or one of the steps of a layer in `KEPT_STEPS` (with a single
    query a sequence `project_query` and `absorbed_attention` stand for `project_qkv` and `attention`). layer:
    index of the encoder layer, -1 for the embeddings.
    narrow: the step's output is not every packed row but the demanded ones, and those up to `reach` links
    away that the shifts above need.
    chained: the LayerNorm of the skipped attention of layer + 1 runs inside this step.
    """

    op: str
    layer: int
    output_rows_only: bool
    chained: bool = False
    halo: int = 0


@dataclass(frozen=True)
class Plan:
    """Steps in order; `kept` are the layers whose attention runs, `top` the last of them (-1: none)."""

    steps: tuple[Step, ...]
    kept: tuple[int, ...]
    top: int

    @cached_property
    def _halves(self) -> dict[int, tuple[tuple[Step, ...], ...]]:
        found: dict[int, tuple[tuple[Step, ...], ...]] = {}
        for layer, steps in self._by_layer.items():
            ends = [place + 1 for place, step in enumerate(steps) if step.op.endswith("norm")]
            found[layer] = tuple(steps[a:b] for a, b in itertools.pairwise((0, *ends)))
        return found

    @cached_property
    def _by_layer(self) -> dict[int, tuple[Step, ...]]:
        layers = sorted({step.layer for step in self.steps})
        return {layer: tuple(step for step in self.steps if step.layer == layer) for layer in layers}

    def of_layer(self, layer: int) -> tuple[Step, ...]:
        """The steps of one layer (-1: the embeddings)."""
        return self._by_layer.get(layer, ())

    def halves(self, layer: int) -> tuple[tuple[Step, ...], ...]:
        """The steps of one layer up to each of its LayerNorms: attention's, if it runs, and the rest."""
        return self._halves[layer]


@lru_cache(maxsize=1024)
def make_plan(
    attends: tuple[bool, ...],
    output_rows_only: bool,
    one_query_per_sequence: bool,
    capture: bool,
    shifts: tuple[int, ...] = (),
    has_halo: bool = False,
) -> Plan:
    """Plan an encoder.

    attends: one flag a layer, whether its self-attention runs.
    narrow: fewer rows are demanded at the end than are packed.
    single: one row a sequence is demanded, so the last attention has one query a sequence and is absorbed,
    if no `shift` comes after it.
    capture: the output of every layer must exist by itself, so no LayerNorm is moved into the step before it.
    shifts: the layers whose skipped attention is replaced by a `shift`.
    widened: above the last attention those rows are computed that the shifts there need, fewer from one to
    the next.
    """
    layers = len(attends)
    kept = tuple(i for i, runs in enumerate(attends) if runs)
    last = max(kept if has_halo else (*kept, *shifts), default=-1)

    def chains(layer: int) -> bool:
        following = layer + 1
        return not capture and following < layers and not attends[following] and following not in shifts

    def halo(layer: int, demanded: bool) -> int:
        return sum(shift > layer for shift in shifts) if has_halo and demanded else 0

    steps = [
        Step("embed", -1, output_rows_only and last < 0, chains(-1), halo(-1, output_rows_only and last < 0))
    ]
    for i in range(layers):
        demanded = output_rows_only and i >= last
        ops: tuple[str, ...] = ()
        if attends[i]:
            absorbed = demanded and one_query_per_sequence
            ops = ("project_query", "absorbed_attention", *KEPT_STEPS[2:4]) if absorbed else KEPT_STEPS[:4]
        elif i in shifts:
            ops = ("shift_norm",)
        elif capture:
            ops = ("skip_norm",)
        beside = halo(i, demanded)
        steps += [Step(op, i, demanded, halo=beside) for op in (*ops, *SKIPPED_STEPS[:2])]
        steps.append(Step("output_norm", i, demanded, chains(i), beside))
    return Plan(tuple(steps), kept, kept[-1] if kept else -1)


@dataclass(frozen=True)
class Sizes:
    """What costs depend on: widths of the encoder and rows of a batch.

    packed, keys: rows in all; within: those up to so many links away from the demanded ones, which are
    within[0]; pairs: sum over sequences of queries x keys; sequences: their number. attention: the width of
    all heads together, None: `hidden`.
    """

    hidden: int
    intermediate: int
    packed: int
    keys: int
    within: tuple[int, ...]
    pairs: int
    sequences: int
    attention: int | None = None

    @property
    def demanded(self) -> int:
        return self.within[0]

    def live(self, step: Step) -> int:
        """Rows of a step's output."""
        return self.within[step.halo] if step.output_rows_only else self.packed


def sizes_of(
    hidden: int, intermediate: int, lengths: Sequence[int], demanded: Sequence[int] | None = None
) -> Sizes:
    """Sizes of a batch of `lengths` tokens a sequence, of which `demanded` are read (None: all)."""
    wanted = lengths if demanded is None else demanded
    return Sizes(
        hidden,
        intermediate,
        sum(lengths),
        sum(lengths),
        (sum(wanted),),
        sum(n * n for n in lengths),
        len(lengths),
    )


def products(step: Step, sizes: Sizes, heads: int) -> list[tuple[int, int, int]]:
    """The matrix products of a step as (rows, inner, outer), each 2 * rows * inner * outer FLOPs."""
    h, rows = sizes.hidden, sizes.live(step)
    a = h if sizes.attention is None else sizes.attention
    if step.op == "project_qkv":
        return [(rows, h, a), (sizes.keys, h, a), (sizes.keys, h, a)]
    if step.op == "project_query":
        return [(rows, h, a)]
    if step.op == "attention":
        pairs = sizes.pairs if not step.output_rows_only else sizes.pairs * rows // max(sizes.packed, 1)
        return [(pairs, a, 1), (pairs, a, 1)]
    if step.op == "absorbed_attention":
        return [(rows, a, h), (sizes.keys, h, heads), (sizes.keys, heads, h), (rows, h, a)]
    if step.op == "project_output":
        return [(rows, a, h)]
    if step.op in ("intermediate", "project_down"):
        return [(rows, h, sizes.intermediate)]
    return []


def flops(step: Step, sizes: Sizes, heads: int) -> int:
    """FLOPs of a step's matrix products (two a multiply-add)."""
    return sum(2 * m * k * n for m, k, n in products(step, sizes, heads))
