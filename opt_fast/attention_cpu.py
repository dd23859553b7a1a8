"""FlashAttention-2 on the CPU: tiled attention, forward and backward, on gemm.py's micro-kernel. opt_np/flash.py defines what it computes.

A task is a head and a block of its queries. It visits the keys BC at a time: it packs them once, and for each group of ROWS queries computes a tile
of scores, turns them into weights, and adds the weighted sum of the values to its accumulator. Tiles of keys that a group cannot see are skipped.
Tiles start at the row's first visible key, and every sum runs in the order of d or of the keys. So a query's output is bit-identical whatever else is
in the batch, however much padding precedes it, and whether the keys arrived all at once or came from a cache.
Axes as in opt_np/ops.py: T queries at the end of S keys. Kernels get arrays as addresses; a token's key in one head is Dh contiguous elements, tokens
are `step` elements apart, and heads `apart`. In the forward pass, rows (sequences of the batch) may have different lengths, and their keys are stored
in pieces of PAGE tokens wherever `Rows` points: in one array, in a cache, or in pages that rows share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import get_num_threads, types

from opt_fast.gemm import ABREAST, COLUMNS, ROWS, TILE, bfloat16_bits, float32_at, micro_kernel, pack_tile, widened
from opt_fast.kernel import (
    ARGUMENTS,
    DONE,
    LINE,
    TASKS,
    Kernel,
    across,
    address,
    at,
    broadcast,
    bytes_,
    claim,
    every,
    float_bits,
    float_of,
    floats,
    inner,
    int16s,
    int64s,
    intrinsic,
    larger,
    load,
    loop,
    memory,
    multiply_add,
    rows_from,
    store,
    transposed,
    uint16s,
    variant,
)
from opt_fast.paged_cache import PAGE
from opt_fast.rowwise import CHUNK

BQ = 96  # queries of a block in the backward pass
BC = 192  # keys of a tile: whole panels, and whole groups of rows. Packed, its K and V stay in the L2 cache
STRIDE = BC + LINE // 4  # between rows of a tile of scores: an odd number of cache lines, so that rows do not all map to the same cache sets
LOWEST = -87.0  # exp of anything below is taken as 0: it would be near or below the smallest normal float32
WIDTH, VECTOR = TILE.width, ir.VectorType(ir.FloatType(), TILE.width)
as_stored = floats  # the pointer type of keys and values; kernel variants rebind it, one for each dtype
SIDE = 4 * WIDTH  # elements of a value that are summed in parallel, in four registers

assert BC % PAGE == PAGE % COLUMNS == BC % ROWS == BQ % ROWS == 0  # else kernels would write beyond a tile's end


def of_a_head(name: str, x_row: int, x_step: int) -> Any:
    """A micro-kernel over one panel of a head that may use fewer `columns` than the panel has: it computes all vectors, half of them, or one.

    `name` must be unique: the linker tells kernels apart by it, among them some that another process compiled.
    """
    whole, half, vector = (micro_kernel(ROWS, 1, x_row, x_step, vectors=n) for n in (TILE.vectors, TILE.vectors // 2, 1))

    def kernel(sums: Any, step: int, x: Any, panel: Any, n: int, columns: int) -> None:
        if columns > TILE.vectors // 2 * WIDTH:
            whole(sums, step, x, panel, 0, n)
        elif columns > WIDTH:
            half(sums, step, x, panel, 0, n)
        else:
            vector(sums, step, x, panel, 0, n)

    kernel.__name__ = kernel.__qualname__ = name
    return inner(kernel)


weigh, gather = of_a_head("weigh", STRIDE, 1), of_a_head("gather", 1, STRIDE)  # x is a tile of scores, read by rows or transposed
weigh_one = micro_kernel(1, ABREAST, STRIDE, 1)
scores_of, scores_of_one = micro_kernel(ROWS, 1, 1, ROWS, adds=False), micro_kernel(1, ABREAST, 0, ROWS, adds=False)


class Forward(NamedTuple):
    """A way: one implementation of the forward pass, such as in float32 or in bfloat16."""

    kernels: dict[str, Kernel]  # by the dtype in which keys and values are stored
    rows: int  # queries of a group; a task's block is a multiple of it
    needed: Callable[[int, int], int]  # scratch memory of a task, in float32 elements: from its number of queries and Dh
    more: list  # its kernels' extra arguments, which come last
    stored: str  # the smallest dtype in which keys and values can be stored without changing the result


class Backward(NamedTuple):
    """One implementation of the backward pass."""

    kernel: Kernel
    needed: Callable[[int, int], int]  # scratch memory of a task, in float32 elements: from T and Dh
    more: list  # the kernel's extra arguments, which come last


class Rows(NamedTuple):
    """Which queries see which keys: rows of any lengths, each with T queries at the end of its S keys."""

    table: np.ndarray  # (R, 5) int64: the row's first query among all, T, S, the address of its places, and that of its mask (0: no key is hidden)
    step: int  # from key to key
    apart: int  # from head to head
    kept: tuple  # keeps alive what the addresses point to: places, the offset in k and v of each PAGE of the row's keys; masks, bool (S)


def rows_of(firsts: Any, counts: Any, origins: np.ndarray, keys: np.ndarray, step: int, Dh: int, visible: np.ndarray | None = None) -> Rows:
    """Rows whose keys start at an origin in k and v, `step` apart, with their heads contiguous.

    firsts: (R);  counts: (R), queries;  origins: (R);  keys: (R), visible or not;  visible: (R, S)
    """
    R, S = len(origins), int(keys.max(initial=0))
    start = np.zeros(R, np.int64) if visible is None else np.where(visible.any(1), visible.argmax(1), keys)
    places = (origins + start * step)[:, None] + np.arange(0, S, PAGE) * step  # (R, pages)
    table = np.zeros((R, 5), np.int64)
    table[:, 0], table[:, 1], table[:, 2] = firsts, counts, keys - start
    table[:, 3] = address(places) + places.strides[0] * np.arange(R)
    if visible is not None:
        visible = np.ascontiguousarray(visible)
        hides = visible.sum(1) < keys - start
        table[:, 4] = hides * (address(visible) + visible.strides[0] * np.arange(R) + start)
    return Rows(table, step, Dh, (places, visible))


def attention_lse(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, visible: np.ndarray | None,
                  way: Forward | None = None) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Causal attention and each query's log-sum-exp; a query that sees no key gets 0 and -inf.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  visible: (B, S)  ->  (B, T, H, Dh), (B, T, H)
    """
    check(q, k, v, visible)
    (B, T, H, Dh), S = q.shape, k.shape[1]
    k, v = rows_apart(k), rows_apart(v)
    if k.strides != v.strides:
        k, v = np.ascontiguousarray(k), np.ascontiguousarray(v)
    row, step = steps(k)
    rows = rows_of(np.arange(B) * T, T, np.arange(B) * row, np.full(B, S), step, Dh, visible)
    O, L = attend(q.reshape(B * T, H, Dh), k, v, rows, scale, way)
    return O.reshape(q.shape), L.reshape(B, T, H)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, rows: Rows, scale: float, way: Forward | None = None) -> tuple[np.ndarray, np.ndarray]:
    """attention_lse for rows of any lengths; the places in `rows` are offsets into k and v, of any shape, in float32 or 16-bit floats as BITS.

    q: (N, H, Dh)  ->  (N, H, Dh), (N, H)
    """
    (N, H, Dh), way = q.shape, way or IN_FLOAT32
    O, L = np.empty(q.shape, np.float32), np.empty((N, H), np.float32)
    if O.size:
        Br, tasks = blocks(way, rows.table, H)
        kernel, arguments = attention_call(way, np.ascontiguousarray(q), k, v, O, L, rows.table, tasks, rows.step, rows.apart, Br, scale)
        kernel(*arguments, tasks=len(tasks) * H, scratch=way.needed(Br, Dh))
    return O, L


