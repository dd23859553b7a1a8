"""Matrix products of float32 in Intel's tiles (AMX), which multiply bfloat16: every number is the sum of three, and six of their nine products count.

x = x0 + x1 + x2 to the last bit: 8 bits of 24 each. Of x · w, x1 · w2, x2 · w1 and x2 · w2 are left out, some 2^-25 of it, less than float32 rounds
off by itself. Six instructions for tiles of bfloat16 still take half the time of float32's own, and sums of fewer, longer terms round less often:
errors are like those of products in float32 (Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype").
What differs: infinite numbers, and those from 3.3961775e38 on, become NaN, and parts below 1.2e-38 are taken as 0.

Weights stay float32 in memory, as strips of 16 columns, (P, I, 16). A block of a strip is taken apart when it is needed, and met by all rows of a
task, or where rows are few by these while memory sends the next. A result depends on its own row and column alone: it begins with the bias, and for
32 numbers of k after the other the six products are added, in one order, however many rows go in together and however the work is cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import get_num_threads, types

from opt_fast.gemm import AHEAD, BLOCK_K, EMULATED, TASKS_EACH, TILE, Packed, _pack, begin, copy_tile, finish, flat, widened
from opt_fast.gemm_amx import INDEX, INT8, OF_WEIGHTS, OF_X, PAIRS, SHAPES, SIDE, SINGLE, TILE_BYTES, UNIT, VECTOR, WORDS, configure, release, unit_of
from opt_fast.kernel import (
    ARGUMENTS,
    BYTES,
    DONE,
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
    intrinsic,
    lines,
    load,
    loop,
    prefetch,
    rows_from,
    store,
    transposed,
    variant,
)
from opt_fast.rowwise import FUNCTIONS

PARTS, PLANE = 3, INDEX(TILE_BYTES)  # which are so far apart in memory, unless it is said otherwise
ORDER = (2, 0), (1, 0), (1, 1), (0, 1), (0, 2), (0, 0)  # x's part and the weight's: from one to the next, one of them stays in its tile
DEEP = 2 * SIDE  # numbers of k that tiles hold
MOST_ROWS, ENOUGH = 256, 96  # of a block: 384 numbers of each in parts take 0.6 MB of the second-level cache, two by two strips 144 kB


class PackedParts(Packed):
    """A float32 weight (O, I) as strips (P, I, 16) for products in tiles: panels[p, i, c] is weight[16p + c, i], zeros beyond O."""

    width = SIDE

    @property
    def needed(self) -> int:
        """Numbers of memory that a thread needs for a product: parts of x and of two strips, twice, a tile of numbers, and two by two of sums."""
        of_x = max(MOST_ROWS * BLOCK_K, SIDE * math.ceil(self.shape[1] / DEEP) * DEEP)
        return lines(PARTS * (of_x + 4 * SIDE * BLOCK_K) // 2 + SIDE * DEEP + DEEP * DEEP)

    def call(self, x: np.ndarray, row: int, step: int, bias: np.ndarray, function: str | None, y: Any, M: int,
             adds_to: np.ndarray | None = None) -> tuple[Kernel, list, int]:  # fmt: skip
        """As Packed.call. y's rows may lie further apart, and what it gets can be added to another array, (M, O)."""
        (O, I), stream = self.shape, 0 if adds_to is None else adds_to
        y_row = y.strides[0] // 4 if np.ndim(y) > 1 else O
        arguments = [x, row, step, self.panels, self.count, bias, FUNCTIONS[function], y, y_row, M, O, I, SHAPES[min(M, SIDE)], stream]
        if M <= SIDE:
            parts = min(self.count, get_num_threads() * TASKS_EACH)
            return FEW, [*arguments, parts], parts
        most, blocks, parts = shares(M, self.count)
        return MATMUL, [*arguments, most, blocks, parts], blocks * parts

    def __repr__(self) -> str:
        return f"PackedParts({self.shape})"


