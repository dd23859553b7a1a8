"""One token of decoding in one kernel, kernels/program.cu: builds its lines, computes what it needs of a GPU, and launches it over torch tensors.

A line is a list of WORDS integers: an operation and its operands. A program is a table of lines, (N, WORDS) int64 on the GPU. Pointers are addresses,
such as `Tensor.data_ptr()`, all multiples of 16, or None where there is no operand; the builders below only put them into their words. The operations
are defined at the top of program.cu. All lines have B rows, those of the launch. Nothing here has run on a GPU yet.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

WORDS = 16  # in a line
THREADS, WARPS = 256, 8  # in a block
PAGE = 64  # tokens in a page of the cache
STEP = 8 * 256  # bytes that a warp prefetches per step: 256 bytes of each of 8 rows of a matrix
MOST_ROWS = 64
EMBED, NORM, LINEAR, ATTEND = range(4)
WAIT, NORMED, STAGED, KEPT, INT8, FLOAT, PAGED = (1 << i for i in range(7))  # a line's flags
ACTIVATIONS = (None, "relu", "gelu", "gelu_new")


class TooLittle(ValueError):
    """The GPU has less shared memory than the kernel needs."""


Address = Any  # an int; tests pass arrays, whose addresses they fill in later


def embed(y: Address, width: int, table: Address = None, ids: Address = None, positions: Address = None, scale: Address = None,
          columns: Address = None, wait: bool = False) -> list[Address]:  # fmt: skip
    """y[b] = table[ids[b]] · scale[ids[b]] · columns + positions[lengths[b] + 2]; either table and ids, or positions, may be omitted.

    `scale`: the table is int8, and may have `columns` too.

    ids: (B) int64;  table: (V, W);  positions: (P, W);  scale: (V) float32;  columns: (W) float32  ->  y: (B, W)
    """
    flags = wait * WAIT | (scale is not None) * INT8
    return line(EMBED, flags, y, width, table, ids, positions, scale, columns)


def norm(y: Address, width: int, x: Address, weight: Address = None, bias: Address = None, wait: bool = True) -> list[Address]:
    """y = LayerNorm(x) · weight + bias.  x: (B, D);  weight: (D);  bias: (D)  ->  y: (B, D)"""
    return line(NORM, wait * WAIT, y, width, x, weight, bias)


def linear(y: Address, outputs: int, x: Address, inputs: int, weight: Address, bias: Address = None, *, scale: Address = None,
           columns: Address = None, residual: Address = None, activation: str | None = None, norm: tuple[Address, Address] | None = None,
           normed: Address = None, staged: bool = False, kept: bool = False, paged: bool = False, float32: bool = False, first: int = 0,
           wait: bool = True) -> list[Address]:  # fmt: skip
    """y = activation(x weightᵀ · scale + bias) + residual, rounded once, at the end; residual may be y.

    x: (B, I);  weight: (O, I);  bias: (O);  scale: (O) float32;  columns: (I) float32;  residual: (B, O)  ->  y: (B, O)

    `scale`: the weight is int8, and I a multiple of 16, else of 8. `staged`: x is copied to shared memory first; allowed if `Fit.holds(I)`. `norm`:
    x is staged and normalised there, with this weight and bias (each may be None); block 0 writes the result to `normed` (B, I), which is not x.
    `columns`: the staged rows are then multiplied by these, an int8 matrix's column factors. `kept`: the rows that the line before staged are used
    again; its x and norm are the same. `paged`: y is a layer's keys or values, a pool of pages (64, O), and row b is written at its position
    lengths[b]. `float32`: y is float32. `first`: the block that takes the first 8 outputs; the following blocks take the following ones.
    Raises ValueError for options that exclude each other and sizes that the kernel does not take.
    """
    if inputs % (8 if scale is None else 16):
        raise ValueError(f"a matrix with rows of {inputs} numbers; the kernel takes multiples of {8 if scale is None else 16}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it is one of {ACTIVATIONS}")
    if normed is not None and norm is None:
        raise ValueError("normed is where normalised rows go, and there is no norm")
    if columns is not None and (kept or not (staged or norm is not None)):
        raise ValueError("columns multiply rows that are staged, and not those that other lines keep")
    flags = wait * WAIT | (norm is not None) * NORMED | (staged or norm is not None) * STAGED | kept * KEPT | (scale is not None) * INT8
    flags |= float32 * FLOAT | paged * PAGED
    of_norm = norm or (None, None)
    which = ACTIVATIONS.index(activation)
    return line(LINEAR, flags, y, outputs, x, inputs, weight, scale, bias, residual, which, *of_norm, normed, first, columns)


def attend(O: Address, heads: int, q: Address, keys: Address, values: Address, scale: float) -> list[Address]:
    """Attention of each row's one query over the lengths[b] + 1 keys in its pages.

    q: (B, H, Dh);  keys: (pages, 64, H, Dh);  values: (pages, 64, H, Dh)  ->  O: (B, H, Dh)
    """
    return line(ATTEND, WAIT, O, heads, q, keys, values, struct.unpack("i", struct.pack("f", scale))[0])


def line(*words: Address) -> list[Address]:
    """A line of WORDS words: None becomes 0, and missing words are 0."""
    return [0 if word is None else word for word in words] + [0] * (WORDS - len(words))


class Fit(NamedTuple):
    """How the kernel is compiled and launched for B rows; `fit` makes it."""

    B: int
    Dh: int
    bf16: int
    grid: int  # blocks: one per multiprocessor, all on the GPU at once
    depth: int  # steps of STEP bytes of weights that each warp prefetches
    shared: int  # bytes of shared memory per block

    @property
    def macros(self) -> dict[str, int]:
        return {"DH": self.Dh, "BF16": self.bf16, "MT": tiles(self.B), "DEPTH": self.depth}

    def holds(self, width: int) -> bool:
        """Whether `linear` may have rows of this width `staged` or normed: all B rows then fit. A `norm` line needs room for one row only."""
        return bytes_needed(self.B, self.Dh, self.depth, self.B * pitch(width)) <= self.shared


def fit(B: int, Dh: int, bf16: int, grid: int, limit: int, widths: tuple[int, ...]) -> Fit:
    """Divides `limit` bytes of shared memory: rows of the largest of `widths` that leaves room for 4 steps, and up to 8 steps of weights beside them.

    Raises ValueError for more than 64 rows and for heads that the kernel does not take, TooLittle for a GPU with too little shared memory.
    """
    if not 1 <= B <= MOST_ROWS or Dh not in (64, 80, 128):
        raise ValueError(f"{B} rows and heads of {Dh}; the kernel takes 1 to {MOST_ROWS} rows and heads of 64, 80 or 128")
    one = max(pitch(width) for width in widths)  # the row of a NORM line
    for room, depths in [*((max(one, B * pitch(width)), range(8, 3, -1)) for width in sorted(widths, reverse=True)), (one, range(8, 0, -1))]:
        for depth in depths:
            if bytes_needed(B, Dh, depth, room) <= limit:
                return Fit(B, Dh, bf16, grid, depth, limit)
    raise TooLittle(f"heads of {Dh} need {bytes_needed(B, Dh, 1, one)} bytes of shared memory a block; this GPU gives {limit}")


def tiles(B: int) -> int:
    """Tiles of 16 rows: 1, 2 or 4."""
    return 1 if B <= 16 else 2 if B <= 32 else 4


def pitch(width: int) -> int:
    """Bytes from row to row of 16-bit values in shared memory: neighbouring rows start 64 bytes apart within the banks' 128 bytes."""
    return -(-2 * width // 128) * 128 + 64


def bytes_needed(B: int, Dh: int, depth: int, rows: int) -> int:
    """Shared memory of a block: prefetched weights, and either sums and rows of x, or a query and two tiles each of K and V for every warp."""
    sums, attention = 2 * WARPS * 16 * tiles(B) * 8 * 4, 2 * (16 + WARPS * 2 * 2 * 16) * (Dh + 8)
    return depth * WARPS * STEP + 2 * WORDS * 8 + max(sums + rows, attention)


def state_size(B: int, H: int) -> int:
    """Words (uint32) that the launches of a program share, zeros before the first: one for the barrier, and a count for each row and head."""
    return 1 + B * H


def parts_size(B: int, H: int, Dh: int, grid: int) -> int:
    """Elements (float32) of the partial results of ATTEND's splits: for each row and head, grid // (B·H) splits, at least 1, of Dh + 1."""
    return B * H * max(grid // (B * H), 1) * (Dh + 1)


def launch(how: Fit, lines: Any, lengths: Any, pages: Any, state: Any, parts: Any, begin: int = 0, end: int | None = None) -> None:
    """Runs the lines begin to end in one kernel on torch's current stream; a CUDA graph may capture it.

    lines: (N, WORDS) int64;  lengths: (B) int32;  pages: (B, most) int32;  state: (state_size) int32;  parts: (parts_size) float32

    The cache holds lengths[b] tokens of row b before this one; < 0: the row is not in use. pages[b] are the numbers of its pages.
    """
    import torch

    from opt_fast import nvrtc

    end = len(lines) if end is None else end
    with torch.cuda.device(lines.device):
        found = nvrtc.kernel(lines.get_device(), "program.cu", "program", how.shared, **how.macros)
        given = arguments(how, lines, lengths, pages, state, parts, begin, end)
        stream = torch.cuda.current_stream().cuda_stream
        nvrtc.launch(found, lines.get_device(), stream, (how.grid,), THREADS, how.shared, *given, cooperative=end - begin > 1)


def arguments(how: Fit, lines: Any, lengths: Any, pages: Any, state: Any, parts: Any, begin: int, end: int) -> list[Any]:
    """The kernel's arguments, in its order."""
    first, last, B, most = (np.int32(n) for n in (begin, end, how.B, pages.shape[1]))
    return [lines.data_ptr(), first, last, B, lengths.data_ptr(), pages.data_ptr(), most, state.data_ptr(), parts.data_ptr()]
