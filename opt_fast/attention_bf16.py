"""Attention for bfloat16, int8 and int4 models, where the processor multiplies bfloat16: FlashAttention-2 as in attention_cpu.py.

Queries, keys, values and weights are rounded to bfloat16, as HF does in that dtype; sums, softmax and its denominator stay float32. Keys are the rows
of both products: Sᵀ = K Qᵀ and Oᵀ = Vᵀ Pᵀ. So the scores of 16 queries for one key fill a vector, each lane has a softmax of its own, keys need no
transposing, and two neighbouring rows of weights form the pairs that the second product needs. Products use the tiles of gemm_amx.py, or, where the
processor has none, 16 vectors in the same role and gemm.py's products of pairs.

A single query, as in decoding, reads keys and values in place and computes the same sums: its scores in tiles if keys are stored in a tile's layout,
the rest in vectors. A tile instruction (TDPBF16PS) sums the 1st, 3rd … of 32 neighbours and the 2nd, 4th … separately, adds the two sums, and adds
that to the previous total. It takes subnormals as 0, and so does all of this kernel: results are bit-identical whether a query is alone or among
others, and whether keys are stored in float32 or in bfloat16.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from opt_fast.attention_cpu import BC, LOWEST, Forward, by_dtype, float32_at
from opt_fast.gemm import TILE, copy_tile, pair_products
from opt_fast.gemm_amx import (
    HALVES,
    INDEX,
    OF_WEIGHTS,
    OF_X,
    PAIRS,
    SHAPES,
    SIDE,
    SINGLE,
    TILE_BYTES,
    UNIT,
    VECTOR,
    WORDS,
    configure,
    flush,
    halves_at,
    over_tiles,
    release,
    restore,
    round_row,
    rounded,
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
    larger,
    load,
    loop,
    multiply_add,
    prefetch,
    rows_from,
    store,
    transposed,
    uint16s,
)
from opt_fast.paged_cache import PAGE

as_stored = floats  # the pointer type of keys and values; kernel variants rebind it
IN_TILES, WIDE = bool(UNIT), TILE._replace(width=SIDE)
PAIR = 2 * SIDE  # keys, or elements of d, in a row of a tile
BLOCKS = BC // PAIR  # of keys
LINE_SIZE = PAIR * SIDE  # float32 of a buffer for heads that do not fill their tiles
POWERS = 0.009582853, 0.055906426, 0.2402410, 0.6931242, 1.0  # polynomial of 2ᶠ for |f| ≤ 1/2, exactly 1 at 0: the least relative error is 3e-6, that
# of a bfloat16 4e-3

assert BC % PAIR == PAGE % PAIR == 0


def needed(queries: int, Dh: int) -> int:
    """Scratch memory, in float32 elements, of a task with this many queries."""
    deep, wide, groups = math.ceil(Dh / PAIR), math.ceil(Dh / SIDE), math.ceil(queries / SIDE)
    tiles = BC // SIDE * deep + BLOCKS * wide + groups * (deep + wide)
    return BC * SIDE + tiles * TILE_BYTES // 4 + 2 * groups * SIDE + LINE_SIZE + wide * SIDE


def _forward(table: Any) -> None:
    a, place = at(table, ARGUMENTS), table[MEMORY] + claim(table, THREADS) * table[BYTES]
    k, v = as_stored(a[1]), as_stored(a[2])
    q, O, L, rows_table, tasks, n = floats(a[0]), floats(a[3]), floats(a[4]), int64s(a[5]), int64s(a[6]), a[7]
    step, apart, H, Dh, scale = a[9], a[10], a[11], a[12], float_of(a[13])
    Br, for_groups, for_one, shaped, before = a[8], bytes_(a[14]), bytes_(a[15]), 0, flush()
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
            attend_alone(x, k, v, places, h * apart, step, past + first + 1, Dh, scale, floats(place), o, lse)
        else:
            attend_groups(x, k, v, places, h * apart, step, mask, hides, past + first, count, H, Dh, scale, place, o, lse)
        claim(table, DONE)
        task = claim(table, TASKS)
    release()
    restore(before)


@inner
def attend_groups(q: Any, k: Any, v: Any, places: Any, head: int, step: int, mask: Any, hides: int, past: int, count: int, H: int, Dh: int,
                  scale: Any, place: int, O: Any, L: Any) -> None:  # fmt: skip
    """`count` queries of a head, the first of which sees `past` keys besides its own."""
    deep, wide, groups = (Dh + PAIR - 1) // PAIR, (Dh + SIDE - 1) // SIDE, (count + SIDE - 1) // SIDE  # tiles along d: of pairs, of single elements
    scores, keys = floats(place), place + 4 * BC * SIDE
    values = keys + BC // SIDE * deep * TILE_BYTES
    queries = values + wide * BLOCKS * TILE_BYTES
    acc = floats(queries + groups * deep * TILE_BYTES)
    m = at(acc, groups * wide * SIDE * SIDE)
    l = at(m, groups * SIDE)
    line = at(l, groups * SIDE)
    for i in range(groups * SIDE):
        m[i], l[i] = -np.inf, 0
        for d in range(wide * SIDE):
            acc[i * wide * SIDE + d] = 0
    for g in range(groups):
        pack_queries(at(q, g * SIDE * H * Dh), H * Dh, min(SIDE, count - g * SIDE), Dh, scale, bytes_(queries + g * deep * TILE_BYTES), line)
    for key in range(0, past + count, BC):
        tile, shown = min(BC, past + count - key), at(mask, key)
        for j in range(0, tile, PAGE):
            here, some = places[(key + j) // PAGE] + head, min(PAGE, tile - j)
            pack_keys(at(k, here), step, some, Dh, bytes_(keys + j // SIDE * deep * TILE_BYTES), line)
            pack_values(at(v, here), step, some, Dh, bytes_(values + j // PAIR * TILE_BYTES), line)
        for j in range((tile + PAIR - 1) // PAIR * PAIR if hides else 0):
            if j >= tile or not shown[j]:  # a weight of 0 times NaN would be NaN
                for d in range(wide * SIDE):
                    uint16s(values + (d // SIDE * BLOCKS + j // PAIR) * TILE_BYTES)[d % SIDE * PAIR + j % PAIR] = 0
        for g in range(max(0, key - past) // SIDE, groups):  # from the first group that sees this tile
            limit = past + g * SIDE + 1 - key  # how many keys of the tile the group's first query sees
            seen = min(tile, limit + min(SIDE, count - g * SIDE) - 1)
            blocks, sums = (seen + PAIR - 1) // PAIR, at(acc, g * wide * SIDE * SIDE)
            score(scores, bytes_(keys), deep * TILE_BYTES, bytes_(queries + g * deep * TILE_BYTES), deep, (seen + SIDE - 1) // SIDE)
            hide_unseen(scores, SIDE, limit, seen, tile, blocks * PAIR, shown, hides)
            soften(scores, blocks * PAIR, at(m, g * SIDE), at(l, g * SIDE), sums, wide * SIDE)
            weigh(sums, bytes_(values), BLOCKS * TILE_BYTES, bytes_of(scores), blocks, wide)
    write_rows(acc, SIDE, count, l, Dh, O, H * Dh, line)
    for i in range(count):
        L[i * H] = m[i] + math.log(l[i])


@inner
def hide_unseen(scores: Any, apart: int, limit: int, seen: int, tile: int, n: int, shown: Any, hides: int) -> None:
    """Sets 16 queries' scores to -inf for future and hidden keys: for n keys, `apart` in scores, of which the first query sees `limit` and the last
    at most `seen`."""
    for j in range(max(0, min(limit, seen)), n):
        hide(at(scores, j * apart), j - limit + 1 if j < tile else SIDE)
    for j in range(seen if hides else 0):
        if not shown[j]:
            hide(at(scores, j * apart), SIDE)


@inner
def write_rows(sums: Any, group: int, n: int, l: Any, Dh: int, rows: Any, step: int, line: Any) -> None:
    """Divides n queries' sums by their l and writes them as rows; in `sums` they are columns, group by group."""
    wide = (Dh + SIDE - 1) // SIDE
    for i in range(0, n, SIDE):
        some, here = min(SIDE, n - i), at(sums, i // group * wide * SIDE * group + i % group)
        for t in range(wide):
            columns, corner = min(SIDE, Dh - t * SIDE), at(rows, i * step + t * SIDE)
            whole = some == columns == SIDE
            divide(at(here, t * SIDE * group), group, at(l, i), corner if whole else line, step if whole else SIDE)
            if not whole:
                copy_tile(line, SIDE, some, columns, corner, step)


@inner
def attend_alone(q: Any, k: Any, v: Any, places: Any, head: int, step: int, S: int, Dh: int, scale: Any, scores: Any, O: Any, L: Any) -> None:
    """A single query: keys and values are read in place."""
    in_tiles = lie_in_tiles(k) and Dh % PAIR == 0
    acc, weights = at(scores, BC), pairs_of(scores)
    m, l = at(acc, Dh), at(acc, Dh + 1)
    xs = pairs_of(at(acc, Dh + 2))
    m[0], l[0] = -np.inf, 0
    for d in range(Dh):
        acc[d] = 0
    round_scaled(q, scale, Dh, xs)
    for key in range(0, S, BC):
        tile = min(BC, S - key)
        columns = (tile + SIDE - 1) // SIDE * SIDE
        for j in range(0, tile, PAGE):
            page, some = places[(key + j) // PAGE] + head, min(PAGE, tile - j)
            for c in range(0, some, SIDE):
                fetch(at(v, page + c * step), step, Dh)
                if key + j + PAGE < S:
                    fetch(at(k, places[(key + j) // PAGE + 1] + head + c * step), step, Dh)
                if in_tiles and c + SIDE <= some:
                    dots_in_tiles(at(scores, j + c), xs, at(k, page + c * step), step, Dh // PAIR)
                else:
                    dots(at(scores, j + c), xs, at(k, page + c * step), step, min(SIDE, some - c), Dh)
        for j in range(tile, columns):
            scores[j] = -np.inf
        shrink = soften_one(scores, columns, m, l, scores)
        for d in range(Dh):
            acc[d] *= shrink
        for j in range(0, tile, PAGE):
            page, some = places[(key + j) // PAGE] + head, min(PAGE, tile - j)
            d = 0
            while d + 4 * SIDE <= Dh:
                weigh_side(at(acc, d), at(weights, j // 2), at(v, page + d), step, some)
                d += 4 * SIDE
            while d < Dh:
                weigh_vector(at(acc, d), at(weights, j // 2), at(v, page + d), step, some)
                d += SIDE
    part = np.float32(1) / l[0] if l[0] != 0 else np.float32(0)  # exactly 0 if it sees no key
    for d in range(Dh):
        O[d] = acc[d] * part if part != 0 else np.float32(0)
    L[0] = m[0] + math.log(l[0])


# ---- products ----------------------------------------------------------------------------------------------------------------------------


def by_vectors(adds: bool) -> Any:
    """gemm_amx.over_tiles for one tile of sums, with vector products of pairs instead: kernel(sums, start, start_row, x, gap, strip, n, _)."""

    @intrinsic
    def kernel(typing_context, sums, start, start_row, x, gap, strip, n, asked):
        def generate(context, builder, signature, arguments):
            sums, start, start_row, x, _, strip, n, _ = arguments
            places = [builder.gep(sums, [INDEX(r * SIDE)]) for r in range(SIDE)]

            def tile(t: Any, totals: list) -> list:
                offset = builder.mul(t, INDEX(TILE_BYTES))

                def word(k: Any, carried: list) -> list:
                    column = builder.add(offset, builder.mul(k, INDEX(4)))
                    line = load(builder, builder.gep(strip, [builder.add(offset, builder.mul(k, INDEX(4 * SIDE)))]), WORDS)
                    pairs = [builder.gep(x, [builder.add(column, INDEX(r * 4 * SIDE))]) for r in range(SIDE)]
                    pairs = [broadcast(builder, builder.load(builder.bitcast(place, SINGLE.as_pointer())), WORDS) for place in pairs]
                    return [pair_products(builder, pair, line, total, WIDE) for pair, total in zip(pairs, carried, strict=True)]

                return loop(builder, INDEX(SIDE), 1, totals, word)

            begins = [builder.gep(start, [builder.mul(start_row, INDEX(r))]) for r in range(SIDE)]
            before = [load(builder, place, VECTOR) if adds else every(VECTOR, 0.0) for place in begins]
            for place, total in zip(places, loop(builder, n, 1, before, tile), strict=True):
                store(builder, total, place)
            return context.get_dummy_value()

        return types.void(sums, start, types.int64, x, types.int64, strip, types.int64, strip), generate

    return kernel


def products(count: int, adds: bool) -> Any:
    """The kernel for `count` contiguous tiles of sums, to which it adds, or which it overwrites."""
    return over_tiles(*[PAIRS] * count, adds=adds) if UNIT else by_vectors(adds)


def over_all(name: str, adds: bool) -> Any:
    """kernel(sums, x, gap, strip, n, count): `products` for any number of tiles of sums. `name` is for the linker, as in attention_cpu.of_a_head."""
    three, two, one = (products(count, adds) for count in (3, 2, 1))

    def kernel(sums: Any, x: Any, gap: int, strip: Any, n: int, count: int) -> None:
        i = 0
        while i < count:
            target, here, left = at(sums, i * SIDE * SIDE), at(x, i * gap), count - i
            if IN_TILES and (left == 3 or left > 4):
                three(target, target, SIDE, here, gap, strip, n, strip)
                i += 3
            elif IN_TILES and left > 1:
                two(target, target, SIDE, here, gap, strip, n, strip)
                i += 2
            else:
                one(target, target, SIDE, here, gap, strip, n, strip)
                i += 1

    kernel.__name__ = kernel.__qualname__ = name
    return inner(kernel)


score, weigh = over_all("score", adds=False), over_all("weigh", adds=True)  # of keys and queries along d; of values and weights along keys


@intrinsic
def bytes_of(typing_context, numbers):
    """The pointer cast to bytes, for tiles."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(8).as_pointer())

    return types.CPointer(types.uint8)(numbers), generate


def as_pairs(builder: Any, first: Any, second: Any) -> Any:
    """LLVM: interleaves two vectors of bfloat16 into one of pairs."""
    return builder.or_(builder.zext(first, WORDS), builder.shl(builder.zext(second, WORDS), every(WORDS, SIDE)))


@inner
def pack_keys(k: Any, step: int, n: int, Dh: int, keys: Any, line: Any) -> None:
    """Packs n keys as tiles of 16 keys by 16 pairs of d, with all tiles of the same keys in succession; 0 beyond Dh."""
    whole, deep = Dh // PAIR * PAIR, (Dh + PAIR - 1) // PAIR
    for j in range(n):
        target = at(keys, j // SIDE * deep * TILE_BYTES + j % SIDE * 4 * SIDE)
        if whole:
            round_row(at(k, j * step), whole, target)
        if whole < Dh:
            for d in range(PAIR):
                line[d] = float32_at(k, j * step + whole + d) if whole + d < Dh else np.float32(0)
            round_row(line, PAIR, at(target, whole // PAIR * TILE_BYTES))


@inner
def pack_values(v: Any, step: int, n: int, Dh: int, values: Any, line: Any) -> None:
    """Packs n values as tiles of 16 of d by 16 pairs of keys, BLOCKS tiles for each 16 of d; the last is repeated beyond n, where weights are 0."""
    for j in range(0, n, PAIR):
        rows = min(PAIR, n - j)
        for t in range((Dh + SIDE - 1) // SIDE):
            source, target = at(v, j * step + t * SIDE), at(values, (t * BLOCKS + j // PAIR) * TILE_BYTES)
            if (t + 1) * SIDE <= Dh:
                pack_pairs(source, step, rows, target)
            else:
                for r in range(rows):
                    for d in range(SIDE):
                        line[r * SIDE + d] = float32_at(source, r * step + d) if t * SIDE + d < Dh else np.float32(0)
                pack_pairs(line, SIDE, rows, target)


@intrinsic
def pack_turned(typing_context, rows, step, n, scale, tile):
    """32 elements of 16 rows, times `scale`, as a tile of 16 pairs of elements by 16 rows; the last of n rows is repeated."""

    def generate(context, builder, signature, arguments):
        rows, step, n, scale, tile = arguments
        scale, lines = broadcast(builder, scale, VECTOR), []
        for place in rows_from(builder, rows, step, n, SIDE):
            numbers = [load(builder, builder.gep(place, [INDEX(half * SIDE)]), VECTOR) for half in range(2)]
            lines.append(side_by_side(builder, *(rounded(builder, builder.fmul(number, scale)) for number in numbers)))
        for r, line in enumerate(transposed(builder, lines)):
            store(builder, line, builder.gep(tile, [INDEX(r * 4 * SIDE)]))
        return context.get_dummy_value()

    return types.void(rows, types.int64, types.int64, types.float32, tile), generate


def packing_queries(name: str, pack: Any, size: int) -> Any:
    """A kernel that packs all of d for 16 queries, with `pack` for 32 elements each, whose tile takes `size` bytes. `name` is for the linker."""

    def kernel(q: Any, step: int, n: int, Dh: int, scale: Any, queries: Any, line: Any) -> None:
        for t in range((Dh + PAIR - 1) // PAIR):
            source, apart = at(q, t * PAIR), step
            if (t + 1) * PAIR > Dh:
                for r in range(n):
                    for d in range(PAIR):
                        line[r * PAIR + d] = source[r * step + d] if t * PAIR + d < Dh else np.float32(0)
                source, apart = line, PAIR
            pack(source, apart, n, scale, at(queries, t * size))

    kernel.__name__ = kernel.__qualname__ = name
    return inner(kernel)


pack_queries = packing_queries("pack_queries", pack_turned, TILE_BYTES)


def side_by_side(builder: Any, low: Any, high: Any) -> Any:
    """LLVM: two vectors of 16 bfloat16 as 16 pairs of neighbours."""
    return builder.bitcast(builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(SINGLE, PAIR), list(range(PAIR)))), WORDS)


@intrinsic
def pack_pairs(typing_context, rows, step, n, tile):
    """16 elements of 32 rows as a tile of 16 elements by 16 pairs of rows; the last of n rows is repeated."""

    def generate(context, builder, signature, arguments):
        rows, step, n, tile = arguments
        halves = [halves_at(builder, place, signature.args[0].dtype) for place in rows_from(builder, rows, step, n, PAIR)]
        pairs = [as_pairs(builder, *halves[r : r + 2]) for r in range(0, PAIR, 2)]
        for r, line in enumerate(transposed(builder, pairs)):
            store(builder, line, builder.gep(tile, [INDEX(r * 4 * SIDE)]))
        return context.get_dummy_value()

    return types.void(rows, types.int64, types.int64, tile), generate


# ---- a group's softmax: a vector holds a key's scores for 16 queries ---------------------------------------------------------------------


@intrinsic
def hide(typing_context, scores, queries):
    """Hides a key from the first `queries` of 16 queries: their scores become -inf."""

    def generate(context, builder, signature, arguments):
        scores, queries = arguments
        lanes = ir.Constant(WORDS, list(range(SIDE)))
        hidden = builder.icmp_signed("<", lanes, broadcast(builder, builder.trunc(queries, SINGLE), WORDS))
        store(builder, builder.select(hidden, every(VECTOR, -math.inf), load(builder, scores, VECTOR)), scores)
        return context.get_dummy_value()

    return types.void(scores, types.int64), generate


def raised(builder: Any, width: int, scores: Any, n: Any, m: Any, acc: Any, d: Any, weight_of: Any) -> tuple[Any, Any, Any]:
    """LLVM: raises 16 queries' maxima to their scores of n keys, `width` apart, and rescales older sums, d rows of acc. Returns the maxima, those to
    subtract (0 where no key was seen), and the factors."""

    def row(base: Any, k: Any, r: int = 0) -> Any:
        return builder.gep(base, [builder.add(builder.mul(k, INDEX(width)), INDEX(r * width))])

    def highest_of(k: Any, carried: list) -> list:
        return [larger(builder, load(builder, row(scores, k, r), VECTOR), so_far) for r, so_far in enumerate(carried)]

    before = load(builder, m, VECTOR)
    found = loop(builder, n, 4, [before] * 4, highest_of)  # four independent maxima, against latency
    highest = larger(builder, larger(builder, found[0], found[1]), larger(builder, found[2], found[3]))
    shown = seen_yet(builder, highest)
    shrink = weight_of(builder, before, shown)

    def shrunk(k: Any, _: list) -> list:
        store(builder, builder.fmul(load(builder, row(acc, k), VECTOR), shrink), row(acc, k))
        return []

    loop(builder, d, 1, [], shrunk)
    return highest, shown, shrink


@intrinsic
def soften(typing_context, scores, n, m, l, acc, d):
    """Turns scores of n keys into weights, in pairs of keys, relative to the queries' new maxima; rescales older sums, `d` rows of acc."""

    def generate(context, builder, signature, arguments):
        scores, n, m, l, acc, d = arguments
        count = 4  # keys at a time, with a sum each, against latency
        highest, shown, shrink = raised(builder, SIDE, scores, n, m, acc, d, weight_of)

        def row(base: Any, k: Any, r: int = 0) -> Any:
            return builder.gep(base, [builder.add(builder.mul(k, INDEX(SIDE)), INDEX(r * SIDE))])

        def weights(k: Any, carried: list) -> list:
            numbers = [weight_of(builder, load(builder, row(scores, k, r), VECTOR), shown) for r in range(count)]
            for r in range(0, count, 2):
                first, second = (rounded_weight(builder, number) for number in numbers[r : r + 2])
                pairs = builder.or_(builder.lshr(first, every(WORDS, 16)), builder.and_(second, every(WORDS, 0xFFFF0000)))
                store(builder, pairs, builder.gep(scores, [builder.add(builder.mul(k, INDEX(SIDE // 2)), INDEX(r // 2 * SIDE))]))
            return [builder.fadd(total, number) for total, number in zip(carried, numbers, strict=True)]

        totals = loop(builder, n, count, [every(VECTOR, 0.0)] * count, weights)
        total = builder.fadd(builder.fadd(totals[0], totals[1]), builder.fadd(totals[2], totals[3]))
        store(builder, builder.fadd(builder.fmul(load(builder, l, VECTOR), shrink), total), l)
        store(builder, highest, m)
        return context.get_dummy_value()

    return types.void(scores, types.int64, m, l, acc, types.int64), generate


def seen_yet(builder: Any, highest: Any) -> Any:
    """LLVM: the maximum, or 0 where no key was seen, as -inf - -inf would be NaN."""
    return builder.select(builder.fcmp_ordered("==", highest, every(VECTOR, -math.inf)), every(VECTOR, 0.0), highest)


def weighing_by(powers: tuple[float, ...]) -> Any:
    """LLVM: exp(score - highest) = 2ⁿ · 2ᶠ, n an integer and |f| ≤ 1/2; `powers` are 2ᶠ's coefficients, highest first. exp(0) is exactly 1.

    0 where score - highest < LOWEST. NaN stays NaN: it comes from bfloat16, so the lower bits, which are added to the exponent, are 0.
    """

    def weight_of(builder: Any, score: Any, highest: Any) -> Any:
        def number(value: float) -> Any:
            return every(VECTOR, float(np.float32(value)))

        less = builder.fsub(score, highest)
        magic = number(1.5 * 2**23)  # so large that its last bit is worth 1: adding it rounds to an integer
        shifted = multiply_add(builder, less, number(1 / math.log(2)), magic, True)
        f = multiply_add(builder, less, number(1 / math.log(2)), builder.fsub(magic, shifted), True)
        p = number(powers[0])
        for coefficient in powers[1:]:
            p = multiply_add(builder, p, f, number(coefficient), True)
        exponent = builder.shl(builder.bitcast(shifted, WORDS), every(WORDS, 23))
        value = builder.add(builder.bitcast(p, WORDS), exponent)
        return builder.bitcast(builder.select(builder.fcmp_ordered("<", less, number(LOWEST)), every(WORDS, 0), value), VECTOR)

    return weight_of


def rounded_weight(builder: Any, weight: Any) -> Any:
    """LLVM: weights rounded to bfloat16 (to nearest, ties up) in the upper halves of words; the lower halves are arbitrary."""
    return builder.add(builder.bitcast(weight, WORDS), every(WORDS, 0x8000))


@intrinsic
def divide(typing_context, acc, apart, l, rows, step):
    """Divides 16 rows of sums, `apart`, by the 16 queries' l, and writes a row for each query, `step` apart; exactly 0 where no key is seen."""

    def generate(context, builder, signature, arguments):
        acc, apart, l, rows, step = arguments
        sums = load(builder, l, VECTOR)
        none, part = builder.fcmp_ordered("==", sums, every(VECTOR, 0.0)), builder.fdiv(every(VECTOR, 1.0), sums)
        lines = [builder.fmul(load(builder, builder.gep(acc, [builder.mul(apart, INDEX(r))]), VECTOR), part) for r in range(SIDE)]
        lines = [builder.select(none, every(VECTOR, 0.0), line) for line in lines]
        for r, line in enumerate(transposed(builder, lines)):
            store(builder, line, builder.gep(rows, [builder.mul(step, INDEX(r))]))
        return context.get_dummy_value()

    return types.void(acc, types.int64, l, rows, types.int64), generate


weight_of = weighing_by(POWERS)


# ---- a single query: in vectors, the same sums as in tiles -------------------------------------------------------------------------------


def softening_one(weight_of: Any, put: Any) -> Any:
    """kernel(scores, n, m, l, pairs): turns scores of n keys (whole vectors) into weights, as `soften` does; returns the factor for older sums."""

    @intrinsic
    def kernel(typing_context, scores, n, m, l, pairs):
        def generate(context, builder, signature, arguments):
            scores, n, m, l, pairs = arguments
            quarters = [ir.Constant(ir.VectorType(SINGLE, 4), list(range(c, c + 4))) for c in range(0, SIDE, 4)]
            before = builder.load(m)
            (lanes,) = loop(builder, n, SIDE, [broadcast(builder, before, VECTOR)],
                            lambda k, carried: [larger(builder, load(builder, builder.gep(scores, [k]), VECTOR), carried[0])])  # fmt: skip
            highest = across(builder, lanes, larger)
            shown = seen_yet(builder, broadcast(builder, highest, VECTOR))
            shrink = builder.extract_element(weight_of(builder, broadcast(builder, before, VECTOR), shown), SINGLE(0))

            def weights(k: Any, carried: list) -> list:
                number = weight_of(builder, load(builder, builder.gep(scores, [k]), VECTOR), shown)
                put(builder, pairs, k, number)
                (total,) = carried
                for quarter in quarters:
                    total = builder.fadd(total, builder.shuffle_vector(number, number, quarter))
                return [total]

            (total,) = loop(builder, n, SIDE, [every(ir.VectorType(ir.FloatType(), 4), 0.0)], weights)
            total = across_neighbours(builder, total)
            builder.store(builder.fadd(builder.fmul(builder.load(l), shrink), total), l)
            builder.store(highest, m)
            return shrink

        return types.float32(scores, types.int64, m, l, pairs), generate

    return kernel


def put_neighbours(builder: Any, pairs: Any, k: Any, number: Any) -> None:
    """LLVM: stores the weights of 16 keys, rounded, over scores."""
    halves = builder.trunc(builder.lshr(rounded_weight(builder, number), every(WORDS, 16)), HALVES)
    store(builder, halves, builder.gep(pairs, [builder.udiv(k, INDEX(2))]))


soften_one = softening_one(weight_of, put_neighbours)


def across_neighbours(builder: Any, four: Any) -> Any:
    """LLVM: (a + b) + (c + d)."""
    a, b, c, d = (builder.extract_element(four, SINGLE(lane)) for lane in range(4))
    return builder.fadd(builder.fadd(a, b), builder.fadd(c, d))


@intrinsic
def pairs_of(typing_context, numbers):
    """The pointer cast to words."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], SINGLE.as_pointer())

    return types.CPointer(types.int32)(numbers), generate


@intrinsic
def round_scaled(typing_context, x, scale, n, pairs):
    """n values (whole vectors) times `scale`, as pairs of bfloat16."""

    def generate(context, builder, signature, arguments):
        x, scale, n, pairs = arguments
        scale = broadcast(builder, scale, VECTOR)

        def body(k: Any, _: list) -> list:
            numbers = builder.fmul(load(builder, builder.gep(x, [k]), VECTOR), scale)
            store(builder, rounded(builder, numbers), builder.gep(pairs, [builder.udiv(k, INDEX(2))]))
            return []

        loop(builder, n, SIDE, [], body)
        return context.get_dummy_value()

    return types.void(x, types.float32, types.int64, pairs), generate


def met(builder: Any, word: Any, pairs: Any, sums: list) -> list:
    """LLVM: adds the products of a pair and a vector of pairs to one vector of sums; or, as tiles do it, to two: of first and of second elements."""
    if not IN_TILES:
        return [pair_products(builder, broadcast(builder, word, WORDS), pairs, sums[0], WIDE)]
    both = [[builder.shl(x, constant(x, 16)), builder.and_(x, constant(x, 0xFFFF0000))] for x in (word, pairs)]
    weights = [broadcast(builder, builder.bitcast(half, ir.FloatType()), VECTOR) for half in both[0]]
    lines = [builder.bitcast(half, VECTOR) for half in both[1]]
    return [multiply_add(builder, w, line, total, True) for w, line, total in zip(weights, lines, sums, strict=True)]


def constant(like: Any, value: int) -> Any:
    """LLVM: a constant word, or a vector of them."""
    return every(WORDS, value) if like.type == WORDS else SINGLE(value)


def opened(totals: list) -> list:
    """LLVM: the initial sums of a block of 16 pairs."""
    return [[every(VECTOR, 0.0)] * 2 for _ in totals] if IN_TILES else [[total] for total in totals]


def closed(builder: Any, totals: list, sums: list) -> list:
    """LLVM: the totals after the block."""
    return [builder.fadd(total, builder.fadd(*both)) for total, both in zip(totals, sums, strict=True)] if IN_TILES else [total for (total,) in sums]


@intrinsic
def dots(typing_context, scores, q, keys, step, n, Dh):
    """scores[j] = q · key j for 16 keys, `step` apart; the last of the n keys stands in for those beyond. Dh is a multiple of 16."""

    def generate(context, builder, signature, arguments):
        scores, q, keys, step, n, Dh = arguments
        stored, places = signature.args[2].dtype, rows_from(builder, keys, step, n, SIDE)

        def body(d: Any, carried: list) -> list:
            there = builder.icmp_signed("<", builder.add(d, INDEX(SIDE)), Dh)  # else only the last 16 elements are left
            second = builder.select(there, builder.add(d, INDEX(SIDE)), d)
            lines = []
            for place in places:
                low, high = (halves_at(builder, builder.gep(place, [offset]), stored) for offset in (d, second))
                high = builder.select(there, high, every(HALVES, 0))
                lines.append(side_by_side(builder, low, high))
            (sums,) = opened(carried)
            for e, pairs in enumerate(transposed(builder, lines)):
                place = builder.add(builder.udiv(d if e < SIDE // 2 else second, INDEX(2)), INDEX(e % (SIDE // 2)))
                sums = met(builder, builder.load(builder.gep(q, [place])), pairs, sums)
            return closed(builder, carried, [sums])

        (total,) = loop(builder, Dh, PAIR, [every(VECTOR, 0.0)], body)
        store(builder, total, scores)
        return context.get_dummy_value()

    return types.void(scores, q, keys, types.int64, types.int64, types.int64), generate


@inner
def fetch(rows: Any, step: int, Dh: int) -> None:
    """Prefetches 16 rows: in pieces this short, the hardware prefetcher would be too late."""
    for r in range(SIDE):
        for d in range(0, Dh, PAIR):
            ask(at(rows, r * step + d))


@intrinsic
def ask(typing_context, numbers):
    """Prefetches 32 elements."""

    def generate(context, builder, signature, arguments):
        size = 4 if signature.args[0].dtype == types.float32 else 2
        for line in range(0, PAIR * size, LINE):
            prefetch(builder, builder.gep(arguments[0], [INDEX(line // size)]))
        return context.get_dummy_value()

    return types.void(numbers), generate


def loads_whole(keys: Any) -> bool:
    """Whether a tile can be loaded from keys of this type."""
    return IN_TILES and keys.dtype == types.uint16


@intrinsic
def lie_in_tiles(typing_context, keys):
    """Whether 16 keys can be loaded in place as a tile, to be multiplied by a tile of one column, the query."""

    def generate(context, builder, signature, arguments):
        return ir.IntType(1)(loads_whole(signature.args[0]))

    return types.boolean(keys), generate


@intrinsic
def dots_in_tiles(typing_context, scores, q, keys, step, n):
    """As `dots`, for 16 keys of n times 32 elements in bfloat16."""

    def generate(context, builder, signature, arguments):
        if not loads_whole(signature.args[2]):
            return context.get_dummy_value()
        scores, q, keys, step, n = arguments
        scores, q, keys = (builder.bitcast(place, ir.IntType(8).as_pointer()) for place in (scores, q, keys))
        tiles = unit_of(builder, INDEX(SIDE))
        tiles.zero(0)

        def block(t: Any, _: list) -> list:
            offset = builder.mul(t, INDEX(2 * PAIR))
            tiles.load(OF_X, builder.gep(keys, [offset]), builder.mul(step, INDEX(2)))
            tiles.load(OF_WEIGHTS, builder.gep(q, [offset]), INDEX(4), words=1)
            tiles.multiply(PAIRS, 0, OF_X, OF_WEIGHTS)
            return []

        loop(builder, n, 1, [], block)
        tiles.store(0, scores, INDEX(4), words=1)
        return context.get_dummy_value()

    return types.void(scores, q, keys, types.int64, types.int64), generate


def weighing(vectors: int) -> Any:
    """kernel(sums, weights, values, step, n): sums[d] += Σ weights[j] · values[j, d] for `vectors` vectors of d; a weight after an odd n is 0."""

    @intrinsic
    def kernel(typing_context, sums, weights, values, step, n):
        def generate(context, builder, signature, arguments):
            sums, weights, values, step, n = arguments
            stored, last = signature.args[2].dtype, builder.sub(n, INDEX(1))
            places = [INDEX(c * SIDE) for c in range(vectors)]

            def block(first: Any, totals: list) -> list:
                rest, begun = builder.sub(n, first), opened(totals)

                def pair(j: Any, carried: list) -> list:
                    key = builder.add(first, j)
                    after = builder.add(key, INDEX(1))
                    rows = [
                        builder.gep(values, [builder.mul(k, step)]) for k in (key, builder.select(builder.icmp_signed("<", after, n), after, last))
                    ]
                    word, found = builder.load(builder.gep(weights, [builder.udiv(key, INDEX(2))])), []
                    for place, so_far in zip(places, zip(*[iter(carried)] * len(begun[0]), strict=True), strict=True):
                        pairs = as_pairs(builder, *(halves_at(builder, builder.gep(row, [place]), stored) for row in rows))
                        found += met(builder, word, pairs, list(so_far))
                    return found

                some = builder.select(builder.icmp_signed("<", rest, INDEX(PAIR)), rest, INDEX(PAIR))
                found = loop(builder, some, 2, [total for both in begun for total in both], pair)
                return closed(builder, totals, list(zip(*[iter(found)] * len(begun[0]), strict=True)))

            before = [load(builder, builder.gep(sums, [place]), VECTOR) for place in places]
            for place, total in zip(places, loop(builder, n, PAIR, before, block), strict=True):
                store(builder, total, builder.gep(sums, [place]))
            return context.get_dummy_value()

        return types.void(sums, weights, values, types.int64, types.int64), generate

    return kernel


weigh_side, weigh_vector = weighing(4), weighing(1)


IN_BFLOAT16 = Forward(
    by_dtype(_forward, "_in_tiles" if IN_TILES else "_in_pairs"), SIDE, needed, [SHAPES[SIDE], tile_shapes(SIDE, columns=1)], "bfloat16"
)
