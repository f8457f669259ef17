"""Runs a plan over packed rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgate.ops.absorbed_attention import absorbed_attention
from fastgate.ops.attention import attention, attention_probabilities
from fastgate.ops.embed_norm import embed_norm
from fastgate.ops.gated_add_norm import gated_add_norm
from fastgate.ops.linear import linear as product
from fastgate.ops.linear_gelu import linear_gelu
from fastgate.ops.shift_norm import shift_norm
from fastgate.runtime.context import ForwardContext, TokenIds
from fastgate.runtime.layer import End, Layer, drop
from fastgate.runtime.plan import Step


def run_plan(run: ForwardContext, embedded: Callable[[bool], TokenIds | Tensor]) -> Tensor:
    """Run every step; returns (demanded, hidden) rows, or (packed, hidden) if all are demanded.

    embedded: called with whether only demanded rows are wanted; gives their ids, or the finished embeddings.
    """
    h = _embed(run, run.plan.of_layer(-1)[0], embedded)
    program = run.encoder.fastgate_runtime.programs.find(run, h)
    if program is not None:
        return program(run, h, _run_steps)
    for i, layer in enumerate(run.layers):
        module = layer.module
        if module.gradient_checkpointing and module.training and torch.is_grad_enabled():
            h = module._gradient_checkpointing_func(_run_layer, run, i, h)
        else:
            h = _run_layer(run, i, h)
        # Not inside: what is computed anew in the backward has no gradient outside, and comes twice.
        h = _note_hidden(run, h, run.plan.of_layer(i)[-1].output_rows_only)
    return h


def _embed(run: ForwardContext, step: Step, embedded: Callable[[bool], TokenIds | Tensor]) -> Tensor:
    h, after = embedded(step.output_rows_only), step.chained
    if isinstance(h, TokenIds):
        # Dropout stands between the two norms: what is added behind it cannot be folded in before it.
        first, dropout = run.layers[0], run.encoder.embeddings.dropout
        chains = after and first.attention_end.plain_norm and not (drop(dropout) and first.has_bias)
        h, after = _embed_ids(run, h, chains), after and not chains
    if after:
        h = _skipped_norm(run, 0, h)
    _note(run, step, h)
    return _note_hidden(run, h, step.output_rows_only)


def _embed_ids(run: ForwardContext, ids: TokenIds, chains: bool) -> Tensor:
    """The embeddings; chains: with the LayerNorm of the skipped attention of layer 0."""
    embeddings = run.encoder.embeddings
    words, positions = embeddings.word_embeddings, embeddings.position_embeddings
    norm = embeddings.LayerNorm
    weight, norm_bias, second = run.layers[0].fold_next_norm(norm) if chains else (norm.weight, norm.bias, {})
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


def _run_layer(run: ForwardContext, i: int, h: Tensor) -> Tensor:
    for steps in run.plan.halves(i):
        h = _run_steps(run, i, steps, h)
    return h


def _run_steps(run: ForwardContext, i: int, steps: tuple[Step, ...], h: Tensor) -> Tensor:
    """Steps of a layer up to a LayerNorm, from the rows of the LayerNorm before."""
    layer, below = run.layers[i], h
    x: Any = h
    bias: Tensor | None = None
    for step in steps:
        if step.op == "project_qkv":
            h, x = _project_qkv(run, layer, step, h)
        elif step.op == "project_query":
            h, x = _project_query(run, layer, h)
        elif step.op == "attention":
            x = _attend(run, i, layer, step, x)
        elif step.op == "absorbed_attention":
            x = _absorb(run, layer, x)
        elif step.op == "project_output":
            x, bias = layer.dense(x)  # type: ignore[misc]
            if run.record is not None:
                run.record.attention_output.append(
                    (i, x.detach() if bias is None else x.detach() + bias.detach())
                )
        elif step.op == "attention_norm":
            if isinstance(run.gates[i], Tensor) and layer.reads_neighbours:
                h = _shift(run, step, below)
            h = _attention_norm(run, i, layer, x, h, bias)
        elif step.op == "shift_norm":
            h = _shift_norm(run, layer, step, h)
        elif step.op == "skip_norm":
            h = _skipped_norm(run, i, h)
        elif step.op == "intermediate":
            x = _intermediate(layer, h)
        elif step.op == "project_down":
            x, bias = layer.down(x)
        elif step.op == "output_norm":
            h = _output_norm(run, i, layer, step, x, h, bias)
        _note(run, step, h if step.op.endswith("norm") else x[0] if isinstance(x, tuple) else x)
    return h


def _project_qkv(run: ForwardContext, layer: Layer, step: Step, h: Tensor) -> tuple[Tensor, Any]:
    """The biases are left to attention, which leaves the keys' out. On a CPU that costs what adding them in
    the products does: q, k, v and attention of BERT-base, 778 rows, two threads, both ways in turn, medians:
    16.7 ms and 16.7 ms, in training 51.7 ms and 51.6 ms."""
    unpadded = run.unpadded
    if unpadded.key_rows is None and not step.output_rows_only:
        together = layer.fused_qkv
        if together is not None:
            return h, (*product(h, together).chunk(3, 1), *layer.biases)
    source = h if unpadded.key_rows is None else h.index_select(0, unpadded.key_rows)
    (k, k_bias), (v, v_bias) = layer.key(source), layer.value(source)  # type: ignore[misc]
    if step.output_rows_only:
        h = h.index_select(0, unpadded.wanted_rows)  # type: ignore[arg-type]
    q, q_bias = layer.query(h)  # type: ignore[misc]
    return h, (q, k, v, q_bias, k_bias, v_bias)


def _project_query(run: ForwardContext, layer: Layer, h: Tensor) -> tuple[Tensor, Any]:
    unpadded = run.unpadded
    source = h if unpadded.key_rows is None else h.index_select(0, unpadded.key_rows)
    h = h.index_select(0, unpadded.wanted_rows)  # type: ignore[arg-type]
    return h, (_with_bias(*layer.query(h)), source)  # type: ignore[misc]


def _attend(run: ForwardContext, i: int, layer: Layer, step: Step, projected: tuple[Any, ...]) -> Tensor:
    """projected: q, k, v and their biases, still to be added where there are any."""
    at, unpadded = layer.at, run.unpadded
    queries = unpadded.wanted if step.output_rows_only else unpadded.queries
    q, k, v, q_bias, k_bias, v_bias = projected
    heads, p = layer.heads_in(q.shape[1]), layer.rate
    if run.probabilities is not None:
        q, k, v = _with_bias(q, q_bias), _with_bias(k, k_bias), _with_bias(v, v_bias)
        return _attend_openly(run, i, at.scaling, heads, q, k, v, p)
    return attention(
        q, k, v, queries, unpadded.keys, heads, at.scaling, p, q_bias=q_bias, k_bias=k_bias, v_bias=v_bias
    )


def _with_bias(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows if bias is None else (rows + bias).to(rows.dtype)


def _attend_openly(
    run: ForwardContext, i: int, scaling: float, heads: int, q: Tensor, k: Tensor, v: Tensor, p: float
) -> Tensor:
    """Attention by way of its probabilities, kept for `output_attentions`; every row is a query then."""
    unpadded = run.unpadded
    index = unpadded.packed_index()
    places = (index if unpadded.key_rows is None else index[unpadded.key_rows]) % unpadded.length
    probabilities = attention_probabilities(
        q, k, unpadded.queries, unpadded.keys, places, unpadded.length, heads, scaling
    )
    probabilities = F.dropout(probabilities, p)
    assert run.probabilities is not None
    run.probabilities[i] = probabilities
    rows = index if unpadded.key_rows is None else index[unpadded.key_rows]
    spread = v.new_zeros(unpadded.batch * unpadded.length, v.shape[-1]).index_copy(0, rows, v)
    spread = spread.view(unpadded.batch, unpadded.length, heads, -1).transpose(1, 2)
    return torch.matmul(probabilities, spread).transpose(1, 2).reshape(q.shape)


def _absorb(run: ForwardContext, layer: Layer, q_and_source: tuple[Tensor, Tensor]) -> Tensor:
    (q, source), key, value = q_and_source, layer.key.module, layer.value.module  # type: ignore[union-attr]
    if torch.is_grad_enabled() and key.bias is not None:
        # It cancels in the softmax; its gradient is zero and not missing, as DDP and Adam expect.
        q = q + 0.0 * key.bias
    return absorbed_attention(
        q,
        source,
        key.weight,
        value.weight,
        value.bias,
        run.unpadded.keys,
        layer.heads_in(q.shape[1]),
        layer.at.scaling,
        layer.rate,
    )


def _attention_norm(
    run: ForwardContext, i: int, layer: Layer, x: Tensor, h: Tensor, bias: Tensor | None
) -> Tensor:
    gate = run.gates[i]
    if not isinstance(gate, Tensor):
        return _add_norm(layer.attention_end, x, h, bias)
    scale, shift = layer.residual_affine(1.0 - gate)
    return _add_norm(layer.attention_end, x, h, bias, gate, scale, shift)


def _add_norm(
    end: End,
    x: Tensor,
    h: Tensor,
    bias: Tensor | None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """norm(scale * h + gate * dropout(x + bias) + shift): one op, or what stands in the block's end."""
    if end.fuses and end.rate < 1.0:
        norm = end.norm
        return gated_add_norm(
            x, h, norm.weight, norm.bias, norm.eps,
            bias=bias, gate=gate, scale=scale, offset=shift, dropout_p=end.rate,
        )  # fmt: skip
    x = end.dropout(_with_bias(x, bias))
    x = x if gate is None else gate.to(x.dtype) * x
    h = h if scale is None else scale * h
    return end.norm(x + h if shift is None else x + h + shift)  # type: ignore[no-any-return]


