"""Causal attention on a GPU as a ladder of readable Numba kernels; each rung (version) adds one idea. opt_np/flash.py is v3's algorithm in NumPy.

v1         scores, softmax and P V as three kernels, one thread per element; every intermediate goes through global memory
v2         the same three steps, but a block of threads loads tiles into shared memory, so that a value read from global memory is used 16 times
v3         FlashAttention-2: scores never leave the chip, and each thread holds a small rectangle of them in its registers
v3_bwd     its backward pass: one kernel for dK and dV, one for dQ; no atomics, so results are the same bits every time
decode     few queries: the keys are split over blocks, and a second kernel combines the blocks' partial results

The same source runs under Numba's simulator (NUMBA_ENABLE_CUDASIM=1), with tiny tiles. q is (B, T, H, Dh), k and v are (B, S, H, Dh), with any
strides. The last query is at the last key: query t is at key S - T + t, and sees the keys up to and including that one, except those that `visible`
hides. A query that sees no key gets O = 0 and L = -inf. Inside kernels the names are flash.py's: i is a query, j a key, d an element of a head. r, c
and e index what one thread owns: thread (ty, tx) has rows ty, ty + TY, … and columns tx, tx + TX, …, so that neighbouring threads read neighbouring
banks of shared memory. Exponentials are powers of two, which GPUs compute: exp(x) = 2^(x log2 e), and the factor log2 e is part of the scale.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numba import config, float32
from numba import cuda as numba_cuda

cuda: Any = numba_cuda  # else type checkers read the simulator's stubs

vars(config)["CUDA_LOW_OCCUPANCY_WARNINGS"] = 0  # short inputs launch few blocks, which is no mistake

SIMULATED = bool(vars(config)["ENABLE_CUDASIM"])
ALIGN = None if SIMULATED else 16  # bytes, of shared arrays, so that four floats are one load; the simulator has no alignment
PAD = 4  # floats at the end of a shared row: neighbouring rows start in different banks, and rows stay aligned
NOT_NEGATIVE = 0x7FFFFFFF  # `x & NOT_NEGATIVE` is x, but the compiler then omits Python's wrap-around of negative indices at every access
ZERO, LOWEST = np.float32(0), np.float32(-np.inf)
LOG2E, LN2 = np.float32(1 / math.log(2)), np.float32(math.log(2))
ROW_THREADS = 16 if SIMULATED else 128  # threads of a block that works on one row
DECODE_THREADS = 32 if SIMULATED else 128  # threads of a block of decode, and keys of its tile
QUERIES = 16  # that decode takes at most

on_device = cuda.jit(device=True) if SIMULATED else cuda.jit(device=True, forceinline=True)


def kernel(threads: int, blocks: int) -> Any:
    """cuda.jit for blocks of `threads` threads, with registers limited so that `blocks` of them fit on a multiprocessor."""
    return cuda.jit if SIMULATED else cuda.jit(launch_bounds=(threads, blocks))


class Tiles(NamedTuple):
    """The shape of a block's work: tiles of Br = Bc = `rows` queries and keys, TY × TX threads, slices of Ds columns of a head or of Js keys."""

    rows: int
    TY: int
    TX: int
    Ds: int
    Js: int


TINY = Tiles(8, 2, 4, 4, 4)  # for the simulator, whose threads are Python threads
TILED, BACKWARD = (TINY, TINY) if SIMULATED else (Tiles(16, 16, 16, 16, 16), Tiles(64, 16, 16, 16, 16))


def flash_tiles(Dh: int) -> Tiles:
    """v3's tiles, in slices of 32 columns where 32 divides Dh: half the barriers of 16, and larger ones would not fit in 48 KB of shared memory."""
    return TINY if SIMULATED else Tiles(64, 8, 16, 16 if Dh % 32 else 32, 16)


# ---- v1: one thread per element ----------------------------------------------------------------------------------------------------------


def v1(q: Any, k: Any, v: Any, scale: float, visible: Any = None) -> tuple[Any, Any]:
    """Naive attention in three kernels that pass scores and weights through global memory.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  visible: (B, S)  ->  (B, T, H, Dh), (B, T, H)

    What limits it: T·S scores per head are written, read, written and read again; every multiply-add reads both its factors from global memory; and
    neighbouring threads read different rows of K, so their loads are not coalesced. Scores of future keys are computed too. Raises ValueError as
    `call` does. Not yet run on a GPU.
    """
    c = call(q, k, v, visible)
    (B, T, H, Dh), S = q.shape, k.shape[1]
    P, O, L = c.empty((B, T, H, S), np.float32), c.empty((B, T, H, Dh)), c.empty((B, T, H), np.float32)
    c.launch(naive_scores, (B * T * H, across(S, ROW_THREADS)), ROW_THREADS, c.q, c.k, c.visible, P, np.float32(scale * LOG2E))
    c.launch(naive_softmax, (B * T * H, 1), ROW_THREADS, P, L)
    c.launch(naive_values, (B * T * H, across(Dh, ROW_THREADS)), ROW_THREADS, P, c.v, c.visible, O)
    return O, L


