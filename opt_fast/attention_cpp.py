"""Launches the CUDA C++ attention kernels (kernels/*.cu) over torch tensors, on torch's current stream.

They take float16 and bfloat16 and heads of 64, 80 or 128. For rows of different lengths they take `ranges`, five int32 for each row of the batch:
its first query, its number of queries, its first key, its number of keys, and its past (query t is at its key past + t; Range in kernels/tiles.cuh).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor


def mma(q: Tensor, k: Tensor, v: Tensor, scale: float, ranges: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """kernels/flash_fwd_mma.cu: float16 or bfloat16, Dh 64, 80 or 128.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  ranges: (B, 5)  ->  (B, T, H, Dh), (B, T, H)
    """
    return in_cpp(Mma(q.shape[-1]), q, k, v, scale, ranges)


def sm90(
    q: Tensor, k: Tensor, v: Tensor, scale: float, ranges: Tensor | None = None, ordered: bool = False, polynomial: int = 0
) -> tuple[Tensor, Tensor]:
    """kernels/flash_fwd_sm90.cu, for Hopper: as `mma`; see Sm90."""
    return in_cpp(Sm90(q.shape[-1], ordered, polynomial), q, k, v, scale, ranges)


def in_cpp(kernel: Mma | Sm90, q: Tensor, k: Tensor, v: Tensor, scale: float, ranges: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs one of the two forward kernels on torch's current stream."""
    B, T, H, _ = q.shape
    O, L = results(q)
    if not k.numel():  # a tensor map cannot describe an empty tensor
        return O.zero_(), L.fill_(-math.inf).swapaxes(1, 2)
    if O.numel():
        q, k, v = aligned(q), aligned(k), aligned(v)  # copies are freed after the launch, and so reused after the kernel
        with gpu_of(q):
            run(kernel, q, f"{kernel.name}.cu", kernel.name, kernel.grid(B, T, H), kernel.arguments(q, k, v, O, L, scale, ranges), **kernel.macros)
    return O, L.swapaxes(1, 2)


def results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates O, (B, T, H, Dh), and L, (B, H, T)."""
    B, T, H, _ = q.shape
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty((B, H, T), dtype=torch.float32, device=q.device)


def rowsum(dO: Tensor, O: Tensor) -> Tensor:
    """D = Σ dO·O.  dO: (B, T, H, Dh);  O: (B, T, H, Dh)  ->  (B, H, T)"""
    return (dO.float() * O.float()).sum(-1).swapaxes(1, 2).contiguous()


def gradients(q: Tensor, k: Tensor, ranges: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates dq, (B, T, H, Dh), dk and dv, (B, S, H, Dh): zeros with `ranges`, whose outside kernels do not write, and where no kernel runs."""
    make = torch.empty if ranges is None and q.numel() and k.numel() else torch.zeros
    dq, dk, dv = (make(a.shape, dtype=q.dtype, device=q.device) for a in (q, k, k))
    return dq, dk, dv


