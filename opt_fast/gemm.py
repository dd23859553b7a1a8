"""Matrix products on the CPU over packed weights: near the processor's limit, and bit-identical however many rows are multiplied together.

A weight (O, I) is stored as panels, (P, I, COLUMNS): a panel is COLUMNS output columns in the order in which the micro-kernel reads them, whether x
has one row or many. The micro-kernel keeps a tile of the result, rows × columns, in vector registers and accumulates over k = 0, 1, 2 … in order,
with fused multiply-adds where the processor has them; after every BLOCK_K steps it adds the tile to the result, which keeps rounding errors small.
So an element depends only on its own row and column, never on the batch, the tile's other rows or the number of threads. Numba cannot be told to
keep a tile in registers, so the micro-kernel is LLVM code, for the vector width that Numba targets. 16-bit weights widen to float32 when loaded.

Where the processor multiplies pairs of bfloat16 (AVX512-BF16), bfloat16 weights are not widened: x is rounded to bfloat16 too, as HF does in that
dtype, and one instruction adds two products to a float32 sum. Panels are then (P, ⌈I/2⌉, COLUMNS) 32-bit words, each a pair of neighbours in k, the
first in the lower half. Everything else is unchanged; the micro-kernel's k counts pairs.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from ml_dtypes import bfloat16
from numba import get_num_threads, types
from numba.core.registry import cpu_target

from opt_fast.kernel import (
    ARGUMENTS,
    DONE,
    LINE,
    TASKS,
    Kernel,
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
    load,
    loop,
    memory,
    multiply_add,
    prefetch,
    rows_from,
    store,
    transposed,
    uint16s,
    variant,
)  # fmt: skip
from opt_fast.rowwise import FUNCTIONS, activate


class Tile(NamedTuple):
    """The micro-kernel's shape: rows × (vectors · width) results, each vector a register of `width` float32."""

    rows: int
    vectors: int
    width: int
    fused: bool  # multiply and add in one instruction, rounded once
    halves: bool  # converts float16 to float32 in one instruction
    pairs: str  # LLVM's name of the instruction that multiplies pairs of bfloat16 in each lane; "" where bfloat16 is widened
    name: str


DPBF16 = "llvm.x86.avx512bf16.dpbf16ps.512"
EMULATED = "emulated"  # the same from other instructions: for tests on processors without it


