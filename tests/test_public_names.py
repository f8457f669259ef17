"""What `import fastgate` shows: every public name, also those that are imported on first use."""

import importlib
import pickle
from pathlib import Path

import pytest
from helpers import subprocesses
from helpers.encoders import ALL, make

import fastgate
from fastgate.models.architectures import base_class

PACKAGE = Path(fastgate.__file__).parent
NAMES = {
    "ArgumentError", "CheckpointError", "DataError", "Distill", "FastgateError", "Fixed", "MissingPackage",
    "NothingPatched", "Pruner", "PruningConfig", "SelfPruningMixin", "SelfPruningTrainer", "Sparsity",
    "Speedup", "Unsupported", "explain", "freeze", "load", "patch", "prune", "save", "thaw", "unpatch",
}  # fmt: skip


def test_everything_public_is_listed_and_there():
    assert set(fastgate.__all__) == NAMES
    assert set(dir(fastgate)) >= NAMES | {"__version__", "ops"}
    for name in dir(fastgate):
        assert getattr(fastgate, name) is not None, name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fastgate.no_such_name


@pytest.mark.slow
def test_the_first_use_of_pruning_in_a_new_process():
    code = "import fastgate; print(fastgate.Fixed.__module__, 'Fixed' in dir(fastgate))"
    assert subprocesses.finish(subprocesses.start(code)).split() == ["fastgate.pruning.objective", "True"]


def test_no_name_hides_a_module():
    for name in fastgate.__all__:
        assert not (PACKAGE / f"{name}.py").exists() and not (PACKAGE / name).exists(), name


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").is_file()
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"fastgate" = ["py.typed"]' in text


@pytest.mark.parametrize("family, head", ALL)
def test_pickles_name_a_class_of_fastgates(family, head):
    model = fastgate.patch(make(family, head, layers=1))
    cls = type(model)
    assert cls.__name__ == family + head and cls is not base_class(model)
    assert getattr(importlib.import_module(cls.__module__), cls.__name__) is cls
    assert cls.__module__ == "fastgate.models.swapped_classes"
    assert pickle.loads(pickle.dumps(cls)) is cls
