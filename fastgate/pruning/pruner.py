"""The Pruner: learns which attention a task needs, in any training loop, and drops the rest."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.errors import ArgumentError, format_error
from fastgate.models.pruning import prune
from fastgate.pruning import checks
from fastgate.pruning.config import PruningConfig
from fastgate.pruning.finite import is_unlabelled
from fastgate.pruning.numbers import number
from fastgate.pruning.pruner_state import load_state, state_of
from fastgate.pruning.pruning_run import PruningRun
from fastgate.pruning.replacement_training import set_rates

_pruners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Pruner]] = weakref.WeakKeyDictionary()


class Pruner(PruningRun):
    """Learns which attention sublayers `model` can do without, in any training loop.

        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
        pruner = fastgate.Pruner(model, config, total_steps, teacher, optimizer=optimizer)
        for batch in batches:
            batch = pruner.prepare(batch)
            outputs = model(**batch)
            pruner.loss(outputs, batch).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        pruner.finalize()

    Gradient accumulation: call `prepare` and `loss` for each of n micro-batches, divide each loss by n, and
    call `step` once, after `optimizer.step()`. The micro-batches of a step see one draw of the gates.
    Activation checkpointing does not change the draw. An attention whose gate was drawn 0 does not run and
    has no gradient in that step: None, so Adam leaves it alone, where zeros would move it by its momentum.

    After an exception, `close()` restores dropout and teacher; `with Pruner(...) as pruner:` does so by
    itself. `detach()` also takes the replacements away. DistributedDataParallel goes around the model after
    the Pruner is made, with `find_unused_parameters=True`: a gate may be 0.

    Args:
        model: The model to train. It is patched, and given gates and replacements.
        config: How to prune.
        total_steps: Optimizer steps of the run. None if `plan_steps` will be called before the first step.
        teacher: A dense model fine-tuned on the task. None: the model itself with every gate open, until
            hardening.
        optimizer: The optimizer of the model's parameters. Those of the replacements are added to it, at
            `config.replacement_lr` times the rate of the weights beside them. If the optimizer is made later,
            call `prepare_optimizer`.
        scaler: A torch.amp.GradScaler, if the loss is scaled.

    Attributes:
        history: What the gates did, a list of dicts.
        kept: The layers whose attention stays. None until the gates are hardened.

    Raises:
        ArgumentError: For a model that is pruned, frozen or under another Pruner that has begun, for a
            teacher that cannot be compared with it, and for an optimizer that has a scheduler already.
        Unsupported: For a model with adapters of PEFT or inside DistributedDataParallel.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig,
        total_steps: int | None = None,
        teacher: nn.Module | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ):
        checks.check_arguments(model, config, teacher, optimizer)
        super().__init__(model, config, total_steps, teacher)
        self._scaler = scaler
        self._grad_scale: float | None = None  # of the step under way
        _replace_earlier(self)
        self.handle.add_replacements(config.replacement)
        self.handle.set_gates([1.0] * self.handle.num_layers)
        _pruners[self.handle.encoder] = weakref.ref(self)
        self.distiller.engage()
        self.begin_step()
        if optimizer is not None:
            try:
                self.prepare_optimizer(optimizer)
            except BaseException:
                self.detach()
                raise

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the replacements' parameters groups of their own in `optimizer`, at `config.replacement_lr`
        times the rate of the weights beside them. For an optimizer that is made after the Pruner; before a
        scheduler is made of it. A second call changes nothing. Raises ArgumentError as the class does."""
        self.order.check("prepare_optimizer")
        set_rates(optimizer, self.handle, self.config.replacement_lr)

    # -- the calls of a training loop

    def prepare(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch to run the model on, and to give to `loss`.

        inputs: a dict of what the model is called with. Every other step some of its tokens are swapped,
        where a dense teacher teaches and `Distill.swap` is not 0; else it is returned as it is.
        """
        self.order.check("prepare")
        checks.check_batch("prepare", inputs)
        prepared = self.distiller.swap(inputs, stacklevel=2) if self.is_swap_step else inputs
        self.start_recording()
        self.order.prepare(inputs, prepared)
        return prepared

    def loss(self, outputs: Any, batch: Mapping[str, Any], task_loss: Tensor | None = None) -> Tensor:
        """The complete loss, ready for backward: the task's loss times `task_weight`, the distillation loss,
        and in the search the Lagrangian; 0-d on the model's device.

        outputs: what the model gave for `batch`, in training, in the forward since `prepare`. batch: what
        `prepare` returned, with its labels. task_loss: the task's own loss, 0-d; None: `outputs.loss`, or
        the entry `loss` of a dict. In a batch without labels it counts 0. A teacher computes in the dtype of
        the autocast around this call.
        """
        self.order.check("loss")
        checks.check_batch("loss", batch)
        self.order.loss(batch)
        task_loss = checks.task_loss_of(outputs, task_loss, self.task_weight, self.device)
        if self.recorder.forwards > 1:
            raise self.order.other_forwards(self.recorder.forwards)
        forward = self.take_forward(outputs, batch)
        checks.check_gradient(task_loss, forward, self.model, self.handle)
        if self._scaler is not None and self._grad_scale is None:
            self._grad_scale = self._scaler.get_scale()
        self.finite.note_task(task_loss, batch)
        # The mean over no label is NaN. Such a batch adds 0, and its gradient is 0 as it is.
        task_loss = torch.where(is_unlabelled(batch, self.device), 0.0, task_loss)
        return self.task_weight * task_loss + self.pruning_loss([forward])

    def step(self, grad_scale: float | None = None) -> None:
        """Once after each optimizer step: move the gates and the multipliers, draw the next step's gates.

        grad_scale: what the losses were multiplied by before backward; not needed where the Pruner has the
        `scaler`. Raises ArgumentError if no loss was differentiated in this step, and if a loss, the scores,
        the gradients of the gates or the gates are not finite, at the latest after 25 steps; where the loss
        is scaled only if that lasts. Warns if the weights of the losses do not add up to 1.
        """
        self.order.check("step")
        scale = self._scale(grad_scale)
        self.order.step(self.probe.losses, self.probe.has_gradient)
        self.probe.check(scale, stacklevel=2)
        self._grad_scale = None
        self.end_step(scale)

    def finalize(self) -> nn.Module:
        """Drop the weights of every attention not in `kept`; learned replacements stay. Returns the model.

        Dropout, and the teacher's mode and flags, are as they were before the Pruner. Raises ArgumentError
        before the gates are hardened.
        """
        self.order.check("finalize")
        if self.kept is None:
            raise self.order.not_hardened(self.steps, self._schedule)
        self.close()
        self.order.state = "finalized"
        return prune(self.model, keep=self.kept, replacement=self.config.replacement)

    # -- more than a plain loop needs

    def harden(self) -> list[int]:
        """Fix every gate at 0 or 1 for good, by the target exactly, before the schedule does; returns the
        layers kept. Warns if the search has not told them apart."""
        self.order.check("harden")
        return self.harden_gates(stacklevel=2)

    def close(self) -> None:
        """Give dropout back, the teacher's mode and its flags, and stop recording; every gate not hardened is
        open. To be called when a loop ends before `finalize`. `reopen` undoes it."""
        if self.order.state == "open":
            self.order.state = "closed"
            self.recorder.stop()
            self.distiller.close()
            self.handle.set_gates(self.search.settled_gates)

    def reopen(self) -> None:
        """Undo `close`, to go on with the training. What a step that did not end has left is forgotten; call
        `optimizer.zero_grad()` too."""
        self.order.check("reopen")
        if self.order.state == "closed":
            self.order.state = "open"
            self.distiller.engage()
            self.handle.set_gates(self.gates_now)
            self.learner.zero_grad()
            self.begin_step()

    def __enter__(self) -> Pruner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def detach(self) -> nn.Module:
        """`close`, and no replacements any more: every gate is open, weights stay as trained. Returns the
        model, which is patched and not pruned."""
        self.order.check("detach")
        self.close()
        self.handle.set_gates([1.0] * self.handle.num_layers)
        self.handle.remove_replacements()
        self.handle.runtime.unfinished = False
        _pruners.pop(self.handle.encoder, None)
        self.order.state = "detached"
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs beside the model's weights; plain containers and CPU tensors."""
        self.order.check("state_dict")
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; the model's weights are loaded apart.

        Raises CheckpointError if the state is of another model or of a run of another length.
        """
        self.order.check("load_state_dict")
        load_state(self, state)
        self.begin_step()

    def _scale(self, grad_scale: float | None) -> float:
        if grad_scale is None:
            return 1.0 if self._grad_scale is None else self._grad_scale
        remedy = "pass scaler.get_scale() as it was before scaler.update(), or leave it out"
        return number("Pruner.step", "grad_scale", grad_scale, "above 0", remedy, lambda x: x > 0.0)


def _replace_earlier(pruner: Pruner) -> None:
    """Detach a Pruner of the same model that never began; refuse a model that another one is training."""
    known = _pruners.get(pruner.handle.encoder)
    earlier = None if known is None else known()
    if earlier is None or earlier.order.state not in ("open", "closed"):
        return
    if earlier.steps:
        got = f"a model that another Pruner has trained for {earlier.steps} steps"
        remedy = "call detach() of that Pruner first, or load the dense model anew"
        raise ArgumentError(format_error("Pruner", "model", got, "a dense model", remedy))
    earlier.detach()
