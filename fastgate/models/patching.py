"""`patch` and `unpatch`: verify everything, then swap the classes of an encoder and its head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastgate.errors import ArgumentError, NothingPatched, Unsupported, format_error
from fastgate.models import compat, sentence_transformers
from fastgate.models.architectures import LocatedEncoder, base_class, find_encoders, verify
from fastgate.models.freezing import thaw
from fastgate.models.handle import POOLING_KEY, EncoderHandle, EncoderRuntime, check_module
from fastgate.models.swapped_classes import SWAPPED, is_swapped
from fastgate.nn.choices import DEMANDS, POOLINGS, Demand, OutputRows, Pooling
from fastgate.runtime.executor import Executor

M = TypeVar("M", bound=nn.Module)


def patch(
    model: M, demand: Demand | None = None, *, pooling: Pooling | None = None, graphs: bool | None = None
) -> M:
    """Make every BERT or RoBERTa encoder inside `model` compute unpadded batches, in place.

    The outputs stay those of transformers on the output rows, which are the rows that the head reads. Other
    rows may not be computed, and come back as zeros. Everything is checked before anything is changed.
    Patching twice changes nothing.

    Heads for tokens and bare encoders also take the output rows of one call: `model(**batch, rows=mask)`,
    with a mask (batch, length) of bool. Labelled rows are always among them. In training they are the only
    ones by default.

    Args:
        model: A model of transformers or sentence-transformers, or any module that contains one.
        demand: The rows of a bare encoder that you read. "first" is token 0 of each sequence, "all" every
            attended token (the default). A head and a sentence-transformers model know their rows: CLS
            pooling reads one row, any other pooling all. The demand stays until `patch` is called with
            another one. Call `patch` again after you change the pooling of a sentence-transformers model.
        pooling: What the encoder's pooler reads. "first" is token 0, as in transformers. "mean" is the mean
            over the attended tokens, which are then all output rows; the mean of a sequence without a token
            is zeros. The default is the entry `fastgate_pooling` of the config, which checkpoints keep, else
            "first". transformers does not read that entry: unpatched, a model with "mean" reads token 0.
            "mean" is for heads that read the pooler alone, such as BertForSequenceClassification, and for
            bare encoders.
        graphs: Whether inference on a GPU captures CUDA graphs of small batches and replays them. The default
            is the model's current setting, at first True.

    Returns:
        The model.

    Raises:
        NothingPatched: If no supported encoder is inside.
        Unsupported: For decoders, cross-attention, replaced modules, hooks that would not run, a pooling that
            the head does not read, and installed libraries that lack a name fastgate uses.
        ArgumentError: For a demand that leaves out rows that are read.
    """
    check_module("patch", model)
    compat.check()
    if graphs is not None and not isinstance(graphs, bool):
        raise ArgumentError(
            format_error("patch", "graphs", repr(graphs), "True, False or None", "pass one of these")
        )
    encoders = _located(model)
    rows_by_module = sentence_transformers.output_rows_by_module(model)
    settings = []
    for located in encoders:
        verify(located)
        settings.append(_settings(located, rows_by_module.get(id(located.encoder)), demand, pooling))
    for located, wanted in zip(encoders, settings, strict=True):
        _swap(located, wanted)
        if graphs is not None:
            EncoderHandle(located.encoder).runtime.executor.use_graphs(graphs)
    for module in _models_around(model, encoders):
        module.__dict__.setdefault("save_pretrained", SaveWrapper(module))
    sentence_transformers.watch(model)
    return model


def _located(model: nn.Module) -> list[LocatedEncoder]:
    """The encoders inside a model. Raises NothingPatched if there is none."""
    encoders = list(find_encoders(model))
    if not encoders:
        wanted = "a BERT, RoBERTa, XLM-R or CamemBERT encoder or a head of transformers over one"
        remedy = "pass such a model (decoders, cross-attention and pre-LN models are not supported)"
        raise NothingPatched(format_error("patch", "model", type(model).__name__, wanted, remedy))
    return encoders


class SaveWrapper:
    """`save_pretrained` of a model whose class is the user's own, over a patched encoder.

    Its class would write a pruned encoder as if it were whole. auto_classes.py sets the function.
    """

    function: Any = None

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self).function(self.model, *args, **kwargs)


def _models_around(model: nn.Module, encoders: list[LocatedEncoder]) -> list[nn.Module]:
    """Models of transformers or the user's own classes that have an encoder inside and are not swapped."""
    inside = {located.encoder for located in encoders}
    return [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        and not is_swapped(module)
        and not inside.isdisjoint(module.modules())
    ]


@dataclass(frozen=True)
class _Settings:
    """What EncoderRuntime has under the same names."""

    reads: OutputRows | None
    asked: Demand | None
    pooling: Pooling


