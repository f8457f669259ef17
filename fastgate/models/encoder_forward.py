"""The forward of a patched encoder, with the arguments and outputs of transformers.

Validate, unpad, plan, execute, pad.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, Unsupported, format_error
from fastgate.models import compat
from fastgate.models.handle import EncoderHandle, EncoderRuntime
from fastgate.models.inspection import Inspection, verify_places
from fastgate.ops import torch_compat
from fastgate.ops.autograd import is_transformed
from fastgate.ops.ragged import HOST, on_device
from fastgate.ops.registry import bypasses_dispatcher
from fastgate.runtime.context import ForwardContext
from fastgate.runtime.embedding_inputs import CalledModule, EmbeddingInputs, GivenVectors, PaddedIds, TokenIds
from fastgate.runtime.layer import is_skipped, layers_that_mix
from fastgate.runtime.plan import Plan, make_plan
from fastgate.runtime.unpadding import UnpaddedBatch, on_host, unpad, unpad_full

_UNPATCH = "call fastgate.unpatch(model) first"


@dataclass
class EncoderCall:
    """A call of an encoder, once its arguments are checked.

    shape: (batch, length). device: of the input. attended: (batch, length) bool on the host. None: every
    token. rows: likewise, those that this call reads. None: the call does not say. hidden_states: which are
    asked for, 0 for the embeddings. None: none. attentions: whether they are asked for.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    shape: tuple[int, int]
    device: torch.device
    attended: Tensor | None
    rows: Tensor | None
    hidden_states: set[int] | None
    attentions: bool
    return_dict: bool

    @property
    def reads_every_row(self) -> bool:
        """Whether every row is read, padding too."""
        return self.hidden_states is not None or self.attentions


