"""What fastgate reads of a BERT-like encoder, as types: modules of transformers have these attributes.

models/compat.py checks that the classes of the installed transformers have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn


class BertLikeSelfAttention(Protocol):
    """Query, key and value of one layer, and the numbers of its heads.

    Weights of query, key and value: (heads * attention_head_size, hidden). scaling: what scores are
    multiplied by. dropout: its rate is read, it is not called.
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module
    dropout: nn.Dropout
    num_attention_heads: int
    attention_head_size: int
    scaling: float
    training: bool


class BertLikeBlockOutput(Protocol):
    """What ends a block: LayerNorm(dropout(dense(x)) + residual)."""

    dense: nn.Module
    dropout: nn.Module
    LayerNorm: nn.LayerNorm


class BertLikeAttention(Protocol):
    """One attention sublayer. `replacement` is there once fastgate has added one."""

    self: BertLikeSelfAttention
    output: BertLikeBlockOutput


class BertLikeIntermediate(Protocol):
    """The first half of a feed-forward sublayer."""

    dense: nn.Module
    intermediate_act_fn: Any  # a module or a function


class BertLikeLayer(Protocol):
    """One encoder layer."""

    attention: BertLikeAttention
    intermediate: BertLikeIntermediate
    output: BertLikeBlockOutput
    training: bool


class BertLikeLayers(Protocol):
    """The layers of an encoder, from below."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> BertLikeLayer: ...
    def __iter__(self) -> Iterator[BertLikeLayer]: ...


class BertLikeStack(Protocol):
    """What holds the layers."""

    layer: BertLikeLayers


class BertLikeEmbeddings(Protocol):
    """The tables of words, positions and token types, and the LayerNorm and dropout over their sum.

    position_ids: (1, max_position_embeddings) int64.
    """

    word_embeddings: nn.Embedding
    position_embeddings: nn.Embedding
    token_type_embeddings: nn.Embedding
    LayerNorm: nn.LayerNorm
    dropout: nn.Module
    position_ids: Tensor


class BertLikeConfig(Protocol):
    """The numbers of an encoder that fastgate reads."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int


class BertLikeEncoder(Protocol):
    """A `BertModel`, `RobertaModel` or one of their kin. `pooler` may be missing or None."""

    config: BertLikeConfig
    embeddings: BertLikeEmbeddings
    encoder: BertLikeStack
    training: bool
