"""Which calls of a Pruner may come next, with errors that name the call that is missing or too much."""

from __future__ import annotations

from typing import Any, Literal

from fastgate.errors import ArgumentError, format_error
from fastgate.pruning.schedule import Schedule

State = Literal["open", "closed", "detached", "finalized"]
WORKING: tuple[State, ...] = ("open",)
# Call -> the states in which it makes sense, where these are not WORKING.
TRAINING: tuple[State, ...] = ("open", "closed")
NOT_DETACHED: tuple[State, ...] = ("open", "closed", "finalized")
ALLOWED = {"finalize": NOT_DETACHED, "state_dict": NOT_DETACHED} | dict.fromkeys(
    ("harden", "detach", "load_state_dict", "reopen", "prepare_optimizer"), TRAINING
)

GOT: dict[State, tuple[str, str]] = {
    "open": ("open", ""),
    "closed": ("closed", "call reopen() to go on, or make a new Pruner"),
    "detached": ("detached", "make a new Pruner"),
    "finalized": (
        "finalized",
        "make a new Pruner for a dense model; the pruned one trains as any other model does",
    ),
}


class CallOrder:
    """Where a Pruner is in `prepare`, forward, `loss`, backward, optimizer step, `step`, and whether it is at
    work at all."""

    def __init__(self) -> None:
        self.state: State = "open"
        self._prepared = False
        self._replaced: tuple[Any, Any] | None = None  # a batch whose tokens were swapped, and its ids

    def check(self, call: str) -> None:
        """Raises ArgumentError if `call` makes no sense in this state."""
        if self.state not in ALLOWED.get(call, WORKING):
            got, remedy = GOT[self.state]
            raise ArgumentError(format_error(f"Pruner.{call}", "pruner", got, "one that prunes", remedy))

    def prepare(self, inputs: Any, prepared: Any) -> None:
        """A batch was prepared."""
        self._prepared = True
        self._replaced = None if prepared is inputs else (inputs, inputs.get("input_ids"))

    def loss(self, inputs: Any) -> None:
        """Raises ArgumentError unless a batch was prepared since the last loss, and `inputs` is what came of
        it."""
        if not self._prepared:
            got, wanted = "no prepare() since the last loss", "one before each forward"
            remedy = "run the model on batch = pruner.prepare(batch), then call pruner.loss(outputs, batch)"
            raise ArgumentError(format_error("Pruner.loss", "pruner.prepare", got, wanted, remedy))
        if self._replaced is not None:
            batch, ids = self._replaced
            if inputs is batch or (ids is not None and inputs.get("input_ids") is ids):
                got, wanted = "the batch as it was before prepare()", "the one that prepare() returned"
                remedy = "write batch = pruner.prepare(batch): tokens are swapped in every other step"
                raise ArgumentError(format_error("Pruner.loss", "batch", got, wanted, remedy))

    def taken(self) -> None:
        """The loss of the prepared batch was computed."""
        self._prepared, self._replaced = False, None

    @staticmethod
    def step(losses: int, has_gradient: bool) -> None:
        """Raises ArgumentError for an optimizer step without a loss that was differentiated."""
        if has_gradient:
            return
        got = "no gradient" if losses else "no call since the last step"
        wanted = "one or more in each optimizer step, and its backward()"
        remedy = "call pruner.loss(outputs, batch).backward(), then optimizer.step(), then pruner.step()"
        raise ArgumentError(format_error("Pruner.step", "pruner.loss", got, wanted, remedy))

    @staticmethod
    def not_hardened(steps: int, schedule: Schedule | None) -> ArgumentError:
        """The error of a `finalize` that comes too early."""
        got = f"not hardened after {steps} steps"
        wanted = "hardened gates" if schedule is None else f"gates hardened in step {schedule.harden}"
        remedy = "train to the end, or call harden() to prune as far as the search is"
        return ArgumentError(format_error("Pruner.finalize", "gates", got, wanted, remedy))

    @staticmethod
    def other_forwards(count: int) -> ArgumentError:
        """The error of a `loss` after more than one forward: the last one's activations would be compared."""
        got, wanted = f"{count} forwards of the model since prepare()", "one"
        remedy = "evaluate before prepare or after loss, and call loss after each forward"
        return ArgumentError(format_error("Pruner.loss", "outputs", got, wanted, remedy))

    @staticmethod
    def no_forward() -> ArgumentError:
        """The error of a `loss` for outputs of an earlier forward."""
        got, wanted = "no forward since prepare()", "those of the forward just run"
        remedy = "run the model between prepare and loss"
        return ArgumentError(format_error("Pruner.loss", "outputs", got, wanted, remedy))
