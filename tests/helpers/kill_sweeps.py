"""A sweep ended by SIGKILL and called again by another process, and the lines of its runs compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from helpers.killed_processes import Child, Lost, Point, cost, counting, done, kill_at


def do_sweep(world: Path, folder: Path) -> None:
    from fastgate.training.sweep import sweep

    torch.set_num_threads(1)
    with counting():
        sweep(
            sweep_runs(world), world / "data", folder / "lines.jsonl", folder / "work", tell=lambda text: None
        )


RUNS: list[dict[str, Any]] = [{"method": "dense"}, {"method": ["learned", "random"], "sparsity": 0.67}]


def write_world(folder: Path) -> None:
    from helpers import tiny_models

    tiny_models.model_folder(folder / "model", layers=3)
    tiny_models.sentiment_folder(folder / "data", train=16, validation=16, test=16)


def sweep_runs(world: Path) -> list[Any]:
    from fastgate.training.sweep_config import expand

    quick = {"dense_epochs": 1, "dense_lr": 1e-3, "epochs": 1, "lr": 1e-3, "max_length": 16, "batch_size": 4}
    return expand({"model": str(world / "model"), "tasks": ["sst2"], "seeds": [0, 1], **quick, "runs": RUNS})


class Sweeps:
    """Sweeps ended at points, and called again."""

    def __init__(self, folder: Path) -> None:
        # Imported here, so that children begin with their work.
        import datasets  # noqa: F401
        import sklearn.metrics  # noqa: F401

        import fastgate.training.sweep  # noqa: F401
        from fastgate.pruning import SelfPruningTrainer  # noqa: F401

        self.folder, self.world = folder, folder / "world"
        write_world(self.world)
        self.seconds, self.calls = cost(do_sweep, self.world, folder / "whole")
        self.lines = self._lines(folder / "whole")

    def try_point(self, number: int, point: Point) -> str:
        """How many lines were there when the sweep was ended. Raises Lost."""
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        # Every fourth time another process works on the same sweep, and is not ended.
        other = Child(do_sweep, self.world, work) if number % 4 == 0 else None
        kill_at(point, do_sweep, self.world, work)
        if other is not None:
            status, output = other.finish()
            if status:
                raise Lost(f"the other process failed: {output}")
        before = self._lines(work, cut=True)
        done(do_sweep, self.world, work)
        after = self._lines(work)
        for key, line in before.items():
            if after.get(key) != line:
                raise Lost(f"a line of before the kill is gone or changed: {key[:200]}")
        if after.keys() != self.lines.keys():
            raise Lost(f"{len(after)} lines in the end, {len(self.lines)} without a kill")
        for key, line in after.items():
            for name in ("score", "kept", "dense_score"):
                if line[name] != self.lines[key][name]:
                    raise Lost(f"{name} {line[name]}, {self.lines[key][name]} without a kill")
        return f"{len(before)} of {len(after)} lines"

    def _lines(self, work: Path, cut: bool = False) -> dict[str, Any]:
        """Settings -> line. cut: the last one may be half a line."""
        path = work / "lines.jsonl"
        lines: dict[str, Any] = {}
        if not path.is_file():
            return lines
        texts = path.read_text().split("\n")
        for i, text in enumerate(texts):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                if text and not (cut and i == len(texts) - 1):
                    raise Lost(f"half a line is left: {text[:200]}") from None
                continue
            key = json.dumps(line["settings"], sort_keys=True)
            if key in lines:
                raise Lost(f"a line twice: {key[:200]}")
            lines[key] = line
        return lines
