"""A model, its frozen copy, the packed Linears of one, and its outputs."""

from __future__ import annotations

import copy

import torch
from helpers import encoders

import fastgate
from fastgate.nn.packed_linear import PackedLinear

HEADS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")


def frozen(head="ForSequenceClassification", keep=None, dtype=torch.float32, family="Bert"):
    model = fastgate.patch(encoders.make(family, head).to(dtype))
    if keep is not None:
        fastgate.prune(model, keep=keep)
    return model, fastgate.freeze(copy.deepcopy(model))


def packed(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def outputs(model, batch):
    with torch.inference_mode():
        return model(**batch).to_tuple()
