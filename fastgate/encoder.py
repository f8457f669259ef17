"""Runs a plan over packed rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import Unsupported, say
from .ops import packed_layer
from .ops.absorbed_attention import absorbed_attention
from .ops.attention import attention, attention_probabilities
from .ops.embed_norm import embed_norm
from .ops.gated_add_norm import gated_add_norm
from .ops.linear import Packed
from .ops.linear import linear as product
from .ops.linear_gelu import linear_gelu
from .ops.packed_layer import Half
from .packed import PackedLinear
from .packing import Packing
from .plan import Plan, Step, make_plan
from .replacement import Replacement

Gate = float | Tensor


@dataclass
class Record:
    """What an encoder computed, while recording.

    hidden: (index, rows) of the embeddings and of each layer in turn: rows (n, hidden), index (n,) int64 row
    b * length + t of the padded batch. attention_output: (layer, rows), a kept attention's output before
    dropout. steps: (op, layer, rows) of every step as it ran.
    """

    hidden: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    attention_output: list[tuple[int, Tensor]] = field(default_factory=list)
    steps: list[tuple[str, int, int]] = field(default_factory=list)


@dataclass
class Run:
    """One forward: what stays the same from step to step."""

    encoder: Any
    gates: list[Gate]
    packing: Packing
    plan: Plan
    record: Record | None = None
    probabilities: dict[int, Tensor] | None = None
    layers: tuple[Any, ...] = field(init=False)
    ready: list[tuple[Half | None, ...]] = field(default_factory=list)  # of each layer; empty: none

    def __post_init__(self) -> None:
        self.layers = tuple(self.encoder.encoder.layer)


class Parts(NamedTuple):
    """The modules of an encoder layer, in the order of families.LAYER_MODULES.

    They are read at each forward, so what is put in their place is seen, and where nn.Module keeps them: as
    attributes they take several times as long to find, which a small batch feels.
    """

    layer: Any
    attention: Any
    at: Any  # attention.self
    out: Any  # attention.output
    intermediate: Any
    output: Any

    @staticmethod
    def of(layer: Any) -> Parts:
        modules = layer._modules
        attention = modules["attention"]
        at, out = attention._modules["self"], attention._modules["output"]
        return Parts(layer, attention, at, out, modules["intermediate"], modules["output"])


class Ids(NamedTuple):
    """Of packed rows, (rows,) each: what their embeddings are gathered by. types None: type 0 everywhere."""

    words: Tensor
    positions: Tensor
    types: Tensor | None


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """A `kind` and nothing more: no subclass, no hooks, no replaced forward."""
    return type(module) is kind and _is_itself(module)


def _is_itself(module: nn.Module) -> bool:
    """No hooks, no replaced forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _is_exact_gelu(activation: Any) -> bool:
    """x Phi(x) by torch, or by the module that transformers puts around it, and nothing more."""
    if not isinstance(activation, nn.Module):
        return activation is F.gelu
    kind = type(activation)
    if kind is nn.GELU:
        exact = activation.approximate == "none"
    else:
        named = (kind.__module__, kind.__qualname__) == ("transformers.activations", "GELUActivation")
        exact = named and activation.act is F.gelu
    return exact and _is_itself(activation)


def is_linear_gelu(intermediate: Any) -> bool:
    """The first half of a feed-forward block is what `linear_gelu` computes; if not, it runs as a module."""
    return (
        weight_of(intermediate._modules["dense"]) is not None
        and _is_exact_gelu(intermediate.intermediate_act_fn)
        and _is_itself(intermediate)
    )


def weight_of(module: nn.Module) -> Tensor | Packed | None:
    """The weight, plain or packed, to multiply with in place of calling the module; None: call it."""
    if is_plain(module):
        return module._parameters["weight"]
    return module.packed if is_plain(module, PackedLinear) else None  # type: ignore[return-value]


