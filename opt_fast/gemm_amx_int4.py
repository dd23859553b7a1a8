"""Matrix products in Intel's tiles (AMX) with int4 weights, for 16 or more rows: bit-identical to gemm_int.py, whose panels it reads.

A panel is unpacked to bytes, in strips of tiles as in gemm_amx.py, and then multiplied by all rows of a block. A tile is as deep as a group of k with
a common scale; the sums for x's upper and lower bytes are combined, scaled and added to the result in float32, group by group. For 16 rows by 16
columns, that takes as long as the tile instructions, so it is done while the tiles multiply the next group.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from opt_fast.gemm import BLOCK_K, COLUMNS, TILE, begin, widened
from opt_fast.gemm_amx import (
    BYTES_OF,
    INDEX,
    OF_WEIGHTS,
    OF_X,
    SIDE,
    TILE_BYTES,
    VECTOR,
    add_scaled_to,
    configure,
    release,
    round_block,
    rounded_size,
    shares,
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
    store,
)
from opt_fast.rowwise import FUNCTIONS

DEEP = 4 * SIDE  # values of k in a tile's row, at most
STRIPS = COLUMNS // SIDE  # of a panel
MOST_STRIPS, WEIGHT_BYTES = 32, 600 << 10  # unpacked together, at most, so that they stay in the L2 cache
PER = 4  # weights in a word
SHAPES = {group: tile_shapes(SIDE, group // PER) for group in (DEEP // 2, DEEP)}
SIGNS = sum(8 << 4 * part for part in range(PER) if part % RUN[4] < RUN[4] - 1)  # flips that make a word's unsigned weights signed


class PackedNibbles(PackedIntegers):
    """An int4 weight (O, I) whose products are in tiles if x has at least 16 rows: with fewer, unpacking costs more than tiles save."""

    @property
    def tiles(self) -> int:
        return math.ceil(self.shape[1] / DEEP)

    @property
    def abreast(self) -> int:
        """Panels that are unpacked together."""
        return max(1, min(MOST_STRIPS, WEIGHT_BYTES // (self.tiles * TILE_BYTES)) // STRIPS)

    def needed(self, M: int) -> int:
        """Scratch memory of a thread, in float32 elements: sums, a row, some panels' scales and strips, and x's block."""
        I, (rows, *_) = self.shape[1], shares(M, self.shape[1], self.count)
        panels = self.abreast * COLUMNS * (SIDE + math.ceil(I / self.group) + self.tiles * SIDE)
        return max(super().needed(M), lines(4 * SIDE * SIDE + BLOCK_K + panels + rounded_size(rows, I, np.int8)))

    def call(self, x: np.ndarray, row: int, step: int, bias: np.ndarray, function: str | None, y: Any, M: int) -> tuple[Kernel, list, int]:
        """As PackedIntegers.call."""
        if M < SIDE or step != 1:
            return super().call(x, row, step, bias, function, y, M)
        (O, I), (rows, blocks, parts) = self.shape, shares(M, self.shape[1], self.count)
        arguments = [x, row, self.panels, self.count, bias, FUNCTIONS[function], y, O, M, O, I, rows, blocks, parts, self.columns, self.columns.size,
                     self.group, self.height(BLOCK_K) * COLUMNS, self.abreast, SHAPES[self.group]]  # fmt: skip
        return MATMUL, arguments, blocks * parts


def _matmul_nibbles(table: Any) -> None:
    """A task is a block of rows and a part of the panels: x's rows are rounded; then `abreast` panels at a time are unpacked, and multiplied by the
    rows, 16 at a time."""
    a, place = at(table, ARGUMENTS), table[MEMORY] + claim(table, THREADS) * table[BYTES]
    x, row, panels, P, bias, function, y, y_row = floats(a[0]), a[1], int16s(a[2]), a[3], floats(a[4]), a[5], floats(a[6]), a[7]
    M, O, K, most, blocks, parts, factors, uneven, group, full = a[8], a[9], a[10], a[11], a[12], a[13], floats(a[14]), a[15], a[16], a[17]
    abreast, strip, groups = a[18], (K + DEEP - 1) // DEEP * TILE_BYTES, (K + group - 1) // group
    apart = floats(place)
    line = at(apart, 4 * SIDE * SIDE)
    sums = at(line, BLOCK_K)
    scales = at(sums, abreast * COLUMNS * SIDE)
    strips = place + 4 * (4 * SIDE * SIDE + BLOCK_K + abreast * COLUMNS * (SIDE + groups))
    rounded_x, plane = strips + abreast * STRIPS * strip, most // SIDE * strip
    xs, sizes = bytes_(rounded_x), floats(rounded_x + 2 * plane)
    configure(bytes_(a[19]))
    task = claim(table, TASKS)
    while task < blocks * parts:
        first, part = task % blocks * most, task // blocks
        last, panels_to = min(first + most, M), P * (part + 1) // parts
        for k in range(0, K, BLOCK_K):
            for i in range(last - first):
                round_block(at(x, (first + i) * row + k), 1, at(factors, k), uneven, line, True, xs, plane, most, K, i, k)
        for some in range(P * part // parts, panels_to, abreast):
            columns = min(min(some + abreast, panels_to) * COLUMNS, O) - some * COLUMNS
            for k in range(0, K, BLOCK_K):
                n, _ = tiles_of(K, k, PER)
                height = (n + PER - 1) // PER + (n + group - 1) // group
                for p in range((columns + COLUMNS - 1) // COLUMNS):
                    words = at(panels, k // BLOCK_K * P * full + (some + p) * height * COLUMNS)
                    for g in range(0, n, group):
                        unpack(at(words, g // group * (group // PER + 1) * COLUMNS), (min(group, n - g) + PER - 1) // PER,
                               bytes_(strips + p * STRIPS * strip + (k + g) * SIDE), strip,
                               at(scales, (p * groups + (k + g) // group) * COLUMNS))  # fmt: skip
            for i in range(0, last - first, SIDE):
                for k in range(0, K, BLOCK_K):
                    n, tiles = tiles_of(K, k, PER)
                    here = at(xs, k // DEEP * TILE_BYTES * (most // SIDE) + i // SIDE * tiles * TILE_BYTES)
                    for c in range(0, columns, SIDE):
                        target, start = at(sums, c * SIDE), at(bias, some * COLUMNS + c)
                        if k == 0 and columns - c < SIDE:
                            begin(line, 0, 1, columns - c, start)
                            start = line
                        by_groups(target, start if k == 0 else target, 0 if k == 0 else SIDE, apart, here, plane,
                                  bytes_(strips + c // SIDE * strip + k * SIDE),
                                  at(scales, (c // COLUMNS * groups + k // group) * COLUMNS + c % COLUMNS),
                                  at(sizes, k // BLOCK_K * most + i), (n + group - 1) // group, group)  # fmt: skip
                for r in range(min(SIDE, last - first - i)):
                    write_row(at(sums, r * SIDE), SIDE * SIDE, at(y, (first + i + r) * y_row + some * COLUMNS), columns, 0, function)
        claim(table, DONE)
        task = claim(table, TASKS)
    release()


@inner
def unpack(words: Any, rows: int, strips: Any, strip: int, scales: Any) -> None:
    """Unpacks a panel's group: scales to float32, words to rows of tiles. Rows missing at the end are multiplied by zeros of x."""
    unpack_scales(words, scales)
    for r in range(rows):
        unpack_row(at(words, (r + 1) * COLUMNS), at(strips, r * 4 * SIDE), strip)


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
def unpack_row(typing_context, words, strips, strip):
    """Unpacks a row of words, for all columns: each 16 columns' bytes go to the same row of their strip. gemm_int.word_order defines the words."""

    def generate(context, builder, signature, arguments):
        words, strips, strip = arguments
        count, width = TILE.vectors, TILE.width
        byte, signs = ir.VectorType(ir.IntType(8), 4 * width), every(PAIRS, SIGNS)
        loaded = [builder.xor(load(builder, builder.gep(words, [INDEX(2 * width * i)]), PAIRS), signs) for i in range(count // 2)]
        neighbours = ir.Constant(
            ir.VectorType(ir.IntType(32), 4 * width), [4 * width * (b % 4 // 2) + 4 * (b // 4) + 2 * (b % 2) for b in range(4 * width)]
        )
        for c in range(count):
            pairs = []
            for vector in (c, count + c):  # of the first two of k, and of the other two
                up = 16 - 4 * (vector % PER + 1)
                word = builder.shl(loaded[vector // PER], every(PAIRS, up)) if up else loaded[vector // PER]
                pairs.append(builder.bitcast(builder.ashr(word, every(PAIRS, 12)), byte))
            place = builder.add(builder.mul(strip, INDEX(c * width // SIDE)), INDEX(c * width % SIDE * 4))
            store(builder, builder.shuffle_vector(*pairs, neighbours), builder.gep(strips, [place]))
        return context.get_dummy_value()

    return types.void(words, strips, types.int64), generate


@intrinsic
def by_groups(typing_context, sums, start, start_row, apart, x, plane, strip, scale, sizes, count, group):
    """Multiplies 16 rows of x by a strip's tiles for `count` groups of k; each group's sums are scaled and added as in gemm_int.micro_kernel.

    Sums start from the values at `start`, whose rows are start_row apart. While one group is added, the tiles multiply the next.
    """

    def generate(context, builder, signature, arguments):
        sums, start, start_row, apart, x, plane, strip, scale, sizes, count, group = arguments
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
            scales = load(builder, builder.gep(scale, [builder.mul(g, INDEX(COLUMNS))]), VECTOR)
            return [add_scaled_to(builder, total, both(g, r), scales, builder.gep(sizes, [INDEX(r)])) for r, total in enumerate(totals)]

        load_tiles(INDEX(0))
        multiply(INDEX(0))
        begun = [load(builder, builder.gep(start, [builder.mul(start_row, INDEX(r))]), VECTOR) for r in range(SIDE)]
        for r, total in enumerate(loop(builder, count, 1, begun, step)):
            store(builder, total, builder.gep(sums, [INDEX(r * SIDE)]))
        return context.get_dummy_value()

    return types.void(sums, start, types.int64, apart, x, types.int64, strip, scale, sizes, types.int64, types.int64), generate


MATMUL = Kernel(_matmul_nibbles)