def best_tile() -> Tile:
    """The tile that fills the vector registers of the processor that Numba targets (it respects NUMBA_CPU_NAME and NUMBA_CPU_FEATURES)."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    has = {feature.lstrip("+") for feature in features.split(",") if feature.startswith("+")}
    if "avx512f" in has:
        return Tile(6, 4, 16, True, True, DPBF16 if "avx512bf16" in has else "", "AVX-512")  # 24 of 32 registers hold results
    if {"avx2", "fma"} <= has:
        return Tile(6, 2, 8, True, "f16c" in has, "", "AVX2")  # 12 of 16
    if triple.startswith(("aarch64", "arm64")):
        return Tile(6, 4, 4, True, True, "", "NEON")  # 24 of 32
    return Tile(4, 2, 4, False, False, "", "plain")


TILE = best_tile()
ROWS, COLUMNS = TILE.rows, TILE.vectors * TILE.width
BLOCK_K = 384  # x's block, BLOCK_ROWS × 384, stays in the L2 cache (at least 1 MB on processors with AVX-512), a panel's 384 · COLUMNS in L1
BLOCK_ROWS, BLOCK_UNIT = (48 if TILE.width == 16 else 12) * ROWS, 2 * ROWS
FEW = ROWS // 2  # up to this many rows take two panels at a time,
ABREAST = 8 // TILE.vectors  # and a single row takes this many: more independent sums hide the latency of an addition
AHEAD = 4096  # bytes ahead of their use that weights are prefetched into the L2 cache, where rows are few
NEEDED = BLOCK_ROWS * BLOCK_K + ROWS * ABREAST * COLUMNS
as_stored, PER = floats, 1  # the weights' pointer type, and how many of k an element holds; kernel variants rebind both (kernel.variant)
TASKS_EACH = 3  # tasks per thread, where there is one block of rows
BITS = {np.dtype(np.float16): np.dtype(np.int16), np.dtype(bfloat16): np.dtype(np.uint16)}  # Numba has neither type, and gets their bits
PAIRS = np.dtype(np.int32)  # two bfloat16
STORED = {bits: dtype for dtype, bits in BITS.items()} | {PAIRS: np.dtype(bfloat16)}


class Packed:
    """A weight (O, I) as panels (P, I, COLUMNS): panels[p, i, c] is weight[p · COLUMNS + c, i], 0 beyond O; np.asarray() restores the matrix.

    Pairs of bfloat16 are (P, ⌈I/2⌉, COLUMNS): weight[p · COLUMNS + c, 2i] and its neighbour in k, which is 0 after an odd I's last.
    """

    width = COLUMNS  # of a panel

    def __init__(self, panels: np.ndarray, shape: tuple[int, int]) -> None:
        self.panels, self.shape = panels, shape  # 16-bit floats as BITS, or as PAIRS

    @property
    def dtype(self) -> np.dtype:
        return STORED.get(self.panels.dtype, self.panels.dtype)

    @property
    def count(self) -> int:
        return math.ceil(self.shape[0] / self.width)  # of panels

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def needed(self, M: int) -> int:
        """Scratch memory of a thread, in float32 elements, for a product of M rows."""
        return NEEDED

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a packed weight cannot be seen as an array without a copy")
        P, k, _ = self.panels.shape
        numbers = self.panels.view(self.dtype).reshape(
            P, k, self.width, 2 if self.panels.dtype == PAIRS else 1
        )  # (P, I, COLUMNS, 1) or (P, ⌈I/2⌉, COLUMNS, 2)
        weight = numbers.swapaxes(1, 2).reshape(P * self.width, k * numbers.shape[3])
        return weight[: self.shape[0], : self.shape[1]].astype(dtype or self.dtype)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of the matrix, in float32, as an embedding lookup needs them.  ids: (*N)  ->  (*N, I)"""
        ids = np.ascontiguousarray(self.checked_rows(ids), np.int64)
        y = np.empty((*ids.shape, self.shape[1]), np.float32)
        kernel, arguments, tasks = self.rows_call(ids, y)
        kernel(*arguments, tasks=tasks)
        return y

    def rows_call(self, ids: np.ndarray, y: np.ndarray) -> tuple[Kernel, list, int]:
        """The lookup kernel, its arguments, and the number of tasks.  ids: (*N);  y: (*N, I)"""
        bits = self.panels.dtype
        kernel, per = (LOOK_UP["<u2"], 2) if bits == PAIRS else (LOOK_UP[bits.str], 1)
        return kernel, [ids, ids.size, self.panels, self.width, self.panels.shape[1], per, y, self.shape[1], 0, 0, 0, 0], ids.size

    def checked_rows(self, ids: Any) -> np.ndarray:
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.shape[0]:
            raise IndexError(f"rows {ids.min()} to {ids.max()} are asked for; this weight has 0 to {self.shape[0] - 1}")
        return ids

    def call(self, x: np.ndarray, row: int, step: int, bias: np.ndarray, function: str | None, y: Any, M: int) -> tuple[Kernel, list, int]:
        """The product's kernel, its arguments, and the number of tasks; y is (M, O), or 0 if its address is filled in later."""
        (O, I), (most, blocks, parts) = self.shape, cut(self.count, M)
        arguments = [x, row, step, self.panels, self.count, bias, FUNCTIONS[function], y, O, M, O, I, most, blocks, parts]
        return MATMUL[self.panels.dtype.str], arguments, blocks * parts

    def __getitem__(self, _: Any) -> Any:
        raise TypeError("this weight is packed for backend 'cpu': np.asarray() gives the array, and functions take it with ops=opt_fast.ops_cpu")

    def __repr__(self) -> str:
        return f"Packed({self.shape}, {self.dtype})"


