"""Attention over torch tensors: the tiled kernels on a GPU, plain torch for tensors elsewhere, and autograd through both.

On a GPU, float16 and bfloat16 with heads of 64, 80 or 128 use the tensor cores (kernels/flash_fwd_mma.cu); what these do not take (float32, other
multiples of 16 up to 128, older GPUs, masks with holes) uses the Numba kernels (attention_numba.py). RUNGS names the kernels of the ladder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opt_fast.attention_cpp import MmaDecode, mma, mma_bwd, mma_decode, sm90

HALVES = (torch.float16, torch.bfloat16)
TILED = tuple(range(16, 129, 16))  # head sizes that Numba's tiles take
MOST = 65535  # blocks in a grid's second, and in its third dimension


class Seen(NamedTuple):
    """Which keys a batch may see, on its device."""

    visible: Tensor  # (B, S) bool
    ranges: Tensor | None  # (B, 5) int32, as the kernels read them, see ranges_of; None where a row has holes


def attention_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, layout: Any = None) -> tuple[Tensor, Tensor]:
    """As opt_np.ops.attention_lse; autograd differentiates the first result only.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh)  ->  (B, T, H, Dh), (B, T, H) of float32 at least

    Raises ValueError for shapes, dtypes or devices that do not match, and for a scale that is not positive. Backward: attention_bwd.
    """
    check(q, k, v, scale)
    return Attention.apply(q, k, v, scale, seen_of(layout, q))


def attention_bwd(dO: Tensor, q: Tensor, k: Tensor, v: Tensor, O: Tensor, L: Tensor, scale: float,
                  layout: Any = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As opt_np.ops.attention_bwd.

    dO: (B, T, H, Dh);  q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  O: (B, T, H, Dh);  L: (B, T, H)
    -> (B, T, H, Dh), (B, S, H, Dh), (B, S, H, Dh)
    """
    return compute_bwd(dO, q, k, v, O, L, scale, seen_of(layout, q))


class Attention(torch.autograd.Function):
    """The forward and the backward pass in the form that autograd needs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Seen | None) -> tuple[Tensor, Tensor]:
        O, L = compute(q, k, v, scale, seen)
        ctx.save_for_backward(q, k, v, O, L)
        ctx.scale, ctx.seen = scale, seen
        ctx.mark_non_differentiable(L)
        return O, L

    @staticmethod
    def backward(ctx: Any, dO: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        first_derivatives_only()
        q, k, v, O, L = ctx.saved_tensors
        return *compute_bwd(dO, q, k, v, O, L, ctx.scale, ctx.seen), None, None


def first_derivatives_only() -> None:
    """Raises RuntimeError where a backward pass is itself to be differentiated: autograd would treat the kernels' results as constants."""
    if torch.is_grad_enabled():  # in a backward pass, only with create_graph=True
        raise RuntimeError("attention and losses have no second derivatives on backend 'cuda': leave out create_graph=True")


def compute(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Seen | None) -> tuple[Tensor, Tensor]:
    """Attention by the kernel that suits these tensors.  ->  (B, T, H, Dh), (B, T, H)"""
    if not on_gpu(q):
        return plain(q, k, v, scale, seen)
    few = q.shape[1] <= MmaDecode.rows
    if on_tensor_cores(q, seen):
        return (mma_decode if few else mma)(q, k, v, scale, None if seen is None else seen.ranges)
    from opt_fast import attention_numba

    return through_numba(attention_numba.decode if few else attention_numba.v3, q, k, v, scale, seen)


def compute_bwd(dO: Tensor, q: Tensor, k: Tensor, v: Tensor, O: Tensor, L: Tensor, scale: float, seen: Seen | None) -> tuple[Tensor, Tensor, Tensor]:
    """As attention_bwd, by the kernel that suits these tensors."""
    if not on_gpu(q):
        return plain_bwd(dO, q, k, v, O, L, scale, seen)
    if on_tensor_cores(q, seen):
        return mma_bwd(dO, q, k, v, O, L, scale, None if seen is None else seen.ranges)
    from opt_fast import attention_numba

    visible = None if seen is None else seen.visible
    with torch.cuda.device(q.device):
        dq, dk, dv = attention_numba.v3_bwd(known(dO), known(q), known(k), known(v), known(O), L, scale, visible)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def on_gpu(q: Tensor) -> bool:
    """Whether there is a GPU kernel for these tensors."""
    return q.is_cuda and q.dtype != torch.float64 and q.shape[-1] in TILED


