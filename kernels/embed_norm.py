"""embed_norm in Triton, forward and backward, in fastgate/ops/reference/embed_norm.py's symbols.

Forward gathers a row of each table, norms their sum and writes y: what is read of the word table is the only
large part, the position table stays in the second-level cache and the type table in the first. It keeps
nothing for backward, which gathers again and computes u, xhat and rstd anew. With rows i, m the keep mask,
kept = 1 / (1 - p) and through(dy, weight) the gradient of a norm's input (kernels/gated_add_norm.py):

    y = xhat * weight + norm_bias, v = m * kept * y, and with a second norm y2 = xhat2 * weight2 + norm_bias2
    dv = through(dy2, weight2)     dweight2 = sum_i dy2 * xhat2,  dnorm_bias2 = sum_i dy2
    dy = m * kept * dv             dweight = sum_i dy * xhat,     dnorm_bias = sum_i dy
    du = through(dy, weight)

du is the gradient of every row that was gathered. It is written once and scattered into the word and the
position table by torch's embedding_dense_backward, which sorts the ids and adds in their order: no atomics.
The type table has two rows or one: their sums over rows are two more float32 sums a channel in registers,
next to those of the parameters. A table with more types goes the way of the others.

An id outside its table reads nothing outside: a NaN in eps's place makes its row NaN, forward and backward,
and with it the loss. To tell the host would be to wait for the device.

Tiles, the norm's arithmetic and sums over rows: kernels/norm.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgate.kernels.launch import Kernel, aligned
from fastgate.kernels.norm import (
    STAGES,
    backward_tile,
    channels,
    contiguous,
    dropout_arguments,
    dtypes,
    elements,
    forward_tile,
    keeps_vectors,
    kept_in_tile,
    normalise,
    read,
    resident_programs,
    through,
    write_requested,
)
from fastgate.kernels.sums import add_up
from fastgate.ops.embed_norm import BIT, PARAMETERS, TABLES

# The bits of backward's `requested`, and those of the parameters as the kernel reads them.
PARAMETER_BITS = sum(BIT[name] for name in PARAMETERS)
WEIGHT = tl.constexpr(BIT["weight"])
NORM_BIAS = tl.constexpr(BIT["norm_bias"])
WEIGHT2 = tl.constexpr(BIT["weight2"])
NORM_BIAS2 = tl.constexpr(BIT["norm_bias2"])
# Types whose sums over rows backward keeps in registers.
FOLDED_TYPES = 2


@triton.jit
def _ids(ids, row, row_valid, count):
    """(id, whether the table has it), (1, ROWS, 1): as unsigned numbers those outside are all too large."""
    found = tl.load(ids + row, mask=row_valid, other=0).to(tl.int64)
    return found, found.to(tl.uint64, bitcast=True) < count.to(tl.uint64)


@triton.jit
def _place(found, known):
    """The row of a table, int32, for a table has less than 2^31 rows; row 0 stands for ids outside."""
    return tl.where(known, found, 0).to(tl.int32)


@triton.jit
def _gather(
    words,  # (rows,) int64 or int32, as all ids
    positions,
    types,  # None: type 0 everywhere
    word_table,  # (word_count, hidden), as all tables
    position_table,
    type_table,
    only_type,  # the elements of type 0 where types is None; None where they are still to be read
    word_count,
    position_count,
    type_count,
    hidden,
    row,  # (1, ROWS, 1) int64
    row_valid,  # (1, ROWS, 1) bool
    channel,  # (CHUNKS, ROWS, WIDTH) int32
    valid,  # (CHUNKS, ROWS, WIDTH) bool
):
    """u, zero where no channel or row is; whether the tables have all of a row's ids; its type."""
    word, known = _ids(words, row, row_valid, word_count)
    position, known_position = _ids(positions, row, row_valid, position_count)
    known = known & known_position
    kind = word  # of no use where types is None: a function of a kernel returns no None
    if types is not None:
        kind, known_type = _ids(types, row, row_valid, type_count)
        known = known & known_type
    inside = valid & row_valid
    u = read(word_table + (_place(word, known).to(tl.int64) * hidden + channel), inside)
    u += read(position_table + (_place(position, known).to(tl.int64) * hidden + channel), inside)
    if types is not None:
        kind = _place(kind, known)
        u += read(type_table + (kind.to(tl.int64) * hidden + channel), inside)
    else:
        u += elements(only_type, type_table, channel, valid)
    return u, known, kind