def pack(weight: np.ndarray) -> Packed:
    """The weight's panels, in its own dtype: float32, float16 or bfloat16.  weight: (O, I)"""
    weight = weight if weight.dtype in (np.float16, bfloat16) else np.asarray(weight, np.float32)
    (O, I), (numbers, row, step) = weight.shape, flat(weight)
    pairs = weight.dtype == bfloat16 and TILE.pairs
    panels = for_weights((math.ceil(O / COLUMNS), math.ceil(I / 2) if pairs else I, COLUMNS), PAIRS if pairs else numbers.dtype)
    if panels.size:
        kernel = PACK_PAIRS if pairs else PACK32 if numbers.itemsize == 4 else PACK16
        kernel(numbers, row, step, O, I, panels, len(panels), tasks=len(panels))
    return Packed(panels, (O, I))


def matmul(x: np.ndarray, weight: Packed, bias: np.ndarray | None = None, function: str | None = None) -> np.ndarray:
    """x · weightᵀ + bias, then the activation function if one is named, in float32.  x: (M, I);  bias: (O)  ->  (M, O)"""
    O, I = weight.shape
    if x.ndim != 2 or x.shape[1] != I or (bias is not None and bias.shape != (O,)):
        raise ValueError(f"x is {x.shape} and the bias {None if bias is None else bias.shape}; a weight of {(O, I)} wants (M, {I}) and {(O,)}")
    y = np.empty((len(x), O), np.float32)
    if y.size:
        start = np.zeros(O, np.float32) if bias is None else np.ascontiguousarray(bias, np.float32)
        kernel, arguments, tasks = weight.call(*flat(np.asarray(x, np.float32)), start, function, y, len(x))
        kernel(*arguments, tasks=tasks, scratch=weight.needed(len(x)))
    return y


def cut(panels: int, M: int) -> tuple[int, int, int]:
    """How a product is cut into blocks · parts tasks: the rows of a block, the number of blocks, and the parts that the panels are split into.

    With several blocks, threads share the rows, so that each row is packed once. If one block holds all rows, they share the columns, so that each
    thread reads its own panels; ABREAST panels stay together, since a single row is slow with fewer at a time. Blocks are of equal size, a little
    below the maximum if every thread then gets equally many; if that would make them much smaller, all threads share each block.
    """
    threads, most = get_num_threads(), min(BLOCK_ROWS, math.ceil(M / BLOCK_UNIT) * BLOCK_UNIT)
    blocks = math.ceil(M / most)
    if blocks == 1:
        return most, 1, min(math.ceil(panels / ABREAST), threads * TASKS_EACH)
    shared = math.ceil(blocks / threads) * threads  # the number of blocks that gives every thread the same work
    each, alike = (math.ceil(M / count / ROWS) * ROWS for count in (shared, blocks))
    if each > most * 7 // 8 and math.ceil(M / each) % threads == 0:
        return each, math.ceil(M / each), 1
    return alike, math.ceil(M / alike), min(math.ceil(panels / ABREAST), threads)


def flat(a: np.ndarray) -> tuple[np.ndarray, int, int]:
    """A matrix's elements as a flat array, with the strides of its rows and columns; a transposed one is not copied. 16-bit floats as BITS."""
    transposed = a.flags.f_contiguous and not a.flags.c_contiguous
    memory = a.T if transposed else np.ascontiguousarray(a)
    memory = memory.reshape(-1).view(BITS.get(a.dtype, a.dtype))
    return (memory, 1, a.shape[0]) if transposed else (memory, a.shape[1], 1)


# ---- packing -----------------------------------------------------------------------------------------------------------------------------


def _pack(table: Any) -> None:
    """panels[p, i, c] = weight[(p · COLUMNS + c) · row + i · step], and 0 in the last panel's columns beyond O."""
    a = at(table, ARGUMENTS)
    weight, row, step, O, I, panels, P = as_stored(a[0]), a[1], a[2], a[3], a[4], as_stored(a[5]), a[6]
    p = claim(table, TASKS)
    while p < P:
        columns = min(COLUMNS, O - p * COLUMNS)
        for i in range(I):
            for c in range(columns):
                panels[(p * I + i) * COLUMNS + c] = weight[(p * COLUMNS + c) * row + i * step]
            for c in range(columns, COLUMNS):
                panels[(p * I + i) * COLUMNS + c] = 0
        p = claim(table, TASKS)


