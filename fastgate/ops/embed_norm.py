"""embed_norm: LayerNorm(word + position + type), dropout, and a second LayerNorm: a BERT's embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastgate.errors import ArgumentError, format_error
from fastgate.ops import autograd, reference, registry

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

_FORWARD_SCHEMA = f"embed_norm({_SCHEMA}) -> Tensor"
_BACKWARD_SCHEMA = (
    f"embed_norm_backward(Tensor grad, {_SCHEMA}, int requested) -> (Tensor, Tensor, Tensor, Tensor)"
)
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _requested_parameters(requested: int) -> list[str]:
    """The parameters whose gradients are requested, in the order in which backward stacks them."""
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
    return reference.embed_norm(**named)


def _reference_backward(grad: Tensor, *operands: Any) -> Gradients:
    requested = operands[-1]
    gradients = reference.embed_norm_backward(grad, **_for_reference(operands[:-1]))
    empty = _empty_gradients(operands[3:6], requested)
    tables = [
        getattr(gradients, name) if requested & BIT[name] else empty[i] for i, name in enumerate(TABLES)
    ]
    for row, name in zip(empty[3], _requested_parameters(requested), strict=True):
        row.copy_(getattr(gradients, name))
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
        tables[0].new_empty((len(_requested_parameters(requested)), tables[0].shape[1]), dtype=dtype),
    )


registry.REFERENCE["embed_norm"] = registry.Implementation(
    "reference", _reference_forward, _reference_backward, frozenset(registry.DTYPES)
)


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
    chosen = registry.implementation("embed_norm", words.device.type, word_table.dtype)
    try:
        return chosen.forward(*operands)  # type: ignore[no-any-return]
    except (IndexError, RuntimeError):  # a compiled kernel can raise no IndexError
        if words.device.type == "cpu":
            _refuse_ids(*operands[:6])
        raise


def _backward(grad: Tensor, *operands: Any) -> Gradients:
    chosen = registry.implementation("embed_norm", grad.device.type, grad.dtype)
    return chosen.backward(grad, *operands)  # type: ignore[no-any-return]


def _fake(words: Tensor, positions: Tensor, types: Tensor | None, word_table: Tensor, *rest: Any) -> Tensor:
    return word_table.new_empty((words.shape[0], word_table.shape[1]))


def _fake_backward(grad: Tensor, *operands: Any) -> Gradients:
    return _empty_gradients(operands[3:6], operands[-1])


registry.define_op(_FORWARD_SCHEMA, _forward, _fake)
registry.define_op(_BACKWARD_SCHEMA, _backward, _fake_backward)


def _differentiate(ctx: autograd.Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    operands = autograd.saved_inputs(ctx)
    named = dict(zip(OPERANDS, operands, strict=True))
    needs = dict(zip(OPERANDS, ctx.needs_input_grad, strict=True))
    requested = sum(bit for name, bit in BIT.items() if needs[name])
    call = _backward if registry.bypasses_dispatcher(grad) else torch.ops.fastgate.embed_norm_backward
    *tables, stacked = call(grad, *operands, requested)
    gradients = {name: table for name, table in zip(TABLES, tables, strict=True) if needs[name]}
    for name, row in zip(_requested_parameters(requested), stacked.unbind(0), strict=True):
        gradients[name] = row.to(named[name].dtype)
    return tuple(gradients.get(name) for name in OPERANDS)


def _plain(*operands: Any) -> Tensor:
    """The op in plain torch, where rows of padding get no gradient."""
    named = dict(zip(OPERANDS, operands, strict=True))
    for table, padding in (("word_table", "padding_idx"), ("position_table", "position_padding_idx")):
        if named[padding] >= 0:
            rows = torch.arange(len(named[table]), device=named[table].device)
            padded = (rows == named[padding])[:, None]
            named[table] = torch.where(padded, named[table].detach(), named[table])
    return _reference_forward(*named.values())


_trained = autograd.register_autograd_formula("embed_norm", _forward, _differentiate, _plain)


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
    """A BERT's embeddings: dropout(LayerNorm(word_table[words] + position_table[positions] +
    type_table[types])). Given weight2, a second LayerNorm follows.

    Args:
        words: (rows,) int64 or int32, rows of word_table.
        positions: (rows,) int64 or int32, rows of position_table.
        types: (rows,) int64 or int32; None: type 0 everywhere.
        word_table: (number, H), floating.
        position_table: (number, H), of word_table's dtype.
        type_table: (number, H), of word_table's dtype.
        weight: (H,), of the LayerNorm.
        norm_bias: (H,), of the LayerNorm.
        eps: added to the variance of the LayerNorm.
        dropout_p: in [0, 1). The mask is a function of a seed from torch's default generator of the device.
        weight2: (H,), of a second LayerNorm, together with norm_bias2.
        norm_bias2: (H,), of a second LayerNorm, together with weight2.
        eps2: added to the variance of the second LayerNorm.
        padding_idx: the row of word_table that gets no gradient, as nn.Embedding's.
        position_padding_idx: the row of position_table that gets no gradient.

    Returns:
        (rows, H) in the tables' dtype, under autocast too. Statistics are float32, float64 for float64.
        Differentiable in the tables, whose gradients are dense, and in the vectors.

    Raises:
        ArgumentError: for shapes, dtypes, devices or values that do not fit.
        IndexError: on the CPU, for an id outside its table. On a GPU the rows of such ids are NaN, and so are
            their gradients. Nothing outside the tables is read or written.

    Example:
        >>> words, positions = torch.tensor([1, 0]), torch.tensor([0, 1])
        >>> tables = torch.eye(2), torch.zeros(2, 2), torch.zeros(1, 2)
        >>> vectors = torch.ones(2), torch.zeros(2)
        >>> fastgate.ops.embed_norm(words, positions, None, *tables, *vectors, 1e-5).round().tolist()
        [[-1.0, 1.0], [1.0, -1.0]]
    """
    tables = (word_table, position_table, type_table)
    _check_ids(words, positions, types)
    _check_tables(words, positions, tables, weight)
    _check_vectors(weight, norm_bias, weight2, norm_bias2)
    paddings = _paddings(padding_idx, word_table, position_padding_idx, position_table)
    seed = registry.draw_seed("embed_norm", dropout_p, words.device)
    call: Callable[..., Tensor] = torch.ops.fastgate.embed_norm
    if registry.bypasses_dispatcher(words) and registry.bypasses_dispatcher(word_table.data):
        trained = autograd.any_requires_grad(*tables, weight, norm_bias, weight2, norm_bias2)
        call = _trained if trained else _forward
    return call(
        words, positions, types, *tables, weight, norm_bias, eps,
        dropout_p, seed, weight2, norm_bias2, eps2, *paddings,
    )  # fmt: skip


def _check_tables(
    words: Tensor, positions: Tensor, tables: tuple[Tensor, Tensor, Tensor], weight: Tensor
) -> None:
    if any(table.dim() != 2 or table.shape[1:] != weight.shape or not table.shape[0] for table in tables):
        got = ", ".join(str(tuple(tensor.shape)) for tensor in (*tables, weight))
        _refuse("tables, weight", f"shapes {got}", "(number > 0, H) thrice, (H,)", "pass tables of one width")
    dtype = tables[0].dtype
    if dtype not in registry.DTYPES or any(table.dtype != dtype for table in tables):
        got = ", ".join(str(table.dtype) for table in tables)
        _refuse("tables", got, "one floating dtype", "convert them before the call")
    if any(tensor.device != words.device for tensor in (positions, *tables, weight)):
        got = ", ".join(str(tensor.device) for tensor in (words, positions, *tables, weight))
        _refuse("words, positions, tables, weight", got, "one device", "move them to the tables' device")


def _check_vectors(
    weight: Tensor, norm_bias: Tensor, weight2: Tensor | None, norm_bias2: Tensor | None
) -> None:
    shape = weight.shape
    if norm_bias.shape != shape:
        _refuse("norm_bias", f"shape {tuple(norm_bias.shape)}", f"{tuple(shape)}", "match weight's shape")
    if (weight2 is None) != (norm_bias2 is None):
        _refuse("weight2, norm_bias2", "one of them", "both or neither", "pass the other one too")
    for vector in (weight2, norm_bias2):
        if vector is not None and vector.shape != shape:
            got = f"shape {tuple(vector.shape)}"
            _refuse("weight2, norm_bias2", got, f"{tuple(shape)}", "match weight's shape")


def _check_ids(words: Tensor, positions: Tensor, types: Tensor | None) -> None:
    ids = (words, positions) if types is None else (words, positions, types)
    if words.dim() != 1 or any(tensor.shape != words.shape for tensor in ids):
        got = ", ".join(str(tuple(tensor.shape)) for tensor in ids)
        _refuse("words, positions, types", f"shapes {got}", "(rows,) each", "unpad or flatten them")
    if any(tensor.dtype not in ID_DTYPES for tensor in ids):
        got = ", ".join(str(tensor.dtype) for tensor in ids)
        _refuse("words, positions, types", got, "int64 or int32", "convert them before the call")


def _paddings(
    padding_idx: int | None, word_table: Tensor, position_padding_idx: int | None, position_table: Tensor
) -> tuple[int, int]:
    words = _padding("padding_idx", padding_idx, word_table)
    return words, _padding("position_padding_idx", position_padding_idx, position_table)


def _padding(name: str, index: int | None, table: Tensor) -> int:
    """As the schema has it: -1 for none."""
    if index is None:
        return -1
    if not 0 <= index < table.shape[0]:
        _refuse(name, index, f"0 to {table.shape[0] - 1}, or None", "pass the row of the table")
    return index


def _refuse(argument: str, got: object, wanted: str, remedy: str) -> NoReturn:
    raise ArgumentError(format_error("embed_norm", argument, got, wanted, remedy))
