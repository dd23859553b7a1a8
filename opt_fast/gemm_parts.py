"""float32 matrix products in Intel's tiles (AMX), which multiply bfloat16: values are split into three bfloat16 parts; six of nine products count.

x = x0 + x1 + x2 exactly: each part holds 8 of the 24 bits. Of x · w, the products x1 · w2, x2 · w1 and x2 · w2 are left out, some 2^-25 of it, less
than float32's own rounding error. Six bfloat16 tile instructions still take half the time of float32 vector instructions, and sums of fewer, longer
terms round less often: errors are like those of products in float32 (Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence
Datatype"). What differs: infinities and magnitudes from 3.3961775e38 on become NaN, and parts below 1.2e-38 are taken as 0.

A float16 is exactly the sum of two bfloat16 parts: with float16 weights, five of six products are added, all but x2 · w1.

Weights stay in float32 or float16 in memory, as strips of 16 output columns, (P, I, 16). A block of a strip is split into parts when needed, and
multiplied by all rows of a task; if rows are few, while the next block arrives from memory. An element of the result depends only on its own row and
column: it starts from the bias, and products are added in one order, 32 of k at a time, however many rows there are and however the work is cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import get_num_threads, types

from opt_fast.gemm import AHEAD, BLOCK_K, EMULATED, TASKS_EACH, TILE, Packed, _pack, as_stored, begin, copy_tile, finish, flat, widened
from opt_fast.gemm_amx import (
    INDEX,
    INT8,
    OF_WEIGHTS,
    PAIRS,
    SIDE,
    SINGLE,
    TILE_BYTES,
    UNIT,
    VECTOR,
    WORDS,
    ask_to_write,
    configure,
    release,
    tile_shapes,
    unit_of,
)
from opt_fast.kernel import (
    ARGUMENTS,
    BYTES,
    DONE,
    LINE,
    MEMORY,
    TASKS,
    THREADS,
    Kernel,
    at,
    bytes_,
    claim,
    every,
    floats,
    for_weights,
    inner,
    instruction,
    int16s,
    intrinsic,
    lines,
    loop,
    prefetch,
    rows_from,
    store,
    transposed,
    variant,
)
from opt_fast.rowwise import FUNCTIONS

PARTS, PLANE = 3, INDEX(TILE_BYTES)  # parts of a float32, and the bytes from a tile of one part to that of the next, by default
LINES = PARTS * 4 * SIDE  # bytes of a tile's row in all parts, which are contiguous where rows are few
PARTS_OF_HALF = 2  # parts of a float16
ORDER = (2, 0), (1, 0), (1, 1), (0, 1), (0, 2), (0, 0)  # x's part and the weight's: from one product to the next, one of them stays in its register
DEEP = 2 * SIDE  # values of k that a tile holds
TALL, ABREAST, few = 1, 1, cast(Any, None)  # tiles of rows and strips multiplied at a time, and the kernel for it; variants of _few rebind these
OF_LINES, OF_STRIPS = (5, 4), (6, 7)  # tile registers of x and of strips, where rows are few
TILES_AHEAD = 6  # where two strips are read at a time: a tile is prefetched this many tiles before it is split
SHAPES = [tile_shapes(rows, weights=len(OF_STRIPS)) for rows in range(SIDE + 1)]
MOST_ROWS, ENOUGH = 256, 96  # rows of a block: most, and enough. With 384 of k, parts of 256 rows take 0.6 MB of L2, of two by two strips 144 kB
FEW_ROWS, FEW_NUMBERS = 96, 1 << 18  # rows count as few up to this many rows and elements: all their parts then stay in the L2 cache


class PackedParts(Packed):
    """A float32 or float16 weight (O, I) as strips (P, I, 16) for products in tiles: panels[p, i, c] is weight[16p + c, i], zeros beyond O."""

    width = SIDE

    def needed(self, M: int) -> int:
        """Scratch memory of a thread, in float32 elements: parts of x, parts of two strips (twice), a tile, and two by two tiles of sums (twice)."""
        rows, tiles = M if M <= SIDE else math.ceil(M / DEEP) * DEEP, math.ceil(self.shape[1] / DEEP)
        of_x = (rows * tiles + SIDE) * DEEP if is_few(M, self.shape[1]) else MOST_ROWS * BLOCK_K  # emulated, tiles are read whole
        return lines(PARTS * (of_x + 4 * SIDE * BLOCK_K) // 2 + SIDE * DEEP + 2 * DEEP * DEEP)

    def call(self, x: np.ndarray, row: int, step: int, bias: np.ndarray, function: str | None, y: Any, M: int,
             adds_to: np.ndarray | None = None) -> tuple[Kernel, list, int]:  # fmt: skip
        """As Packed.call. y's rows may be padded; the result is also added to `adds_to`, (M, O), if given."""
        (O, I), stream = self.shape, 0 if adds_to is None else adds_to
        y_row = y.strides[0] // 4 if np.ndim(y) > 1 else O
        arguments = [x, row, step, self.panels, self.count, bias, FUNCTIONS[function], y, y_row, M, O, I, SHAPES[min(M, SIDE)], stream]
        if is_few(M, I):
            parts = min(math.ceil(self.count / 2), get_num_threads() * TASKS_EACH)
            return (FEW if M <= SIDE else SOME)[self.panels.dtype.str], [*arguments, parts], parts
        most, blocks, parts = shares(M, self.count)
        return MATMUL[self.panels.dtype.str], [*arguments, most, blocks, parts], blocks * parts

    def __repr__(self) -> str:
        return f"PackedParts({self.shape}, {self.dtype})"