def linear(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A Linear's product and the bias still to add; a module that is not plain is called, bias within."""
    weight = weight_of(module)
    if weight is None:
        return module(x), None
    return product(x, weight), module._parameters["bias"]


def drop(module: Any) -> float:
    """The rate a Dropout module uses now."""
    return module.p if module.training else 0.0


def is_skipped(gate: Gate) -> bool:
    return not isinstance(gate, Tensor) and gate == 0.0


def replacement_of(layer: Any) -> Replacement | None:
    found: Replacement | None = layer._modules["attention"]._modules.get("replacement")
    return found


def plan_for(gates: list[Gate], absorbable: bool, packing: Packing, capture: bool) -> Plan:
    """The plan for these gates; `absorbable`: the last attention's key and value weights can be read."""
    attends = tuple(not is_skipped(g) for g in gates)
    return make_plan(attends, packing.narrow, packing.single and absorbable, capture)


def run_plan(run: Run, embedded: Callable[[bool], Ids | Tensor]) -> Tensor:
    """Run every step; returns (demanded, hidden) rows, or (packed, hidden) if all are demanded.

    embedded: called with whether only demanded rows are wanted; gives their ids, or the finished embeddings.
    """
    h = _embed(run, run.plan.of_layer(-1)[0], embedded)
    run.ready = _ready_halves(run, h)
    for i, layer in enumerate(run.layers):
        if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
            h = layer._gradient_checkpointing_func(_run_layer, run, i, h)
        else:
            h = _run_layer(run, i, h)
        if run.record is not None:
            # Not inside: what is computed anew in the backward has no gradient outside, and comes twice.
            _note_hidden(run, h, run.plan.of_layer(i)[-1].narrow)
    return h


def _embed(run: Run, step: Step, embedded: Callable[[bool], Ids | Tensor]) -> Tensor:
    h, after = embedded(step.narrow), step.chained
    if isinstance(h, Ids):
        # Dropout stands between the two norms: what is added behind it cannot be folded in before it.
        chains = after and not (drop(run.encoder.embeddings.dropout) and _adds(run.layers[0]))
        h, after = _embed_ids(run, h, chains), after and not chains
    if after:
        h = _skipped_norm(run, 0, h)
    _note(run, step, h)
    _note_hidden(run, h, step.narrow)
    return h


def _embed_ids(run: Run, ids: Ids, chains: bool) -> Tensor:
    """The embeddings; chains: with the LayerNorm of the skipped attention of layer 0."""
    embeddings = run.encoder.embeddings
    words, positions = embeddings.word_embeddings, embeddings.position_embeddings
    norm = embeddings.LayerNorm
    weight, norm_bias, second = _fold(run, -1, norm) if chains else (norm.weight, norm.bias, {})
    return embed_norm(
        *ids,
        words.weight,
        positions.weight,
        embeddings.token_type_embeddings.weight,
        weight,
        norm_bias,
        norm.eps,
        dropout_p=drop(embeddings.dropout),
        padding_idx=words.padding_idx,
        position_padding_idx=positions.padding_idx,
        **second,
    )


def _run_layer(run: Run, i: int, h: Tensor) -> Tensor:
    halves = run.plan.halves(i)
    ready = run.ready[i] if run.ready else (None,) * len(halves)
    for steps, half in zip(halves, ready, strict=True):
        h = _run_steps(run, i, steps, h) if half is None else half(h)
    return h


def _run_steps(run: Run, i: int, steps: tuple[Step, ...], h: Tensor) -> Tensor:
    """Steps of a layer up to a LayerNorm, from the rows of the LayerNorm before."""
    parts = Parts.of(run.layers[i])
    x: Any = h
    bias: Tensor | None = None
    for step in steps:
        if step.op == "project_qkv":
            h, x = _project_qkv(run, parts, step, h)
        elif step.op == "project_query":
            h, x = _project_query(run, parts, h)
        elif step.op == "attention":
            x = _attend(run, i, parts, step, x)
        elif step.op == "absorbed_attention":
            x = _absorb(run, parts, x)
        elif step.op == "project_output":
            x, bias = linear(parts.out._modules["dense"], x)
            if run.record is not None:
                run.record.attention_output.append(
                    (i, x.detach() if bias is None else x.detach() + bias.detach())
                )
        elif step.op == "attention_norm":
            h = _attention_norm(run, i, parts, x, h, bias)
        elif step.op == "skip_norm":
            h = _skipped_norm(run, i, h)
        elif step.op == "intermediate":
            x = _intermediate(parts.intermediate, h)
        elif step.op == "project_down":
            x, bias = linear(parts.output._modules["dense"], x)
        elif step.op == "output_norm":
            h = _output_norm(run, i, parts, step, x, h, bias)
        _note(run, step, h if step.op.endswith("norm") else x[0] if isinstance(x, tuple) else x)
    return h


def _ready_halves(run: Run, h: Tensor) -> list[tuple[Half | None, ...]]:
    """What frozen layers compute in one call each, for every half of every layer. All are made ready before
    the first runs: between two of them the weights have pushed the interpreter's memory out of the caches."""
    if run.record is not None or run.probabilities is not None or not packed_layer.runs(h):
        return []
    return [
        tuple(_ready_half(run, i, Parts.of(layer), steps) for steps in run.plan.halves(i))
        for i, layer in enumerate(run.layers)
    ]


def _in_panels(weight: Tensor | Packed | None) -> TypeGuard[Packed]:
    return isinstance(weight, Packed) and weight.in_panels


def _ready_half(run: Run, i: int, parts: Parts, steps: tuple[Step, ...]) -> Half | None:
    if steps[0].op == "skip_norm":
        return None
    return (_feed_forward_half if steps[0].op == "intermediate" else _attention_half)(run, i, parts, steps)


def _attention_half(run: Run, i: int, parts: Parts, steps: tuple[Step, ...]) -> Half | None:
    at, out = parts.at, parts.out._modules["dense"]
    output, (norm, p) = weight_of(out), _norm_and_drop(parts.out)
    soft, drops = isinstance(run.gates[i], Tensor), p or drop(at._modules["dropout"])
    if not _in_panels(output) or run.packing.key_rows is not None or soft or drops:
        return None
    after = packed_layer.Product(output, out._parameters["bias"])
    shape = (run.packing.keys, at.num_attention_heads, at.scaling)
    ending = packed_layer.Norm(norm.weight, norm.bias, norm.eps)
    if steps[0].op == "project_query":
        query, key, value = (at._modules[name] for name in ("query", "key", "value"))
        weight, wanted = weight_of(query), run.packing.wanted_rows
        if not _in_panels(weight) or wanted is None:
            return None
        first = packed_layer.Product(weight, query._parameters["bias"])
        return packed_layer.absorbed_half(
            wanted, first, key.weight, value.weight, value.bias, *shape, after, ending
        )
    joint = None if steps[0].narrow else _joint(at._modules)
    if joint is None:
        return None
    return packed_layer.attention_half(joint, _biases(at._modules), *shape, after, ending)


def _feed_forward_half(run: Run, i: int, parts: Parts, steps: tuple[Step, ...]) -> Half | None:
    up, down = parts.intermediate._modules["dense"], parts.output._modules["dense"]
    products, (norm, p) = (weight_of(up), weight_of(down)), _norm_and_drop(parts.output)
    if p or not is_linear_gelu(parts.intermediate) or not all(map(_in_panels, products)):
        return None
    weight, norm_bias, second = _fold(run, i, norm) if steps[-1].chained else (norm.weight, norm.bias, {})
    return packed_layer.feed_forward_half(
        packed_layer.Product(products[0], up._parameters["bias"]),  # type: ignore[arg-type]
        packed_layer.Product(products[1], down._parameters["bias"]),  # type: ignore[arg-type]
        packed_layer.Norm(weight, norm_bias, norm.eps, **second),
    )


def _project_qkv(run: Run, parts: Parts, step: Step, h: Tensor) -> tuple[Tensor, Any]:
    """The biases are left to attention, which leaves the keys' out. On a CPU that costs what adding them in
    the products does: q, k, v and attention of BERT-base, 778 rows, two threads, both ways in turn, medians:
    16.7 ms and 16.7 ms, in training 51.7 ms and 51.6 ms."""
    at, packing = parts.at._modules, run.packing
    if packing.key_rows is None and not step.narrow:
        joint = _joint(at)
        if joint is not None:
            return h, (*product(h, joint).chunk(3, 1), *_biases(at))
    source = h if packing.key_rows is None else h.index_select(0, packing.key_rows)
    (k, k_bias), (v, v_bias) = linear(at["key"], source), linear(at["value"], source)
    if step.narrow:
        h = h.index_select(0, packing.wanted_rows)  # type: ignore[arg-type]
    q, q_bias = linear(at["query"], h)
    return h, (q, k, v, q_bias, k_bias, v_bias)


def _biases(at: dict[str, Any]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of query, key and value."""
    return tuple(at[name]._parameters["bias"] for name in ("query", "key", "value"))  # type: ignore[return-value]


def _joint(at: dict[str, Any]) -> Packed | None:
    """Query, key and value as one weight, where `freeze` packed them together and none was replaced since."""
    joints = []
    for name in ("query", "key", "value"):
        weight = weight_of(at[name])
        joints.append(weight.joint if isinstance(weight, Packed) else None)
    return joints[0] if joints[0] is joints[1] is joints[2] else None


def _project_query(run: Run, parts: Parts, h: Tensor) -> tuple[Tensor, Any]:
    packing = run.packing
    source = h if packing.key_rows is None else h.index_select(0, packing.key_rows)
    h = h.index_select(0, packing.wanted_rows)  # type: ignore[arg-type]
    return h, (_with_bias(*linear(parts.at.query, h)), source)


def _attend(run: Run, i: int, parts: Parts, step: Step, projected: tuple[Any, ...]) -> Tensor:
    """projected: q, k, v and their biases, still to be added where there are any."""
    at, packing = parts.at, run.packing
    queries = packing.wanted if step.narrow else packing.queries
    q, k, v, q_bias, k_bias, v_bias = projected
    p = drop(at.dropout)
    if run.probabilities is not None:
        q, k, v = _with_bias(q, q_bias), _with_bias(k, k_bias), _with_bias(v, v_bias)
        return _attend_openly(run, i, at, q, k, v, p)
    return attention(
        q, k, v, queries, packing.keys, at.num_attention_heads, at.scaling, p,
        q_bias=q_bias, k_bias=k_bias, v_bias=v_bias,
    )  # fmt: skip


def _with_bias(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows if bias is None else (rows + bias).to(rows.dtype)


def _attend_openly(run: Run, i: int, at: Any, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Attention by way of its probabilities, kept for `output_attentions`; every row is a query then."""
    packing, heads = run.packing, at.num_attention_heads
    index = packing.packed_index()
    places = (index if packing.key_rows is None else index[packing.key_rows]) % packing.length
    probabilities = attention_probabilities(
        q, k, packing.queries, packing.keys, places, packing.length, heads, at.scaling
    )
    probabilities = F.dropout(probabilities, p)
    assert run.probabilities is not None
    run.probabilities[i] = probabilities
    rows = index if packing.key_rows is None else index[packing.key_rows]
    spread = v.new_zeros(packing.batch * packing.length, v.shape[-1]).index_copy(0, rows, v)
    spread = spread.view(packing.batch, packing.length, heads, -1).transpose(1, 2)
    return torch.matmul(probabilities, spread).transpose(1, 2).reshape(q.shape)


def _absorb(run: Run, parts: Parts, q_and_source: tuple[Tensor, Tensor]) -> Tensor:
    at, (q, source) = parts.at, q_and_source
    if torch.is_grad_enabled() and at.key.bias is not None:
        q = (
            q + 0.0 * at.key.bias
        )  # cancels in the softmax; its gradient is zero and not missing, as DDP and Adam expect
    return absorbed_attention(
        q,
        source,
        at.key.weight,
        at.value.weight,
        at.value.bias,
        run.packing.keys,
        at.num_attention_heads,
        at.scaling,
        drop(at.dropout),
    )


def _attention_norm(run: Run, i: int, parts: Parts, x: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
    gate, (norm, p) = run.gates[i], _norm_and_drop(parts.out)
    if not isinstance(gate, Tensor):
        return gated_add_norm(x, h, norm.weight, norm.bias, norm.eps, bias=bias, dropout_p=p)
    scale, shift = _stand_in(parts.layer, 1.0 - gate)
    return gated_add_norm(
        x, h, norm.weight, norm.bias, norm.eps, bias=bias, gate=gate, scale=scale, shift=shift, dropout_p=p
    )


def _intermediate(module: Any, h: Tensor) -> Tensor:
    if not is_linear_gelu(module):
        return module(h)
    dense = module._modules["dense"]
    return linear_gelu(h, weight_of(dense), dense._parameters["bias"])  # type: ignore[arg-type]


def _output_norm(
    run: Run, i: int, parts: Parts, step: Step, x: Tensor, h: Tensor, bias: Tensor | None
) -> Tensor:
    norm, p = _norm_and_drop(parts.output)
    if step.chained:
        return _norm_chain(run, i, x, h, bias, p, norm)
    return gated_add_norm(x, h, norm.weight, norm.bias, norm.eps, bias=bias, dropout_p=p)


def _norm_and_drop(output: Any) -> tuple[Any, float]:
    """The LayerNorm of a block's end and the rate of its dropout now."""
    return output._modules["LayerNorm"], drop(output._modules["dropout"])


def _norm_chain(
    run: Run, i: int, x: Tensor, h: Tensor, bias: Tensor | None, p: float, norm: nn.LayerNorm
) -> Tensor:
    """`norm`, then the LayerNorm of the skipped attention of layer i + 1, its replacement folded in."""
    weight, norm_bias, second = _fold(run, i, norm)
    return gated_add_norm(x, h, weight, norm_bias, norm.eps, bias=bias, dropout_p=p, **second)


def _fold(run: Run, i: int, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Weight and bias of `norm` with the replacement of layer i + 1's skipped attention folded in, and the
    LayerNorm that this attention leaves behind as the operands of a second norm."""
    following = run.layers[i + 1]
    then = following.attention.output.LayerNorm
    scale, shift = _stand_in(following, 1.0)
    weight: Tensor = norm.weight
    norm_bias: Tensor = norm.bias
    if scale is not None:
        weight, norm_bias = weight * scale, norm_bias * scale
    if shift is not None:
        norm_bias = norm_bias + shift
    return weight, norm_bias, {"weight2": then.weight, "norm_bias2": then.bias, "eps2": then.eps}


def _skipped_norm(run: Run, i: int, h: Tensor) -> Tensor:
    """The LayerNorm a skipped attention leaves behind, by itself."""
    layer = run.layers[i]
    norm = layer.attention.output.LayerNorm
    scale, shift = _stand_in(layer, 1.0)
    if scale is not None:
        h = h * scale
    if shift is not None:
        h = h + shift
    return F.layer_norm(h, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _adds(layer: Any) -> bool:
    """Whether a layer's replacement adds a vector."""
    replacement = replacement_of(layer)
    return replacement is not None and replacement.shift is not None


def _stand_in(layer: Any, share: Gate) -> tuple[Tensor | None, Tensor | None]:
    """(a, b) of a * h + b, what a layer's residual becomes when `share` of the attention is replaced."""
    replacement = replacement_of(layer)
    return (None, None) if replacement is None else replacement.scale_and_shift(share)


def _note(run: Run, step: Step, out: Tensor) -> None:
    if run.record is not None:
        run.record.steps.append((step.op, step.layer, out.shape[0]))


def _note_hidden(run: Run, h: Tensor, narrow: bool) -> None:
    if run.record is not None:
        index = run.packing.wanted_index() if narrow else run.packing.packed_index()
        run.record.hidden.append((index, h))


def check_hidden_selection(selection: Any, layers: int) -> set[int] | None:
    """The indices that `output_hidden_states` (True, an int or ints, negative from the end) asks for."""
    if selection is None or selection is False:
        return None
    if selection is True:
        return set(range(layers + 1))
    wanted = [selection] if isinstance(selection, int) else list(selection)
    if not all(isinstance(i, int) for i in wanted):
        raise Unsupported(
            say(
                "forward",
                "output_hidden_states",
                selection,
                "True, an int or a list of ints",
                "pass one of these",
            )
        )
    return {i % (layers + 1) for i in wanted if -(layers + 1) <= i <= layers}
