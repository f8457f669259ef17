"""How a pruned model is described in `config.json`, and the config classes that read the description.

A pruned model has a `model_type` of its own, so that transformers without fastgate does not know it. Classes
of transformers that ignore the `model_type` refuse the name of the weights (`compat.WEIGHTS_ENTRY`), which is
a notice instead.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

from transformers import BertConfig, CamembertConfig, PreTrainedConfig, RobertaConfig, XLMRobertaConfig

from fastgate.errors import CheckpointError, format_error
from fastgate.models.compat import WEIGHTS_ENTRY
from fastgate.models.handle import POOLING_KEY
from fastgate.nn.choices import DEMANDS, POOLINGS, REPLACEMENT_KINDS, Demand, Pooling, ReplacementKind

KEY = "fastgate"  # the entry of a config that holds the description
NOTICE = "this model is pruned by fastgate: pip install fastgate, then import fastgate before loading it"
UNFINISHED, INTERRUPTED = "unfinished", "interrupted"


@dataclass(frozen=True)
class Layout:
    """What the weights of a checkpoint mean: what `patch` and `prune` are called with to make the model.

    unfinished: the gates are still being learned, and only the training that wrote the weights can use them.
    """

    kept: tuple[int, ...]
    replacement: ReplacementKind = "zero"
    demand: Demand | None = None
    pooling: Pooling = "first"
    unfinished: bool = False

    def as_json(self) -> dict[str, Any]:
        data = asdict(self) | {"kept": list(self.kept)}
        if not self.unfinished:
            del data[UNFINISHED]
        return data

    def is_plain(self, layers: int) -> bool:
        """Whether a model of transformers computes the same from the same weights."""
        return len(self.kept) == layers and self.pooling == "first" and not self.unfinished


def read_layout(data: object, where: str, layers: object) -> Layout:
    """The description in a file. Raises CheckpointError for one that is damaged, unfinished or interrupted.

    where: the file, for the message. layers: the number of layers that the config states.
    """
    got: dict[str, Any] = data if isinstance(data, dict) else {}
    if got.get(INTERRUPTED):
        raise CheckpointError(
            format_error("load", where, "the notice of a save that was interrupted", "a checkpoint",
                "call fastgate.load on the folder, or save the model anew")
        )  # fmt: skip
    if got.get(UNFINISHED):
        raise CheckpointError(
            format_error("load", where, "weights whose gates are still being learned", "a pruned model",
                "resume with SelfPruningTrainer.train(resume_from_checkpoint=...), or load a later one")
        )  # fmt: skip
    kept = got.get("kept")
    fields = (
        isinstance(kept, list)
        and all(type(i) is int for i in kept)
        and kept == sorted(set(kept))
        and got.get("replacement") in REPLACEMENT_KINDS
        and got.get("demand") in (None, *DEMANDS)
        and got.get("pooling", "first") in POOLINGS
    )
    if not fields:
        raise CheckpointError(
            format_error(
                "load", where, "missing or wrong fields", "what fastgate.save writes", "save the model anew"
            )
        )
    assert isinstance(kept, list)
    if kept and not (type(layers) is int and kept[0] >= 0 and kept[-1] < layers):
        raise CheckpointError(
            format_error(
                "load", where, f"keep: {kept[:5]}", f"indices of {layers} layers", "save the model anew"
            )
        )
    return Layout(tuple(kept), got["replacement"], got.get("demand"), got.get("pooling", "first"))


class _Pruned(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """A config of transformers and, under `fastgate`, what was pruned. It says so wherever it is written."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**{**kwargs, WEIGHTS_ENTRY: NOTICE})  # type: ignore[no-untyped-call]

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = super().to_dict()
        return data | {WEIGHTS_ENTRY: NOTICE}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(*args, **kwargs)
        setattr(self, WEIGHTS_ENTRY, NOTICE)  # which transformers deletes


class FastgateBertConfig(_Pruned, BertConfig):  # type: ignore[no-untyped-call]
    """A BertConfig of a pruned model."""

    model_type = "fastgate_bert"


class FastgateRobertaConfig(_Pruned, RobertaConfig):  # type: ignore[no-untyped-call]
    """A RobertaConfig of a pruned model."""

    model_type = "fastgate_roberta"


class FastgateXLMRobertaConfig(_Pruned, XLMRobertaConfig):  # type: ignore[no-untyped-call]
    """An XLMRobertaConfig of a pruned model."""

    model_type = "fastgate_xlm_roberta"


class FastgateCamembertConfig(_Pruned, CamembertConfig):  # type: ignore[no-untyped-call]
    """A CamembertConfig of a pruned model."""

    model_type = "fastgate_camembert"


# The config class of transformers -> that of a pruned model.
PRUNED: dict[type[PreTrainedConfig], type[PreTrainedConfig]] = {
    BertConfig: FastgateBertConfig,
    RobertaConfig: FastgateRobertaConfig,
    XLMRobertaConfig: FastgateXLMRobertaConfig,
    CamembertConfig: FastgateCamembertConfig,
}
_PLAIN = {pruned: plain for plain, pruned in PRUNED.items()}
MODEL_TYPES = {pruned.model_type: plain for plain, pruned in PRUNED.items()}


def is_pruned(config: Any) -> bool:
    return type(config) in _PLAIN


def plain_config(config: Any) -> Any:
    """The config of transformers that a pruned model has in memory, where its encoder holds the rest."""
    if not is_pruned(config):
        return config
    plain = copy.deepcopy(config)
    plain.__class__ = _PLAIN[type(config)]
    for name in (KEY, WEIGHTS_ENTRY):
        plain.__dict__.pop(name, None)
    return plain


def described(data: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The JSON of a config of transformers, made that of a pruned model."""
    pooling = {POOLING_KEY: layout.pooling} if layout.pooling != "first" else {}
    rest = {name: value for name, value in data.items() if name != POOLING_KEY}
    model_type = f"fastgate_{str(data['model_type']).replace('-', '_')}"
    return rest | pooling | {"model_type": model_type, WEIGHTS_ENTRY: NOTICE, KEY: layout.as_json()}
