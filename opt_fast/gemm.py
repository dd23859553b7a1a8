"""Matrix products on the CPU over packed weights: near the processor's limit, and the same bits however many rows go in together.

A weight (O, I) is stored as panels of a few output columns, (P, I, columns): the order in which the micro-kernel reads it, for one row as for many.
The micro-kernel holds a tile of the result, rows × columns, in vector registers and adds one product after the other, k = 0, 1, 2 …, each fused
where the processor can; after every BLOCK_K of them the tile is added to the result, which keeps rounding errors small. So a result depends on its
own row and column alone, never on the batch, the tile's other rows or the number of threads. Numba cannot be told to keep a tile in registers, so
the kernel is written in LLVM's instructions, for the vectors that Numba compiles for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic


class Tile(NamedTuple):
    """The micro-kernel's shape: rows × (vectors · width) results, each vector a register of `width` float32."""

    rows: int
    vectors: int
    width: int
    fused: bool  # multiply and add in one instruction, rounded once
    name: str


def best_tile() -> Tile:
    """The tile that fills the registers of the processor that Numba compiles for (NUMBA_CPU_NAME and NUMBA_CPU_FEATURES are heeded)."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    has = {feature.lstrip("+") for feature in features.split(",") if feature.startswith("+")}
    if "avx512f" in has:
        return Tile(6, 4, 16, True, "AVX-512")  # 24 of 32 registers hold results
    if {"avx2", "fma"} <= has:
        return Tile(6, 2, 8, True, "AVX2")  # 12 of 16
    if triple.startswith(("aarch64", "arm64")):
        return Tile(6, 4, 4, True, "NEON")  # 24 of 32
    return Tile(4, 2, 4, False, "plain")


TILE = best_tile()
ROWS, COLUMNS = TILE.rows, TILE.vectors * TILE.width
BLOCK_ROWS, BLOCK_K = 12 * ROWS, 384  # x's block, 72 × 384, stays in the second-level cache, a panel's 384 · COLUMNS in the first


class Packed(NamedTuple):
    """A weight (O, I) as panels (P, I, COLUMNS): panels[p, i, c] is weight[p · COLUMNS + c, i], zeros beyond O."""

    panels: np.ndarray
    out_features: int


def pack(weight: np.ndarray) -> Packed:
    """The weight's panels.  weight: (O, I)"""
    O, I = weight.shape
    panels = np.zeros((math.ceil(O / COLUMNS) * COLUMNS, I), np.float32)
    panels[:O] = weight
    return Packed(np.ascontiguousarray(panels.reshape(-1, COLUMNS, I).swapaxes(1, 2)), O)


