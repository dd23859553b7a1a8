"""Attention in float32 on Intel's tiles (AMX): FlashAttention-2 as in attention_cpu.py, its two products by parts as in gemm_parts.py.

As in attention_bf16.py keys are the rows: Sᵀ = K Qᵀ and Oᵀ = Vᵀ Pᵀ, of 32 queries at a time, which stand side by side in two vectors, so each lane has
a softmax of its own; and weights of neighbouring keys become pairs where they are. Exponentials are those of attention_cpu.py.
A query that is alone, as in decoding, meets the same parts in the same order: its scores are a tile of one column, its output one of one row. So its
bits are the same whether it comes alone or with others, and whether keys came at once or one by one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from opt_fast import attention_cpu
from opt_fast.attention_bf16 import divide, fetch, hide, softening, softening_one
from opt_fast.attention_cpu import BC, Forward, by_dtype, exponential, float32_at
from opt_fast.gemm import TILE, widened
from opt_fast.gemm_amx import INDEX, INT8, PAIRS, SHAPES, SIDE, TILE_BYTES, UNIT, VECTOR, WORDS, configure, release, tile_shapes, unit_of
from opt_fast.gemm_parts import DEEP, ORDER, PARTS, over_parts, parts_of, put_words, row_apart, tiles_apart, turn, upper_halves
from opt_fast.kernel import (
    ARGUMENTS,
    BYTES,
    DONE,
    MEMORY,
    TASKS,
    THREADS,
    at,
    bytes_,
    claim,
    every,
    float_of,
    floats,
    inner,
    int64s,
    intrinsic,
    load,
    loop,
    rows_from,
    store,
)
from opt_fast.paged_cache import PAGE

as_stored = floats  # keys and values: the kernel has variants
GROUP = 2 * SIDE  # queries
BLOCKS = BC // DEEP  # of keys
BLOCK = PARTS * TILE_BYTES  # bytes of a tile in parts,
LINES = PARTS * 4 * SIDE  # and of a row of one
OF_SUMS, OF_WEIGHT, OF_LINES, OF_QUERY, OF_SCORES = 0, 4, 5, 6, 7  # tiles of a query that is alone


def needed(queries: int, Dh: int) -> int:
    """Numbers of memory that a task of so many queries needs."""
    deep, wide, groups = math.ceil(Dh / DEEP), math.ceil(Dh / SIDE), math.ceil(queries / GROUP)
    tiles = BC // SIDE * deep + BLOCKS * (wide + 2) + groups * 2 * deep
    return BC * GROUP + tiles * BLOCK // 4 + groups * GROUP * (wide * SIDE + 2) + SIDE * DEEP + wide * SIDE * SIDE


def shapes_of_one() -> np.ndarray:
    """As gemm_amx.tile_shapes, for a query that is alone: its scores and itself are columns, its weights and its output rows."""
    shapes = tile_shapes(SIDE)
    shapes[48 + OF_SUMS : 48 + OF_WEIGHT + 1] = 1
    shapes[16:32].view(np.uint16)[[OF_QUERY, OF_SCORES]] = 4
    return shapes


def _forward(table: Any) -> None:
    a, place = at(table, ARGUMENTS), table[MEMORY] + claim(table, THREADS) * table[BYTES]
    k, v = as_stored(a[1]), as_stored(a[2])
    q, O, L, rows_table, tasks, n = floats(a[0]), floats(a[3]), floats(a[4]), int64s(a[5]), int64s(a[6]), a[7]
    step, apart, H, Dh, scale = a[9], a[10], a[11], a[12], float_of(a[13])
    Br, for_groups, for_one, shaped = a[8], bytes_(a[14]), bytes_(a[15]), 0
    task = claim(table, TASKS)
    while task < n * H:
        h, row, first = task % H, at(rows_table, tasks[task // H * 2] * 5), tasks[task // H * 2 + 1]
        T, S, places, mask, hides = row[1], row[2], int64s(row[3]), bytes_(row[4]), row[4]
        past, count, origin = S - T, min(Br, T - first), (row[0] + first) * H + h
        x, o, lse = at(q, origin * Dh), at(O, origin * Dh), at(L, origin)
        alone = count == 1 and hides == 0
        if shaped != 1 + alone:
            configure(for_one if alone else for_groups)
            shaped = 1 + alone
        if alone:
            attend_alone(x, k, v, places, h * apart, step, past + first + 1, Dh, scale, place, o, lse)
        else:
            attend_groups(x, k, v, places, h * apart, step, mask, hides, past + first, count, H, Dh, scale, place, o, lse)
        claim(table, DONE)
        task = claim(table, TASKS)
    release()


@inner
def attend_groups(q: Any, k: Any, v: Any, places: Any, head: int, step: int, mask: Any, hides: int, past: int, count: int, H: int, Dh: int,
                  scale: Any, place: int, O: Any, L: Any) -> None:  # fmt: skip
    """Some queries of a head, the first of which sees `past` keys besides its own."""
    deep, wide, groups = (Dh + DEEP - 1) // DEEP, (Dh + SIDE - 1) // SIDE, (count + GROUP - 1) // GROUP  # tiles along d, as pairs and as single ones
    scores, keys = floats(place), place + 4 * BC * GROUP
    values = keys + BC // SIDE * deep * BLOCK
    weights = values + wide * BLOCKS * BLOCK
    queries = weights + 2 * BLOCKS * BLOCK
    acc = floats(queries + groups * 2 * deep * BLOCK)
    m = at(acc, groups * wide * SIDE * GROUP)
    l = at(m, groups * GROUP)
    square = at(l, groups * GROUP)
    for i in range(groups * GROUP):
        m[i], l[i] = -np.inf, 0
        for d in range(wide * SIDE):
            acc[i * wide * SIDE + d] = 0
    for i in range(0, groups * GROUP, SIDE):
        some = max(1, min(SIDE, count - i))
        pack_queries(at(q, min(i, count - 1) * H * Dh), H * Dh, some, Dh, scale, square, bytes_(queries + i // SIDE * deep * BLOCK))
    for key in range(0, past + count, BC):
        tile, shown = min(BC, past + count - key), at(mask, key)
        for j in range(0, tile, PAGE):
            here, some = places[(key + j) // PAGE] + head, min(PAGE, tile - j)
            pack_keys(at(k, here), step, some, Dh, square, bytes_(keys + j // SIDE * deep * BLOCK))
            pack_values(at(v, here), step, some, Dh, square, bytes_(values + j // DEEP * BLOCK))
        for j in range((tile + DEEP - 1) // DEEP * DEEP if hides else 0):
            if j >= tile or not shown[j]:  # lest a weight of 0 times NaN be NaN
                clear(bytes_(values + j // DEEP * BLOCK), wide, j % DEEP)
        for g in range(max(0, key - past) // GROUP, groups):  # from the first queries that see this tile
            limit = past + g * GROUP + 1 - key  # the group's first query sees so many keys of the tile
            seen = min(tile, limit + min(GROUP, count - g * GROUP) - 1)
            blocks, sums = (seen + DEEP - 1) // DEEP, at(acc, g * wide * SIDE * GROUP)
            for b in range(blocks):
                target, gap = at(scores, b * DEEP * GROUP), deep * BLOCK
                score(target, GROUP, target, 0, bytes_(keys + 2 * b * gap), gap, TILE_BYTES, bytes_(queries + 2 * g * gap), gap, deep,
                      target, 0, bytes_(keys), 0, 0)  # fmt: skip
            for c in range(2):
                column, before = at(scores, c * SIDE), c * SIDE  # queries
                for j in range(max(0, min(limit, seen)), blocks * DEEP):
                    hide(at(column, j * GROUP), j - limit + 1 - before if j < tile else SIDE)
                for j in range(seen if hides else 0):
                    if not shown[j]:
                        hide(at(column, j * GROUP), SIDE)
                lane = g * GROUP + before
                soften(column, blocks * DEEP, at(m, lane), at(l, lane), at(sums, before), wide * SIDE, bytes_(weights + c * BLOCKS * BLOCK))
            for t in range(0, wide, 2):
                target, line = at(sums, t * SIDE * GROUP), bytes_(values + t * BLOCKS * BLOCK)
                if t + 1 < wide:
                    weigh(target, GROUP, target, GROUP, line, BLOCKS * BLOCK, TILE_BYTES, bytes_(weights), BLOCKS * BLOCK, blocks,
                          target, 0, line, 0, 0)  # fmt: skip
                else:
                    weigh_last(target, GROUP, target, GROUP, line, 0, TILE_BYTES, bytes_(weights), BLOCKS * BLOCK, blocks, target, 0, line, 0, 0)
    for i in range(0, count, SIDE):
        rows, sums = min(SIDE, count - i), at(acc, i // GROUP * wide * SIDE * GROUP + i % GROUP)
        for t in range(wide):
            columns, corner = min(SIDE, Dh - t * SIDE), at(O, i * H * Dh + t * SIDE)
            whole = rows == columns == SIDE
            divide(at(sums, t * SIDE * GROUP), GROUP, at(l, i), corner if whole else square, H * Dh if whole else SIDE)
            if not whole:
                for r in range(rows):
                    for d in range(columns):
                        corner[r * H * Dh + d] = square[r * SIDE + d]
        for r in range(rows):
            L[(i + r) * H] = m[i + r] + math.log(l[i + r])


@inner
def attend_alone(q: Any, k: Any, v: Any, places: Any, head: int, step: int, S: int, Dh: int, scale: Any, place: int, O: Any, L: Any) -> None:
    """One query: keys and values are taken apart where they stand."""
    deep, wide = (Dh + DEEP - 1) // DEEP, (Dh + SIDE - 1) // SIDE
    acc = floats(place)
    m = at(acc, wide * SIDE * SIDE)
    l, scores = at(m, 1), at(m, SIDE)
    square = at(scores, BC)
    lines = place + 4 * (wide * SIDE * SIDE + SIDE + BC + SIDE * DEEP)  # 16 keys, or 32 values
    query = lines + max(deep, 2) * BLOCK
    weights = query + deep * LINES
    m[0], l[0] = -np.inf, 0
    for d in range(wide * SIDE * SIDE):
        acc[d] = 0
    for d in range(deep * DEEP):
        scores[d % DEEP] = q[d] * scale if d < Dh else np.float32(0)
        if d % DEEP == DEEP - 1:
            row_apart(scores, 1, 0, bytes_(query + d // DEEP * LINES), 4 * SIDE)
    for key in range(0, S, BC):
        tile = min(BC, S - key)
        for j in range(0, tile, SIDE):
            here, some = at(k, places[(key + j) // PAGE] + head + (key + j) % PAGE * step), min(SIDE, tile - j)
            pack_keys(here, step, some, Dh, square, bytes_(lines))
            score_one(at(scores, j), bytes_(lines), bytes_(query), deep)
        columns = (tile + DEEP - 1) // DEEP * DEEP
        for j in range(tile, columns):
            scores[j] = -np.inf
        shrink = soften_one(scores, columns, m, l, bytes_(weights))
        for t in range(wide):
            for d in range(SIDE):
                acc[t * SIDE * SIDE + d] *= shrink
        for j in range(0, tile, DEEP):
            here, some = at(v, places[(key + j) // PAGE] + head + (key + j) % PAGE * step), min(DEEP, tile - j)
            for t in range(wide):
                buffer = bytes_(lines + t % 2 * BLOCK)
                if (t + 1) * SIDE <= Dh:
                    values_apart(at(here, t * SIDE), step, some, buffer)
                else:
                    copy_values(at(here, t * SIDE), step, some, Dh - t * SIDE, square)
                    values_apart(square, SIDE, DEEP, buffer)
                weigh_one(at(acc, t * SIDE * SIDE), buffer, bytes_(weights + j // DEEP * LINES))
    part = np.float32(1) / l[0]
    for d in range(Dh):
        O[d] = acc[d // SIDE * SIDE * SIDE + d % SIDE] * part
    L[0] = m[0] + math.log(l[0])


score, weigh, weigh_last = (
    over_parts(2, 2, adds=False),
    over_parts(2, 2),
    over_parts(1, 2),
)  # of keys and queries along d; of values, weights along keys


@intrinsic
def score_one(typing_context, scores, keys, query, n):
    """Scores of 16 keys, n tiles in parts, which a query of one column meets."""

    def generate(context, builder, signature, arguments):
        scores, keys, query, n = arguments
        tiles = unit_of(builder, INDEX(SIDE))
        tiles.zero(OF_SCORES)

        def step(t: Any, _: list) -> list:
            here, there = builder.gep(keys, [builder.mul(t, INDEX(BLOCK))]), builder.gep(query, [builder.mul(t, INDEX(LINES))])
            before: tuple[int, int] = -1, -1
            for a, b in ORDER:
                if a != before[0]:
                    tiles.load(OF_LINES, builder.gep(here, [INDEX(a * TILE_BYTES)]))
                if b != before[1]:
                    tiles.load(OF_QUERY, builder.gep(there, [INDEX(b * 4 * SIDE)]), INDEX(4), words=1)
                before = a, b
                tiles.multiply(PAIRS, OF_SCORES, OF_LINES, OF_QUERY)
            return []

        loop(builder, n, 1, [], step)
        tiles.store(OF_SCORES, builder.bitcast(scores, INT8.as_pointer()), INDEX(4), words=1)
        return context.get_dummy_value()

    return types.void(scores, keys, query, types.int64), generate


@intrinsic
def weigh_one(typing_context, sums, values, weights):
    """Adds to 16 sums of a query the products of 32 weights and values."""

    def generate(context, builder, signature, arguments):
        sums, values, weights = arguments
        tiles, place, before = unit_of(builder, INDEX(SIDE)), builder.bitcast(sums, INT8.as_pointer()), (-1, -1)
        tiles.load(OF_SUMS, place)
        for a, b in ORDER:
            if a != before[0]:
                tiles.load(OF_LINES, builder.gep(values, [INDEX(a * TILE_BYTES)]))
            if b != before[1]:
                tiles.load(OF_WEIGHT, builder.gep(weights, [INDEX(b * 4 * SIDE)]))
            before = a, b
            tiles.multiply(PAIRS, OF_SUMS, OF_WEIGHT, OF_LINES)
        tiles.store(OF_SUMS, place)
        return context.get_dummy_value()

    return types.void(sums, values, weights), generate


# ---- packing -----------------------------------------------------------------------------------------------------------------------------


@inner
def pack_queries(q: Any, step: int, n: int, Dh: int, scale: Any, square: Any, queries: Any) -> None:
    """16 queries, times `scale`, as tiles of 16 pairs of d by 16 queries; of the last again where they are fewer."""
    for t in range((Dh + DEEP - 1) // DEEP):
        for d in range(DEEP):
            for r in range(SIDE):
                square[d * SIDE + r] = q[min(r, n - 1) * step + t * DEEP + d] * scale if t * DEEP + d < Dh else np.float32(0)
        tiles_apart(square, 1, at(queries, t * BLOCK))


@inner
def pack_keys(k: Any, step: int, n: int, Dh: int, square: Any, keys: Any) -> None:
    """n keys as tiles of 16 keys by 16 pairs of d, all pairs of some keys side by side; zeros beyond Dh."""
    whole, deep = Dh // DEEP, (Dh + DEEP - 1) // DEEP
    for j in range(n):
        target = at(keys, j // SIDE * deep * BLOCK + j % SIDE * 4 * SIDE)
        if whole:
            row_apart(at(k, j * step), whole, 4 * step, target, TILE_BYTES)
        if whole < deep:
            for d in range(DEEP):
                square[d] = float32_at(k, j * step + whole * DEEP + d) if whole * DEEP + d < Dh else np.float32(0)
            row_apart(square, 1, 0, at(target, whole * BLOCK), TILE_BYTES)


@inner
def pack_values(v: Any, step: int, n: int, Dh: int, square: Any, values: Any) -> None:
    """n values as tiles of 16 numbers of d by 16 pairs of keys, BLOCKS tiles for each 16 of d; beyond n the last again, for which weights are 0."""
    for j in range(0, n, DEEP):
        some = min(DEEP, n - j)
        for t in range((Dh + SIDE - 1) // SIDE):
            source, target = at(v, j * step + t * SIDE), at(values, (t * BLOCKS + j // DEEP) * BLOCK)
            if (t + 1) * SIDE <= Dh:
                turn(source, step, some, square)
            else:
                for r in range(SIDE):
                    for i in range(DEEP):
                        square[r * DEEP + i] = float32_at(source, min(i, some - 1) * step + r) if t * SIDE + r < Dh else np.float32(0)
            for r in range(SIDE):
                row_apart(at(square, r * DEEP), 1, 0, at(target, r * 4 * SIDE), TILE_BYTES)


@inner
def clear(values: Any, wide: int, j: int) -> None:
    """All parts of a value, the j-th of a block."""
    for t in range(wide):
        for line in range(PARTS * SIDE):
            for byte in range(2):
                values[t * BLOCKS * BLOCK + line * 4 * SIDE + 2 * j + byte] = 0


@inner
def copy_values(v: Any, step: int, n: int, columns: int, square: Any) -> None:
    """32 values of fewer than 16 numbers, with zeros behind; beyond n the last again."""
    for j in range(DEEP):
        for d in range(SIDE):
            square[j * SIDE + d] = float32_at(v, min(j, n - 1) * step + d) if d < columns else np.float32(0)


@intrinsic
def values_apart(typing_context, v, step, n, tile):
    """32 values of 16 numbers in parts, as words of two neighbouring keys; beyond n the last again."""

    def generate(context, builder, signature, arguments):
        v, step, n, tile = arguments
        places = rows_from(builder, v, step, n, DEEP)
        for r in range(SIDE):
            both = (widened(builder, place, VECTOR, signature.args[0].dtype, TILE) for place in places[2 * r : 2 * r + 2])
            put_words(builder, *both, builder.gep(tile, [INDEX(r * 4 * SIDE)]))
        return context.get_dummy_value()

    return types.void(v, types.int64, types.int64, tile), generate


# ---- softmax -----------------------------------------------------------------------------------------------------------------------------


def weight_of(builder: Any, score: Any, highest: Any) -> Any:
    """LLVM: exp(score - highest)."""
    return exponential(builder, builder.fsub(score, highest))


def put_weights(builder: Any, weights: Any, k: Any, r: int, first: Any, second: Any) -> None:
    """LLVM: weights of keys k + r and k + r + 1, of 16 queries, in parts."""
    pair = builder.add(builder.lshr(k, INDEX(1)), INDEX(r // 2))
    tile, line = builder.mul(builder.lshr(pair, INDEX(4)), INDEX(BLOCK)), builder.mul(builder.and_(pair, INDEX(SIDE - 1)), INDEX(4 * SIDE))
    put_words(builder, first, second, builder.gep(weights, [builder.add(tile, line)]))


def put_line(builder: Any, weights: Any, k: Any, numbers: Any) -> None:
    """LLVM: weights of 16 keys of one query in parts: half a row of a tile."""
    tile, half = builder.mul(builder.lshr(k, INDEX(5)), INDEX(LINES)), builder.mul(builder.and_(k, INDEX(DEEP - 1)), INDEX(2))
    for i, words in enumerate(parts_of(builder, numbers)):
        halves = builder.trunc(builder.lshr(words, every(WORDS, 16)), ir.VectorType(ir.IntType(16), SIDE))
        store(builder, halves, builder.gep(weights, [builder.add(builder.add(tile, half), INDEX(i * 4 * SIDE))]))


soften, soften_one = softening(GROUP, weight_of, put_weights), softening_one(weight_of, put_line)

IN_PARTS = Forward(by_dtype(_forward, "_in_parts"), GROUP, needed, [SHAPES[SIDE], shapes_of_one()], "float32")
IN_FLOAT32 = IN_PARTS if UNIT else attention_cpu.IN_FLOAT32