@cuda.jit
def naive_scores(Q, K, visible, scores, scale):
    """One thread per score."""
    T, H, S = Q.shape[1], Q.shape[2], K.shape[1]
    b, i, h = cuda.blockIdx.x // (T * H), cuda.blockIdx.x // H % T, cuda.blockIdx.x % H
    j = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if j < S:
        score = ZERO
        for d in range(Q.shape[3]):
            score += float32(Q[b, i, h, d]) * float32(K[b, j, h, d])
        scores[b, i, h, j] = score * scale if j <= S - T + i and visible[b, j] != 0 else LOWEST


@cuda.jit
def naive_softmax(scores, L):
    """One block per row: finds its maximum and its sum, and overwrites the scores with the weights."""
    part = cuda.shared.array(ROW_THREADS, float32)
    T, H, S = scores.shape[1], scores.shape[2], scores.shape[3]
    b, i, h, thread = cuda.blockIdx.x // (T * H), cuda.blockIdx.x // H % T, cuda.blockIdx.x % H, cuda.threadIdx.x
    m, l = LOWEST, ZERO
    for j in range(thread, S, ROW_THREADS):
        m = max(m, scores[b, i, h, j])
    part[thread] = m
    cuda.syncthreads()
    for x in range(ROW_THREADS):
        m = max(m, part[x])
    cuda.syncthreads()  # part is reused below
    safe = m if m != LOWEST else ZERO  # no key seen: 2^(-inf - 0) = 0, where -inf - -inf would be NaN
    for j in range(thread, S, ROW_THREADS):
        l += math.exp2(scores[b, i, h, j] - safe)
    part[thread] = l
    cuda.syncthreads()
    l = ZERO
    for x in range(ROW_THREADS):
        l += part[x]
    for j in range(thread, S, ROW_THREADS):
        scores[b, i, h, j] = math.exp2(scores[b, i, h, j] - safe) / l if l != ZERO else ZERO
    if thread == 0:
        L[b, i, h] = (m + math.log2(l)) * LN2 if l != ZERO else LOWEST


@cuda.jit
def naive_values(P, V, visible, O):
    """One thread per element of O."""
    T, H, S = O.shape[1], O.shape[2], V.shape[1]
    b, i, h = cuda.blockIdx.x // (T * H), cuda.blockIdx.x // H % T, cuda.blockIdx.x % H
    d = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if d < O.shape[3]:
        total = ZERO
        for j in range(S - T + i + 1):
            if visible[b, j] != 0:  # a hidden key's value may be NaN, and 0 · NaN is NaN
                total += P[b, i, h, j] * float32(V[b, j, h, d])
        O[b, i, h, d] = total


# ---- shared by the tiled kernels ---------------------------------------------------------------------------------------------------------


