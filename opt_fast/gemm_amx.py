"""Matrix products in Intel's tiles (AMX): bfloat16 and int8 weights, where the processor multiplies 16 rows by 16 columns in one instruction.

A tile is 16 rows of 16 words of 32 bits; a word holds two bfloat16 or four int8 values, neighbours in k. A weight (O, I) is stored as strips of 16
output columns, and a strip as tiles in the order of k, so that it is read sequentially, for one row of x as for many. An element of the result
depends only on its own row and column: it is bit-identical however many rows are multiplied together, as in gemm.py.

bfloat16: x is rounded to it, as HF does in that dtype; products of 32 neighbours in k are added to the float32 sum as Intel's manual defines
TDPBF16PS. int8: x is rounded to 16-bit integers, as in gemm_int.py; first their upper, then their lower bytes are multiplied by the weights (TDPBSSD,
TDPBUSD). 256 times the first sum plus the second is exactly gemm_int.py's sum: the results are bit-identical.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import get_num_threads, types
from numba.core.registry import cpu_target

from opt_fast import gemm
from opt_fast.gemm import AHEAD, BLOCK_K, DPBF16, EMULATED, TILE, Packed, begin, bfloat16_bits, finish, widened
from opt_fast.gemm_int import LARGEST, TINY, largest, whole_numbers
from opt_fast.kernel import (
    ARGUMENTS,
    BYTES,
    DONE,
    LINE,
    MEMORY,
    TASKS,
    THREADS,
    Kernel,
    aligned,
    at,
    broadcast,
    bytes_,
    claim,
    every,
    float_bits,
    float_of,
    floats,
    for_weights,
    inner,
    instruction,
    int8s,
    intrinsic,
    lines,
    load,
    loop,
    memory,
    multiply_add,
    prefetch,
    store,
    variant,
)
from opt_fast.rowwise import CHUNK as NUMBERS
from opt_fast.rowwise import FUNCTIONS, norm_row
from opt_np.ops import LAYER_NORM_EPS

SIDE = 16  # rows of a tile, and words of a row
TILE_BYTES = SIDE * SIDE * 4
ABREAST = 2  # tiles of rows multiplied by a strip together: a block of k of 32 rows of x leaves half of the L1 cache to the streaming weights. Two by
# two would need fewer loads, but all eight tile registers; where another thread shares the core, tile loads then wait for a free register
GROUP = ABREAST * SIDE
DEPTH, CHUNK = 2 * BLOCK_K, BLOCK_K // SIDE  # k and strips that a block of rows is multiplied by at a time: in bfloat16 600 kB of the L2 cache
ENOUGH, MOST_ROWS = 2 * GROUP, 16 * GROUP  # rows of a block
AGAIN = 16  # reading the weights for one more block costs as much as so many rows more
X_BYTES = 800 << 10  # bytes of L2 for a block's rows; if k is deeper than DEPTH, partial sums wait there too
ASKS = 2  # cache lines of the next strips that are prefetched with each tile; for int8 half as many, or twice as many if a block has few rows
LAST_ROWS, FEW_ROWS = 256, 128  # the last rows of a block prefetch all of the next strips in order; the rows before them, only their beginning
FLUSH = 0x8040  # in MXCSR: subnormal inputs and results are 0
TASKS_EACH = 3, 2  # tasks per thread: parts of the strips if there are few rows, else blocks of rows
ASK_FOR_TILES = 158, 0x1023, 18  # Linux on x86-64: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
OF_X_LOWER, OF_X, OF_WEIGHTS = 5, 6, 7  # tile registers; those before hold sums
PAIRS, BYTES_OF = "tdpbf16ps", ("tdpbssd", "tdpbusd")  # the instructions; x's upper bytes are signed, its lower ones unsigned
INTEGERS = False  # whether weights are int8; kernel variants rebind it
RELU = FUNCTIONS["relu"]
INT8, SINGLE, INDEX = ir.IntType(8), ir.IntType(32), ir.IntType(64)
VECTOR, WORDS, HALVES = (ir.VectorType(kind, SIDE) for kind in (ir.FloatType(), SINGLE, ir.IntType(16)))
WHOLE = INDEX(4 * SIDE)  # bytes from row to row of a contiguous tile

assert BLOCK_K % (4 * SIDE) == 0  # whole tiles


def unit() -> str:
    """ "AMX" if Numba targets it and the system grants this process its use, which has to be requested; else ""."""
    features = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
    if TILE.pairs != DPBF16 or not {"+amx-tile", "+amx-bf16", "+amx-int8", "+avx512vnni"} <= features or sys.platform != "linux":
        return ""
    return "AMX" if ctypes.CDLL(None).syscall(*ASK_FOR_TILES) == 0 else ""


UNIT = unit()


class Rounded:
    """Activations (M, K) rounded and laid out for products in tiles, once for all that read them: by blocks of k, and in a block by 16 rows."""

    def __init__(self, M: int, K: int, stored: np.dtype) -> None:
        self.stored, self.rows = stored, math.ceil(M / SIDE) * SIDE
        self.memory = aligned(rounded_size(self.rows, K, stored), np.float32)


def rounded_size(rows: int, K: int, stored: Any) -> int:
    """float32 elements of memory for rounded rows: bfloat16, or a plane of upper bytes and one of lower bytes; then a scale for each block of k."""
    planes, per = (2, 4) if stored == np.int8 else (1, 2)
    return rows * (planes * math.ceil(K / (per * SIDE)) * SIDE + math.ceil(K / BLOCK_K))


class PackedTiles(Packed):
    """A bfloat16 or int8 weight (O, I) as strips: panels[s, t, r, c] is word r of tile t of column s · 16 + c; 0 beyond O and I."""

    def __init__(self, weight: np.ndarray, scale: np.ndarray | None = None, columns: np.ndarray | None = None) -> None:
        O, I = self.shape = weight.shape
        self.stored, per = weight.dtype, 4 // weight.dtype.itemsize
        self.scale = np.zeros(0 if scale is None else self.count * SIDE, np.float32)
        if scale is not None:
            self.scale[:O] = scale
        self.columns = np.zeros(0, np.float32) if columns is None else np.array(columns, np.float32)
        tiles = math.ceil(I / (per * SIDE))
        self.panels = for_weights((self.count, tiles, SIDE, SIDE), np.int32)
        for s in range(0, self.count, 16):  # 16 strips at a time, to keep the temporary arrays small
            rows = weight[s * SIDE : (s + 16) * SIDE]
            whole = np.zeros((min(16, self.count - s) * SIDE, tiles * SIDE * per), weight.dtype)
            whole[: len(rows), :I] = rows
            self.panels[s : s + 16] = whole.view(np.int32).reshape(-1, SIDE, tiles, SIDE).transpose(0, 2, 3, 1)

    @property
    def kind(self) -> str:
        return "int8" if self.stored == np.int8 else ""  # of integer weights, which opt_np/quantize.py made

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32) if self.stored == np.int8 else self.stored  # of the matrix that it represents

    @property
    def count(self) -> int:
        return math.ceil(self.shape[0] / SIDE)  # of strips

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + self.scale.nbytes + self.columns.nbytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a packed weight cannot be seen as an array without a copy")
        parts = [self.rows(np.arange(i, min(i + 1024, self.shape[0]))).astype(dtype or self.dtype) for i in range(0, self.shape[0], 1024)]
        return np.concatenate(parts) if parts else np.zeros(self.shape, dtype or self.dtype)

    def rows_call(self, ids: np.ndarray, y: np.ndarray) -> tuple[Kernel, list, int]:
        """As Packed.rows_call."""
        arguments = [ids, ids.size, self.panels, SIDE, self.tiles * SIDE, 4 // self.stored.itemsize, y, self.shape[1],
                     self.scale, self.scale.size, self.columns, self.columns.size]  # fmt: skip
        return LOOK_UP[self.stored.name], arguments, ids.size

    @property
    def tiles(self) -> int:
        return self.panels.shape[1]

    def needed(self, M: int) -> int:
        """Scratch memory of a thread, in float32 elements: x's block, a row, and sums."""
        rows, *_ = shares(M, self.shape[1], self.count)
        sums = CHUNK * (rows if self.shape[1] > DEPTH else GROUP)
        return lines(rounded_size(rows, self.shape[1], self.stored) + BLOCK_K + (sums + 2 * SIDE) * SIDE)

    def call(self, x: Any, row: int, step: int, bias: np.ndarray, function: str | None, y: Any, M: int,
             adds: bool = False) -> tuple[Kernel, list, int]:  # fmt: skip
        """As Packed.call. Threads share the rows, so that each is rounded once, or the strips, if rows are few.

        x may be Rounded, and so may y if `writes_rounded`. adds=True adds to what y contains.
        """
        rows, blocks, parts = shares(M, self.shape[1], self.count)
        given, rounds = ((a.memory, a.rows) if isinstance(a, Rounded) else (0, 0) for a in (x, y))
        parts = 1 if rounds[1] else parts
        chunk, depth = (CHUNK, DEPTH) if M > SIDE else (1, self.shape[1] + 1)  # few rows are limited by memory: weights are read sequentially
        x, y = 0 if given[1] else x, 0 if rounds[1] else y
        arguments = [x, row, step, self.panels, self.count, bias, FUNCTIONS[function], y, self.shape[0], M, *self.shape, rows, blocks,
                     parts, chunk, depth, self.scale, self.columns, self.columns.size, SHAPES[min(M, SIDE)], *given, *rounds, int(adds)]  # fmt: skip
        return MATMUL[self.stored.name], arguments, blocks * parts

    def writes_rounded(self, M: int) -> bool:
        """Whether a result of M rows may be Rounded: only if tasks have whole rows."""
        return get_num_threads() * GROUP <= M

    def __repr__(self) -> str:
        return f"PackedTiles({self.shape}, {self.stored.name})"


