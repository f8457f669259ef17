"""How a run of a sweep prunes: the target its method makes, and the PruningConfig of its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from fastgate.data.catalog import CATALOG
from fastgate.models.patching import patch
from fastgate.pruning import Distill, Fixed, PruningConfig, baselines
from fastgate.pruning.objective import Target
from fastgate.training.max_drop import MaxDrop
from fastgate.training.sweep_config import Settings


def target_of(
    settings: Settings, layers: int, model: nn.Module, batches: Callable[[], list[Any]]
) -> Target | MaxDrop:
    """What a run removes, for every method but `dense`.

    layers: of `model`, the dense one, which the choice by loss patches. batches: makes labelled ones for it.
    """
    kept = layers - int((settings.sparsity or 0.0) * layers + 0.5)
    match settings.method:
        case "learned":
            return settings.target
        case "random":
            return Fixed(tuple(baselines.random_choice(layers, kept, settings.seed)))
        case "top_drop":
            return Fixed(tuple(baselines.top_drop(layers, kept)))
        case "every_other":
            return Fixed(tuple(baselines.every_other(layers, kept)))
        case "greedy":
            return Fixed(tuple(baselines.greedy_by_loss(patch(model).eval(), batches(), kept)))
        case "fixed":
            return Fixed(tuple(settings.keep or ()))
    return Fixed(tuple(range(layers)))  # dense_longer


def config_of(settings: Settings, target: Target) -> PruningConfig:
    """How a run prunes."""
    names = ("replacement", "warm", "ramp", "harden", "gate_lr", "gates", "replacement_lr")
    given = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    terms = {
        n: getattr(settings, n)
        for n in ("logits", "hidden", "temperature", "labels", "dropout", "swap")
        if getattr(settings, n) is not None
    }
    distill = replace(usual_distill(CATALOG[settings.task].kind), **terms)
    return PruningConfig(
        target=target, seed=settings.seed, distill=distill if distill.teaches else None, **given
    )


def usual_distill(kind: str) -> Distill:
    """How a teacher is listened to on a task of that kind, if nothing else is said."""
    return Distill.for_tokens() if kind == "tokens" else Distill()
