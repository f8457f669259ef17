"""The smallest random case that fails the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from helpers import random_changes as changes
from helpers.random_cases import Case
from helpers.random_check import check
from helpers.random_comparison import Difference


def fails(case: Case, kind: str) -> bool:
    """Whether `check` raises a Difference of this kind."""
    try:
        check(case)
    except Difference as error:
        return error.kind == kind
    except Exception:
        return False
    return False


def with_fewer_changes(case: Case, kind: str) -> Case:
    """Without the changes that the failure does not need."""
    for change in case.changes:
        fewer = dataclasses.replace(case, changes=tuple(c for c in case.changes if c is not change))
        case = fewer if fails(fewer, kind) else case
    return case


def minimised(case: Case, kind: str, tries: int = 150) -> Case:
    """Field by field back to the plain case as long as it fails the same way."""
    moved = True
    while moved and tries > 0:
        moved = False
        for candidate in _smaller(case, Case()):
            tries -= 1
            if tries >= 0 and fails(candidate, kind):
                case, moved = candidate, True
                break
    return case


def _smaller(case: Case, plain: Case) -> Iterator[Case]:
    for i in range(len(case.changes)):
        yield dataclasses.replace(case, changes=case.changes[:i] + case.changes[i + 1 :])
    for field in dataclasses.fields(Case):
        if field.name != "changes" and getattr(case, field.name) != getattr(plain, field.name):
            yield dataclasses.replace(case, **{field.name: getattr(plain, field.name)})
    for i, change in enumerate(case.changes):
        for other in (dataclasses.replace(change, when="before"), dataclasses.replace(change, place=0)):
            if other != change and other.kind not in changes.AT_FIRST:
                yield dataclasses.replace(case, changes=(*case.changes[:i], other, *case.changes[i + 1 :]))