def rows_at_once(I: int) -> int:
    """The most rows of a block, a multiple of GROUP."""
    return max(GROUP, min(MOST_ROWS, X_BYTES // (2 * min(I, DEPTH) + 1) // GROUP * GROUP))


def shares(M: int, I: int, count: int) -> tuple[int, int, int]:
    """The rows of a block, the number of blocks, and the parts that a weight's strips are split into: blocks · parts tasks."""
    return divided(M, count, GROUP, ENOUGH, rows_at_once(I), GROUP)


def divided(M: int, count: int, fewest: int, least: int, most: int, step: int) -> tuple[int, int, int]:
    """As `shares`: threads share the rows if there are `fewest` for each, in blocks of `least` to `most`, multiples of `step`; else the strips."""
    threads, few = get_num_threads(), TASKS_EACH[0]
    rows = even_rows(M, least, most, step) if threads <= M // fewest else math.ceil(M / math.ceil(M / most) / step) * step
    blocks = math.ceil(M / rows)
    return rows, blocks, 1 if blocks >= threads else min(count, math.ceil(threads * few / blocks))


def even_rows(M: int, least: int, most: int, step: int) -> int:
    """The rows of a block, a multiple of `step`, with which the busiest thread has least to do; where there is enough, each has some blocks."""
    threads, many = get_num_threads(), TASKS_EACH[1]
    least, most = min(least, most // 2, math.ceil(M / threads)), min(most, max(LAST_ROWS, math.ceil(M / (threads * many) / step) * step))

    def work(rows: int) -> int:
        whole, rest = divmod(M, rows)
        turns, more = divmod(whole, threads)
        return turns * (rows + AGAIN) + (rows + AGAIN if more else rest + AGAIN if rest else 0)

    return min(range(most, step * math.ceil(least / step) - 1, -step), key=work)


def tile_shapes(rows: int, depth: int = SIDE, columns: int = SIDE, weights: int = 1) -> np.ndarray:
    """LDTILECFG's operand: the palette, reserved bytes, and for each of eight tiles the bytes of a row (16 bits each) and the rows (8 bits each).

    Tiles have `rows` rows, but the weights' tiles, the last, have `depth`, which is also the words in a row of x; the rows of weights and of sums
    have `columns` words. Smaller tiles multiply faster.
    """
    shapes = np.zeros(64, np.uint8)
    shapes[0] = 1
    shapes[16:32].view(np.uint16)[:] = [4 * columns] * OF_X_LOWER + [4 * depth] * (3 - weights) + [4 * columns] * weights
    shapes[48:56] = [rows] * (8 - weights) + [depth] * weights
    return shapes


SHAPES = [tile_shapes(rows) for rows in range(SIDE + 1)]


# ---- the product -------------------------------------------------------------------------------------------------------------------------


def _matmul(table: Any) -> None:
    """A task is a block of rows and a part of the strips. First x's rows are rounded into tiles, one block of k at a time; then groups of rows are
    multiplied by CHUNK strips at a time, which stay in the cache meanwhile."""
    a, place = at(table, ARGUMENTS), table[MEMORY] + claim(table, THREADS) * table[BYTES]
    x, row, step, panels, P, bias, function, y, y_row = floats(a[0]), a[1], a[2], bytes_(a[3]), a[4], floats(a[5]), a[6], floats(a[7]), a[8]
    M, O, K, most, blocks, parts, chunk, depth, scale, factors = a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16], floats(a[17]), floats(a[18])
    uneven, given, rounds, rounds_rows, adds = a[19], a[21], a[23], a[24], a[25]
    per, tall = (4, SIDE) if INTEGERS else (2, GROUP)
    high = a[22] if given else most
    strip = (K + per * SIDE - 1) // (per * SIDE) * TILE_BYTES
    apart = floats(place)
    line = at(apart, 2 * SIDE * SIDE)
    all_sums = at(line, BLOCK_K)
    rounded_x = given if given else place + 4 * (2 * SIDE * SIDE + BLOCK_K + CHUNK * (most if depth < K else GROUP) * SIDE)
    xs, plane = bytes_(rounded_x), high // SIDE * strip
    sizes = floats(rounded_x + (2 if INTEGERS else 1) * plane)
    configure(bytes_(a[20]))
    task = claim(table, TASKS)
    while task < blocks * parts:
        first, part = task % blocks * most, task // blocks
        last, strips_to, begun = min(first + most, M), P * (part + 1) // parts, first if given else 0
        for k in range(0, 0 if given else K, BLOCK_K):
            for i in range(last - first):
                round_block(at(x, (first + i) * row + k * step), step, at(factors, k), uneven, line, INTEGERS, xs, plane, high, K, i, k)
        for some in range(P * part // parts, strips_to, chunk):
            until = min(some + chunk, strips_to)
            for k_from in range(0, max(K, 1), depth):
                k_to = min(k_from + depth, K)
                following = at(panels, (until if until < strips_to else P * part // parts) * strip)  # or the first, for the next block of rows
                following_k = min(depth, K)
                if k_to < K:
                    following, following_k = at(panels, some * strip + k_to // (per * SIDE) * TILE_BYTES), min(depth, K - k_to)
                length, asked = (following_k + per * SIDE - 1) // (per * SIDE) * TILE_BYTES, 0
                for i in range(0, last - first, tall):
                    rows, sums = min(tall, last - first - i), at(all_sums, i * CHUNK * SIDE if depth < K else 0)
                    if last - first - i > LAST_ROWS:
                        asked = 0
                    for s in range(some, some if K else until):  # a weight without columns
                        begin(at(sums, (s - some) * tall * SIDE), SIDE, rows, min(SIDE, O - s * SIDE), at(bias, s * SIDE))
                    for k in range(k_from, k_to, BLOCK_K):
                        _, tiles = tiles_of(K, k, per)
                        weights = at(panels, k // (per * SIDE) * TILE_BYTES)
                        here = at(xs, k // (per * SIDE) * TILE_BYTES * (high // SIDE) + (begun + i) // SIDE * tiles * TILE_BYTES)
                        for s in range(some, until):
                            target, start = at(sums, (s - some) * tall * SIDE), at(bias, s * SIDE)
                            if k:
                                start = target
                            elif O - s * SIDE < SIDE:
                                begin(line, 0, 1, O - s * SIDE, start)
                                start = line
                            start_row, size = SIDE if k else 0, at(sizes, k // BLOCK_K * high + begun + i)
                            later = at(following, asked // length * strip + asked % length)
                            if M > SIDE and k == k_from and k_to == K and not rounds:
                                ask_to_write(at(y, (first + i) * y_row + s * SIDE), y_row, rows)
                            if INTEGERS and M == 1:
                                lone(target, start, here, plane, at(weights, s * strip), tiles, at(scale, s * SIDE), size)
                            elif INTEGERS:
                                if M <= SIDE:
                                    bytes_of_few(apart, apart, 0, here, plane, at(weights, s * strip), tiles, at(weights, s * strip + AHEAD))
                                elif last - first <= FEW_ROWS:
                                    bytes_of_some(apart, apart, 0, here, plane, at(weights, s * strip), tiles, later)
                                    asked += tiles * 2 * ASKS * LINE
                                else:
                                    bytes_apart(apart, apart, 0, here, plane, at(weights, s * strip), tiles, later)
                                    asked += tiles * ASKS // 2 * LINE
                                add_scaled(target, start, start_row, apart, at(scale, s * SIDE), size, rows)
                            elif M == 1:
                                before = flush()
                                lone_pairs(target, start, here, at(weights, s * strip), tiles)
                                restore(before)
                            elif rows > SIDE:
                                two(target, start, start_row, here, tiles * TILE_BYTES, at(weights, s * strip), tiles, later)
                                asked += tiles * ASKS * LINE
                            else:
                                one(target, start, start_row, here, tiles * TILE_BYTES, at(weights, s * strip), tiles, at(weights, s * strip + AHEAD))
                    columns = min(until * SIDE, O) - some * SIDE
                    if k_to == K and rounds:
                        lower = rounds_rows // SIDE * ((O + per * SIDE - 1) // (per * SIDE)) * TILE_BYTES
                        round_group(sums, tall, rows, columns, function, line, INTEGERS, bytes_(rounds), lower, rounds_rows, O, first + i,
                                    some * SIDE)  # fmt: skip
                    elif k_to == K:
                        for r in range(rows):
                            write_row(at(sums, r * SIDE), tall * SIDE, at(y, (first + i + r) * y_row + some * SIDE), columns, adds, function)
        claim(table, DONE)
        task = claim(table, TASKS)
    release()


@inner
def tiles_of(K: int, k: int, per: int) -> tuple[int, int]:
    """The length of the block of k that begins at k, and how many tiles it takes."""
    n = min(BLOCK_K, K - k)
    return n, (n + per * SIDE - 1) // (per * SIDE)


@inner
def round_block(x: Any, step: int, factors: Any, uneven: int, line: Any, integers: bool, xs: Any, plane: int, rows: int, K: int, i: int,
                k: int) -> None:  # fmt: skip
    """Rounds one block of k of x's row i, times `factors` if `uneven`; by way of `line` if the block is not contiguous or does not fill its tiles."""
    per = 4 if integers else 2
    n, tiles = tiles_of(K, k, per)
    source = x
    if step != 1 or uneven or n % (per * SIDE) != 0:
        for j in range(tiles * per * SIDE):
            line[j] = np.float32(0) if j >= n else x[j * step] * factors[j] if uneven else x[j * step]
        source = line
    round_line(source, integers, xs, plane, rows, K, i, k)


@inner
def round_line(line: Any, integers: bool, xs: Any, plane: int, rows: int, K: int, i: int, k: int) -> None:
    """Rounds a block of k of row i, padded to whole tiles, to its position among `rows` rows; `plane` bytes on are the lower bytes, then scales."""
    per = 4 if integers else 2
    _, tiles = tiles_of(K, k, per)
    target = at(xs, (k // (per * SIDE) * (rows // SIDE) + i // SIDE * tiles) * TILE_BYTES + i % SIDE * SIDE * 4)
    if integers:
        highest = largest(line, tiles * per * SIDE)  # NaN if a value is NaN or infinite
        floats_of(at(xs, 2 * plane))[k // BLOCK_K * rows + i] = highest / np.float32(LARGEST)
        split_row(line, np.float32(LARGEST) / highest if highest > TINY else np.float32(0), tiles * per * SIDE, target, at(target, plane))
    else:
        round_row(line, tiles * per * SIDE, target)


@inner
def round_group(sums: Any, tall: int, rows: int, columns: int, function: int, line: Any, integers: bool, xs: Any, plane: int, high: int, K: int,
                i: int, k: int) -> None:  # fmt: skip
    """Rounds rows of results, a block of k of the next product's x, to their position; by way of `line`."""
    for r in range(rows):
        write_row(at(sums, r * SIDE), tall * SIDE, line, columns, 0, function)
        for c in range(columns, BLOCK_K):
            line[c] = 0
        round_line(line, integers, xs, plane, high, K, i + r, k)


@intrinsic
def floats_of(typing_context, bytes_):
    """The pointer cast to float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(bytes_), generate


@inner
def write_row(sums: Any, apart: int, y: Any, columns: int, adds: int, function: int) -> None:
    """Writes a row of the strips' sums, `apart` from strip to strip, to contiguous y, or adds them to it; then applies the activation function."""
    whole = columns // SIDE
    relu = function == RELU and not adds
    if whole == 0:
        pass
    elif adds:
        added(sums, apart, y, whole)
    elif relu:
        above_zero(sums, apart, y, whole)
    else:
        copied(sums, apart, y, whole)
    for c in range(whole * SIDE, columns):
        number = sums[whole * apart + c - whole * SIDE]
        y[c] = y[c] + number if adds else number
    left = whole * SIDE if relu else 0
    finish(at(y, left), 0, 1, columns - left, function)


def vectors(what: Callable[[Any, Any, Any], Any]) -> Any:
    """kernel(sums, apart, y, n): stores what(builder, vector, its place in y) for n ≥ 1 vectors of 16, `apart` in sums and contiguous in y."""

    @intrinsic
    def kernel(typing_context, sums, apart, y, n):
        def generate(context, builder, signature, arguments):
            sums, apart, y, n = arguments

            def body(s: Any, carried: list) -> list:
                place = builder.gep(y, [builder.mul(s, INDEX(SIDE))])
                store(builder, what(builder, load(builder, builder.gep(sums, [builder.mul(s, apart)]), VECTOR), place), place)
                return []

            loop(builder, n, 1, [], body)
            return context.get_dummy_value()

        return types.void(sums, types.int64, y, types.int64), generate

    return kernel


copied = vectors(lambda builder, numbers, place: numbers)
added = vectors(lambda builder, numbers, place: builder.fadd(load(builder, place, VECTOR), numbers))
above_zero = vectors(lambda builder, numbers, place: builder.select(builder.fcmp_ordered("<", numbers, every(VECTOR, 0)), every(VECTOR, 0), numbers))


@intrinsic
def add_scaled(typing_context, y, start, start_row, sums, scale, sizes, rows):
    """y = start + scaled sums, in rows of 16; start's rows are start_row apart, and the lower bytes' sums a tile behind the upper bytes'."""

    def generate(context, builder, signature, arguments):
        y, start, start_row, sums, scale, sizes, rows = arguments
        scale = load(builder, scale, VECTOR)

        def body(r: Any, carried: list) -> list:
            before = load(builder, builder.gep(start, [builder.mul(r, start_row)]), VECTOR)
            here, size = builder.gep(sums, [builder.mul(r, INDEX(SIDE))]), builder.gep(sizes, [r])
            store(builder, add_scaled_to(builder, before, here, scale, size), builder.gep(y, [builder.mul(r, INDEX(SIDE))]))
            return []

        loop(builder, rows, 1, [], body)
        return context.get_dummy_value()

    return types.void(y, start, types.int64, sums, scale, sizes, types.int64), generate


def add_scaled_to(builder: Any, y: Any, sums: Any, scale: Any, size: Any) -> Any:
    """LLVM: y plus the upper bytes' sums at `sums` and the lower bytes', a tile behind, scaled; `size` is the address of the row's scale."""
    return builder.fadd(y, scaled(builder, load(builder, sums, WORDS), load(builder, builder.gep(sums, [INDEX(SIDE * SIDE)]), WORDS), scale, size))


def scaled(builder: Any, upper: Any, lower: Any, scale: Any, size: Any) -> Any:
    """LLVM: (256 · upper + lower) times both scales, the column's and the row's."""
    total = builder.sitofp(builder.add(builder.shl(upper, every(WORDS, 8)), lower), VECTOR)
    return builder.fmul(total, builder.fmul(scale, broadcast(builder, builder.load(size), VECTOR)))


@intrinsic
def round_row(typing_context, x, n, target):
    """Rounds n values, a multiple of 32, to bfloat16: one row in each tile."""

    def generate(context, builder, signature, arguments):
        x, n, target = arguments

        def body(k: Any, carried: list) -> list:
            for half in range(2):
                halves = halves_at(builder, builder.gep(x, [builder.add(k, INDEX(half * SIDE))]), signature.args[0].dtype)
                store(builder, halves, builder.gep(target, [builder.add(builder.mul(k, INDEX(TILE_BYTES // 32)), INDEX(2 * SIDE * half))]))
            return []

        loop(builder, n, 2 * SIDE, [], body)
        return context.get_dummy_value()

    return types.void(x, types.int64, target), generate


def halves_at(builder: Any, place: Any, stored: Any) -> Any:
    """LLVM: loads 16 values as bfloat16, rounded unless they are stored so."""
    return load(builder, place, HALVES) if stored == types.uint16 else rounded(builder, widened(builder, place, VECTOR, stored, TILE))


def rounded(builder: Any, numbers: Any) -> Any:
    """LLVM: rounds a vector of float32 to bfloat16; a subnormal value may become 0, as which a product in tiles would take it anyway."""
    if EMULATED in (UNIT, TILE.pairs):
        return builder.trunc(bfloat16_bits(builder, builder.bitcast(numbers, WORDS)), HALVES)
    # declared with 16-bit words for bfloat16, its older signature in LLVM, which LLVM still accepts
    return instruction(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", HALVES, numbers)


@intrinsic
def split_row(typing_context, x, inverse, n, upper, lower):
    """Rounds n values, a multiple of 64, times `inverse` to 16 bits: upper bytes (signed) and lower bytes, one row in each tile."""

    def generate(context, builder, signature, arguments):
        x, inverse, n, *targets = arguments
        inverse = broadcast(builder, inverse, VECTOR)

        def body(k: Any, carried: list) -> list:
            for quarter in range(4):
                value = load(builder, builder.gep(x, [builder.add(k, INDEX(quarter * SIDE))]), VECTOR)
                whole = whole_numbers(builder, builder.fmul(value, inverse))
                place = builder.add(builder.mul(k, INDEX(TILE_BYTES // 64)), INDEX(SIDE * quarter))
                for target, number in zip(targets, (builder.ashr(whole, every(WORDS, 8)), whole), strict=True):
                    store(builder, builder.trunc(number, ir.VectorType(INT8, SIDE)), builder.gep(target, [place]))
            return []

        loop(builder, n, 4 * SIDE, [], body)
        return context.get_dummy_value()

    return types.void(x, types.float32, types.int64, upper, lower), generate


@inner
def int8_at(numbers: Any, i: int) -> Any:
    """gemm.float32_at for int8."""
    return np.float32(numbers[i])


# ---- LayerNorm, rounded for the products that follow -------------------------------------------------------------------------------------


def norm_call(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, y: Rounded) -> tuple[Kernel, list, int]:
    """The LayerNorm kernel that writes rounded rows, its arguments, and the number of tasks; a thread needs scratch memory for a row."""
    M, D = x.shape
    some = max(NUMBERS // D, 1)
    return NORM[y.stored.name], [x, weight, bias, y.memory, y.rows, M, D, some, float_bits(LAYER_NORM_EPS)], math.ceil(M / some)


def _norm(table: Any) -> None:
    """A task is some rows."""
    a, line = at(table, ARGUMENTS), memory(table)
    x, weight, bias, xs, high, M, D, some, eps = floats(a[0]), floats(a[1]), floats(a[2]), bytes_(a[3]), a[4], a[5], a[6], a[7], float_of(a[8])
    per = 4 if INTEGERS else 2
    tiles = (D + per * SIDE - 1) // (per * SIDE)
    first = claim(table, TASKS) * some
    while first < M:
        for d in range(D, tiles * per * SIDE):
            line[d] = 0
        for i in range(first, min(first + some, M)):
            norm_row(at(x, i * D), weight, bias, line, D, eps)
            for k in range(0, D, BLOCK_K):
                round_line(at(line, k), INTEGERS, xs, high // SIDE * tiles * TILE_BYTES, high, D, i, k)
        claim(table, DONE)
        first = claim(table, TASKS) * some


# ---- tiles -------------------------------------------------------------------------------------------------------------------------------


@intrinsic
def configure(typing_context, shapes):
    """Sets the shapes of the thread's tile registers."""

    def generate(context, builder, signature, arguments):
        if UNIT not in ("", EMULATED):  # attention_bf16.py calls this even without tiles
            instruction(builder, "llvm.x86.ldtilecfg", ir.VoidType(), arguments[0])
        return context.get_dummy_value()

    return types.void(shapes), generate


@intrinsic
def release(typing_context):
    """Clears the thread's tile registers, so that the system need not save them at context switches."""

    def generate(context, builder, signature, arguments):
        if UNIT not in ("", EMULATED):
            instruction(builder, "llvm.x86.tilerelease", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate


class Tiles:
    """LLVM: the tile registers, by number."""

    def __init__(self, builder: Any, depth: Any) -> None:
        self.builder, self.depth = builder, depth

    def zero(self, tile: int) -> None:
        instruction(self.builder, "llvm.x86.tilezero", ir.VoidType(), INT8(tile))

    def load(self, tile: int, place: Any, step: Any = WHOLE, words: int = SIDE) -> None:
        """Loads rows that are `step` bytes apart; `words` has to be the row length of the tile's shape."""
        instruction(self.builder, "llvm.x86.tileloadd64", ir.VoidType(), INT8(tile), place, step)

    def store(self, tile: int, place: Any, step: Any = WHOLE, words: int = SIDE) -> None:
        instruction(self.builder, "llvm.x86.tilestored64", ir.VoidType(), INT8(tile), place, step)

    def multiply(self, name: str, total: int, a: int, b: int) -> None:
        instruction(self.builder, f"llvm.x86.{name}", ir.VoidType(), INT8(total), INT8(a), INT8(b))


class EmulatedTiles(Tiles):
    """LLVM: tile registers emulated in memory, by Intel's manual: for tests on processors without AMX."""

    def __init__(self, builder: Any, depth: Any) -> None:
        super().__init__(builder, depth)
        with builder.goto_entry_block():
            self.memory = builder.alloca(INT8, 8 * TILE_BYTES)

    def place(self, tile: int, row: Any = None, word: Any = None) -> Any:
        offset: Any = INDEX(tile * TILE_BYTES)
        for index, size in ((row, 4 * SIDE), (word, 4)):
            offset = offset if index is None else self.builder.add(offset, self.builder.mul(index, INDEX(size)))
        return self.builder.gep(self.memory, [offset])

    def copy(self, words: int, source: Any, source_step: Any, target: Any, target_step: Any) -> None:
        for row in range(SIDE):
            here, there = (self.builder.gep(a, [self.builder.mul(step, INDEX(row))]) for a, step in ((source, source_step), (target, target_step)))
            store(self.builder, load(self.builder, here, ir.VectorType(SINGLE, words)), there)

    def zero(self, tile: int) -> None:
        for row in range(SIDE):
            store(self.builder, every(WORDS, 0), self.place(tile, INDEX(row)))

    def load(self, tile: int, place: Any, step: Any = WHOLE, words: int = SIDE) -> None:
        self.copy(words, place, step, self.place(tile), WHOLE)

    def store(self, tile: int, place: Any, step: Any = WHOLE, words: int = SIDE) -> None:
        self.copy(words, self.place(tile), WHOLE, place, step)

    def multiply(self, name: str, total: int, a: int, b: int) -> None:
        sums = 2 if name == PAIRS else 1

        def row(m: Any, _: list) -> list:
            def step(k: Any, carried: list) -> list:
                word = broadcast(self.builder, self.builder.load(self.builder.bitcast(self.place(a, m, k), SINGLE.as_pointer())), WORDS)
                line = load(self.builder, self.place(b, k), WORDS)
                if sums == 2:
                    return add_pairs(self.builder, word, line, carried)
                return [quads(self.builder, word, line, carried[0], name == BYTES_OF[1])]

            carried = loop(self.builder, self.depth, 1, [every(VECTOR if sums == 2 else WORDS, 0)] * sums, step)
            place, add = self.place(total, m), self.builder.fadd if sums == 2 else self.builder.add
            found = add(*carried) if sums == 2 else carried[0]  # the two halves' sums are added to each other first, then to the total
            store(self.builder, add(load(self.builder, place, found.type), found), place)
            return []

        loop(self.builder, INDEX(SIDE), 1, [], row)


def unit_of(builder: Any, depth: Any) -> Tiles:
    """LLVM: the processor's tiles, or emulated ones; the weights' tiles have `depth` rows."""
    return (EmulatedTiles if UNIT == EMULATED else Tiles)(builder, depth)


def over_tiles(*products: str, asks: int = 0, adds: bool = True) -> Any:
    """kernel(sums, start, start_row, x, gap, strip, n, asked): a loop over n tiles of a strip, each by one tile of x for each of `products`.

    x's tiles are `gap` bytes apart. Sums start from the values at `start`, whose rows are start_row apart, or from 0 if not `adds`. Each step
    prefetches `asks` cache lines, from `asked` on.
    """
    count = len(products)

    @intrinsic
    def kernel(typing_context, sums, start, start_row, x, gap, strip, n, asked):
        def generate(context, builder, signature, arguments):
            sums, start, start_row, x, gap, strip, n, asked = arguments
            tiles = unit_of(builder, INDEX(SIDE))
            places = [builder.bitcast(builder.gep(sums, [INDEX(i * SIDE * SIDE)]), INT8.as_pointer()) for i in range(count)]
            for i in range(count):
                begins = builder.gep(start, [builder.mul(start_row, INDEX(i * SIDE))])
                tiles.load(i, builder.bitcast(begins, INT8.as_pointer()), builder.mul(start_row, INDEX(4))) if adds else tiles.zero(i)

            def step(k: Any, carried: list) -> list:
                offset = builder.mul(k, INDEX(TILE_BYTES))
                for line in range(asks):
                    prefetch(builder, builder.gep(asked, [builder.add(builder.mul(k, INDEX(asks * LINE)), INDEX(line * LINE))]), level=2)
                tiles.load(OF_WEIGHTS, builder.gep(strip, [offset]))
                for i in range(count):
                    tiles.load(OF_X, builder.gep(x, [builder.add(offset, builder.mul(gap, INDEX(i)))]))
                    tiles.multiply(products[i], i, OF_X, OF_WEIGHTS)
                return []

            loop(builder, n, 1, [], step)
            for i, place in enumerate(places):
                tiles.store(i, place)
            return context.get_dummy_value()

        return types.void(sums, start, types.int64, x, types.int64, strip, types.int64, strip), generate

    return kernel


@intrinsic
def ask_to_write(typing_context, y, row, n):
    """Prefetches a cache line of each of n rows for writing."""

    def generate(context, builder, signature, arguments):
        y, row, n = arguments

        def body(r: Any, carried: list) -> list:
            prefetch(builder, builder.gep(y, [builder.mul(r, row)]), write=True)
            return []

        loop(builder, n, 1, [], body)
        return context.get_dummy_value()

    return types.void(y, types.int64, types.int64), generate


@intrinsic
def flush(typing_context):
    """From here on this thread's vector instructions take subnormals as 0; returns the previous mode, for `restore`."""

    def generate(context, builder, signature, arguments):
        if EMULATED in (UNIT, TILE.pairs):  # on any processor
            return INDEX(0)
        with builder.goto_entry_block():
            word = builder.alloca(SINGLE)
        place = builder.bitcast(word, INT8.as_pointer())
        instruction(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), place)
        before = builder.load(word)
        builder.store(builder.or_(before, SINGLE(FLUSH)), word)
        instruction(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), place)
        return builder.zext(before, INDEX)

    return types.int64(), generate


@intrinsic
def restore(typing_context, before):
    """Restores the mode that `flush` returned."""

    def generate(context, builder, signature, arguments):
        if EMULATED not in (UNIT, TILE.pairs):
            with builder.goto_entry_block():
                word = builder.alloca(SINGLE)
            builder.store(builder.trunc(arguments[0], SINGLE), word)
            instruction(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), builder.bitcast(word, INT8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def lone_pairs(typing_context, y, start, x, strip, n):
    """As `one`, for a single row, in vector instructions; between `flush` and `restore` they treat subnormals as tiles do."""

    def generate(context, builder, signature, arguments):
        y, start, x, strip, n = arguments

        def tile(t: Any, carried: list) -> list:
            offset, sums = builder.mul(t, INDEX(TILE_BYTES)), [every(VECTOR, 0)] * 2
            weights, words = (builder.gep(place, [offset]) for place in (strip, x))
            for r in range(SIDE):
                line = builder.gep(weights, [INDEX(r * LINE)])
                prefetch(builder, builder.gep(line, [INDEX(AHEAD)]), level=2)
                word = builder.load(builder.bitcast(builder.gep(words, [INDEX(4 * r)]), SINGLE.as_pointer()))
                sums = add_pairs(builder, broadcast(builder, word, WORDS), load(builder, line, WORDS), sums)
            return [builder.fadd(carried[0], builder.fadd(*sums))]

        (total,) = loop(builder, n, 1, [load(builder, start, VECTOR)], tile)
        store(builder, total, y)
        return context.get_dummy_value()

    return types.void(y, start, x, strip, types.int64), generate


def add_pairs(builder: Any, a: Any, b: Any, sums: list) -> list:
    """LLVM: adds the products of the pairs' lower halves to one sum, and of their upper halves to another, each rounded once."""
    halves = [[builder.shl(x, every(WORDS, 16)), builder.and_(x, every(WORDS, 0xFFFF0000))] for x in (a, b)]
    both = [[builder.bitcast(half, VECTOR) for half in numbers] for numbers in halves]
    return [multiply_add(builder, x, w, total, True) for x, w, total in zip(*both, sums, strict=True)]


@intrinsic
def lone(typing_context, y, start, x, plane, strip, n, scale, size):
    """As bytes_of_few and add_scaled, for a single row, in vector instructions, whose latency is below that of tiles with one row.

    The upper bytes are multiplied as unsigned, 128 larger than they are; the excess is subtracted at the end.
    """

    def generate(context, builder, signature, arguments):
        y, start, x, plane, strip, n, scale, size = arguments

        def tile(t: Any, sums: list) -> list:
            offset, sums = builder.mul(t, INDEX(TILE_BYTES)), list(sums)
            weights, upper = builder.gep(strip, [offset]), builder.gep(x, [offset])
            lower = builder.gep(upper, [plane])
            for r in range(SIDE):
                line = builder.gep(weights, [INDEX(r * LINE)])
                prefetch(builder, builder.gep(line, [INDEX(AHEAD)]), level=2)
                words = [builder.load(builder.bitcast(builder.gep(place, [INDEX(4 * r)]), SINGLE.as_pointer())) for place in (upper, lower)]
                words[0] = builder.xor(words[0], SINGLE(0x80808080))
                for i, word in enumerate((*words, SINGLE(0x80808080)), r % 2 * 3):  # two independent sums of each, against latency
                    sums[i] = meet(builder, broadcast(builder, word, WORDS), load(builder, line, WORDS), sums[i])
            return sums

        sums = loop(builder, n, 1, [every(WORDS, 0)] * 6, tile)
        larger, lower, more = (builder.add(a, b) for a, b in zip(sums[:3], sums[3:], strict=True))
        total = scaled(builder, builder.sub(larger, more), lower, load(builder, scale, VECTOR), size)
        store(builder, builder.fadd(load(builder, start, VECTOR), total), y)
        return context.get_dummy_value()

    return types.void(y, start, x, types.int64, strip, types.int64, scale, size), generate


def meet(builder: Any, x: Any, weights: Any, total: Any) -> Any:
    """LLVM: VPDPBUSD, which adds to each total the products of four unsigned bytes of x and four signed ones of the weights."""
    if UNIT == EMULATED:
        return quads(builder, x, weights, total, True)
    return instruction(builder, "llvm.x86.avx512.vpdpbusd.512", WORDS, total, x, weights)


def quads(builder: Any, a: Any, b: Any, total: Any, unsigned: bool) -> Any:
    """LLVM: adds the products of four bytes in other instructions; a's bytes are unsigned or signed, b's are signed."""
    for e in range(4):
        x, w = (builder.shl(value, every(WORDS, 24 - 8 * e)) for value in (a, b))
        x = (builder.lshr if unsigned else builder.ashr)(x, every(WORDS, 24))
        total = builder.add(total, builder.mul(x, builder.ashr(w, every(WORDS, 24))))
    return total


WHOLE_TILE = TILE_BYTES // LINE  # few rows are limited by memory, and prefetch as much as they read
one, two = over_tiles(PAIRS, asks=WHOLE_TILE), over_tiles(PAIRS, PAIRS, asks=ASKS)
bytes_apart, bytes_of_some, bytes_of_few = (over_tiles(*BYTES_OF, asks=n, adds=False) for n in (ASKS // 2, 2 * ASKS, WHOLE_TILE))
NORM = {"bfloat16": variant(_norm, "bfloat16", INTEGERS=False), "int8": variant(_norm, "int8", INTEGERS=True)}
MATMUL = {"bfloat16": variant(_matmul, "bfloat16", INTEGERS=False), "int8": variant(_matmul, "int8", INTEGERS=True)}
LOOK_UP = {"bfloat16": gemm.LOOK_UP["<u2"], "int8": variant(gemm._look_up, "int8", as_stored=int8s, as_float32=int8_at)}
