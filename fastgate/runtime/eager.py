"""Runs a plan step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgate.nn.transformers_names import checkpoint_function, is_checkpointed
from fastgate.runtime.context import ForwardContext
from fastgate.runtime.plan import Sublayer
from fastgate.runtime.steps.base import SublayerRows


def run_plan(context: ForwardContext) -> Tensor:
    """Every step of the plan. Returns (output rows, hidden)."""
    return run_layers(context, context.plan.embed.embed(context))


def run_layers(context: ForwardContext, h: Tensor) -> Tensor:
    """The layers of the plan. h: embeddings, (rows, hidden). Returns (output rows, hidden)."""
    for i, layer in enumerate(context.layers):
        module = layer.module
        if is_checkpointed(module) and module.training and torch.is_grad_enabled():
            h = checkpoint_function(module)(_run_layer, context, i, h)
        else:
            h = _run_layer(context, i, h)
        # Not inside: what is computed again in the backward has no gradient outside, and comes twice.
        h = context.end_layer(h, context.plan.layers[i][-1][-1].output_rows_only)
    return h


def _run_layer(context: ForwardContext, layer: int, h: Tensor) -> Tensor:
    for sublayer in context.plan.layers[layer]:
        h = run_sublayer(context, sublayer, h)
    return h


def run_sublayer(context: ForwardContext, sublayer: Sublayer, h: Tensor) -> Tensor:
    """The steps of a sublayer, from the rows of the LayerNorm before it to those of its own."""
    state = SublayerRows(h, h)
    for step in sublayer:
        context.end_step(step, step.run(context, state))
    return state.residual
