"""The plan: which steps an encoder runs on which rows, for given gates and output rows. No tensors.

Nothing mixes tokens but attention, and a token shift in its place. So liveness is decided from the top down:
above the last layer that mixes tokens, only the output rows are computed. For one output row a sequence a
token shift is followed exactly: it reads a halo of one token to either side, so above the last attention the
rows grow fewer from shift to shift. A kept layer is seven steps. A skipped attention is none: its LayerNorm
runs inside the step that made its input, which leaves three. A token shift in its place is one, which makes
four.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from fastgate.runtime.costs import Sizes
from fastgate.runtime.layer import Mixing
from fastgate.runtime.steps import absorbed_attention, attention, feed_forward
from fastgate.runtime.steps.base import Step
from fastgate.runtime.steps.embedding import Embed
from fastgate.runtime.steps.feed_forward import OutputNorm, SkippedNorm

Sublayer = tuple[Step, ...]


@dataclass(frozen=True)
class Plan:
    """Steps in order. kept: the layers whose attention runs."""

    steps: tuple[Step, ...]
    kept: tuple[int, ...]

    @property
    def embed(self) -> Embed:
        """The first step."""
        step = self.steps[0]
        assert isinstance(step, Embed)
        return step

    @cached_property
    def layers(self) -> tuple[tuple[Sublayer, ...], ...]:
        """The sublayers of each layer: steps up to a LayerNorm, attention's if it runs, and the rest."""
        layers: list[list[list[Step]]] = []
        for step in self.steps[1:]:
            if step.layer == len(layers):
                layers.append([[]])
            elif layers[-1][-1][-1].ends_sublayer:
                layers[-1].append([])
            layers[-1][-1].append(step)
        return tuple(tuple(tuple(sublayer) for sublayer in layer) for layer in layers)

    def of_layer(self, layer: int) -> tuple[Step, ...]:
        """The steps of one layer."""
        return tuple(step for sublayer in self.layers[layer] for step in sublayer)

    @cached_property
    def reads_neighbours(self) -> bool:
        """Whether a step reads the tokens beside a token, other than through attention."""
        return any(step.hops for step in self.steps)


@lru_cache(maxsize=1024)
def make_plan(
    attends: tuple[bool, ...],
    output_rows_only: bool = False,
    one_query_per_sequence: bool = False,
    capture: bool = False,
    mixing: Mixing = (),
    has_halo: bool = False,
) -> Plan:
    """Plan an encoder.

    attends: one flag a layer, whether its self-attention runs.
    output_rows_only: there are fewer output rows than rows.
    one_query_per_sequence: there is one output row a sequence, so the last attention has one query a sequence
    and is absorbed, if nothing after it mixes tokens.
    capture: the output of every layer must exist by itself, so no LayerNorm is moved into the step before it.
    mixing: the layers whose skipped attention is replaced by what reads neighbouring rows, and the step.
    has_halo: above the last attention those rows are computed that the replacements there need, fewer from
    one to the next.
    """
    layers, mixers = len(attends), dict(mixing)
    kept = tuple(i for i, runs in enumerate(attends) if runs)
    last = max(kept if has_halo else (*kept, *mixers), default=-1)

    def takes_next_norm(layer: int) -> bool:
        following = layer + 1
        return not capture and following < layers and not attends[following] and following not in mixers

    def place(layer: int) -> tuple[int, bool, int]:
        """Of a step: its layer, whether it makes output rows only, and how far their halo reaches."""
        only = output_rows_only and layer >= last
        halo = sum(step.hops for i, step in mixing if i > layer) if has_halo and only else 0
        return layer, only, halo

    steps: list[Step] = [Embed(*place(-1), takes_next_norm(-1))]
    for i in range(layers):
        sublayer: tuple[type[Step], ...] = ()
        if attends[i]:
            absorbed = output_rows_only and i >= last and one_query_per_sequence
            sublayer = absorbed_attention.STEPS if absorbed else attention.STEPS
        elif i in mixers:
            sublayer = (mixers[i],)
        elif capture:
            sublayer = (SkippedNorm,)
        steps += [step(*place(i)) for step in (*sublayer, *feed_forward.STEPS[:-1])]
        steps.append(OutputNorm(*place(i), takes_next_norm(i)))
    return Plan(tuple(steps), kept)


def flops_of(steps: tuple[Step, ...], sizes: Sizes) -> int:
    """FLOPs of the matrix products of steps of one layer (two a multiply-add)."""
    return sum(matmul.flops for step in steps for matmul in step.matmuls(step.rows(sizes), sizes))