def _pack_pairs(table: Any) -> None:
    """As _pack, with two neighbours of k in a word; after an odd I's last comes 0."""
    a = at(table, ARGUMENTS)
    weight, row, step, O, I, panels, P = uint16s(a[0]), a[1], a[2], a[3], a[4], int32s(a[5]), a[6]
    words = (I + 1) // 2
    p = claim(table, TASKS)
    while p < P:
        columns = min(COLUMNS, O - p * COLUMNS)
        for i in range(words):
            for c in range(COLUMNS):
                first = (p * COLUMNS + c) * row + 2 * i * step
                low = np.int64(weight[first]) if c < columns else 0
                high = np.int64(weight[first + step]) if c < columns and 2 * i + 1 < I else 0
                panels[(p * words + i) * COLUMNS + c] = low | high << 16
        p = claim(table, TASKS)


# ---- looking up --------------------------------------------------------------------------------------------------------------------------


def _look_up(table: Any) -> None:
    """A task is a row: its words are a panel's width apart, and each holds `per` neighbours in k."""
    a = at(table, ARGUMENTS)
    ids, n, panels, width, words, per, y, I = int64s(a[0]), a[1], as_stored(a[2]), a[3], a[4], a[5], floats(a[6]), a[7]
    scales, scaled, columns, uneven = floats(a[8]), a[9], floats(a[10]), a[11]
    task = claim(table, TASKS)
    while task < n:
        row, found = ids[task], at(y, task * I)
        number = at(panels, (row // width * words * width + row % width) * per)
        for k in range(0, I, per):
            for i in range(k, min(k + per, I)):
                found[i] = as_float32(number, k * width + i - k)
                if scaled:
                    found[i] *= scales[row]
                if uneven:
                    found[i] *= columns[i]
        claim(table, DONE)
        task = claim(table, TASKS)


@intrinsic
def float32_at(typing_context, numbers, i):
    """numbers[i] as float32, from float32 or from the bits of float16 or bfloat16."""

    def generate(context, builder, signature, arguments):
        lane = widened(builder, builder.gep(arguments[0], [arguments[1]]), ir.VectorType(ir.FloatType(), 1), signature.args[0].dtype, TILE)
        return builder.extract_element(lane, ir.IntType(32)(0))

    return types.float32(numbers, types.int64), generate


as_float32 = float32_at  # a variant of the kernel rebinds it, to read int8


# ---- the product -------------------------------------------------------------------------------------------------------------------------


def _matmul(table: Any) -> None:
    """A task is a block of rows and a part of the panels; x's rows are packed in the order in which the micro-kernel reads them.

    A step of the micro-kernel covers PER of k: one, or a pair of bfloat16.
    """
    a = at(table, ARGUMENTS)
    panels = as_stored(a[3])
    x, row, step, P, bias, function, y, y_row = floats(a[0]), a[1], a[2], a[4], floats(a[5]), a[6], floats(a[7]), a[8]
    M, O, K, most, blocks, parts = a[9], a[10], a[11], a[12], a[13], a[14]
    xs, height = memory(table), (K + PER - 1) // PER
    task = claim(table, TASKS)
    while task < blocks * parts:
        first, part, groups = task % blocks * most, task // blocks, (P + ABREAST - 1) // ABREAST
        last, panels_from, panels_to = min(first + most, M), groups * part // parts * ABREAST, min(P, groups * (part + 1) // parts * ABREAST)
        scratch = at(xs, BLOCK_ROWS * BLOCK_K)
        whole = first + (last - first) // ROWS * ROWS
        abreast = ABREAST if last - whole == 1 else 2 if 1 < last - whole <= FEW else 1  # for the rows that do not fill a tile
        for k in range(0, max(K, 1), BLOCK_K):
            numbers = min(BLOCK_K, K - k)
            n, block, ends = (numbers + PER - 1) // PER, at(panels, k // PER * COLUMNS), function if k + BLOCK_K >= K else 0
            for i in range(first, last, ROWS):
                if PER == 2:
                    _round_rows(at(x, i * row + k * step), row, step, min(ROWS, last - i), numbers, at(xs, (i - first) * n))
                else:
                    pack_tile(at(x, i * row + k * step), row, step, min(ROWS, last - i), n, np.float32(1), at(xs, (i - first) * n))
            for p in range(panels_from, panels_to, abreast):
                some = min(abreast, panels_to - p)  # min(0, some) below: Numba would compile _tile once more for a literal 0
                for q in range(p, p + some):
                    for i in range(first, whole, ROWS):
                        _tile(at(xs, (i - first) * n), at(block, q * height * COLUMNS), min(0, some), n, at(y, i * y_row + q * COLUMNS), y_row,
                              min(ROWS, last - i), min(COLUMNS, O - q * COLUMNS), scratch, at(bias, q * COLUMNS), k == 0, ends)  # fmt: skip
                wide = abreast if some == abreast else 1  # too few panels left: one at a time, `abreast` copies computed, one used
                for q in range(p, p + some if whole < last else p, wide):
                    _tile(at(xs, (whole - first) * n), at(block, q * height * COLUMNS), (wide > 1) * height * COLUMNS, n,
                          at(y, whole * y_row + q * COLUMNS), y_row, last - whole, min(wide * COLUMNS, O - q * COLUMNS), scratch,
                          at(bias, q * COLUMNS), k == 0, ends)  # fmt: skip
        claim(table, DONE)
        task = claim(table, TASKS)


@inner
def begin(y: Any, y_row: int, rows: int, columns: int, bias: Any) -> None:
    """Every sum starts from its bias."""
    for r in range(rows):
        for c in range(columns):
            y[r * y_row + c] = bias[c]


@inner
def finish(y: Any, y_row: int, rows: int, columns: int, function: int) -> None:
    """Applies the activation function, if any, while the results are still in the cache."""
    if function:
        for r in range(rows):
            for c in range(columns):
                y[r * y_row + c] = activate(y[r * y_row + c], function)


@inner
def copy_tile(source: Any, source_row: int, rows: int, columns: int, target: Any, target_row: int) -> None:
    """Copies rows × columns elements."""
    for r in range(rows):
        for c in range(columns):
            target[r * target_row + c] = source[r * source_row + c]


@inner
def pack_tile(x: Any, row: int, step: int, rows: int, n: int, scale: Any, xs: Any) -> None:
    """xs[j, r] = scale · x[r · row + j · step]; the last row repeats if there are fewer than ROWS."""
    whole = n // TILE.width * TILE.width if step == 1 else 0
    if whole:
        interleave(x, row, rows, whole, scale, xs)
    for j in range(whole, n):
        for r in range(ROWS):
            xs[j * ROWS + r] = x[min(r, rows - 1) * row + j * step] * scale


@intrinsic
def interleave(typing_context, x, row, rows, n, scale, xs):
    """pack_tile for n contiguous elements of each row: whole vectors, and at least one."""

    def generate(context, builder, signature, arguments):
        x, row, rows, n, scale, xs = arguments
        index, lanes, vector = ir.IntType(64), TILE.width, ir.VectorType(ir.FloatType(), TILE.width)
        places, scales = rows_from(builder, x, row, rows, ROWS), broadcast(builder, scale, vector)

        def body(k: Any, carried: list) -> list:
            lines = [builder.fmul(load(builder, builder.gep(place, [k]), vector), scales) for place in places]
            lines += [ir.Constant(vector, ir.Undefined)] * (-ROWS % lanes)
            target, squares = builder.gep(xs, [builder.mul(k, index(ROWS))]), range(0, ROWS, lanes)
            columns = [transposed(builder, lines[r : r + lanes]) for r in squares]
            for j in range(lanes):
                for r, square in zip(squares, columns, strict=True):
                    column, first = square[j], j * ROWS + r
                    if first + lanes > lanes * ROWS:  # elsewhere, the next column overwrites the surplus lanes
                        some = ir.Constant(ir.VectorType(ir.IntType(32), min(lanes, ROWS - r)), list(range(min(lanes, ROWS - r))))
                        column = builder.shuffle_vector(column, column, some)
                    store(builder, column, builder.gep(target, [index(first)]))
            return []

        loop(builder, n, lanes, [], body)
        return context.get_dummy_value()

    return types.void(x, types.intp, types.intp, types.intp, scale, xs), generate


@inner
def _round_rows(x: Any, row: int, step: int, rows: int, n: int, xs: Any) -> None:
    """As pack_tile, in pairs of bfloat16: xs[j, r] holds x[r · row + 2j · step] and its neighbour, which is 0 after an odd n's last."""
    for r in range(ROWS):
        whole = n // TILE.width * TILE.width if step == 1 and r < rows else 0
        if whole:
            round_row(at(x, r * row), whole, at(xs, r))
        for j in range(whole // 2, (n + 1) // 2):
            first = r * row + 2 * j * step
            low = x[first] if r < rows else np.float32(0)
            high = x[first + step] if r < rows and 2 * j + 1 < n else np.float32(0)
            xs[j * ROWS + r] = pair_of(low, high)


@inner
def _tile(x: Any, panel: Any, gap: int, n: int, y: Any, y_row: int, rows: int, columns: int, scratch: Any, bias: Any, begins: bool,
          function: int) -> None:  # fmt: skip
    """Adds n products to rows × columns results: if `begins`, they start from the bias; then `function` is applied (0 means none).

    An incomplete tile is computed in a scratch tile and copied.
    """
    if begins:
        begin(y, y_row, rows, columns, bias)
    whole = rows == ROWS and columns == COLUMNS
    target, stride = (y, y_row) if whole else (scratch, ABREAST * COLUMNS)
    if not whole:
        copy_tile(y, y_row, rows, columns, scratch, stride)
    if n == 0:  # a weight without columns
        pass
    elif rows > FEW:
        many(target, stride, x, panel, 0, n)
    elif rows > 1:
        few(target, stride, x, panel, gap, n)
    else:
        one(target, stride, x, panel, gap, n)
    if not whole:
        copy_tile(scratch, stride, rows, columns, y, y_row)
    finish(y, y_row, rows, columns, function)


def micro_kernel(rows: int, abreast: int, x_row: int, x_step: int, tile: Tile = TILE, vectors: int | None = None, adds: bool = True,
                 asks: bool = False, ahead: int = 0) -> Any:  # fmt: skip
    """kernel(y, y_row, x, panel, panel_gap, n): y[r, c] += Σ x[r, k] · panel[k, c], over k = 0 … n - 1, for all columns of some panels.

    y's rows are y_row apart, x's x_row, x's elements x_step, the panels panel_gap. The tile stays in registers over the whole loop: each step takes
    one load for each vector of the panels, one broadcast for each row, and their products. Where the panels hold pairs, as int32, so does x.
    `vectors` computes only that many leading vectors of a single panel; adds=False overwrites y; asks=True prefetches y, which arrives from memory
    during the loop. 16-bit weights are prefetched `ahead` bytes before their use.
    """
    vectors = vectors or abreast * tile.vectors
    index, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), tile.width)

    @intrinsic
    def kernel(typing_context, y, y_row, x, panel, panel_gap, n):
        def generate(context, builder, signature, arguments):
            y, y_row, x, panel, panel_gap, n = arguments
            gaps = [builder.add(builder.mul(panel_gap, index(v // tile.vectors)), index(v % tile.vectors * tile.width)) for v in range(vectors)]
            step = range(0, 2 * tile.vectors * tile.width if ahead and signature.args[3].dtype in (types.int16, types.uint16) else 0, LINE)
            asked = [builder.add(builder.mul(panel_gap, index(p)), index((ahead + line) // 2)) for p in range(abreast) for line in step]

            def body(k: Any, sums: list) -> list:
                here, weights = (
                    builder.gep(x, [builder.mul(k, index(x_step))]),
                    builder.gep(panel, [builder.mul(k, index(tile.vectors * tile.width))]),
                )
                for place in asked:
                    prefetch(builder, builder.gep(weights, [place]), level=2)
                columns = [widened(builder, builder.gep(weights, [gap]), vector, signature.args[3].dtype, tile) for gap in gaps]
                numbers = [broadcast(builder, builder.load(builder.gep(here, [index(r * x_row)])), vector) for r in range(rows)]
                both = [(number, column) for number in numbers for column in columns]
                if signature.args[3].dtype == types.int32:
                    return [pair_products(builder, a, b, c, tile) for (a, b), c in zip(both, sums, strict=True)]
                return [multiply_add(builder, a, b, c, tile.fused) for (a, b), c in zip(both, sums, strict=True)]

            if asks:
                for r, v in itertools.product(range(rows), range(0, vectors, max(1, LINE // 4 // tile.width))):
                    prefetch(builder, builder.gep(y, [builder.add(builder.mul(y_row, index(r)), index(v * tile.width))]))
            sums = loop(builder, n, 1, [every(vector, 0.0)] * (rows * vectors), body)
            for i, total in enumerate(sums):
                place = builder.gep(y, [builder.add(builder.mul(y_row, index(i // vectors)), index(i % vectors * tile.width))])
                store(builder, builder.fadd(load(builder, place, vector), total) if adds else total, place)
            return context.get_dummy_value()

        return types.void(y, types.intp, x, panel, types.intp, types.intp), generate

    return kernel


many, few, one = micro_kernel(ROWS, 1, 1, ROWS, asks=True), micro_kernel(FEW, 2, 1, ROWS), micro_kernel(1, ABREAST, 0, ROWS, ahead=AHEAD)


def widened(builder: Any, address: Any, vector: Any, stored: Any, tile: Tile) -> Any:
    """LLVM: loads a vector of weights as float32; pairs stay as they are. bfloat16 is float32's upper half; float16 is converted by an instruction
    where there is one, else here."""
    if stored in (types.float32, types.int32):
        return load(builder, address, vector)
    half, whole = (ir.VectorType(ir.IntType(size), vector.count) for size in (16, 32))
    value = load(builder, address, half)
    if stored == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(value, whole), every(whole, 16)), vector)
    if tile.halves:
        return builder.fpext(builder.bitcast(value, ir.VectorType(ir.HalfType(), vector.count)), vector)
    value = builder.zext(value, whole)
    sign = builder.shl(builder.and_(value, every(whole, 0x8000)), every(whole, 16))
    size = builder.shl(builder.and_(value, every(whole, 0x7FFF)), every(whole, 13))
    number = builder.bitcast(builder.fmul(builder.bitcast(size, vector), every(vector, 2.0**112)), whole)  # exact, also for subnormals
    number = builder.select(
        builder.icmp_unsigned("<", size, every(whole, 0x0F800000)), number, builder.or_(size, every(whole, 0x7F800000))
    )  # inf, NaN
    return builder.bitcast(builder.or_(number, sign), vector)


# ---- pairs of bfloat16 -------------------------------------------------------------------------------------------------------------------


def pair_products(builder: Any, a: Any, b: Any, c: Any, tile: Tile) -> Any:
    """LLVM: VDPBF16PS, which in each lane adds to c the product of the pairs' upper halves, then that of the lower halves.

    Intel's manual defines it as two fused multiply-adds in this order, rounded to nearest even, with subnormal inputs taken as 0 and subnormal
    results flushed to 0, regardless of MXCSR. The emulation does neither: it may differ where an input or a sum is below 1.2e-38, and only there.
    """
    words = ir.VectorType(ir.IntType(32), tile.width)
    a, b = builder.bitcast(a, words), builder.bitcast(b, words)
    if tile.pairs != EMULATED:  # declared with 32-bit words for pairs, its older signature in LLVM, which LLVM still accepts
        return instruction(builder, tile.pairs, c.type, c, a, b)
    upper_a, upper_b = (builder.bitcast(builder.and_(pair, every(words, 0xFFFF0000)), c.type) for pair in (a, b))
    lower_a, lower_b = (builder.bitcast(builder.shl(pair, every(words, 16)), c.type) for pair in (a, b))
    return multiply_add(builder, lower_a, lower_b, multiply_add(builder, upper_a, upper_b, c, tile.fused), tile.fused)


def rounded_pairs(builder: Any, numbers: Any) -> Any:
    """LLVM: a vector of float32 as half as many pairs of bfloat16, each in a float32's bits."""
    count = numbers.type.count
    bits = bfloat16_bits(builder, builder.bitcast(numbers, ir.VectorType(ir.IntType(32), count)))
    halves = builder.trunc(bits, ir.VectorType(ir.IntType(16), count))
    return builder.bitcast(halves, ir.VectorType(ir.FloatType(), count // 2))  # so that x's buffer of float32 can hold pairs


def bfloat16_bits(builder: Any, bits: Any) -> Any:
    """LLVM: float32 bits, or a vector of them, rounded to bfloat16 (to nearest, ties to even); NaN stays NaN."""

    def word(value: int) -> Any:
        return every(bits.type, value) if isinstance(bits.type, ir.VectorType) else bits.type(value)

    upper = builder.lshr(bits, word(16))
    rounded = builder.lshr(builder.add(bits, builder.add(builder.and_(upper, word(1)), word(0x7FFF))), word(16))
    nan = builder.icmp_unsigned(">", builder.and_(bits, word(0x7FFFFFFF)), word(0x7F800000))
    return builder.select(nan, builder.or_(upper, word(0x40)), rounded)


@intrinsic
def pair_of(typing_context, low, high):
    """Two float32 as a pair of bfloat16."""

    def generate(context, builder, signature, arguments):
        numbers, place = ir.Constant(ir.VectorType(ir.FloatType(), 2), ir.Undefined), ir.IntType(32)
        for i, number in enumerate(arguments):
            numbers = builder.insert_element(numbers, number, place(i))
        return builder.extract_element(rounded_pairs(builder, numbers), place(0))

    return types.float32(types.float32, types.float32), generate


@intrinsic
def round_row(typing_context, x, n, xs):
    """n float32 (whole vectors, and at least one) as pairs that are ROWS apart."""

    def generate(context, builder, signature, arguments):
        x, n, xs = arguments
        vector, index = ir.VectorType(ir.FloatType(), TILE.width), ir.IntType(64)

        def body(k: Any, carried: list) -> list:
            pairs = rounded_pairs(builder, load(builder, builder.gep(x, [k]), vector))
            first = builder.mul(k, index(ROWS // 2))
            for i in range(TILE.width // 2):
                builder.store(builder.extract_element(pairs, ir.IntType(32)(i)), builder.gep(xs, [builder.add(first, index(i * ROWS))]))
            return []

        loop(builder, n, TILE.width, [], body)
        return context.get_dummy_value()

    return types.void(x, types.int64, xs), generate


PACK32, PACK16, PACK_PAIRS = variant(_pack, "32", as_stored=floats), variant(_pack, "16", as_stored=int16s), Kernel(_pack_pairs)
MATMUL = {
    "<f4": variant(_matmul, "float32", as_stored=floats),
    "<i2": variant(_matmul, "float16", as_stored=int16s),
    "<u2": variant(_matmul, "bfloat16", as_stored=uint16s),
    PAIRS.str: variant(_matmul, "pairs", as_stored=int32s, PER=2),
}  # fmt: skip
LOOK_UP = {
    "<f4": variant(_look_up, "float32", as_stored=floats),
    "<i2": variant(_look_up, "float16", as_stored=int16s),
    "<u2": variant(_look_up, "bfloat16", as_stored=uint16s),
}
