"""The Pruner: learns a gate for each attention in any training loop, hardens them, drops what is closed."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.errors import ArgumentError, CheckpointError, Unsupported, format_error
from fastgate.models.handle import check_module, get_encoder
from fastgate.models.patching import patch
from fastgate.models.pruning import prune
from fastgate.nn import hard_concrete
from fastgate.pruning.calibration import Calibration
from fastgate.pruning.checks import check_batch, check_student, check_trainable, check_whole
from fastgate.pruning.config import PruningConfig
from fastgate.pruning.distillation import SelfTeacher, Teacher, hidden_loss, outputs_loss, scores_of
from fastgate.pruning.finite import HIDDEN, LAGRANGIAN, LOGITS, Finite
from fastgate.pruning.learner import GateLearner
from fastgate.pruning.numbers import number
from fastgate.pruning.objective import Fixed, Objective
from fastgate.pruning.schedule import RECOVER, SEARCH, WARM, Schedule, make_schedule
from fastgate.pruning.token_swap import swap_tokens
from fastgate.runtime.context import ActivationTrace

HISTORY = 400  # entries a run, about
STATE = ("steps", "total", "kept", "learner", "measured", "history", "teacher_seconds")
# Of P(open) of the last layer kept and the first dropped: the least difference that is called a choice. A
# share that is estimated from 100 draws, as many as a short search has, is off by 0.05 (one standard error).
SEPARATED = 0.05
RATED = "fastgate_replacements"  # marks the groups that set_rates has made
SETTLED = 10  # steps after hardening by which the replacements in use must have moved
_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Pruner]] = weakref.WeakKeyDictionary()


def _set_dropouts(dropouts: Mapping[nn.Dropout, float]) -> None:
    for module, p in dropouts.items():
        module.p = p


@dataclass
class Forward:
    """A forward of the student: its batch, its outputs and its hidden states. has_gradient: it was recorded
    for backward."""

    inputs: Mapping[str, Any]
    outputs: Any
    hidden: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    has_gradient: bool = True


class Pruner:
    """Learns which attention sublayers `model` can do without, in any training loop.

        pruner = Pruner(model, config, total_steps, teacher).attach()  # before the optimizer is made
        pruner.set_rates(optimizer)  # once it is made: replacements learn faster than weights
        for batch in batches:
            batch = pruner.prepare(batch)
            outputs = model(**batch)
            (pruner.task_weight * outputs.loss + pruner.loss(outputs, batch)).backward()
            optimizer.step()
            pruner.step()  # once an optimizer step
            optimizer.zero_grad()
        pruner.finalize()

    Gates are drawn on the host once an optimizer step, outside forward, so micro-batches and recomputed
    activations see one draw. An attention whose gate was drawn 0 does not run and has no gradient in that
    step: None, so Adam leaves it alone, where zeros would move it by its momentum. `history`: what the gates
    did, a list of dicts. `kept`: the layers whose attention stays, None until hardened. `margin`: how far the
    search has told the choice from the next best, `separated` whether far enough. `teacher_seconds`: of the
    teacher's forwards so far, by the host's clock, those before a resumption too.

    A loop that stops before `finalize` calls `detach()`: it undoes what `attach` did to model and teacher.
    Losses, gates and scores that are not finite raise ArgumentError in `step`, at the latest after 25 steps.
    DistributedDataParallel around the model needs `find_unused_parameters=True`: a gate may be 0.

    teacher: a dense model fine-tuned on the task; None: the model itself with every gate open, until
    hardening. total_steps: optimizer steps of the run; None if `plan_steps` will be called before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig,
        total_steps: int | None,
        teacher: nn.Module | None = None,
    ):
        if not isinstance(config, PruningConfig):
            remedy = "pass fastgate.PruningConfig(target=...)"
            raise ArgumentError(format_error("Pruner", "config", repr(config), "a PruningConfig", remedy))
        check_module("Pruner", model)
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise ArgumentError(
                format_error("Pruner", "teacher", repr(teacher), "a model or None", "load the model")
            )
        if teacher is model:
            remedy = "pass copy.deepcopy(model), or None to distil from the model with its gates open"
            raise ArgumentError(
                format_error("Pruner", "teacher", "the model itself", "another model or None", remedy)
            )
        self.model, self.config = model, config
        self.steps = 0
        self.kept: list[int] | None = None
        self.history: list[dict[str, Any]] = []
        self.teacher_seconds = 0.0
        self.margin: float | None = None
        self._teacher_model = teacher
        self._schedule: Schedule | None = None
        self._attached = self._engaged = self._prepared = False
        self.finalized = False
        self._dropouts: dict[nn.Dropout, float] = {}
        self._when_lost: weakref.finalize[Any, Pruner] | None = None
        self._starts: dict[int, list[Tensor]] = {}
        self.finite = Finite()
        if total_steps is not None:
            self.plan_steps(total_steps)

    def plan_steps(self, total_steps: int) -> None:
        """Lay the phases over `total_steps` optimizer steps."""
        c = self.config
        schedule = make_schedule(total_steps, c.warm, c.ramp, c.harden)
        if isinstance(c.target, Fixed):  # nothing to search for
            schedule = Schedule(schedule.total, schedule.begin, schedule.begin, schedule.begin)
        if self._schedule is not None and self._schedule != schedule:
            wanted = f"{self._schedule.total}, as the run began with"
            remedy = "resume with the same number of steps: the phase is a function of the step"
            raise CheckpointError(format_error("Pruner", "total_steps", total_steps, wanted, remedy))
        self._schedule = schedule

    def attach(self) -> Pruner:
        """Patch the model, open every gate, add the replacements; call it before the optimizer is made.

        Raises ArgumentError for a model that is pruned, frozen or under another Pruner, and for a teacher
        that cannot be compared with it; Unsupported for a model with adapters of PEFT.
        """
        if self._attached:
            return self
        if self.steps:
            got, remedy = f"detached after {self.steps} steps", "make a new Pruner, and attach that"
            raise ArgumentError(
                format_error("Pruner.attach", "pruner", got, "one that has not begun", remedy)
            )
        check_student(self.model)
        patch(self.model)
        self.state = get_encoder(self.model)
        check_whole(self.state)
        layers = self.state.num_layers
        self.objective = Objective(self.config.target, layers)
        self._teacher: Teacher | SelfTeacher | None = None
        if self.config.distill is not None:
            model = self._teacher_model
            distill = self.config.distill
            self._teacher = SelfTeacher(self.model) if model is None else Teacher(model, self.model, distill)
        self._leave_earlier()
        self.state.add_replacements(self.config.replacement)
        self.state.set_gates([1.0] * layers)
        exact = self.config.gates == "exact"
        self.learner = GateLearner(self.objective, self.config.gate_lr, self.config.seed, exact)
        reads_neighbours = self.config.replacement == "shift"
        self._measured = Calibration(layers, self.state.encoder.config, reads_neighbours)
        self._attached = True
        _attached[self.state.encoder] = weakref.ref(self)
        self.engage()
        self._begin_step()
        return self

    def _leave_earlier(self) -> None:
        """Undo the attach of a Pruner that never began; refuse a model that another one is training."""
        known = _attached.get(self.state.encoder)
        earlier = None if known is None else known()
        if earlier is None or earlier is self or not earlier._attached or earlier.finalized:
            return
        if earlier.steps:
            got = f"a model that another Pruner has trained for {earlier.steps} steps"
            remedy = "call detach() of that Pruner first, or load the dense model anew"
            raise ArgumentError(format_error("Pruner", "model", got, "a dense model", remedy))
        earlier.detach()

    def engage(self) -> None:
        """Have dropout and the teacher as the training wants them; `release` gives them back."""
        self._check_attached("engage")
        if self._engaged:
            return
        self._engaged = True
        if isinstance(self._teacher, Teacher):
            self._teacher.engage()
        if self._leads:
            assert self.config.distill is not None
            self._dropouts = {m: m.p for m in self.model.modules() if isinstance(m, nn.Dropout)}
            # A Pruner that is lost without detach() must not leave the model without its dropout.
            lost = weakref.WeakKeyDictionary(self._dropouts)
            self._when_lost = weakref.finalize(self, _set_dropouts, lost)
            for module in self._dropouts:
                module.p = self.config.distill.dropout

    def release(self) -> None:
        """Give back dropout, the teacher's mode and flags, and stop recording; every gate not hardened is
        open. `load_state_dict` goes on from a state."""
        if not self._engaged:
            return
        self._engaged = False
        _set_dropouts(self._dropouts)
        self._dropouts = {}
        if self._when_lost is not None:
            self._when_lost.detach()
        if isinstance(self._teacher, Teacher):
            self._teacher.release()
        self.state.runtime.trace = None
        self.state.set_gates(self._settled_gates)

    def detach(self) -> nn.Module:
        """Undo `attach`: open gates, no replacements, the dropout and the teacher's mode there were before.
        Weights stay as trained. Returns the model, which is patched and not pruned."""
        self._check_training("detach")
        self.release()
        self.state.set_gates([1.0] * self.state.num_layers)
        self.state.remove_replacements()
        self.state.runtime.unfinished = False
        _attached.pop(self.state.encoder, None)
        self._attached = False
        return self.model

    def set_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the replacements' parameters groups of their own in `optimizer`, at `config.replacement_lr`
        times the rate of the group they were in; before its first step, and before a scheduler is made. Once
        for each optimizer: a second call changes nothing.

        Raises ArgumentError if the optimizer does not hold them, as one does that was made before `attach`.
        """
        self._check_training("set_rates")
        if self.misses(optimizer):
            got, wanted = "one without the replacements' parameters", "one made after attach()"
            remedy = "make the optimizer after attach(), from model.parameters(): else they are never trained"
            raise ArgumentError(format_error("Pruner.set_rates", "optimizer", got, wanted, remedy))
        own = {id(p) for layer in self._replacements for p in layer.parameters()}
        # accelerate wraps optimizers; a scheduler of torch marks the step of the one it is made for.
        scheduled = hasattr(getattr(optimizer, "optimizer", optimizer).step, "_wrapped_by_lr_sched")
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in own]
            if moved and self.config.replacement_lr != 1.0 and RATED not in group:
                if scheduled:
                    got, wanted = "an optimizer that has a scheduler", "one without: groups are added to it"
                    remedy = "call set_rates before the scheduler is made"
                    raise ArgumentError(format_error("Pruner.set_rates", "optimizer", got, wanted, remedy))
                group["params"] = [p for p in group["params"] if id(p) not in own]
                settings = {key: value for key, value in group.items() if key != "params"}
                rate = group["lr"] * self.config.replacement_lr
                optimizer.add_param_group({**settings, "params": moved, "lr": rate, RATED: True})

    def misses(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a parameter of a replacement that is to be trained is not in `optimizer`."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(p) not in held for i in self._layers for p in self._trained(i))

    @property
    def schedule(self) -> Schedule:
        if self._schedule is None:
            raise ArgumentError(
                format_error(
                    "Pruner",
                    "total_steps",
                    None,
                    "the number of optimizer steps",
                    "pass it, or call plan_steps",
                )
            )
        return self._schedule

    @property
    def phase(self) -> str:
        """`warm`, `search` or `recover`."""
        return RECOVER if self.kept is not None else self.schedule.phase(self.steps)

    @property
    def open_probabilities(self) -> list[float]:
        """P(open) of each layer's gate; 0 and 1 once hardened."""
        if self.kept is not None:
            return [float(i in self.kept) for i in range(self.state.num_layers)]
        probabilities: list[float] = self.learner.p_open.tolist()
        return probabilities

    @property
    def task_weight(self) -> float:
        """Of the task's own loss in this step: 1; where a dense teacher teaches `labels` of Distill, and 0 on
        rows that `prepare` swaps tokens in."""
        self._check_training("task_weight")
        if not self._leads:
            return 1.0
        assert self.config.distill is not None
        return 0.0 if self._swaps else self.config.distill.labels

    def prepare(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch to run the model on in this step, and to give to `loss`: `inputs`, with tokens swapped in
        every other step where a dense teacher teaches and `Distill.swap` is not 0."""
        self._check_training("prepare")
        check_batch("prepare", inputs)
        self._prepared = True
        if not self._swaps:
            return inputs
        if inputs.get("input_ids") is None:
            warnings.warn(
                "Pruner.prepare: no token is swapped although Distill.swap is not 0, as the batch has no "
                "input_ids. Pass them by that name, or Distill(swap=0.0), which counts every row's label.",
                stacklevel=2,
            )
        assert self.config.distill is not None
        return swap_tokens(inputs, self.config.distill.swap, self._swapping)

    def loss(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """What to add to the weighted task loss: distillation and the Lagrangian; 0-d float32 on the model's
        device.

        outputs: what the model gave for `inputs` in the forward just run, in training. inputs: the batch that
        `prepare` gave, with its labels. A teacher computes in the dtype of the autocast around this call.
        """
        self._check_training("loss")
        check_batch("loss", inputs)
        forward = self.take(outputs, inputs)
        if forward is None:
            remedy = "call loss once after each forward of the model in training"
            got = "no forward since the last call"
            raise ArgumentError(
                format_error("Pruner.loss", "outputs", got, "those of the forward just run", remedy)
            )
        return self.loss_of([forward])

    def take(self, outputs: Any, inputs: Mapping[str, Any]) -> Forward | None:
        """The forward just run, for `loss_of`; its hidden states are then no longer recorded. None if hidden
        states are needed and there are none, as the encoder has not run."""
        self._check_training("take")
        record = self.state.runtime.trace
        if record is not None and not record.hidden:
            return None
        forward = Forward(inputs, outputs, has_gradient=torch.is_grad_enabled())
        if record is not None:
            if self.phase == WARM:
                self._measured.add(record)
            if forward.has_gradient:
                forward.hidden = list(record.hidden)
            record.hidden, record.attention_output = [], []  # the graph is not kept beyond backward
        return forward

    def loss_of(self, forwards: Sequence[Forward]) -> Tensor:
        """As `loss`, for a loss that runs the model several times: distillation is the mean over `forwards`.

        Forwards without gradient are only measured. Raises Unsupported if there is something to distil and
        none has a gradient.
        """
        if self._swaps and not self._prepared:
            warnings.warn(
                "Pruner.loss: prepare() was not called in this step, so no token is swapped although "
                "Distill.swap is not 0. Run the model on inputs = pruner.prepare(inputs) and give these to "
                "loss, or pass Distill(swap=0.0).",
                stacklevel=3,
            )
        if not self.steps:
            check_trainable(self.model, self._replacements)
        total = torch.zeros((), device=self._device)
        if self.phase == SEARCH:
            total = self.learner.term()
            self.finite.note(LAGRANGIAN, total)
        taught = [forward for forward in forwards if forward.has_gradient]
        if self._teaches and not taught:
            got = "forwards without gradient" if forwards else "a loss that does not run the model"
            remedy = "use a loss that is not a cached one, or pass PruningConfig(distill=None)"
            raise Unsupported(format_error("Pruner.loss", "distill", got, "a forward to distil into", remedy))
        for forward in taught:
            for scores in scores_of(forward.outputs).values():
                self.finite.note_scores(scores)
            if self._teaches:
                total = total + self._distillation(forward) / len(taught)
        return total

    def step(self, grad_scale: float = 1.0) -> None:
        """After each optimizer step: move the gates and the multipliers, then draw the next step's gates.

        grad_scale: what the loss was multiplied by before backward (a GradScaler's scale). Raises
        ArgumentError if a loss, the scores, the gradients of the gates or the gates are not finite; where the
        loss is scaled only if that lasts.
        """
        self._check_training("step")
        remedy = "pass scaler.get_scale() as it was before scaler.update(), or leave it out"
        grad_scale = number("Pruner.step", "grad_scale", grad_scale, "above 0", remedy, lambda x: x > 0.0)
        marks = (self.schedule.begin, self.schedule.harden, self.schedule.total)
        self.finite.end_step(self.steps + 1, grad_scale, look=self.steps + 1 in marks)
        if self.phase == SEARCH:
            self.learner.learn(grad_scale)
        self.steps += 1
        if self.kept is None:
            if self.steps == self.schedule.begin:
                self._measured.start(self.state)
                self._starts = {i: [p.detach().clone() for p in self._trained(i)] for i in self._layers}
                self.learner.costs = self._measured.costs
                # A target that no choice of layers reaches fails here, not at the end of the search.
                self.objective.choose(self.learner.p_open, self._measured.costs)
            if self.steps >= self.schedule.harden:
                self.harden()
            elif self.phase == SEARCH:
                self.learner.draw(self._target_now, self._device)
                self.state.set_gates(self.learner.drawn)
        self._begin_step()
        self._note()
        if self.steps == min(self.schedule.harden + SETTLED, self.schedule.total):
            self._check_trained()

    def harden(self) -> list[int]:
        """Fix every gate at 0 or 1 for good, by the target exactly; returns the layers kept."""
        self._check_training("harden")
        if self.kept is None:
            self.learner.aim(self.objective.goal)
            probabilities, costs = self.learner.p_open, self._measured.costs
            kept = self.objective.choose(probabilities, costs)
            self.margin = self.objective.margin(probabilities, costs)
            self.kept = kept
            self.state.set_gates(self.open_probabilities)
            self._watch()
            if self.separated is False:
                warnings.warn(
                    f"Pruner: the search has not told the layers apart: kept {kept}, but another choice is "
                    f"within {self.margin:.3f} of it in P(open), less than {SEPARATED}. Search for more "
                    "steps (harden), or with another gate_lr, before calling this choice learned.",
                    stacklevel=2,
                )
        return self.kept

    @property
    def separated(self) -> bool | None:
        """Whether `margin` is large enough that the layers kept are a choice of the search, and not of their
        order; None before hardening and where nothing was searched for."""
        return None if self.margin is None else self.margin >= SEPARATED

    def finalize(self) -> nn.Module:
        """Drop the weights of every attention not in `kept`; learned replacements stay. Returns the model.

        Dropout, and the teacher's mode and flags, are as they were before `attach`.
        """
        self._check_attached("finalize")
        if self.kept is None:
            remedy = "train to the end, or call harden()"
            raise ArgumentError(
                format_error("Pruner.finalize", "gates", "not hardened", "hardened gates", remedy)
            )
        self.release()
        self.finalized = True
        return prune(self.model, keep=self.kept, replacement=self.config.replacement)

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger: target and expected reduction now, the multipliers, P(open) of each gate; the
        margin of the choice once it is made."""
        linear, quadratic = self.learner.multipliers.tolist()
        numbers = {
            "pruning/target": self._target_now,
            "pruning/reduction": self._reduction_now,
            "pruning/hardened": float(self.kept is not None),
            "pruning/multiplier_linear": linear,
            "pruning/multiplier_quadratic": quadratic,
        }
        if self.margin is not None:
            numbers["pruning/margin"] = self.margin
        return numbers | {f"pruning/gate_{i}": p for i, p in enumerate(self.open_probabilities)}

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs beside the model's weights; plain containers and CPU tensors."""
        self._check_attached("state_dict")
        return {
            "steps": self.steps,
            "total": self.schedule.total,
            "kept": self.kept,
            "learner": self.learner.state_dict(),
            "measured": self._measured.state_dict(),
            "history": [dict(entry) for entry in self.history],
            "teacher_seconds": self.teacher_seconds,
            "margin": self.margin,
            "settings": self._settings,
        }

    @property
    def _settings(self) -> dict[str, str]:
        """What a resumed run must have in common with the one that it resumes."""
        c = self.config
        return {"replacement": c.replacement, "target": repr(c.target), "gates": c.gates}

    def _check_settings(self, state: Mapping[str, Any]) -> None:
        now = self._settings
        for name, had in state.get("settings", now).items():  # states of earlier versions have none
            # In the warm phase nothing is learned of the gates yet.
            if had != now[name] and (name == "replacement" or state["steps"] >= self.schedule.begin):
                remedy = "resume with the settings that the run began with, or start anew"
                where = "Pruner.load_state_dict"
                raise CheckpointError(format_error(where, f"PruningConfig.{name}", now[name], had, remedy))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; the model's weights are loaded apart.

        Raises CheckpointError if the state is of another model or of a run of another length.
        """
        self._check_training("load_state_dict")
        given = state if isinstance(state, Mapping) else {}
        missing = [name for name in STATE if given.get(name) is None and name != "kept"]
        layers = self.state.num_layers
        if missing or state["learner"]["z"].numel() != layers:
            got = f"no {missing}" if missing else f"{state['learner']['z'].numel()} gates"
            remedy = "resume the run that wrote it"
            raise CheckpointError(
                format_error("Pruner.load_state_dict", "state", got, f"the state of {layers} gates", remedy)
            )
        self.plan_steps(state["total"])
        self._check_settings(state)
        self.engage()
        self.finite, self._starts = Finite(), {}
        self.margin = state.get("margin")  # states of earlier versions have none
        self.steps, self.kept = state["steps"], state["kept"]
        self.history = [dict(entry) for entry in state["history"]]
        self.teacher_seconds = state["teacher_seconds"]
        self._measured.load_state_dict(state["measured"])
        self.learner.costs = self._measured.costs
        self.learner.load_state_dict(state["learner"], self._device)
        self.state.set_gates(self.learner.drawn if self.phase == SEARCH else self._settled_gates)
        self._begin_step()

    # -- what is used above

    @property
    def _replacements(self) -> list[nn.Module]:
        found = (self.state.replacement(layer) for layer in range(self.state.num_layers))
        return [one for one in found if one is not None]

    @property
    def _layers(self) -> range:
        return range(self.state.num_layers)

    def _trained(self, layer: int) -> list[nn.Parameter]:
        """The parameters of a layer's replacement that ask for gradients."""
        replacement = self.state.replacement(layer)
        return [] if replacement is None else [p for p in replacement.parameters() if p.requires_grad]

    def _check_trained(self) -> None:
        """Say so if no replacement in use has moved since it was started: the optimizer has none of them."""
        used = [i for i in self._starts if i not in (self.kept or [])]
        now, then = [p for i in used for p in self._trained(i)], [p for i in used for p in self._starts[i]]
        self._starts = {}
        if now and len(now) == len(then) and all(map(torch.equal, now, then)):
            warnings.warn(
                "Pruner: no replacement has moved since the warm phase: the optimizer does not train their "
                "parameters. Make it from model.parameters() after attach(), and call set_rates(optimizer).",
                stacklevel=3,
            )

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _settled_gates(self) -> list[float]:
        return [1.0] * self.state.num_layers if self.kept is None else self.open_probabilities

    @property
    def _target_now(self) -> float:
        if self.phase == WARM:
            return 0.0
        return self.objective.goal * (
            1.0 if self.kept is not None else self.schedule.target_share(self.steps)
        )

    @property
    def _reduction_now(self) -> float:
        if self.phase == WARM:
            return 0.0
        return float(self.objective.reduction(torch.tensor(self.open_probabilities), self._measured.costs))

    @property
    def _leads(self) -> bool:
        """Whether a dense teacher teaches, by logits or hidden states."""
        distill = self.config.distill
        return isinstance(self._teacher, Teacher) and distill is not None and distill.teaches

    @property
    def _teaches(self) -> bool:
        """The model teaches itself until hardening only: from then on its closed attention is not trained."""
        return self._teacher is not None and not (
            self.kept is not None and isinstance(self._teacher, SelfTeacher)
        )

    def _distillation(self, forward: Forward) -> Tensor:
        distill, teacher, outputs = self.config.distill, self._teacher, forward.outputs
        assert distill is not None and teacher is not None
        if distill.logits and not hasattr(outputs, "get"):
            remedy = "pass return_dict=True to the model, or Distill(logits=0.0)"
            wanted = "an output of transformers, or a dict with the scores as `logits`"
            raise ArgumentError(
                format_error("Pruner.loss", "outputs", type(outputs).__name__, wanted, remedy)
            )
        start = time.perf_counter()
        lesson = teacher(forward.inputs, want_hidden=distill.hidden > 0)
        self.teacher_seconds += time.perf_counter() - start
        total = torch.zeros((), device=self._device)
        if distill.logits:
            apart = outputs_loss(self.model, outputs, lesson.outputs, forward.inputs, distill.temperature)
            if apart is None and not distill.hidden:
                remedy = "pass Distill(hidden=1.0), or PruningConfig(distill=None)"
                got = "outputs without scores, and no weight for hidden states"
                raise ArgumentError(
                    format_error("Pruner.loss", "distill", got, "something to distil", remedy)
                )
            if apart is not None:
                total = total + distill.logits * apart
                self.finite.note(LOGITS, apart)
        if distill.hidden:
            apart = hidden_loss(forward.hidden, lesson.hidden, range(self.state.num_layers))
            total = total + distill.hidden * apart
            self.finite.note(HIDDEN, apart)
        return total

    @property
    def _swaps(self) -> bool:
        """Whether this step is one in which tokens are swapped; while attention is measured none are."""
        distill = self.config.distill
        if not self._leads or distill is None or distill.swap == 0.0 or self.steps % 2 == 0:
            return False
        return self.phase != WARM

    def _begin_step(self) -> None:
        self._prepared = False
        # Of the step alone, so that a resumed run swaps as the whole one did.
        self._swapping = torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.steps) % 2**63)
        self._watch()

    def _watch(self) -> None:
        """Have the encoder record what it computes, while that is needed."""
        self.state.runtime.unfinished = self.kept is None
        measuring = self.kept is None and (self._schedule is None or self.phase == WARM)
        matching = self._teaches and self.config.distill is not None and self.config.distill.hidden > 0
        if not self._engaged or not (measuring or matching):
            self.state.runtime.trace = None
        elif self.state.runtime.trace is None:
            self.state.runtime.trace = ActivationTrace()

    def _note(self) -> None:
        marks = (self.schedule.begin, self.schedule.harden, self.schedule.total)
        if self.steps % max(1, self.schedule.total // HISTORY) and self.steps not in marks:
            return
        open_now = self.open_probabilities
        decided = self.kept is not None or self.learner.exact
        expected = open_now if decided else hard_concrete.expected(self.learner.log_alpha.detach()).tolist()
        self.history.append(
            {
                "step": self.steps,
                "phase": self.phase,
                "target": self._target_now,
                "reduction": self._reduction_now,
                "multipliers": self.learner.multipliers.tolist(),
                "open": open_now,
                "gates": expected,
                "margin": self.margin,
            }
        )

    def _check_attached(self, call: str) -> None:
        if not self._attached:
            remedy = "call attach() before the optimizer is made"
            raise ArgumentError(
                format_error(f"Pruner.{call}", "pruner", "not attached", "an attached one", remedy)
            )

    def _check_training(self, call: str) -> None:
        self._check_attached(call)
        if self.finalized:
            remedy = "make a new Pruner for a dense model; the pruned one trains as any other model does"
            raise ArgumentError(
                format_error(f"Pruner.{call}", "pruner", "finalized", "one that prunes", remedy)
            )
