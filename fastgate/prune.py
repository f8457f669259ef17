"""`prune`: remove the attention of every layer but those to keep, weights and all."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .errors import ArgumentError, say
from .patch import patch
from .replacement import KINDS, Removed
from .state import encoder_state


def prune(model: nn.Module, keep: Iterable[int], replacement: str = "zero") -> nn.Module:
    """Keep self-attention in the layers `keep` (indices from 0) and drop it everywhere else, in place.

    Patches the model if it is not patched, drops the query, key, value and output weights of the other
    layers, and leaves their LayerNorm. `replacement` stands in for what is dropped: `zero` nothing, `mean` a
    vector, `affine` a vector and a scale a channel, `shift` these and weights a channel on the two tokens
    beside; values already learned are kept, others start at zero. A `shift` is the one that costs a step of
    its own, and the rows it looks at are computed with those it is computed for. Returns the model.

    Raises ArgumentError for indices outside the encoder, an unknown replacement, or a layer pruned before.
    """
    patch(model)
    state = encoder_state(model)
    kept = sorted(set(keep))
    wrong = [
        i for i in kept if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < state.num_layers
    ]
    if wrong:
        raise ArgumentError(
            say(
                "prune",
                "keep",
                wrong,
                f"layer indices from 0 to {state.num_layers - 1}",
                "drop or correct them",
            )
        )
    if replacement not in KINDS:
        raise ArgumentError(
            say("prune", "replacement", repr(replacement), " | ".join(KINDS), "pass one of these")
        )
    gone = [i for i in kept if state.is_removed(i)]
    if gone:
        raise ArgumentError(
            say("prune", "keep", gone, "layers whose attention is still there", "load the unpruned model")
        )

    dropped = [i for i in range(state.num_layers) if i not in kept]
    state.add_replacements(replacement, layers=dropped)
    for view in state.layers:
        if view.index in kept:
            view.attention._modules.pop("replacement", None)
        else:
            view.attention.self = Removed()
            view.attention.output.dense = Removed()
    state.set_gates([1.0 if i in kept else 0.0 for i in range(state.num_layers)])
    return model
