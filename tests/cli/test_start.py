"""How the command starts: help, versions and wrong arguments come at once, without torch and transformers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers import subprocesses
from helpers.commands import refused, run

import fastgate
from fastgate.cli.main import app
from fastgate.data.catalog import CATALOG, KINDS

COMMANDS = ("demo", "finetune", "evaluate", "sweep", "report", "explain", "info", "bench")
FINETUNE = ("finetune", "--model", "m", "--out", "o", "--task", "sst2")
LIGHT = """
import sys
from fastgate.cli.entry import main
try:
    main()
finally:
    for name in ("torch", "transformers", "datasets", "scipy", "matplotlib"):
        if name in sys.modules:
            print("imported:", name)
"""


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["--help"], 0),
        (["--version"], 0),
        *[([command, "--help"], 0) for command in COMMANDS],
        (["nothing"], 2),
        (["finetune", "--modle", "m"], 2),
        (["finetune", "--task", "sst2"], 2),
        ([*FINETUNE, "--lr", "3"], 2),
        ([*FINETUNE, "--pooling", "max"], 1),
        (["finetune", "--model", "m", "--out", "o", "--task", "sst3"], 1),
        (["finetune", "--model", "m", "--out", "o", "--task-type", "words"], 1),
        ([*FINETUNE, "--max-drop", "0.1", "--target-speedup", "2"], 1),
        (["bench", "--model", "m", "--task", "sst2", "--dtype", "half"], 1),
        (["bench", "--model", "m", "--task", "sst2", "--order", "up"], 1),
        (["bench", "--model", "m", "--task", "sst2", "--keep", "a"], 1),
        (["demo", "--data-dir", "d"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_help_and_wrong_arguments_import_nothing_heavy(arguments, code):
    output = subprocesses.finish(subprocesses.start(LIGHT, *arguments), code)
    assert "imported:" not in output


def test_the_import_of_fastgate_is_light():
    code = "import sys, fastgate; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    assert subprocesses.finish(subprocesses.start(code)) == "set()\n"


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [("fastgate", "transformers"), ("transformers", "fastgate")])
def test_pruned_models_are_registered_in_any_order_of_imports(first, second):
    code = (
        f"import {first}, {second}; from transformers import AutoConfig; "
        "print(type(AutoConfig.for_model('fastgate_bert')).__module__)"
    )
    assert subprocesses.finish(subprocesses.start(code)) == "fastgate.models.checkpoint_config\n"


@pytest.mark.parametrize("module", ["fastgate", "fastgate.cli"])
def test_the_version_by_each_way_to_start(module):
    environment = {**os.environ, "PYTHONPATH": subprocesses.PACKAGE_PARENT}
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fastgate {fastgate.__version__}\n", "")


def test_the_help_names_every_task_type_and_choice():
    shown = " ".join(run("finetune", "--help").stdout.replace("│", " ").split())
    for name in (*CATALOG, *KINDS, "Default: 0.67"):
        assert name in shown, name


def test_the_choices_of_options_are_those_of_the_packages_that_use_them():
    from fastgate.benchmark.batches import ORDERS
    from fastgate.benchmark.model_variants import DTYPES

    bench = ("bench", "--model", "m", "--task", "sst2")
    assert f"wanted {' or '.join(DTYPES)};" in refused(*bench, "--dtype", "half")
    assert f"wanted {' or '.join(ORDERS)};" in refused(*bench, "--order", "up")


def test_every_option_says_what_it_does():
    import typer

    for name, command in typer.main.get_command(app).commands.items():
        assert command.help and command.help.endswith("."), name
        for param in command.params:
            if not getattr(param, "hidden", False):
                assert param.help and param.help.endswith("."), (name, param.name)