@triton.jit(do_not_specialize=["rows", "hidden", "word_count", "position_count", "type_count", "threshold"])
def forward_kernel(
    words,  # (rows,) int64 or int32, as all ids
    positions,
    types,  # None: type 0 everywhere
    word_table,  # (word_count, hidden), as all tables
    position_table,
    type_table,
    weight,  # (hidden,), as all vectors
    norm_bias,
    seed,  # () int64; None where nothing is dropped
    weight2,  # None without a second norm
    norm_bias2,
    y,  # (rows, hidden)
    rows: tl.int64,
    hidden: tl.int32,
    word_count: tl.int32,
    position_count: tl.int32,
    type_count: tl.int32,
    eps: tl.float32,
    eps2: tl.float32,
    threshold: tl.int32,
    kept_scale: tl.float32,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    hidden = hidden // VECTOR * VECTOR  # which tells the compiler how far rows are aligned
    channel, valid = channels(hidden, ROWS, CHUNKS, WIDTH)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    row_valid = row < rows
    u, known, _ = _gather(
        words, positions, types, word_table, position_table, type_table, None, word_count, position_count,
        type_count, hidden, row, row_valid, channel, valid,
    )  # fmt: skip
    xhat, _ = normalise(u, tl.where(known, eps, float("nan")), hidden, valid, row_valid)
    out = xhat * read(weight + channel, valid) + read(norm_bias + channel, valid)
    if seed is not None:
        mask = kept_in_tile(tl.load(seed), row, threshold, CHUNKS, ROWS, WIDTH)
        out = tl.where(mask, out * kept_scale, 0.0)
    if weight2 is not None:
        xhat, _ = normalise(out, eps2, hidden, valid, row_valid)
        out = xhat * read(weight2 + channel, valid) + read(norm_bias2 + channel, valid)
    tl.store(y + (row * hidden + channel), out.to(y.dtype.element_ty), mask=valid & row_valid)


@triton.jit(do_not_specialize=["rows", "hidden", "word_count", "position_count", "type_count", "threshold"])
def backward_kernel(
    grad,  # (rows, hidden)
    words,  # (rows,) int64 or int32, as all ids
    positions,
    types,  # None: type 0 everywhere
    word_table,  # (word_count, hidden), as all tables
    position_table,
    type_table,
    weight,  # (hidden,), as all vectors
    norm_bias,  # None without a second norm
    seed,  # () int64; None where nothing is dropped
    weight2,  # None without a second norm
    du,  # (rows, hidden); None where not requested
    sums,  # (programs, TYPES + parameters requested, hidden) float32; None where none is requested
    rows: tl.int64,
    hidden: tl.int32,
    word_count: tl.int32,
    position_count: tl.int32,
    type_count: tl.int32,
    eps: tl.float32,
    eps2: tl.float32,
    threshold: tl.int32,
    kept_scale: tl.float32,
    KEEP: tl.constexpr,
    STAGES: tl.constexpr,
    REQUESTED: tl.constexpr,
    TYPES: tl.constexpr,  # rows of the type table whose gradient is summed here
    COUNT: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    hidden = hidden // VECTOR * VECTOR  # which tells the compiler how far rows are aligned
    channel, valid = channels(hidden, ROWS, CHUNKS, WIDTH)
    zeros = tl.zeros((CHUNKS, ROWS, WIDTH), tl.float32)
    dtype0, dtype1 = zeros, zeros
    dweight, dnorm_bias, dweight2, dnorm_bias2 = zeros, zeros, zeros, zeros
    # Kept in registers where there are enough, so that only the rows' own loads are left to be pipelined.
    w, w2, n, t, key = None, None, None, None, None
    if seed is not None:
        key = tl.load(seed)
    if KEEP:
        w = read(weight + channel, valid)
        if weight2 is not None:
            w2, n = read(weight2 + channel, valid), read(norm_bias + channel, valid)
        if types is None:
            t = read(type_table + channel, valid)
    first, step = tl.program_id(0).to(tl.int64) * ROWS, tl.num_programs(0).to(tl.int64) * ROWS
    for start in tl.range(first, rows, step, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[None, :, None]
        row_valid = row < rows
        at, inside = row * hidden + channel, valid & row_valid
        dy = read(grad + at, inside)
        mask = valid
        if seed is not None:
            mask = kept_in_tile(key, row, threshold, CHUNKS, ROWS, WIDTH)
        u, known, kind = _gather(
            words, positions, types, word_table, position_table, type_table, t, word_count, position_count,
            type_count, hidden, row, row_valid, channel, valid,
        )  # fmt: skip
        xhat, rstd = normalise(u, tl.where(known, eps, float("nan")), hidden, valid, row_valid)
        if weight2 is not None:
            v = xhat * elements(w, weight, channel, valid) + elements(n, norm_bias, channel, valid)
            if seed is not None:
                v = tl.where(mask, v * kept_scale, 0.0)
            xhat2, rstd2 = normalise(v, eps2, hidden, valid, row_valid)
            if WEIGHT2 & REQUESTED:
                dweight2 += dy * xhat2
            if NORM_BIAS2 & REQUESTED:
                dnorm_bias2 += dy
            dy = through(dy, elements(w2, weight2, channel, valid), xhat2, rstd2, hidden)
        if seed is not None:
            dy = tl.where(mask, dy * kept_scale, 0.0)
        if WEIGHT & REQUESTED:
            dweight += dy * xhat
        if NORM_BIAS & REQUESTED:
            dnorm_bias += dy
        along_u = through(dy, elements(w, weight, channel, valid), xhat, rstd, hidden)
        if du is not None:
            tl.store(du + at, along_u.to(du.dtype.element_ty), mask=inside)
        if TYPES == 1:
            dtype0 += along_u
        if TYPES == 2:
            dtype0 += along_u * (1 - kind).to(tl.float32)  # kind is 0 or 1
            dtype1 += along_u * kind.to(tl.float32)
    if sums is not None:
        to = sums + tl.program_id(0).to(tl.int64) * COUNT * hidden
        to = write_requested(to, dtype0, hidden, TYPES > 0, CHUNKS, WIDTH)
        to = write_requested(to, dtype1, hidden, TYPES > 1, CHUNKS, WIDTH)
        to = write_requested(to, dweight, hidden, WEIGHT & REQUESTED, CHUNKS, WIDTH)
        to = write_requested(to, dnorm_bias, hidden, NORM_BIAS & REQUESTED, CHUNKS, WIDTH)
        to = write_requested(to, dweight2, hidden, WEIGHT2 & REQUESTED, CHUNKS, WIDTH)
        to = write_requested(to, dnorm_bias2, hidden, NORM_BIAS2 & REQUESTED, CHUNKS, WIDTH)


FORWARD, BACKWARD = Kernel(forward_kernel), Kernel(backward_kernel)


def forward(
    words: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word_table: Tensor,
    position_table: Tensor,
    type_table: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    weight2: Tensor | None,
    norm_bias2: Tensor | None,
    eps2: float,
    padding_idx: int,
    position_padding_idx: int,
) -> Tensor:
    """y (rows, hidden) in the tables' dtype; operands as in fastgate.ops."""
    rows, hidden = words.shape[0], word_table.shape[1]
    y = torch.empty((rows, hidden), dtype=word_table.dtype, device=words.device)
    if not rows:
        return y
    seed, threshold, kept_scale = dropout_arguments("embed_norm", dropout_p, seed)
    ids, tables = (words, positions, types), (word_table, position_table, type_table)
    tensors = tuple([contiguous(t) for t in (*ids, *tables, weight, norm_bias, seed, weight2, norm_bias2)])
    tile = forward_tile(hidden, word_table.itemsize, rows)
    counts = (word_table.shape[0], position_table.shape[0], type_table.shape[0])
    FORWARD.launch(
        (-(-rows // tile.rows), 1, 1),
        (tile, aligned(*tensors, y), dtypes(*tensors)),
        (*tensors, y, rows, hidden, *counts, eps, eps2, threshold, kept_scale, *tile[:4]),
        tile.num_warps,
    )
    return y


def backward(
    grad: Tensor,
    words: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word_table: Tensor,
    position_table: Tensor,
    type_table: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    weight2: Tensor | None,
    norm_bias2: Tensor | None,
    eps2: float,
    padding_idx: int,
    position_padding_idx: int,
    requested: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dword_table, dposition_table, dtype_table, parameters' gradients): those that the bits of `requested`
    ask for, the others empty.

    grad: (rows, hidden), of y. The parameters' gradients are stacked in the order of PARAMETERS in
    fastgate/ops/embed_norm.py: (number requested, hidden) float32.
    """
    rows, hidden = grad.shape
    tables = (word_table, position_table, type_table)
    dtables = [word_table.new_empty(0) for _ in tables]
    count, device = (requested & PARAMETER_BITS).bit_count(), grad.device
    one_type = types is None or type_table.shape[0] == 1
    folded = 0
    if requested & BIT["type_table"] and (one_type or type_table.shape[0] <= FOLDED_TYPES):
        folded = 1 if one_type else FOLDED_TYPES
    stacked = torch.empty((folded + count, hidden), dtype=torch.float32, device=device)
    if not rows:
        empty = [
            torch.zeros_like(table) if requested & BIT[name] else table.new_empty(0)
            for name, table in zip(TABLES, tables, strict=True)
        ]
        return empty[0], empty[1], empty[2], stacked[folded:].zero_()
    scattered = requested & (BIT["word_table"] | BIT["position_table"]) or (
        requested & BIT["type_table"] and not folded
    )
    du = torch.empty((rows, hidden), dtype=word_table.dtype, device=device) if scattered else None
    seed, threshold, kept_scale = dropout_arguments("embed_norm", dropout_p, seed)
    first_bias = norm_bias if weight2 is not None else None
    vectors = (weight, first_bias, seed, weight2)
    tensors = tuple([contiguous(t) for t in (grad, words, positions, types, *tables, *vectors)])
    tile = backward_tile(hidden, min(grad.itemsize, word_table.itemsize))
    programs = resident_programs(rows, tile, device)
    sums = None
    if folded + count:
        sums = stacked if programs == 1 else torch.empty((programs, *stacked.shape), device=device)
    keep = keeps_vectors(hidden)
    numbers = (rows, hidden, *(table.shape[0] for table in tables), eps, eps2, threshold, kept_scale)
    # Beside the masks the registers of two programs a multiprocessor do not hold a longer lead.
    stages = 1 if not keep else STAGES if seed is None else STAGES - 1
    choices = (keep, stages, requested, folded, folded + count)
    BACKWARD.launch(
        (programs, 1, 1),
        (tile, requested, folded, aligned(*tensors, du, sums), dtypes(*tensors, du)),
        (*tensors, du, sums, *numbers, *choices, *tile[:4]),
        tile.num_warps,
    )
    if sums is not None and programs > 1:
        add_up(sums, stacked)
    if requested & BIT["word_table"]:
        dtables[0] = _scatter(du, words, word_table, padding_idx)
    if requested & BIT["position_table"]:
        dtables[1] = _scatter(du, positions, position_table, position_padding_idx)
    if folded:
        dtables[2] = torch.empty_like(type_table)
        dtables[2][:folded].copy_(stacked[:folded])
        dtables[2][folded:].zero_()
    elif requested & BIT["type_table"]:
        dtables[2] = _scatter(du, types, type_table, -1)
    return dtables[0], dtables[1], dtables[2], stacked[folded:]


def _scatter(du: Tensor | None, ids: Tensor | None, table: Tensor, padding_idx: int) -> Tensor:
    """The rows of du summed by id. torch's kernel trusts the ids: one outside the table goes to its edge."""
    assert du is not None and ids is not None
    inside = ids.clamp(0, table.shape[0] - 1)
    return torch.ops.aten.embedding_dense_backward(du, inside, table.shape[0], padding_idx, False)
