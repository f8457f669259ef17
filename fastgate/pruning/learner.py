"""GateLearner: the gates' log-alpha and the Lagrangian's multipliers, drawn and moved on the host.

The device sees a draw as one 0-d leaf a gate, and the Lagrangian as one more leaf, the probe, beside a number
computed on the host. Their gradients come back in one small transfer an optimizer step; the chain rule is
finished on the host:

    d loss / d log_alpha = d loss / d z * d z / d log_alpha + d loss / d probe * d lagrangian / d log_alpha

The probe's gradient is the weight the Lagrangian had in what was differentiated, so accumulation and loss
scaling act on it as on every other term.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.nn import hard_concrete
from fastgate.pruning.calibration import mean_over_ranks
from fastgate.pruning.finite import MAX_OVERFLOWS, raise_not_finite
from fastgate.pruning.objective import Costs, Objective, lagrangian

# Where every gate starts, which is the most it can reach, P(open) = 0.98; and the least, 0.01. A gate that is
# all but certain is drawn the same every time and has no gradient from the task: between several such, chance
# would decide.
MAX_LOG_ALPHA, MIN_LOG_ALPHA = 2.5, -6.0


class GateLearner:
    """All of it is on the host but the leaves of the current draw. costs: set once measured (Speedup).

    exact: as many gates as the target leaves at the moment are 1 in a draw, the others 0; there is nothing
    for a Lagrangian to do.
    """

    def __init__(self, objective: Objective, lr: float, seed: int, exact: bool = False):
        self.objective, self.exact = objective, exact
        layers = objective.layers
        self.log_alpha = torch.full((layers,), 0.0 if exact else MAX_LOG_ALPHA, requires_grad=True)
        self.multipliers = torch.zeros(2, requires_grad=True)  # of the gap and of its square
        self.generator = torch.Generator().manual_seed(seed)
        self.costs: Costs | None = None
        self._optimizer = torch.optim.Adam([self.log_alpha], lr=lr)
        self._ascent = torch.optim.Adam([self.multipliers], lr=lr, maximize=True)
        self._target = 0.0
        self._overflows = 0  # steps without finite gradients, one after the other
        self._set(torch.ones(layers), torch.zeros(layers, layers), 0.0, torch.device("cpu"))

    @property
    def p_open(self) -> Tensor:
        """(layers,) P(open) of each gate; with `exact` how far it is above those that the target closes."""
        scores = self.log_alpha.detach()
        if not self.exact:
            return hard_concrete.p_open(scores)
        keep = self._keep(self._target)
        if keep in (0, scores.numel()):
            return torch.full_like(scores, float(keep > 0))
        ordered = scores.sort(descending=True).values
        return torch.sigmoid(scores - (ordered[keep - 1] + ordered[keep]) / 2)

    def aim(self, target: float) -> None:
        """Have `p_open` speak of this target, if no step has been drawn at it."""
        self._target = target

    @torch.enable_grad()
    def draw(self, target: float, device: torch.device) -> None:
        """Draw the next step's gates, for a model on `device` and a reduction asked for of `target`."""
        self._target = target
        if self.exact:
            z = hard_concrete.draw_exact(self.log_alpha, self._keep(target), self.generator)
        else:
            z = hard_concrete.draw(self.log_alpha, self.generator)
        rows = [torch.autograd.grad(gate, self.log_alpha, retain_graph=True)[0] for gate in z.unbind()]
        self._set(z.detach(), torch.stack(rows), float(self._lagrangian().detach()), device)

    @property
    def drawn(self) -> list[float | Tensor]:
        """The current draw as the encoder takes it: 0.0, 1.0, or a leaf where there is something to learn."""
        return [
            float(z) if leaf is None else leaf for z, leaf in zip(self._z.tolist(), self._leaves, strict=True)
        ]

    def term(self) -> Tensor:
        """The Lagrangian at the current draw; 0-d on the device, no transfer back."""
        return self._probe + self._value

    def zero_grad(self) -> None:
        """Forget what backward has left in the leaves."""
        for leaf in (self._probe, *self._leaves):
            if leaf is not None:
                leaf.grad = None

    @torch.enable_grad()
    def learn(self, grad_scale: float) -> None:
        """Move log-alpha down and the multipliers up, by the gradients that backward left in the leaves.

        Raises ArgumentError if they are not finite: at once for an unscaled loss, else after MAX_OVERFLOWS
        steps.
        """
        if self._probe.grad is None:
            raise ArgumentError(
                format_error(
                    "Pruner.step",
                    "pruner.loss",
                    "no gradient",
                    "its value in the loss that was differentiated",
                    "call pruner.loss(outputs, batch).backward() before step()",
                )
            )
        zero = torch.zeros_like(self._probe)
        gradients = [zero if leaf is None or leaf.grad is None else leaf.grad for leaf in self._leaves]
        grads = torch.stack([self._probe.grad, *gradients]).cpu()
        weight, *on_draw = (mean_over_ranks(grads) / grad_scale).unbind()
        on_gates = self._jacobian.t() @ torch.stack(on_draw)
        if not bool(torch.isfinite(on_gates).all() & torch.isfinite(weight)):
            # A scaled loss overflows now and then: the optimizer of the weights skips such a step too.
            self._overflows += 1
            if grad_scale == 1.0 or self._overflows > MAX_OVERFLOWS:
                raise_not_finite("the gradients of the gates")
            return
        self._overflows = 0
        slopes = torch.autograd.grad(self._lagrangian(), (self.log_alpha, self.multipliers))
        self.log_alpha.grad = on_gates + weight * slopes[0]
        self.multipliers.grad = weight * slopes[1]
        self._optimizer.step()
        self._ascent.step()
        with torch.no_grad():
            self.log_alpha.clamp_(MIN_LOG_ALPHA, MAX_LOG_ALPHA)
        if not bool(torch.isfinite(self.log_alpha).all() & torch.isfinite(self.multipliers).all()):
            raise_not_finite("the gates or the Lagrangian's multipliers")

    def state_dict(self) -> dict[str, Any]:
        return {
            "log_alpha": self.log_alpha.detach().clone(),
            "multipliers": self.multipliers.detach().clone(),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "ascent": copy.deepcopy(self._ascent.state_dict()),
            "generator": self.generator.get_state(),
            "target": self._target,
            "z": self._z.clone(),
            "jacobian": self._jacobian.clone(),
            "value": self._value,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from `state_dict()` with a model on `device`; `costs` are set apart."""
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
            self.multipliers.copy_(state["multipliers"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._ascent.load_state_dict(state["ascent"])
        self.generator.set_state(state["generator"])
        self._target = state["target"]
        self._set(state["z"].clone(), state["jacobian"].clone(), state["value"], device)

    def _keep(self, target: float) -> int:
        return round(self.objective.layers * (1.0 - target))

    def _lagrangian(self) -> Tensor:
        if self.exact:
            return 0.0 * (self.log_alpha.sum() + self.multipliers.sum())
        reduction = self.objective.reduction(hard_concrete.p_open(self.log_alpha), self.costs)
        return lagrangian(reduction, self._target, *self.multipliers.unbind())

    def _set(self, z: Tensor, jacobian: Tensor, value: float, device: torch.device) -> None:
        """jacobian: (layers, layers), row i the gradient of z_i in log_alpha. A gate that was drawn 0 has no
        leaf whatever its slope: its attention does not run."""

        def leaf(number: float) -> Tensor:
            return torch.tensor(number, dtype=torch.float32, device=device, requires_grad=True)

        self._z, self._jacobian, self._value = z, jacobian, value
        moves = jacobian.abs().sum(1).tolist()
        self._leaves = [
            leaf(v) if v > 0.0 and slope else None for v, slope in zip(z.tolist(), moves, strict=True)
        ]
        self._probe = leaf(0.0)
