"""Checkpoints of the self-pruning Trainer: the Trainer's own and the Pruner's state, whole or not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fastgate.models import checkpoint
from fastgate.pruning import trainer_checkpoints
from fastgate.pruning.pruner import Pruner
from fastgate.pruning.trainer_compat import TrainerOverrides

STATE_FILE = "pruning.pt"
LEFT_OUT_KEY = "left_out"  # its entry for weights that the model's own file does not have
# What a checkpoint of a hardened model does not have of the attention that was closed.
LEFT_OUT_PARTS = (".attention.self.", ".attention.output.dense.", ".attention.replacement.")


class CheckpointingMixin(TrainerOverrides):
    """Saves and loads the Pruner with the Trainer's checkpoints; only hardened models can be the best."""

    pruner: Pruner
    _writes_aside = False

    def output_dir_for(self, run_dir: Path) -> Path:
        return run_dir / trainer_checkpoints.ASIDE if self._writes_aside else run_dir

    def save_whole(self, write: Callable[[], None], run_dir: Path) -> None:
        """The checkpoint is written aside, and renamed when it is whole."""
        name = f"checkpoint-{self.state.global_step}"
        aside = run_dir / trainer_checkpoints.ASIDE / name
        if self.args.should_save:
            shutil.rmtree(aside.parent, ignore_errors=True)  # what a killed run left
        self.accelerator.wait_for_everyone()
        self._writes_aside = True
        try:
            write()
        finally:
            self._writes_aside = False
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step:  # on every rank, since each of them loads it
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if best.name == name or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self._publish(aside, run_dir / name)
        self.accelerator.wait_for_everyone()

    def _publish(self, aside: Path, folder: Path) -> None:
        """Complete the checkpoint in `aside`, move it to `folder`, and delete those beyond the limit."""
        torch.save(self.pruner.state_dict() | {LEFT_OUT_KEY: self._left_out()}, aside / STATE_FILE)
        self.state.save_to_json(str(aside / "trainer_state.json"))
        trainer_checkpoints.seal(aside)
        trainer_checkpoints.publish(aside, folder)
        shutil.rmtree(aside.parent, ignore_errors=True)
        best = self.state.best_model_checkpoint
        trainer_checkpoints.rotate(folder.parent, self.args.save_total_limit, best, folder)

    def _left_out(self) -> dict[str, torch.Tensor]:
        """What the model has in training and its checkpoint leaves out; all of it where the model is no
        model of transformers, whose own loader would refuse an unfinished one."""
        model = self.pruner.model
        names: tuple[str, ...] = ("",)
        if isinstance(model, PreTrainedModel):
            names = checkpoint.unused_names(model, checkpoint.layout_of(self.pruner.handle))
        state = model.state_dict()
        return {name: tensor.cpu().clone() for name, tensor in state.items() if name.startswith(names)}

    def load_whole(self, load: Callable[[], None], folder: Path) -> None:
        """The model's weights and the Pruner's state."""
        if isinstance(self.pruner.model, PreTrainedModel):
            load()
        self.pruner.load_state_dict(self._load_left_out(folder))

    def load_best(self, load: Callable[[], None]) -> None:
        """The weights of the best model; what it leaves out is not used."""
        best = self.state.best_model_checkpoint
        if isinstance(self.pruner.model, PreTrainedModel) or best is None:
            load()
        else:
            self._load_left_out(Path(best))

    def _load_left_out(self, folder: Path) -> dict[str, Any]:
        """Give the model the weights of `_left_out`; returns the rest of the Pruner's file."""
        state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        self.pruner.model.load_state_dict(state.get(LEFT_OUT_KEY, {}), strict=False)
        return state

    def may_be_best(self) -> bool:
        """A model that is not pruned yet is not what is looked for."""
        return self.pruner.kept is not None

    def is_left_out(self, name: str) -> bool:
        return any(part in name for part in LEFT_OUT_PARTS)
