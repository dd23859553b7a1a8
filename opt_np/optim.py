"""AdamW, clipping by global norm, and learning-rate schedules, over trees of parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from opt_np.tree import flatten, map_leaves

SCHEDULES = ("linear", "cosine", "constant")
CHUNK = 1 << 16  # elements updated together: AdamW's six passes then stay in the processor's cache


def adamw_init(params: Any) -> dict[str, Any]:
    """Zero moments `m` and `v`, in trees like the parameters', and the step count."""
    return {"step": 0, "m": map_leaves(np.zeros_like, params), "v": map_leaves(np.zeros_like, params)}


def decays(name: str) -> bool:
    """Weight decay applies to matrices; biases and LayerNorms are spared (HF Trainer's rule)."""
    return name.endswith("weight") and "layer_norm" not in name


def adamw_step(params: Any, grads: Any, state: dict[str, Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
               weight_decay: float = 0.0) -> None:  # fmt: skip
    """One step of AdamW, in place (Loshchilov & Hutter, arXiv:1711.05101; equals torch.optim.AdamW).

    p ← p - lr·λ·p, then p ← p - lr·m̂ / (√v̂ + eps) with m̂ = m/(1-β₁ᵗ), v̂ = v/(1-β₂ᵗ).
    """
    state["step"] += 1
    b1, b2 = betas
    step_size, root_correction = lr / (1 - b1 ** state["step"]), math.sqrt(1 - b2 ** state["step"])
    flat_grads, flat_m, flat_v = flatten(grads), flatten(state["m"]), flatten(state["v"])
    for name, p in flatten(params).items():
        shrink = 1 - lr * weight_decay if decays(name) else 1.0
        if not p.flags.c_contiguous:  # its flat form would be a copy, and the step would be lost
            raise ValueError(f"{name} is not C-contiguous; train on np.ascontiguousarray of it")
        arrays = [a.reshape(-1) for a in (p, flat_grads[name], flat_m[name], flat_v[name])]
        for first in range(0, p.size, CHUNK):
            p_, g, m, v = (a[first : first + CHUNK] for a in arrays)
            m *= b1
            m += (1 - b1) * g
            v *= b2
            v += (1 - b2) * (g * g)
            update = np.sqrt(v)
            update *= 1 / root_correction
            update += eps
            np.divide(m, update, out=update)
            update *= step_size
            p_ *= shrink
            p_ -= update


def clip_by_global_norm(grads: Any, max_norm: float) -> float:
    """Scales all gradients, in place, so that their joint norm is at most max_norm; returns the norm before (torch's clip_grad_norm_)."""
    leaves = list(flatten(grads).values())
    norm = math.sqrt(sum(float(np.vdot(g, g)) for g in leaves))
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
