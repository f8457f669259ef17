"""`patch` and `unpatch`: verify everything, then swap the classes of an encoder and its head."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastgate.errors import ArgumentError, NothingPatched, Unsupported, format_error
from fastgate.models import sentence_transformers
from fastgate.models.architectures import FAMILIES, Family, Found, base_class, find_encoders, verify
from fastgate.models.encoder_forward import forward_encoder
from fastgate.models.freezing import forward_frozen, thaw
from fastgate.models.handle import POOLING_KEY, POOLINGS, EncoderHandle, EncoderRuntime, check_module
from fastgate.models.head_forward import masked_lm, rows_read
from fastgate.nn.packed_linear import check_apply
from fastgate.runtime.executor import Executor


def patch(
    model: nn.Module,
    demand: str | None = None,
    *,
    pooling: str | None = None,
    graphs: bool | None = None,
) -> nn.Module:
    """Make every BERT or RoBERTa encoder inside `model` run packed rows, in place, and return the model.

    The outputs stay Hugging Face's on the rows the head reads; rows nobody reads are not computed and come
    back as zeros. Everything is checked before anything is changed; patching twice changes nothing.

    demand: the rows of a bare encoder that you read: "first" token 0 of each sequence, "all" (the default)
    every attended one. A head and a sentence-transformers model know theirs: CLS pooling reads one row, any
    other pooling all. "all" computes the attended rows there too; fewer than are read is refused. The demand
    stays until `patch` is called with another. `encode` of a sentence-transformers model that asks for the
    tokens, or whose pooling was changed, has all attended rows computed from then on; other calls of a model
    whose pooling was changed need `patch` once more.

    Heads for tokens and bare encoders also take the rows of one call: `model(**batch, rows=mask)`, mask
    (batch, length) bool. Labelled rows are always among them; in training they are the only ones by default.

    pooling: what the encoder's pooler reads: "first" token 0, as in transformers, or "mean" the mean over the
    attended rows, which are then all demanded; a sequence without one has zeros for a mean. None: what the
    config says as `fastgate_pooling`, where it is kept, so that checkpoints have it; "first" if nothing.
    transformers does not read that: unpatched, a model with "mean" would read token 0. For encoders whose
    pooler alone is read, as BertForSequenceClassification does, and bare ones; RoBERTa's head for sequences
    reads token 0 by itself.

    graphs: whether inference on a GPU captures CUDA graphs of small batches and replays them, as
    fastgate/runtime/cuda_graphs.py says; None: as the model has it, at first yes.

    Raises NothingPatched if no known encoder is inside, Unsupported for decoders, cross-attention, replaced
    modules and hooks that would not run, and a pooling that the model's head does not read, ArgumentError for
    a demand that leaves out rows that are read.
    """
    check_module("patch", model)
    if graphs is not None and not isinstance(graphs, bool):
        raise ArgumentError(
            format_error("patch", "graphs", repr(graphs), "True, False or None", "pass one of these")
        )
    found = list(find_encoders(model))
    if not found:
        raise NothingPatched(
            format_error(
                "patch",
                "model",
                type(model).__name__,
                "a BERT, RoBERTa, XLM-R or CamemBERT encoder or a head of transformers over one",
                "pass such a model (decoders, cross-attention and pre-LN models are not supported)",
            )
        )
    pooled = sentence_transformers.rows_read(model)
    wanted = []
    for item in found:
        verify(item)
        rows = pooled.get(id(item.encoder))
        how = _pooling(item, rows, pooling)
        wanted.append((*_demand(item, rows, demand, how), how))
    for item, settings in zip(found, wanted, strict=True):
        _swap(item, *settings)
        if graphs is not None:
            runtime: EncoderRuntime = item.encoder.fastgate_runtime  # type: ignore[assignment]
            runtime.executor.use_graphs(graphs)
    for module in _around(model, found):
        module.__dict__.setdefault("save_pretrained", SaveAround(module))
    sentence_transformers.watch(model)
    return model


class SaveAround:
    """`save_pretrained` of a model whose class is the user's own, over a patched encoder.

    Its class would write a pruned encoder as if it were whole. pretrained.py sets the function.
    """

    function: Any = None

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self).function(self.model, *args, **kwargs)


def _around(model: nn.Module, found: list[Found]) -> list[nn.Module]:
    """Models of transformers or the user's own classes that have an encoder inside and are not swapped."""
    encoders = {item.encoder for item in found}
    return [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        and type(module) not in SWAPPED.values()
        and not encoders.isdisjoint(module.modules())
    ]


