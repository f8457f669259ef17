"""The Pruner: learns a gate for each attention in any training loop, hardens them, drops what is closed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import gates
from ..errors import ArgumentError, CheckpointError, say
from ..patch import patch
from ..prune import prune
from ..run import Record
from ..state import encoder_state
from .config import PruningConfig
from .distill import SelfTeacher, Teacher, hidden_loss, logits_loss, logits_of, scored_rows
from .learner import GateLearner
from .measure import Measured
from .objective import Fixed, Objective
from .schedule import RECOVER, SEARCH, WARM, Schedule, make_schedule
from .swap import swap_tokens

HISTORY = 400  # entries a run, about
STATE = ("steps", "total", "kept", "learner", "measured", "history", "teacher_seconds")


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
    did, a list of dicts. `kept`: the layers whose attention stays, None until hardened. `teacher_seconds`: of
    the teacher's forwards so far, by the host's clock, those before a resumption too.

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
        if teacher is model:
            remedy = "pass copy.deepcopy(model), or None to distil from the model with its gates open"
            raise ArgumentError(say("Pruner", "teacher", "the model itself", "another model or None", remedy))
        self.model, self.config = model, config
        self.steps = 0
        self.kept: list[int] | None = None
        self.history: list[dict[str, Any]] = []
        self.teacher_seconds = 0.0
        self._teacher_model = teacher
        self._schedule: Schedule | None = None
        self._attached = False
        self._dropouts: dict[nn.Dropout, float] = {}
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
            raise CheckpointError(say("Pruner", "total_steps", total_steps, wanted, remedy))
        self._schedule = schedule

    def attach(self) -> Pruner:
        """Patch the model, open every gate, add the replacements; call it before the optimizer is made."""
        if self._attached:
            return self
        patch(self.model)
        self.state = encoder_state(self.model)
        layers = self.state.num_layers
        removed = [i for i in range(layers) if self.state.is_removed(i)]
        if removed:
            got = f"attention of layers {removed} pruned"
            raise ArgumentError(say("Pruner", "model", got, "every attention there", "load the dense model"))
        self.objective = Objective(self.config.target, layers)
        self.state.add_replacements(self.config.replacement)
        self.state.set_gates([1.0] * layers)
        exact = self.config.gates == "exact"
        self.learner = GateLearner(self.objective, self.config.gate_lr, self.config.seed, exact)
        mixes = self.config.replacement == "shift"
        self._measured = Measured(layers, self.state.encoder.config, mixes)
        self._teacher: Teacher | SelfTeacher | None = None
        if self.config.distill is not None:
            teacher = self._teacher_model
            self._teacher = SelfTeacher(self.model) if teacher is None else Teacher(teacher, layers)
        if self._leads:
            assert self.config.distill is not None
            self._dropouts = {m: m.p for m in self.model.modules() if isinstance(m, nn.Dropout)}
            for module in self._dropouts:
                module.p = self.config.distill.dropout
        self._attached = True
        self._begin_step()
        return self

    def set_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the replacements' parameters groups of their own in `optimizer`, at `config.replacement_lr`
        times the rate of the group they were in; before its first step, and before a scheduler is made."""
        self._check_attached("set_rates")
        own = {id(p) for layer in self._replacements for p in layer.parameters()}
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in own]
            if moved and self.config.replacement_lr != 1.0:
                group["params"] = [p for p in group["params"] if id(p) not in own]
                settings = {key: value for key, value in group.items() if key != "params"}
                rate = group["lr"] * self.config.replacement_lr
                optimizer.add_param_group({**settings, "params": moved, "lr": rate})

    @property
    def schedule(self) -> Schedule:
        if self._schedule is None:
            raise ArgumentError(
                say(
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
        self._check_attached("task_weight")
        if not self._leads:
            return 1.0
        assert self.config.distill is not None
        return 0.0 if self._swaps else self.config.distill.labels

    def prepare(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch to run the model on in this step, and to give to `loss`: `inputs`, with tokens swapped in
        every other step where a dense teacher teaches and `Distill.swap` is not 0."""
        self._check_attached("prepare")
        if not self._swaps:
            return inputs
        assert self.config.distill is not None
        return swap_tokens(inputs, self.config.distill.swap, self._swapping)

    def loss(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """What to add to the weighted task loss: distillation and the Lagrangian; 0-d float32 on the model's
        device.

        outputs: what the model gave for `inputs` in the forward just run, in training. inputs: the batch that
        `prepare` gave, with its labels. A teacher computes in the dtype of the autocast around this call.
        """
        self._check_attached("loss")
        record = self.state.runtime.record
        hidden = [] if record is None else list(record.hidden)
        if record is not None and self.phase == WARM:
            self._measured.add(record, inputs)
        total = self.learner.term() if self.phase == SEARCH else torch.zeros((), device=self._device)
        if self._teaches:
            total = total + self._distillation(outputs, inputs, hidden)
        if record is not None:
            record.hidden, record.attention_output = [], []  # the graph is not kept beyond backward
        return total

    def step(self, grad_scale: float = 1.0) -> None:
        """After each optimizer step: move the gates and the multipliers, then draw the next step's gates.

        grad_scale: what the loss was multiplied by before backward (a GradScaler's scale).
        """
        self._check_attached("step")
        if self.phase == SEARCH:
            self.learner.learn(grad_scale)
        self.steps += 1
        if self.kept is None:
            if self.steps == self.schedule.begin:
                self._measured.start(self.state)
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

    def harden(self) -> list[int]:
        """Fix every gate at 0 or 1 for good, by the target exactly; returns the layers kept."""
        self._check_attached("harden")
        if self.kept is None:
            self.kept = self.objective.choose(self.learner.p_open, self._measured.costs)
            self.state.set_gates(self.open_probabilities)
            self._watch()
        return self.kept

    def finalize(self) -> nn.Module:
        """Drop the weights of every attention not in `kept`; learned replacements stay. Returns the model."""
        self._check_attached("finalize")
        if self.kept is None:
            remedy = "train to the end, or call harden()"
            raise ArgumentError(say("Pruner.finalize", "gates", "not hardened", "hardened gates", remedy))
        self.state.runtime.record = None
        for module, p in self._dropouts.items():
            module.p = p
        return prune(self.model, keep=self.kept, replacement=self.config.replacement)

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger: target and expected reduction now, the multipliers, P(open) of each gate."""
        linear, quadratic = self.learner.multipliers.tolist()
        numbers = {
            "pruning/target": self._target_now,
            "pruning/reduction": self._reduction_now,
            "pruning/hardened": float(self.kept is not None),
            "pruning/multiplier_linear": linear,
            "pruning/multiplier_quadratic": quadratic,
        }
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
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; the model's weights are loaded apart.

        Raises CheckpointError if the state is of another model or of a run of another length.
        """
        self._check_attached("load_state_dict")
        missing = [name for name in STATE if name not in state]
        layers = self.state.num_layers
        if missing or state["learner"]["z"].numel() != layers:
            got = f"no {missing}" if missing else f"{state['learner']['z'].numel()} gates"
            remedy = "resume the run that wrote it"
            raise CheckpointError(
                say("Pruner.load_state_dict", "state", got, f"the state of {layers} gates", remedy)
            )
        self.plan_steps(state["total"])
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

    def _distillation(
        self, outputs: Any, inputs: Mapping[str, Any], hidden: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        distill, teacher = self.config.distill, self._teacher
        assert distill is not None and teacher is not None
        start = time.perf_counter()
        lesson = teacher(inputs, want_hidden=distill.hidden > 0)
        self.teacher_seconds += time.perf_counter() - start
        total = torch.zeros((), device=self._device)
        scores = logits_of(outputs)
        if distill.logits and scores:
            apart = logits_loss(scores, lesson.logits, distill.temperature, scored_rows(inputs))
            total = total + distill.logits * apart
        if distill.hidden:
            total = total + distill.hidden * hidden_loss(hidden, lesson.hidden, range(self.state.num_layers))
        return total

    @property
    def _swaps(self) -> bool:
        """Whether this step is one in which tokens are swapped; while attention is measured none are."""
        distill = self.config.distill
        if not self._leads or distill is None or distill.swap == 0.0 or self.steps % 2 == 0:
            return False
        return self.phase != WARM

    def _begin_step(self) -> None:
        # Of the step alone, so that a resumed run swaps as the whole one did.
        self._swapping = torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.steps) % 2**63)
        self._watch()

    def _watch(self) -> None:
        """Have the encoder record what it computes, while that is needed."""
        self.state.runtime.unfinished = self.kept is None
        measuring = self.kept is None and (self._schedule is None or self.phase == WARM)
        matching = self._teaches and self.config.distill is not None and self.config.distill.hidden > 0
        if not (measuring or matching):
            self.state.runtime.record = None
        elif self.state.runtime.record is None:
            self.state.runtime.record = Record()

    def _note(self) -> None:
        marks = (self.schedule.begin, self.schedule.harden, self.schedule.total)
        if self.steps % max(1, self.schedule.total // HISTORY) and self.steps not in marks:
            return
        open_now = self.open_probabilities
        decided = self.kept is not None or self.learner.exact
        expected = open_now if decided else gates.expected(self.learner.log_alpha.detach()).tolist()
        self.history.append(
            {
                "step": self.steps,
                "phase": self.phase,
                "target": self._target_now,
                "reduction": self._reduction_now,
                "multipliers": self.learner.multipliers.tolist(),
                "open": open_now,
                "gates": expected,
            }
        )

    def _check_attached(self, call: str) -> None:
        if not self._attached:
            remedy = "call attach() before the optimizer is made"
            raise ArgumentError(say(f"Pruner.{call}", "pruner", "not attached", "an attached one", remedy))