def pack(weight: np.ndarray) -> PackedParts:
    """The weight's strips, in its own dtype: float32 or float16.  weight: (O, I)"""
    (O, I), (numbers, row, step) = weight.shape, flat(weight if weight.dtype == np.float16 else np.asarray(weight, np.float32))
    panels = for_weights((math.ceil(O / SIDE), I, SIDE), numbers.dtype)
    if panels.size:
        PACK[numbers.dtype.str](numbers, row, step, O, I, panels, len(panels), tasks=len(panels))
    return PackedParts(panels, (O, I))


def is_few(M: int, I: int) -> bool:
    """Whether M rows count as few: all of them are multiplied by the strips in the order of memory, instead of in blocks of rows."""
    return M <= SIDE or (M <= FEW_ROWS and M * I <= FEW_NUMBERS)


def shares(M: int, strips: int) -> tuple[int, int, int]:
    """The rows of a block, the number of blocks, and the parts that the strips are split into: blocks · parts tasks."""
    threads = get_num_threads()
    blocks = max(math.ceil(M / MOST_ROWS), min(threads, M // ENOUGH), 1)
    if blocks > 1:  # the same work for each thread
        blocks = math.ceil(blocks / threads) * threads
    rows = math.ceil(M / blocks / DEEP) * DEEP
    blocks = math.ceil(M / rows)
    parts = 1 if blocks % threads == 0 else threads * TASKS_EACH if blocks == 1 else math.ceil(threads / blocks)
    return rows, blocks, min(parts, math.ceil(strips / 2))


# ---- the product -------------------------------------------------------------------------------------------------------------------------


def _few(table: Any) -> None:
    """A task is a part of the strips, which are multiplied by all rows, for few rows: one or two strips at a time are read sequentially.

    With the last tile of some strips, a thread also splits the first tile of the next ones, even those of its next task. The results of some strips
    are written only after the next have been multiplied: reading sums at once would wait for them.
    """
    a, place = at(table, ARGUMENTS), table[MEMORY] + claim(table, THREADS) * table[BYTES]
    x, row, step, panels, P, bias, function, y, y_row = floats(a[0]), a[1], a[2], as_stored(a[3]), a[4], floats(a[5]), a[6], floats(a[7]), a[8]
    M, O, K, stream, parts = a[9], a[10], a[11], a[13], a[14]
    square, numbers, space, high, wide = floats(place), as_stored(place), ABREAST * PARTS * TILE_BYTES, TALL * SIDE, ABREAST * SIDE
    corners, groups = at(square, SIDE * DEEP), (P + ABREAST - 1) // ABREAST
    weights = bytes_(place + 4 * (SIDE * DEEP + 2 * DEEP * DEEP))
    xs, tile, whole = at(weights, 4 * space), min(M, high) * LINES, K // DEEP  # bytes of a tile's rows with all parts,
    tall = (K + DEEP - 1) // DEEP * tile  # and of all tiles of the rows that are multiplied at a time
    configure(bytes_(a[12]))
    task, i, before, line, met, ended = claim(table, TASKS), 0, -1, 0, 0, False
    s = groups * task // parts * ABREAST
    if task < parts:
        for r in range(0, M, SIDE):
            rows_apart(at(x, r * row), row, step, min(SIDE, M - r), K, square, at(xs, r // high * tall + r % high * LINES), LINES, 4 * SIDE, tile)
        if whole:
            strips_apart(at(panels, s * K * SIDE), K * SIDE, min(ABREAST, P - s), DEEP, numbers, weights)
    while task < parts or before >= 0:
        corner, other = at(corners, met % 2 * DEEP * DEEP), at(corners, (met + 1) % 2 * DEEP * DEEP)
        then, after, below = task, s, i + high
        if task < parts:
            if below >= M:
                after, below = s + ABREAST, 0
                if after >= min(P, groups * (task + 1) // parts * ABREAST):
                    then = claim(table, TASKS)
                    after = groups * then // parts * ABREAST if then < parts else s
            strips, count, columns, here = at(panels, s * K * SIDE), min(ABREAST, P - s), min(wide, O - s * SIDE), at(xs, i // high * tall)
            start, start_row = at(bias, s * SIDE), 0
            if columns < wide or whole == 0:
                begin(corner, DEEP, min(high, M - i), columns, start)
                start, start_row = corner, DEEP
            if whole:
                these, others = at(weights, met * whole % 2 * space), at(weights, (met * whole + 1) % 2 * space)
                few(corner, start, start_row, here, tile, strips, at(panels, after * K * SIDE), K * SIDE, count, P - after, these, others, whole)
            if whole * DEEP < K:
                these, others = at(weights, 2 * space), at(weights, 3 * space)
                strips_apart(at(strips, whole * DEEP * SIDE), K * SIDE, count, K - whole * DEEP, numbers, these)
                few(corner, corner, DEEP, at(here, whole * tile), tile, numbers, numbers, 0, 1, 1, these, others, 1)
        if before >= 0:
            rows, columns, target = min(high, M - line), min(wide, O - before * SIDE), at(y, line * y_row + before * SIDE)
            copy_tile(other, DEEP, rows, columns, target, y_row)
            finish(target, y_row, rows, columns, function)
            if stream:
                add(at(floats(stream), line * O + before * SIDE), O, rows, columns, target, y_row)
            if ended:
                claim(table, DONE)
        before, line, ended = s if task < parts else -1, i, then != task
        task, s, i, met = then, after, below, met + 1
    release()


def _matmul(table: Any) -> None:
    """A task is a block of rows and a part of the strips. For each block of k, x's rows are split into parts, then the strips, two at a time; while
    two are multiplied by all the rows, the next two are split."""
    a, place = at(table, ARGUMENTS), table[MEMORY] + claim(table, THREADS) * table[BYTES]
    x, row, step, panels, P, bias, function, y, y_row = floats(a[0]), a[1], a[2], as_stored(a[3]), a[4], floats(a[5]), a[6], floats(a[7]), a[8]
    M, O, K, stream, most, blocks, parts = a[9], a[10], a[11], a[13], a[14], a[15], a[16]
    square, numbers, space = floats(place), as_stored(place), 2 * BLOCK_K // DEEP * PARTS * TILE_BYTES  # of two strips
    corner = at(square, SIDE * DEEP)
    weights = bytes_(place + 4 * (SIDE * DEEP + DEEP * DEEP))
    xs = at(weights, 2 * space)
    configure(bytes_(a[12]))
    task = claim(table, TASKS)
    while task < blocks * parts:
        first, part, pairs = task % blocks * most, task // blocks, (P + 1) // 2
        last, strips_from, strips_to = min(first + most, M), pairs * part // parts * 2, min(P, pairs * (part + 1) // parts * 2)
        groups = (last - first + DEEP - 1) // DEEP
        for k in range(0, max(K, 1), BLOCK_K):
            n = min(BLOCK_K, K - k)
            tiles = (n + DEEP - 1) // DEEP
            begins, ends, group, ready, half = k == 0, k + BLOCK_K >= K, tiles * PARTS * TILE_BYTES, False, 0
            for i in range(first, last, SIDE):
                rows_apart(at(x, i * row + k * step), row, step, min(SIDE, last - i), n, square, at(xs, (i - first) // SIDE * group), 4 * SIDE,
                           TILE_BYTES, PARTS * TILE_BYTES)  # fmt: skip
            for s in range(strips_from, strips_to, 2):
                strips, columns = at(panels, (s * K + k) * SIDE), min(DEEP, O - s * SIDE)
                these, others = at(weights, half), at(weights, space - half)
                if not ready:
                    strips_apart(strips, K * SIDE, min(2, strips_to - s), n, numbers, these)
                ready = columns == DEEP and n == tiles * DEEP and s + 4 <= strips_to and O - s * SIDE >= 2 * DEEP
                each = ((SIDE << 16) + groups - 1) // groups if ready else 0
                for g in range(groups):
                    i = first + g * DEEP
                    rows, target, here = min(DEEP, last - i), at(y, i * y_row + s * SIDE), at(xs, 2 * g * group)
                    for c in (0, SIDE):
                        ask_to_write(at(target, c), y_row, rows)
                    _four(target, y_row, at(bias, s * SIDE), begins, here, these, tiles, rows, columns, corner,
                          at(strips, 2 * K * SIDE), K * SIDE, others, g * tiles, each)  # fmt: skip
                    if ends:
                        finish(target, y_row, rows, columns, function)
                    if ends and stream:
                        add(at(floats(stream), i * O + s * SIDE), O, rows, columns, target, y_row)
                half = space - half
        claim(table, DONE)
        task = claim(table, TASKS)
    release()


@inner
def _four(y: Any, y_row: int, bias: Any, begins: bool, x: Any, weights: Any, tiles: int, rows: int, columns: int, corner: Any,
          more: Any, apart: int, others: Any, done: int, each: int) -> None:  # fmt: skip
    """Adds the products of `tiles` tiles of k to two by two tiles of the result; by way of `corner` if there are fewer rows or columns.

    The last five arguments are those of `four`.
    """
    whole = rows == DEEP and columns == DEEP
    target, target_row = (y, y_row) if whole else (corner, DEEP)
    if tiles == 0:
        begin(y, y_row, rows, columns, bias)
    else:
        if not whole and begins:
            begin(corner, DEEP, rows, columns, bias)
        elif not whole:
            copy_tile(y, y_row, rows, columns, corner, DEEP)
        start, start_row = (bias, 0) if begins and whole else (target, target_row)
        group = tiles * PARTS * TILE_BYTES
        four(target, target_row, start, start_row, x, group, weights, group, tiles, more, apart, others, done, each)
        if not whole:
            copy_tile(corner, DEEP, rows, columns, y, y_row)


@inner
def add(x: Any, x_row: int, rows: int, columns: int, y: Any, y_row: int) -> None:
    """x += y"""
    for r in range(rows):
        for c in range(columns):
            x[r * x_row + c] += y[r * y_row + c]


def ahead(stored: Any) -> Any:
    """LLVM: how many elements ahead of their use weights are prefetched."""
    return INDEX(AHEAD // (stored.bitwidth // 8))


def in_parts(stored: Any) -> int:
    """How many bfloat16 parts a stored value has, whose sum is exact."""
    return PARTS if stored == types.float32 else PARTS_OF_HALF


def products(tiles: Any, sums: list[int], rows: dict[int, Any], columns: dict[int, Any], parts: int = PARTS) -> Iterator[None]:
    """LLVM: adds the products of tiles of x and of a weight to tiles of sums, in six steps, or in five for weights of two parts.

    `rows` and `columns` map registers to functions that return the operands for loading a part.
    """
    before: tuple[int, int] = -1, -1
    for a, b in (both for both in ORDER if both[1] < parts):
        for part, was, side in ((a, before[0], rows), (b, before[1], columns)):
            for register, fetched in side.items() if part != was else ():
                tiles.load(register, *fetched(part))
        before = a, b
        for total, (x, weight) in zip(sums, itertools.product(rows, columns), strict=True):
            tiles.multiply(PAIRS, total, x, weight)
        yield


def parts_at(builder: Any, place: Any) -> Any:
    """LLVM: the address of each part of a tile."""
    return lambda part: (builder.gep(place, [INDEX(part * TILE_BYTES)]),)


def lines_at(builder: Any, place: Any) -> Any:
    """The same, with a step, where the parts of a row are contiguous."""
    return lambda part: (builder.gep(place, [INDEX(part * 4 * SIDE)]), INDEX(LINES))


def corner_at(builder: Any, place: Any, row: Any, r: int, c: int) -> tuple[Any, Any]:
    """LLVM: the address of the float32 tile that is r tiles down and c across from `place`, and its rows' stride in bytes (`row` is in elements)."""
    here = builder.gep(place, [builder.add(builder.mul(row, INDEX(r * SIDE)), INDEX(c * SIDE))])
    return builder.bitcast(here, INT8.as_pointer()), builder.mul(row, INDEX(4))


def multiply_tiles(builder: Any, rows: int, columns: int, adds: bool, arguments: list, parts: int = PARTS, meanwhile: Any = None) -> None:
    """LLVM: over_parts, for weights of `parts` parts; each step of k first emits `meanwhile`, vector code that runs while tiles multiply."""
    y, y_row, start, start_row, x, x_gap, weights, gap, n = arguments
    tiles, corners = unit_of(builder, INDEX(SIDE)), list(itertools.product(range(rows), range(columns)))
    of_x, of_weights = range(OF_WEIGHTS + 1 - columns - rows, OF_WEIGHTS + 1 - columns), range(OF_WEIGHTS + 1 - columns, OF_WEIGHTS + 1)

    def step(k: Any, carried: list) -> list:
        if meanwhile:
            meanwhile(k)
        depth = builder.mul(k, INDEX(PARTS * TILE_BYTES))
        lines, words = (
            {register: parts_at(builder, builder.gep(a, [builder.add(depth, builder.mul(apart, INDEX(i)))])) for i, register in enumerate(registers)}
            for a, apart, registers in ((x, x_gap, of_x), (weights, gap, of_weights))
        )
        for _ in products(tiles, list(range(len(corners))), lines, words, parts):
            pass
        return []

    for i, place in enumerate(corners):
        tiles.load(i, *corner_at(builder, start, start_row, *place)) if adds else tiles.zero(i)
    loop(builder, n, 1, [], step)
    for i, place in enumerate(corners):
        tiles.store(i, *corner_at(builder, y, y_row, *place))


def over_parts(rows: int, columns: int, adds: bool = True) -> Any:
    """kernel(y, y_row, start, start_row, x, x_gap, weights, gap, n): rows × columns tiles of y, whose sums start from `start`, or from 0.

    A loop over n tiles of k; rows of y are y_row elements apart, of `start` start_row; tiles of x are x_gap bytes apart, strips `gap` bytes.
    """

    @intrinsic
    def kernel(typing_context, y, y_row, start, start_row, x, x_gap, weights, gap, n):
        def generate(context, builder, signature, arguments):
            multiply_tiles(builder, rows, columns, adds, arguments)
            return context.get_dummy_value()

        return types.void(y, types.int64, start, types.int64, x, types.int64, weights, types.int64, types.int64), generate

    return kernel


@intrinsic
def four(typing_context, y, y_row, start, start_row, x, x_gap, weights, gap, n, more, apart, others, done, each):
    """As over_parts(2, 2). While tiles multiply, vector units are free: each step splits each / 2^16 words of the next two strips, `apart`."""

    def generate(context, builder, signature, arguments):
        *arguments, more, apart, others, done, each = arguments
        (gap, n), stored = arguments[-2:], signature.args[9].dtype

        def meanwhile(k: Any) -> None:
            first, after = (builder.lshr(builder.mul(builder.add(done, builder.add(k, INDEX(i))), each), INDEX(16)) for i in range(2))
            end = builder.mul(n, INDEX(SIDE))
            after = builder.select(builder.icmp_signed("<", after, end), after, end)

            def word(i: Any, _: list) -> list:
                v = builder.add(first, i)
                tile, r = builder.lshr(v, INDEX(4)), builder.and_(v, INDEX(SIDE - 1))
                there = builder.add(builder.mul(tile, INDEX(PARTS * TILE_BYTES)), builder.mul(r, INDEX(4 * SIDE)))
                for c in range(2):
                    place = builder.gep(more, [builder.add(builder.mul(v, INDEX(2 * SIDE)), builder.mul(apart, INDEX(c)))])
                    target = builder.gep(others, [builder.add(there, builder.mul(gap, INDEX(c)))])
                    words_apart(builder, place, builder.gep(place, [ahead(stored)]), stored, target)
                return []

            with builder.if_then(builder.icmp_signed("<", first, after)):
                loop(builder, builder.sub(after, first), 1, [], word)

        multiply_tiles(builder, 2, 2, True, arguments, in_parts(stored), meanwhile)
        return context.get_dummy_value()

    index = types.int64
    return types.void(y, index, start, index, x, index, weights, index, index, more, index, others, index, index), generate


def over_few(tall: int, count: int, among: bool) -> Any:
    """kernel(sums, start, start_row, x, tile, strips, more, apart, left, left_then, these, others, n): n tiles of strips by `tall` tiles of x.

    Strips are one or two, `apart`; sums have DEEP elements in a row, and start from `start`. While a tile in `these` multiplies, the next is split
    into `others`, before the products or, if `among`, between them; with the last tile, the first of `more`, the next strips. If only one strip is
    left now (`left`) or will be next (`left_then`), it stands in for the second.
    """

    @intrinsic
    def kernel(typing_context, sums, start, start_row, x, tile, strips, more, apart, left, left_then, these, others, n):
        def generate(context, builder, signature, arguments):
            few_tiles(builder, tall, count, among, signature.args[5].dtype, arguments)
            return context.get_dummy_value()

        index = types.int64
        return types.void(sums, start, index, x, index, strips, more, index, index, index, these, others, index), generate

    return kernel


def few_tiles(builder: Any, tall: int, count: int, among: bool, stored: Any, arguments: list) -> None:
    """LLVM: the code of over_few's kernel."""
    sums, start, start_row, x, tile, strips, more, apart, left, left_then, these, others, n = arguments
    tiles, parts, size = unit_of(builder, INDEX(SIDE)), in_parts(stored), INDEX(SIDE * DEEP)
    rows, steps = list(itertools.product(range(SIDE), range(count))), sum(part < parts for _, part in ORDER)
    corners = list(itertools.product(range(tall), range(count)))
    gap, gap_then = (builder.select(builder.icmp_signed(">", some, INDEX(1)), apart, INDEX(0)) for some in (left, left_then))

    def beside(place: Any, t: Any) -> list:
        return [place, builder.gep(place, [builder.select(builder.icmp_signed("<", t, n), gap, gap_then)])]

    def step(t: Any, carried: list) -> list:
        here, there, asked = carried
        after, later = builder.add(t, INDEX(1)), builder.add(t, INDEX(1 + TILES_AHEAD))
        following = builder.gep(strips, [builder.mul(after, size)])
        sources = beside(builder.select(builder.icmp_signed("<", after, n), following, more), after)
        asked = builder.select(builder.icmp_signed("==", later, n), more, builder.gep(asked, [size]))
        wanted = beside(asked, later) if count > 1 else [builder.gep(sources[0], [ahead(stored)])]
        line = builder.gep(x, [builder.mul(tile, t)])
        lines = {register: lines_at(builder, builder.gep(line, [INDEX(r * SIDE * LINES)])) for r, register in enumerate(OF_LINES[:tall])}
        words = {register: parts_at(builder, builder.gep(here, [INDEX(c * PARTS * TILE_BYTES)])) for c, register in enumerate(OF_STRIPS[:count])}

        def take_apart(some: list) -> None:
            for r, c in some:
                target = builder.gep(there, [INDEX(c * PARTS * TILE_BYTES + r * 4 * SIDE)])
                source, later = (builder.gep(places[c], [INDEX(r * DEEP)]) for places in (sources, wanted))
                words_apart(builder, source, later, stored, target)

        take_apart([] if among else rows)
        for i, _ in enumerate(products(tiles, list(range(len(corners))), lines, words, parts)):
            take_apart(rows[len(rows) * i // steps : len(rows) * (i + 1) // steps] if among else [])
        return [there, here, asked]

    for i, place in enumerate(corners):
        tiles.load(i, *corner_at(builder, start, start_row, *place))
    loop(builder, n, 1, [these, others, builder.gep(strips, [INDEX(TILES_AHEAD * SIDE * DEEP)])], step)
    for i, place in enumerate(corners):
        tiles.store(i, *corner_at(builder, sums, INDEX(DEEP), *place))


# ---- splitting into parts ----------------------------------------------------------------------------------------------------------------


def parts_of(builder: Any, numbers: Any, count: int = PARTS) -> list:
    """LLVM: splits a vector of float32 exactly into three parts, or into two if it was float16: words of float32 whose lower halves are 0.

    Of three, the first is rounded to nearest, so that the remainder has either sign, and the errors of the products left out average to zero.
    """
    found = []
    for i in range(count):
        word = builder.bitcast(numbers, WORDS)
        if count == PARTS and i == 0:
            word = builder.add(word, every(WORDS, 0x8000))
        if count == PARTS or i == 0:
            word = builder.and_(word, every(WORDS, 0xFFFF0000))
        numbers = builder.fsub(numbers, builder.bitcast(word, VECTOR))
        found.append(word)
    return found


@inner
def rows_apart(x: Any, row: int, step: int, rows: int, n: int, square: Any, xs: Any, line: int, part: int, tile: int) -> None:
    """Splits up to 16 rows of n values; in xs, rows are `line` bytes apart, parts `part`, and tiles of k `tile`. By way of `square` where values are
    not contiguous or do not fill a tile."""
    whole = n // DEEP if step == 1 else 0
    if whole:
        for r in range(rows):
            row_apart(at(x, r * row), whole, 2 * row, at(xs, r * line), part, tile)
    for k in range(whole * DEEP, n, DEEP):
        if row == 1 and rows == SIDE and k + DEEP <= n:
            turn(at(x, k * step), step, DEEP, square)
        else:
            for r in range(rows):
                for j in range(DEEP):
                    square[r * DEEP + j] = x[r * row + (k + j) * step] if k + j < n else np.float32(0)
        for r in range(rows):
            row_apart(at(square, r * DEEP), 1, 0, at(xs, k // DEEP * tile + r * line), part, 0)


@intrinsic
def row_apart(typing_context, x, n, ahead, target, part, tile):
    """Splits n times 32 values: a row of each of n tiles. Values `ahead` elements further on are prefetched."""

    def generate(context, builder, signature, arguments):
        x, n, ahead, target, part, tile = arguments

        def body(k: Any, carried: list) -> list:
            here, there = builder.gep(x, [builder.mul(k, INDEX(DEEP))]), builder.gep(target, [builder.mul(k, tile)])
            both = [builder.gep(here, [INDEX(half * SIDE)]) for half in range(2)]
            for place in both:
                prefetch(builder, builder.gep(place, [ahead]), level=2)
            put_row(builder, [widened(builder, place, VECTOR, signature.args[0].dtype, TILE) for place in both], there, part)
            return []

        loop(builder, n, 1, [], body)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, target, types.int64, types.int64), generate


def put_row(builder: Any, both: list, target: Any, part: Any = PLANE) -> None:
    """LLVM: splits two vectors, which together fill a tile's row, and stores that row for each part, `part` bytes apart."""
    for i, words in enumerate(zip(*(parts_of(builder, numbers) for numbers in both), strict=True)):
        store(builder, upper_halves(builder, *words), builder.gep(target, [builder.mul(part, INDEX(i))]))


def upper_halves(builder: Any, first: Any, second: Any) -> Any:
    """LLVM: the upper halves of two vectors of words, concatenated; the lower halves are 0."""
    if UNIT == EMULATED:
        both = builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(SINGLE, DEEP), list(range(DEEP))))
        return builder.trunc(builder.lshr(both, every(both.type, 16)), ir.VectorType(ir.IntType(16), DEEP))
    numbers = (builder.bitcast(words, VECTOR) for words in (second, first))  # exact here, except that subnormals become 0
    return instruction(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", ir.VectorType(ir.IntType(16), DEEP), *numbers)


@intrinsic
def turn(typing_context, x, step, n, square):
    """square[r, k] = x[k · step + r], 16 rows of 32 values; for k ≥ n, the last is repeated."""

    def generate(context, builder, signature, arguments):
        x, step, n, square = arguments
        places = rows_from(builder, x, step, n, DEEP)
        for half in (0, SIDE):
            columns = [widened(builder, place, VECTOR, signature.args[0].dtype, TILE) for place in places[half : half + SIDE]]
            for r, line in enumerate(transposed(builder, columns)):
                store(builder, line, builder.gep(square, [INDEX(r * DEEP + half)]))
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, square), generate


@inner
def strips_apart(strips: Any, apart: int, count: int, n: int, square: Any, weights: Any) -> None:
    """Splits n of k of one or two strips; an incomplete last tile is filled with 0, by way of `square`."""
    whole, gap = n // DEEP, (n + DEEP - 1) // DEEP * PARTS * TILE_BYTES
    for c in range(count):
        strip = at(strips, c * apart)
        if whole:
            tiles_apart(strip, whole, at(weights, c * gap))
        if whole * DEEP < n:
            for i in range(SIDE * DEEP):
                square[i] = 0
            copy_tile(at(strip, whole * DEEP * SIDE), SIDE, n - whole * DEEP, SIDE, square, SIDE)
            tiles_apart(square, 1, at(weights, c * gap + whole * PARTS * TILE_BYTES))


@intrinsic
def tiles_apart(typing_context, strip, n, weights):
    """Splits n tiles of a strip."""

    def generate(context, builder, signature, arguments):
        (strip, n, weights), stored = arguments, signature.args[0].dtype

        def body(k: Any, carried: list) -> list:
            here, there = builder.gep(strip, [builder.mul(k, INDEX(SIDE * DEEP))]), builder.gep(weights, [builder.mul(k, INDEX(PARTS * TILE_BYTES))])
            for r in range(SIDE):
                place, target = builder.gep(here, [INDEX(r * 2 * SIDE)]), builder.gep(there, [INDEX(r * 4 * SIDE)])
                words_apart(builder, place, builder.gep(place, [ahead(stored)]), stored, target)
            return []

        loop(builder, n, 1, [], body)
        return context.get_dummy_value()

    return types.void(strip, types.int64, weights), generate


def words_apart(builder: Any, place: Any, asked: Any, stored: Any, target: Any) -> None:
    """LLVM: splits two neighbours in k of a strip, a row of a tile, and prefetches those at `asked`."""
    both = [[builder.gep(there, [INDEX(i * SIDE)]) for i in range(2)] for there in (place, asked)]
    for line in both[1][: 2 * SIDE * stored.bitwidth // 8 // LINE]:
        prefetch(builder, line, level=2)
    put_words(builder, [widened(builder, line, VECTOR, stored, TILE) for line in both[0]], target, in_parts(stored))


def put_words(builder: Any, both: list, target: Any, parts: int = PARTS) -> None:
    """LLVM: splits two vectors, interleaves them in words, and stores a tile's row for each part."""
    for i, (lower, upper) in enumerate(zip(*(parts_of(builder, numbers, parts) for numbers in both), strict=True)):
        store(builder, builder.or_(builder.lshr(lower, every(WORDS, 16)), upper), builder.gep(target, [INDEX(i * TILE_BYTES)]))


# For each stored dtype: its name, its pointer type, how many strips up to 16 rows are multiplied by at a time, and whether those are split between
# the products or before them: a single strip of float16 would wait for its own sums, two of float32, or splitting between products, for memory.
STORED = {"<f4": ("float32", floats, 1, False), "<i2": ("float16", int16s, 2, True)}


def variants(function: Any, name: str, tall: int = 1) -> dict[str, Kernel]:
    """The kernel's variant for each stored dtype; with tall=2, two tiles of rows are multiplied by two strips at a time."""
    found = {}
    for dtype, (stored, pointers, abreast, among) in STORED.items():
        count, among = (abreast, among) if tall == 1 else (2, True)
        meanings = {"as_stored": pointers, "TALL": tall, "ABREAST": count, "few": over_few(tall, count, among)}
        found[dtype] = variant(function, f"{stored}_{name}", COLUMNS=SIDE, **meanings)
    return found


PACK, MATMUL, FEW, SOME = variants(_pack, "strips"), variants(_matmul, "strips"), variants(_few, "strips"), variants(_few, "strips_of_some", tall=2)