def mma_bwd(dO: Tensor, q: Tensor, k: Tensor, v: Tensor, O: Tensor, L: Tensor, scale: float,
            ranges: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """kernels/flash_bwd_mma.cu, its two kernels, for what `mma` takes; no result depends on the order in which blocks run.

    dO: (B, T, H, Dh);  q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  O: (B, T, H, Dh);  L: (B, T, H);  ranges: (B, 5)
    -> (B, T, H, Dh), (B, S, H, Dh), (B, S, H, Dh)
    """
    (B, T, H, _), S, kernel = q.shape, k.shape[1], MmaBwd(q.shape[-1])
    D, (dq, dk, dv) = rowsum(dO, O), gradients(q, k, ranges)
    if q.numel() and k.numel():
        dO, q, k, v, L = aligned(dO), aligned(q), aligned(k), aligned(v), L.swapaxes(1, 2).contiguous()
        of_keys, of_queries = kernel.arguments(dO, q, k, v, L, D, dq, dk, dv, scale, ranges)
        run(kernel, q, "flash_bwd_mma.cu", "flash_bwd_keys", (-(-S // kernel.own), H, B), of_keys)
        run(kernel, q, "flash_bwd_mma.cu", "flash_bwd_queries", (-(-T // kernel.own), H, B), of_queries)
    return dq, dk, dv


def sm90_bwd(dO: Tensor, q: Tensor, k: Tensor, v: Tensor, O: Tensor, L: Tensor, scale: float, ranges: Tensor | None = None,
             deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """kernels/flash_bwd_sm90.cu, for Hopper: as `mma_bwd`, but dq is summed in the order in which blocks run; `deterministic` calls `mma_bwd`.

    dO: (B, T, H, Dh);  q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  O: (B, T, H, Dh);  L: (B, T, H);  ranges: (B, 5)
    -> (B, T, H, Dh), (B, S, H, Dh), (B, S, H, Dh)
    """
    if deterministic:
        return mma_bwd(dO, q, k, v, O, L, scale, ranges)
    (B, T, H, _), S, kernel = q.shape, k.shape[1], Sm90Bwd(q.shape[-1])
    D, (dq, dk, dv) = rowsum(dO, O), gradients(q, k, ranges)
    if q.numel() and k.numel():
        dO, q, k, v, L = aligned(dO), aligned(q), aligned(k), aligned(v), L.swapaxes(1, 2).contiguous()
        sums = torch.zeros((B, H, *kernel.tiles(T)), dtype=torch.float32, device=q.device)
        with gpu_of(q):
            of_keys, of_queries = kernel.arguments(dO, q, k, v, L, D, sums, dq, dk, dv, scale, ranges)
        run(kernel, q, "flash_bwd_sm90.cu", "flash_bwd_sm90", (-(-S // kernel.Bc), H, B), of_keys)
        run(Round(), q, "flash_bwd_sm90.cu", "flash_bwd_sm90_queries", (sums.shape[2], H, B), of_queries)
    return dq, dk, dv


def mma_decode(q: Tensor, k: Tensor, v: Tensor, scale: float, ranges: Tensor | None = None, splits: int | None = None) -> tuple[Tensor, Tensor]:
    """kernels/flash_decode_mma.cu, for what `mma` takes and up to 16 queries; the number of `splits` changes a result by rounding only.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  ranges: (B, 5)  ->  (B, T, H, Dh), (B, T, H)
    """
    from opt_fast.attention_numba import split_count

    (B, T, H, Dh), S, kernel = q.shape, k.shape[1], MmaDecode(q.shape[-1])
    O, L = results(q)
    if O.numel():
        pieces = max(-(-S // kernel.keys), 1)
        places = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count  # blocks that run at a time
        splits = min(splits or split_count(B * H, pieces, places), pieces)
        O_part, L_part = (torch.empty((splits, *shape), dtype=torch.float32, device=q.device) for shape in ((B, T, H, Dh), (B, H, T)))
        q, k, v = aligned(q), aligned(k), aligned(v)
        of_splits, of_combine = kernel.arguments(q, k, v, O, L, O_part, L_part, scale, ranges)
        run(kernel, q, "flash_decode_mma.cu", "flash_decode", (splits, H, B), of_splits)
        if splits > 1:
            run(Combine(Dh), q, "flash_decode_mma.cu", "flash_combine", (T, H, B), of_combine)
    return O, L.swapaxes(1, 2)


def run(kernel: Mma | Sm90 | MmaBwd | Sm90Bwd | Round | MmaDecode | Combine, q: Tensor, file: str, name: str, grid: tuple[int, int, int],
        arguments: list[Any], **macros: int) -> None:  # fmt: skip
    """Compiles (or takes from the cache) and launches a CUDA C++ kernel for q's device, dtype and head size, on torch's current stream."""
    from opt_fast import nvrtc

    with gpu_of(q):
        found = nvrtc.kernel(q.get_device(), file, name, kernel.shared, DH=q.shape[-1], BF16=int(q.dtype == torch.bfloat16), **macros)
        nvrtc.launch(found, q.get_device(), torch.cuda.current_stream().cuda_stream, grid, kernel.threads, kernel.shared, *arguments)


@contextmanager
def gpu_of(q: Tensor) -> Iterator[None]:
    """Makes the tensor's GPU the current one, and its context this thread's; tensor maps need that as well as launches."""
    from opt_fast import nvrtc

    with torch.cuda.device(q.device):
        nvrtc.bind(q.get_device())
        yield


class Mma:
    """How flash_fwd_mma is launched for heads of Dh."""

    name, Br, threads = "flash_fwd_mma", 128, 128

    def __init__(self, Dh: int) -> None:
        self.macros: dict[str, int] = {}
        self.shared = 2 * (self.Br + 4 * (48 if Dh > 80 else 64)) * (Dh + 8)  # a tile of Q, two of K and two of V; rows are padded by 8

    def grid(self, B: int, T: int, H: int) -> tuple[int, int, int]:
        return -(-T // self.Br), H, B

    def arguments(self, q: Tensor, k: Tensor, v: Tensor, O: Tensor, L: Tensor, scale: float, ranges: Tensor | None) -> list[Any]:
        """The kernel's arguments, in its order."""
        pointers = [a.data_ptr() for a in (q, k, v)]
        return [*pointers, *outputs(O, L, ranges), *sizes(q, k, scale), *strides(q), *strides(k), *strides(v), *strides(O)]


class MmaBwd:
    """How the kernels of flash_bwd_mma.cu are launched for heads of Dh."""

    own, threads = 64, 128  # keys (or queries) that a block owns

    def __init__(self, Dh: int) -> None:
        self.shared = 2 * (2 * self.own + 4 * (32 if Dh > 80 else 64)) * (Dh + 8)  # two tiles that it owns, and two stages of the two it walks over

    def arguments(self, dO: Tensor, q: Tensor, k: Tensor, v: Tensor, L: Tensor, D: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float,
                  ranges: Tensor | None) -> tuple[list[Any], list[Any]]:  # fmt: skip
        """The arguments of flash_bwd_keys, and those of flash_bwd_queries."""
        pointers = [a.data_ptr() for a in (dO, q, k, v, L, D)]
        rest = [0 if ranges is None else ranges.data_ptr(), *sizes(q, k, scale), *strides(dO), *strides(q), *strides(k), *strides(v)]
        of_keys = [*pointers, dk.data_ptr(), dv.data_ptr(), *rest, *strides(dk)]
        return of_keys, [*pointers, dq.data_ptr(), *rest, *strides(dq)]


class MmaDecode:
    """How flash_decode, of flash_decode_mma.cu, is launched for heads of Dh."""

    rows, keys, threads = 16, 64, 128  # queries at most; keys that a block's four warps take per step

    def __init__(self, Dh: int) -> None:
        self.shared = 2 * (self.rows + 3 * 2 * self.keys) * (Dh + 8)  # the queries, and three stages of K and V for each warp

    def arguments(self, q: Tensor, k: Tensor, v: Tensor, O: Tensor, L: Tensor, O_part: Tensor, L_part: Tensor, scale: float,
                  ranges: Tensor | None) -> tuple[list[Any], list[Any]]:  # fmt: skip
        """The arguments of flash_decode, and those of flash_combine."""
        splits, (T, S, scale_) = len(O_part), sizes(q, k, scale)
        share = np.int32(-(-S // (splits * self.keys)) * self.keys)  # keys of a split, a multiple of self.keys
        parts = [O_part.data_ptr(), L_part.data_ptr()]
        where = 0 if ranges is None else ranges.data_ptr()
        pointers = [*(a.data_ptr() for a in (q, k, v, O, L)), *parts, where]
        of_splits = [*pointers, T, S, share, scale_, *strides(q), *strides(k), *strides(v), *strides(O)]
        return of_splits, [*parts, O.data_ptr(), L.data_ptr(), np.int32(splits), *strides(O)]


class Combine:
    """How flash_combine, of flash_decode_mma.cu, is launched for heads of Dh."""

    shared = 0

    def __init__(self, Dh: int) -> None:
        self.threads = -(-Dh // 32) * 32


class Sm90:
    """How flash_fwd_sm90 is launched for heads of Dh.

    `ordered`: as many heads as have their K and V in the L2 cache together run side by side, all of them starting with the tiles that see the most
    keys. `polynomial`: n has every n-th group of exponentials computed by multiply-adds; 0 has none.
    """

    name, Bc = "flash_fwd_sm90", 128
    cache = 24 * 2**20  # bytes of keys and values: half of an H200's L2 cache

    def __init__(self, Dh: int, ordered: bool = False, polynomial: int = 0) -> None:
        consumers, stages, slabs = (2, 2, 2) if Dh > 64 else (2 if polynomial else 3, 4, 1)
        self.Br, self.threads = 64 * consumers, 128 * (consumers + 1)
        self.shared = 2 * 64 * slabs * (self.Br + 2 * stages * self.Bc) + 8 * (1 + 4 * stages)  # tiles of rows of 64 elements, and barriers
        self.ordered, self.macros = ordered, {"POLYNOMIAL": polynomial} if polynomial else {}

    def grid(self, B: int, T: int, H: int) -> tuple[int, int, int]:
        return -(-T // self.Br) * H * B, 1, 1

    def together(self, k: Tensor) -> int:
        """How many heads run side by side.  k: (B, S, H, Dh)"""
        B, S, H, Dh = k.shape
        return min(max(self.cache // (4 * max(S, 1) * Dh), 1), B * H) if self.ordered else 1

    def arguments(self, q: Tensor, k: Tensor, v: Tensor, O: Tensor, L: Tensor, scale: float, ranges: Tensor | None) -> list[Any]:
        """The kernel's arguments, in its order."""
        maps = [tensor_map(a, rows) for a, rows in ((q, self.Br), (k, self.Bc), (v, self.Bc))]
        return [*maps, *outputs(O, L, ranges), *sizes(q, k, scale), *strides(O), np.int32(q.shape[2]), np.int32(self.together(k))]


class Sm90Bwd:
    """How flash_bwd_sm90 is launched for heads of Dh."""

    Bc, threads = 128, 384

    def __init__(self, Dh: int) -> None:
        self.Dh, self.Br = Dh, 64 if Dh > 64 else 128
        tiles = (
            -(-Dh // 64) * (2 * self.Bc + 2 * 2 * self.Br) + self.Br // 64 * 2 * self.Bc
        )  # of rows of 64 elements: K, V; Q and dO, two stages each; dscores twice
        self.shared = 2 * 64 * tiles + 4 * 2 * 2 * self.Br + 8 * 5  # and two stages of L and D, and barriers

    def tiles(self, T: int) -> tuple[int, int]:
        """How many tiles T queries make, and how many elements of dQ each has: the shape in which flash_bwd_sm90 sums dQ."""
        return -(-T // self.Br), self.Br * self.Dh

    def arguments(self, dO: Tensor, q: Tensor, k: Tensor, v: Tensor, L: Tensor, D: Tensor, sums: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
                  scale: float, ranges: Tensor | None) -> tuple[list[Any], list[Any]]:  # fmt: skip
        """The arguments of flash_bwd_sm90, and those of flash_bwd_sm90_queries."""
        maps = [tensor_map(a, rows) for a, rows in ((dO, self.Br), (q, self.Br), (k, self.Bc), (v, self.Bc))]
        T, S, scale_ = sizes(q, k, scale)
        where = 0 if ranges is None else ranges.data_ptr()
        of_keys = [*maps, *(a.data_ptr() for a in (L, D, sums, dk, dv)), where, T, S, scale_, *strides(dk)]
        return of_keys, [sums.data_ptr(), dq.data_ptr(), where, T, scale_, *strides(dq)]


class Round:
    """How flash_bwd_sm90_queries, which rounds dQ's sums, is launched."""

    shared, threads = 0, 128


def outputs(O: Tensor, L: Tensor, ranges: Tensor | None) -> list[int]:
    return [O.data_ptr(), L.data_ptr(), 0 if ranges is None else ranges.data_ptr()]


def sizes(q: Tensor, k: Tensor, scale: float) -> list[Any]:
    return [np.int32(q.shape[1]), np.int32(k.shape[1]), np.float32(scale)]


def strides(a: Tensor) -> tuple[Any, ...]:
    """The strides of a row of the batch, a token and a head: the first in 64 bits, the others in 32."""
    return wide_and_narrow(*a.stride()[:3])


@functools.lru_cache(1024)
def wide_and_narrow(row: int, token: int, head: int) -> tuple[Any, ...]:
    return np.int64(row), np.int32(token), np.int32(head)


def tensor_map(a: Tensor, rows: int) -> Any:
    """What describes a tensor to the copy engine (TMA): a copy is `rows` tokens of a head, 64 elements of each, swizzled.  a: (B, N, H, Dh)"""
    return map_of(a.get_device(), a.data_ptr(), tuple(a.shape), a.stride(), rows)


@functools.lru_cache(1024)
def map_of(device: int, address: int, shape: tuple[int, ...], steps: tuple[int, ...], rows: int) -> Any:
    """The map of whatever is at an address; cached, as torch reuses memory, and making a map takes longer than the launch."""
    from cuda.core import TensorMapDescriptorOptions
    from cuda.core.utils import StridedMemoryView

    options = TensorMapDescriptorOptions((1, rows, 1, 64), data_type=np.uint16)  # any 16-bit type: they are only copied
    options.swizzle = type(options.swizzle).SWIZZLE_128B  # the enumeration itself is private
    there = {"shape": shape, "strides": tuple(2 * step for step in steps), "typestr": "<u2", "data": (address, False), "version": 3, "stream": None}
    return StridedMemoryView.from_any_interface(SimpleNamespace(__cuda_array_interface__=there), stream_ptr=-1).as_tensor_map(options=options)


def aligned(a: Tensor) -> Tensor:
    """The tensor, or else a contiguous copy, with rows at multiples of 16 bytes: cp.async and the copy engine read nothing else."""
    steps = a.stride()
    fits = steps[-1] == 1 and all(step % 8 == 0 for step in steps[:-1]) and a.data_ptr() % 16 == 0 and 0 <= steps[1] < 2**24
    return a if fits else a.clone(memory_format=torch.contiguous_format)
