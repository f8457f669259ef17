"""The forward of a swapped encoder: Hugging Face's arguments to packed rows, and rows back to its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from fastgate.errors import ArgumentError, Unsupported, format_error
from fastgate.models.handle import EncoderHandle, EncoderRuntime
from fastgate.models.inspection import Inspection, verify_places
from fastgate.ops.autograd import is_transformed
from fastgate.ops.ragged import HOST, on_device
from fastgate.ops.registry import bypasses_dispatcher
from fastgate.runtime.context import ForwardContext, TokenIds, plan_for
from fastgate.runtime.executor import run_plan
from fastgate.runtime.layer import is_skipped, shifts_of
from fastgate.runtime.plan import Plan
from fastgate.runtime.unpadding import UnpaddedBatch, on_host, unpad, unpad_full


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
    """The forward of a swapped encoder; arguments and outputs are Hugging Face's, and one argument more.

    rows: (batch, length) bool, the rows this call reads; every other row may come back as zeros.
    """
    config = encoder.config
    _refuse(encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache, kwargs)
    if is_transformed():
        got, wanted = "torch.func or forward-mode differentiation", "autograd's backward"
        remedy = "call fastgate.unpatch(model) first"
        raise Unsupported(format_error("forward", "derivatives", got, wanted, remedy))
    if torch._C._is_tracing() or torch.compiler.is_exporting():
        got, wanted = "torch.jit.trace or torch.export", "eager mode or torch.compile"
        remedy = "export an unpruned model, after fastgate.unpatch(model)"
        raise Unsupported(format_error("forward", "model", got, wanted, remedy))
    if (input_ids is None) == (inputs_embeds is None):
        raise ArgumentError(
            format_error(
                "forward", "input_ids, inputs_embeds", "both or neither", "exactly one", "pass one of them"
            )
        )
    shape = input_ids.shape if input_ids is not None else inputs_embeds.shape[:-1]  # type: ignore[union-attr]
    if len(shape) != 2:
        raise ArgumentError(
            format_error(
                "forward", "input", f"shape {tuple(shape)}", "(batch, length)", "add or merge dimensions"
            )
        )
    batch, length = shape
    device = (input_ids if input_ids is not None else inputs_embeds).device  # type: ignore[union-attr]
    runtime: EncoderRuntime = encoder.fastgate_runtime
    inspection = runtime.inspections.of(encoder)
    layers = inspection.layers
    if len(layers) != len(runtime.gates) or inspection.removed != runtime.removed:
        EncoderHandle(encoder).check_layers("forward")
    selection = kwargs.get("output_hidden_states")
    wanted_hidden = _hidden_selection(
        getattr(config, "output_hidden_states", None) if selection is None else selection,
        len(layers),
        config.num_hidden_layers,
    )
    attentions = kwargs.get("output_attentions")
    attentions = getattr(config, "output_attentions", False) if attentions is None else attentions
    whole = wanted_hidden is not None or bool(attentions)
    if rows is not None:
        rows = checked_rows(rows, (batch, length), None if runtime.pooling == "mean" else runtime.reads)
    attended, rows = on_host(_attended(attention_mask, batch, length), rows)
    if attended is not None and bool(attended.all()):
        attended = None
    usual = input_ids is not None and bypasses_dispatcher(input_ids) and device.type == "cpu"
    alone = rows is None and not whole and not (runtime.record is not None and runtime.record.whole)
    halo = halo_of(encoder) if alone and not runtime.captures(device) else 0
    if usual and attended is None and rows is None and not whole:
        first = runtime.demand in ("first", "start")
        unpadded = unpad_full(batch, length, first, torch.is_inference_mode_enabled(), halo)
    else:
        demanded = output_row_mask(encoder, attended, rows, whole, (batch, length), HOST)
        unpadded = unpad(batch, length, attended, demanded, device, halo)

    record = runtime.record
    if record is not None:
        record.hidden, record.attention_output, record.steps, record.length = [], [], [], length
    capture = wanted_hidden is not None or (record is not None and record.whole)
    plan = plan_of_encoder(encoder, inspection, unpadded, capture)
    run = ForwardContext(encoder, inspection, runtime.gates, unpadded, plan, record)
    run.states = None if wanted_hidden is None else []
    run.probabilities = {} if attentions else None
    embed = _embedder(encoder, inspection, unpadded, input_ids, token_type_ids, position_ids, inputs_embeds)
    hidden = None
    if runtime.graphs is not None and not torch.compiler.is_compiling():
        hidden = runtime.graphs.replay(run, embed.padded)
    if hidden is None:
        try:
            hidden = unpadded.pad(run_plan(run, embed.rows), output_rows_only=True)
        except (RuntimeError, ArgumentError):
            verify_places(encoder)  # a weight that is elsewhere is the reason, and has a name
            raise

    pooler = getattr(encoder, "pooler", None)
    pooled = hidden if runtime.pooling == "first" else _mean(hidden, attended)
    output = BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=hidden,
        pooler_output=None if pooler is None else pooler(pooled),  # type: ignore[arg-type]
    )
    if wanted_hidden is not None and run.states is not None:
        states = (*run.states[:-1], hidden)
        output["hidden_states"] = tuple(h if i in wanted_hidden else None for i, h in enumerate(states))
    if run.probabilities is not None:
        output["attentions"] = tuple(run.probabilities.get(i) for i in range(len(layers)))
        output["cross_attentions"] = ()  # as in transformers
    return_dict = kwargs.get("return_dict")
    return_dict = getattr(config, "return_dict", True) if return_dict is None else return_dict
    return output if return_dict else output.to_tuple()


def _mean(hidden: Tensor, attended: Tensor | None) -> Tensor:
    """(batch, length, hidden) -> (batch, 1, hidden), where a pooler looks for token 0: the mean of each
    sequence's attended rows, summed in float32; zeros where there are none. attended: on the host, None: all.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if attended is None:
        return hidden.mean(1, keepdim=True, dtype=wide).to(hidden.dtype)
    mask, count = on_device([attended, attended.sum(1).clamp(min=1)], hidden.device)
    total = (hidden * mask[:, :, None]).sum(1, keepdim=True, dtype=wide)
    return (total / count[:, None, None]).to(hidden.dtype)


