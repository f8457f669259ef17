"""embed_norm: LayerNorm(word + position + type), dropout, and a second LayerNorm: a BERT's embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.ops import reference, registry

_SCHEMA = (
    "Tensor words, Tensor positions, Tensor? types, Tensor word_table, Tensor position_table, "
    "Tensor type_table, Tensor weight, Tensor norm_bias, float eps, float dropout_p, Tensor? seed, "
    "Tensor? weight2, Tensor? norm_bias2, float eps2, int padding_idx, int position_padding_idx"
)
OPERANDS = tuple(operand.split()[1] for operand in _SCHEMA.split(", "))
ID_DTYPES = (torch.int64, torch.int32)
# Bits of the backward's `requested`, and the order of the tables' gradients and of the stacked ones.
TABLES = ("word_table", "position_table", "type_table")
PARAMETERS = ("weight", "norm_bias", "weight2", "norm_bias2")
BIT = {name: 1 << place for place, name in enumerate((*TABLES, *PARAMETERS))}

registry.LIBRARY.define(f"embed_norm({_SCHEMA}) -> Tensor")
registry.LIBRARY.define(
    f"embed_norm_backward(Tensor grad, {_SCHEMA}, int requested) -> (Tensor, Tensor, Tensor, Tensor)"
)
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _asked(requested: int) -> list[str]:
    return [name for name in PARAMETERS if requested & BIT[name]]


def _for_reference(operands: tuple[Any, ...]) -> dict[str, Any]:
    """The schema's operands as the reference names them: the seed's mask in place of the seed."""
    named = dict(zip(OPERANDS, operands, strict=True))
    seed, dropout_p = named.pop("seed"), named["dropout_p"]
    if dropout_p > 0.0:
        rows, hidden = named["words"].shape[0], named["word_table"].shape[1]
        named["mask"] = reference.keep_mask(seed, rows, hidden, dropout_p)
    return named


def _reference_forward(*operands: Any) -> Tensor:
    named = _for_reference(operands)
    del named["padding_idx"], named["position_padding_idx"]
    try:
        return reference.embed_norm(**named)
    except IndexError:
        _refuse_ids(*operands[:6])
        raise


def _reference_backward(grad: Tensor, *operands: Any) -> Gradients:
    requested = operands[-1]
    found = reference.embed_norm_backward(grad, **_for_reference(operands[:-1]))
    empty = _empty_gradients(operands[3:6], requested)
    tables = [getattr(found, name) if requested & BIT[name] else empty[i] for i, name in enumerate(TABLES)]
    for row, name in zip(empty[3], _asked(requested), strict=True):
        row.copy_(getattr(found, name))
    return tables[0], tables[1], tables[2], empty[3]


def _empty_gradients(tables: tuple[Tensor, ...], requested: int) -> Gradients:
    """(dword_table, dposition_table, dtype_table, parameters): those not requested have no elements."""
    dtype = torch.float64 if tables[0].dtype == torch.float64 else torch.float32
    words, positions, types = (
        table.new_empty(table.shape if requested & BIT[name] else (0,))
        for name, table in zip(TABLES, tables, strict=True)
    )
    return (
        words,
        positions,
        types,
        tables[0].new_empty((len(_asked(requested)), tables[0].shape[1]), dtype=dtype),
    )


registry.REFERENCE["embed_norm"] = registry.Implementation(
    "reference", _reference_forward, _reference_backward, frozenset(registry.DTYPES)
)


def naming_bad_ids(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled forward that says which ids are outside their table: C++ cannot raise an IndexError here."""

    def forward(*operands: Any) -> Any:
        try:
            return function(*operands)
        except RuntimeError:
            _refuse_ids(*operands[:6])
            raise

    return forward


def _refuse_ids(
    words: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word_table: Tensor,
    position_table: Tensor,
    type_table: Tensor,
) -> None:
    """Say which ids are outside their table, if any, as an IndexError, which nn.Embedding raises."""
    tables = (word_table, position_table, type_table)
    for name, ids, table in zip(
        ("words", "positions", "types"), (words, positions, types), tables, strict=True
    ):
        if ids is not None and ids.numel() and (ids.min() < 0 or ids.max() >= table.shape[0]):
            got, wanted = f"ids from {int(ids.min())} to {int(ids.max())}", f"0 to {table.shape[0] - 1}"
            raise IndexError(
                format_error("embed_norm", name, got, wanted, "the table has a row for these only")
            )


def _forward(*operands: Any) -> Tensor:
    words, word_table = operands[0], operands[3]
    return registry.implementation("embed_norm", words.device.type, word_table.dtype).forward(*operands)


def _backward(grad: Tensor, *operands: Any) -> Gradients:
    chosen = registry.implementation("embed_norm", grad.device.type, grad.dtype)
    return chosen.backward(grad, *operands)  # type: ignore[return-value]


registry.LIBRARY.impl("embed_norm", _forward, "CompositeExplicitAutograd")
registry.LIBRARY.impl("embed_norm_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastgate::embed_norm", lib=registry.LIBRARY)
def _fake(words: Tensor, positions: Tensor, types: Tensor | None, word_table: Tensor, *rest: Any) -> Tensor:
    return word_table.new_empty((words.shape[0], word_table.shape[1]))


