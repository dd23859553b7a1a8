"""Matrix products in Intel's tiles (AMX) with int4 weights, for three rows and more: bit-identical to gemm_int.py, whose panels it reads.

A panel's block of k is unpacked to bytes, in strips of tiles as in gemm_amx.py, and multiplied by all rows of a block of x; meanwhile the next one is
unpacked. A tile is as deep as a group of k with a common scale; the sums for x's upper and lower bytes are combined, scaled and added to the result
in float32, group by group. For 16 rows by 16 columns, that takes as long as the tile instructions, so it is done while the tiles multiply the next
group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from opt_fast.gemm import BLOCK_K, COLUMNS, TILE, begin, widened
from opt_fast.gemm_amx import (
    BYTES_OF,
    GROUP,
    INDEX,
    MOST_ROWS,
    OF_WEIGHTS,
    OF_X,
    SIDE,
    TILE_BYTES,
    VECTOR,
    X_BYTES,
    add_scaled_to,
    configure,
    divided,
    floats_of,
    release,
    round_block,
    rounded_size,
    tile_shapes,
    tiles_of,
    unit_of,
    write_row,
)
from opt_fast.gemm_int import PAIRS, RUN, PackedIntegers
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
    inner,
    int16s,
    intrinsic,
    lines,
    load,
    loop,
    prefetch,
    store,
    variant,
)
from opt_fast.rowwise import FUNCTIONS

DEEP = 4 * SIDE  # values of k in a tile's row, at most
QUADS = ir.VectorType(ir.IntType(8), 4 * SIDE)
IN_ORDER = ir.Constant(ir.VectorType(ir.IntType(32), 4 * SIDE), [4 * (b // 4) + (0, 2, 1, 3)[b % 4] for b in range(4 * SIDE)])
STRIPS = COLUMNS // SIDE  # of a panel
PER = 4  # weights in a word
SIGNED = [part % RUN[4] == RUN[4] - 1 for part in range(PER)]  # which of a word's weights are signed
FEWEST, FEW = 3, 8  # rows: with fewer, unpacking costs more than tiles save; up to FEW, tiles have that many rows instead of 16
ENOUGH = 128  # rows of a block: unpacking a panel for each block of fewer would take too long
BLOCK_BYTES = (BLOCK_K // DEEP | 1) * TILE_BYTES  # of a strip's block of k; an odd number of tiles, so that strips do not share cache sets
GROUPS = BLOCK_K // (DEEP // 2)  # of a block of k, at most
SHAPES = {(group, rows): tile_shapes(rows, group // PER) for group in (DEEP // 2, DEEP) for rows in (FEW, SIDE)}


class PackedNibbles(PackedIntegers):
    """An int4 weight (O, I) whose products are in tiles if x has at least FEWEST rows."""

    def shares(self, M: int) -> tuple[int, int, int]:
        """The rows of a block, the number of blocks, and the parts that the panels are split into: blocks · parts tasks."""
        most = max(GROUP, min(MOST_ROWS, X_BYTES // (2 * self.shape[1] + 1) // GROUP * GROUP))
        return divided(M, self.count, ENOUGH, ENOUGH, most, SIDE)

    def needed(self, M: int) -> int:
        """Scratch memory of a thread, in float32 elements: sums, a row, the scales and strips of two blocks of k, and x's block."""
        rows, *_ = self.shares(M)
        panels = COLUMNS * rows + 2 * (GROUPS * COLUMNS + STRIPS * BLOCK_BYTES // 4)
        return max(super().needed(M), lines(4 * SIDE * SIDE + BLOCK_K + panels + rounded_size(rows, self.shape[1], np.int8)))

    def call(self, x: np.ndarray, row: int, step: int, bias: np.ndarray, function: str | None, y: Any, M: int) -> tuple[Kernel, list, int]:
        """As PackedIntegers.call."""
        if M < FEWEST or step != 1:
            return super().call(x, row, step, bias, function, y, M)
        (O, I), (rows, blocks, parts), tall = self.shape, self.shares(M), FEW if M <= FEW else SIDE
        arguments = [x, row, self.panels, self.count, bias, FUNCTIONS[function], y, O, M, O, I, rows, blocks, parts, self.columns, self.columns.size,
                     self.group, self.height(BLOCK_K) * COLUMNS, SHAPES[self.group, tall]]  # fmt: skip
        return MATMUL[tall], arguments, blocks * parts


def _matmul_nibbles(table: Any) -> None:
    """A task is a block of rows, which are rounded first, and a part of the panels. While one block of k of a panel is multiplied, the next is
    unpacked to the other of two places."""
    a, place = at(table, ARGUMENTS), table[MEMORY] + claim(table, THREADS) * table[BYTES]
    x, row, panels, P, bias, function, y, y_row = floats(a[0]), a[1], int16s(a[2]), a[3], floats(a[4]), a[5], floats(a[6]), a[7]
    M, O, K, most, blocks, parts, factors, uneven, group, full = a[8], a[9], a[10], a[11], a[12], a[13], floats(a[14]), a[15], a[16], a[17]
    apart = floats(place)
    line = at(apart, 4 * SIDE * SIDE)
    sums = at(line, BLOCK_K)
    scales, other_scales = at(sums, COLUMNS * most), at(sums, COLUMNS * (most + GROUPS))
    strips = bytes_(place + 4 * (4 * SIDE * SIDE + BLOCK_K + COLUMNS * (most + 2 * GROUPS)))
    other_strips = at(strips, STRIPS * BLOCK_BYTES)
    xs, plane = at(strips, 2 * STRIPS * BLOCK_BYTES), most // SIDE * ((K + DEEP - 1) // DEEP) * TILE_BYTES
    sizes = floats_of(at(xs, 2 * plane))
    configure(bytes_(a[18]))
    begun, ready, task = -1, -1, claim(table, TASKS)
    while task < blocks * parts:
        first, part = task % blocks * most, task // blocks
        rows, panels_to = min(most, M - first), P * (part + 1) // parts
        coming = min(P * ((task + table[THREADS]) // blocks) // parts, P - 1)  # the next task's first panel, if threads take tasks in turn
        for k in range(0, 0 if first == begun else K, BLOCK_K):
            for i in range(rows):
                round_block(at(x, (first + i) * row + k), 1, at(factors, k), uneven, line, True, xs, plane, most, K, i, k)
            for i in range(rows, most):  # not what was there, which may be subnormal, and slow
                sizes[k // BLOCK_K * most + i] = 0
        begun = first
        for p in range(P * part // parts, panels_to):
            columns = min(COLUMNS, O - p * COLUMNS)
            for k in range(0, K, BLOCK_K):
                n, tiles = tiles_of(K, k, PER)
                if p != ready:
                    unpack_block(block_of(panels, P, full, group, p, k, K), n, group, 0, strips, scales)
                next_k = k + BLOCK_K if k + BLOCK_K < K else 0
                ready = p if next_k else p + 1 if p + 1 < panels_to else coming
                words, next_n = block_of(panels, P, full, group, ready, next_k, K), min(BLOCK_K, K - next_k)
                count, whole = (n + group - 1) // group, 0 if next_n % group else next_n // group
                for i in range(0, rows, SIDE):
                    here, size = at(xs, (k // DEEP * (most // SIDE) + i // SIDE * tiles) * TILE_BYTES), at(sizes, k // BLOCK_K * most + i)
                    for c in range(STRIPS):
                        target, start = at(sums, (i * STRIPS + c * SIDE) * SIDE), at(bias, p * COLUMNS + c * SIDE)
                        if k:
                            start = target
                        elif columns < (c + 1) * SIDE:
                            begin(line, 0, 1, max(columns - c * SIDE, 0), start)
                            start = line
                        by_groups(target, start, SIDE if k else 0, apart, here, plane, at(strips, c * BLOCK_BYTES), at(scales, c * SIDE), size, count,
                                  group, words, other_strips, other_scales, c, 0 if i else whole)  # fmt: skip
                unpack_block(words, next_n, group, min(count, whole), other_strips, other_scales)
                strips, other_strips, scales, other_scales = other_strips, strips, other_scales, scales
            for r in range(rows):
                row_sums = at(sums, (r // SIDE * COLUMNS + r % SIDE) * SIDE)
                write_row(row_sums, SIDE * SIDE, at(y, (first + r) * y_row + p * COLUMNS), columns, 0, function)
        claim(table, DONE)
        task = claim(table, TASKS)
    release()


@inner
def block_of(panels: Any, P: int, full: int, group: int, p: int, k: int, K: int) -> Any:
    """Panel p's words for the block of k that begins at k."""
    n = min(BLOCK_K, K - k)
    return at(panels, k // BLOCK_K * P * full + p * ((n + PER - 1) // PER + (n + group - 1) // group) * COLUMNS)


@inner
def unpack_block(words: Any, n: int, group: int, first: int, strips: Any, scales: Any) -> None:
    """Unpacks a panel's block of n of k, from its group `first` on: scales to float32, words to rows of tiles. Rows missing at the end are multiplied
    by zeros of x."""
    for g in range(first, (n + group - 1) // group):
        here, there = at(words, g * (group // PER + 1) * COLUMNS), at(strips, g * group * SIDE)
        unpack_scales(here, at(scales, g * COLUMNS))
        for r in range((min(group, n - g * group) + PER - 1) // PER):
            unpack_row(at(here, (r + 1) * COLUMNS), at(there, r * 4 * SIDE))


@intrinsic
def unpack_scales(typing_context, words, scales):
    """Converts a row of float16 scales to float32."""

    def generate(context, builder, signature, arguments):
        words, scales = arguments
        vector = ir.VectorType(ir.FloatType(), TILE.width)
        for c in range(0, COLUMNS, TILE.width):
            store(builder, widened(builder, builder.gep(words, [INDEX(c)]), vector, types.int16, TILE), builder.gep(scales, [INDEX(c)]))
        return context.get_dummy_value()

    return types.void(words, scales), generate


@intrinsic
def unpack_row(typing_context, words, strips):
    """Unpacks a row of words, for all columns: each 16 columns' bytes go to the same row of their strip."""

    def generate(context, builder, signature, arguments):
        unpack_words(builder, *arguments)
        return context.get_dummy_value()

    return types.void(words, strips), generate


def unpack_words(builder: Any, words: Any, strips: Any) -> None:
    """LLVM: as unpack_row. gemm_int.word_order defines the words: those of one vector belong to the first two of four k, those of another to the last
    two; in each, the lower byte has the first two strips' weights."""
    eight, low = every(PAIRS, 8), every(PAIRS, 0x00FF)
    first, last = (load(builder, builder.gep(words, [INDEX(2 * SIDE * i)]), PAIRS) for i in range(2))
    lower = builder.or_(builder.and_(first, low), builder.shl(last, eight))
    upper = builder.or_(builder.lshr(first, eight), builder.and_(last, builder.not_(low)))
    for c in range(STRIPS):
        numbers = builder.shuffle_vector(builder.bitcast((lower, upper)[c // 2], QUADS), QUADS(ir.Undefined), IN_ORDER)
        if c % 2:
            numbers = builder.bitcast(builder.lshr(builder.bitcast(numbers, PAIRS), every(PAIRS, 4)), QUADS)
        numbers = builder.and_(numbers, every(QUADS, 15))
        if SIGNED[c]:
            numbers = builder.xor(numbers, every(QUADS, 8))
        store(builder, builder.sub(numbers, every(QUADS, 8)), builder.gep(strips, [INDEX(c * BLOCK_BYTES)]))


def of_rows(rows: int) -> Any:
    """kernel(sums, start, start_row, apart, x, plane, strip, scale, sizes, count, group, words, strips, scales, c, whole)

    Multiplies `rows` rows of x by a strip's tiles for `count` groups of k; each group's sums are scaled and added as in gemm_int.micro_kernel, while
    the tiles multiply the next. Sums start from the values at `start`, whose rows are start_row apart. Meanwhile, of as many groups of another block,
    if it has so many `whole` ones, the c-th quarter of the rows and of the scales is unpacked.
    """

    @intrinsic
    def kernel(typing_context, sums, start, start_row, apart, x, plane, strip, scale, sizes, count, group, words, strips, scales, c, whole):
        def generate(context, builder, signature, arguments):
            sums, start, start_row, apart, x, plane, strip, scale, sizes, count, group, *other, whole = arguments
            tiles = unit_of(builder, builder.sdiv(group, INDEX(PER)))

            def both(g: Any, row: int) -> Any:
                return builder.gep(apart, [builder.add(builder.mul(builder.and_(g, INDEX(1)), INDEX(2 * SIDE * SIDE)), INDEX(row * SIDE))])

            def load_tiles(g: Any) -> None:
                first = builder.mul(g, group)
                inside = builder.urem(first, INDEX(DEEP))
                here = builder.add(builder.mul(builder.sub(first, inside), INDEX(TILE_BYTES // DEEP)), inside)
                tiles.load(OF_WEIGHTS, builder.gep(strip, [builder.mul(first, INDEX(SIDE))]))
                for i, offset in enumerate((here, builder.add(here, plane))):
                    tiles.load(OF_X - i, builder.gep(x, [offset]))

            def multiply(g: Any) -> None:
                for i, name in enumerate(BYTES_OF):
                    tiles.zero(i)
                    tiles.multiply(name, i, OF_X - i, OF_WEIGHTS)
                after = builder.add(g, INDEX(1))
                load_tiles(builder.select(builder.icmp_signed("<", after, count), after, g))  # before storing sums, for which loads would wait
                for i in range(2):
                    tiles.store(i, builder.bitcast(both(g, i * SIDE), ir.IntType(8).as_pointer()))

            def step(g: Any, totals: list) -> list:
                after = builder.add(g, INDEX(1))
                with builder.if_then(builder.icmp_signed("<", after, count)):
                    multiply(after)
                with builder.if_then(builder.icmp_signed("<", g, whole)):
                    unpack_quarter(builder, g, group, whole, *other)
                scales = load(builder, builder.gep(scale, [builder.mul(g, INDEX(COLUMNS))]), VECTOR)
                return [add_scaled_to(builder, total, both(g, r), scales, builder.gep(sizes, [INDEX(r)])) for r, total in enumerate(totals)]

            load_tiles(INDEX(0))
            multiply(INDEX(0))
            begun = [load(builder, builder.gep(start, [builder.mul(start_row, INDEX(r))]), VECTOR) for r in range(rows)]
            for r, total in enumerate(loop(builder, count, 1, begun, step)):
                store(builder, total, builder.gep(sums, [INDEX(r * SIDE)]))
            return context.get_dummy_value()

        n = types.int64
        return types.void(sums, start, n, apart, x, n, strip, scale, sizes, n, n, words, strips, scales, n, n), generate

    return kernel


def unpack_quarter(builder: Any, g: Any, group: Any, groups: Any, words: Any, strips: Any, scales: Any, c: Any) -> None:
    """LLVM: of a block's group g, unpacks the c-th quarter of rows and scales; prefetches the same rows of the next panel's same block."""
    quarter = builder.sdiv(group, INDEX(PER * STRIPS))  # of a group's rows
    height = builder.mul(builder.add(builder.mul(quarter, INDEX(STRIPS)), INDEX(1)), INDEX(COLUMNS))  # words of a group, its scales first
    first, here, some = builder.mul(c, quarter), builder.gep(words, [builder.mul(g, height)]), builder.mul(c, INDEX(SIDE))
    rows = builder.gep(here, [builder.mul(builder.add(first, INDEX(1)), INDEX(COLUMNS))])
    target = builder.gep(strips, [builder.mul(builder.add(builder.mul(g, group), builder.mul(first, INDEX(PER))), INDEX(SIDE))])

    def row(r: Any, carried: list) -> list:
        line = builder.gep(rows, [builder.mul(r, INDEX(COLUMNS))])
        for i in range(0, COLUMNS, LINE // 2):
            prefetch(builder, builder.gep(line, [builder.add(builder.mul(height, groups), INDEX(i))]), level=2)
        unpack_words(builder, line, builder.gep(target, [builder.mul(r, INDEX(4 * SIDE))]))
        return []

    loop(builder, quarter, 1, [], row)
    numbers = widened(builder, builder.gep(here, [some]), VECTOR, types.int16, TILE)
    store(builder, numbers, builder.gep(scales, [builder.add(builder.mul(g, INDEX(COLUMNS)), some)]))


by_groups = of_rows(SIDE)
MATMUL = {rows: variant(_matmul_nibbles, str(rows), by_groups=of_rows(rows)) for rows in (FEW, SIDE)}