def _hidden_selection(selection: Any, layers: int, counted: int) -> set[int] | None:
    """The indices that `output_hidden_states` (True, an int or ints) asks for; 0 and an empty list ask for
    none, as in transformers. counted: how many layers negative indices count from, which is the config's
    number."""
    if not selection:
        return None
    if selection is True:
        return set(range(layers + 1))
    wanted = [selection] if isinstance(selection, int) else list(selection)
    if not all(isinstance(i, int) for i in wanted):
        raise Unsupported(
            format_error(
                "forward",
                "output_hidden_states",
                selection,
                "True, an int or a list of ints",
                "pass one of these",
            )
        )
    places = (i if i >= 0 else i + counted + 1 for i in wanted)
    return {i for i in places if 0 <= i <= layers}


def halo_of(encoder: Any) -> int:
    """How far the row that a head reads of each sequence looks beside itself above the last attention: one
    token for each `shift` there. 0 where more rows are read: those beside them are nearly all there is."""
    runtime: EncoderRuntime = encoder.fastgate_runtime
    if runtime.demand not in ("first", "start"):
        return 0
    top = max((i for i, gate in enumerate(runtime.gates) if not is_skipped(gate)), default=-1)
    return sum(i > top for i in shifts_of(encoder.encoder.layer, runtime.gates))


def plan_of_encoder(encoder: Any, inspection: Inspection, unpadded: UnpaddedBatch, capture: bool) -> Plan:
    """The plan of a patched encoder for one packing, with its gates as they are now."""
    gates = encoder.fastgate_runtime.gates
    top = max((i for i, gate in enumerate(gates) if not is_skipped(gate)), default=None)
    absorbable = top is not None and inspection.layers[top].absorbable
    shifts = shifts_of(encoder.encoder.layer, gates)
    return plan_for(gates, shifts, absorbable, unpadded, capture)


