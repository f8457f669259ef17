"""The state dict of a Pruner, as Trainer checkpoints have it: written, checked and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastgate.errors import CheckpointError, format_error
from fastgate.pruning.finite import Finite
from fastgate.pruning.replacement_training import MovementCheck

if TYPE_CHECKING:
    from fastgate.pruning.config import PruningConfig
    from fastgate.pruning.pruner import Pruner

WHERE = "Pruner.load_state_dict"
# In every state dict; those of earlier versions lack the others.
STATE_KEYS = ("steps", "total", "kept", "learner", "measured", "history", "teacher_seconds")


def state_of(pruner: Pruner) -> dict[str, Any]:
    """Everything that resuming needs beside the model's weights; plain containers and CPU tensors."""
    return {
        "steps": pruner.steps,
        "total": pruner.schedule.total,
        "kept": pruner.kept,
        "learner": pruner.learner.state_dict(),
        "measured": pruner.calibration.state_dict(),
        "history": [dict(entry) for entry in pruner.history],
        "teacher_seconds": pruner.teacher_seconds,
        "margin": pruner.margin,
        "settings": _settings(pruner.config),
    }


def load_state(pruner: Pruner, state: Mapping[str, Any]) -> None:
    """Give an attached Pruner what `state_of` wrote. Raises CheckpointError, before anything has changed, for
    a state of another model, of another run or of a run of another length."""
    _check_keys(state, pruner.handle.num_layers)
    pruner.plan_steps(state["total"])
    _check_settings(pruner, state)
    pruner.reopen()
    pruner.finite, pruner.movement = Finite(), MovementCheck()
    pruner.steps = state["steps"]
    pruner.history = [dict(entry) for entry in state["history"]]
    pruner.distiller.seconds = state["teacher_seconds"]
    search = pruner.search
    search.kept, search.margin = state["kept"], state.get("margin")
    pruner.calibration.load_state_dict(state["measured"])
    search.learner.costs = pruner.calibration.costs
    search.learner.load_state_dict(state["learner"], pruner.device)
    pruner.handle.set_gates(pruner.gates_now)


def _check_keys(state: Any, layers: int) -> None:
    known = state if isinstance(state, Mapping) else {}
    missing = [name for name in STATE_KEYS if known.get(name) is None and name != "kept"]
    gates = None if missing else state["learner"]["z"].numel()
    if gates != layers:
        got = f"no {missing}" if missing else f"{gates} gates"
        remedy = "resume the run that wrote it"
        raise CheckpointError(format_error(WHERE, "state", got, f"the state of {layers} gates", remedy))


def _settings(config: PruningConfig) -> dict[str, str]:
    """What a resumed run must have in common with the one that it resumes."""
    return {"replacement": config.replacement, "target": repr(config.target), "gates": config.gates}


def _check_settings(pruner: Pruner, state: Mapping[str, Any]) -> None:
    settings = _settings(pruner.config)
    for name, saved in state.get("settings", settings).items():
        # In the warm phase nothing is learned of the gates yet.
        learned = name == "replacement" or state["steps"] >= pruner.schedule.begin
        if saved != settings[name] and learned:
            remedy = "resume with the settings that the run began with, or start anew"
            raise CheckpointError(format_error(WHERE, f"PruningConfig.{name}", settings[name], saved, remedy))
