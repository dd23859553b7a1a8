"""AdamW, clipping by global norm, and learning-rate schedules, over trees of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from opt_np.tree import flatten, map_leaves

SCHEDULES = ("linear", "cosine", "constant")
CHUNK = 1 << 16  # elements updated together: AdamW's six passes then stay in the processor's cache


def adamw_init(params: Any) -> dict[str, Any]:
    """Zero moments `m` and `v`, in trees like the parameters', and the step count."""
    return {"step": 0, "m": map_leaves(np.zeros_like, params), "v": map_leaves(np.zeros_like, params)}


def decays(name: str) -> bool:
    """Whether weight decay applies: to matrices, but not to biases and LayerNorms (HF Trainer's rule)."""
    return name.endswith("weight") and "layer_norm" not in name


def adamw_update(p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, betas: tuple[float, float], eps: float, step_size: float,
                 root_correction: float, shrink: float) -> None:  # fmt: skip
    """One parameter's step, in place: p, its gradient g and its moments m and v, all flattened.  p: (N);  g: (N);  m: (N);  v: (N)"""
    b1, b2 = betas
    for first in range(0, p.size, CHUNK):
        p_, g_, m_, v_ = (a[first : first + CHUNK] for a in (p, g, m, v))
        m_ *= b1
        m_ += (1 - b1) * g_
        v_ *= b2
        v_ += (1 - b2) * (g_ * g_)
        update = np.sqrt(v_)
        update *= 1 / root_correction
        update += eps
        np.divide(m_, update, out=update)
        update *= step_size
        p_ *= shrink
        p_ -= update


def adamw_step(params: Any, grads: Any, state: dict[str, Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
               weight_decay: float = 0.0, update: Callable[..., None] = adamw_update) -> None:  # fmt: skip
    """One step of AdamW, in place (Loshchilov & Hutter, arXiv:1711.05101; equals torch.optim.AdamW).

    p ← p - lr·λ·p, then p ← p - lr·m̂ / (√v̂ + eps) with m̂ = m/(1-β₁ᵗ), v̂ = v/(1-β₂ᵗ). Raises ValueError for a parameter that is not C-contiguous.
    """
    state["step"] += 1
    step_size, root_correction = lr / (1 - betas[0] ** state["step"]), math.sqrt(1 - betas[1] ** state["step"])
    flat_grads, flat_m, flat_v = flatten(grads), flatten(state["m"]), flatten(state["v"])
    for name, p in flatten(params).items():
        shrink = 1 - lr * weight_decay if decays(name) else 1.0
        if not p.flags.c_contiguous:  # its flat form would be a copy, and the step would be lost
            raise ValueError(f"{name} is not C-contiguous; train on np.ascontiguousarray of it")
        update(*(a.reshape(-1) for a in (p, flat_grads[name], flat_m[name], flat_v[name])), betas, eps, step_size, root_correction, shrink)


def square_sum(g: np.ndarray) -> float:
    """The sum of a gradient's squares."""
    return float(np.vdot(g, g))


def clip_by_global_norm(grads: Any, max_norm: float, square_sum: Callable[[np.ndarray], float] = square_sum) -> float:
    """Scales all gradients, in place, so that their joint norm is at most max_norm; returns the norm before clipping (torch's clip_grad_norm_)."""
    leaves = list(flatten(grads).values())
    norm = math.sqrt(sum(map(square_sum, leaves)))
    coefficient = max_norm / (norm + 1e-6)
    if coefficient < 1:
        for g in leaves:
            g *= coefficient
    return norm


def learning_rate(step: int, steps: int, peak: float, warmup: int = 0, schedule: str = "cosine", floor: float = 0.0) -> float:
    """Linear warm-up to `peak`, then "linear" or "cosine" decay that would reach `floor`·peak at step `steps`; "constant" stays."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is none of {', '.join(SCHEDULES)}")
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    shares = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
    return peak * (floor + (1 - floor) * shares[schedule])