def _refuse(states: Any, mask: Any, cache: Any, use_cache: Any, kwargs: dict[str, Any]) -> None:
    remedy = "call fastgate.unpatch(model) first"
    given = {"encoder_hidden_states": states, "encoder_attention_mask": mask, "past_key_values": cache}
    for name, value in given.items():
        if value is not None:
            raise Unsupported(format_error("forward", name, type(value).__name__, "None", remedy))
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if kwargs.get(name) is not None:
            flat = "pass a padded batch (sentence-transformers: model[0].unpad_inputs = False), or " + remedy
            raise Unsupported(format_error("forward", name, "rows packed already", "None", flat))
    for name, value in {"use_cache": use_cache, "is_causal": kwargs.get("is_causal")}.items():
        if value:
            raise Unsupported(format_error("forward", name, value, "False", remedy))


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
    whole: bool,
    shape: tuple[int, int],
    device: torch.device,
) -> Tensor | None:
    """(batch, length) bool, the rows read after the encoder; None: the attended ones.

    rows: those this call reads. whole: every row is read, padding too.
    """
    runtime: EncoderRuntime = encoder.fastgate_runtime
    if whole or runtime.demand == "every":
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
    wanted = attended if rows is None else rows
    if wanted is not None and (
        runtime.reads in ("first", "start") or getattr(encoder, "pooler", None) is not None
    ):
        return wanted | first
    return rows


def checked_rows(rows: Any, shape: tuple[int, int], reads: str | None = None) -> Tensor:
    """The rows a call asks for, once they are a mask that can be honoured under a head that reads `reads`."""
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


class _Embedder(NamedTuple):
    """padded: the ids that embeddings are gathered by, (batch or 1, length) each; None where they are not.
    rows: what run_plan asks for ids or finished embeddings."""

    padded: TokenIds | None
    rows: Callable[[bool], TokenIds | Tensor]


def _embedder(
    encoder: Any,
    inspection: Inspection,
    unpadded: UnpaddedBatch,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> _Embedder:
    embeddings = encoder.embeddings
    shape = (unpadded.batch, unpadded.length)
    for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if ids is not None and (
            ids.dim() != 2 or ids.shape[1] != shape[1] or ids.shape[0] not in (1, shape[0])
        ):
            raise ArgumentError(
                format_error("forward", name, f"shape {tuple(ids.shape)}", f"{shape}", "pass one id a token")
            )
    if not inspection.gathers:
        # Hooks and replaced modules may count on padded input: the module runs as it is, its dropout within.
        def whole(output_rows_only: bool) -> Tensor:
            padded = embeddings(
                input_ids=input_ids,
                position_ids=position_ids,
                token_type_ids=token_type_ids,
                inputs_embeds=inputs_embeds,
                past_key_values_length=0,
            )
            return unpadded.pack(padded, output_rows_only)

        return _Embedder(None, whole)

    tables = inspection.tables
    if position_ids is None:
        if hasattr(embeddings, "create_position_ids_from_input_ids"):
            if input_ids is not None:
                position_ids = embeddings.create_position_ids_from_input_ids(
                    input_ids, embeddings.padding_idx
                )
            else:
                position_ids = embeddings.create_position_ids_from_inputs_embeds(
                    inputs_embeds, embeddings.padding_idx
                )
        else:
            position_ids = embeddings.position_ids[:, : shape[1]]
    if shape[1] > position_ids.shape[1]:
        raise ArgumentError(
            format_error(
                "forward",
                "input",
                f"length {shape[1]}",
                f"at most {position_ids.shape[1]}",
                "truncate the text",
            )
        )

    def packed(ids: Tensor | None, output_rows_only: bool) -> Tensor | None:
        return None if ids is None else unpadded.pack(ids.expand(shape), output_rows_only)

    def gathered(output_rows_only: bool) -> TokenIds:
        return TokenIds(*(packed(ids, output_rows_only) for ids in (input_ids, position_ids, token_type_ids)))  # type: ignore[arg-type]

    def added(output_rows_only: bool) -> Tensor:
        types = packed(token_type_ids, output_rows_only)
        u = unpadded.pack(inputs_embeds, output_rows_only)  # type: ignore[arg-type]
        u = u + embeddings.position_embeddings(packed(position_ids, output_rows_only))
        u = u + (tables[2].weight[0] if types is None else tables[2](types))
        return embeddings.dropout(embeddings.LayerNorm(u))

    if input_ids is None:
        return _Embedder(None, added)
    return _Embedder(TokenIds(input_ids, position_ids, token_type_ids), gathered)  # type: ignore[arg-type]
