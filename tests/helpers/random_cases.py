"""What decides one random case, its model, its call and the changes by users, and how cases are drawn.

`cases(changed)` is the hypothesis strategy.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch
from helpers import random_changes as changes
from helpers.encoders import ALL, VECTORS
from hypothesis import strategies as st

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
ACTIVATIONS = ("gelu", "relu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "silu", "tanh", "gelu_fast")
MASKS = ("none", "full", "right", "left", "random", "some_empty", "all_empty")
MASK_DTYPES = {"int64": torch.int64, "bool": torch.bool, "float32": torch.float32, "int32": torch.int32}
MODES = ("eval", "inference", "train", "autocast")
TOKEN_HEADS = ("ForTokenClassification", "ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True)
class Change:
    """A change of random_changes. place: which of the modules that fit. when: before, after or frozen."""

    kind: str
    place: int = 0
    when: str = "before"


@dataclass(frozen=True)
class Case:
    """Everything that decides one case. The defaults are a plain model and call."""

    # The model.
    family: str = "Bert"
    head: str = "Model"
    layers: int = 1
    heads: int = 1
    head_dim: int = 4
    ffn: int = 8
    activation: str = "gelu"
    vocabulary: int = 20
    types: int = 2
    pad: int = 0
    spare_positions: int = 8
    eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    attention: str = "sdpa"
    labels: int = 3
    chunk: int = 0
    pooler: bool = True
    # The call.
    batch: int = 2
    length: int = 4
    mask: str = "none"
    mask_dtype: str = "int64"
    token_types: bool = False
    position_ids: bool = False
    embeds: bool = False
    with_labels: bool = False
    hidden_states: Any = None
    attentions: bool = False
    return_dict: bool | None = None
    rows: bool = False
    seed: int = 0
    # How it runs.
    dtype: str = "float32"
    mode: str = "eval"
    gradients: bool = False
    # What is done to it.
    changes: tuple[Change, ...] = ()
    demand: str | None = None
    keep: tuple[int, ...] | None = None
    replacement: str = "zero"
    freeze: bool = False
    copy: bool = False
    save: bool = False

    @staticmethod
    def of(text: str) -> Case:
        data = json.loads(text)
        data["changes"] = tuple(Change(**change) for change in data.get("changes", ()))
        if data.get("keep") is not None:
            data["keep"] = tuple(data["keep"])
        return Case(**data)

    def __str__(self) -> str:
        """As JSON, what differs from the defaults."""
        values = dataclasses.asdict(self)
        plain = dataclasses.asdict(Case())
        return json.dumps({k: v for k, v in values.items() if k in ("family", "head") or v != plain[k]})

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(range(self.layers)) if self.keep is None else self.keep


@st.composite
def cases(draw: Any, changed: bool) -> Case:
    """changed: with one or two changes by a user; without any, nothing but what is documented is refused."""
    family, head = draw(st.sampled_from(ALL))
    layers = draw(st.integers(1, 4))
    vocabulary = draw(st.integers(5, 60))
    length = draw(st.integers(1, 12))
    few = st.sampled_from((False, False, False, True))
    attention = draw(st.sampled_from(("sdpa", "sdpa", "eager")))
    mask = draw(st.sampled_from(MASKS))
    if attention == "eager" and mask.endswith("empty"):
        mask = "random"  # a softmax over nothing: compared with SDPA alone
    embeds = draw(few)
    mode = draw(st.sampled_from(MODES))
    dtype = "float32" if mode == "autocast" else draw(st.sampled_from((*DTYPES, "float32", "float32")))
    keep = draw(st.none() | st.sets(st.integers(0, layers - 1)).map(lambda s: tuple(sorted(s))))
    freeze = mode in ("eval", "inference") and dtype != "float64" and draw(st.booleans())
    drawn = draw(st.lists(_change(freeze), min_size=1, max_size=2).map(tuple)) if changed else ()
    # What drops at random cannot be compared.
    rates = (0.0,) if any(change.kind == "inner_train" for change in drawn) else (0.0, 0.1)
    return Case(
        family=family,
        head=head,
        layers=layers,
        heads=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from((2, 3, 4, 5, 7, 8, 16, 32))),
        ffn=draw(st.integers(1, 48)),
        activation=draw(st.sampled_from(("gelu",) * 4 + ACTIVATIONS)),
        vocabulary=vocabulary,
        types=draw(st.integers(1, 3)),
        pad=draw(st.integers(0, min(vocabulary - 1, 4))),
        spare_positions=draw(st.integers(0, 9)),
        eps=draw(st.sampled_from((1e-12, 1e-5, 1e-2))),
        hidden_dropout=draw(st.sampled_from(rates)),
        attention_dropout=draw(st.sampled_from(rates)),
        attention=attention,
        labels=2
        if head in ("ForQuestionAnswering", "ForNextSentencePrediction")
        else draw(st.integers(1, 4)),
        chunk=draw(st.sampled_from((0, 0, 0, 0, 0, 1))),
        pooler=head != "Model" or draw(st.booleans()),
        batch=draw(st.integers(1, 4)),
        length=length,
        mask=mask,
        mask_dtype=draw(st.sampled_from(("int64", *MASK_DTYPES))),
        token_types=draw(st.booleans()),
        position_ids=draw(few),
        embeds=embeds,
        with_labels=draw(st.booleans()),
        hidden_states=draw(st.sampled_from((None,) * 6 + (True, True, 0, layers, (0, -1)))),
        attentions=attention == "eager" and draw(few),
        return_dict=draw(st.sampled_from((None, None, False))),
        rows=(head in TOKEN_HEADS or head == "Model") and draw(few),
        seed=draw(st.integers(0, 2**16)),
        dtype=dtype,
        mode=mode,
        gradients=mode in ("eval", "train", "autocast") and not freeze and draw(st.booleans()),
        changes=drawn,
        demand=draw(st.sampled_from((None,) * 4 + ("all", "first"))),
        keep=keep,
        replacement=draw(st.sampled_from(tuple(VECTORS))),
        freeze=freeze,
        copy=not any(change.kind in changes.NOT_COPIED for change in drawn) and draw(few),
        save=draw(few),
    )


def _change(freeze: bool) -> st.SearchStrategy[Change]:
    def possible(change: Change) -> bool:
        if change.kind in changes.AT_FIRST and change.when != "before":
            return False
        return not (change.when == "frozen" and change.kind in changes.NEED_WEIGHTS)

    when = ("before", "after", "frozen") if freeze else ("before", "after")
    strategy = st.builds(
        Change, st.sampled_from(tuple(changes.CHANGES)), st.integers(0, 99), st.sampled_from(when)
    )
    return strategy.filter(possible)