@torch.library.register_fake("fastgate::embed_norm_backward", lib=registry.LIBRARY)
def _fake_backward(grad: Tensor, *operands: Any) -> Gradients:
    return _empty_gradients(operands[3:6], operands[-1])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    operands = registry.saved_inputs(ctx)
    given = dict(zip(OPERANDS, operands, strict=True))
    needs = dict(zip(OPERANDS, ctx.needs_input_grad, strict=True))
    requested = sum(bit for name, bit in BIT.items() if needs[name])
    call = _backward if registry.bypasses_dispatcher(grad) else torch.ops.fastgate.embed_norm_backward
    *tables, stacked = call(grad, *operands, requested)
    found = {name: table for name, table in zip(TABLES, tables, strict=True) if needs[name]}
    for name, row in zip(_asked(requested), stacked.unbind(0), strict=True):
        found[name] = row.to(given[name].dtype)
    return tuple(found.get(name) for name in OPERANDS)


def _plain(*operands: Any) -> Tensor:
    """The op in plain torch, where rows of padding get no gradient."""
    given = dict(zip(OPERANDS, operands, strict=True))
    for table, padding in (("word_table", "padding_idx"), ("position_table", "position_padding_idx")):
        if given[padding] >= 0:
            rows = torch.arange(len(given[table]), device=given[table].device)
            padded = (rows == given[padding])[:, None]
            given[table] = torch.where(padded, given[table].detach(), given[table])
    return _reference_forward(*given.values())


_trained = registry.register_autograd_formula("embed_norm", _forward, _differentiate, _plain)


def embed_norm(
    words: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word_table: Tensor,
    position_table: Tensor,
    type_table: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    weight2: Tensor | None = None,
    norm_bias2: Tensor | None = None,
    eps2: float = 0.0,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
) -> Tensor:
    """dropout(LayerNorm(word_table[words] + position_table[positions] + type_table[types])), and a second
    LayerNorm given weight2.

    words, positions, types: (rows,) int64 or int32; types None: type 0. Tables: (number, H), floating, of one
    dtype. weight, norm_bias, weight2, norm_bias2: (H,). dropout_p: in [0, 1); the mask is a function of a
    seed drawn from torch's default generator of the device, and of the row. padding_idx,
    position_padding_idx: the row of the word and of the position table that gets no gradient, as
    nn.Embedding's. Returns (rows, H) in the tables' dtype, under autocast too; statistics are float32
    (float64 for float64). Differentiable in the tables, whose gradients are dense, and in the vectors.

    Raises ArgumentError for shapes, dtypes or values that do not fit; IndexError on the CPU for an id outside
    its table. On a GPU, where that would wait for the device, the rows of such ids are NaN, and so are the
    gradients they take part in; nothing outside the tables is read or written.
    """
    tables, shape = (word_table, position_table, type_table), weight.shape
    _check_ids(words, positions, types)
    if any(table.dim() != 2 or table.shape[1:] != shape or not table.shape[0] for table in tables):
        got = ", ".join(str(tuple(tensor.shape)) for tensor in (*tables, weight))
        _refuse("tables, weight", f"shapes {got}", "(number > 0, H) thrice, (H,)", "pass tables of one width")
    dtype = word_table.dtype
    if dtype not in registry.DTYPES or position_table.dtype != dtype or type_table.dtype != dtype:
        got = ", ".join(str(table.dtype) for table in tables)
        _refuse("tables", got, "one floating dtype", "convert them before the call")
    if any(tensor.device != words.device for tensor in (positions, *tables, weight)):
        got = ", ".join(str(tensor.device) for tensor in (words, positions, *tables, weight))
        _refuse("words, positions, tables, weight", got, "one device", "move them to the tables' device")
    if norm_bias.shape != shape:
        _refuse("norm_bias", f"shape {tuple(norm_bias.shape)}", f"{tuple(shape)}", "match weight's shape")
    if (weight2 is None) != (norm_bias2 is None):
        _refuse("weight2, norm_bias2", "one of them", "both or neither", "pass the other one too")
    for vector in (weight2, norm_bias2):
        if vector is not None and vector.shape != shape:
            got = f"shape {tuple(vector.shape)}"
            _refuse("weight2, norm_bias2", got, f"{tuple(shape)}", "match weight's shape")
    padding = _padding("padding_idx", padding_idx, word_table)
    position_padding = _padding("position_padding_idx", position_padding_idx, position_table)
    seed = registry.draw_seed("embed_norm", dropout_p, words.device)
    call: Callable[..., Tensor] = torch.ops.fastgate.embed_norm
    if registry.bypasses_dispatcher(words) and registry.bypasses_dispatcher(word_table.data):
        trained = registry.any_requires_grad(*tables, weight, norm_bias, weight2, norm_bias2)
        call = _trained if trained else _forward
    return call(
        words, positions, types, *tables, weight, norm_bias, eps,
        dropout_p, seed, weight2, norm_bias2, eps2, padding, position_padding,
    )  # fmt: skip


def _check_ids(words: Tensor, positions: Tensor, types: Tensor | None) -> None:
    ids = (words, positions) if types is None else (words, positions, types)
    if words.dim() != 1 or any(one.shape != words.shape for one in ids):
        got = ", ".join(str(tuple(one.shape)) for one in ids)
        _refuse("words, positions, types", f"shapes {got}", "(rows,) each", "pack or flatten them")
    if any(one.dtype not in ID_DTYPES for one in ids):
        got = ", ".join(str(one.dtype) for one in ids)
        _refuse("words, positions, types", got, "int64 or int32", "convert them before the call")


def _padding(name: str, index: int | None, table: Tensor) -> int:
    """As the schema has it: -1 for none."""
    if index is None:
        return -1
    if not 0 <= index < table.shape[0]:
        _refuse(name, index, f"0 to {table.shape[0] - 1}, or None", "pass the row of the table")
    return index


def _refuse(argument: str, got: object, wanted: str, remedy: str) -> NoReturn:
    raise ArgumentError(format_error("embed_norm", argument, got, wanted, remedy))
