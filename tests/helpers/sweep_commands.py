"""A short sweep command, and a folder with what it needs."""

from __future__ import annotations

from helpers import tiny_models

QUICK = {"dense_epochs": 1, "dense_lr": 1e-3, "epochs": 1, "lr": 1e-3, "max_length": 24, "batch_size": 16}


def make_world(folder):
    """A model, and the task sst2 in files."""
    tiny_models.model_folder(folder / "model")
    tiny_models.sentiment_folder(folder / "data")
    return folder


def sweep_file(world, path, **changes):
    import yaml

    runs = [{"method": "dense"}, {"method": "fixed", "keep": [0]}]
    config = {"model": str(world / "model"), "tasks": ["sst2"], "seeds": [0], **QUICK, "runs": runs} | changes
    path.write_text(yaml.safe_dump(config))
    return path


def command_of(world, folder, *more, **changes):
    recipe = sweep_file(world, folder / "recipe.yaml", **changes)
    return [
        "sweep",
        recipe,
        "--data-dir",
        world / "data",
        "--out",
        folder / "tasks.jsonl",
        "--work",
        folder / "work",
        *more,
    ]