def _settings(
    located: LocatedEncoder, rows: OutputRows | None, demand: Demand | None, pooling: Pooling | None
) -> _Settings:
    """What an encoder is patched with. rows: those that sentence-transformers reads; None without it."""
    pooler_input = _pooling(located, rows, pooling)
    before: Any = getattr(located.encoder, "fastgate_runtime", None) or EncoderRuntime(None)
    asked = before.asked if demand is None else demand
    reads = located.reads or rows or before.reads
    if asked not in (None, *DEMANDS):
        raise ArgumentError(
            format_error("patch", "demand", repr(asked), '"first" or "all"', "pass one of these")
        )
    needed = "attended" if pooler_input == "mean" else reads
    if asked == "first" and needed not in (None, "first", "start"):
        head = "what stands above the encoder" if located.head is None else type(located.head).__name__
        remedy = 'leave demand out, or pass demand="all"'
        raise ArgumentError(
            format_error("patch", "demand", '"first"', f"the rows that {head} reads ({needed})", remedy)
        )
    return _Settings(reads, asked, pooler_input)


def _pooling(located: LocatedEncoder, rows: OutputRows | None, pooling: Pooling | None) -> Pooling:
    """What the pooler reads.

    rows: those that sentence-transformers reads, which reads no pooler; None without it. Where there is no
    pooler, or nobody reads it, what the config says has no meaning.
    """
    config, pooler = located.encoder.config, getattr(located.encoder, "pooler", None)
    asked: Any = getattr(config, POOLING_KEY, "first") if pooling is None else pooling
    if asked not in POOLINGS:
        remedy = "pass one of these"
        raise ArgumentError(format_error("patch", "pooling", repr(asked), '"first" or "mean"', remedy))
    is_read = pooler is not None and rows is None
    if asked == "first" or (pooling is None and not is_read):
        return "first"
    if (
        not is_read
        or located.reads not in (None, "first")
        or type(pooler) is not located.family.hf_class("Pooler")
    ):
        head = base_class(located.head or located.encoder).__name__
        got = f'"mean" for a {head}' if rows is None else '"mean" under sentence-transformers'
        wanted = "an encoder whose pooler, and no other row, is read, as in BertForSequenceClassification"
        remedy = 'leave it out, or pass "first"' if rows is None else "choose it in the Pooling module"
        raise Unsupported(format_error("patch", "pooling", got, wanted, remedy))
    return "mean"


def _swap(located: LocatedEncoder, settings: _Settings) -> None:
    encoder: Any = located.encoder
    if not hasattr(encoder, "fastgate_runtime"):
        gates: list[float | Tensor] = [1.0] * len(encoder.encoder.layer)
        encoder.fastgate_runtime = EncoderRuntime(settings.reads, gates, executor=Executor(cuda_graphs=True))
    runtime = EncoderHandle(encoder).runtime
    runtime.reads, runtime.asked, runtime.pooling = settings.reads, settings.asked, settings.pooling
    if settings.pooling == "first":
        encoder.config.__dict__.pop(POOLING_KEY, None)
    else:
        setattr(encoder.config, POOLING_KEY, settings.pooling)
    for module in (encoder, located.head):
        if module is not None and type(module) in SWAPPED:
            module.__class__ = SWAPPED[type(module)]


def unpatch(model: M) -> M:
    """Give every module its class of transformers back, in place.

    Args:
        model: A patched model with every attention in place. A frozen model is thawed first.

    Returns:
        The model.

    Raises:
        Unsupported: If attention was pruned or is gated, or a pooler reads the mean. The classes of
            transformers cannot run such a model.
    """
    check_module("unpatch", model)
    encoders = [located for located in find_encoders(model) if hasattr(located.encoder, "fastgate_runtime")]
    for located in encoders:
        handle = EncoderHandle(located.encoder)
        gated = [i for i, gate in enumerate(handle.gates) if isinstance(gate, Tensor) or gate != 1.0]
        if gated:
            got = f"layers {gated} without their whole attention"
            remedy = "load the unpruned model, or open the gates if the weights are still there"
            raise Unsupported(format_error("unpatch", "model", got, "every gate open", remedy))
        if handle.runtime.pooling == "mean":
            got, remedy = "a pooler that reads the mean", 'call fastgate.patch(model, pooling="first") before'
            raise Unsupported(
                format_error("unpatch", "model", got, "one that reads token 0, as theirs do", remedy)
            )
    thaw(model)
    sentence_transformers.unwatch(model)
    for module in _models_around(model, encoders):
        module.__dict__.pop("save_pretrained", None)
    for located in encoders:
        EncoderHandle(located.encoder).remove_replacements()
        del located.encoder.fastgate_runtime
        for part in (located.encoder, located.head):
            if part is not None:
                part.__class__ = base_class(part)
    return model