def attention_call(way: Forward, q: np.ndarray, k: Any, v: Any, O: np.ndarray, L: np.ndarray, table: np.ndarray, tasks: np.ndarray, step: int,
                   apart: int, Br: int, scale: float) -> tuple[Kernel, list]:  # fmt: skip
    """The kernel for keys of k's dtype, and its arguments."""
    return way.kernels[k.dtype.str], [q, k, v, O, L, table, tasks, len(tasks), Br, step, apart, *q.shape[1:], float_bits(scale), *way.more]


def blocks(way: Forward, table: np.ndarray, H: int) -> tuple[int, np.ndarray]:
    """The most queries of a task, and the tasks, (n, 2): a row and its first query in it, those with the most work first."""
    rows = [(int(T), int(S)) for T, S in table[:, 1:3]]
    longest = max(T for T, _ in rows)
    equals = sum(T for T, _ in rows) / longest  # this many rows of the longest length would have as many queries
    parts = math.ceil(4 * get_num_threads() / (equals * H)) if longest > 1 else 1  # with few heads, several tasks for each
    Br = math.ceil(longest / parts / way.rows) * way.rows

    def work(task: tuple[int, int]) -> int:
        (T, S), first = rows[task[0]], task[1]
        last = min(first + Br, T)
        return (first - last) * (S - T + last)

    return Br, np.array(sorted(((r, first) for r, (T, _) in enumerate(rows) for first in range(0, T, Br)), key=work), np.int64)


def rows_apart(a: np.ndarray) -> np.ndarray:
    """The array itself if its heads are contiguous float32, as in a slice of a cache; else a contiguous float32 copy."""
    return a if a.dtype == np.float32 and a.strides[3] == 4 and a.strides[2] == 4 * a.shape[3] else np.ascontiguousarray(a, np.float32)


def steps(a: np.ndarray) -> tuple[int, int]:
    """Strides in elements: between the batch's rows, and between tokens."""
    return a.strides[0] // 4, a.strides[1] // 4


def check(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray | None) -> None:
    """Raises ValueError for shapes that do not match: kernels get only addresses, and could not notice."""
    (B, T, H, Dh), S = q.shape, k.shape[1]
    if k.shape != (B, S, H, Dh) or v.shape != k.shape or T > S:
        raise ValueError(f"q is {q.shape}, k {k.shape} and v {v.shape}; they are (B, T, H, Dh) and twice (B, S, H, Dh), with T ≤ S")
    if visible is not None and (visible.shape != (B, S) or visible.dtype != np.bool_):
        raise ValueError(f"layout.visible is {visible.dtype}{visible.shape}; it is bool{(B, S)}, a column for each key")


