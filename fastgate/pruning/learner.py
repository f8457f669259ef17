"""GateLearner: the gates' log-alpha and the Lagrangian's multipliers, drawn and moved on the host.

The device sees a draw as one 0-d leaf a gate, and the Lagrangian as one more leaf, the probe, beside a number
computed on the host. Their gradients come back in one small transfer an optimizer step; the chain rule is
finished on the host:

    d loss / d log_alpha = d loss / d z * dz / d log_alpha + d loss / d probe * d lagrangian / d log_alpha

The probe's gradient is the weight the Lagrangian had in what was differentiated, so accumulation and loss
scaling act on it as on every other term.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import gates
from ..errors import ArgumentError, say
from .measure import mean_over_ranks
from .objective import Costs, Objective, lagrangian

# Where every gate starts, which is the most it can reach, P(open) = 0.98; and the least, 0.01. A gate that is
# all but certain is drawn the same every time and has no gradient from the task: between several such, chance
# would decide.
LOG_ALPHA, LEAST = 2.5, -6.0


class GateLearner:
    """All of it is on the host but the leaves of the current draw. costs: set once measured (Speedup)."""

    def __init__(self, objective: Objective, lr: float, seed: int):
        self.objective = objective
        layers = objective.layers
        self.log_alpha = torch.full((layers,), LOG_ALPHA, requires_grad=True)
        self.multipliers = torch.zeros(2, requires_grad=True)  # of the gap and of its square
        self.generator = torch.Generator().manual_seed(seed)
        self.costs: Costs | None = None
        self._optimizer = torch.optim.Adam([self.log_alpha], lr=lr)
        self._ascent = torch.optim.Adam([self.multipliers], lr=lr, maximize=True)
        self._target = 0.0
        self._set(torch.ones(layers), torch.zeros(layers), 0.0, torch.device("cpu"))

    @property
    def p_open(self) -> Tensor:
        """(layers,) P(open) of each gate."""
        return gates.p_open(self.log_alpha.detach())

    @torch.enable_grad()
    def draw(self, target: float, device: torch.device) -> None:
        """Draw the next step's gates, for a model on `device` and a reduction asked for of `target`."""
        z = gates.draw(self.log_alpha, self.generator)
        (slope,) = torch.autograd.grad(z.sum(), self.log_alpha)
        self._target = target
        self._set(z.detach(), slope, float(self._lagrangian().detach()), device)

    @property
    def drawn(self) -> list[float | Tensor]:
        """The current draw as the encoder takes it: 0.0, 1.0, or a leaf between."""
        return [
            float(z) if leaf is None else leaf for z, leaf in zip(self._z.tolist(), self._leaves, strict=True)
        ]

    def term(self) -> Tensor:
        """The Lagrangian at the current draw; 0-d on the device, no transfer back."""
        return self._probe + self._value

    @torch.enable_grad()
    def learn(self, grad_scale: float) -> None:
        """Move log-alpha down and the multipliers up, by the gradients that backward left in the leaves."""
        if self._probe.grad is None:
            raise ArgumentError(
                say(
                    "Pruner.step",
                    "pruner.loss",
                    "no gradient",
                    "its value in the loss that was differentiated",
                    "call (task_loss + pruner.loss(outputs, inputs)).backward() before step()",
                )
            )
        zero = torch.zeros_like(self._probe)
        found = [zero if leaf is None or leaf.grad is None else leaf.grad for leaf in self._leaves]
        grads = torch.stack([self._probe.grad, *found]).cpu()
        weight, *on_draw = (mean_over_ranks(grads) / grad_scale).unbind()
        on_gates = torch.stack(on_draw) * self._slope
        if not bool(torch.isfinite(on_gates).all() & torch.isfinite(weight)):
            return  # a scaled loss overflowed: the optimizer of the weights skips this step too
        slopes = torch.autograd.grad(self._lagrangian(), (self.log_alpha, self.multipliers))
        self.log_alpha.grad = on_gates + weight * slopes[0]
        self.multipliers.grad = weight * slopes[1]
        self._optimizer.step()
        self._ascent.step()
        with torch.no_grad():
            self.log_alpha.clamp_(LEAST, LOG_ALPHA)

    def state_dict(self) -> dict[str, Any]:
        return {
            "log_alpha": self.log_alpha.detach().clone(),
            "multipliers": self.multipliers.detach().clone(),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "ascent": copy.deepcopy(self._ascent.state_dict()),
            "generator": self.generator.get_state(),
            "target": self._target,
            "z": self._z.clone(),
            "slope": self._slope.clone(),
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
        self._set(state["z"].clone(), state["slope"].clone(), state["value"], device)

    def _lagrangian(self) -> Tensor:
        reduction = self.objective.reduction(gates.p_open(self.log_alpha), self.costs)
        return lagrangian(reduction, self._target, *self.multipliers.unbind())

    def _set(self, z: Tensor, slope: Tensor, value: float, device: torch.device) -> None:
        def leaf(number: float) -> Tensor:
            return torch.tensor(number, dtype=torch.float32, device=device, requires_grad=True)

        self._z, self._slope, self._value = z, slope, value
        self._leaves = [leaf(v) if 0.0 < v < 1.0 else None for v in z.tolist()]
        self._probe = leaf(0.0)
