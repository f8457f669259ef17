"""Whether what is timed computes what Hugging Face computes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.benchmark.baselines import Baseline, Batch, Run
from fastgate.errors import FastgateError, format_error
from fastgate.models.handle import get_encoder
from fastgate.runtime.unpadding import left_neighbour_mask

# How far logits may lie from Hugging Face's at the same precision, as a share of the largest, or of 1 if that
# is less. In bfloat16 two ways through 24 layers that round differently end a few of its last places apart.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2**-5}


class OutputsDiffer(FastgateError):
    """A model to be timed does not compute what Hugging Face computes; nothing is timed."""


@contextmanager
def _as_pruned(reference: Any, ours: nn.Module) -> Iterator[None]:
    """While open, layers of `reference` whose attention `ours` skips put its replacement in place of it, and
    its pooler reads what that of `ours` does."""
    handle = get_encoder(ours)
    encoder = getattr(reference, reference.base_model_prefix, reference)
    has_left_neighbour: Tensor

    def note_neighbours(module: Any, args: tuple[()], batch: Batch) -> None:
        nonlocal has_left_neighbour
        has_left_neighbour = left_neighbour_mask(batch["attention_mask"].bool()).flatten()

    def replace(module: Any, args: tuple[Tensor, Tensor], output: Tensor, replacement: Any = None) -> Tensor:
        rows = args[1].flatten(0, 1)
        rows = rows if replacement is None else rows + replacement(rows, has_left_neighbour)
        normed: Tensor = module.LayerNorm(rows.view_as(output))
        return normed

    hooks = [reference.register_forward_pre_hook(note_neighbours, with_kwargs=True)]
    hooks += [
        encoder.encoder.layer[i].attention.output.register_forward_hook(
            functools.partial(replace, replacement=handle.replacement(i))
        )
        for i, gate in enumerate(handle.gates)
        if gate == 0.0
    ]
    if handle.runtime.pooling == "mean":
        hooks += _pool_the_mean(encoder)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pool_the_mean(encoder: Any) -> list[Any]:
    """Hooks by which an encoder of transformers hands its pooler the mean over the attended rows."""
    masks: list[Tensor] = []

    def note(module: Any, args: Any, given: Mapping[str, Any]) -> None:
        masks[:] = [given["attention_mask"][:, :, None].float()]

    def mean(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        total = (args[0] * masks[0]).sum(1, keepdim=True)
        return ((total / masks[0].sum(1, keepdim=True)).to(args[0].dtype),)

    noting = encoder.register_forward_pre_hook(note, with_kwargs=True)
    return [noting, encoder.pooler.register_forward_pre_hook(mean)]


def check_outputs(ours: Any, reference: Any, batches: Sequence[Batch]) -> float:
    """The largest difference between the logits of the two; raises OutputsDiffer beyond TOLERANCES."""
    with torch.inference_mode(), _as_pruned(reference, ours):
        worst, share = _difference(lambda batch: ours(**batch).logits, reference, batches)
    tolerance = TOLERANCES[reference.dtype]
    if not share <= tolerance:
        got = f"a difference of {worst:.1e}"
        remedy = "report it with the model's config; no figure is given for outputs that differ"
        raise OutputsDiffer(format_error("bench", "logits", got, f"at most {tolerance}", remedy))
    return worst


def _difference(run: Run, reference: Any, batches: Sequence[Batch]) -> tuple[float, float]:
    """Largest difference of logits on attended rows: as it is, and as a share of max(1, largest logit)."""
    worst = share = 0.0
    for batch in batches:
        attended = batch["attention_mask"].bool()
        a, b = run(batch).float(), reference(**batch).logits.float()
        if b.dim() == 3:
            a, b = a[attended], b[attended]
        difference = float((a - b).abs().max())
        worst, share = max(worst, difference), max(share, difference / max(1.0, float(b.abs().max())))
        if difference != difference:  # max() of Python drops a NaN
            return difference, difference
    return worst, share


def check_baselines(
    baselines: Mapping[str, Baseline], reference: Any, batches: Sequence[Batch]
) -> tuple[dict[str, Baseline], dict[str, str]]:
    """(the baselines whose logits are Hugging Face's within TOLERANCES, why the others are not timed)."""
    tolerance = TOLERANCES[reference.dtype]
    right: dict[str, Baseline] = {}
    wrong: dict[str, str] = {}
    with torch.inference_mode():
        for name, baseline in baselines.items():
            worst, share = _difference(baseline.run, reference, batches)
            if share <= tolerance:
                right[name] = baseline
            else:
                wrong[name] = (
                    f"a logit differs by {worst:.1e} from Hugging Face's, at most {tolerance} is allowed"
                )
    return right, wrong