def hidden_keys(k: np.ndarray, visible: np.ndarray | None) -> tuple[np.ndarray, int, np.ndarray]:
    """The mask of visible keys, whether there is one (0 or 1), and each row's first visible key."""
    B, S = k.shape[:2]
    if visible is None:
        return np.empty(0, np.bool_), 0, np.zeros(B, np.int64)
    return np.ascontiguousarray(visible), 1, np.where(visible.any(1), visible.argmax(1), S)


def _forward(table: Any) -> None:
    a = at(table, ARGUMENTS)
    k, v = as_stored(a[1]), as_stored(a[2])
    q, O, L, rows_table, tasks, n = floats(a[0]), floats(a[3]), floats(a[4]), int64s(a[5]), int64s(a[6]), a[7]
    Br, step, apart, H, Dh, scale = a[8], a[9], a[10], a[11], a[12], float_of(a[13])
    width = whole_panels(Dh)
    keys = memory(table)
    values = at(keys, BC * Dh)
    scores = at(values, BC * width)
    acc = at(scores, ROWS * STRIDE)
    xs = at(acc, Br * width)
    m, l = at(xs, Br * Dh), at(xs, Br * (Dh + 1))
    task = claim(table, TASKS)
    while task < n * H:
        h, row, first = task % H, at(rows_table, tasks[task // H * 2] * 5), tasks[task // H * 2 + 1]
        T, S, places, mask, hides = row[1], row[2], int64s(row[3]), bytes_(row[4]), row[4]
        past, count, origin = S - T, min(Br, T - first), (row[0] + first) * H + h
        alone = count == 1 and hides == 0 and Dh % WIDTH == 0
        for i in range(count):
            m[i], l[i] = -np.inf, 0
            for d in range(width):
                acc[i * width + d] = 0
        if alone:
            for d in range(Dh):
                xs[d] = q[origin * Dh + d] * scale
            attend_alone(xs, k, v, places, h * apart, step, past + first + 1, Dh, scores, m, l, values, acc, width)
        else:
            pack_groups(at(q, origin * Dh), H * Dh, count, Dh, scale, xs)
        for key in range(0, 0 if alone else past + first + count, BC):
            tile, shown = min(BC, past + first + count - key), at(mask, key)
            for j in range(0, tile, PAGE):
                place, some = places[(key + j) // PAGE] + h * apart, min(PAGE, tile - j)
                pack_transposed(at(k, place), step, some, Dh, at(shown, j), hides, at(keys, j * Dh))
                pack_rows(at(v, place), step, some, Dh, at(shown, j), hides, BC, at(values, j * COLUMNS))
            for i in range(max(0, key - past - first) // ROWS * ROWS, count, ROWS):  # from the first group that sees this tile
                rows = min(ROWS, count - i)
                limit = past + first + i + 1 - key  # how many keys of the tile the group's first query sees
                seen = min(tile, limit + rows - 1)
                score(at(xs, i * Dh), rows, keys, Dh, shown, hides, tile, limit, seen, scores)
                for r in range(rows):
                    softmax(at(scores, r * STRIDE), whole_panels(seen), at(m, i + r), at(l, i + r), at(acc, (i + r) * width), width)
                p = 0
                while p < width:
                    sums, panel = at(acc, i * width + p), at(values, p * BC)
                    if rows == 1 and p + ABREAST * COLUMNS <= width:
                        weigh_one(sums, 0, scores, panel, BC * COLUMNS, seen)
                        p += ABREAST * COLUMNS
                    else:
                        weigh(sums, width, scores, panel, seen, Dh - p)
                        p += COLUMNS
        for i in range(count):
            part = np.float32(1) / l[i] if l[i] != 0 else np.float32(0)  # exactly 0 where no key is seen
            for d in range(Dh):
                O[(origin + i * H) * Dh + d] = acc[i * width + d] * part if part != 0 else np.float32(0)
            L[origin + i * H] = m[i] + math.log(l[i])
        claim(table, DONE)
        task = claim(table, TASKS)


@inner
def attend_alone(q: Any, k: Any, v: Any, places: Any, head: int, step: int, S: int, Dh: int, scores: Any, m: Any, l: Any, sums: Any, acc: Any,
                 width: int) -> None:  # fmt: skip
    """A single query, as in decoding: keys and values are read in place, since packing them would take longer; same sums, same order, same bits."""
    for key in range(0, S, BC):
        tile = min(BC, S - key)
        columns = whole_panels(tile)
        for j in range(0, tile, PAGE):
            page, some = places[(key + j) // PAGE] + head, min(PAGE, tile - j)
            for c in range(0, some, WIDTH):
                dots(at(scores, j + c), q, at(k, page + c * step), step, min(WIDTH, some - c), Dh)
        for j in range(tile, columns):
            scores[j] = -np.inf
        softmax(scores, columns, m, l, acc, width)
        for d in range(Dh):
            sums[d] = 0
        for j in range(0, tile, PAGE):
            page, some = places[(key + j) // PAGE] + head, min(PAGE, tile - j)
            d = 0
            while d + SIDE <= Dh:
                weigh_side(at(sums, d), at(scores, j), at(v, page + d), step, some)
                d += SIDE
            while d < Dh:
                weigh_vector(at(sums, d), at(scores, j), at(v, page + d), step, some)
                d += WIDTH
        for d in range(Dh):
            acc[d] += sums[d]


def attending(queries: int, Dh: int) -> int:
    """Scratch memory, in float32 elements, of a task with this many queries."""
    width = whole_panels.py_func(Dh)
    return math.ceil(queries / ROWS) * ROWS * (Dh + width + 2) + BC * (Dh + width) + ROWS * STRIDE


def attention_probs(q: np.ndarray, k: np.ndarray, scale: float, visible: np.ndarray | None, rows: Any = None) -> np.ndarray:
    """The attention weights of the queries `rows`, or of all.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  visible: (B, S);  rows: (R)  ->  (B, H, R, S)
    """
    check(q, k, k, visible)
    (B, T, H, Dh), S = q.shape, k.shape[1]
    rows = np.arange(T) if rows is None else np.arange(T)[np.asarray(rows)]
    k, R = rows_apart(k), len(rows)
    probs = np.zeros((B, H, R, S), np.float32)
    PROBS(np.ascontiguousarray(q[:, rows]), k, *hidden_keys(k, visible), probs, S - T + 1 + rows, B, R, S, H, Dh, *steps(k), float_bits(scale),
          tasks=B * H, scratch=BC * Dh + ROWS * STRIDE + (R + ROWS) * (Dh + 2))  # fmt: skip
    return probs


def _probs(table: Any) -> None:
    """A task is a head, in two passes over its keys: the first for each query's maximum and sum, the second for the weights."""
    a = at(table, ARGUMENTS)
    q, k, visible, hides, start, probs, limits = floats(a[0]), floats(a[1]), bytes_(a[2]), a[3], int64s(a[4]), floats(a[5]), int64s(a[6])
    B, R, S, H, Dh, k_row, k_step, scale = a[7], a[8], a[9], a[10], a[11], a[12], a[13], float_of(a[14])
    keys = memory(table)
    scores = at(keys, BC * Dh)
    m = at(scores, ROWS * STRIDE)
    l = at(m, R + ROWS)
    xs = at(l, R + ROWS)
    task = claim(table, TASKS)
    while task < B * H:
        b, h = task % B, task // B
        pack_groups(at(q, (b * R * H + h) * Dh), H * Dh, R, Dh, scale, xs)
        for i in range(R):
            m[i], l[i] = -np.inf, 0
        for writing in range(2):
            for key in range(start[b], S, BC):
                n, shown = min(BC, S - key), at(visible, b * S + key)
                pack_transposed(at(k, b * k_row + key * k_step + h * Dh), k_step, n, Dh, shown, hides, keys)
                for i in range(0, R, ROWS):
                    rows = min(ROWS, R - i)
                    score(at(xs, i * Dh), rows, keys, Dh, shown, hides, n, BC, n, scores)
                    for r in range(rows):
                        row, seen = at(scores, r * STRIDE), limits[i + r] - key
                        for j in range(max(seen, 0), whole_panels(n)):
                            row[j] = -np.inf
                        if seen <= 0:
                            continue
                        if not writing:
                            softmax(row, whole_panels(n), at(m, i + r), at(l, i + r), row, 0)
                            continue
                        exponentials(row, whole_panels(n), m[i + r] if l[i + r] != 0 else np.float32(0))
                        part = np.float32(1) / l[i + r] if l[i + r] != 0 else np.float32(0)
                        for j in range(min(n, seen)):
                            probs[((b * H + h) * R + i + r) * S + key + j] = row[j] * part
        task = claim(table, TASKS)


def attention_bwd(dO: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, O: np.ndarray, L: np.ndarray, scale: float,
                  visible: np.ndarray | None, way: Backward | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """The gradients of q, k and v; each tile's weights are recomputed from L.

    dO: (B, T, H, Dh);  q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  O: (B, T, H, Dh);  L: (B, T, H);  visible: (B, S)
    -> (B, T, H, Dh), (B, S, H, Dh), (B, S, H, Dh)
    """
    check(q, k, v, visible)
    (B, T, H, Dh), S = q.shape, k.shape[1]
    if dO.shape != q.shape or O.shape != q.shape or L.shape != (B, T, H):
        raise ValueError(f"dO is {dO.shape}, O {O.shape} and L {L.shape}; q is {q.shape}, and so are the first two, and L without its last axis")
    k, v, dO, O, L = (np.ascontiguousarray(a, np.float32) for a in (k, v, dO, O, L))
    dq, dk, dv = np.empty(q.shape, np.float32), np.zeros(k.shape, np.float32), np.zeros(k.shape, np.float32)
    kernel, needed, more = way or IN_FLOAT32_BWD
    q = np.ascontiguousarray(q * np.float32(scale))  # HF scales q, bias and all, before the product
    kernel(q, k, v, *hidden_keys(k, visible), O, L, B, T, S, H, Dh, dO, dq, dk, dv, float_bits(scale), *more, tasks=B * H, scratch=needed(T, Dh))
    return dq, dk, dv


def going_back(T: int, Dh: int) -> int:
    """Scratch memory, in float32 elements, of a head with T queries."""
    width = whole_panels.py_func(Dh)
    return (T + ROWS) * (width + 1) + BC * (2 * Dh + 3 * width) + 2 * BQ * (Dh + width + STRIDE)


def _backward(table: Any) -> None:
    """A task is a head: its tiles of keys in order, and for each the blocks of BQ queries that see it."""
    a = at(table, ARGUMENTS)
    q, k, v, visible, hides, start = floats(a[0]), floats(a[1]), floats(a[2]), bytes_(a[3]), a[4], int64s(a[5])
    O, L, B, T, S, H, Dh = floats(a[6]), floats(a[7]), a[8], a[9], a[10], a[11], a[12]
    dO, dq, dk, dv, scale = floats(a[13]), floats(a[14]), floats(a[15]), floats(a[16]), float_of(a[17])
    past, step, width = S - T, H * Dh, whole_panels(Dh)
    dq_sums = memory(table)  # (T, width)
    keys_t = at(dq_sums, (T + ROWS) * width)  # (the last group may reach beyond T); a tile of keys and one of values as columns …
    values_t = at(keys_t, BC * Dh)
    keys = at(values_t, BC * Dh)  # … and as rows
    dk_sums = at(keys, BC * width)
    dv_sums = at(dk_sums, BC * width)
    q_groups = at(dv_sums, BC * width)  # a block of q and one of dO, in groups and as rows
    dO_groups = at(q_groups, BQ * Dh)
    q_rows = at(dO_groups, BQ * Dh)
    dO_rows = at(q_rows, BQ * width)
    P = at(dO_rows, BQ * width)
    dP = at(P, BQ * STRIDE)  # overwritten by the gradient of the scores
    D = at(dP, BQ * STRIDE)
    task = claim(table, TASKS)
    while task < B * H:
        b, h = task % B, task // B
        for t in range(T):
            place = ((b * T + t) * H + h) * Dh
            D[t] = 0
            for d in range(Dh):
                D[t] += dO[place + d] * O[place + d]
            for d in range(width):
                dq_sums[t * width + d] = 0
        for key in range(start[b], S, BC):
            n, origin = min(BC, S - key), ((b * S + key) * H + h) * Dh
            shown = at(visible, b * S + key)
            pack_transposed(at(k, origin), step, n, Dh, shown, hides, keys_t)
            pack_transposed(at(v, origin), step, n, Dh, shown, hides, values_t)
            pack_rows(at(k, origin), step, n, Dh, shown, hides, BC, keys)
            for j in range(BC * width):
                dk_sums[j], dv_sums[j] = 0, 0
            for first in range(max(0, key - past) // BQ * BQ, T, BQ):
                count, origin = min(BQ, T - first), ((b * T + first) * H + h) * Dh
                pack_groups(at(q, origin), step, count, Dh, np.float32(1), q_groups)
                pack_groups(at(dO, origin), step, count, Dh, np.float32(1), dO_groups)
                pack_rows(at(q, origin), step, count, Dh, shown, 0, BQ, q_rows)
                pack_rows(at(dO, origin), step, count, Dh, shown, 0, BQ, dO_rows)
                limit = past + first + 1 - key  # how many keys of the tile the block's first query sees
                for i in range(max(0, -limit + 1) // ROWS * ROWS, count, ROWS):
                    rows = min(ROWS, count - i)
                    seen = min(n, limit + i + 2 * ROWS)  # `gather` takes keys in groups of ROWS, up to ROWS - 1 beyond the last query's
                    P_tile, dP_tile = at(P, i * STRIDE), at(dP, i * STRIDE)
                    score(at(q_groups, i * Dh), rows, keys_t, Dh, shown, hides, n, limit + i, seen, P_tile)
                    weights_again(P_tile, rows, whole_panels(seen), at(L, (b * T + first + i) * H + h), H)
                    for p in range(0, whole_panels(seen), COLUMNS):
                        scores_of(at(dP_tile, p), STRIDE, at(dO_groups, i * Dh), at(values_t, p * Dh), 0, Dh)
                    for r in range(rows):
                        for j in range(whole_panels(seen)):
                            dP_tile[r * STRIDE + j] = P_tile[r * STRIDE + j] * (dP_tile[r * STRIDE + j] - D[first + i + r])
                    for p in range(0, width, COLUMNS):
                        weigh(at(dq_sums, (first + i) * width + p), width, dP_tile, at(keys, p * BC), seen, Dh - p)
                for j in range(0, min(n, limit + count - 1), ROWS):
                    i = max(0, j - limit + 1) // ROWS * ROWS  # from the first group of queries that sees these keys
                    for p in range(0, width, COLUMNS):
                        gather(at(dv_sums, j * width + p), width, at(P, i * STRIDE + j), at(dO_rows, p * BQ + i * COLUMNS), count - i, Dh - p)
                        gather(at(dk_sums, j * width + p), width, at(dP, i * STRIDE + j), at(q_rows, p * BQ + i * COLUMNS), count - i, Dh - p)
            for j in range(n):
                for d in range(Dh):
                    place = ((b * S + key + j) * H + h) * Dh + d
                    dk[place], dv[place] = dk_sums[j * width + d], dv_sums[j * width + d]
        for t in range(T):
            for d in range(Dh):
                dq[((b * T + t) * H + h) * Dh + d] = dq_sums[t * width + d] * scale
        task = claim(table, TASKS)


# ---- packing -----------------------------------------------------------------------------------------------------------------------------


@inner
def pack_groups(x: Any, step: int, n: int, Dh: int, scale: Any, groups: Any) -> None:
    """n rows in groups of ROWS: groups[i, d, r] = scale · x[i · ROWS + r, d]. Like HF, q is scaled before the product."""
    for i in range(0, n, ROWS):
        pack_tile(at(x, i * step), step, 1, min(ROWS, n - i), Dh, scale, at(groups, i * Dh))


@inner
def pack_transposed(x: Any, step: int, n: int, Dh: int, shown: Any, hides: int, panels: Any) -> None:
    """n rows of a tile as columns: panels[p, d, c] = x[p · COLUMNS + c, d]; 0 for hidden rows, and to fill the last panel."""
    for j in range(0, n, WIDTH):
        rows, target, whole = min(WIDTH, n - j), at(panels, j // COLUMNS * COLUMNS * Dh + j % COLUMNS), Dh // WIDTH * WIDTH
        for d in range(0, whole, WIDTH):
            transpose(at(x, j * step + d), step, rows, at(target, d * COLUMNS))
        for d in range(whole, Dh):
            for c in range(rows):
                target[d * COLUMNS + c] = float32_at(x, (j + c) * step + d)
    for j in range(whole_panels(n)):
        if j >= n or (hides and not shown[j]):
            for d in range(Dh):
                panels[(j // COLUMNS * Dh + d) * COLUMNS + j % COLUMNS] = 0


@inner
def pack_rows(x: Any, step: int, n: int, Dh: int, shown: Any, hides: int, most: int, panels: Any) -> None:
    """n rows of a tile of `most`: panels[p, j, c] = x[j, p · COLUMNS + c]; 0 for hidden rows, as a weight of 0 times NaN would be NaN."""
    for p in range(whole_panels(Dh) // COLUMNS):
        source, target = at(x, p * COLUMNS), at(panels, p * most * COLUMNS)
        if (p + 1) * COLUMNS <= Dh:
            copy(source, step, target, n)
        else:
            for j in range(n):
                for c in range(Dh - p * COLUMNS):
                    target[j * COLUMNS + c] = float32_at(source, j * step + c)
                for c in range(Dh - p * COLUMNS, COLUMNS):
                    target[j * COLUMNS + c] = 0
        for j in range(n if hides else 0):
            if not shown[j]:
                for c in range(COLUMNS):
                    target[j * COLUMNS + c] = 0


# ---- a cache -----------------------------------------------------------------------------------------------------------------------------


def write(k: np.ndarray, v: np.ndarray, K: np.ndarray, V: np.ndarray, slots: np.ndarray, apart: int) -> None:
    """Writes each token's keys and values at its slot in K and V, with its heads `apart`.  k: (N, H, Dh);  v: (N, H, Dh);  slots: (N)"""
    k, v = np.ascontiguousarray(k), np.ascontiguousarray(v)
    kernel, arguments, tasks = write_call(k, v, K, V, np.ascontiguousarray(slots, np.int64), apart, k.shape[-1])
    kernel(*arguments, tasks=tasks)


def write_call(k: np.ndarray, v: np.ndarray, K: Any, V: Any, slots: np.ndarray, apart: int, Dh: int) -> tuple[Kernel, list, int]:
    """The kernel of `write`, its arguments, and the number of tasks; K and V hold float32, or 16-bit floats as BITS."""
    N, D = len(k), math.prod(k.shape[1:])
    some = max(CHUNK // D, 1)
    return WRITE[K.dtype.str], [k, v, K, V, slots, apart, Dh, N, D, some], math.ceil(N / some)


def _write(table: Any) -> None:
    """A task is some tokens."""
    a = at(table, ARGUMENTS)
    K, V = as_stored(a[2]), as_stored(a[3])
    k, v, slots, apart, Dh, N, D, some = floats(a[0]), floats(a[1]), int64s(a[4]), a[5], a[6], a[7], a[8], a[9]
    first = claim(table, TASKS) * some
    while first < N:
        for i in range(first, min(first + some, N)):
            for h in range(D // Dh):
                place, source = slots[i] + h * apart, i * D + h * Dh
                for d in range(Dh):
                    put(K, place + d, k[source + d])
                for d in range(Dh):
                    put(V, place + d, v[source + d])
        claim(table, DONE)
        first = claim(table, TASKS) * some


@intrinsic
def put(typing_context, numbers, i, number):
    """numbers[i] = number, rounded to the stored dtype (to nearest, ties to even); NaN stays NaN."""

    def generate(context, builder, signature, arguments):
        place, number, word = builder.gep(arguments[0], [arguments[1]]), arguments[2], ir.IntType(32)
        if signature.args[0].dtype != types.float32:
            bits = builder.bitcast(number, word)
            half = bfloat16_bits(builder, bits) if signature.args[0].dtype == types.uint16 else float16_bits(builder, bits)
            number = builder.trunc(half, ir.IntType(16))
        builder.store(number, place)
        return context.get_dummy_value()

    return types.void(numbers, types.int64, types.float32), generate


def float16_bits(builder: Any, bits: Any) -> Any:
    """LLVM: float32 bits as float16: sign, exponent - 112, and the mantissa rounded to 10 bits; below 2⁻¹⁴ a multiple of 2⁻²⁴, to which adding 0.5
    rounds."""
    word, single = bits.type, ir.FloatType()
    size = builder.and_(bits, word(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, word(13)), word(1))
    normal = builder.lshr(builder.add(builder.add(size, odd), word(0xFFF - (112 << 23))), word(13))
    added = builder.bitcast(builder.fadd(builder.bitcast(size, single), single(0.5)), word)
    small = builder.sub(added, word(0x3F000000))
    half = builder.select(builder.icmp_unsigned("<", size, word(0x38800000)), small, normal)
    half = builder.select(builder.icmp_unsigned(">=", size, word(0x47800000)), word(0x7C00), half)
    half = builder.select(builder.icmp_unsigned(">", size, word(0x7F800000)), word(0x7E00), half)
    return builder.or_(half, builder.and_(builder.lshr(bits, word(16)), word(0x8000)))


# ---- a tile ------------------------------------------------------------------------------------------------------------------------------


@inner
def whole_panels(n: int) -> int:
    """n, rounded up to a multiple of COLUMNS."""
    return (n + COLUMNS - 1) // COLUMNS * COLUMNS


@inner
def score(x: Any, rows: int, keys: Any, Dh: int, shown: Any, hides: int, n: int, limit: int, seen: int, scores: Any) -> None:
    """scores[r, j] = x[r] · key j, or -inf where key j is hidden or in the query's future (j ≥ limit + r); for all panels with a j < seen ≤ n."""
    panels, p = whole_panels(seen) // COLUMNS, 0
    while p < panels:
        tile, panel = at(scores, p * COLUMNS), at(keys, p * COLUMNS * Dh)
        if rows == 1 and p + ABREAST <= panels:
            scores_of_one(tile, 0, x, panel, COLUMNS * Dh, Dh)
            p += ABREAST
        else:
            scores_of(tile, STRIDE, x, panel, 0, Dh)
            p += 1
    for r in range(rows):
        for j in range(max(0, min(n, limit + r)), panels * COLUMNS):
            scores[r * STRIDE + j] = -np.inf
        for j in range(min(n, seen) if hides else 0):
            if not shown[j]:
                scores[r * STRIDE + j] = -np.inf


@inner
def softmax(row: Any, columns: int, m: Any, l: Any, acc: Any, width: int) -> None:
    """Turns a row of scores into weights relative to the query's new running maximum m, and rescales the sums l and acc from the old one."""
    highest = max(m[0], maximum(row, columns))
    if highest == -np.inf:  # nothing seen yet, and exp(-inf - -inf) would be NaN
        highest = np.float32(0)
    elif highest != m[0]:
        shrink = math.exp(m[0] - highest)
        l[0] *= shrink
        m[0] = highest
        for d in range(width):
            acc[d] *= shrink
    l[0] += exponentials(row, columns, highest)


@inner
def weights_again(P: Any, rows: int, columns: int, L: Any, step: int) -> None:
    """Recomputes weights from scores, in place, with the queries' log-sum-exp."""
    for r in range(rows):
        lse = L[r * step]
        exponentials(at(P, r * STRIDE), columns, lse if lse != -np.inf else np.float32(0))


@intrinsic
def maximum(typing_context, row, columns):
    """The largest of some scores, ignoring NaN, which `exponentials` then propagates."""

    def generate(context, builder, signature, arguments):
        row, columns = arguments
        (lanes,) = loop(builder, columns, WIDTH, [every(VECTOR, -math.inf)],
                        lambda k, carried: [larger(builder, load(builder, builder.gep(row, [k]), VECTOR), carried[0])])  # fmt: skip
        return across(builder, lanes, larger)

    return types.float32(row, columns), generate


@intrinsic
def exponentials(typing_context, row, columns, highest):
    """Replaces each score by exp(score - highest), and returns the sum."""

    def generate(context, builder, signature, arguments):
        row, columns, highest = arguments
        highest = broadcast(builder, highest, VECTOR)

        def body(k: Any, carried: list) -> list:
            place = builder.gep(row, [k])
            value = exponential(builder, builder.fsub(load(builder, place, VECTOR), highest))
            store(builder, value, place)
            return [builder.fadd(carried[0], value)]

        (lanes,) = loop(builder, columns, WIDTH, [every(VECTOR, 0.0)], body)
        return across(builder, lanes, lambda builder, a, b: builder.fadd(a, b))

    return types.float32(row, columns, types.float32), generate


def exponential(builder: Any, x: Any) -> Any:
    """LLVM: exp(x) = 2ⁿ · exp(f), n an integer and |f| ≤ ln(2)/2, by the polynomial of Cephes' expf: right to a bit or two. NaN stays NaN."""

    def add(a: Any, b: Any, c: Any) -> Any:
        return multiply_add(builder, a, b, c, TILE.fused)

    def number(value: float) -> Any:
        return every(VECTOR, float(np.float32(value)))

    whole = ir.VectorType(ir.IntType(32), WIDTH)
    low = builder.fcmp_ordered("<", x, number(LOWEST))
    y = builder.select(low, number(LOWEST), x)
    magic = number(1.5 * 2**23)  # so large that its last bit is worth 1: adding it rounds to an integer
    shifted = add(y, number(1 / math.log(2)), magic)
    n = builder.fsub(shifted, magic)
    f = add(n, number(2.12194440e-4), add(n, number(-0.693359375), y))  # ln(2) in two parts
    p = number(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1, 1):
        p = add(p, f, number(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, whole), every(whole, 23))
    value = builder.bitcast(builder.add(builder.bitcast(p, whole), exponent), VECTOR)
    value = builder.select(low, number(0), value)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)  # NaN itself: `value` has the exponent added to its bits


@intrinsic
def transpose(typing_context, rows, step, n, columns):
    """WIDTH elements of WIDTH rows, `step` apart, as columns, COLUMNS apart; the last of the n rows stands in for those beyond."""

    def generate(context, builder, signature, arguments):
        rows, step, n, columns = arguments
        places = rows_from(builder, rows, step, n, WIDTH)
        lines = transposed(builder, [widened(builder, place, VECTOR, signature.args[0].dtype, TILE) for place in places])
        for r, line in enumerate(lines):
            store(builder, line, builder.gep(columns, [ir.IntType(64)(r * COLUMNS)]))
        return context.get_dummy_value()

    return types.void(rows, types.intp, types.intp, columns), generate


@intrinsic
def dots(typing_context, scores, q, keys, step, n, Dh):
    """scores[j] = q · key j, summed in the order of d, for WIDTH keys, `step` apart; the last of the n keys stands in for those beyond."""

    def generate(context, builder, signature, arguments):
        scores, q, keys, step, n, Dh = arguments
        index, places = ir.IntType(64), rows_from(builder, keys, step, n, WIDTH)

        def body(d: Any, carried: list) -> list:
            lines = transposed(builder, [widened(builder, builder.gep(place, [d]), VECTOR, signature.args[2].dtype, TILE) for place in places])
            (total,) = carried
            for e, line in enumerate(lines):
                number = builder.load(builder.gep(q, [builder.add(d, index(e))]))
                total = multiply_add(builder, broadcast(builder, number, VECTOR), line, total, TILE.fused)
            return [total]

        (total,) = loop(builder, Dh, WIDTH, [every(VECTOR, 0.0)], body)
        store(builder, total, scores)
        return context.get_dummy_value()

    return types.void(scores, q, keys, types.intp, types.intp, types.intp), generate


def weighing(vectors: int) -> Any:
    """kernel(sums, weights, values, step, n): sums[d] += Σ weights[j] · values[j, d], in the order of j, for `vectors` vectors of d."""

    @intrinsic
    def kernel(typing_context, sums, weights, values, step, n):
        def generate(context, builder, signature, arguments):
            sums, weights, values, step, n = arguments
            places = [ir.IntType(64)(c * WIDTH) for c in range(vectors)]

            def body(j: Any, carried: list) -> list:
                weight, row = broadcast(builder, builder.load(builder.gep(weights, [j])), VECTOR), builder.gep(values, [builder.mul(j, step)])
                lines = [widened(builder, builder.gep(row, [place]), VECTOR, signature.args[2].dtype, TILE) for place in places]
                return [multiply_add(builder, weight, line, total, TILE.fused) for line, total in zip(lines, carried, strict=True)]

            for place, total in zip(places, loop(builder, n, 1, [load(builder, builder.gep(sums, [p]), VECTOR) for p in places], body), strict=True):
                store(builder, total, builder.gep(sums, [place]))
            return context.get_dummy_value()

        return types.void(sums, weights, values, types.intp, types.intp), generate

    return kernel


weigh_side, weigh_vector = weighing(SIDE // WIDTH), weighing(1)


@intrinsic
def copy(typing_context, rows, step, panel, n):
    """Copies n ≥ 1 rows of COLUMNS elements, `step` apart, into a contiguous panel, widened to float32."""

    def generate(context, builder, signature, arguments):
        rows, step, panel, n = arguments

        def body(k: Any, carried: list) -> list:
            source, target = builder.gep(rows, [builder.mul(k, step)]), builder.gep(panel, [builder.mul(k, ir.IntType(64)(COLUMNS))])
            for c in range(0, COLUMNS, WIDTH):
                place = [ir.IntType(64)(c)]
                store(builder, widened(builder, builder.gep(source, place), VECTOR, signature.args[0].dtype, TILE), builder.gep(target, place))
            return []

        loop(builder, n, 1, [], body)
        return context.get_dummy_value()

    return types.void(rows, types.intp, panel, types.intp), generate


def by_dtype(function: Callable[[Any], None], name: str = "") -> dict[str, Kernel]:
    """The kernel's variant for each dtype of keys and values; `name` distinguishes variants compiled from the same source to other instructions."""
    meanings = {"<f4": ("float32", floats), "<i2": ("float16", int16s), "<u2": ("bfloat16", uint16s)}
    return {dtype: variant(function, stored + name, as_stored=pointer) for dtype, (stored, pointer) in meanings.items()}


IN_FLOAT32, WRITE = Forward(by_dtype(_forward), ROWS, attending, [], "float32"), by_dtype(_write)
PROBS, IN_FLOAT32_BWD = Kernel(_probs), Backward(Kernel(_backward), going_back, [])
