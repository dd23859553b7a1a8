"""Attention over torch tensors: the tiled kernels on a GPU, and the same in plain torch for tensors that are elsewhere, with autograd through both.

On a GPU, float16 and bfloat16 with heads of 64, 80 or 128 go through the tensor cores (kernels/flash_fwd_mma.cu); what these do not take, float32
among it, and masks with holes go through the Numba kernels (attention_numba.py). RUNGS names each of the ladder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
TILED = tuple(range(16, 129, 16))  # head sizes that Numba's tiles take
MOST = 65535  # blocks in the second and third dimension of a grid


class Seen(NamedTuple):
    """Which keys a batch may see, on its device."""

    visible: Tensor  # (B, S) bool
    ranges: Tensor | None  # (B, 5) int32, as the kernels read them, see ranges_of; None where a row has holes


def attention_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, layout: Any = None) -> tuple[Tensor, Tensor]:
    """As opt_np.ops.attention_lse; autograd goes through the first result.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh)  ->  (B, T, H, Dh), (B, T, H) of float32 at least

    Raises ValueError for shapes, dtypes or devices that do not fit each other, and for a scale that is not positive. Backward: attention_bwd.
    """
    check(q, k, v, scale)
    visible = getattr(layout, "visible", None)
    seen = None if visible is None else on_device(visible, q.shape[1], q.device)
    return Attention.apply(q, k, v, scale, seen)


def attention_bwd(dO: Tensor, q: Tensor, k: Tensor, v: Tensor, O: Tensor, L: Tensor, scale: float,
                  layout: Any = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As opt_np.ops.attention_bwd.

    dO: (B, T, H, Dh);  q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  O: (B, T, H, Dh);  L: (B, T, H)
    -> (B, T, H, Dh), (B, S, H, Dh), (B, S, H, Dh)
    """
    visible = getattr(layout, "visible", None)
    return compute_bwd(dO, q, k, v, O, L, scale, None if visible is None else on_device(visible, q.shape[1], q.device))