def _pooling(found: Found, pooled: str | None, pooling: str | None) -> str:
    """What the pooler reads. pooled: the rows sentence-transformers reads, which reads no pooler; None: it is
    not there. What a config says is of no meaning where there is no pooler, or nobody reads it."""
    config, pooler = found.encoder.config, getattr(found.encoder, "pooler", None)
    asked = getattr(config, POOLING_KEY, "first") if pooling is None else pooling
    if asked not in POOLINGS:
        remedy = "pass one of these"
        raise ArgumentError(format_error("patch", "pooling", repr(asked), '"first" or "mean"', remedy))
    read = pooler is not None and pooled is None
    if asked == "first" or (pooling is None and not read):
        return "first"
    if not read or found.reads not in (None, "first") or type(pooler) is not found.family.hf_class("Pooler"):
        head = base_class(found.head or found.encoder).__name__
        got = f'"mean" for a {head}' if pooled is None else '"mean" under sentence-transformers'
        wanted = "an encoder whose pooler, and no other row, is read, as in BertForSequenceClassification"
        remedy = 'leave it out, or pass "first"' if pooled is None else "choose it in the Pooling module"
        raise Unsupported(format_error("patch", "pooling", got, wanted, remedy))
    return "mean"


def _demand(
    found: Found, pooled: str | None, demand: str | None, pooling: str
) -> tuple[str | None, str | None]:
    """The rows that are read and those asked for (see Runtime); what is not known anew stays as it was."""
    before = getattr(found.encoder, "fastgate_runtime", None) or EncoderRuntime(None)
    reads, asked = found.reads or pooled or before.reads, before.asked if demand is None else demand
    if asked not in (None, "first", "all"):
        raise ArgumentError(
            format_error("patch", "demand", repr(asked), '"first" or "all"', "pass one of these")
        )
    rows = "attended" if pooling == "mean" else reads
    if asked == "first" and rows not in (None, "first", "start"):
        head = type(found.head).__name__ if found.head is not None else "what stands above the encoder"
        remedy = 'leave demand out, or pass demand="all"'
        raise ArgumentError(
            format_error("patch", "demand", '"first"', f"the rows that {head} reads ({rows})", remedy)
        )
    return reads, asked


def _swap(found: Found, reads: str | None, asked: str | None, pooling: str) -> None:
    if not hasattr(found.encoder, "fastgate_runtime"):
        layers = len(found.encoder.encoder.layer)  # type: ignore[union-attr, arg-type]
        found.encoder.fastgate_runtime = EncoderRuntime(
            reads, [1.0] * layers, executor=Executor(cuda_graphs=True)
        )  # type: ignore[assignment]
    runtime = EncoderHandle(found.encoder).runtime
    runtime.reads, runtime.asked, runtime.pooling = reads, asked, pooling
    if pooling == "first":
        found.encoder.config.__dict__.pop(POOLING_KEY, None)
    else:
        setattr(found.encoder.config, POOLING_KEY, pooling)
    for module in (found.encoder, found.head):
        if module is not None and type(module) in SWAPPED:
            module.__class__ = SWAPPED[type(module)]