@functools.cache
def bringing(threads: int, lanes: int) -> Any:
    """`bring`, with which a block loads a tile into shared memory; `lanes` neighbouring threads read neighbouring elements of a row (coalesced)."""

    @on_device
    def bring(tile, rows, columns, A, b, first, h, d, n, shown):
        """tile = A[b, first : first + rows, h, d : d + columns], with zeros for rows n and later, and for rows where `shown` is 0."""
        thread = cuda.threadIdx.x & NOT_NEGATIVE
        for y in range(rows // (threads // lanes)):
            i = thread // lanes + y * (threads // lanes)
            row = min(first + i, n - 1) & NOT_NEGATIVE  # clamped to an existing row: the load is unconditional
            there = first + i < n and shown[b, row] != 0
            for x in range(columns // lanes):
                column = thread % lanes + x * lanes
                value = float32(A[b, row, h, (d + column) & NOT_NEGATIVE])
                tile[i, column] = value if there else ZERO

    return bring


@functools.cache
def rectangles(Dh: int, t: Tiles) -> tuple[Any, Any, Any]:
    """The two products of tiles, and `store`. A thread accumulates a rectangle in registers, four terms of each sum at a time.

    Loops over what a thread owns have constant bounds and are unrolled; operands are copied to local arrays first, which then are registers too.
    """
    rows, TY, TX, Ds, Js = t
    R, C, E = rows // TY, rows // TX, Dh // TX
    W = math.gcd(E, 4)  # adjacent columns of O that a thread owns: its element e is in column (e // W * TX + tx) * W + e % W
    bring = bringing(TY * TX, TX)

    @on_device
    def multiply(acc, X, Y, A, i0, n, shown_a, B, j0, m, shown_b, b, h):
        """acc = A Bᵀ for rows i0… of A's n and j0… of B's m, in slices of Ds columns held in X and Y.  acc: (R, C);  X: (rows, Ds);  Y: (rows, Ds)"""
        x = cuda.local.array((R, 4), float32)
        y = cuda.local.array((C, 4), float32)
        thread = cuda.threadIdx.x & NOT_NEGATIVE
        ty, tx = thread // TX, thread % TX
        for r in range(R):
            for c in range(C):
                acc[r, c] = ZERO
        for d in range(0, Dh, Ds):
            bring(X, rows, Ds, A, b, i0, h, d, n, shown_a)
            bring(Y, rows, Ds, B, b, j0, h, d, m, shown_b)
            cuda.syncthreads()
            for first in range(0, Ds, 4):
                k = first & NOT_NEGATIVE
                for w in range(4):
                    for r in range(R):
                        x[r, w] = X[ty + r * TY, k + w]
                    for c in range(C):
                        y[c, w] = Y[tx + c * TX, k + w]
                for w in range(4):
                    for r in range(R):
                        for c in range(C):
                            acc[r, c] += x[r, w] * y[c, w]
            cuda.syncthreads()  # the next slices overwrite these

    @on_device
    def accumulate(acc, P, Y, A, j0, n, shown, b, h):
        """acc += P A for rows j0… of A's n, in slices of Js rows held in Y; P was just written.  acc: (R, E);  P: (rows, rows);  Y: (Js, Dh)"""
        x = cuda.local.array((R, 4), float32)
        y = cuda.local.array(E, float32)
        thread = cuda.threadIdx.x & NOT_NEGATIVE
        ty, tx = thread // TX, thread % TX
        for j in range(0, rows, Js):
            bring(Y, Js, Dh, A, b, j0 + j, h, 0, n, shown)
            cuda.syncthreads()
            for first in range(0, Js, 4):
                k, column = first & NOT_NEGATIVE, (j + first) & NOT_NEGATIVE
                for w in range(4):
                    for r in range(R):
                        x[r, w] = P[ty + r * TY, column + w]
                for w in range(4):
                    for e in range(E):
                        y[e] = Y[k + w, (e // W * TX + tx) * W + e % W]
                    for r in range(R):
                        for e in range(E):
                            acc[r, e] += x[r, w] * y[e]
            cuda.syncthreads()  # the next slice overwrites Y, and the caller overwrites P

    @on_device
    def store(A, acc, first, b, h):
        """Writes acc to A's rows from `first` on."""
        thread = cuda.threadIdx.x & NOT_NEGATIVE
        ty, tx = thread // TX, thread % TX
        for r in range(R):
            i = first + ty + r * TY
            if i < A.shape[1]:
                for e in range(E):
                    A[b, i, h, (e // W * TX + tx) * W + e % W] = acc[r, e]

    return multiply, accumulate, store


# ---- v2: tiles in shared memory ----------------------------------------------------------------------------------------------------------


def v2(q: Any, k: Any, v: Any, scale: float, visible: Any = None) -> tuple[Any, Any]:
    """v1 with both products computed from tiles in shared memory: each value loaded there is used by 16 threads.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  visible: (B, S)  ->  (B, T, H, Dh), (B, T, H)

    What limits it: the scores still pass through global memory four times, and with one score per thread every multiply-add takes two loads from
    shared memory. Raises ValueError as `call` and `head_size` do. Not yet run on a GPU.
    """
    c = call(q, k, v, visible)
    (B, T, H, Dh), S = q.shape, k.shape[1]
    t = TILED
    scores, values = tiled_products(head_size(Dh), t)
    columns = across(S, t.rows) * t.rows  # whole tiles: the last columns hold -inf, then 0
    P, O, L = c.empty((B, T, H, columns), np.float32), c.empty((B, T, H, Dh)), c.empty((B, T, H), np.float32)
    c.launch(scores, (B * H, across(T, t.rows), across(S, t.rows)), t.TY * t.TX, c.q, c.k, c.visible, c.every, P, np.float32(scale * LOG2E))
    c.launch(naive_softmax, (B * T * H, 1), ROW_THREADS, P, L)
    c.launch(values, (B * H, across(T, t.rows)), t.TY * t.TX, P, c.v, c.visible, c.every, O)
    return O, L


@functools.cache
def tiled_products(Dh: int, t: Tiles) -> tuple[Any, Any]:
    """v2's two kernels."""
    rows, TY, TX, Ds, Js = t
    R, C, E, Dp, Wp, Pp = rows // TY, rows // TX, Dh // TX, Ds + PAD, Dh + PAD, rows + PAD
    bring, (multiply, accumulate, store) = bringing(TY * TX, TX), rectangles(Dh, t)

    @cuda.jit
    def scores_of_tile(Q, K, visible, every, P, scale):
        Qs = cuda.shared.array((rows, Dp), float32, ALIGN)
        Ks = cuda.shared.array((rows, Dp), float32, ALIGN)
        scores = cuda.local.array((R, C), float32)
        T, H, S = Q.shape[1], Q.shape[2], K.shape[1]
        b, h, i0, j0 = cuda.blockIdx.x // H, cuda.blockIdx.x % H, cuda.blockIdx.y * rows, cuda.blockIdx.z * rows
        ty, tx = cuda.threadIdx.x // TX, cuda.threadIdx.x % TX
        multiply(scores, Qs, Ks, Q, i0, T, every, K, j0, S, visible, b, h)
        for r in range(R):
            for c in range(C):
                i, j = i0 + ty + r * TY, j0 + tx + c * TX
                if i < T:
                    P[b, i, h, j] = scores[r, c] * scale if j < S and j <= S - T + i and visible[b, j] != 0 else LOWEST

    @cuda.jit
    def values_of_tile(P, V, visible, every, O):
        Ps = cuda.shared.array((rows, Pp), float32, ALIGN)
        Vs = cuda.shared.array((Js, Wp), float32, ALIGN)
        acc = cuda.local.array((R, E), float32)
        T, H, S = O.shape[1], O.shape[2], V.shape[1]
        b, h, i0 = cuda.blockIdx.x // H & NOT_NEGATIVE, cuda.blockIdx.x % H & NOT_NEGATIVE, cuda.blockIdx.y * rows
        for r in range(R):
            for e in range(E):
                acc[r, e] = ZERO
        for j0 in range(0, S, rows):
            bring(Ps, rows, rows, P, b, i0, h, j0, T, every)
            accumulate(acc, Ps, Vs, V, j0, S, visible, b, h)
        store(O, acc, i0, b, h)

    return scores_of_tile, values_of_tile


# ---- v3: FlashAttention-2 ----------------------------------------------------------------------------------------------------------------


def v3(q: Any, k: Any, v: Any, scale: float, visible: Any = None) -> tuple[Any, Any]:
    """FlashAttention-2's Algorithm 1: a block loops over the keys and updates its queries' running maximum and sum; scores never leave the chip.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  visible: (B, S)  ->  (B, T, H, Dh), (B, T, H)

    A thread owns 8 × 4 scores and 8 × Dh/16 elements of O: 12 loads from shared memory serve 32 multiply-adds. Tiles above the diagonal are never
    visited, and the blocks with the most keys start first. What limits it: the ordinary float32 units, since Numba has no tensor-core
    instructions, and the loads of each slice, which the products wait for. Raises ValueError as `call` and `head_size` do. Not yet run on a GPU.
    Backward: v3_bwd.
    """
    c = call(q, k, v, visible)
    B, T, H, Dh = q.shape
    t = flash_tiles(head_size(Dh))
    O, L = c.empty((B, T, H, Dh)), c.empty((B, T, H), np.float32)
    c.launch(flash_forward(Dh, t), (B * H, across(T, t.rows)), t.TY * t.TX, c.q, c.k, c.v, c.visible, c.every, O, L, np.float32(scale * LOG2E))
    return O, L


@functools.cache
def flash_forward(Dh: int, t: Tiles) -> Any:
    """v3's kernel."""
    rows, TY, TX, Ds, Js = t
    R, C, E, Dp, Wp, Pp = rows // TY, rows // TX, Dh // TX, Ds + PAD, Dh + PAD, rows + PAD
    multiply, accumulate, store = rectangles(Dh, t)

    @kernel(TY * TX, 3)  # at most 168 registers
    def forward(Q, K, V, visible, every, O, L, scale):
        Qs = cuda.shared.array((rows, Dp), float32, ALIGN)
        Ks = cuda.shared.array((rows, Dp), float32, ALIGN)
        Vs = cuda.shared.array((Js, Wp), float32, ALIGN)
        P = cuda.shared.array((rows, Pp), float32, ALIGN)
        part = cuda.shared.array((rows, TX), float32, ALIGN)  # each thread's maximum, then sum, over its columns of a row
        scores = cuda.local.array((R, C), float32)
        acc = cuda.local.array((R, E), float32)
        m = cuda.local.array(R, float32)
        l = cuda.local.array(R, float32)  # over this thread's own columns; summed over the row once, at the end
        sees = cuda.local.array(C, np.int32)
        thread = cuda.threadIdx.x & NOT_NEGATIVE
        ty, tx = thread // TX, thread % TX
        T, H, S = Q.shape[1], Q.shape[2], K.shape[1]
        b, h = cuda.blockIdx.x // H & NOT_NEGATIVE, cuda.blockIdx.x % H & NOT_NEGATIVE
        i0 = (cuda.gridDim.y - 1 - cuda.blockIdx.y) * rows  # the last queries see the most keys: their blocks start first
        for r in range(R):
            m[r], l[r] = LOWEST, ZERO
            for e in range(E):
                acc[r, e] = ZERO
        for j0 in range(0, S - T + min(i0 + rows, T), rows):  # tiles that lie wholly above the diagonal are never reached
            multiply(scores, Qs, Ks, Q, i0, T, every, K, j0, S, visible, b, h)
            for c in range(C):
                j = j0 + tx + c * TX
                sees[c] = j - (S - T) if j < S and visible[b, min(j, S - 1)] != 0 else T + rows  # the first query that sees this key, or none
            for r in range(R):
                part_max = LOWEST
                for c in range(C):
                    scores[r, c] = scores[r, c] * scale if i0 + ty + r * TY >= sees[c] else LOWEST
                    part_max = max(part_max, scores[r, c])
                part[ty + r * TY, tx] = part_max
            cuda.syncthreads()
            for r in range(R):
                m_new = m[r]
                for x in range(TX):
                    m_new = max(m_new, part[ty + r * TY, x])
                safe = m_new if m_new != LOWEST else ZERO  # no key seen yet: 2^(-inf - 0) = 0, where -inf - -inf would be NaN
                shrink = math.exp2(m[r] - safe)  # rescales the sums made under the old maximum
                l[r] *= shrink
                for c in range(C):
                    weight = math.exp2(scores[r, c] - safe)
                    l[r] += weight
                    P[ty + r * TY, tx + c * TX] = weight
                for e in range(E):
                    acc[r, e] *= shrink
                m[r] = m_new
            accumulate(acc, P, Vs, V, j0, S, visible, b, h)
        for r in range(R):
            part[ty + r * TY, tx] = l[r]
        cuda.syncthreads()
        for r in range(R):
            total = ZERO
            for x in range(TX):
                total += part[ty + r * TY, x]
            share = float32(1) / total if total != ZERO else ZERO  # divided once, at the end; exactly 0 where no key was seen
            for e in range(E):
                acc[r, e] *= share
            if tx == 0 and i0 + ty + r * TY < T:
                L[b, i0 + ty + r * TY, h] = (m[r] + math.log2(total)) * LN2 if total != ZERO else LOWEST
        store(O, acc, i0, b, h)

    return forward


# ---- v3's backward pass ------------------------------------------------------------------------------------------------------------------


def v3_bwd(dO: Any, q: Any, k: Any, v: Any, O: Any, L: Any, scale: float, visible: Any = None) -> tuple[Any, Any, Any]:
    """FlashAttention-2's Algorithm 2: P is recomputed from L, and D = Σ dO·O replaces the row sums of the softmax's backward pass.

    dO: (B, T, H, Dh);  q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  O: (B, T, H, Dh);  L: (B, T, H);  visible: (B, S)
    -> (B, T, H, Dh), (B, S, H, Dh), (B, S, H, Dh)

    One block per tile of keys computes dK and dV, one block per tile of queries dQ: the scores are computed twice, but there are no atomics, so the
    bits are the same every time. What limits it: what limits v3, and seven products where five would do. Raises ValueError as `call` and `head_size`
    do. Not yet run on a GPU.
    """
    c = call(q, k, v, visible, dO, O, L)
    dO, O, L = c.more
    (B, T, H, Dh), S = q.shape, k.shape[1]
    t = BACKWARD
    of_keys, of_queries = flash_backward(head_size(Dh), t)
    D, dq, dk, dv = c.empty((B, T, H), np.float32), c.empty((B, T, H, Dh)), c.empty((B, S, H, Dh)), c.empty((B, S, H, Dh))
    c.launch(row_sums, (across(B * T * H, ROW_THREADS), 1), ROW_THREADS, dO, O, D)
    inputs = dO, c.q, c.k, c.v, L, D, c.visible, c.every
    c.launch(of_keys, (B * H, across(S, t.rows)), t.TY * t.TX, *inputs, dk, dv, np.float32(scale))
    c.launch(of_queries, (B * H, across(T, t.rows)), t.TY * t.TX, *inputs, dq, np.float32(scale))
    return dq, dk, dv


@cuda.jit
def row_sums(dO, O, D):
    """D = Σ dO·O, one thread per query and head."""
    n = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    T, H = O.shape[1], O.shape[2]
    b, i, h = n // (T * H), n // H % T, n % H
    if b < O.shape[0]:
        total = ZERO
        for d in range(O.shape[3]):
            total += float32(dO[b, i, h, d]) * float32(O[b, i, h, d])
        D[b, i, h] = total


@functools.cache
def flash_backward(Dh: int, t: Tiles) -> tuple[Any, Any]:
    """v3_bwd's two kernels: of_keys (dK and dV) and of_queries (dQ)."""
    rows, TY, TX, Ds, Js = t
    R, C, E, Dp, Wp, Pp = rows // TY, rows // TX, Dh // TX, Ds + PAD, Dh + PAD, rows + PAD
    multiply, accumulate, store = rectangles(Dh, t)

    @kernel(TY * TX, 1 if Dh > 80 else 2)  # at most 128 registers, or 255
    def of_keys(dO, Q, K, V, L, D, visible, every, dK, dV, scale):
        """Transposed tiles: thread (ty, tx) has keys ty, ty + TY, … and queries tx, tx + TX, …"""
        X = cuda.shared.array((rows, Dp), float32, ALIGN)
        Y = cuda.shared.array((rows, Dp), float32, ALIGN)
        W = cuda.shared.array((Js, Wp), float32, ALIGN)
        P = cuda.shared.array((rows, Pp), float32, ALIGN)  # P transposed, then dscores transposed
        scores = cuda.local.array((R, C), float32)
        dP = cuda.local.array((R, C), float32)
        acc_k = cuda.local.array((R, E), float32)
        acc_v = cuda.local.array((R, E), float32)
        thread = cuda.threadIdx.x & NOT_NEGATIVE
        ty, tx = thread // TX, thread % TX
        T, H, S = Q.shape[1], Q.shape[2], K.shape[1]
        b, h, j0 = cuda.blockIdx.x // H & NOT_NEGATIVE, cuda.blockIdx.x % H & NOT_NEGATIVE, cuda.blockIdx.y * rows
        for r in range(R):
            for e in range(E):
                acc_k[r, e] = ZERO
                acc_v[r, e] = ZERO
        for i0 in range(max(0, j0 - (S - T)) // rows * rows, T, rows):  # from the first tile of queries that reaches these keys
            multiply(scores, X, Y, K, j0, S, visible, Q, i0, T, every, b, h)
            multiply(dP, X, Y, V, j0, S, visible, dO, i0, T, every, b, h)
            for c in range(C):
                i = i0 + tx + c * TX
                lse, row_sum = L[b, min(i, T - 1), h] * LOG2E, D[b, min(i, T - 1), h]
                for r in range(R):
                    j = j0 + ty + r * TY
                    seen = i < T and j <= S - T + i and visible[b, min(j, S - 1)] != 0
                    scores[r, c] = math.exp2(scores[r, c] * scale * LOG2E - lse) if seen else ZERO
                    dP[r, c] = scores[r, c] * (dP[r, c] - row_sum) * scale if seen else ZERO
                    P[ty + r * TY, tx + c * TX] = scores[r, c]
            accumulate(acc_v, P, W, dO, i0, T, every, b, h)
            for r in range(R):
                for c in range(C):
                    P[ty + r * TY, tx + c * TX] = dP[r, c]
            accumulate(acc_k, P, W, Q, i0, T, every, b, h)
        store(dK, acc_k, j0, b, h)
        store(dV, acc_v, j0, b, h)

    @kernel(TY * TX, 2)
    def of_queries(dO, Q, K, V, L, D, visible, every, dQ, scale):
        X = cuda.shared.array((rows, Dp), float32, ALIGN)
        Y = cuda.shared.array((rows, Dp), float32, ALIGN)
        W = cuda.shared.array((Js, Wp), float32, ALIGN)
        P = cuda.shared.array((rows, Pp), float32, ALIGN)  # dscores
        scores = cuda.local.array((R, C), float32)
        dP = cuda.local.array((R, C), float32)
        acc = cuda.local.array((R, E), float32)
        thread = cuda.threadIdx.x & NOT_NEGATIVE
        ty, tx = thread // TX, thread % TX
        T, H, S = Q.shape[1], Q.shape[2], K.shape[1]
        b, h, i0 = cuda.blockIdx.x // H & NOT_NEGATIVE, cuda.blockIdx.x % H & NOT_NEGATIVE, (cuda.gridDim.y - 1 - cuda.blockIdx.y) * rows
        for r in range(R):
            for e in range(E):
                acc[r, e] = ZERO
        for j0 in range(0, S - T + min(i0 + rows, T), rows):
            multiply(scores, X, Y, Q, i0, T, every, K, j0, S, visible, b, h)
            multiply(dP, X, Y, dO, i0, T, every, V, j0, S, visible, b, h)
            for r in range(R):
                i = i0 + ty + r * TY
                lse, row_sum = L[b, min(i, T - 1), h] * LOG2E, D[b, min(i, T - 1), h]
                for c in range(C):
                    j = j0 + tx + c * TX
                    seen = j < S and j <= S - T + i and visible[b, min(j, S - 1)] != 0
                    weight = math.exp2(scores[r, c] * scale * LOG2E - lse) if seen else ZERO
                    P[ty + r * TY, tx + c * TX] = weight * (dP[r, c] - row_sum) * scale if seen else ZERO
            accumulate(acc, P, W, K, j0, S, visible, b, h)
        store(dQ, acc, i0, b, h)

    return of_keys, of_queries


# ---- decode: few queries, many keys ------------------------------------------------------------------------------------------------------


def decode(q: Any, k: Any, v: Any, scale: float, visible: Any = None, splits: int | None = None) -> tuple[Any, Any]:
    """Attention for 1 to 16 queries: each head's keys are split over several blocks, and a second kernel combines their partial results.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  visible: (B, S)  ->  (B, T, H, Dh), (B, T, H)

    `splits` changes a result by rounding only; None chooses it for this GPU, as FlashAttention-3 does. What limits it: K and V are read once, so
    memory bandwidth should be the limit; loads of only 2 or 4 bytes per thread may keep it from reaching that. Raises ValueError as `call` and
    `head_size` do, for more than 16 queries, and for splits below 1. Not yet run on a GPU.
    """
    c = call(q, k, v, visible)
    (B, T, H, Dh), S = q.shape, k.shape[1]
    if T > QUERIES:
        raise ValueError(f"T is {T}; decode takes up to {QUERIES} queries. Use v3 for more")
    if splits is not None and splits < 1:
        raise ValueError(f"splits is {splits}; it is 1 or more, or None for a choice")
    partial = split_decode(head_size(Dh), 1 << max(T - 1, 0).bit_length())
    pieces = across(S, DECODE_THREADS)
    places = 4 if SIMULATED else 4 * cuda.get_current_device().MULTIPROCESSOR_COUNT  # blocks that run at a time
    splits = min(splits or split_count(max(B * H, 1), pieces, places), max(pieces, 1))
    O, L = c.empty((B, T, H, Dh)), c.empty((B, T, H), np.float32)
    O_part, L_part = c.empty((splits, B, T, H, Dh), np.float32), c.empty((splits, B, T, H), np.float32)
    keys = across(pieces, splits) * DECODE_THREADS  # in a split
    c.launch(partial, (B * H * min(T, 1), splits), DECODE_THREADS, c.q, c.k, c.v, c.visible, O_part, L_part, np.float32(scale * LOG2E), keys)
    c.launch(combine, (B * T * H, across(Dh, ROW_THREADS)), ROW_THREADS, O_part, L_part, O, L)
    return O, L


def split_count(tasks: int, pieces: int, places: int) -> int:
    """How many splits FlashAttention-3 would make on a GPU that runs `places` blocks at a time.

    1 where the tasks fill 80 % of the GPU or there are at most 4 pieces; else the fewest whose waves are at least 85 % as full as the fullest.
    """
    if tasks >= 0.8 * places or pieces <= 4:
        return 1

    def fullness(splits: int) -> float:
        waves = tasks * splits / places
        return waves / math.ceil(waves)

    counts = range(1, min(128, places, pieces) + 1)
    best = max(map(fullness, counts))
    return next(n for n in counts if fullness(n) >= 0.85 * best)


@functools.cache
def split_decode(Dh: int, R: int) -> Any:
    """decode's first kernel, for up to R queries. A thread computes the scores of one key of each tile, then accumulates one column of O."""
    N, chunks = DECODE_THREADS, 8  # a row's maximum is found over eight chunks in parallel
    Ds = 4 if SIMULATED else 32 if Dh % 32 == 0 else 16
    groups = max(1, N // Dh)  # threads are (group, d): a group accumulates every groups-th key
    Dp, step, parts, columns = Ds + PAD, N // chunks, chunks + PAD, groups * Dh
    bring = bringing(N, Ds)

    @cuda.jit
    def partial(Q, K, V, visible, O_part, L_part, scale, keys):
        Qs = cuda.shared.array((R, Dp), float32, ALIGN)
        Ks = cuda.shared.array((N, Dp), float32, ALIGN)
        P = cuda.shared.array((R, N), float32, ALIGN)
        part = cuda.shared.array((R, parts), float32, ALIGN)
        sums = cuda.shared.array((R, columns), float32, ALIGN)
        scores = cuda.local.array(R, float32)
        acc = cuda.local.array(R, float32)
        m = cuda.local.array(R, float32)
        l = cuda.local.array(R, float32)
        values = cuda.local.array(8, float32)
        thread = cuda.threadIdx.x & NOT_NEGATIVE
        group, column = thread // Dh, thread % Dh
        T, H, S = Q.shape[1], Q.shape[2], K.shape[1]
        b, h = cuda.blockIdx.x // H & NOT_NEGATIVE, cuda.blockIdx.x % H & NOT_NEGATIVE
        begin = cuda.blockIdx.y * keys
        end = min(begin + keys, S)
        for r in range(R):
            m[r], l[r], acc[r] = LOWEST, ZERO, ZERO
        for j0 in range(begin, end, N):
            for r in range(R):
                scores[r] = ZERO
            for d in range(0, Dh, Ds):
                bring(Ks, N, Ds, K, b, j0, h, d, S, visible)
                for x in range(thread, R * Ds, N):
                    Qs[x // Ds, x % Ds] = float32(Q[b, min(x // Ds, T - 1), h, d + x % Ds])
                cuda.syncthreads()
                for x in range(Ds):
                    for r in range(R):
                        scores[r] += Qs[r, x] * Ks[thread, x]
                cuda.syncthreads()
            j = j0 + thread
            hidden = j >= S or visible[b, min(j, S - 1)] == 0
            for r in range(R):
                scores[r] = scores[r] * scale if r < T and j <= S - T + r and not hidden else LOWEST
                P[r, thread] = scores[r]
            cuda.syncthreads()
            for x in range(thread, R * chunks, N):
                top = LOWEST
                for y in range(step):
                    top = max(top, P[x // chunks, x % chunks * step + y])
                part[x // chunks, x % chunks] = top
            cuda.syncthreads()
            for r in range(R):
                m_new = m[r]
                for x in range(chunks):
                    m_new = max(m_new, part[r, x])
                safe = m_new if m_new != LOWEST else ZERO
                shrink = math.exp2(m[r] - safe)
                weight = math.exp2(scores[r] - safe)
                P[r, thread] = weight
                l[r] = l[r] * shrink + weight
                acc[r] *= shrink
                m[r] = m_new
            cuda.syncthreads()
            if group < groups:
                for x0 in range(group, N, groups * 8):
                    for x in range(8):  # eight loads in flight at a time
                        row = min(j0 + x0 + x * groups, S - 1) & NOT_NEGATIVE
                        value = float32(V[b, row, h, column])
                        values[x] = value if visible[b, row] != 0 else ZERO  # a hidden key's value may be NaN
                    for x in range(8):
                        for r in range(R):
                            acc[r] += P[r, (x0 + x * groups) & NOT_NEGATIVE] * values[x]
            cuda.syncthreads()  # the next tile overwrites P
        for r in range(R):
            P[r, thread] = l[r]
            part[r, 0] = m[r]  # the same in every thread
            if group < groups:
                sums[r, group * Dh + column] = acc[r]
        cuda.syncthreads()
        for x in range(thread, T * Dh, N):
            r, d = x // Dh, x % Dh
            total, value = ZERO, ZERO
            for y in range(N):
                total += P[r, y]
            for y in range(groups):
                value += sums[r, y * Dh + d]
            O_part[cuda.blockIdx.y, b, r, h, d] = value / total if total != ZERO else ZERO
            if d == 0:
                L_part[cuda.blockIdx.y, b, r, h] = (part[r, 0] + math.log2(total)) * LN2 if total != ZERO else LOWEST

    return partial


@cuda.jit
def combine(O_part, L_part, O, L):
    """O = Σ exp(L_part - L) O_part over the splits, one thread per element."""
    T, H = O.shape[1], O.shape[2]
    b, i, h = cuda.blockIdx.x // (T * H), cuda.blockIdx.x // H % T, cuda.blockIdx.x % H
    d = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if d < O.shape[3]:
        m, l, acc = LOWEST, ZERO, ZERO
        for n in range(O_part.shape[0]):
            m = max(m, L_part[n, b, i, h])
        safe = m if m != LOWEST else ZERO
        for n in range(O_part.shape[0]):
            weight = math.exp2((L_part[n, b, i, h] - safe) * LOG2E)
            l += weight
            acc += weight * O_part[n, b, i, h, d]
        O[b, i, h, d] = acc / l if l != ZERO else ZERO
        if d == 0:
            L[b, i, h] = m + math.log(l) if l != ZERO else LOWEST


# ---- arrays and launches -----------------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call's arrays as kernels take them, with `empty` to allocate on the same device and `launch` on the same stream."""

    q: Any
    k: Any
    v: Any
    visible: Any  # (B, S) uint8
    every: Any  # (B, T) uint8 ones: the `shown` of queries, none of which is hidden
    more: list  # the other arguments
    empty: Any  # (shape, dtype = that of q) -> an array
    stream: Any

    def launch(self, function: Any, grid: tuple[int, ...], block: int, *arguments: Any) -> None:
        if min(grid) > 0:  # an empty grid has nothing to compute, and CUDA refuses it
            function[grid, block, self.stream](*arguments)


def call(q: Any, k: Any, v: Any, visible: Any, *others: Any) -> Call:
    """Prepares torch CUDA tensors, Numba device arrays, or (under the simulator) NumPy arrays; only this function tells the three apart.

    Raises ValueError for shapes and dtypes that do not match, for float64, and for bfloat16, which Numba cannot read.
    """
    check(q, k, v, visible, *others)
    (B, T), S = q.shape[:2], k.shape[1]
    if hasattr(q, "detach"):
        import torch

        def numba_array(x: Any) -> Any:
            return cuda.as_cuda_array(x.detach())

        def empty(shape: tuple[int, ...], dtype: Any = q.dtype) -> Any:
            return torch.empty(shape, dtype={np.float32: torch.float32}.get(dtype, dtype), device=q.device)

        ones = torch.ones((1, 1), dtype=torch.uint8, device=q.device)
        visible = ones.expand(B, S) if visible is None else visible.view(torch.uint8)
        stream = cuda.external_stream(torch.cuda.current_stream(q.device).cuda_stream)
        q_, k_, v_, visible, every = map(numba_array, (q, k, v, visible, ones.expand(B, T)))
        return Call(q_, k_, v_, visible, every, list(map(numba_array, others)), empty, stream)
    make, place = (np.empty, np.asarray) if SIMULATED else (cuda.device_array, cuda.to_device)
    every = wrapped(place(np.ones((B, max(T, S)), np.uint8)))
    visible = every[:, :S] if visible is None else wrapped(visible.view(np.uint8))
    q_, k_, v_, *more = map(wrapped, (q, k, v, *others))
    return Call(q_, k_, v_, visible, every[:, :T], more, lambda shape, dtype=q.dtype: make(shape, dtype), 0)


def wrapped(x: Any) -> Any:
    """An array that the simulator reads in place: NumPy arrays it would copy, and refuse if they are not contiguous."""
    if not SIMULATED:
        return x
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    return FakeCUDAArray(x)


def check(q: Any, k: Any, v: Any, visible: Any, *more: Any) -> None:
    """Raises ValueError for arguments that the kernels would misread."""
    dtypes = {str(x.dtype).removeprefix("torch.") for x in (q, k, v)}
    if dtypes == {"bfloat16"}:
        raise ValueError("q is bfloat16, which Numba has no arrays of: convert with .float() or .half() and convert the result back")
    if dtypes not in ({"float32"}, {"float16"}):
        raise ValueError(f"q, k and v are {', '.join(sorted(dtypes))}; they must be all float32 or all float16. Convert them first")
    (B, T, H, Dh), S = q.shape, k.shape[1]
    if tuple(k.shape) != (B, S, H, Dh) or tuple(v.shape) != (B, S, H, Dh):
        raise ValueError(f"q is {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}; they are (B, T, H, Dh) and twice (B, S, H, Dh)")
    if visible is not None and (tuple(visible.shape) != (B, S) or str(visible.dtype).removeprefix("torch.") not in ("bool", "uint8")):
        raise ValueError(f"visible is {visible.dtype}{tuple(visible.shape)}; it is bool or uint8 {(B, S)}, a column for each key")
    for name, x, shape in zip(("dO", "O", "L"), more, ((B, T, H, Dh), (B, T, H, Dh), (B, T, H)), strict=False):
        if tuple(x.shape) != shape or str(x.dtype).removeprefix("torch.") not in ("float32", "float16"):
            raise ValueError(f"{name} is {x.dtype}{tuple(x.shape)}; with this q it is float32 or float16 {shape}")
    if not SIMULATED and isinstance(q, np.ndarray):
        raise ValueError("q is a NumPy array; on a GPU the arguments are torch CUDA tensors or Numba device arrays")


def head_size(Dh: int) -> int:
    """Returns Dh; raises ValueError where the tiles do not support it."""
    unit, most = (4, 32) if SIMULATED else (16, 128)
    if Dh % unit or not 0 < Dh <= most:
        raise ValueError(f"head_dim is {Dh}; the tiles take multiples of {unit} up to {most}. Use v1, or pad the heads with zeros")
    return Dh


def across(n: int, size: int) -> int:
    """How many blocks of `size` cover n: the quotient, rounded up."""
    return -(-n // size)
