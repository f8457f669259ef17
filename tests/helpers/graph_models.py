"""Models with graphs and their twins without: what must be equal, and what changes an encoder."""

from __future__ import annotations

import copy

import torch
from helpers.encoders import draw_replacements, make, output_rows
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
    graphs = get_encoder(model).runtime.executor.graphs
    assert graphs is not None
    return graphs


def same(model, plain, inputs, tolerance=2e-5):
    """Call both; equal on every row that is claimed."""
    with torch.inference_mode():
        got, want = model(**inputs), plain(**inputs)
    mask = inputs["attention_mask"]
    mask = torch.ones_like(mask) if "start_logits" in want else mask
    for name, value in want.items():
        got_rows, want_rows = output_rows(name, got[name], mask), output_rows(name, value, mask)
        torch.testing.assert_close(got_rows, want_rows, rtol=tolerance, atol=tolerance)
    return got


def captured(model, plain, inputs):
    """Call until there is a graph for these inputs."""
    for _ in range(cuda_graphs.CAPTURE_AT):
        same(model, plain, inputs)
    assert graphs_of(model).replays
    return graphs_of(model)


def _new_data(model):
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    weight.data = weight.data * 0.5


def _transposed(model):
    """The same memory, read the other way."""
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    weight.data = weight.data.t()


def _assigned(model):
    state = {name: t * 0.9 for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _replaced(model):
    torch.manual_seed(1)
    intermediate = model.bert.encoder.layer[1].intermediate
    intermediate.dense = nn.Linear(intermediate.dense.in_features, intermediate.dense.out_features)


def _new_parameter(model):
    norm = model.bert.encoder.layer[1].output.LayerNorm
    norm.weight = nn.Parameter(norm.weight.detach() * 2)


def _other_activation(model):
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


def _changes_eps(model):
    model.bert.encoder.layer[1].output.LayerNorm.eps = 0.5


CHANGES = {
    "data": _new_data,
    "transposed": _transposed,
    "assign": _assigned,
    "module": _replaced,
    "parameter": _new_parameter,
    "eps": _changes_eps,
    "dtype": lambda model: model.double(),
    "gates": lambda model: get_encoder(model).set_gates([1.0, 0.0, 1.0]),
    "pruned": lambda model: fastgate.prune(model, keep=[0]),
    "replacement": lambda model: get_encoder(model).add_replacements("mean"),
    "activation": _other_activation,
    "no bias": lambda model: setattr(model.bert.encoder.layer[0].output.dense, "bias", None),
}
