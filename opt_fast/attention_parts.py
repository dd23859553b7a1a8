"""Attention in float32 in Intel's tiles (AMX): FlashAttention-2 as in attention_cpu.py, with products of bfloat16 parts as in gemm_parts.py.

As in attention_bf16.py, keys are the rows: Sᵀ = K Qᵀ and Oᵀ = Vᵀ Pᵀ, for 32 queries at a time. Their scores for one key fill two vectors, each lane
has a softmax of its own, and weights of neighbouring keys become pairs in place.
A single query, as in decoding, is multiplied by the same parts in the same order: its scores are a tile of one column, its output a tile of one row.
So its result is bit-identical whether it is alone or among others, and whether keys arrived all at once or one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from ml_dtypes import bfloat16
from numba import types

from opt_fast import attention_cpu
from opt_fast.attention_bf16 import IN_BFLOAT16, bytes_of, hide_unseen, packing_queries, raised, softening_one, weighing_by, write_rows
from opt_fast.attention_cpu import BQ, Backward, Forward, by_dtype, float32_at
from opt_fast.gemm import BITS, TILE, copy_tile, widened
from opt_fast.gemm_amx import (
    INDEX,
    INT8,
    PAIRS,
    SHAPES,
    SIDE,
    TILE_BYTES,
    UNIT,
    VECTOR,
    WORDS,
    configure,
    release,
    tile_shapes,
    unit_of,
)
from opt_fast.gemm_parts import DEEP, LINES, ORDER, PARTS, over_parts, parts_at, parts_of, products, put_row, put_words, row_apart, turn
from opt_fast.kernel import (
    ARGUMENTS,
    BYTES,
    DONE,
    MEMORY,
    TASKS,
    THREADS,
    Kernel,
    across,
    at,
    broadcast,
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
    prefetch,
    rows_from,
    store,
    transposed,
)
from opt_fast.paged_cache import PAGE

as_stored = floats  # the pointer type of keys and values; kernel variants rebind it
BC = 256  # keys of a tile: with more, the parts of heads of 80 elements would not stay in the L2 cache
GROUP = 2 * SIDE  # queries of a group
BLOCKS = BC // DEEP  # of keys
GROUPS = BQ // GROUP  # of a block, in the backward pass
BLOCK = PARTS * TILE_BYTES  # bytes of a tile in parts
ABREAST = 4  # tiles of sums for a single query,
OF_SCORES, OF_SUMS, OF_WEIGHT, OF_LINES, OF_QUERY = 0, 1, 1 + ABREAST, 2 + ABREAST, 3 + ABREAST  # of its eight tile registers
LIMIT = 3.3961775e38  # from here on, a float32 rounds to infinity in bfloat16
POWERS = 1.5353362e-4, 1.3398874e-3, 9.618437e-3, 0.055503324, 0.24022648, 0.6931472, 1.0  # as in attention_bf16.py, with error 8e-8

assert BQ % GROUP == BC % DEEP == PAGE % DEEP == 0


def needed(queries: int, Dh: int) -> int:
    """Scratch memory, in float32 elements, of a task with this many queries."""
    deep, wide, groups = math.ceil(Dh / DEEP), math.ceil(Dh / SIDE), math.ceil(queries / GROUP)
    tiles = BC // SIDE * deep + BLOCKS * (wide + 2) + groups * 2 * deep
    return 2 * BC * GROUP + tiles * BLOCK // 4 + groups * GROUP * (wide * SIDE + 2) + GROUP + 8 * SIDE + SIDE * DEEP


def shapes_of_one() -> np.ndarray:
    """As gemm_amx.tile_shapes, for a single query: tiles of its scores and its elements have one column, of its sums and its weights one row."""
    shapes = tile_shapes(SIDE)
    shapes[16:32].view(np.uint16)[[OF_SCORES, OF_QUERY]] = 4
    shapes[48 + OF_SUMS : 48 + OF_LINES] = 1
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
        alone = count == 1 and hides == 0 and Dh % SIDE == 0
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
    """`count` queries of a head, the first of which sees `past` keys besides its own."""
    deep, wide, groups = (Dh + DEEP - 1) // DEEP, (Dh + SIDE - 1) // SIDE, (count + GROUP - 1) // GROUP  # tiles along d: of pairs, of single elements
    scores, keys = floats(place), place + 2 * 4 * BC * GROUP  # of a group and of the next
    values = keys + BC // SIDE * deep * BLOCK
    weights = values + wide * BLOCKS * BLOCK
    queries = weights + 2 * BLOCKS * BLOCK
    acc = floats(queries + groups * 2 * deep * BLOCK)
    m = at(acc, groups * wide * SIDE * GROUP)
    l = at(m, groups * GROUP)
    highest = at(l, groups * GROUP)
    totals = at(highest, GROUP)
    square = at(totals, 2 * 4 * SIDE)
    for i in range(groups * GROUP):
        m[i], l[i] = -np.inf, 0
        for d in range(wide * SIDE):
            acc[i * wide * SIDE + d] = 0
    for i in range(0, groups * GROUP, SIDE):
        some = max(1, min(SIDE, count - i))
        pack_queries(at(q, min(i, count - 1) * H * Dh), H * Dh, some, Dh, scale, bytes_(queries + i // SIDE * deep * BLOCK), square)
    for key in range(0, past + count, BC):
        tile, shown, broken = min(BC, past + count - key), at(mask, key), False
        for j in range(0, tile, PAGE):
            here, some = places[(key + j) // PAGE] + head, min(PAGE, tile - j)
            pack_keys(at(k, here), step, some, Dh, square, bytes_(keys + j // SIDE * deep * BLOCK))
            pack_values(at(v, here), step, some, Dh, square, bytes_(values + j // DEEP * BLOCK))
            broken = broken or not all_finite(at(v, here), step, some, Dh)
        for j in range((tile + DEEP - 1) // DEEP * DEEP if hides else 0):
            if j >= tile or not shown[j]:  # a weight of 0 times NaN would be NaN
                for d in range(wide * SIDE):
                    clear(bytes_(values), j, d)
        for j in range((tile + DEEP - 1) // DEEP * DEEP if broken else 0):
            last = key + min(j, tile - 1)
            for d in range(Dh):
                if not finite(v, places[last // PAGE] + head + last % PAGE * step + d):
                    clear(bytes_(values), j, d)
        seen, blocks = 0, 0
        # starts one group before the first that sees this tile: it has no softmax to do, but computes the next group's scores
        for g in range(max(0, key - past) // GROUP - 1, groups):
            gap, this, other = deep * BLOCK, at(scores, g % 2 * BC * GROUP), at(scores, (g + 1) % 2 * BC * GROUP)
            limit, sums = past + g * GROUP + 1 - key, at(acc, g * wide * SIDE * GROUP)  # limit: keys of the tile that its first query sees
            seen_next = min(tile, limit + GROUP - 1 + min(GROUP, count - (g + 1) * GROUP)) if g + 1 < groups else 0
            blocks_next = (seen_next + DEEP - 1) // DEEP
            for c in range(2 if blocks else 0):
                column, before, lane = at(this, c * SIDE), c * SIDE, g * GROUP + c * SIDE
                hide_unseen(column, GROUP, limit + before, seen, tile, blocks * DEEP, shown, hides)
                raise_maximum(column, blocks * DEEP, at(m, lane), at(l, lane), at(sums, before), wide * SIDE, at(highest, before))
            for i in range(2 * 4 * SIDE):
                totals[i] = 0
            soften_and_score(this, 2 * blocks, highest, totals, bytes_(weights), other, bytes_(keys), gap, bytes_(queries + 2 * (g + 1) * gap), deep,
                             blocks_next * deep)  # fmt: skip
            if blocks:
                for i in range(GROUP):
                    four = at(totals, i // SIDE * 4 * SIDE + i % SIDE)
                    l[g * GROUP + i] += (four[0] + four[SIDE]) + (four[2 * SIDE] + four[3 * SIDE])
                add_products(sums, GROUP, wide, bytes_(values), BLOCKS * BLOCK, bytes_(weights), BLOCKS * BLOCK, blocks)
            for j in range(seen if broken else 0):
                for d in range(0 if hides and not shown[j] else Dh):
                    if not finite(v, places[(key + j) // PAGE] + head + (key + j) % PAGE * step + d):
                        for lane in range(max(0, j - limit + 1), GROUP):
                            sums[d * GROUP + lane] = np.nan
            seen, blocks = seen_next, blocks_next
    write_rows(acc, GROUP, count, l, Dh, O, H * Dh, square)
    for i in range(count):
        L[i * H] = m[i] + math.log(l[i])


@inner
def attend_alone(q: Any, k: Any, v: Any, places: Any, head: int, step: int, S: int, Dh: int, scale: Any, place: int, O: Any,
                 L: Any) -> None:  # fmt: skip
    """A single query: keys and values are read in place and split into parts."""
    deep, wide = (Dh + DEEP - 1) // DEEP, (Dh + SIDE - 1) // SIDE
    acc = floats(place)
    m = at(acc, (wide + ABREAST - 1) // ABREAST * ABREAST * SIDE * SIDE)
    l, scores = at(m, 1), at(m, SIDE)
    square = at(scores, BC)
    weights = bytes_of(at(square, SIDE * DEEP))
    query = at(weights, (BLOCKS + SIDE) * LINES)
    lines = at(query, (deep + SIDE) * LINES)  # of some keys, or values; weights and the query have room for 16 rows, as emulated tiles read them
    m[0], l[0] = -np.inf, 0
    for d in range(wide * SIDE):
        acc[d // SIDE * SIDE * SIDE + d % SIDE] = 0
    for d in range(deep * DEEP):
        square[d % DEEP] = q[d] * scale if d < Dh else np.float32(0)
        if d % DEEP == DEEP - 1:
            row_apart(square, 1, 0, at(query, d // DEEP * LINES), 4 * SIDE, 0)
    for key in range(0, S, BC):
        tile = min(BC, S - key)
        here = at(places, key // PAGE)
        score_keys(scores, k, v, here, head, step, tile, Dh, query, lines)
        columns = (tile + DEEP - 1) // DEEP * DEEP
        for j in range(tile, columns):
            scores[j] = -np.inf
        shrink = soften_one(scores, columns, m, l, weights)
        for d in range(wide * SIDE):
            acc[d // SIDE * SIDE * SIDE + d % SIDE] *= shrink
        t = 0
        while t < wide:
            if t + ABREAST <= wide:
                weigh_four(at(acc, t * SIDE * SIDE), v, here, head + t * SIDE, step, tile, weights, lines)
                t += ABREAST
            else:
                weigh_values(at(acc, t * SIDE * SIDE), v, here, head + t * SIDE, step, tile, weights, lines)
                t += 1
    part = np.float32(1) / l[0] if l[0] != 0 else np.float32(0)
    for d in range(Dh):
        O[d] = acc[d // SIDE * SIDE * SIDE + d % SIDE] * part
    L[0] = m[0] + math.log(l[0])


score, weigh = over_parts(2, 2, adds=False), over_parts(2, 2)  # of keys and queries along d; of values and weights along keys, and so on
weigh_last, weigh_column = over_parts(1, 2), over_parts(2, 1)


@intrinsic
def score_keys(typing_context, scores, k, v, places, head, step, n, Dh, query, lines):
    """scores[j] = q · key j for n keys, rounded up: while 32 elements of 16 keys are multiplied by the query, the next are split into parts."""

    def generate(context, builder, signature, arguments):
        scores, k, v, places, head, step, n, Dh, query, lines = arguments
        tiles, deep = unit_of(builder, INDEX(SIDE)), builder.lshr(builder.add(Dh, INDEX(DEEP - 1)), INDEX(5))

        def apart(unit: Any, t: Any, target: Any) -> None:
            first, d = builder.mul(unit, INDEX(SIDE)), builder.mul(t, INDEX(DEEP))
            whole = builder.icmp_signed("<", builder.add(d, INDEX(SIDE)), Dh)
            second = builder.select(whole, builder.add(d, INDEX(SIDE)), d)
            rows, later = (rows_from(builder, row_of(builder, a, places, head, step, first), step, builder.sub(n, first), SIDE) for a in (k, v))
            for r, row in enumerate(rows):
                both = [builder.gep(row, [offset]) for offset in (d, second)]  # both the same for the last 16 elements of a row
                for half, place in enumerate(both):
                    prefetch(builder, builder.gep(place, [builder.mul(step, INDEX(SIDE))]))
                    prefetch(builder, builder.gep(later[r], [builder.add(d, INDEX(half * SIDE))]), level=2)
                numbers = [widened(builder, place, VECTOR, signature.args[1].dtype, TILE) for place in both]
                numbers[1] = builder.select(whole, numbers[1], every(VECTOR, 0.0))
                put_row(builder, numbers, builder.gep(target, [INDEX(r * 4 * SIDE)]))

        def step_of(_: Any, carried: list) -> list:
            unit, t, this, other = carried
            ends = builder.icmp_signed("==", builder.add(t, INDEX(1)), deep)
            unit_next, t_next = builder.select(ends, builder.add(unit, INDEX(1)), unit), builder.select(ends, INDEX(0), builder.add(t, INDEX(1)))
            over = builder.icmp_signed(">=", builder.mul(unit_next, INDEX(SIDE)), n)
            with builder.if_then(builder.not_(over)):
                apart(unit_next, t_next, other)
            with builder.if_then(builder.icmp_signed("==", t, INDEX(0))):
                tiles.zero(OF_SCORES)
            there = builder.gep(query, [builder.mul(t, INDEX(LINES))])
            columns = {OF_QUERY: lambda part: (builder.gep(there, [INDEX(part * 4 * SIDE)]), INDEX(4), 1)}
            for _ in products(tiles, [OF_SCORES], {OF_LINES: parts_at(builder, this)}, columns):
                pass
            with builder.if_then(ends):
                tiles.store(OF_SCORES, builder.bitcast(builder.gep(scores, [builder.mul(unit, INDEX(SIDE))]), INT8.as_pointer()), INDEX(4), words=1)
            return [unit_next, t_next, other, this]

        apart(INDEX(0), INDEX(0), lines)
        count = builder.mul(builder.lshr(builder.add(n, INDEX(SIDE - 1)), INDEX(4)), deep)
        loop(builder, count, 1, [INDEX(0), INDEX(0), lines, builder.gep(lines, [INDEX(BLOCK)])], step_of)
        return context.get_dummy_value()

    index = types.int64
    return types.void(scores, k, v, places, index, index, index, index, query, lines), generate


def row_of(builder: Any, numbers: Any, places: Any, head: Any, step: Any, j: Any) -> Any:
    """LLVM: the address of the j-th key or value of a head."""
    page, within = builder.udiv(j, INDEX(PAGE)), builder.urem(j, INDEX(PAGE))
    return builder.gep(numbers, [builder.add(builder.add(builder.load(builder.gep(places, [page])), head), builder.mul(within, step))])


def over_values(count: int) -> Any:
    """kernel(sums, v, places, head, step, n, weights, lines): adds the products of n weights and values to `count` times 16 sums of a query.

    While 32 values are multiplied by their weights, the next are split into parts.
    """

    @intrinsic
    def kernel(typing_context, sums, v, places, head, step, n, weights, lines):
        def generate(context, builder, signature, arguments):
            sums, v, places, head, step, n, weights, lines = arguments
            tiles, corners = unit_of(builder, INDEX(SIDE)), [builder.gep(sums, [INDEX(i * SIDE * SIDE)]) for i in range(count)]
            corners = [builder.bitcast(place, INT8.as_pointer()) for place in corners]
            blocks = builder.lshr(builder.add(n, INDEX(DEEP - 1)), INDEX(5))

            def apart(block: Any, target: Any) -> None:
                first = builder.mul(block, INDEX(DEEP))
                places_of = rows_from(builder, row_of(builder, v, places, head, step, first), step, builder.sub(n, first), DEEP)
                for r in range(SIDE):
                    for i in range(count):
                        both = [builder.gep(row, [INDEX(i * SIDE)]) for row in places_of[2 * r : 2 * r + 2]]
                        numbers = [widened(builder, place, VECTOR, signature.args[1].dtype, TILE) for place in both]
                        put_words(builder, numbers, builder.gep(target, [INDEX(i * BLOCK + r * 4 * SIDE)]))

            def step_of(b: Any, carried: list) -> list:
                this, other = carried
                after = builder.add(b, INDEX(1))
                with builder.if_then(builder.icmp_signed("<", after, blocks)):
                    apart(after, other)
                there = builder.gep(weights, [builder.mul(b, INDEX(LINES))])
                for a, part in ORDER:
                    tiles.load(OF_WEIGHT, builder.gep(there, [INDEX(part * 4 * SIDE)]))
                    for i in range(count):
                        tiles.load(OF_LINES, builder.gep(this, [INDEX(i * BLOCK + a * TILE_BYTES)]))
                        tiles.multiply(PAIRS, OF_SUMS + i, OF_WEIGHT, OF_LINES)
                return [other, this]

            for i, place in enumerate(corners):
                tiles.load(OF_SUMS + i, place)
            apart(INDEX(0), lines)
            loop(builder, blocks, 1, [lines, builder.gep(lines, [INDEX(count * BLOCK)])], step_of)
            for i, place in enumerate(corners):
                tiles.store(OF_SUMS + i, place)
            return context.get_dummy_value()

        index = types.int64
        return types.void(sums, v, places, index, index, index, weights, lines), generate

    return kernel


weigh_four, weigh_values = over_values(ABREAST), over_values(1)


# ---- gradients ---------------------------------------------------------------------------------------------------------------------------


def going_back(T: int, Dh: int) -> int:
    """Scratch memory, in float32 elements, of a head with T queries."""
    deep, wide = math.ceil(Dh / DEEP), math.ceil(Dh / SIDE)
    of_keys, of_queries = 2 * BC // SIDE * deep + wide * BLOCKS, GROUPS * (4 * deep + 2 * wide)
    tiles = of_keys + of_queries + 2 * BC // SIDE * GROUPS + 2 * BLOCKS
    of_rows = math.ceil(T / GROUP) * GROUP * (wide * SIDE + 2) + 2 * T * wide * SIDE
    return tiles * BLOCK // 4 + of_rows + 2 * BC * (wide * SIDE + GROUP) + SIDE * DEEP


def _backward(table: Any) -> None:
    """As in attention_cpu.py: a task is a head, its tiles of keys in order, and for each the blocks of queries that see it.

    dV = Pᵀ dO and dK = dSᵀ Q need Pᵀ and dSᵀ with keys as rows and pairs of queries; dQᵀ = Kᵀ dSᵀ needs dSᵀ in pairs of keys.
    """
    a, place = at(table, ARGUMENTS), table[MEMORY] + claim(table, THREADS) * table[BYTES]
    q, k, v, visible, hides, start = floats(a[0]), floats(a[1]), floats(a[2]), bytes_(a[3]), a[4], int64s(a[5])
    O, L, B, T, S, H, Dh = floats(a[6]), floats(a[7]), a[8], a[9], a[10], a[11], a[12]
    dO, dq, dk, dv, scale = floats(a[13]), floats(a[14]), floats(a[15]), floats(a[16]), float_of(a[17])
    past, step, deep, wide, groups = S - T, H * Dh, (Dh + DEEP - 1) // DEEP, (Dh + SIDE - 1) // SIDE, (T + GROUP - 1) // GROUP
    width = wide * SIDE
    keys = place  # rows, as values are, and columns; queries and dO as columns and as rows; weights as rows, scores' gradients as rows and in pairs
    values = keys + BC // SIDE * deep * BLOCK
    keys_t = values + BC // SIDE * deep * BLOCK
    q_t = keys_t + wide * BLOCKS * BLOCK
    dO_t = q_t + GROUPS * 2 * deep * BLOCK
    q_rows = dO_t + GROUPS * 2 * deep * BLOCK
    dO_rows = q_rows + wide * GROUPS * BLOCK
    P_rows = dO_rows + wide * GROUPS * BLOCK
    dS_rows = P_rows + BC // SIDE * GROUPS * BLOCK
    dS_pairs = dS_rows + BC // SIDE * GROUPS * BLOCK
    dq_sums = floats(dS_pairs + 2 * BLOCKS * BLOCK)  # (groups, width, GROUP)
    lse = at(dq_sums, groups * width * GROUP)
    D = at(lse, groups * GROUP)
    dk_sums = at(D, groups * GROUP)  # (BC, width)
    dv_sums = at(dk_sums, BC * width)
    scores = at(dv_sums, BC * width)  # (BC, GROUP)
    dP = at(scores, BC * GROUP)
    square = at(dP, BC * GROUP)
    queries = at(square, SIDE * DEEP)  # (T, width), and dO: reread for every tile of keys, and in parts they would not all fit in the cache
    of_O = at(queries, T * width)
    configure(bytes_(a[18]))
    task = claim(table, TASKS)
    while task < B * H:
        b, h = task % B, task // B
        for t in range(groups * GROUP):
            here = ((b * T + min(t, T - 1)) * H + h) * Dh
            lse[t], D[t] = L[here // Dh], 0
            if lse[t] == -np.inf:  # the query sees no key
                lse[t] = 0
            for d in range(DEEP):  # parallel sums, as a single one would wait for each addition
                square[d] = 0
            for d in range(0, Dh, DEEP):
                for i in range(min(DEEP, Dh - d)):
                    square[i] += dO[here + d + i] * O[here + d + i]
            for d in range(DEEP):
                D[t] += square[d]
        copy_tile(at(q, (b * T * H + h) * Dh), step, T, Dh, queries, width)
        copy_tile(at(dO, (b * T * H + h) * Dh), step, T, Dh, of_O, width)
        for i in range(groups * GROUP * width):
            dq_sums[i] = 0
        for key in range(start[b], S, BC):
            n, place_of_keys, shown = min(BC, S - key), ((b * S + key) * H + h) * Dh, at(visible, b * S + key)
            pack_keys(at(k, place_of_keys), step, n, Dh, square, bytes_(keys))
            pack_keys(at(v, place_of_keys), step, n, Dh, square, bytes_(values))
            pack_values(at(k, place_of_keys), step, n, Dh, square, bytes_(keys_t))
            for j in range(BC):
                if j >= n or (hides and not shown[j]):
                    clear_row(bytes_(keys), j, deep)
                    clear_row(bytes_(values), j, deep)
                    for d in range(width):
                        clear(bytes_(keys_t), j, d)
            for j in range(BC * width):
                dk_sums[j], dv_sums[j] = 0, 0
            for first in range(max(0, key - past) // BQ * BQ, T, BQ):
                pack_block(at(queries, first * width), width, min(BQ, T - first), Dh, square, bytes_(q_t), bytes_(q_rows))
                pack_block(at(of_O, first * width), width, min(BQ, T - first), Dh, square, bytes_(dO_t), bytes_(dO_rows))
                count = (min(BQ, T - first) + GROUP - 1) // GROUP
                limit = past + first + 1 - key  # how many keys of the tile the block's first query sees
                for g in range(max(0, -limit + 1) // GROUP, count):
                    seen, lane = min(n, limit + (g + 1) * GROUP - 1), first + g * GROUP
                    blocks, gap, sums = (seen + DEEP - 1) // DEEP, deep * BLOCK, at(dq_sums, lane * width)
                    for j in range(blocks):
                        s, ds = at(scores, j * DEEP * GROUP), at(dP, j * DEEP * GROUP)
                        score(s, GROUP, s, 0, bytes_(keys + 2 * j * gap), gap, bytes_(q_t + 2 * g * gap), gap, deep)
                        score(ds, GROUP, ds, 0, bytes_(values + 2 * j * gap), gap, bytes_(dO_t + 2 * g * gap), gap, deep)
                    for c in range(0, GROUP, SIDE):
                        hide_unseen(at(scores, c), GROUP, limit + g * GROUP + c, seen, n, blocks * DEEP, shown, hides)
                    gradients(scores, dP, at(lse, lane), at(D, lane), blocks * DEEP, bytes_(P_rows + g * BLOCK), bytes_(dS_rows + g * BLOCK),
                              bytes_(dS_pairs))  # fmt: skip
                    add_products(sums, GROUP, wide, bytes_(keys_t), BLOCKS * BLOCK, bytes_(dS_pairs), BLOCKS * BLOCK, blocks)
                for j in range(0, min(n, limit + count * GROUP - 1), DEEP):
                    g = max(0, j - limit + 1) // GROUP  # from the first group of queries that sees these keys
                    for d in range(0, wide, 2):
                        corner, rows = j * width + d * SIDE, j // SIDE * GROUPS + g
                        strips, gap = (d * GROUPS + g) * BLOCK, GROUPS * BLOCK
                        P_here, dS_here = bytes_(P_rows + rows * BLOCK), bytes_(dS_rows + rows * BLOCK)
                        add_strips(at(dv_sums, corner), width, P_here, bytes_(dO_rows + strips), gap, count - g, wide - d)
                        add_strips(at(dk_sums, corner), width, dS_here, bytes_(q_rows + strips), gap, count - g, wide - d)
            copy_tile(dk_sums, width, n, Dh, at(dk, place_of_keys), step)
            copy_tile(dv_sums, width, n, Dh, at(dv, place_of_keys), step)
        for t in range(groups * GROUP):  # write_rows divides by it
            lse[t] = np.float32(1) / scale
        write_rows(dq_sums, GROUP, T, lse, Dh, at(dq, (b * T * H + h) * Dh), step, square)
        claim(table, DONE)
        task = claim(table, TASKS)
    release()


@inner
def add_products(sums: Any, row: int, count: int, x: Any, x_gap: int, weights: Any, gap: int, n: int) -> None:
    """Adds the products of n tiles to `count` by two tiles of sums."""
    for t in range(0, count, 2):
        target, line = at(sums, t * SIDE * row), at(x, t * x_gap)
        if t + 1 < count:
            weigh(target, row, target, row, line, x_gap, weights, gap, n)
        else:
            weigh_last(target, row, target, row, line, 0, weights, gap, n)


@inner
def add_strips(sums: Any, row: int, x: Any, weights: Any, gap: int, n: int, columns: int) -> None:
    """Adds the products of n tiles to two by two tiles of sums, or to two by one if only one column is left."""
    if columns > 1:
        weigh(sums, row, sums, row, x, gap, weights, gap, n)
    else:
        weigh_column(sums, row, sums, row, x, gap, weights, gap, n)


@inner
def pack_block(x: Any, step: int, n: int, Dh: int, square: Any, columns: Any, rows: Any) -> None:
    """Packs n rows as columns, in pairs of d, repeating the last beyond n; and as rows, in pairs of rows, GROUPS tiles for each 16 of d, 0 beyond n.

    So surplus columns get the weights of an existing query, which are finite, and contribute nothing when multiplied by rows of 0.
    """
    deep = (Dh + DEEP - 1) // DEEP
    for i in range(0, (n + GROUP - 1) // GROUP * GROUP, SIDE):
        pack_queries(at(x, min(i, n - 1) * step), step, max(1, min(SIDE, n - i)), Dh, np.float32(1), at(columns, i // SIDE * deep * BLOCK), square)
    for g in range(0, n, GROUP):
        for t in range((Dh + SIDE - 1) // SIDE):
            source, apart, some = at(x, g * step + t * SIDE), step, min(GROUP, n - g)
            if some < GROUP or (t + 1) * SIDE > Dh:
                for r in range(GROUP):
                    for d in range(SIDE):
                        square[r * SIDE + d] = source[r * step + d] if r < some and t * SIDE + d < Dh else np.float32(0)
                source, apart = square, SIDE
            values_apart(source, apart, at(rows, (t * GROUPS + g // GROUP) * BLOCK))


@intrinsic
def values_apart(typing_context, v, step, tile):
    """Splits 32 rows of 16 values into parts, in words of two neighbouring rows."""

    def generate(context, builder, signature, arguments):
        v, step, tile = arguments
        for r in range(SIDE):
            both = [load(builder, builder.gep(v, [builder.mul(step, INDEX(2 * r + i))]), VECTOR) for i in range(2)]
            put_words(builder, both, builder.gep(tile, [INDEX(r * 4 * SIDE)]))
        return context.get_dummy_value()

    return types.void(v, types.int64, tile), generate


@intrinsic
def gradients(typing_context, scores, dP, lse, D, n, P_rows, dS_rows, dS_pairs):
    """For n keys and 32 queries: weights P = exp(score - lse) as rows, and gradients of the scores, P · (dP - D), as rows and in pairs of keys;
    all in parts."""

    def generate(context, builder, signature, arguments):
        scores, dP, lse, D, n, P_rows, dS_rows, dS_pairs = arguments
        places, zero = [INDEX(c) for c in range(0, GROUP, SIDE)], every(VECTOR, 0.0)
        sums, differences = ([load(builder, builder.gep(a, [place]), VECTOR) for place in places] for a in (lse, D))

        def pair(j: Any, _: list) -> list:
            found = []
            for r in range(2):
                key = builder.add(j, INDEX(r))
                row = builder.mul(key, INDEX(GROUP))
                of_scores, of_dP = ([load(builder, builder.gep(a, [builder.add(row, place)]), VECTOR) for place in places] for a in (scores, dP))
                P = [weight_of(builder, score, total) for score, total in zip(of_scores, sums, strict=True)]
                dS = [builder.fmul(p, builder.fsub(d, less)) for p, d, less in zip(P, of_dP, differences, strict=True)]
                dS = [builder.select(builder.fcmp_ordered("==", p, zero), zero, d) for p, d in zip(P, dS, strict=True)]  # also where d is NaN
                tile = builder.mul(builder.lshr(key, INDEX(4)), INDEX(GROUPS * BLOCK))
                line = builder.add(tile, builder.mul(builder.and_(key, INDEX(SIDE - 1)), INDEX(4 * SIDE)))
                for numbers, rows in ((P, P_rows), (dS, dS_rows)):
                    put_row(builder, numbers, builder.gep(rows, [line]))
                found.append(dS)
            tile = builder.mul(builder.lshr(j, INDEX(5)), INDEX(BLOCK))
            line = builder.add(tile, builder.mul(builder.and_(j, INDEX(DEEP - 1)), INDEX(2 * SIDE)))
            for c, both in enumerate(zip(*found, strict=True)):
                put_words(builder, list(both), builder.gep(dS_pairs, [builder.add(line, INDEX(c * BLOCKS * BLOCK))]))
            return []

        loop(builder, n, 2, [], pair)
        return context.get_dummy_value()

    return types.void(scores, dP, lse, D, types.int64, P_rows, dS_rows, dS_pairs), generate


# ---- packing -----------------------------------------------------------------------------------------------------------------------------


@intrinsic
def queries_apart(typing_context, rows, step, n, scale, tile):
    """32 elements of 16 rows, times `scale`, in parts, as a tile of 16 pairs of elements by 16 rows; the last of n rows is repeated."""

    def generate(context, builder, signature, arguments):
        rows, step, n, scale, tile = arguments
        scale, places = broadcast(builder, scale, VECTOR), rows_from(builder, rows, step, n, SIDE)
        for half in range(2):
            lines = [builder.fmul(load(builder, builder.gep(place, [INDEX(half * SIDE)]), VECTOR), scale) for place in places]
            columns = transposed(builder, lines)
            for r in range(0, SIDE, 2):
                put_words(builder, columns[r : r + 2], builder.gep(tile, [INDEX((half * SIDE + r) // 2 * 4 * SIDE)]))
        return context.get_dummy_value()

    return types.void(rows, types.int64, types.int64, types.float32, tile), generate


pack_queries = packing_queries("pack_queries_apart", queries_apart, BLOCK)


@inner
def pack_keys(k: Any, step: int, n: int, Dh: int, square: Any, keys: Any) -> None:
    """Packs n keys as tiles, in parts, of 16 keys by 16 pairs of d, with all tiles of the same keys in succession; 0 beyond Dh."""
    whole, deep = Dh // DEEP, (Dh + DEEP - 1) // DEEP
    for j in range(n):
        target = at(keys, j // SIDE * deep * BLOCK + j % SIDE * 4 * SIDE)
        if whole:
            row_apart(at(k, j * step), whole, 4 * step, target, TILE_BYTES, BLOCK)
        if whole < deep:
            for d in range(DEEP):
                square[d] = float32_at(k, j * step + whole * DEEP + d) if whole * DEEP + d < Dh else np.float32(0)
            row_apart(square, 1, 0, at(target, whole * BLOCK), TILE_BYTES, 0)


@inner
def pack_values(v: Any, step: int, n: int, Dh: int, square: Any, values: Any) -> None:
    """Packs n values as tiles, in parts, of 16 of d by 16 pairs of keys, BLOCKS tiles for each 16 of d; the last is repeated beyond n (weight 0)."""
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
                row_apart(at(square, r * DEEP), 1, 0, at(target, r * 4 * SIDE), TILE_BYTES, 0)


@inner
def clear(values: Any, j: int, d: int) -> None:
    """Sets element d of value j to 0 in all parts, as a weight of 0 times NaN would be NaN."""
    for part in range(PARTS):
        place = ((d // SIDE * BLOCKS + j // DEEP) * PARTS + part) * TILE_BYTES + d % SIDE * 4 * SIDE + j % DEEP * 2
        values[place] = values[place + 1] = 0


@inner
def clear_row(keys: Any, j: int, deep: int) -> None:
    """Sets key j to 0 in all parts."""
    for tile in range(deep * PARTS):
        for byte in range(4 * SIDE):
            keys[(j // SIDE * deep * PARTS + tile) * TILE_BYTES + j % SIDE * 4 * SIDE + byte] = 0


@inner
def finite(numbers: Any, i: int) -> bool:
    """Whether numbers[i] is neither infinite nor NaN, nor so large that its first part is infinite."""
    return abs(float32_at(numbers, i)) < np.float32(LIMIT)


@inner
def all_finite(rows: Any, step: int, n: int, Dh: int) -> bool:
    whole = Dh // SIDE * SIDE
    if whole and differences(rows, step, n, whole) != 0:
        return False
    for r in range(n if whole < Dh else 0):
        for d in range(whole, Dh):
            if not finite(rows, r * step + d):
                return False
    return True


@intrinsic
def differences(typing_context, rows, step, n, d):
    """The sum of x - x for the first parts x of n rows of d values (whole vectors): 0, or NaN if one is not finite."""

    def generate(context, builder, signature, arguments):
        rows, step, n, d = arguments

        def row(r: Any, carried: list) -> list:
            here = builder.gep(rows, [builder.mul(r, step)])

            def some(i: Any, sums: list) -> list:
                numbers = widened(builder, builder.gep(here, [i]), VECTOR, signature.args[0].dtype, TILE)
                first = builder.bitcast(parts_of(builder, numbers)[0], VECTOR)
                return [builder.fadd(sums[0], builder.fsub(first, first))]

            return loop(builder, d, SIDE, carried, some)

        (lanes,) = loop(builder, n, 1, [every(VECTOR, 0.0)], row)
        return across(builder, lanes, lambda builder, a, b: builder.fadd(a, b))

    return types.float32(rows, types.int64, types.int64, types.int64), generate


# ---- softmax -----------------------------------------------------------------------------------------------------------------------------


def put_line(builder: Any, weights: Any, k: Any, numbers: Any) -> None:
    """LLVM: splits the weights of 16 keys for a single query: half a row of a tile."""
    tile, half = builder.mul(builder.lshr(k, INDEX(5)), INDEX(LINES)), builder.mul(builder.and_(k, INDEX(DEEP - 1)), INDEX(2))
    for i, words in enumerate(parts_of(builder, numbers)):
        halves = builder.trunc(builder.lshr(words, every(WORDS, 16)), ir.VectorType(ir.IntType(16), SIDE))
        store(builder, halves, builder.gep(weights, [builder.add(builder.add(tile, half), INDEX(i * 4 * SIDE))]))


weight_of = weighing_by(POWERS)
soften_one = softening_one(weight_of, put_line)


@intrinsic
def raise_maximum(typing_context, scores, n, m, l, acc, d, highest):
    """Raises 16 queries' maxima to their scores of n keys, rescales older sums, l and `d` rows of acc, and writes to `highest` the maxima to subtract
    (0 where no key was seen)."""

    def generate(context, builder, signature, arguments):
        scores, n, m, l, acc, d, place = arguments
        highest, shown, shrink = raised(builder, GROUP, scores, n, m, acc, d, weight_of)
        for number, target in ((builder.fmul(load(builder, l, VECTOR), shrink), l), (highest, m), (shown, place)):
            store(builder, number, target)
        return context.get_dummy_value()

    return types.void(scores, types.int64, m, l, acc, types.int64, highest), generate


@intrinsic
def soften_and_score(typing_context, scores, chunks, highest, totals, weights, after, keys, gap, queries, deep, steps):
    """Turns a group's scores into weights in parts, and adds them to `totals`; meanwhile tiles compute the next group's scores.

    A chunk of softmax is 32 keys by 16 of the 32 queries, a step of tiles 32 keys by 32 queries by 32 of d: there may be more chunks or more steps.
    """

    def generate(context, builder, signature, arguments):
        scores, chunks, highest, totals, weights, after, keys, gap, queries, deep, steps = arguments
        tiles, sums = unit_of(builder, INDEX(SIDE)), [(r, c) for r in range(2) for c in range(2)]

        def chunk(i: Any) -> Iterator[None]:
            strip, block = builder.and_(i, INDEX(1)), builder.lshr(i, INDEX(1))
            place = builder.gep(scores, [builder.add(builder.mul(block, INDEX(DEEP * GROUP)), builder.mul(strip, INDEX(SIDE)))])
            target = builder.gep(weights, [builder.add(builder.mul(strip, INDEX(BLOCKS * BLOCK)), builder.mul(block, INDEX(BLOCK)))])
            shown = load(builder, builder.gep(highest, [builder.mul(strip, INDEX(SIDE))]), VECTOR)
            four = [builder.gep(totals, [builder.add(builder.mul(strip, INDEX(4 * SIDE)), INDEX(r * SIDE))]) for r in range(4)]
            total = [load(builder, a, VECTOR) for a in four]
            for k in range(0, DEEP, 4):
                numbers = [weight_of(builder, load(builder, builder.gep(place, [INDEX((k + r) * GROUP)]), VECTOR), shown) for r in range(4)]
                for r in range(0, 4, 2):
                    put_words(builder, numbers[r : r + 2], builder.gep(target, [INDEX((k + r) // 2 * 4 * SIDE)]))
                total = [builder.fadd(a, number) for a, number in zip(total, numbers, strict=True)]
                yield
            for a, number in zip(four, total, strict=True):
                store(builder, number, a)

        def step(i: Any) -> Iterator[None]:
            block, t = builder.udiv(i, deep), builder.urem(i, deep)
            with builder.if_then(builder.icmp_signed("==", t, INDEX(0))):
                for a in range(4):
                    tiles.zero(a)
            depth, first = builder.mul(t, INDEX(BLOCK)), builder.mul(block, INDEX(2))
            rows = [builder.gep(keys, [builder.add(builder.mul(builder.add(first, INDEX(r)), gap), depth)]) for r in range(2)]
            columns = [builder.gep(queries, [builder.add(builder.mul(gap, INDEX(c)), depth)]) for c in range(2)]
            lines, words = ({first + i: parts_at(builder, a) for i, a in enumerate(places)} for first, places in ((4, rows), (6, columns)))
            yield from products(tiles, list(range(4)), lines, words)
            with builder.if_then(builder.icmp_signed("==", builder.add(t, INDEX(1)), deep)):
                corner = builder.mul(block, INDEX(DEEP * GROUP))
                for n, (r, c) in enumerate(sums):
                    target = builder.gep(after, [builder.add(corner, INDEX(r * SIDE * GROUP + c * SIDE))])
                    tiles.store(n, builder.bitcast(target, INT8.as_pointer()), INDEX(4 * GROUP))

        def some(first: Any, last: Any, *kinds: Any) -> None:
            def body(i: Any, _: list) -> list:
                doing = [kind(builder.add(first, i)) for kind in kinds]
                while doing:
                    doing = [a for a in doing if next(a, a) is None]
                return []

            with builder.if_then(builder.icmp_signed("<", first, last)):
                loop(builder, builder.sub(last, first), 1, [], body)

        both = builder.select(builder.icmp_signed("<", chunks, steps), chunks, steps)
        some(INDEX(0), both, step, chunk)
        some(both, steps, step)
        some(both, chunks, chunk)
        return context.get_dummy_value()

    index = types.int64
    return types.void(scores, index, highest, totals, weights, after, keys, index, queries, index, index), generate


IN_PARTS = Forward(by_dtype(_forward, "_in_parts"), GROUP, needed, [SHAPES[SIDE], shapes_of_one()], "float32")
IN_PARTS_BWD = Backward(Kernel(_backward), going_back, [SHAPES[SIDE]])
IN_FLOAT32, IN_FLOAT32_BWD = (IN_PARTS, IN_PARTS_BWD) if UNIT else (attention_cpu.IN_FLOAT32, attention_cpu.IN_FLOAT32_BWD)


def way_for(params: dict) -> Forward:
    """The model's way of attention: bfloat16, if the processor multiplies it and the weights are bfloat16, int8 or int4; else float32."""
    leaf = params["embed_tokens"]
    imprecise = leaf["weight"].dtype == bfloat16 or "scale" in leaf or getattr(leaf["weight"], "kind", "")
    return IN_BFLOAT16 if TILE.pairs and imprecise else IN_FLOAT32


def ahead(params: dict) -> None:
    """Has generation's attention kernel compiled in another process, if it is not cached: it takes half of a first run's time."""
    way = way_for(params)
    dtype = np.dtype(way.stored)
    bits = BITS.get(dtype, dtype).str
    way.kernels[bits].ahead(f"attention_parts.{'IN_FLOAT32' if way is IN_FLOAT32 else 'IN_BFLOAT16'}.kernels[{bits!r}]")
