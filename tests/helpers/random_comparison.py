"""What comes out of a random case, and what may differ between fastgate and transformers: `compare`.

The tolerance comes from transformers itself. With `truth` the outputs in float64, an output may be off by
twice what transformers is off by in the same dtype. Where that does not suffice, it may be off by eight times
what rounding every weight once more changes in float64, which is what a backward stable computation may do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from helpers.module_changes import Watch
from helpers.random_cases import Case
from helpers.random_models import Call, call_of, read_rows
from torch import Tensor, nn

ROUNDING = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float64": 2.0**-50}


class Difference(AssertionError):
    """fastgate and transformers differ, and nothing was said. kind: which property does not hold."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@contextmanager
def running(case: Case, cast: bool) -> Iterator[None]:
    with torch.inference_mode(case.mode == "inference"), torch.set_grad_enabled(case.gradients):
        if case.mode == "autocast" and cast:
            with torch.autocast("cpu", torch.bfloat16):
                yield
        else:
            yield


def run(
    case: Case, model: nn.Module, dtype: torch.dtype, cast: bool = True, extra: bool = False
) -> dict[str, Tensor]:
    """Name -> the rows that are read of each output, and gradients. extra: pass the rows asked for."""
    call = call_of(case, dtype)
    inputs: dict[str, Any] = dict(call.inputs)
    if extra and call.requested is not None:
        inputs["rows"] = call.requested
    if case.hidden_states is not None:
        inputs["output_hidden_states"] = case.hidden_states
    if case.attentions:
        inputs["output_attentions"] = True
    if case.return_dict is not None:
        inputs["return_dict"] = case.return_dict
    if case.embeds and case.gradients:
        inputs["inputs_embeds"] = inputs["inputs_embeds"].clone().requires_grad_(True)
    model.zero_grad(set_to_none=True)
    with running(case, cast):
        outputs = model(**inputs)
        results = dict(_flat(case, call, outputs))
        if case.gradients:
            g = torch.Generator().manual_seed(case.seed + 3)
            weights = {name: torch.randn(value.shape, generator=g) for name, value in results.items()}
            total: Any = sum((value * weights[name].to(value)).sum() for name, value in results.items())
            if isinstance(total, Tensor) and total.requires_grad:
                total.backward()
    if case.gradients:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                results["grad " + name] = parameter.grad.detach()
        if case.embeds and inputs["inputs_embeds"].grad is not None:
            results["grad inputs_embeds"] = inputs["inputs_embeds"].grad
    return {name: value.detach().clone() for name, value in results.items()}


def _flat(case: Case, call: Call, outputs: Any) -> Iterator[tuple[str, Tensor]]:
    """return_dict=False is flattened by place; the names are the same on both sides."""
    rows = read_rows(case, call)
    values = outputs.items() if hasattr(outputs, "items") else enumerate(outputs)
    for name, value in values:
        several = value if isinstance(value, tuple | list) else (value,)
        for i, one in enumerate(v for v in several if v is not None):
            # A row that is read or not: the first two dimensions are those of the input, a vector follows.
            of_rows = one.dim() == 3 and one.shape[:2] == call.mask.shape
            yield f"{name}.{i}", one[rows] if of_rows and rows is not None else one


@contextmanager
def rounded(case: Case, model: nn.Module, seed: int) -> Iterator[None]:
    """Every weight off by at most one rounding of the case's dtype."""
    size = ROUNDING["bfloat16" if case.mode == "autocast" else case.dtype]
    g = torch.Generator().manual_seed(seed)
    kept = [(p, p.detach().clone()) for p in model.parameters()]
    with torch.no_grad():
        for p, value in kept:
            p.copy_(value * (1 + size * (2 * torch.rand(p.shape, generator=g, dtype=p.dtype) - 1)))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


def off(value: Tensor, truth: Tensor) -> float:
    """The largest difference; where the truth is not finite, the value shall be the same."""
    if not truth.numel():
        return 0.0
    value, truth = value.double(), truth.double()
    same = (value == truth) | (value.isnan() & truth.isnan())
    worst = float(torch.where(same, torch.zeros_like(truth), (value - truth).abs()).max())
    return worst if worst == worst else float("inf")


