"""One check of a random case: fastgate gives what transformers gives, or refuses.

`check(case)` raises Difference where fastgate is different and says nothing, loses something, or raises
anything but a FastgateError. Otherwise it returns what happened.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from helpers import random_changes as changes
from helpers.random_cases import DTYPES, TOKEN_HEADS, Case
from helpers.random_comparison import (
    Difference,
    assert_same,
    compare,
    compare_watches,
    kept_results,
    off,
    run,
    snapshot,
)
from helpers.random_models import build, call_of, fill_replacements, make_changes, names_of, remove_attention
from torch import Tensor, nn

import fastgate
from fastgate.ops.linear import ONEDNN_DTYPES

# The rows that a demand of "first" leaves out are read by these.
READ_MORE = (*TOKEN_HEADS, "ForQuestionAnswering")


@contextmanager
def step(name: str) -> Iterator[None]:
    """Only a FastgateError may leave."""
    try:
        yield
    except (fastgate.FastgateError, Difference):
        raise
    except Exception as error:
        raise Difference(f"{name} raised {type(error).__name__}", str(error)[:300]) from error


def expected(case: Case) -> bool:
    """Whether a refusal is what is documented: of a change, of a demand that leaves out rows read, or of
    freezing what the processor cannot multiply."""
    packs = not case.freeze or DTYPES[case.dtype] in ONEDNN_DTYPES
    return bool(case.changes) or (case.demand == "first" and case.head in READ_MORE) or not packs


def check(case: Case) -> str:
    """equal, refused or both fail; raises Difference otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        return _check(case)


def _check(case: Case) -> str:
    dtype = DTYPES[case.dtype]
    theirs, truth, ours = build(case, dtype), build(case, torch.float64), build(case, dtype)
    names = names_of(case, theirs)
    mask = call_of(case, dtype).mask
    try:
        for model in (theirs, truth):
            make_changes(case, "before", model, names)
        make_changes(case, "before", ours, names)
        if case.keep is not None:
            # In place before later changes, which see the modules that are left.
            remove_attention(case, theirs, mask, dtype)
            remove_attention(case, truth, mask, torch.float64)
        for model in (theirs, truth):
            make_changes(case, "after", model, names)
            make_changes(case, "frozen", model, names)
        wanted = run(case, theirs, dtype)
    except Exception as error:
        return f"transformers fails, {type(error).__name__}"
    before = snapshot(ours)
    try:
        return _ours(case, ours, theirs, truth, wanted, names, before)
    except fastgate.FastgateError as error:
        if not expected(case):
            raise Difference(f"a plain case was refused, {type(error).__name__}", str(error)[:300]) from error
        if not hasattr(ours.base_model, "fastgate_runtime"):
            assert_same("a refused patch changed the model", before, snapshot(ours))
        return "refused"


def _ours(
    case: Case,
    ours: nn.Module,
    theirs: nn.Module,
    truth: nn.Module,
    wanted: dict[str, Tensor],
    names: list[str | None],
    before: dict[str, Any],
) -> str:
    dtype = DTYPES[case.dtype]
    with step("patch"):
        fastgate.patch(ours, demand=case.demand)
    state = {name: value for name, value in snapshot(ours).items() if name.startswith(("state", "flag"))}
    assert_same("patch changed", {n: v for n, v in before.items() if n.startswith(("state", "flag"))}, state)
    if case.keep is not None:
        with step("prune"):
            fastgate.prune(ours, case.keep, case.replacement)
        fill_replacements(case, ours, dtype)
    with step("a change after patch"):
        make_changes(case, "after", ours, names)
    unfrozen = snapshot(ours)
    if case.freeze:
        with step("freeze"):
            fastgate.freeze(ours)
        with step("state_dict of a frozen model"):
            frozen = {f"state {n}": v for n, v in ours.state_dict().items()}
        assert_same("freeze changed", {n: v for n, v in unfrozen.items() if n.startswith("state")}, frozen)
        make_changes(case, "frozen", ours, names)
    if case.copy:
        with step("deepcopy"):
            ours = copy.deepcopy(ours)
    late = any(change.when == "frozen" for change in case.changes)
    with step("forward"):
        got = run(case, ours, dtype, extra=True)
    compare(case, got, kept_results(case, wanted), truth)
    compare_watches(case, ours, theirs)
    renormed = any(change.kind == "max_norm" for change in case.changes)  # a forward writes to the table
    if not case.freeze and not renormed:
        with step("a second forward"):
            again = run(case, ours, dtype, extra=True)
        for name, value in got.items():
            if (
                not name.startswith("grad ")
                and not torch.equal(value, again[name])
                and off(value, again[name]) != 0
            ):
                raise Difference("a second forward differs", name)
    if case.save:
        _round_trip(case, ours)
    if case.freeze and not late:
        with step("thaw"):
            fastgate.thaw(ours)
        if not renormed:
            assert_same("freeze and thaw changed", unfrozen, snapshot(ours))
    if case.keep is None:
        with step("unpatch"):
            fastgate.unpatch(ours)
        if not renormed and not any(change.when != "before" for change in case.changes):
            assert_same("patch and unpatch changed", before, snapshot(ours))
        if not renormed:
            with step("forward after unpatch"):
                last = run(case, ours, dtype)
            first = run(case, theirs, dtype)
            for name, value in first.items():
                if off(last[name], value) != 0:
                    raise Difference("after unpatch the model differs", name)
    return "equal"


def _round_trip(case: Case, ours: nn.Module) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with step("save"):
            try:
                path = fastgate.save(ours, Path(folder) / "model")
            except fastgate.FastgateError:
                if not case.changes and case.pooler:  # load makes every encoder with its pooler
                    raise
                return
        with step("load of what was saved"):
            loaded = fastgate.load(path)
    saved, read = ours.state_dict(), loaded.state_dict()
    assert_same(
        "save and load changed",
        {f"state {k}": v for k, v in saved.items()},
        {f"state {k}": v for k, v in read.items()},
    )
    if case.freeze or any(c.kind in (*changes.HOOKS, "inner_train") for c in case.changes):
        return  # a frozen model rounds otherwise, and hooks are not saved
    plain = dataclasses.replace(case, mode="eval", gradients=False, with_labels=False)
    training = {module: module.training for module in ours.modules()}
    flags = [(p, p.requires_grad) for p in ours.parameters()]
    with step("forward of what was loaded"):
        first, second = (
            run(plain, ours.eval(), DTYPES[case.dtype], extra=True),
            run(plain, loaded, DTYPES[case.dtype], extra=True),
        )
    for module, was in training.items():
        module.training = was
    assert all(p.requires_grad == was for p, was in flags)
    for name, value in first.items():
        # A model that was changed may run other kernels than the plain one that is loaded.
        share = 0.1 if case.dtype == "bfloat16" else 1e-2
        allowed = share * off(value, torch.zeros_like(value)) if case.changes else 0.0
        if name not in second or off(second[name], value) > allowed:
            raise Difference("a loaded model differs", name)
