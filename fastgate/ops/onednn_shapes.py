"""Which numbers of rows oneDNN compiles products for: few enough to bound the memory that it keeps them in.

oneDNN compiles a product for each number of rows and keeps it, 0.6 MB each, up to 1,024 of them and as many
again for each thread. The rows of an unpadded batch are another number in nearly every batch. So the first
MAX_EXACT_PRODUCTS are compiled for the number of rows that they have. After that, rows are multiplied in
pieces of a few sizes. Both ways give the same bits, for a row of a product does not depend on the rows beside
it. The gradient of a bfloat16 weight on AMX is the exception: oneDNN splits its sum by the number of rows.
Pieces cost a few percent more, which is about what compiling for another number of rows costs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

MAX_EXACT_PRODUCTS = 128  # that are compiled for the number of rows that they have, in the process
LARGEST_PIECE = 512  # rows

_compiled: set[tuple[Hashable, ...]] = set()


def is_exact(*product: Hashable) -> bool:
    """Whether a product is compiled for the number of rows that it has. product: what identifies it."""
    if product in _compiled:
        return True
    if len(_compiled) >= MAX_EXACT_PRODUCTS:
        return False
    _compiled.add(product)
    return True


def round_up(rows: int) -> int:
    """The number of rows to compile for instead: a multiple of 4, and four numbers between powers of two."""
    step = max(4, (1 << (rows - 1).bit_length()) // 8)
    return -(-rows // step) * step


def pieces(rows: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of pieces that cover more than LARGEST_PIECE rows. The last one begins before the end of
    the one before it where its size would be another one."""
    for begin in range(0, rows, LARGEST_PIECE):
        size = min(LARGEST_PIECE, round_up(rows - begin))
        begin = min(begin, rows - size)
        yield begin, begin + size
