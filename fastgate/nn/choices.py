"""The values that an argument may have, as types."""

from __future__ import annotations

from typing import Literal, get_args

# `patch(demand=...)`: the rows of a bare encoder that the caller reads. first: token 0 of each sequence.
# all: every attended token.
Demand = Literal["first", "all"]

# The output rows: those that what stands above an encoder reads. first: token 0 of each sequence. start: the
# first attended token of each sequence. labelled: tokens with a label in training, attended ones otherwise.
# attended: the tokens that the mask keeps. every: padding too.
OutputRows = Literal["first", "start", "labelled", "attended", "every"]

# `patch(pooling=...)`: what the encoder's pooler reads. first: token 0 of each sequence, as in transformers.
# mean: the mean over the attended tokens.
Pooling = Literal["first", "mean"]

# What takes the place of a pruned attention: see nn/replacement.py.
ReplacementKind = Literal["zero", "mean", "affine", "shift"]

DEMANDS: tuple[Demand, ...] = get_args(Demand)
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
REPLACEMENT_KINDS: tuple[ReplacementKind, ...] = get_args(ReplacementKind)
