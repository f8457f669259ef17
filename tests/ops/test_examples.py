"""The public ops: what fastgate.ops exports, and the examples of its docstrings."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch

import fastgate

FUNCTIONS = [*fastgate.ops.OPS, "set_backend", "SequenceOffsets"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_run(name):
    torch.manual_seed(0)
    names = {"torch": torch, "fastgate": fastgate}
    examples = doctest.DocTestFinder(recurse=False).find(getattr(fastgate.ops, name), name, False, names)
    results = [doctest.DocTestRunner().run(test) for test in examples]
    assert sum(result.attempted for result in results) > 0 and not any(result.failed for result in results)


@pytest.mark.parametrize("name", fastgate.ops.OPS)
def test_docstrings_name_every_argument(name):
    function = getattr(fastgate.ops, name)
    assert name in fastgate.ops.__all__ and inspect.isfunction(function)
    text = inspect.getdoc(function)
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert section in text, section
    arguments = text.partition("Args:")[2].partition("Returns:")[0]
    for argument in inspect.signature(function).parameters:
        assert f"{argument}:" in arguments or f"{argument}," in arguments, argument