def pack(weight: np.ndarray) -> PackedParts:
    """The weight's strips.  weight: (O, I)"""
    (O, I), (numbers, row, step) = weight.shape, flat(np.asarray(weight, np.float32))
    panels = for_weights((math.ceil(O / SIDE), I, SIDE), np.float32)
    if panels.size:
        PACK(numbers, row, step, O, I, panels, len(panels), tasks=len(panels))
    return PackedParts(panels, (O, I))


def shares(M: int, strips: int) -> tuple[int, int, int]:
    """Rows of a block, how many blocks, and parts of the strips for each: blocks times parts are the tasks."""
    threads = get_num_threads()
    blocks = max(math.ceil(M / MOST_ROWS), min(threads, M // ENOUGH), 1)
    if blocks > 1:  # as much work for each thread
        blocks = math.ceil(blocks / threads) * threads
    rows = math.ceil(M / blocks / DEEP) * DEEP
    blocks = math.ceil(M / rows)
    parts = 1 if blocks % threads == 0 else threads * TASKS_EACH if blocks == 1 else math.ceil(threads / blocks)
    return rows, blocks, min(parts, math.ceil(strips / 2))


# ---- the product -------------------------------------------------------------------------------------------------------------------------


def _few(table: Any) -> None:
    """A task is a part of the strips, which few rows meet: each strip is read from one end to the other."""
    a, place = at(table, ARGUMENTS), table[MEMORY] + claim(table, THREADS) * table[BYTES]
    x, row, step, panels, P, bias, function, y, y_row = floats(a[0]), a[1], a[2], floats(a[3]), a[4], floats(a[5]), a[6], floats(a[7]), a[8]
    M, O, K, stream, parts = a[9], a[10], a[11], a[13], a[14]
    square = floats(place)
    corner = at(square, SIDE * DEEP)
    weights = bytes_(place + 4 * (SIDE * DEEP + DEEP * DEEP))
    xs, plane, whole = at(weights, 4 * PARTS * TILE_BYTES), M * 4 * SIDE, K // DEEP
    configure(bytes_(a[12]))
    task = claim(table, TASKS)
    while task < parts:
        rows_apart(x, row, step, M, K, square, xs, plane)
        first, last, done = P * task // parts, P * (task + 1) // parts, 0
        if whole:
            tiles_apart(at(panels, first * K * SIDE), 1, weights)
        for s in range(first, last):
            strip, columns, target = at(panels, s * K * SIDE), min(SIDE, O - s * SIDE), at(y, s * SIDE)
            begin(corner, SIDE, M, columns, at(bias, s * SIDE))
            if whole:
                this, other = done % 2 * PARTS * TILE_BYTES, (done + 1) % 2 * PARTS * TILE_BYTES
                few(corner, xs, plane, strip, at(strip, K * SIDE if s + 1 < last else 0), at(weights, this), at(weights, other), whole)
                done += whole
            if whole * DEEP < K:
                rest, other = 2 * PARTS * TILE_BYTES, 3 * PARTS * TILE_BYTES
                strips_apart(at(strip, whole * DEEP * SIDE), 0, 1, K - whole * DEEP, square, at(weights, rest))
                few(corner, at(xs, whole * PARTS * plane), plane, square, square, at(weights, rest), at(weights, other), 1)
            copy_tile(corner, SIDE, M, columns, target, y_row)
            finish(target, y_row, M, columns, function)
            if stream:
                add(at(floats(stream), s * SIDE), O, M, columns, target, y_row)
        claim(table, DONE)
        task = claim(table, TASKS)
    release()


def _matmul(table: Any) -> None:
    """A task is a block of rows and a part of the strips. Block of k after block of k, x's rows are taken apart, then two strips after the other,
    which meet all the rows; while they do, the next two are taken apart."""
    a, place = at(table, ARGUMENTS), table[MEMORY] + claim(table, THREADS) * table[BYTES]
    x, row, step, panels, P, bias, function, y, y_row = floats(a[0]), a[1], a[2], floats(a[3]), a[4], floats(a[5]), a[6], floats(a[7]), a[8]
    M, O, K, stream, most, blocks, parts = a[9], a[10], a[11], a[13], a[14], a[15], a[16]
    square, space = floats(place), 2 * BLOCK_K // DEEP * PARTS * TILE_BYTES  # of two strips
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
                rows_apart(at(x, i * row + k * step), row, step, min(SIDE, last - i), n, square, at(xs, (i - first) // SIDE * group), TILE_BYTES)
            for s in range(strips_from, strips_to, 2):
                strips, columns = at(panels, (s * K + k) * SIDE), min(DEEP, O - s * SIDE)
                these, others = at(weights, half), at(weights, space - half)
                if not ready:
                    strips_apart(strips, K * SIDE, min(2, strips_to - s), n, square, these)
                ready = columns == DEEP and n == tiles * DEEP and s + 4 <= strips_to and O - s * SIDE >= 2 * DEEP
                each = ((SIDE << 16) + groups - 1) // groups if ready else 0
                for g in range(groups):
                    i = first + g * DEEP
                    rows, target, here = min(DEEP, last - i), at(y, i * y_row + s * SIDE), at(xs, 2 * g * group)
                    if columns == DEEP:
                        _four(target, y_row, at(bias, s * SIDE), begins, here, these, tiles, rows, corner,
                              at(strips, 2 * K * SIDE), K * SIDE, others, g * tiles, each)  # fmt: skip
                    else:
                        for r in range(0, rows, SIDE):
                            for c in range(0, columns, SIDE):
                                _one(at(target, r * y_row + c), y_row, at(bias, s * SIDE + c), begins, at(here, r // SIDE * group),
                                     at(these, c // SIDE * group), tiles, min(SIDE, rows - r), min(SIDE, columns - c), corner)  # fmt: skip
                    if ends:
                        finish(target, y_row, rows, columns, function)
                    if ends and stream:
                        add(at(floats(stream), i * O + s * SIDE), O, rows, columns, target, y_row)
                half = space - half
        claim(table, DONE)
        task = claim(table, TASKS)
    release()


@inner
def _four(y: Any, y_row: int, bias: Any, begins: bool, x: Any, weights: Any, tiles: int, rows: int, corner: Any,
          more: Any, apart: int, others: Any, done: int, each: int) -> None:  # fmt: skip
    """Adds the products of so many tiles to two by two of the result; by way of a corner of memory where there are fewer rows.

    The last five are as `four` wants them.
    """
    whole = rows == DEEP
    target, target_row = (y, y_row) if whole else (corner, DEEP)
    if not whole and not begins:
        copy_tile(y, y_row, rows, DEEP, corner, DEEP)
    if tiles == 0:
        begin(y, y_row, rows, DEEP, bias)
    else:
        start, start_row = (bias, 0) if begins else (target, target_row)
        group = tiles * PARTS * TILE_BYTES
        four(target, target_row, start, start_row, x, group, weights, group, tiles, more, apart, others, done, each)
        if not whole:
            copy_tile(corner, DEEP, rows, DEEP, y, y_row)


@inner
def _one(y: Any, y_row: int, bias: Any, begins: bool, x: Any, weights: Any, tiles: int, rows: int, columns: int,
         corner: Any) -> None:  # fmt: skip
    """The same for a tile, which may have fewer rows or columns."""
    if begins:
        begin(y, y_row, rows, columns, bias)
    whole = rows == SIDE and columns == SIDE
    target, target_row = (y, y_row) if whole else (corner, SIDE)
    if not whole:
        copy_tile(y, y_row, rows, columns, corner, SIDE)
    if tiles:
        one(target, target_row, target, target_row, x, 0, weights, 0, tiles)
    if not whole:
        copy_tile(corner, SIDE, rows, columns, y, y_row)


@inner
def add(x: Any, x_row: int, rows: int, columns: int, y: Any, y_row: int) -> None:
    """x += y"""
    for r in range(rows):
        for c in range(columns):
            x[r * x_row + c] += y[r * y_row + c]


def six_products(tiles: Any, sums: list[int], rows: dict[int, Any], columns: dict[int, Any]) -> Iterator[None]:
    """LLVM, in six steps: adds to tiles of sums the products of tiles of x and of a weight, given by registers and by what loads a part there."""
    before: tuple[int, int] = -1, -1
    for a, b in ORDER:
        for part, was, side in ((a, before[0], rows), (b, before[1], columns)):
            for register, fetched in side.items() if part != was else ():
                tiles.load(register, *fetched(part))
        before = a, b
        for total, (x, weight) in zip(sums, itertools.product(rows, columns), strict=True):
            tiles.multiply(PAIRS, total, x, weight)
        yield


def parts_at(builder: Any, place: Any, plane: Any = PLANE) -> Any:
    """LLVM: where the parts of a tile are, so many bytes apart."""
    return lambda part: (builder.gep(place, [builder.mul(plane, INDEX(part))]),)


def multiply_tiles(builder: Any, rows: int, columns: int, adds: bool, arguments: list, meanwhile: Any = None) -> None:
    """LLVM: what over_parts says; in each step of k, before tiles multiply, comes what vectors do `meanwhile`."""
    y, y_row, start, start_row, x, x_gap, weights, gap, n = arguments
    tiles, corners = unit_of(builder, INDEX(SIDE)), list(itertools.product(range(rows), range(columns)))
    of_x, of_weights = range(OF_WEIGHTS + 1 - columns - rows, OF_WEIGHTS + 1 - columns), range(OF_WEIGHTS + 1 - columns, OF_WEIGHTS + 1)

    def corner(place: Any, row: Any, r: int, c: int) -> tuple[Any, Any]:
        here = builder.gep(place, [builder.add(builder.mul(row, INDEX(r * SIDE)), INDEX(c * SIDE))])
        return builder.bitcast(here, INT8.as_pointer()), builder.mul(row, INDEX(4))

    def step(k: Any, carried: list) -> list:
        if meanwhile:
            meanwhile(k)
        depth = builder.mul(k, INDEX(PARTS * TILE_BYTES))
        lines, words = (
            {register: parts_at(builder, builder.gep(a, [builder.add(depth, builder.mul(apart, INDEX(i)))])) for i, register in enumerate(registers)}
            for a, apart, registers in ((x, x_gap, of_x), (weights, gap, of_weights))
        )
        for _ in six_products(tiles, list(range(len(corners))), lines, words):
            pass
        return []

    for i, place in enumerate(corners):
        tiles.load(i, *corner(start, start_row, *place)) if adds else tiles.zero(i)
    loop(builder, n, 1, [], step)
    for i, place in enumerate(corners):
        tiles.store(i, *corner(y, y_row, *place))


def over_parts(rows: int, columns: int, adds: bool = True) -> Any:
    """kernel(y, y_row, start, start_row, x, x_gap, weights, gap, n): rows × columns tiles of y, whose sums begin with what is at `start`, or with 0.

    A loop over n tiles of k; y's rows are y_row numbers apart, and start's; tiles of x x_gap bytes, the strips `gap`.
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
    """As over_parts(2, 2). While tiles multiply, vectors have time: of the next two strips, `apart`, each step takes each / 2^16 words apart."""

    def generate(context, builder, signature, arguments):
        *arguments, more, apart, others, done, each = arguments
        gap, n = arguments[-2:]

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
                    words_apart(builder, place, builder.gep(others, [builder.add(there, builder.mul(gap, INDEX(c)))]))
                return []

            with builder.if_then(builder.icmp_signed("<", first, after)):
                loop(builder, builder.sub(after, first), 1, [], word)

        multiply_tiles(builder, 2, 2, True, arguments, meanwhile)
        return context.get_dummy_value()

    index = types.int64
    return types.void(y, index, start, index, x, index, weights, index, index, more, index, others, index, index), generate


@intrinsic
def few(typing_context, sums, x, plane, strip, more, this, other, n):
    """Adds the products of n tiles of a strip to a tile of sums: each is taken apart while the one before multiplies; then one more."""

    def generate(context, builder, signature, arguments):
        sums, x, plane, strip, more, this, other, n = arguments
        tiles, place = unit_of(builder, INDEX(SIDE)), builder.bitcast(sums, INT8.as_pointer())

        def step(t: Any, carried: list) -> list:
            here, there = carried
            after = builder.add(t, INDEX(1))
            source = builder.select(builder.icmp_signed("<", after, n), builder.gep(strip, [builder.mul(after, INDEX(SIDE * DEEP))]), more)
            for r in range(SIDE):
                words_apart(builder, builder.gep(source, [INDEX(r * 2 * SIDE)]), builder.gep(there, [INDEX(r * 4 * SIDE)]))
            lines = parts_at(builder, builder.gep(x, [builder.mul(plane, builder.mul(t, INDEX(PARTS)))]), plane)
            for _ in six_products(tiles, [0], {OF_X: lines}, {OF_WEIGHTS: parts_at(builder, here)}):
                pass
            return [there, here]

        tiles.load(0, place)
        loop(builder, n, 1, [this, other], step)
        tiles.store(0, place)
        return context.get_dummy_value()

    return types.void(sums, x, types.int64, strip, more, this, other, types.int64), generate


one = over_parts(1, 1)


# ---- numbers in parts --------------------------------------------------------------------------------------------------------------------


def parts_of(builder: Any, numbers: Any) -> list:
    """LLVM: three vectors of float32, in words, that a vector of float32 is the sum of; their lower halves are 0.

    The first is rounded to the nearest, so that what is left has either sign, and what products leave out of that adds up to nothing.
    """
    found = []
    for i in range(PARTS):
        word = builder.bitcast(numbers, WORDS)
        word = builder.and_(builder.add(word, every(WORDS, 0x8000)) if i == 0 else word, every(WORDS, 0xFFFF0000))
        numbers = builder.fsub(numbers, builder.bitcast(word, VECTOR))
        found.append(word)
    return found


@inner
def rows_apart(x: Any, row: int, step: int, rows: int, n: int, square: Any, xs: Any, plane: int) -> None:
    """Up to 16 rows of n numbers in parts: tile after tile of k, part after part, row after row; by way of a square where they do not lie so."""
    whole = n // DEEP if step == 1 else 0
    if whole:
        for r in range(rows):
            row_apart(at(x, r * row), whole, 2 * row, at(xs, r * 4 * SIDE), plane)
    for k in range(whole * DEEP, n, DEEP):
        if row == 1 and rows == SIDE and k + DEEP <= n:
            turn(at(x, k * step), step, DEEP, square)
        else:
            for r in range(rows):
                for j in range(DEEP):
                    square[r * DEEP + j] = x[r * row + (k + j) * step] if k + j < n else np.float32(0)
        for r in range(rows):
            row_apart(at(square, r * DEEP), 1, 0, at(xs, k // DEEP * PARTS * plane + r * 4 * SIDE), plane)


@intrinsic
def row_apart(typing_context, x, n, ahead, target, plane):
    """n times 32 numbers in parts: a row of each tile. Numbers so far ahead are asked for."""

    def generate(context, builder, signature, arguments):
        x, n, ahead, target, plane = arguments

        def body(k: Any, carried: list) -> list:
            here, there = builder.gep(x, [builder.mul(k, INDEX(DEEP))]), builder.gep(target, [builder.mul(builder.mul(k, plane), INDEX(PARTS))])
            both = [builder.gep(here, [INDEX(half * SIDE)]) for half in range(2)]
            for place in both:
                prefetch(builder, builder.gep(place, [ahead]), level=2)
            put_row(builder, [widened(builder, place, VECTOR, signature.args[0].dtype, TILE) for place in both], there, plane)
            return []

        loop(builder, n, 1, [], body)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, target, types.int64), generate


def put_row(builder: Any, both: list, target: Any, plane: Any = PLANE) -> None:
    """LLVM: two vectors in parts, one after the other: a row of a tile, and of those of the other parts, so many bytes apart."""
    for i, words in enumerate(zip(*(parts_of(builder, numbers) for numbers in both), strict=True)):
        store(builder, upper_halves(builder, *words), builder.gep(target, [builder.mul(plane, INDEX(i))]))


def upper_halves(builder: Any, first: Any, second: Any) -> Any:
    """LLVM: the upper halves of two vectors of words, one vector after the other; the lower ones are 0."""
    if UNIT == EMULATED:
        both = builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(SINGLE, DEEP), list(range(DEEP))))
        return builder.trunc(builder.lshr(both, every(both.type, 16)), ir.VectorType(ir.IntType(16), DEEP))
    numbers = (builder.bitcast(words, VECTOR) for words in (second, first))  # exact here, but that subnormal numbers become 0
    return instruction(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", ir.VectorType(ir.IntType(16), DEEP), *numbers)


@intrinsic
def turn(typing_context, x, step, n, square):
    """square[r, k] = x[k · step + r], 16 rows of 32 numbers; beyond n of them, the last again."""

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
    """n numbers of each column of one or two strips in parts; with zeros behind, by way of a square, where they are not whole tiles."""
    whole, gap = n // DEEP, (n + DEEP - 1) // DEEP * PARTS * TILE_BYTES
    for c in range(count):
        strip = at(strips, c * apart)
        if whole:
            tiles_apart(strip, whole, at(weights, c * gap))
        if whole * DEEP < n:
            for j in range(SIDE * DEEP):
                square[j] = strip[whole * DEEP * SIDE + j] if whole * DEEP * SIDE + j < n * SIDE else np.float32(0)
            tiles_apart(square, 1, at(weights, c * gap + whole * PARTS * TILE_BYTES))


@intrinsic
def tiles_apart(typing_context, strip, n, weights):
    """n tiles of a strip in parts."""

    def generate(context, builder, signature, arguments):
        strip, n, weights = arguments

        def body(k: Any, carried: list) -> list:
            here, there = builder.gep(strip, [builder.mul(k, INDEX(SIDE * DEEP))]), builder.gep(weights, [builder.mul(k, INDEX(PARTS * TILE_BYTES))])
            for r in range(SIDE):
                words_apart(builder, builder.gep(here, [INDEX(r * 2 * SIDE)]), builder.gep(there, [INDEX(r * 4 * SIDE)]))
            return []

        loop(builder, n, 1, [], body)
        return context.get_dummy_value()

    return types.void(strip, types.int64, weights), generate


def words_apart(builder: Any, place: Any, target: Any) -> None:
    """LLVM: two neighbours of k of a strip in parts: a row of a tile. What comes later is asked for."""
    both = [builder.gep(place, [INDEX(i * SIDE)]) for i in range(2)]
    for line in both:
        prefetch(builder, builder.gep(line, [INDEX(AHEAD // 4)]), level=2)
    put_words(builder, [load(builder, line, VECTOR) for line in both], target)


def put_words(builder: Any, both: list, target: Any) -> None:
    """LLVM: two vectors in parts, whose words hold both: a row of a tile, and of the tiles of the other parts."""
    for i, (lower, upper) in enumerate(zip(*(parts_of(builder, numbers) for numbers in both), strict=True)):
        store(builder, builder.or_(builder.lshr(lower, every(WORDS, 16)), upper), builder.gep(target, [INDEX(i * TILE_BYTES)]))


PACK, FEW, MATMUL = variant(_pack, "strips", COLUMNS=SIDE, as_stored=floats), Kernel(_few), Kernel(_matmul)
