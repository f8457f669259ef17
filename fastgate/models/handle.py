"""What a patched encoder carries beside its weights, and the handle on it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastgate.errors import ArgumentError, CheckpointError, NothingPatched, Unsupported, format_error
from fastgate.models.architectures import find_encoders
from fastgate.models.inspection import Inspections
from fastgate.nn.choices import Pooling, ReplacementKind
from fastgate.nn.replacement import Replacement, make_replacement
from fastgate.runtime.context import ActivationTrace
from fastgate.runtime.executor import Executor
from fastgate.runtime.layer import Gate, is_skipped, replacement_of

POOLING_KEY = "fastgate_pooling"  # where a config says it; without it: first


@dataclass
class EncoderRuntime:
    """What a patched encoder carries beside its weights.

    reads: the rows that the head above it reads (architectures.OUTPUT_ROWS). None if nothing known does.
    gates: one an encoder layer. 1.0: the attention runs. 0.0: it is skipped. A 0-d tensor: it is gated.
    trace: what to record in, while recording. asked: the demand that `patch` was called with, if any.
    executor: runs its plans. inspections: what its modules were found to be. pooling: what the pooler reads.
    unfinished: the gates are being learned, so their values now are no result. frozen: whether `freeze` has
    packed weights. removed: the layers whose attention `prune` has dropped.
    """

    reads: str | None
    gates: list[Gate] = field(default_factory=list)
    trace: ActivationTrace | None = None
    asked: str | None = None
    executor: Executor = field(default_factory=Executor)
    inspections: Inspections = field(default_factory=Inspections)
    pooling: Pooling = "first"
    unfinished: bool = False
    frozen: bool = False
    removed: tuple[int, ...] = ()

    def forget(self) -> None:
        """Drop what was found in the modules, so that weights that were dropped are freed at once."""
        self.inspections = Inspections()
        self.executor.clear()

    @property
    def demand(self) -> str:
        """Rows to compute where a call does not say: `first`, `start`, `labelled`, `attended` or `every`."""
        if self.pooling == "mean":
            return "attended"
        if self.asked == "all" and self.reads != "every":
            return "attended"
        return self.reads or ("first" if self.asked == "first" else "attended")


class PrunedOtherwise(CheckpointError, RuntimeError):
    """A state dict has attention in other layers than the model; a RuntimeError, as torch's own are."""


