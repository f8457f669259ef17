"""What users do to a model of transformers before or after fastgate: all changes by name, and when they fit.

A change is made by name at one module of a model, the same way on two models with modules of the same names.
"""

from __future__ import annotations

from helpers import layer_changes, module_changes
from torch import nn

HOOKS = ("hook", "pre_hook", "keyword_hook", "watch", "backward_hook", "backward_pre_hook", "forward")
# Name of a change -> (how it is made, the modules it can be made at).
CHANGES = module_changes.CHANGES | layer_changes.CHANGES
# Those that need the layers or weights of transformers as they were at first.
AT_FIRST = (
    "share_layer", "tie_linears", "tie_projections", "last_layer_gone", "last_layer_gone_and_said",
    "uneven_ffn", "uneven_heads", "captured", "decoder", "config_activation",
)  # fmt: skip
# Those that deepcopy shares with the model, or that torch does not copy.
NOT_COPIED = ("watch", "forward", "captured", "marked", "doubled")
# Those that a frozen model, whose weights are packed, cannot be given.
NEED_WEIGHTS = (
    "lora",
    "readable_lora",
    "parametrize",
    "marked",
    "doubled",
    "no_bias",
    "new_weight",
    "in_place",
)


def places(model: nn.Module, kind: str) -> list[str]:
    """Names of the modules that the change can be made at."""
    _, fits = CHANGES[kind]
    return [name for name, module in model.named_modules() if name and fits(module)]