def on_tensor_cores(q: Tensor, seen: Seen | None) -> bool:
    """Whether the CUDA C++ kernels take these tensors and this mask."""
    return not RUNGS["mma"].refuses(q) and (seen is None or seen.ranges is not None)


def check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Raises ValueError for arguments that no kernel accepts."""
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


def seen_of(layout: Any, q: Tensor) -> Seen | None:
    """A layout's mask for these queries, on their device; None where every key is visible."""
    visible = getattr(layout, "visible", None)
    return None if visible is None else on_device(visible, q.shape[1], q.device)


def on_device(visible: np.ndarray, T: int, device: torch.device) -> Seen:
    """A layout's mask on the device; all layers of a pass need the same, so the last result is cached.  visible: (B, S)"""
    global _last
    last = _last  # read once: another thread may replace it
    if last is None or last[1:3] != (T, device) or not np.array_equal(last[0], visible):
        ranges = ranges_of(visible, T)
        seen = Seen(torch.tensor(visible, device=device), None if ranges is None else torch.tensor(ranges, device=device))
        last = _last = visible.copy(), T, device, seen
    return last[3]


def ranges_of(visible: np.ndarray, T: int) -> np.ndarray | None:
    """Five numbers per row (Range in tiles.cuh): 0, T, its first key, its keys, its past; None where a hidden key is between visible ones.

    visible: (B, S)  ->  (B, 5) int32
    """
    S = visible.shape[1]
    keys, first = visible.sum(1), visible.argmax(1)
    if (visible & ~((np.arange(S) >= first[:, None]) & (np.arange(S) < (first + keys)[:, None]))).any():
        return None
    return np.stack([np.zeros_like(keys), np.full_like(keys, T), first, keys, S - T - first], axis=1).astype(np.int32)


# ---- the kernels -------------------------------------------------------------------------------------------------------------------------


def known(a: Tensor) -> Tensor:
    """The tensor in a dtype that Numba's kernels read: bfloat16 becomes float32."""
    return a.float() if a.dtype == torch.bfloat16 else a


def through_numba(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Seen | None) -> tuple[Tensor, Tensor]:
    with torch.cuda.device(q.device):
        O, L = kernel(known(q), known(k), known(v), scale, None if seen is None else seen.visible)
    return O.to(q.dtype), L


@dataclass(frozen=True)
class Rung:
    """One kernel of the ladder; called with q, k, v and scale, it returns O and L."""

    run: Callable[..., tuple[Tensor, Tensor]]
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...] = ()  # () for any
    capability: tuple[int, int] = (0, 0)  # compute capability, at least
    generation: int = 0  # the capability's major number, exactly; 0 for any

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return self.run(q, k, v, scale)

    def refuses(self, q: Tensor) -> str:
        """Why it cannot run on these tensors; an empty string if it can."""
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
    "sm90 order": Rung(partial(sm90, ordered=True), HALVES, (64, 80, 128), (9, 0), 9),
    "sm90 exp": Rung(partial(sm90, ordered=True, polynomial=4), HALVES, (64, 80, 128), (9, 0), 9),
}


# ---- plain torch -------------------------------------------------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Seen | None = None) -> tuple[Tensor, Tensor]:
    """opt_np.ops.attention_lse in torch, untiled, in float32 at least: for tensors that no kernel takes, and as a reference.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh)  ->  (B, T, H, Dh), (B, T, H)
    """
    s = scores(q, k, scale, seen)
    L = torch.logsumexp(s, -1)  # (B, H, T)
    O = probabilities(s) @ wide(v).swapaxes(1, 2)
    return O.swapaxes(1, 2).to(q.dtype), L.swapaxes(1, 2)


def plain_bwd(dO: Tensor, q: Tensor, k: Tensor, v: Tensor, O: Tensor, L: Tensor, scale: float,
              seen: Seen | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """opt_np.ops.attention_bwd in torch, untiled, in float32 at least."""
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
    """Float16 and bfloat16 as float32; other dtypes unchanged."""
    return a.float() if a.dtype in HALVES else a