class Attention(torch.autograd.Function):
    """The forward and the backward pass, as autograd wants them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Seen | None) -> tuple[Tensor, Tensor]:
        O, L = compute(q, k, v, scale, seen)
        ctx.save_for_backward(q, k, v, O, L)
        ctx.scale, ctx.seen = scale, seen
        ctx.mark_non_differentiable(L)
        return O, L

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dO: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, O, L = ctx.saved_tensors
        return *compute_bwd(dO, q, k, v, O, L, ctx.scale, ctx.seen), None, None


def compute(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Seen | None) -> tuple[Tensor, Tensor]:
    """By the kernel that suits these tensors.  ->  (B, T, H, Dh), (B, T, H)"""
    if not on_gpu(q):
        return plain(q, k, v, scale, seen)
    few = q.shape[1] <= MmaDecode.rows
    if not RUNGS["mma"].refuses(q) and (seen is None or seen.ranges is not None):
        return (mma_decode if few else mma)(q, k, v, scale, None if seen is None else seen.ranges)
    from opt_fast import attention_numba

    return through_numba(attention_numba.decode if few else attention_numba.v3, q, k, v, scale, seen)


def compute_bwd(dO: Tensor, q: Tensor, k: Tensor, v: Tensor, O: Tensor, L: Tensor, scale: float, seen: Seen | None) -> tuple[Tensor, Tensor, Tensor]:
    """As attention_bwd, by the kernel that suits these tensors."""
    if not on_gpu(q):
        return plain_bwd(dO, q, k, v, O, L, scale, seen)
    if not RUNGS["mma"].refuses(q) and (seen is None or seen.ranges is not None):
        return mma_bwd(dO, q, k, v, O, L, scale, None if seen is None else seen.ranges)
    from opt_fast import attention_numba

    visible = None if seen is None else seen.visible
    with torch.cuda.device(q.device):
        dq, dk, dv = attention_numba.v3_bwd(known(dO), known(q), known(k), known(v), known(O), L, scale, visible)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def on_gpu(q: Tensor) -> bool:
    """Whether there is a kernel for these tensors."""
    return q.is_cuda and q.dtype != torch.float64 and q.shape[-1] in TILED


def check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Raises ValueError for arguments that no kernel may be given."""
    B, _, H, Dh = q.shape
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (B, H, Dh):
        raise ValueError(f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; they are (B, T, H, Dh), (B, S, H, Dh) and (B, S, H, Dh)")
    if len({(a.dtype, a.device) for a in (q, k, v)}) > 1:
        raise ValueError(f"q, k and v are {', '.join(f'{a.dtype} on {a.device}' for a in (q, k, v))}; attention wants one dtype on one device")
    if max(B, H) > MOST:
        raise ValueError(f"{B} rows with {H} heads; a GPU's grid has room for {MOST} of each: compute in parts")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be positive, and is Dh**-0.5 in OPT")


# ---- which keys are seen -----------------------------------------------------------------------------------------------------------------

_last: tuple[np.ndarray, int, torch.device, Seen] | None = None


def on_device(visible: np.ndarray, T: int, device: torch.device) -> Seen:
    """A layout's mask where the kernels want it; every layer of a pass asks for the same, so the last answer is kept.  visible: (B, S)"""
    global _last
    last = _last  # read once: another thread may put its own there
    if last is None or last[1:3] != (T, device) or not np.array_equal(last[0], visible):
        ranges = ranges_of(visible, T)
        seen = Seen(torch.tensor(visible, device=device), None if ranges is None else torch.tensor(ranges, device=device))
        last = _last = visible.copy(), T, device, seen
    return last[3]


def ranges_of(visible: np.ndarray, T: int) -> np.ndarray | None:
    """For each row [0, T, its first key, its keys, the key before which its first query stands]; None where hidden keys stand between visible ones.

    visible: (B, S)  ->  (B, 5) int32
    """
    S = visible.shape[1]
    keys, first = visible.sum(1), visible.argmax(1)
    if (visible & ~((np.arange(S) >= first[:, None]) & (np.arange(S) < (first + keys)[:, None]))).any():
        return None
    return np.stack([np.zeros_like(keys), np.full_like(keys, T), first, keys, S - T - first], axis=1).astype(np.int32)


# ---- the kernels -------------------------------------------------------------------------------------------------------------------------


def mma(q: Tensor, k: Tensor, v: Tensor, scale: float, ranges: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """kernels/flash_fwd_mma.cu: float16 or bfloat16, Dh 64, 80 or 128.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  ranges: (B, 5)  ->  (B, T, H, Dh), (B, T, H)
    """
    return in_cpp(Mma(q.shape[-1]), q, k, v, scale, ranges)


def sm90(q: Tensor, k: Tensor, v: Tensor, scale: float, ranges: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """kernels/flash_fwd_sm90.cu, for Hopper: as `mma`."""
    return in_cpp(Sm90(q.shape[-1]), q, k, v, scale, ranges)


def in_cpp(kernel: Mma | Sm90, q: Tensor, k: Tensor, v: Tensor, scale: float, ranges: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs a forward kernel of CUDA C++ on torch's current stream."""
    B, T, H, Dh = q.shape
    O, L = torch.empty((B, T, H, Dh), dtype=q.dtype, device=q.device), torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if O.numel():
        q, k, v = aligned(q), aligned(k), aligned(v)  # a copy is freed only after the kernel is on the stream
        run(kernel, q, f"{kernel.name}.cu", kernel.name, (-(-T // kernel.Br), H, B), kernel.arguments(q, k, v, O, L, scale, ranges))
    return O, L.swapaxes(1, 2)


def mma_bwd(dO: Tensor, q: Tensor, k: Tensor, v: Tensor, O: Tensor, L: Tensor, scale: float,
            ranges: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """kernels/flash_bwd_mma.cu, its two kernels, for what `mma` takes; no number depends on the order in which blocks run.

    dO: (B, T, H, Dh);  q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  O: (B, T, H, Dh);  L: (B, T, H);  ranges: (B, 5)
    -> (B, T, H, Dh), (B, S, H, Dh), (B, S, H, Dh)
    """
    (B, T, H, Dh), S, kernel = q.shape, k.shape[1], MmaBwd(q.shape[-1])
    D = (dO.float() * O.float()).sum(-1).swapaxes(1, 2).contiguous()  # (B, H, T)
    make = torch.empty if ranges is None else torch.zeros  # the kernels leave alone what lies outside
    dq, dk, dv = (make(shape, dtype=q.dtype, device=q.device) for shape in ((B, T, H, Dh), (B, S, H, Dh), (B, S, H, Dh)))
    if q.numel() and k.numel():
        dO, q, k, v, L = aligned(dO), aligned(q), aligned(k), aligned(v), L.swapaxes(1, 2).contiguous()
        of_keys, of_queries = kernel.arguments(dO, q, k, v, L, D, dq, dk, dv, scale, ranges)
        run(kernel, q, "flash_bwd_mma.cu", "flash_bwd_keys", (-(-S // kernel.own), H, B), of_keys)
        run(kernel, q, "flash_bwd_mma.cu", "flash_bwd_queries", (-(-T // kernel.own), H, B), of_queries)
    return dq, dk, dv


def mma_decode(q: Tensor, k: Tensor, v: Tensor, scale: float, ranges: Tensor | None = None, splits: int | None = None) -> tuple[Tensor, Tensor]:
    """kernels/flash_decode_mma.cu, for what `mma` takes and up to 16 queries; `splits` of the keys change a result by rounding only.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  ranges: (B, 5)  ->  (B, T, H, Dh), (B, T, H)
    """
    from opt_fast.attention_numba import split_count

    (B, T, H, Dh), S, kernel = q.shape, k.shape[1], MmaDecode(q.shape[-1])
    O, L = torch.empty((B, T, H, Dh), dtype=q.dtype, device=q.device), torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if O.numel():
        pieces = max(-(-S // kernel.keys), 1)
        places = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count  # blocks at a time
        splits = min(splits or split_count(B * H, pieces, places), pieces)
        O_part, L_part = (torch.empty((splits, *shape), dtype=torch.float32, device=q.device) for shape in ((B, T, H, Dh), (B, H, T)))
        q, k, v = aligned(q), aligned(k), aligned(v)
        of_splits, of_combine = kernel.arguments(q, k, v, O, L, O_part, L_part, scale, ranges)
        run(kernel, q, "flash_decode_mma.cu", "flash_decode", (splits, H, B), of_splits)
        if splits > 1:
            run(Combine(Dh), q, "flash_decode_mma.cu", "flash_combine", (T, H, B), of_combine)
    return O, L.swapaxes(1, 2)


def run(kernel: Mma | Sm90 | MmaBwd | MmaDecode | Combine, q: Tensor, file: str, name: str, grid: tuple[int, int, int], arguments: list[Any]) -> None:
    """A kernel of CUDA C++ for tensors such as q, on torch's current stream."""
    from opt_fast import nvrtc

    with torch.cuda.device(q.device):
        found = nvrtc.kernel(q.get_device(), file, name, kernel.shared, DH=q.shape[-1], BF16=int(q.dtype == torch.bfloat16))
        nvrtc.launch(found, torch.cuda.current_stream().cuda_stream, grid, kernel.threads, kernel.shared, *arguments)


class Mma:
    """How flash_fwd_mma is launched for heads of Dh."""

    name, Br, threads = "flash_fwd_mma", 128, 128

    def __init__(self, Dh: int) -> None:
        self.shared = 2 * (self.Br + 4 * (48 if Dh > 80 else 64)) * (Dh + 8)  # a tile of Q, and two each of K and V; rows are 8 numbers longer

    def arguments(self, q: Tensor, k: Tensor, v: Tensor, O: Tensor, L: Tensor, scale: float, ranges: Tensor | None) -> list[Any]:
        """What the kernel takes, in its order."""
        pointers = [a.data_ptr() for a in (q, k, v)]
        return [*pointers, *outputs(O, L, ranges), *sizes(q, k, scale), *strides(q), *strides(k), *strides(v), *strides(O)]


class MmaBwd:
    """How the kernels of flash_bwd_mma.cu are launched for heads of Dh."""

    own, threads = 64, 128  # rows of a block

    def __init__(self, Dh: int) -> None:
        self.shared = 2 * (2 * self.own + 4 * (32 if Dh > 80 else 64)) * (Dh + 8)  # two tiles that it owns, and two each of those it walks over

    def arguments(self, dO: Tensor, q: Tensor, k: Tensor, v: Tensor, L: Tensor, D: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float,
                  ranges: Tensor | None) -> tuple[list[Any], list[Any]]:  # fmt: skip
        """What flash_bwd_keys takes, and what flash_bwd_queries."""
        pointers = [a.data_ptr() for a in (dO, q, k, v, L, D)]
        rest = [0 if ranges is None else ranges.data_ptr(), *sizes(q, k, scale), *strides(dO), *strides(q), *strides(k), *strides(v)]
        of_keys = [*pointers, dk.data_ptr(), dv.data_ptr(), *rest, *strides(dk)]
        return of_keys, [*pointers, dq.data_ptr(), *rest, *strides(dq)]


class MmaDecode:
    """How flash_decode, of flash_decode_mma.cu, is launched for heads of Dh."""

    rows, keys, threads = 16, 64, 128  # queries at most; keys that the warps of a block look at together

    def __init__(self, Dh: int) -> None:
        self.shared = 2 * (self.rows + 3 * 2 * self.keys) * (Dh + 8)  # the queries, and three places for tiles of K and V for each warp

    def arguments(self, q: Tensor, k: Tensor, v: Tensor, O: Tensor, L: Tensor, O_part: Tensor, L_part: Tensor, scale: float,
                  ranges: Tensor | None) -> tuple[list[Any], list[Any]]:  # fmt: skip
        """What flash_decode takes, and what flash_combine."""
        splits, (T, S, scale_) = len(O_part), sizes(q, k, scale)
        share = np.int32(-(-S // (splits * self.keys)) * self.keys)  # keys of a split, in whole tiles
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
    """How flash_fwd_sm90 is launched for heads of Dh."""

    name, Bc = "flash_fwd_sm90", 128

    def __init__(self, Dh: int) -> None:
        consumers, stages, slabs = (2, 2, 2) if Dh > 64 else (3, 4, 1)
        self.Br, self.threads = 64 * consumers, 128 * (consumers + 1)
        self.shared = 2 * 64 * slabs * (self.Br + 2 * stages * self.Bc) + 8 * (1 + 4 * stages)  # tiles of rows of 64 numbers, and barriers

    def arguments(self, q: Tensor, k: Tensor, v: Tensor, O: Tensor, L: Tensor, scale: float, ranges: Tensor | None) -> list[Any]:
        """What the kernel takes, in its order."""
        maps = [tensor_map(a, rows) for a, rows in ((q, self.Br), (k, self.Bc), (v, self.Bc))]
        return [*maps, *outputs(O, L, ranges), *sizes(q, k, scale), *strides(O)]


def outputs(O: Tensor, L: Tensor, ranges: Tensor | None) -> list[int]:
    return [O.data_ptr(), L.data_ptr(), 0 if ranges is None else ranges.data_ptr()]


def sizes(q: Tensor, k: Tensor, scale: float) -> list[Any]:
    return [np.int32(q.shape[1]), np.int32(k.shape[1]), np.float32(scale)]


def strides(a: Tensor) -> list[Any]:
    """Of a row of the batch, a token and a head; the first has 64 bits, the others 32."""
    return [width(step) for width, step in zip((np.int64, np.int32, np.int32), a.stride()[:3], strict=True)]


def tensor_map(a: Tensor, rows: int) -> Any:
    """What the copy engine is told of a tensor: it brings `rows` tokens of a head, 64 numbers of each, swizzled.  a: (B, N, H, Dh)"""
    from cuda.core import TensorMapDescriptorOptions
    from cuda.core.utils import StridedMemoryView

    options = TensorMapDescriptorOptions((1, rows, 1, 64), data_type=np.uint16)  # 16 bits of whatever: they are only moved
    options.swizzle = type(options.swizzle).SWIZZLE_128B  # the enumeration itself is private
    return StridedMemoryView.from_any_interface(a.detach().view(torch.int16), stream_ptr=-1).as_tensor_map(options=options)


def aligned(a: Tensor) -> Tensor:
    """The tensor, or a copy, whose rows begin at multiples of 16 bytes: cp.async reads nothing else."""
    steps = a.stride()
    fits = steps[-1] == 1 and all(step % 8 == 0 for step in steps[:-1]) and a.data_ptr() % 16 == 0 and 0 <= steps[1] < 2**24
    return a if fits else a.clone(memory_format=torch.contiguous_format)


def known(a: Tensor) -> Tensor:
    """The tensor in a dtype that Numba's kernels read."""
    return a.float() if a.dtype == torch.bfloat16 else a


def through_numba(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Seen | None) -> tuple[Tensor, Tensor]:
    with torch.cuda.device(q.device):
        O, L = kernel(known(q), known(k), known(v), scale, None if seen is None else seen.visible)
    return O.to(q.dtype), L


@dataclass(frozen=True)
class Rung:
    """One kernel of the ladder: called with q, k, v and scale it returns O and L."""

    run: Callable[..., tuple[Tensor, Tensor]]
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...] = ()  # () for any
    capability: tuple[int, int] = (0, 0)  # at least
    generation: int = 0  # 0 for any

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return self.run(q, k, v, scale)

    def refuses(self, q: Tensor) -> str:
        """Why it cannot compute with these tensors; nothing if it can."""
        if not q.is_cuda:
            return f"it computes on a GPU, and these tensors are on {q.device}"
        if q.dtype not in self.dtypes:
            return f"it computes in {' and '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, and these tensors are {q.dtype}"
        if self.head_dims and q.shape[-1] not in self.head_dims:
            return f"it takes heads of {', '.join(map(str, self.head_dims))}, and these are of {q.shape[-1]}"
        if (found := torch.cuda.get_device_capability(q.device)) < self.capability:
            have, need = (".".join(map(str, version)) for version in (found, self.capability))
            return f"it needs compute capability {need}, and {torch.cuda.get_device_name(q.device)} has {have}"
        if self.generation and found[0] != self.generation:
            return f"it is for compute capability {self.generation}, and {torch.cuda.get_device_name(q.device)} has {found[0]}.{found[1]}"
        return ""


def numba_rung(name: str) -> Rung:
    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        from opt_fast import attention_numba

        return getattr(attention_numba, name)(q, k, v, scale)

    return Rung(run, (torch.float32, torch.float16), () if name == "v1" else TILED)


RUNGS = {
    "numba v1": numba_rung("v1"),
    "numba v2": numba_rung("v2"),
    "numba v3": numba_rung("v3"),
    "mma": Rung(mma, HALVES, (64, 80, 128), (8, 0)),
    "sm90": Rung(sm90, HALVES, (64, 80, 128), (9, 0), 9),
}


# ---- the same in plain torch -------------------------------------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Seen | None = None) -> tuple[Tensor, Tensor]:
    """opt_np.ops.attention_lse in torch, scores whole, in float32 at least: for tensors that are not on a GPU, and as a reference.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh)  ->  (B, T, H, Dh), (B, T, H)
    """
    s = scores(q, k, scale, seen)
    L = torch.logsumexp(s, -1)  # (B, H, T)
    O = probabilities(s) @ wide(v).swapaxes(1, 2)
    return O.swapaxes(1, 2).to(q.dtype), L.swapaxes(1, 2)


def plain_bwd(dO: Tensor, q: Tensor, k: Tensor, v: Tensor, O: Tensor, L: Tensor, scale: float,
              seen: Seen | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """opt_np.ops.attention_bwd in torch, as `plain`."""
    P = torch.exp(scores(q, k, scale, seen) - L.clamp(min=torch.finfo(L.dtype).min).swapaxes(1, 2)[..., None])
    dO, O, q_, k_, v_ = (wide(a).swapaxes(1, 2) for a in (dO, O, q, k, v))  # (B, T, H, Dh) -> (B, H, T, Dh)
    dscores = P * (dO @ v_.swapaxes(2, 3) - (dO * O).sum(-1, keepdim=True)) * scale
    found = (dscores @ k_, dscores.swapaxes(2, 3) @ q_, P.swapaxes(2, 3) @ dO)
    dq, dk, dv = (a.swapaxes(1, 2).to(q.dtype) for a in found)
    return dq, dk, dv


def scores(q: Tensor, k: Tensor, scale: float, seen: Seen | None = None) -> Tensor:
    """As opt_np.ops.attention_scores, in float32 at least.  q: (B, T, H, Dh);  k: (B, S, H, Dh)  ->  (B, H, T, S)"""
    T, S = q.shape[1], k.shape[1]
    found = (wide(q) * scale).swapaxes(1, 2) @ wide(k).permute(0, 2, 3, 1)
    hidden = torch.ones((T, S), dtype=torch.bool, device=q.device).triu(S - T + 1)
    if seen is not None:
        hidden = hidden | ~seen.visible[:, None, None]  # (B, 1, T, S)
    return found.masked_fill(hidden, -math.inf)


def probabilities(s: Tensor) -> Tensor:
    """As opt_np.ops.softmax: a row of -inf becomes zeros.  s: (*N, S)  ->  (*N, S)"""
    P = torch.exp(s - s.amax(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).min))
    return P / P.sum(-1, keepdim=True).clamp(min=1)


def wide(a: Tensor) -> Tensor:
    """In float32, if it was in fewer bits."""
    return a.float() if a.dtype in HALVES else a