def compare(case: Case, ours: dict[str, Tensor], theirs: dict[str, Tensor], truth_model: nn.Module) -> None:
    truth = kept_results(case, run(case, truth_model, torch.float64, cast=False))
    size = ROUNDING["bfloat16" if case.mode == "autocast" else case.dtype]
    scale = max(
        (float(t.abs().max()) for n, t in truth.items() if n.startswith("grad ") and t.numel()), default=0.0
    )
    suspects: dict[str, float] = {}
    for name, wanted in theirs.items():
        gradient = name.startswith("grad ")
        if name not in ours:
            if (
                gradient
                and float(truth.get(name, wanted).abs().max() if wanted.numel() else 0.0) <= 64 * size * scale
            ):
                continue  # None in place of zeros
            raise Difference("no gradient" if gradient else "an output is missing", name)
        got = ours[name]
        if got.shape != wanted.shape:
            raise Difference("shape", f"{name}: {tuple(got.shape)}, transformers {tuple(wanted.shape)}")
        if got.dtype != wanted.dtype and not (case.mode == "autocast" and not gradient):
            raise Difference("dtype", f"{name}: {got.dtype}, transformers {wanted.dtype}")
        largest = float(truth[name].abs().max()) if wanted.numel() else 0.0
        tolerance = 2 * size * (max(largest, 0.1 * scale) if gradient else largest)
        if off(got, truth[name]) > 2 * off(wanted, truth[name]) + tolerance:
            suspects[name] = max(off(wanted, truth[name]), tolerance)
    more = [name for name in ours if name not in theirs and not name.startswith("grad ")]
    if more:
        raise Difference("an output more", ", ".join(more))
    for name in ours.keys() - theirs.keys():
        if float(ours[name].abs().max() if ours[name].numel() else 0.0) > 64 * size * scale:
            raise Difference("a gradient more", name)
    if not suspects:
        return
    for seed in range(6):
        with rounded(case, truth_model, seed):
            moved = kept_results(case, run(case, truth_model, torch.float64, cast=False))
        for name in suspects:
            suspects[name] = max(suspects[name], off(moved[name], truth[name]))
    for name, allowed in suspects.items():
        worst = off(ours[name], truth[name])
        if worst > 8 * allowed:
            kind = "a gradient differs" if name.startswith("grad ") else "an output differs"
            raise Difference(kind, f"{name} by {worst:.3g}, allowed {8 * allowed:.3g}")


def snapshot(model: nn.Module, values: bool = True) -> dict[str, Any]:
    """Classes, flags, hooks, what stands in the instances, parameters and buffers, the configuration."""
    facts: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = tuple(
            (kind, tuple(map(id, getattr(module, kind).values())))
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        )
        own = sorted(k for k in module.__dict__ if not k.startswith("_"))
        facts[f"module {name}"] = (type(module), module.training, hooks, own)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        facts[f"flag {name}"] = parameter.requires_grad
        facts[f"class {name}"] = type(parameter)
    for name, tensor in model.state_dict().items():
        facts[f"state {name}"] = tensor.detach().clone()
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    # transformers' heads note the problem_type, and its save_pretrained the others.
    noted = ("problem_type", "architectures", "dtype")
    facts["config"] = {k: v for k, v in config.items() if k not in noted}
    return facts


def assert_same(kind: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    for name in before.keys() | after.keys():
        a, b = before.get(name), after.get(name)
        same = (
            torch.equal(a, b) and a.dtype == b.dtype
            if isinstance(a, Tensor) and isinstance(b, Tensor)
            else a == b
        )
        if not same:
            what = "" if isinstance(a, Tensor) else f": {str(a)[:200]} became {str(b)[:200]}"
            raise Difference(kind, name + what)


def watched(model: nn.Module) -> dict[str, int]:
    return {
        name: hook.calls
        for name, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, Watch)
    }


def kept_results(case: Case, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the gradients of what `prune` removes, and those of replacements by fastgate's names."""
    removed = tuple(
        f"encoder.layer.{i}.attention.{part}."
        for i in range(case.layers)
        if i not in case.kept
        for part in ("self", "output.dense")
    )
    return {
        name.replace(".attention.vectors.", ".attention.replacement."): value
        for name, value in results.items()
        if not (name.startswith("grad ") and any(part in name for part in removed))
    }


def compare_watches(case: Case, ours: nn.Module, theirs: nn.Module) -> None:
    """A hook that only looks has run wherever transformers runs it."""
    ours_called = watched(ours)
    for name, calls in watched(theirs).items():
        if calls and name in ours_called and not ours_called[name]:
            raise Difference("a hook did not run", name)
