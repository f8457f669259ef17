"""What users do to whole layers or the model: shared, tied, dropped and uneven layers, configuration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers.module_changes import Make, named, numbers
from torch import nn


class NotHere(Exception):
    """The model has no module that this change can be made at."""


def _layers(model: nn.Module) -> nn.ModuleList:
    layers: nn.ModuleList = model.base_model.encoder.layer  # type: ignore[union-attr, assignment]
    return layers


def _place(name: str) -> int:
    return int(name.rpartition(".")[2])


def _share_layer(model: nn.Module, name: str) -> None:
    layers = _layers(model)
    layers[(_place(name) + 1) % len(layers)] = layers[_place(name)]


def _tie_linears(model: nn.Module, name: str) -> None:
    layers = _layers(model)
    layer, next_layer = layers[_place(name)], layers[(_place(name) + 1) % len(layers)]
    next_layer.intermediate.dense.weight = layer.intermediate.dense.weight


def _tie_projections(model: nn.Module, name: str) -> None:
    at = _layers(model)[_place(name)].attention.self
    at.value.weight = at.key.weight


def _last_layer_gone(model: nn.Module, name: str) -> None:
    layers = _layers(model)
    if len(layers) < 2:
        raise NotHere
    del layers[-1]


def _last_layer_gone_and_said(model: nn.Module, name: str) -> None:
    _last_layer_gone(model, name)
    model.config.num_hidden_layers -= 1  # type: ignore[union-attr, operator]


def _linear(like: nn.Module, rows: int, columns: int) -> nn.Linear:
    linear = nn.Linear(columns, rows, dtype=like.weight.dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        linear.weight.copy_(numbers(linear.weight, rows, columns))
        linear.bias.copy_(numbers(linear.weight, rows))
    return linear


def _uneven_ffn(model: nn.Module, name: str) -> None:
    layer = _layers(model)[_place(name)]
    hidden = layer.output.dense.weight.shape[0]
    layer.intermediate.dense = _linear(layer.intermediate.dense, 6, hidden)
    layer.output.dense = _linear(layer.output.dense, hidden, 6)


def _uneven_heads(model: nn.Module, name: str) -> None:
    attention = _layers(model)[_place(name)].attention
    at, size = attention.self, attention.self.attention_head_size
    hidden = at.query.weight.shape[1]
    for part in ("query", "key", "value"):
        setattr(at, part, _linear(getattr(at, part), size, hidden))
    attention.output.dense = _linear(attention.output.dense, hidden, size)
    at.num_attention_heads, at.all_head_size = 1, size


def _captured(model: nn.Module, name: str) -> None:
    encoder = model.base_model
    training = model.training
    with torch.no_grad():
        encoder.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long), output_hidden_states=True)  # type: ignore[operator]
    model.train(training)


def _checkpointing(model: nn.Module, name: str) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def _require_input_gradients(model: nn.Module, name: str) -> None:
    model.enable_input_require_grads()  # type: ignore[operator]


def _decoder(model: nn.Module, name: str) -> None:
    model.config.is_decoder = True  # type: ignore[union-attr]


def _config_activation(model: nn.Module, name: str) -> None:
    model.config.hidden_act = "relu"  # type: ignore[union-attr]


a_layer = named("Layer")

# Name of a change -> (how it is made, the modules it can be made at).
CHANGES: dict[str, tuple[Make, Callable[[nn.Module], bool]]] = {
    "share_layer": (_share_layer, a_layer),
    "tie_linears": (_tie_linears, a_layer),
    "tie_projections": (_tie_projections, a_layer),
    "last_layer_gone": (_last_layer_gone, a_layer),
    "last_layer_gone_and_said": (_last_layer_gone_and_said, a_layer),
    "uneven_ffn": (_uneven_ffn, a_layer),
    "uneven_heads": (_uneven_heads, a_layer),
    "captured": (_captured, a_layer),
    "checkpointing": (_checkpointing, a_layer),
    "require_input_gradients": (_require_input_gradients, a_layer),
    "decoder": (_decoder, a_layer),
    "config_activation": (_config_activation, a_layer),
}