def rows_of(packed: Packed, ids: np.ndarray) -> np.ndarray:
    """Rows of the weight, as an embedding looks them up.  ids: (*N)  ->  (*N, I)"""
    ids = np.asarray(ids)
    return packed.panels[ids // COLUMNS, :, ids % COLUMNS]


def matmul(x: np.ndarray, packed: Packed, bias: np.ndarray | None = None) -> np.ndarray:
    """x times the transposed weight, plus the bias, in float32.  x: (M, I);  bias: (O)  ->  (M, O)"""
    I, O = packed.panels.shape[1], packed.out_features
    if x.ndim != 2 or x.shape[1] != I or (bias is not None and bias.shape != (O,)):
        raise ValueError(f"x is {x.shape} and the bias {None if bias is None else bias.shape}; a weight of {(O, I)} wants (M, {I}) and {(O,)}")
    y = np.empty((len(x), O), np.float32)
    if y.size:
        parts = numba.get_num_threads() * (1 if len(x) > BLOCK_ROWS else 2)  # threads share the columns: each reads its own panels
        start = np.zeros(O, np.float32) if bias is None else np.ascontiguousarray(bias, np.float32)
        _matmul(np.ascontiguousarray(x, np.float32), packed.panels, start, y, parts)
    return y


@njit(parallel=True, cache=True)
def _matmul(x: Any, panels: Any, bias: Any, y: Any, parts: int) -> None:
    """A task is a part of the panels and a block of rows; x's block is packed so that the kernel reads it in order."""
    M, K = x.shape
    blocks = (M + BLOCK_ROWS - 1) // BLOCK_ROWS
    for task in prange(blocks * parts):
        first, part = task % blocks * BLOCK_ROWS, task // blocks
        last = min(first + BLOCK_ROWS, M)
        panels_from, panels_to = len(panels) * part // parts, len(panels) * (part + 1) // parts
        xs = np.empty(BLOCK_ROWS * BLOCK_K, np.float32)
        for i in range(first, last):  # every sum starts from its bias
            for j in range(panels_from * COLUMNS, min(panels_to * COLUMNS, y.shape[1])):
                y[i, j] = bias[j]
        for k in range(0, K, BLOCK_K):
            n = min(BLOCK_K, K - k)
            for i in range(first, last, ROWS):
                _pack_rows(x, i, min(ROWS, last - i), k, n, xs, (i - first) * n)
            for p in range(panels_from, panels_to):
                for i in range(first, last, ROWS):
                    _tile(xs, (i - first) * n, panels, p, k, n, y, i, min(ROWS, last - i))


@njit(cache=True)
def _pack_rows(x: Any, i: int, rows: int, k: int, n: int, xs: Any, start: int) -> None:
    """xs[start + j·rows + r] = x[i + r, k + j]"""
    for r in range(rows):
        row, at = x[i + r], np.uint64(start + r)
        for j in range(np.uint64(n)):  # unsigned: no index counts from the end, and the loop has no branch
            xs[at] = row[np.uint64(k) + j]
            at += np.uint64(rows)


@njit(cache=True)
def _tile(xs: Any, start: int, panels: Any, p: int, k: int, n: int, y: Any, i: int, rows: int) -> None:
    """Adds n products to rows × COLUMNS results; by way of a scratch tile where y has fewer columns left."""
    O, j = y.shape[1], p * COLUMNS
    x, panel = pointer(xs, start), pointer(panels, (p * panels.shape[1] + k) * COLUMNS)
    if j + COLUMNS <= O:
        _micro_kernel(rows, pointer(y, i * O + j), O, x, panel, n)
        return
    scratch = np.zeros((ROWS, COLUMNS), np.float32)
    scratch[:rows, : O - j] = y[i : i + rows, j:]
    _micro_kernel(rows, pointer(scratch, 0), COLUMNS, x, panel, n)
    y[i : i + rows, j:] = scratch[:rows, : O - j]


def address(typing_context, array, offset):
    """The address of a contiguous float32 array's element."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.gep(data, [arguments[1]])

    return types.CPointer(types.float32)(array, types.intp), generate


pointer: Any = intrinsic(address)  # pointer(array, offset)


def micro_kernel(rows: int, tile: Tile = TILE) -> Any:
    """kernel(y, stride, x, panel, n): adds x's n · rows numbers times the panel's n · columns to a tile at y, whose rows are `stride` apart.

    The tile stays in registers over the whole loop: per step one load for each vector of the panel, one broadcast for each row, and their products.
    """

    @intrinsic
    def kernel(typing_context, y, stride, x, panel, n):
        floats = types.CPointer(types.float32)

        def generate(context, builder, signature, arguments):
            y, stride, x, panel, n = arguments
            vector, index = ir.VectorType(ir.FloatType(), tile.width), ir.IntType(64)
            corners = [builder.gep(y, [builder.add(builder.mul(stride, index(r)), index(v * tile.width))])
                       for r in range(rows) for v in range(tile.vectors)]  # fmt: skip
            zero = ir.Constant(vector, [0.0] * tile.width)
            entry, loop, done = builder.block, builder.append_basic_block("step"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            k = builder.phi(index)
            sums = [builder.phi(vector) for _ in corners]
            weights = builder.gep(panel, [builder.mul(k, index(tile.vectors * tile.width))])
            columns = [load(builder, builder.gep(weights, [index(v * tile.width)]), vector) for v in range(tile.vectors)]
            numbers = [builder.load(builder.gep(x, [builder.add(builder.mul(k, index(rows)), index(r))])) for r in range(rows)]
            pairs = [(broadcast(builder, number, vector), column) for number in numbers for column in columns]
            after = [multiply_add(builder, a, b, c, tile.fused) for (a, b), c in zip(pairs, sums, strict=True)]
            following = builder.add(k, index(1))
            for phi, first, again in zip([k, *sums], [index(0), *[zero] * len(sums)], [following, *after], strict=True):
                phi.add_incoming(first, entry)
                phi.add_incoming(again, loop)
            builder.cbranch(builder.icmp_signed("<", following, n), loop, done)
            builder.position_at_end(done)
            for value, corner in zip(after, corners, strict=True):
                total = builder.fadd(load(builder, corner, vector), value)
                builder.store(total, builder.bitcast(corner, vector.as_pointer())).align = 4
            return context.get_dummy_value()

        return types.void(floats, types.intp, floats, floats, types.intp), generate

    return kernel


def load(builder: Any, address: Any, vector: Any) -> Any:
    value = builder.load(builder.bitcast(address, vector.as_pointer()))
    value.align = 4
    return value


def broadcast(builder: Any, number: Any, vector: Any) -> Any:
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None))


def multiply_add(builder: Any, a: Any, b: Any, c: Any, fused: bool) -> Any:
    if not fused:
        return builder.fadd(builder.fmul(a, b), c)
    name = f"llvm.fma.v{a.type.count}f32"
    function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


_KERNELS = [micro_kernel(rows) for rows in range(1, 7)]  # ROWS is at most 6
_one, _two, _three, _four, _five, _six = _KERNELS


@njit(cache=True)
def _micro_kernel(rows: int, y: Any, stride: int, x: Any, panel: Any, n: int) -> None:
    """A full tile, or what is left at the end of a batch: each row's sum is the same in all of them."""
    if rows == 6:
        _six(y, stride, x, panel, n)
    elif rows == 5:
        _five(y, stride, x, panel, n)
    elif rows == 4:
        _four(y, stride, x, panel, n)
    elif rows == 3:
        _three(y, stride, x, panel, n)
    elif rows == 2:
        _two(y, stride, x, panel, n)
    else:
        _one(y, stride, x, panel, n)
