"""Runs a plan over packed rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .families import LAYER_MODULES, is_untouched, reject_hooks
from .layer import (
    Parts,
    adds,
    biases,
    drop,
    fold,
    is_linear_gelu,
    joint,
    linear,
    mixes,
    norm_and_drop,
    replacement_of,
    shift_vectors,
    stand_in,
    weight_of,
)
from .ops.absorbed_attention import absorbed_attention
from .ops.attention import attention, attention_probabilities
from .ops.embed_norm import embed_norm
from .ops.gated_add_norm import gated_add_norm
from .ops.linear import linear as product
from .ops.linear_gelu import linear_gelu
from .ops.shift_norm import shift_norm
from .plan import Step
from .run import Ids, Run


def run_plan(run: Run, embedded: Callable[[bool], Ids | Tensor]) -> Tensor:
    """Run every step; returns (demanded, hidden) rows, or (packed, hidden) if all are demanded.

    embedded: called with whether only demanded rows are wanted; gives their ids, or the finished embeddings.
    """
    h = _embed(run, run.plan.of_layer(-1)[0], embedded)
    program = run.encoder.fastgate_runtime.programs.find(run, h)
    if program is None or not program.kept:
        _reject_hooks(run)
    if program is not None:
        return program(run, h, _run_steps)
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
        chains = after and not (drop(run.encoder.embeddings.dropout) and adds(run.layers[0]))
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
    weight, norm_bias, second = fold(run.layers[0], norm) if chains else (norm.weight, norm.bias, {})
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


def _reject_hooks(run: Run) -> None:
    for i, layer in enumerate(run.layers):
        for path, module in zip(LAYER_MODULES, Parts.of(layer), strict=True):
            if not is_untouched(module):
                reject_hooks(f"layer {i} {path}", module)


def _run_layer(run: Run, i: int, h: Tensor) -> Tensor:
    for steps in run.plan.halves(i):
        h = _run_steps(run, i, steps, h)
    return h


def _run_steps(run: Run, i: int, steps: tuple[Step, ...], h: Tensor) -> Tensor:
    """Steps of a layer up to a LayerNorm, from the rows of the LayerNorm before."""
    parts, below = Parts.of(run.layers[i]), h
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
            if isinstance(run.gates[i], Tensor) and mixes(parts.layer):
                h = _shift(run, step, below)
            h = _attention_norm(run, i, parts, x, h, bias)
        elif step.op == "shift_norm":
            h = _shift_norm(run, parts, step, h)
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


def _project_qkv(run: Run, parts: Parts, step: Step, h: Tensor) -> tuple[Tensor, Any]:
    """The biases are left to attention, which leaves the keys' out. On a CPU that costs what adding them in
    the products does: q, k, v and attention of BERT-base, 778 rows, two threads, both ways in turn, medians:
    16.7 ms and 16.7 ms, in training 51.7 ms and 51.6 ms."""
    at, packing = parts.at._modules, run.packing
    if packing.key_rows is None and not step.narrow:
        together = joint(at)
        if together is not None:
            return h, (*product(h, together).chunk(3, 1), *biases(at))
    source = h if packing.key_rows is None else h.index_select(0, packing.key_rows)
    (k, k_bias), (v, v_bias) = linear(at["key"], source), linear(at["value"], source)
    if step.narrow:
        h = h.index_select(0, packing.wanted_rows)  # type: ignore[arg-type]
    q, q_bias = linear(at["query"], h)
    return h, (q, k, v, q_bias, k_bias, v_bias)


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
    gate, (norm, p) = run.gates[i], norm_and_drop(parts.out)
    if not isinstance(gate, Tensor):
        return gated_add_norm(x, h, norm.weight, norm.bias, norm.eps, bias=bias, dropout_p=p)
    scale, shift = stand_in(parts.layer, 1.0 - gate)
    return gated_add_norm(
        x, h, norm.weight, norm.bias, norm.eps, bias=bias, gate=gate, scale=scale, shift=shift, dropout_p=p
    )


def _shift(run: Run, step: Step, h: Tensor) -> Tensor:
    """h + (1 - gate) * r(h) of a gated layer's `shift`, from all packed rows to those of the step."""
    replacement = replacement_of(run.layers[step.layer])
    h = h + (1.0 - run.gates[step.layer]) * replacement(h, run.packing.linked)  # type: ignore[misc]
    return _narrowed(run, step, h)


def _shift_norm(run: Run, parts: Parts, step: Step, h: Tensor) -> Tensor:
    """The LayerNorm of a skipped attention that a `shift` replaces."""
    norm, vectors = parts.out._modules["LayerNorm"], shift_vectors(parts.layer)
    if step.narrow and run.packing.widened:
        linked, nearer = run.packing.near[step.reach]
        h = shift_norm(h, linked, *vectors, norm.weight, norm.bias, norm.eps)
        return h.index_select(0, nearer)
    h = shift_norm(h, run.packing.linked, *vectors, norm.weight, norm.bias, norm.eps)
    return _narrowed(run, step, h)


def _narrowed(run: Run, step: Step, h: Tensor) -> Tensor:
    return h.index_select(0, run.packing.wanted_rows) if step.narrow else h  # type: ignore[arg-type]


def _intermediate(module: Any, h: Tensor) -> Tensor:
    if not is_linear_gelu(module):
        return module(h)
    dense = module._modules["dense"]
    return linear_gelu(h, weight_of(dense), dense._parameters["bias"])  # type: ignore[arg-type]


def _output_norm(
    run: Run, i: int, parts: Parts, step: Step, x: Tensor, h: Tensor, bias: Tensor | None
) -> Tensor:
    norm, p = norm_and_drop(parts.output)
    if step.chained:
        return _norm_chain(run, i, x, h, bias, p, norm)
    return gated_add_norm(x, h, norm.weight, norm.bias, norm.eps, bias=bias, dropout_p=p)


def _norm_chain(
    run: Run, i: int, x: Tensor, h: Tensor, bias: Tensor | None, p: float, norm: nn.LayerNorm
) -> Tensor:
    """`norm`, then the LayerNorm of the skipped attention of layer i + 1, its replacement folded in."""
    weight, norm_bias, second = fold(run.layers[i + 1], norm)
    return gated_add_norm(x, h, weight, norm_bias, norm.eps, bias=bias, dropout_p=p, **second)


def _skipped_norm(run: Run, i: int, h: Tensor) -> Tensor:
    """The LayerNorm a skipped attention leaves behind, by itself."""
    layer = run.layers[i]
    norm = layer.attention.output.LayerNorm
    scale, shift = stand_in(layer, 1.0)
    if scale is not None:
        h = h * scale
    if shift is not None:
        h = h + shift
    return F.layer_norm(h, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _note(run: Run, step: Step, out: Tensor) -> None:
    if run.record is not None:
        run.record.steps.append((step.op, step.layer, out.shape[0]))


def _note_hidden(run: Run, h: Tensor, narrow: bool) -> None:
    if run.record is not None and run.record.whole:
        index = run.packing.wanted_index() if narrow else run.packing.packed_index()
        run.record.hidden.append((index, h))