def forward_encoder(
    encoder: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    rows: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The forward of a patched encoder. Arguments and outputs are those of transformers, and one more.

    rows: (batch, length) bool, the rows that this call reads. Every other row may come back as zeros.
    """
    _refuse_arguments(encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache, kwargs)
    _refuse_transforms()
    shape, device = _shape_of(input_ids, inputs_embeds)
    runtime: EncoderRuntime = encoder.fastgate_runtime
    inspection = runtime.inspections.of(encoder)
    if len(inspection.layers) != len(runtime.gates) or inspection.removed != runtime.removed:
        EncoderHandle(encoder).check_layers("forward")
    hidden_states, attentions, return_dict = _requested_outputs(
        encoder.config, len(inspection.layers), kwargs
    )
    if rows is not None:
        rows = checked_rows(rows, shape, None if runtime.pooling == "mean" else runtime.reads)
    attended, rows = on_host(_attended(attention_mask, *shape), rows)
    if attended is not None and bool(attended.all()):
        attended = None
    call = EncoderCall(
        input_ids, inputs_embeds, token_type_ids, position_ids,
        shape, device, attended, rows, hidden_states, attentions, return_dict,
    )  # fmt: skip
    context = _context(encoder, runtime, inspection, call)
    try:
        hidden = runtime.executor.run(context)
    except (RuntimeError, ArgumentError):
        verify_places(encoder)  # a weight that is elsewhere is the reason, and has a name
        raise
    return _outputs(encoder, runtime, call, context, hidden)


def _context(
    encoder: Any, runtime: EncoderRuntime, inspection: Inspection, call: EncoderCall
) -> ForwardContext:
    """Unpad the batch, and plan what runs on it."""
    trace = runtime.trace
    records_every_row = trace is not None and trace.every_row
    unpadded = _unpadded(encoder, runtime, call, records_every_row)
    if trace is not None:
        trace.begin(call.shape[1])
    capture = call.hidden_states is not None or records_every_row
    return ForwardContext(
        inspection,
        runtime.gates,
        unpadded,
        plan_of_encoder(encoder, inspection, unpadded, capture),
        _embedding_inputs(encoder, inspection, call),
        encoder.training,
        trace,
        None if call.hidden_states is None else [],
        {} if call.attentions else None,
        runtime.executor.step_hook,
    )


def _unpadded(
    encoder: Any, runtime: EncoderRuntime, call: EncoderCall, records_every_row: bool
) -> UnpaddedBatch:
    (batch, length), device, attended, rows = call.shape, call.device, call.attended, call.rows
    follows_halo = (
        rows is None
        and not call.reads_every_row
        and not records_every_row
        and not runtime.executor.captures(device)
    )
    halo = halo_of(encoder) if follows_halo else 0
    is_plain_batch = (
        call.input_ids is not None and bypasses_dispatcher(call.input_ids) and device.type == "cpu"
    )
    if is_plain_batch and attended is None and rows is None and not call.reads_every_row:
        first = runtime.demand in ("first", "start")
        return unpad_full(batch, length, first, torch.is_inference_mode_enabled(), halo)
    outputs = output_row_mask(encoder, attended, rows, call.reads_every_row, call.shape, HOST)
    return unpad(batch, length, attended, outputs, device, halo)


def _outputs(
    encoder: Any, runtime: EncoderRuntime, call: EncoderCall, context: ForwardContext, hidden: Tensor
) -> Any:
    """What transformers' encoder returns. hidden: (batch, length, hidden) of the last layer."""
    pooler = getattr(encoder, "pooler", None)
    pooled = hidden if runtime.pooling == "first" else _mean(hidden, call.attended)
    output = compat.EncoderOutput(
        last_hidden_state=hidden,
        pooler_output=None if pooler is None else pooler(pooled),
    )
    if call.hidden_states is not None and context.hidden_states is not None:
        states = enumerate((*context.hidden_states[:-1], hidden))
        output["hidden_states"] = tuple(h if i in call.hidden_states else None for i, h in states)
    if context.probabilities is not None:
        output["attentions"] = tuple(context.probabilities.get(i) for i in range(len(context.layers)))
        output["cross_attentions"] = ()  # as in transformers
    return output if call.return_dict else output.to_tuple()


def _mean(hidden: Tensor, attended: Tensor | None) -> Tensor:
    """(batch, length, hidden) -> (batch, 1, hidden), where a pooler looks for token 0.

    The mean of each sequence's attended rows, summed in float32. Zeros where there are none. attended: on the
    host. None: all.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if attended is None:
        return hidden.mean(1, keepdim=True, dtype=dtype).to(hidden.dtype)
    mask, count = on_device([attended, attended.sum(1).clamp(min=1)], hidden.device)
    total = (hidden * mask[:, :, None]).sum(1, keepdim=True, dtype=dtype)
    return (total / count[:, None, None]).to(hidden.dtype)


def _requested_outputs(
    config: Any, layers: int, kwargs: dict[str, Any]
) -> tuple[set[int] | None, bool, bool]:
    """Which hidden states a call asks for, whether it asks for attentions, and whether for a dictionary."""

    def option(name: str, default: Any) -> Any:
        value = kwargs.get(name)
        return getattr(config, name, default) if value is None else value

    hidden_states = _selected_layers(option("output_hidden_states", None), layers, config.num_hidden_layers)
    return hidden_states, bool(option("output_attentions", False)), bool(option("return_dict", True))


def _selected_layers(selection: Any, layers: int, config_layers: int) -> set[int] | None:
    """The indices that `output_hidden_states` (True, an int or ints) asks for.

    0 and an empty list ask for none, as in transformers. config_layers: how many layers negative indices
    count from.
    """
    if not selection:
        return None
    if selection is True:
        return set(range(layers + 1))
    indices = [selection] if isinstance(selection, int) else list(selection)
    if not all(isinstance(i, int) for i in indices):
        wanted = "True, an int or a list of ints"
        raise Unsupported(
            format_error("forward", "output_hidden_states", selection, wanted, "pass one of these")
        )
    counted = (i if i >= 0 else i + config_layers + 1 for i in indices)
    return {i for i in counted if 0 <= i <= layers}


def halo_of(encoder: Any) -> int:
    """How many tokens to either side of the row that a head reads are needed above the last attention.

    One for each token shift there. 0 where more rows are read: those beside them are nearly all there is.
    """
    runtime: EncoderRuntime = encoder.fastgate_runtime
    if runtime.demand not in ("first", "start"):
        return 0
    top = max((i for i, gate in enumerate(runtime.gates) if not is_skipped(gate)), default=-1)
    mixing = layers_that_mix(encoder.encoder.layer, runtime.gates)
    return sum(step.hops for i, step in mixing if i > top)


def plan_of_encoder(encoder: Any, inspection: Inspection, unpadded: UnpaddedBatch, capture: bool) -> Plan:
    """The plan of a patched encoder for an unpadded batch, with its gates as they are now.

    capture: as in make_plan.
    """
    gates = encoder.fastgate_runtime.gates
    attends = tuple(not is_skipped(gate) for gate in gates)
    top = max((i for i, runs in enumerate(attends) if runs), default=None)
    absorbable = top is not None and inspection.layers[top].absorbable
    return make_plan(
        attends,
        unpadded.has_other_rows,
        unpadded.one_query_per_sequence and absorbable and not unpadded.has_halo,
        capture,
        layers_that_mix(encoder.encoder.layer, gates),
        unpadded.has_halo,
    )


def _refuse_arguments(states: Any, mask: Any, cache: Any, use_cache: Any, kwargs: dict[str, Any]) -> None:
    unsupported = {
        "encoder_hidden_states": states,
        "encoder_attention_mask": mask,
        "past_key_values": cache,
    }
    for name, value in unsupported.items():
        if value is not None:
            raise Unsupported(format_error("forward", name, type(value).__name__, "None", _UNPATCH))
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if kwargs.get(name) is not None:
            remedy = (
                f"pass a padded batch (sentence-transformers: model[0].unpad_inputs = False), or {_UNPATCH}"
            )
            raise Unsupported(format_error("forward", name, "rows without padding", "None", remedy))
    for name, value in {"use_cache": use_cache, "is_causal": kwargs.get("is_causal")}.items():
        if value:
            raise Unsupported(format_error("forward", name, value, "False", _UNPATCH))


def _refuse_transforms() -> None:
    if is_transformed():
        got, wanted = "torch.func or forward-mode differentiation", "autograd's backward"
        raise Unsupported(format_error("forward", "derivatives", got, wanted, _UNPATCH))
    if torch_compat.is_tracing() or torch.compiler.is_exporting():
        got, wanted = "torch.jit.trace or torch.export", "eager mode or torch.compile"
        remedy = "export an unpruned model, after fastgate.unpatch(model)"
        raise Unsupported(format_error("forward", "model", got, wanted, remedy))


def _shape_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[tuple[int, int], torch.device]:
    """(batch, length) of the input, and its device."""
    if input_ids is not None and inputs_embeds is None:
        shape, device = input_ids.shape, input_ids.device
    elif inputs_embeds is not None and input_ids is None:
        shape, device = inputs_embeds.shape[:-1], inputs_embeds.device
    else:
        raise ArgumentError(
            format_error(
                "forward", "input_ids, inputs_embeds", "both or neither", "exactly one", "pass one of them"
            )
        )
    if len(shape) != 2:
        got = f"shape {tuple(shape)}"
        raise ArgumentError(
            format_error("forward", "input", got, "(batch, length)", "add or merge dimensions")
        )
    return (shape[0], shape[1]), device


def _attended(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape != (batch, length):
        raise Unsupported(
            format_error(
                "forward",
                "attention_mask",
                f"shape {tuple(mask.shape)}",
                f"({batch}, {length}), one flag a token",
                "pass the tokenizer's mask, or call fastgate.unpatch(model) for masks a pair of tokens",
            )
        )
    return mask.to(torch.bool)


def output_row_mask(
    encoder: Any,
    attended: Tensor | None,
    rows: Tensor | None,
    every_row: bool,
    shape: tuple[int, int],
    device: torch.device,
) -> Tensor | None:
    """(batch, length) bool, the rows that are read after the encoder. None: the attended ones.

    rows: those that this call reads. every_row: every row is read, padding too.
    """
    runtime: EncoderRuntime = encoder.fastgate_runtime
    if every_row or runtime.demand == "every":
        return torch.ones(shape, dtype=torch.bool, device=device)
    if runtime.pooling == "mean":
        return None if rows is None or attended is None else attended | rows.to(device)
    if rows is None and runtime.demand == "start" and attended is not None:
        # argmax is the first of equals, and 0 where nothing is attended: as sentence-transformers has it.
        return torch.zeros_like(attended).scatter_(1, attended.int().argmax(1, keepdim=True), True)
    first = torch.zeros(shape, dtype=torch.bool, device=device)
    first[:, 0] = True
    if rows is None and runtime.demand in ("first", "start"):
        return first
    rows = None if rows is None else rows.to(device)
    read = attended if rows is None else rows
    if read is not None and (
        runtime.reads in ("first", "start") or getattr(encoder, "pooler", None) is not None
    ):
        return read | first
    return rows


def checked_rows(rows: Any, shape: tuple[int, int], reads: str | None = None) -> Tensor:
    """The rows that a call asks for, once they are a mask that a head which reads `reads` can honour."""
    if reads in ("first", "every"):
        what = "token 0" if reads == "first" else "every token"
        raise ArgumentError(
            format_error("forward", "rows", "a mask", f"none, as this head reads {what}", "leave rows out")
        )
    if not isinstance(rows, Tensor):
        got = type(rows).__name__
    elif rows.dtype != torch.bool:
        got = str(rows.dtype)
    elif rows.shape != shape:
        got = f"shape {tuple(rows.shape)}"
    else:
        return rows
    remedy = "pass e.g. input_ids == mask_token_id"
    raise ArgumentError(
        format_error("forward", "rows", got, f"a bool tensor (batch, length) = {shape}", remedy)
    )


def _embedding_inputs(encoder: Any, inspection: Inspection, call: EncoderCall) -> EmbeddingInputs:
    """What the embeddings of this call are made from."""
    batch, length = call.shape
    for name, ids in (("token_type_ids", call.token_type_ids), ("position_ids", call.position_ids)):
        if ids is not None and (ids.dim() != 2 or ids.shape[1] != length or ids.shape[0] not in (1, batch)):
            got = f"shape {tuple(ids.shape)}"
            raise ArgumentError(format_error("forward", name, got, f"{call.shape}", "pass one id a token"))
    if not inspection.gathers:
        # Hooks and replaced modules may count on padded input: the module runs as it is, its dropout within.
        return CalledModule(
            {
                "input_ids": call.input_ids,
                "position_ids": call.position_ids,
                "token_type_ids": call.token_type_ids,
                "inputs_embeds": call.inputs_embeds,
                **compat.cache_arguments(),
            }
        )
    positions = call.position_ids
    if positions is None:
        positions = compat.position_ids_of(encoder.embeddings, call.input_ids, call.inputs_embeds)
    if length > positions.shape[1]:
        got, wanted = f"length {length}", f"at most {positions.shape[1]}"
        raise ArgumentError(format_error("forward", "input", got, wanted, "truncate the text"))
    if call.input_ids is None:
        assert call.inputs_embeds is not None
        return GivenVectors(call.inputs_embeds, positions, call.token_type_ids)
    return PaddedIds(TokenIds(call.input_ids, positions, call.token_type_ids))
