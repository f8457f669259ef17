"""`patch` and `unpatch`: verify everything, then swap the classes of an encoder and its head."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from .errors import NothingPatched, Unsupported, say
from .families import FAMILIES, Family, Found, base_class, find_encoders, verify
from .forward import forward_encoder
from .graphs import Graphs
from .state import EncoderState, Runtime


def patch(model: nn.Module, *, graphs: bool | None = None) -> nn.Module:
    """Make every BERT or RoBERTa encoder inside `model` run packed rows, in place, and return the model.

    The outputs stay Hugging Face's on the rows the head reads; rows nobody reads are not computed and come
    back as zeros. Everything is checked before anything is changed; patching twice changes nothing.

    graphs: whether inference on a GPU captures CUDA graphs of small batches and replays them, as
    fastgate/graphs.py says; None: as the model has it, at first yes.

    Raises NothingPatched if no known encoder is inside, Unsupported for decoders, cross-attention, replaced
    modules and hooks that would not run.
    """
    found = list(find_encoders(model))
    if not found:
        raise NothingPatched(
            say(
                "patch",
                "model",
                type(model).__name__,
                "a BERT, RoBERTa, XLM-R or CamemBERT encoder or a head of transformers over one",
                "pass such a model (decoders, cross-attention and pre-LN models are not supported)",
            )
        )
    for item in found:
        verify(item)
    for item in found:
        _swap(item)
        if graphs is not None:
            runtime: Runtime = item.encoder.fastgate_runtime  # type: ignore[assignment]
            runtime.graphs = (runtime.graphs or Graphs()) if graphs else None
    return model


def _swap(found: Found) -> None:
    if not hasattr(found.encoder, "fastgate_runtime"):
        layers = len(found.encoder.encoder.layer)  # type: ignore[union-attr, arg-type]
        found.encoder.fastgate_runtime = Runtime(found.demand, [1.0] * layers, graphs=Graphs())  # type: ignore[assignment]
    for module in (found.encoder, found.head):
        if module is not None and type(module) in SWAPPED:
            module.__class__ = SWAPPED[type(module)]


def unpatch(model: nn.Module) -> nn.Module:
    """Give every module its Hugging Face class back, in place, and return the model.

    Raises Unsupported if attention was pruned or is gated: transformers' classes cannot run such a model.
    """
    found = [item for item in find_encoders(model) if hasattr(item.encoder, "fastgate_runtime")]
    for item in found:
        state = EncoderState(item.encoder)
        closed = [i for i, gate in enumerate(state.gates) if isinstance(gate, Tensor) or gate != 1.0]
        if closed:
            raise Unsupported(
                say(
                    "unpatch",
                    "model",
                    f"layers {closed} without their whole attention",
                    "every gate open",
                    "load the unpruned model, or open the gates if the weights are still there",
                )
            )
    for item in found:
        EncoderState(item.encoder).remove_replacements()
        del item.encoder.fastgate_runtime
        for module in (item.encoder, item.head):
            if module is not None:
                module.__class__ = base_class(module)
    return model


def _swapped_class(family: Family, hf: type[nn.Module], demand: str) -> type[nn.Module]:
    """A subclass under the same name, so that pipelines, configs and pickles see the old class."""
    original = hf.forward
    names = list(inspect.signature(original).parameters)

    if hf.__name__ == family.prefix + "Model":

        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return forward_encoder(self, *args, **kwargs)

    else:

        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names[1:], args, strict=False)) | kwargs
            if given.get("labels") is not None:
                kwargs["fastgate_rows"] = given["labels"] != -100
            return original(self, *args, **kwargs)

    body = {"forward": forward, "fastgate_demand": demand, "__module__": __name__, "__doc__": hf.__doc__}
    return type(hf.__name__, (hf,), body)


def _swapped_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Encoders, and heads whose labels decide the demand; each in this module by name, for pickle."""
    swapped = {}
    for family in FAMILIES:
        for name, demand in family.heads().items():
            if demand in ("attended", "labelled"):
                hf = getattr(family.module, name)
                swapped[hf] = globals()[name] = _swapped_class(family, hf, demand)
    return swapped


SWAPPED = _swapped_classes()
