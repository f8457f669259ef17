"""What a frozen encoder runs for a plan: its layers in as few compiled calls as there can be.

A program is kept from call to call, and before each it is seen whether the encoder is still what it was made
of (fingerprint.py): parameters that were changed in place are read as they are, anything else makes it anew.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, groupby
from typing import Any, TypeGuard

from torch import Tensor

from .fingerprint import Fingerprint
from .layer import Parts, biases, drop, fold, is_linear_gelu, joint, norm_and_drop, shift_vectors, weight_of
from .ops import packed_layers
from .ops.linear import Packed
from .ops.packed_layers import Half, Norm, Product, Stretch
from .plan import Step
from .run import Run

MOST = 16  # programs kept of an encoder
Piece = tuple[int, tuple[Step, ...]]  # of a layer: steps to run one after another
RunSteps = Callable[[Run, int, tuple[Step, ...], Tensor], Tensor]


class Program:
    """The halves of all layers in order: stretches of them compiled, the others by their steps.

    kept: it serves again, while the encoder stays as it is; so there are no hooks in it.
    """

    def __init__(self, run: Run, kept: bool):
        self.kept = kept
        self.plan = run.plan  # kept alive: its id is a key
        halves = [(i, steps) for i in range(len(run.layers)) for steps in run.plan.halves(i)]
        ready = [_half(run, i, Parts.of(run.layers[i]), steps) for i, steps in halves]
        self.pieces: list[Piece | Stretch] = []
        for compiled, group in groupby(zip(halves, ready, strict=True), lambda pair: pair[1] is not None):
            if compiled:
                self.pieces.append(Stretch([half for _, half in group]))  # type: ignore[misc]
            else:
                self.pieces += [piece for piece, _ in group]

    def __call__(self, run: Run, h: Tensor, run_steps: RunSteps) -> Tensor:
        for piece in self.pieces:
            if isinstance(piece, Stretch):
                packing, links = run.packing, list[Tensor]()
                if piece.shifts:  # on all packed rows, or each on fewer than the one before
                    links = list(chain(*packing.near)) if piece.narrows else [packing.linked]
                h = piece(h, packing.keys.cu_seqlens, packing.wanted_rows, links)
            else:
                h = run_steps(run, *piece, h)
        return h


class Programs:
    """Those of one encoder, while it is made of the same things."""

    def __init__(self) -> None:
        self.fingerprint: Fingerprint | None = None
        self.made: dict[tuple[Any, ...], Program] = {}

    def find(self, run: Run, h: Tensor) -> Program | None:
        """The program of a run whose embeddings are h (rows, hidden); None where no half can be compiled."""
        if run.record is not None or run.probabilities is not None or not packed_layers.runs(h):
            return None
        held = self.fingerprint
        if held is None or not held.holds(run.encoder):
            self.made, held = {}, Fingerprint(run.encoder)
            self.fingerprint = held
        if held.refusal or held.drops():
            return Program(run, kept=False)
        gated = tuple(isinstance(gate, Tensor) for gate in run.gates)
        key = (id(run.plan), run.packing.key_rows is None, gated)
        found = self.made.get(key)
        if found is None:
            if len(self.made) >= MOST:
                self.made = {}
            found = self.made[key] = Program(run, kept=True)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Programs:
        return Programs()

    def __reduce__(self) -> tuple[Any, ...]:
        return Programs, ()


def _in_panels(weight: Tensor | Packed | None) -> TypeGuard[Packed]:
    return isinstance(weight, Packed) and weight.in_panels


def _half(run: Run, i: int, parts: Parts, steps: tuple[Step, ...]) -> Half | None:
    if steps[0].op == "shift_norm":
        narrow, widened = steps[0].narrow, run.packing.widened
        return None if narrow and not widened else _shift_half(parts, steps[0].reach if narrow else None)
    if steps[-1].op == "skip_norm":
        return None
    return (_feed_forward_half if steps[0].op == "intermediate" else _attention_half)(run, i, parts, steps)


def _attention_half(run: Run, i: int, parts: Parts, steps: tuple[Step, ...]) -> Half | None:
    at, out = parts.at, parts.out._modules["dense"]
    output, (norm, p) = weight_of(out), norm_and_drop(parts.out)
    soft, drops = isinstance(run.gates[i], Tensor), p or drop(at._modules["dropout"])
    if not _in_panels(output) or run.packing.key_rows is not None or soft or drops:
        return None
    after, ending = Product(output, out._parameters["bias"]), Norm(norm.weight, norm.bias, norm.eps)
    shape = (at.num_attention_heads, at.scaling)
    if steps[0].op == "project_query":
        query, key, value = (at._modules[name] for name in ("query", "key", "value"))
        weight = weight_of(query)
        if not _in_panels(weight):
            return None
        first = Product(weight, query._parameters["bias"])
        return packed_layers.absorbed_half(first, key.weight, value.weight, value.bias, *shape, after, ending)
    together = None if steps[0].narrow else joint(at._modules)
    if together is None:
        return None
    return packed_layers.attention_half(together, biases(at._modules), *shape, after, ending)


def _shift_half(parts: Parts, reach: int | None) -> Half | None:
    """By itself it gains nothing: only before a half that is compiled."""
    if not _in_panels(weight_of(parts.intermediate._modules["dense"])):
        return None
    norm = parts.out._modules["LayerNorm"]
    return packed_layers.shift_half(shift_vectors(parts.layer), Norm(norm.weight, norm.bias, norm.eps), reach)


def _feed_forward_half(run: Run, i: int, parts: Parts, steps: tuple[Step, ...]) -> Half | None:
    up, down = parts.intermediate._modules["dense"], parts.output._modules["dense"]
    first, then, (norm, p) = weight_of(up), weight_of(down), norm_and_drop(parts.output)
    if p or not is_linear_gelu(parts.intermediate) or not (_in_panels(first) and _in_panels(then)):
        return None
    products = Product(first, up._parameters["bias"]), Product(then, down._parameters["bias"])
    if not steps[-1].chained:
        return packed_layers.feed_forward_half(*products, Norm(norm.weight, norm.bias, norm.eps))
    following = run.layers[i + 1]
    weight, bias, second = fold(following, norm)
    computed = weight is not norm.weight or bias is not norm.bias
    anew = (lambda: fold(following, norm)[:2]) if computed else None
    return packed_layers.feed_forward_half(*products, Norm(weight, bias, norm.eps, **second), anew)