class EncoderHandle:
    """The handle on a patched encoder: its gates, replacements, and a way to record what it computes."""

    def __init__(self, encoder: nn.Module):
        self.encoder: Any = encoder

    @property
    def runtime(self) -> EncoderRuntime:
        runtime: EncoderRuntime = self.encoder.fastgate_runtime
        return runtime

    @property
    def num_layers(self) -> int:
        return len(self.encoder.encoder.layer)

    @property
    def layers(self) -> list[Any]:
        """The encoder layers, modules of transformers."""
        return list(self.encoder.encoder.layer)

    @property
    def gates(self) -> list[Gate]:
        return list(self.runtime.gates)

    def set_gates(self, gates: Sequence[Gate]) -> None:
        """One gate a layer: 1.0 the attention runs, 0.0 it is skipped, a 0-d tensor it is gated."""
        if len(gates) != self.num_layers:
            raise ArgumentError(
                format_error(
                    "set_gates",
                    "gates",
                    f"{len(gates)} values",
                    f"{self.num_layers}, one a layer",
                    "pass one a layer",
                )
            )
        for i, gate in enumerate(gates):
            is_valid = gate.dim() == 0 if isinstance(gate, Tensor) else gate in (0.0, 1.0)
            if not is_valid:
                raise ArgumentError(
                    format_error(
                        "set_gates",
                        f"gates[{i}]",
                        gate,
                        "0.0, 1.0 or a 0-d tensor",
                        "harden it or pass a tensor",
                    )
                )
            if self.is_removed(i) and not is_skipped(gate):
                raise ArgumentError(
                    format_error(
                        "set_gates",
                        f"gates[{i}]",
                        gate,
                        "0.0, as its weights were pruned",
                        "load the unpruned model",
                    )
                )
        self.runtime.gates = list(gates)

    def is_removed(self, layer: int) -> bool:
        """Whether `prune` has dropped the weights of this layer's attention."""
        return hasattr(self.encoder.encoder.layer[layer].attention.self, "fastgate_removed")

    def check_layers(self, where: str) -> None:
        """Refuse layers added, removed or put in the place of others since `patch` and `prune`: the gates are
        not theirs."""
        if self.num_layers != len(self.runtime.gates):
            remedy = (
                "call fastgate.unpatch(model) before layers are added or removed, and fastgate.patch after"
            )
            wanted = f"{len(self.runtime.gates)}, as when the model was patched"
            raise Unsupported(
                format_error(where, "encoder.layer", f"{self.num_layers} layers", wanted, remedy)
            )
        now = tuple(i for i in range(self.num_layers) if self.is_removed(i))
        if now != self.runtime.removed:
            got, wanted = f"attention pruned in layers {list(now)}", f"in layers {list(self.runtime.removed)}"
            remedy = "put the layers back that were there, or change them before fastgate.prune"
            raise Unsupported(
                format_error(where, "encoder.layer", got, f"{wanted}, as fastgate.prune left it", remedy)
            )

    def check_state_dict(self, names: Collection[str], prefix: str) -> None:
        """Refuse a state dict of a model that was pruned otherwise, before anything of it is loaded.

        names: its names. prefix: of this encoder among them. While gates are learned, what is open now says
        nothing. Raises PrunedOtherwise.
        """
        if self.runtime.unfinished:
            return
        kept = [i for i, gate in enumerate(self.gates) if not is_skipped(gate)]
        layers = [f"{prefix}encoder.layer.{i}." for i in range(self.num_layers)]
        present = [
            i for i, at in enumerate(layers) if any(n.startswith(f"{at}attention.self.") for n in names)
        ]
        missing = [
            i
            for i, at in enumerate(layers)
            if i in kept and i not in present and f"{at}output.dense.weight" in names
        ]
        if present and missing:
            got = f"attention of layers {present} and none of layers {missing}"
            remedy = "load it into a model that was pruned with the same layers to keep"
            raise PrunedOtherwise(
                format_error("load_state_dict", "state_dict", got, f"that of layers {kept}", remedy)
            )

    def replacement(self, layer: int) -> Replacement | None:
        return replacement_of(self.encoder.encoder.layer[layer])

    def add_replacements(self, kind: ReplacementKind, layers: Sequence[int] | None = None) -> None:
        """Give each layer (or those named) a replacement; one of the same kind keeps its values."""
        for i, layer in enumerate(self.encoder.encoder.layer):
            if layers is None or i in layers:
                present = replacement_of(layer)
                if present is None or present.kind != kind:
                    # The LayerNorm may be wrapped, or have no weight of its own.
                    norm = layer.attention.output.LayerNorm
                    like = next(itertools.chain(norm.parameters(), layer.parameters()))
                    hidden = self.encoder.config.hidden_size
                    layer.attention.replacement = make_replacement(kind, hidden, like.dtype, like.device)

    def remove_replacements(self) -> None:
        for layer in self.encoder.encoder.layer:
            layer.attention._modules.pop("replacement", None)

    @contextmanager
    def record(self, every_row: bool = True) -> Iterator[ActivationTrace]:
        """While open, each forward fills the trace anew. every_row: as in ActivationTrace."""
        trace = ActivationTrace(every_row=every_row)
        self.runtime.trace = trace
        try:
            yield trace
        finally:
            self.runtime.trace = None


def check_module(where: str, model: object) -> None:
    """Refuse a name, a path or another object where a model is expected."""
    if not isinstance(model, nn.Module):
        remedy = "load it first: transformers.AutoModel.from_pretrained(name), or fastgate.load(path)"
        got = " ".join(repr(model).split())[:80]
        raise ArgumentError(format_error(where, "model", got, "a torch.nn.Module", remedy))


def get_encoder(model: nn.Module, where: str = "get_encoder") -> EncoderHandle:
    """The handle on the patched encoder inside `model`. where: the call that an error names.

    Raises NothingPatched if there is none, ArgumentError if there are several.
    """
    check_module(where, model)
    encoders = [item.encoder for item in find_encoders(model) if hasattr(item.encoder, "fastgate_runtime")]
    if not encoders:
        raise NothingPatched(
            format_error(
                where,
                "model",
                f"unpatched {type(model).__name__}",
                "a patched model",
                "call fastgate.patch(model)",
            )
        )
    if len(encoders) > 1:
        raise ArgumentError(
            format_error(where, "model", f"{len(encoders)} encoders", "one", "pass the encoder you mean")
        )
    return EncoderHandle(encoders[0])
