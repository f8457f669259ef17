"""`save` ended by SIGKILL, and what is left of the old checkpoint and the new one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from helpers.killed_processes import Lost, Point, cost, counting, kill_at


def do_save(path: Path, model: Any) -> None:
    import fastgate

    with counting():
        fastgate.save(model, path)


def model_to_save(which: int) -> Any:
    """Two models that differ in weights, in what is kept and in their heads."""
    from helpers.encoders import draw_replacements, make

    import fastgate

    torch.set_num_threads(1)
    head = ("ForSequenceClassification", "ForTokenClassification")[which]
    model = fastgate.patch(make("Bert", head, layers=3, hidden_size=64, intermediate_size=128))
    fastgate.prune(model, [which], ("affine", "shift")[which])
    if which:
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight.add_(1.0)  # type: ignore[union-attr, operator]
    return draw_replacements(model)


FOREIGN = {
    "README.md": b"mine",
    "tokenizer.json": b"{}",
    ".git/HEAD": b"ref: main",
    "onnx/model.onnx": b"\x00\x01",
}


class Saves:
    """save of one checkpoint over another, or into a new folder, ended at points."""

    def __init__(self, folder: Path) -> None:
        import fastgate

        self.folder, self.old = folder, folder / "old"
        self.models = [model_to_save(which) for which in (0, 1)]
        self.states = [dict(model.state_dict()) for model in self.models]
        fastgate.save(self.models[0], self.old)
        for name, data in FOREIGN.items():
            (self.old / name).parent.mkdir(exist_ok=True)
            (self.old / name).write_bytes(data)
        self.seconds, self.calls = cost(do_save, self._fresh("calibration", True), self.models[1])

    def _fresh(self, name: str, over: bool) -> Path:
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if over:
            shutil.copytree(self.old, place / "model")
        return place / "model"

    def try_point(self, number: int, point: Point) -> str:
        """Which model was left: old, new or nothing. Raises Lost."""
        import fastgate

        over = number % 4 != 0
        target = self._fresh("work", over)
        ended = kill_at(point, do_save, target, self.models[1])
        try:
            loaded = fastgate.load(target)
        except fastgate.CheckpointError as error:
            if over or not ended:
                raise Lost(f"nothing can be loaded: {error}") from error
            left = "nothing"
        else:
            left = self._which(loaded)
        if not ended and left != "new":
            raise Lost(f"save came to its end, and left the {left} model")
        if left == "old" and not over:
            raise Lost("the old model in a new folder")
        for name, data in FOREIGN.items() if over else ():
            if not (target / name).is_file() or (target / name).read_bytes() != data:
                raise Lost(f"{name} is gone or changed")
        # The next save mends whatever was left, and leaves nothing beside the folder.
        fastgate.save(self.models[1], target)
        if self._which(fastgate.load(target)) != "new":
            raise Lost("the next save left another model")
        beside = sorted(p.name for p in target.parent.iterdir() if p != target)
        if beside:
            raise Lost(f"left beside the folder after the next save: {', '.join(beside)}")
        return left

    def _which(self, loaded: Any) -> str:
        weights = loaded.state_dict()
        for name, state in zip(("old", "new"), self.states, strict=True):
            if weights.keys() == state.keys() and all(torch.equal(weights[key], state[key]) for key in state):
                return name
        raise Lost("a model that is neither the old one nor the new one")
