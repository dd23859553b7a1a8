"""A token of decoding in one kernel, kernels/program.cu: its lines, what it needs of a GPU, and its launch over torch tensors.

A line is a list of WORDS numbers, an operation and its operands; a program is a table of lines, (N, WORDS) int64 on the GPU. Pointers are addresses,
such as `Tensor.data_ptr()`, all of them multiples of 16, and None where there is nothing; the builders below only put them into place. What the
operations do is told at the top of program.cu. Rows of all lines: B, those of the launch. Nothing here has run on a GPU yet.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

WORDS = 16  # of a line
THREADS, WARPS = 256, 8  # of a block
PAGE = 64  # tokens of a page of the cache
STEP = 8 * 256  # bytes of a warp's step: 256 bytes of each of 8 rows of a matrix
MOST_ROWS = 64
EMBED, NORM, LINEAR, ATTEND = range(4)
WAIT, NORMED, STAGED, KEPT, INT8, FLOAT, PAGED = (1 << i for i in range(7))  # a line's flags
ACTIVATIONS = (None, "relu", "gelu", "gelu_new")


class TooLittle(ValueError):
    """A GPU without the shared memory that the kernel needs."""


Address = Any  # an int; tests put arrays here, whose addresses they fill in later


def embed(y: Address, width: int, table: Address = None, ids: Address = None, positions: Address = None, scale: Address = None,
          columns: Address = None, wait: bool = False) -> list[Address]:  # fmt: skip
    """y[b] = table[ids[b]] · scale[ids[b]] · columns + positions[lengths[b] + 2]; table with ids, or positions, may be missing.

    `scale`: the table is int8, which may have `columns`.

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
    """y = activation(x weightᵀ · scale + bias) + residual, rounded once; residual may be y.

    x: (B, I);  weight: (O, I);  bias: (O);  scale: (O) float32;  columns: (I) float32;  residual: (B, O)  ->  y: (B, O)

    `scale`: the weight is int8, and I a multiple of 16, else of 8. `staged`: x is copied to shared memory first, where `Fit.holds(I)`. `norm`: and
    normalised there, with this weight and bias (or None); block 0 writes what comes of it to `normed` (B, I), which is not x. `columns`: and then
    multiplied by them, as int8 may want it. `kept`: as the line before had it, same x and norm. `paged`: y is a layer's keys or values, a pool of
    pages (64, O); row b goes to its place lengths[b]. `float32`: so is y. `first`: the block that takes the first 8 outputs; the following blocks
    take the following ones. Raises ValueError.
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
    """Attention of one query a row over the lengths[b] + 1 keys that stand in its pages.

    q: (B, H, Dh);  keys: (pages, 64, H, Dh);  values: (pages, 64, H, Dh)  ->  O: (B, H, Dh)
    """
    return line(ATTEND, WAIT, O, heads, q, keys, values, struct.unpack("i", struct.pack("f", scale))[0])


def line(*words: Address) -> list[Address]:
    """A line with all its words."""
    return [0 if word is None else word for word in words] + [0] * (WORDS - len(words))


class Fit(NamedTuple):
    """How the kernel is compiled and launched for B rows; `fit` makes it."""

    B: int
    Dh: int
    bf16: int
    grid: int  # blocks: all of them at once on the GPU, one for each multiprocessor
    depth: int  # steps of 2 KB of weights on their way to each warp
    shared: int  # bytes of a block

    @property
    def macros(self) -> dict[str, int]:
        return {"DH": self.Dh, "BF16": self.bf16, "MT": tiles(self.B), "DEPTH": self.depth}

    def holds(self, width: int) -> bool:
        """Whether `linear` may have rows of this many numbers `staged`, or a `norm` of them; `norm` as a line of its own needs one row."""
        return bytes_needed(self.B, self.Dh, self.depth, self.B * pitch(width)) <= self.shared


def fit(B: int, Dh: int, bf16: int, grid: int, limit: int, widths: tuple[int, ...]) -> Fit:
    """As many weights on their way as `limit` bytes of shared memory allow, beside rows of the largest of `widths` that leaves room for 4 steps.

    Raises ValueError for more than 64 rows and heads that the kernel does not take, TooLittle for a GPU with too little shared memory.
    """
    if not 1 <= B <= MOST_ROWS or Dh not in (64, 80, 128):
        raise ValueError(f"{B} rows and heads of {Dh}; the kernel takes 1 to {MOST_ROWS} rows and heads of 64, 80 or 128")
    one = max(pitch(width) for width in widths)  # a NORM line's
    for room, depths in [*((max(one, B * pitch(width)), range(8, 3, -1)) for width in sorted(widths, reverse=True)), (one, range(8, 0, -1))]:
        for depth in depths:
            if bytes_needed(B, Dh, depth, room) <= limit:
                return Fit(B, Dh, bf16, grid, depth, limit)
    raise TooLittle(f"heads of {Dh} need {bytes_needed(B, Dh, 1, one)} bytes of shared memory a block; this GPU gives {limit}")


def tiles(B: int) -> int:
    """Tiles of 16 rows: 1, 2 or 4."""
    return 1 if B <= 16 else 2 if B <= 32 else 4


def pitch(width: int) -> int:
    """Bytes from row to row of 16-bit numbers in shared memory: rows that lie side by side are 64 bytes apart within the 128 of all banks."""
    return -(-2 * width // 128) * 128 + 64


def bytes_needed(B: int, Dh: int, depth: int, rows: int) -> int:
    """Shared memory of a block: weights on their way, and either sums and rows of x or a query and two tiles of K and V for each warp."""
    sums, attention = 2 * WARPS * 16 * tiles(B) * 8 * 4, 2 * (16 + WARPS * 2 * 2 * 16) * (Dh + 8)
    return depth * WARPS * STEP + 2 * WORDS * 8 + max(sums + rows, attention)


def state_size(B: int, H: int) -> int:
    """Words (uint32) that the launches of a program share, zeros before the first: the barrier's, and a count for each row and head."""
    return 1 + B * H


def parts_size(B: int, H: int, Dh: int, grid: int) -> int:
    """Numbers (float32) of what the splits of ATTEND have found; grid // (B·H) splits, if that many."""
    return B * H * max(grid // (B * H), 1) * (Dh + 1)


def launch(how: Fit, lines: Any, lengths: Any, pages: Any, state: Any, parts: Any, begin: int = 0, end: int | None = None) -> None:
    """Runs the lines begin to end in one kernel on torch's current stream; a CUDA graph may capture it.

    lines: (N, WORDS) int64;  lengths: (B) int32;  pages: (B, most) int32;  state: (state_size) int32;  parts: (parts_size) float32

    lengths[b] tokens of row b stand in the cache before this one; < 0: the row is not in use. pages[b] are its pages' numbers.
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
    """What the kernel takes, in its order."""
    first, last, B, most = (np.int32(n) for n in (begin, end, how.B, pages.shape[1]))
    return [lines.data_ptr(), first, last, B, lengths.data_ptr(), pages.data_ptr(), most, state.data_ptr(), parts.data_ptr()]
