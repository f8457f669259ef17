"""Models with graphs and their twins without: what must be equal, and what changes an encoder."""

from __future__ import annotations

import copy

import torch
from helpers.encoders import demanded, draw_replacements, make
from torch import nn

import fastgate
from fastgate.models.handle import get_encoder
from fastgate.runtime import cuda_graphs
from fastgate.runtime.cuda_graphs import CudaGraphs

HEADS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
FILLS = ((14, 9, 3, 1), (2, 5, 14, 7), (13, 14, 1, 1), (6, 6, 6, 10))


def patched(head="ForSequenceClassification", keep=None, family="Bert", replacement="affine", **options):
    """(a model with graphs, its twin without)."""
    plain = fastgate.patch(make(family, head, **options), graphs=False)
    if keep is not None:
        draw_replacements(fastgate.prune(plain, keep=list(keep), replacement=replacement))
    model = copy.deepcopy(plain)
    return fastgate.patch(model, graphs=True), plain


def graphs_of(model) -> CudaGraphs:
    found = get_encoder(model).runtime.executor.graphs
    assert found is not None
    return found


def same(model, plain, inputs, tolerance=2e-5):
    """Call both; equal on every row that is claimed."""
    with torch.inference_mode():
        got, want = model(**inputs), plain(**inputs)
    mask = inputs["attention_mask"]
    mask = torch.ones_like(mask) if "start_logits" in want else mask
    for name, value in want.items():
        found, true = demanded(name, got[name], mask), demanded(name, value, mask)
        torch.testing.assert_close(found, true, rtol=tolerance, atol=tolerance)
    return got


def captured(model, plain, inputs):
    """Call until there is a graph for these inputs."""
    for _ in range(cuda_graphs.CAPTURE_AT):
        same(model, plain, inputs)
    assert graphs_of(model).replays
    return graphs_of(model)


def _new_data(one):
    weight = one.bert.encoder.layer[0].attention.self.query.weight
    weight.data = weight.data * 0.5


def _turned(one):
    """The same memory, read the other way."""
    weight = one.bert.encoder.layer[0].attention.self.query.weight
    weight.data = weight.data.t()


def _assigned(one):
    state = {name: t * 0.9 for name, t in one.state_dict().items()}
    one.load_state_dict(state, assign=True)


def _replaced(one):
    torch.manual_seed(1)
    intermediate = one.bert.encoder.layer[1].intermediate
    intermediate.dense = nn.Linear(intermediate.dense.in_features, intermediate.dense.out_features)


def _new_parameter(one):
    norm = one.bert.encoder.layer[1].output.LayerNorm
    norm.weight = nn.Parameter(norm.weight.detach() * 2)


def _other_activation(one):
    one.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


def _changes_eps(one):
    one.bert.encoder.layer[1].output.LayerNorm.eps = 0.5


CHANGES = {
    "data": _new_data,
    "transposed": _turned,
    "assign": _assigned,
    "module": _replaced,
    "parameter": _new_parameter,
    "eps": _changes_eps,
    "dtype": lambda one: one.double(),
    "gates": lambda one: get_encoder(one).set_gates([1.0, 0.0, 1.0]),
    "pruned": lambda one: fastgate.prune(one, keep=[0]),
    "replacement": lambda one: get_encoder(one).add_replacements("mean"),
    "activation": _other_activation,
    "no bias": lambda one: setattr(one.bert.encoder.layer[0].output.dense, "bias", None),
}
