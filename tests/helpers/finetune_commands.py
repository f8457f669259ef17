"""A short finetune command, and a folder with what it needs and one finished run of it."""

from __future__ import annotations

from helpers import tiny_models
from helpers.commands import call


def make_world(folder):
    """A model, the task sst2 in files, and one finished run on it."""
    tiny_models.model_folder(folder / "model")
    tiny_models.sentiment_folder(folder / "data", train=64, validation=32)
    (folder / "file").write_text("no folder")
    (folder / "empty").mkdir()
    call(*options(folder), "--out", folder / "out")
    return folder


def options(world, *more):
    return [
        "finetune", "--model", world / "model", "--task", "sst2", "--data-dir", world / "data", "--lr", 1e-3,
        "--epochs", 1, "--prune-epochs", 2, "--max-length", 24, "--batch-size", 8, *more,
    ]  # fmt: skip