def _shift(run: ForwardContext, step: Step, h: Tensor) -> Tensor:
    """h + (1 - gate) * r(h) of a gated layer's `shift`, from all packed rows to those of the step."""
    replacement = run.layers[step.layer].replacement
    h = h + (1.0 - run.gates[step.layer]) * replacement(h, run.unpadded.has_left_neighbour)  # type: ignore[misc]
    return _narrowed(run, step, h)


def _shift_norm(run: ForwardContext, layer: Layer, step: Step, h: Tensor) -> Tensor:
    """The LayerNorm of a skipped attention that a `shift` replaces."""
    if step.output_rows_only and run.unpadded.has_halo:
        has_left_neighbour, nearer = run.unpadded.shrink_steps[step.halo]
        return _shift_and_norm(layer, h, has_left_neighbour).index_select(0, nearer)
    return _narrowed(run, step, _shift_and_norm(layer, h, run.unpadded.has_left_neighbour))


def _shift_and_norm(layer: Layer, h: Tensor, has_left_neighbour: Tensor) -> Tensor:
    end = layer.attention_end
    if not end.plain_norm:
        return end.norm(h + layer.replacement(h, has_left_neighbour))  # type: ignore[misc, no-any-return]
    norm = end.norm
    return shift_norm(h, has_left_neighbour, *layer.shift_vectors, norm.weight, norm.bias, norm.eps)


