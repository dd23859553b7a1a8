"""Matrix products on the CPU with int8 and int4 weights: exact integer sums, at the speed at which memory delivers the weights.

opt_np.ops.dequantized defines the values of such weights. Each row of x is rounded to 16-bit integers, in blocks of BLOCK_K with a scale each: so
fine that the error is that of the weights alone, even where a few values are far larger than the rest, which 8 bits would not survive. Products of
16-bit integers are summed exactly in 32 bits, two per instruction; the sums are then scaled in float32 and added to the result, block by block. An
element of the result depends only on its own row and column, as in gemm.py: it is bit-identical however many rows are multiplied together.

The weights are stored in the order in which they are read: by blocks of k, in each by panels (COLUMNS output columns), in each by rows of COLUMNS
16-bit words. A word holds two int8 or four int4 weights; those of a RUN belong to the same k and to neighbouring vectors of columns. So a run needs
no mask: shifted down to one of its weights, a word still holds those above it, 16 (or 256) times as large; what they add is 16 (or 256) times the
next vector's sum, which is subtracted at the end, exactly. The last weight of a run is signed; the others are stored as 0 to 15 for -8 to 7 (0 to
255 for -128 to 127), and the excess is subtracted, too. In an int4 panel, each group of k is preceded by a row of scales (float16).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

from opt_fast.gemm import AHEAD, BLOCK_K, BLOCK_ROWS, BLOCK_UNIT, COLUMNS, NEEDED, TILE, Packed, begin, cut, finish, float32_at, widened
from opt_fast.kernel import (
    ARGUMENTS,
    BYTES,
    DONE,
    LINE,
    MEMORY,
    TASKS,
    THREADS,
    Kernel,
    across,
    at,
    broadcast,
    claim,
    every,
    floats,
    for_weights,
    inner,
    instruction,
    int16s,
    int32s,
    int64s,
    intrinsic,
    larger,
    load,
    loop,
    prefetch,
    store,
    uint16s,
    variant,
)  # fmt: skip
from opt_fast.rowwise import FUNCTIONS
from opt_np import ops

ROWS, FEW = 4, 2  # of a tile: with more, the sums would not all fit in registers beside the words
LARGEST = 32767.0  # the largest integer to which a block of x is scaled
TINY = 1e-30  # a block of x whose largest magnitude is no more is taken as 0, as its scale could not be inverted
GROUPS = BLOCK_K // 32  # of a block, at most
WIDTH = TILE.width
VECTOR, INTS, PAIRS = ir.VectorType(ir.FloatType(), WIDTH), ir.VectorType(ir.IntType(32), WIDTH), ir.VectorType(ir.IntType(16), 2 * WIDTH)


def word_order(bits: int) -> np.ndarray:
    """Which weight, as k · COLUMNS + column, each bit field of each word of a row holds.  ->  (16 / bits, COLUMNS)

    A vector of words (2 · WIDTH) holds a vector of pairs in each of its bit fields; with four fields, pair 0 of all columns comes before pair 1.
    """
    per = 16 // bits
    part, word = np.mgrid[:per, :COLUMNS]
    lane, vector = word % (2 * WIDTH), per * (word // (2 * WIDTH)) + part
    return (2 * (vector // TILE.vectors) + lane % 2) * COLUMNS + vector % TILE.vectors * WIDTH + lane // 2


ORDER = {bits: word_order(bits) for bits in (8, 4)}
RUN = {bits: min(16 // bits, TILE.vectors) for bits in (8, 4)}  # weights of a word that form a run

assert TILE.vectors % 2 == ROWS % 2 == 0  # whole vectors of words; pairs of k, ROWS apart
assert BLOCK_K * 127 * LARGEST < 2**31  # sums of int8's products fit into 32 bits
assert BLOCK_K % 64 == BLOCK_UNIT % ROWS == 0  # whole groups, whole tiles
assert BLOCK_ROWS * (BLOCK_K // 2 + 1 + GROUPS) + BLOCK_K + ROWS * COLUMNS <= NEEDED  # a thread's scratch memory


class PackedIntegers(Packed):
    """An int8 or int4 weight (O, I) in panels; np.asarray() returns the dequantized float32 matrix."""

    def __init__(self, weight: np.ndarray, scale: np.ndarray, columns: np.ndarray | None = None) -> None:
        self.bits = 8 if weight.dtype == np.int8 else 4
        self.zero = 0 if self.bits == 8 else 8
        tops = sum(1 << self.bits * (i + 1) - 1 for i in range(16 // self.bits) if (i % RUN[self.bits] == RUN[self.bits] - 1) == (self.bits == 4))
        self.flipped = np.uint16(tops)  # the highest bit of each weight that is converted between signed and unsigned
        self.signs = np.uint16(tops ^ 0x8888 * (self.bits == 4))  # flips that make every weight of a stored word signed
        O, I = self.shape = (len(weight), weight.shape[1] * 8 // self.bits)
        self.group = BLOCK_K if self.bits == 8 else max(ops.group_size(I, scale.shape[1]), 32)
        self.columns = np.zeros(0, np.float32) if columns is None else np.array(columns, np.float32)
        self.scale = np.zeros(self.count * COLUMNS if self.bits == 8 else 0, np.float32)  # int4's are in the panels
        if self.bits == 8:
            self.scale[:O] = scale
        self.panels = for_weights(sum(self.height(n) for _, n in k_blocks(I)) * self.count * COLUMNS, np.uint16)
        for (first, n), block in zip(k_blocks(I), self.blocks(), strict=True):
            self.fill(
                block, weight[:, first * self.bits // 8 : (first + n) * self.bits // 8], scale[:, first // self.group :] if self.bits == 4 else None
            )

    def fill(self, block: np.ndarray, weight: np.ndarray, scale: np.ndarray | None) -> None:
        """Packs one block of k into words, 64 panels at a time.  block: (P, height, COLUMNS);  weight: (O, n) or (O, n/2);  scale: (O, G)"""
        per, size, (groups, rest) = 16 // self.bits, self.group * self.bits // 16, self.groups(block)
        for p in range(0, self.count, 64):
            rows = weight[p * COLUMNS : (p + 64) * COLUMNS]
            rows = rows.view(np.uint8) if self.bits == 8 else np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(rows), -1)
            numbers = np.full((64 * COLUMNS, per * (block.shape[1] - rest)), self.zero, np.uint8)
            numbers[: len(rows), : rows.shape[1]] = rows
            numbers = numbers.reshape(64, COLUMNS, -1, per).transpose(0, 2, 3, 1).reshape(64, -1, per * COLUMNS)
            words = np.zeros((64, numbers.shape[1], COLUMNS), np.uint16)
            for part, order in enumerate(ORDER[self.bits]):
                words |= np.take(numbers, order, axis=-1).astype(np.uint16) << np.uint16(self.bits * part)
            words ^= self.flipped
            target = block[p : p + 64]
            for g in range(groups):
                start = g * (size + rest // groups)
                if scale is not None:
                    scales = np.zeros((64 * COLUMNS), np.float16)
                    scales[: len(rows)] = scale[p * COLUMNS : (p + 64) * COLUMNS, g]
                    target[:, start] = scales.view(np.uint16).reshape(64, COLUMNS)[: len(target)]
                    start += 1
                target[:, start : start + size] = words[: len(target), g * size : (g + 1) * size]

    @property
    def kind(self) -> str:
        return f"int{self.bits}"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)  # of the dequantized matrix

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + self.scale.nbytes + self.columns.nbytes

    def height(self, n: int) -> int:
        """Rows of words in a panel for n of k, including int4's rows of scales."""
        return -(-n * self.bits // 16) + (-(-n // self.group) if self.bits == 4 else 0)

    def groups(self, block: np.ndarray) -> tuple[int, int]:
        """The number of groups in a block of k, and the number of rows of scales among its words."""
        groups = -(-block.shape[1] // (self.group * self.bits // 16 + (self.bits == 4)))
        return groups, groups if self.bits == 4 else 0

    def blocks(self) -> list[np.ndarray]:
        """The panels' blocks of k: (P, height, COLUMNS) each."""
        found, start = [], 0
        for _, n in k_blocks(self.shape[1]):
            size = self.count * self.height(n) * COLUMNS
            found.append(self.panels[start : start + size].reshape(self.count, self.height(n), COLUMNS))
            start += size
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a packed weight cannot be seen as an array without a copy")
        parts = [self.rows(np.arange(i, min(i + 1024, self.shape[0]))) for i in range(0, self.shape[0], 1024)]
        return np.concatenate(parts).astype(dtype or np.float32, copy=False)

    def rows_call(self, ids: np.ndarray, y: np.ndarray) -> tuple[Kernel, list, int]:
        """As Packed.rows_call."""
        arguments = [ids, ids.size, self.panels, self.count, y, self.shape[1], self.bits, self.group, PLACES[self.bits], int(self.signs), self.scale,
                     self.columns, self.columns.size]  # fmt: skip
        return LOOK_UP, arguments, ids.size

    def call(self, x: np.ndarray, row: int, step: int, bias: np.ndarray, function: str | None, y: Any, M: int) -> tuple[Kernel, list, int]:
        """As Packed.call, for contiguous rows of x only. Raises ValueError for others."""
        if step != 1:
            raise ValueError("x is transposed; an integer weight takes whole rows: give np.ascontiguousarray(x)")
        (O, I), (most, blocks, parts) = self.shape, cut(self.count, M)
        arguments = [x, row, self.panels, self.count, bias, FUNCTIONS[function], y, O, M, O, I, most, blocks, parts, self.scale, self.columns,
                     self.columns.size, self.group, 16 // self.bits, self.height(BLOCK_K) * COLUMNS, self.bits == 8]  # fmt: skip
        return MATMUL[self.kind], arguments, blocks * parts

    def __repr__(self) -> str:
        return f"PackedIntegers({self.shape}, {self.kind})"


def k_blocks(I: int) -> list[tuple[int, int]]:
    """Start and length of each block of k."""
    return [(first, min(BLOCK_K, I - first)) for first in range(0, I, BLOCK_K)]


as_stored = uint16s  # the weights' pointer type; kernel variants rebind it


# ---- looking up --------------------------------------------------------------------------------------------------------------------------


PLACES = {
    bits: np.argsort(order, axis=None) for bits, order in ORDER.items()
}  # the inverse of ORDER: where weight k · COLUMNS + column is, as field · COLUMNS + word


def _look_up_integers(table: Any) -> None:
    """A task is a row."""
    a = at(table, ARGUMENTS)
    ids, n, words, halves, P, y, I, bits = int64s(a[0]), a[1], uint16s(a[2]), int16s(a[2]), a[3], floats(a[4]), a[5], a[6]
    group, places, signs, scale, columns, uneven = a[7], int64s(a[8]), a[9], floats(a[10]), floats(a[11]), a[12]
    per, top = 16 // bits, 1 << bits - 1
    task = claim(table, TASKS)
    while task < n:
        p, c, found, start = ids[task] // COLUMNS, ids[task] % COLUMNS, at(y, task * I), 0
        for first in range(0, I, BLOCK_K):
            numbers = min(BLOCK_K, I - first)
            height, apart = (numbers + per - 1) // per, group // per + 1  # rows: of the panel without scales, of a group with them
            if bits == 4:
                height += (numbers + group - 1) // group
            panel = start + p * height * COLUMNS
            for k in range(numbers):
                place, row = places[k % per * COLUMNS + c], k // per
                if bits == 4:
                    row += k // group + 1
                number = (np.int64(words[panel + row * COLUMNS + place % COLUMNS]) ^ signs) >> bits * (place // COLUMNS) & 2 * top - 1
                size = float32_at(halves, panel + k // group * apart * COLUMNS + c) if bits == 4 else scale[ids[task]]
                found[first + k] = np.float32((number ^ top) - top) * size
            start += P * height * COLUMNS
        if uneven:
            for i in range(I):
                found[i] *= columns[i]
        claim(table, DONE)
        task = claim(table, TASKS)


# ---- the product -------------------------------------------------------------------------------------------------------------------------


def _matmul(table: Any) -> None:
    """A task is a block of rows and a part of the panels, as in gemm.py; for each block of k it rounds x's rows, then multiplies by the panels."""
    a = at(table, ARGUMENTS)
    x, x_row, panels, P, bias, function, y, y_row = floats(a[0]), a[1], as_stored(a[2]), a[3], floats(a[4]), a[5], floats(a[6]), a[7]
    M, O, K, most, blocks, parts, scale, factors = a[8], a[9], a[10], a[11], a[12], a[13], floats(a[14]), floats(a[15])
    uneven, group, word, full, scaled = a[16], a[17], a[18], a[19], a[20]
    place = table[MEMORY] + claim(table, THREADS) * table[BYTES]
    xs, sizes = int16s(place), floats(place + 2 * BLOCK_ROWS * BLOCK_K)
    starts, even = int32s(place + 2 * BLOCK_ROWS * (BLOCK_K + 2)), floats(place + 2 * BLOCK_ROWS * (BLOCK_K + 2 + 2 * GROUPS))
    scratch = at(even, BLOCK_K)
    tall = (min(most, M) + ROWS - 1) // ROWS * ROWS
    keeps, kept = blocks == 1 and tall * ((K + BLOCK_K - 1) // BLOCK_K) <= BLOCK_ROWS, False  # few rows: a thread rounds them once, not for each task
    task = claim(table, TASKS)
    while task < blocks * parts:
        first, part = task % blocks * most, task // blocks
        last, panels_from, panels_to = min(first + most, M), P * part // parts, P * (part + 1) // parts
        for k in range(0, max(K, 1), BLOCK_K):
            n, top, ends = min(BLOCK_K, K - k), k // BLOCK_K * tall if keeps else 0, function if k + BLOCK_K >= K else 0
            for i in range(0 if kept else last - first):
                tile, r = top + i // ROWS * ROWS, i % ROWS
                _round_row(at(x, (first + i) * x_row + k), at(factors, k), uneven, n, group, word, even,
                           at(xs, tile * BLOCK_K + 2 * r), at(sizes, top + i), at(starts, tile * GROUPS + r))  # fmt: skip
            block, height = at(panels, k // BLOCK_K * P * full), words_of(n, word, group, scaled)
            if k + BLOCK_K < K:  # next in order is the following block of k for the same columns,
                coming = at(block, P * full + panels_from * words_of(min(BLOCK_K, K - k - BLOCK_K), word, group, scaled) * COLUMNS)
            else:  # or the panels of this thread's next task, if threads take tasks in turn
                coming = at(panels, min(P * (part + table[THREADS]) // parts, P - 1) * words_of(min(BLOCK_K, K), word, group, scaled) * COLUMNS)
            for q in range(panels_from, panels_to):
                panel = at(block, q * height * COLUMNS)
                after = at(panel, height * COLUMNS) if q + 1 < panels_to else coming
                for i in range(0, last - first, ROWS):
                    t = top + i
                    _tile(at(xs, t * BLOCK_K), at(sizes, t), at(starts, t * GROUPS), panel, after, at(scale, scaled * q * COLUMNS),
                          n, group, at(y, (first + i) * y_row + q * COLUMNS), y_row,
                          min(ROWS, last - first - i), min(COLUMNS, O - q * COLUMNS), scratch, at(bias, q * COLUMNS), k == 0, ends)  # fmt: skip
        kept = keeps
        claim(table, DONE)
        task = claim(table, TASKS)


@inner
def words_of(n: int, word: int, group: int, scaled: int) -> int:
    """PackedIntegers.height, for `word` weights in a word; groups have rows of scales unless whole columns are scaled (int8)."""
    return (n + word - 1) // word + (n + group - 1) // group * (1 - scaled)


@inner
def _round_row(x: Any, columns: Any, uneven: int, n: int, group: int, word: int, even: Any, xs: Any, size: Any, starts: Any) -> None:
    """Rounds n values of a row to 16-bit integers xs, in pairs ROWS apart; their scale goes to `size`, each group's correction to `starts`."""
    if uneven:
        for j in range(n):
            even[j] = x[j] * columns[j]
        x = even
    most = largest(x, n)  # NaN if a value is NaN or infinite
    inverse = np.float32(LARGEST) / most if most > TINY else np.float32(0)
    size[0] = most / np.float32(LARGEST)
    for g in range(0, n, group):
        m = min(group, n - g)
        whole = m // WIDTH * WIDTH
        start = rounded(at(x, g), inverse, whole, at(xs, g * ROWS)) if whole else 0
        for j in range(whole, (m + word - 1) // word * word):
            number = np.int32(0)
            if j < m:
                number = np.int32(np.rint(min(max(x[g + j] * inverse, np.float32(-LARGEST)), np.float32(LARGEST))))
            start += number
            xs[((g + j) // 2 * ROWS) * 2 + j % 2] = number
        starts[g // group * ROWS] = -start * (128 if word == 2 else 8)


@inner
def _tile(xs: Any, sizes: Any, starts: Any, panel: Any, after: Any, scale: Any, n: int, group: int, y: Any, y_row: int, rows: int, columns: int,
          scratch: Any, bias: Any, begins: bool, function: int) -> None:  # fmt: skip
    """As gemm._tile; by way of a scratch tile unless a micro-kernel has exactly this shape."""
    if begins:
        begin(y, y_row, rows, columns, bias)
    whole = columns == COLUMNS and rows in (ROWS, FEW, 1)
    target, stride = (y, y_row) if whole else (scratch, COLUMNS)
    if not whole:
        for r in range(rows):
            for c in range(columns):
                scratch[r * stride + c] = y[r * y_row + c]
    if rows > FEW:
        many(target, stride, xs, sizes, starts, panel, after, scale, n, group)
    elif rows > 1:
        few(target, stride, xs, sizes, starts, panel, after, scale, n, group)
    else:
        one(target, stride, xs, sizes, starts, panel, after, scale, n, group)
    if not whole:
        for r in range(rows):
            for c in range(columns):
                y[r * y_row + c] = scratch[r * stride + c]
    finish(y, y_row, rows, columns, function)


def micro_kernel(rows: int) -> Any:
    """kernel(y, y_row, xs, sizes, starts, panel, after, scale, n, group): y[r, c] += size[r] · scale[c] · Σ x[r, k] · panel[k, c], k = 0 … n - 1.

    As gemm.micro_kernel, with integer sums in the registers, for each group of k. An int8 panel is passed as uint16, an int4 one as int16. Few rows
    are limited by memory: for them it prefetches AHEAD bytes ahead, and towards the panel's end the beginning of `after`, the next panel.
    """
    vectors, index = TILE.vectors, ir.IntType(64)

    @intrinsic
    def kernel(typing_context, y, y_row, xs, sizes, starts, panel, after, scale, n, group):
        eight = panel.dtype == types.uint16
        per = 2 if eight else 4  # weights in a word
        chains = per // 2 if rows == 1 else 1  # independent sums: LLVM would need two instructions for a second product added to the same sum

        def generate(context, builder, signature, arguments):
            y, y_row, xs, sizes, starts, panel, after, scale, n, group = arguments
            xs = builder.bitcast(xs, ir.IntType(32).as_pointer())
            row = builder.add(builder.sdiv(group, index(per)), index(0 if eight else 1))  # of words, in a group
            groups = builder.sdiv(builder.add(n, builder.sub(group, index(1))), group)
            height = builder.sdiv(builder.add(n, index(per - 1)), index(per))
            whole = builder.mul(height if eight else builder.add(height, groups), index(COLUMNS))
            beyond = builder.gep(after, [builder.neg(whole)])  # the base from which the same offsets continue into `after`

            def place(pointer: Any, *offsets: Any) -> Any:
                for offset in offsets:
                    pointer = builder.gep(pointer, [index(offset) if isinstance(offset, int) else offset])
                return pointer

            def ask(offset: Any) -> None:
                """Prefetches the words that are used AHEAD bytes after those at this offset."""
                offset = builder.add(offset, index(AHEAD // 2))
                inside = builder.icmp_signed("<", offset, whole)
                for line in range(0, COLUMNS, LINE // 2):
                    prefetch(builder, place(builder.select(inside, panel, beyond), offset, line), level=2)

            def one_group(g: Any, results: list) -> list:
                start = builder.mul(g, builder.mul(row, index(COLUMNS)))
                words = place(panel, start)
                numbers = place(xs, builder.mul(g, builder.mul(group, index(ROWS // 2))))
                left = builder.sub(n, builder.mul(g, group))
                count = builder.sdiv(builder.add(builder.select(builder.icmp_signed("<", left, group), left, group), index(per - 1)), index(per))
                scales = [load(builder, place(scale, c), VECTOR) if eight else widened(builder, place(words, c), VECTOR, types.int16, TILE)
                          for c in range(0, COLUMNS, WIDTH)]  # fmt: skip
                if not eight:
                    if rows <= FEW:
                        ask(start)
                    words = place(words, COLUMNS)

                def body(k: Any, sums: list) -> list:
                    if rows <= FEW:
                        ask(builder.add(start if eight else builder.add(start, index(COLUMNS)), builder.mul(k, index(COLUMNS))))
                    here, sums = place(numbers, builder.mul(k, index(per // 2 * ROWS))), list(sums)
                    pairs = word_pairs(builder, place(words, builder.mul(k, index(COLUMNS))), per)
                    for pair in range(per // 2):
                        columns = [next(pairs) for _ in range(vectors)]
                        for r in range(rows):
                            number = builder.bitcast(broadcast(builder, builder.load(place(here, pair * ROWS + r)), INTS), PAIRS)
                            for i, column in enumerate(columns, (pair % chains * rows + r) * vectors):
                                sums[i] = builder.add(sums[i], products(builder, number, column))
                    return sums

                shifts = [broadcast(builder, builder.load(place(starts, builder.mul(g, index(ROWS)), r)), INTS) for r in range(rows)]
                chained = loop(builder, count, 1, [every(INTS, 0)] * (chains * rows * vectors), body)
                sums = [functools.reduce(builder.add, chained[i :: rows * vectors]) for i in range(rows * vectors)]
                totals = list(sums)
                for i in range(rows * vectors):
                    if i % RUN[16 // per] < RUN[16 // per] - 1:
                        above = builder.shl(sums[i + 1], every(INTS, 16 // per))
                        totals[i] = builder.add(builder.sub(sums[i], above), shifts[i // vectors])
                size = [broadcast(builder, builder.load(place(sizes, r)), VECTOR) for r in range(rows)]
                worth = [builder.fmul(scales[i % vectors], size[i // vectors]) for i in range(rows * vectors)]
                return [
                    builder.fadd(result, builder.fmul(builder.sitofp(total, VECTOR), w))
                    for result, total, w in zip(results, totals, worth, strict=True)
                ]

            targets = [place(y, builder.mul(y_row, index(i // vectors)), i % vectors * WIDTH) for i in range(rows * vectors)]
            results = loop(builder, groups, 1, [load(builder, target, VECTOR) for target in targets], one_group)
            for target, result in zip(targets, results, strict=True):
                store(builder, result, target)
            return context.get_dummy_value()

        return types.void(y, types.intp, xs, sizes, starts, panel, after, scale, types.intp, types.intp), generate

    return kernel


many, few, one = micro_kernel(ROWS), micro_kernel(FEW), micro_kernel(1)


def word_pairs(builder: Any, here: Any, per: int) -> Iterator[Any]:
    """The vectors of pairs in a panel's row of words, in 16 bits, pair 0 of all columns first; the upper bits still hold the rest of its run."""
    bits = 16 // per
    for i in range(TILE.vectors * per // 2):
        part, end = i % per, i % per // RUN[bits] * RUN[bits] + RUN[bits]
        if part == 0:
            words = load(builder, builder.gep(here, [ir.IntType(64)(2 * WIDTH * (i // per))]), PAIRS)
        if part % RUN[bits] == 0:
            run = builder.shl(words, every(PAIRS, 16 - bits * end)) if end < per else words
        down = bits * (part + per - end)
        yield builder.ashr(run, every(PAIRS, down)) if down else run


def pair_instruction() -> str:
    """LLVM's name of the instruction that multiplies 16-bit integers and adds neighbours, if Numba's target has it at this width; else ""."""
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return {16: "llvm.x86.avx512.pmaddw.d.512" * ("+avx512bw" in features), 8: "llvm.x86.avx2.pmadd.wd" * ("+avx2" in features)}.get(WIDTH, "")


PAIR_INSTRUCTION = pair_instruction()


def products(builder: Any, a: Any, b: Any) -> Any:
    """LLVM: a[2i] · b[2i] + a[2i + 1] · b[2i + 1], in 32 bits."""
    if PAIR_INSTRUCTION:
        return instruction(builder, PAIR_INSTRUCTION, INTS, a, b)
    a, b = builder.bitcast(a, INTS), builder.bitcast(b, INTS)
    low = builder.mul(*(builder.ashr(builder.shl(x, every(INTS, 16)), every(INTS, 16)) for x in (a, b)))
    return builder.add(low, builder.mul(*(builder.ashr(x, every(INTS, 16)) for x in (a, b))))


@intrinsic
def largest(typing_context, x, n):
    """The largest magnitude of n values; NaN if one is NaN or infinite."""

    def generate(context, builder, signature, arguments):
        x, n = arguments
        index = ir.IntType(64)
        whole = builder.and_(n, index(-WIDTH))
        most, broken = builder.alloca(ir.FloatType()), builder.alloca(ir.FloatType())
        builder.store(ir.FloatType()(0.0), most)
        builder.store(ir.FloatType()(0.0), broken)

        def size(value: Any) -> Any:
            bits = ir.VectorType(ir.IntType(32), WIDTH) if isinstance(value.type, ir.VectorType) else ir.IntType(32)
            mask = every(bits, 0x7FFFFFFF) if isinstance(bits, ir.VectorType) else bits(0x7FFFFFFF)
            return builder.bitcast(builder.and_(builder.bitcast(value, bits), mask), value.type)

        def meet(value: Any, carried: list) -> list:
            return [larger(builder, size(value), carried[0]), builder.fadd(carried[1], builder.fsub(value, value))]  # inf - inf is NaN

        with builder.if_then(builder.icmp_signed(">", whole, index(0))):
            lanes = loop(builder, whole, WIDTH, [every(VECTOR, 0.0)] * 2,
                         lambda k, carried: meet(load(builder, builder.gep(x, [k]), VECTOR), carried))  # fmt: skip
            builder.store(across(builder, lanes[0], larger), most)
            builder.store(across(builder, lanes[1], lambda builder, a, b: builder.fadd(a, b)), broken)
        with builder.if_then(builder.icmp_signed(">", builder.sub(n, whole), index(0))):
            ends = loop(builder, builder.sub(n, whole), 1, [builder.load(most), builder.load(broken)],
                        lambda k, carried: meet(builder.load(builder.gep(x, [builder.add(whole, k)])), carried))  # fmt: skip
            builder.store(ends[0], most)
            builder.store(ends[1], broken)
        return builder.fadd(builder.load(most), builder.load(broken))

    return types.float32(x, types.int64), generate


def whole_numbers(builder: Any, value: Any) -> Any:
    """LLVM: rounds a vector of float32 to integers of 16 bits, in 32-bit words; NaN becomes -LARGEST."""
    magic, vector = 1.5 * 2**23, value.type  # so large that its last bit is worth 1: adding it rounds to an integer
    words = ir.VectorType(ir.IntType(32), vector.count)
    value = builder.select(builder.fcmp_ordered(">", value, every(vector, -LARGEST)), value, every(vector, -LARGEST))
    value = builder.select(builder.fcmp_ordered("<", value, every(vector, LARGEST)), value, every(vector, LARGEST))
    shifted = builder.bitcast(builder.fadd(value, every(vector, magic)), words)
    return builder.sub(shifted, every(words, int(np.float32(magic).view(np.int32))))


@intrinsic
def rounded(typing_context, x, inverse, n, xs):
    """Rounds n values (whole vectors, and at least one) times `inverse` to 16 bits, in pairs that are ROWS apart, and returns their sum."""

    def generate(context, builder, signature, arguments):
        x, inverse, n, xs = arguments
        single, index = ir.IntType(32), ir.IntType(64)
        xs, inverse = builder.bitcast(xs, single.as_pointer()), broadcast(builder, inverse, VECTOR)

        def body(k: Any, carried: list) -> list:
            whole = whole_numbers(builder, builder.fmul(load(builder, builder.gep(x, [k]), VECTOR), inverse))
            pairs = builder.bitcast(builder.trunc(whole, ir.VectorType(ir.IntType(16), WIDTH)), ir.VectorType(single, WIDTH // 2))
            first = builder.mul(k, index(ROWS // 2))
            for e in range(WIDTH // 2):
                target = builder.gep(xs, [builder.add(first, index(e * ROWS))])
                builder.store(builder.extract_element(pairs, single(e)), target)
            return [builder.add(carried[0], whole)]

        (lanes,) = loop(builder, n, WIDTH, [every(INTS, 0)], body)
        return across(builder, lanes, lambda builder, a, b: builder.add(a, b))

    return types.int32(x, types.float32, types.int64, xs), generate


MATMUL = {"int8": variant(_matmul, "int8", as_stored=uint16s), "int4": variant(_matmul, "int4", as_stored=int16s)}
LOOK_UP = Kernel(_look_up_integers)