def unpatch(model: nn.Module) -> nn.Module:
    """Give every module its Hugging Face class back, in place, and return the model.

    Raises Unsupported if attention was pruned or is gated, or a pooler reads the mean: transformers' classes
    cannot run such a model.
    """
    check_module("unpatch", model)
    found = [item for item in find_encoders(model) if hasattr(item.encoder, "fastgate_runtime")]
    for item in found:
        state = EncoderHandle(item.encoder)
        closed = [i for i, gate in enumerate(state.gates) if isinstance(gate, Tensor) or gate != 1.0]
        if closed:
            raise Unsupported(
                format_error(
                    "unpatch",
                    "model",
                    f"layers {closed} without their whole attention",
                    "every gate open",
                    "load the unpruned model, or open the gates if the weights are still there",
                )
            )
        if state.runtime.pooling == "mean":
            got, remedy = "a pooler that reads the mean", 'call fastgate.patch(model, pooling="first") before'
            raise Unsupported(
                format_error("unpatch", "model", got, "one that reads token 0, as theirs do", remedy)
            )
    thaw(model)
    sentence_transformers.unwatch(model)
    for around in _around(model, found):
        around.__dict__.pop("save_pretrained", None)
    for item in found:
        EncoderHandle(item.encoder).remove_replacements()
        del item.encoder.fastgate_runtime
        for module in (item.encoder, item.head):
            if module is not None:
                module.__class__ = base_class(module)
    return model


# How many rows there are is a matter of data, and a graph for each number would be compiled again and again:
# torch.compile leaves the encoder, whose steps are compiled kernels and library products, as it is.
_uncompiled = torch.compiler.disable(forward_encoder, reason="fastgate's encoder runs packed rows")


def _swapped_class(family: Family, hf: type[nn.Module], demand: str) -> type[nn.Module]:
    """A subclass under the same name, so that pipelines, configs and pickles see the old class."""
    body: dict[str, Any] = {"fastgate_demand": demand, "__module__": __name__, "__doc__": hf.__doc__}
    if hf.__name__ == family.prefix + "Model":
        body |= {
            "forward": _encoder_forward(hf.forward),
            "_apply": _apply,
            "_load_from_state_dict": _load_from_state_dict,
        }
    elif demand == "labelled":
        body["forward"] = _head_forward(family, hf.__name__, hf.forward)
    return type(hf.__name__, (hf,), body)


def _encoder_forward(original: Any) -> Any:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = _uncompiled if torch.compiler.is_compiling() else forward_encoder
        if self.fastgate_runtime.frozen:
            return forward_frozen(run, self, *args, **kwargs)
        return run(self, *args, **kwargs)

    return forward


def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
    """`to` and the like, once it is known that all weights can be where they would be then."""
    check_apply(self, fn)
    return base_class(self)._apply(self, fn, recurse)


def _load_from_state_dict(self: Any, state_dict: Any, prefix: str, *rest: Any) -> None:
    """As in torch, which without `strict` would not say that attention is missing."""
    EncoderHandle(self).check_state_dict(state_dict, prefix)
    base_class(self)._load_from_state_dict(self, state_dict, prefix, *rest)


def _head_forward(family: Family, name: str, original: Any) -> Any:
    """The forward of a head whose labels decide which rows are read."""
    names = list(inspect.signature(original).parameters)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names[1:], args, strict=False)) | kwargs
        rows = rows_read(self, getattr(self, family.attribute).fastgate_runtime, given)
        if name.endswith(("ForMaskedLM", "ForPreTraining")):
            return masked_lm(self, family, rows, given, return_dict=given.pop("return_dict", None))
        if rows is not None:
            kwargs["rows"] = rows
        return original(self, *args, **kwargs)

    return forward


def _swapped_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Encoders and heads: a model of such a class is patched. Each is in this module by name, for pickle."""
    swapped = {}
    for family in FAMILIES:
        for name, demand in family.heads().items():
            hf = getattr(family.module, name)
            swapped[hf] = globals()[name] = _swapped_class(family, hf, demand)
    return swapped


SWAPPED = _swapped_classes()  # the class of transformers -> that of a patched model