def _narrowed(run: ForwardContext, step: Step, h: Tensor) -> Tensor:
    return h.index_select(0, run.unpadded.wanted_rows) if step.output_rows_only else h  # type: ignore[arg-type]


def _intermediate(layer: Layer, h: Tensor) -> Tensor:
    if layer.gelu is None:
        return layer.intermediate(h)  # type: ignore[no-any-return]
    return linear_gelu(h, layer.gelu.weight, layer.gelu.bias)  # type: ignore[arg-type]


def _output_norm(
    run: ForwardContext, i: int, layer: Layer, step: Step, x: Tensor, h: Tensor, bias: Tensor | None
) -> Tensor:
    end = layer.output_end
    if not step.chained:
        return _add_norm(end, x, h, bias)
    if end.fuses and end.rate < 1.0 and run.layers[i + 1].attention_end.plain_norm:
        return _norm_chain(run, i, x, h, bias, end)
    return _skipped_norm(run, i + 1, _add_norm(end, x, h, bias))


def _norm_chain(run: ForwardContext, i: int, x: Tensor, h: Tensor, bias: Tensor | None, end: End) -> Tensor:
    """The LayerNorm of a block's end, then that of the skipped attention of layer i + 1, its replacement
    folded in."""
    weight, norm_bias, second = run.layers[i + 1].fold_next_norm(end.norm)
    return gated_add_norm(x, h, weight, norm_bias, end.norm.eps, bias=bias, dropout_p=end.rate, **second)


def _skipped_norm(run: ForwardContext, i: int, h: Tensor) -> Tensor:
    """The LayerNorm a skipped attention leaves behind, by itself."""
    layer = run.layers[i]
    scale, shift = layer.residual_affine(1.0)
    if scale is not None:
        h = h * scale
    if shift is not None:
        h = h + shift
    return layer.attention_end.norm(h)  # type: ignore[no-any-return]


def _note(run: ForwardContext, step: Step, out: Tensor) -> None:
    if run.record is not None:
        run.record.steps.append((step.op, step.layer, out.shape[0]))


def _note_hidden(run: ForwardContext, h: Tensor, output_rows_only: bool) -> Tensor:
    """Keep the rows of a layer's output where they are asked for; returns the rows to go on with, which are
    taken from what is kept, so that its gradient is theirs."""
    if run.states is not None:
        run.states.append(run.unpadded.pad(h, output_rows_only))
        h = run.unpadded.pack(run.states[-1], output_rows_only)
    if run.record is not None and run.record.whole:
        index = run.unpadded.wanted_index() if output_rows_only else run.unpadded.packed_index()
        run.record.hidden.append((index, h))
    return h
