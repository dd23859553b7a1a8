"""Row-wise and elementwise kernels of training on the CPU: the backward passes of LayerNorm and relu, the loss, and AdamW. Formulas are those of
opt_np/ops.py and opt_np/optim.py, against which tests compare them; matrix products are in gemm.py, attention in attention_cpu.py.
"""

from __future__ import annotations

import math
from functools import partial, update_wrapper
from typing import Any

import numpy as np

from opt_fast.attention_cpu import WIDTH, exponentials, maximum
from opt_fast.kernel import ARGUMENTS, TASKS, Kernel, at, claim, float_bits, float_of, floats, inner, int64s, memory, squares, total
from opt_fast.rowwise import CHUNK, centre
from opt_np import ops, optim
from opt_np.ops import LAYER_NORM_EPS

BLOCK = 1 << 12  # elements of a row that are summed at a time: longer float32 sums lose digits


def layer_norm_bwd(dy: np.ndarray, x: np.ndarray, weight: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dy: (*N, D);  x: (*N, D);  weight: (D)  ->  (*N, D), (D), (D)"""
    dy, x, D = np.ascontiguousarray(dy), np.ascontiguousarray(x), x.shape[-1]
    weight = np.ones(D, np.float32) if weight is None else np.ascontiguousarray(weight, np.float32)
    rows, some, dx = x.size // D, max(CHUNK // D, 1), np.empty_like(x)
    sums = np.zeros((math.ceil(rows / some), 2, D), np.float32)  # the gradients of weight and bias, for each task
    NORM_BWD(dy, x, weight, dx, sums, rows, D, some, float_bits(LAYER_NORM_EPS), tasks=len(sums), scratch=2 * D)
    return dx, *sums.sum(0)


def activation_bwd(dy: np.ndarray, x: np.ndarray, function: str) -> np.ndarray:
    """dy: (*N, F);  x: (*N, F)  ->  (*N, F)"""
    if function != "relu":
        return ops.activation_bwd(dy, x, function)
    dy, x = np.ascontiguousarray(dy), np.ascontiguousarray(x)
    dx = np.empty_like(x)
    RELU_BWD(dy, x, dx, x.size, tasks=math.ceil(x.size / CHUNK))
    return dx


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """logits: (N, V);  labels: (N)  ->  loss, (N, V)"""
    (N, V), losses = logits.shape, np.empty(len(labels), np.float32)
    if not logits.flags.c_contiguous:  # the gradient is written over the logits, so a contiguous copy would not do
        return ops.cross_entropy(logits, labels)
    if labels.size and not 0 <= labels.min() <= labels.max() < V:  # the kernel would write out of bounds
        raise IndexError(f"labels are {labels.min()} to {labels.max()}; {V} logits have 0 to {V - 1}")
    some = max(CHUNK // V, 1)
    CROSS_ENTROPY(logits, np.ascontiguousarray(labels, np.int64), losses, N, V, some, tasks=math.ceil(N / some))
    return float(losses.sum(dtype=np.float64)), logits


def adamw_update(p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, betas: tuple[float, float], eps: float, step_size: float,
                 root_correction: float, shrink: float) -> None:  # fmt: skip
    """As optim.adamw_update, to the same bits.  p: (N);  g: (N);  m: (N);  v: (N)"""
    (b1, b2), arrays = betas, (p, g, m, v)
    if any(a.dtype != np.float32 for a in arrays):
        return optim.adamw_update(*arrays, betas, eps, step_size, root_correction, shrink)
    factors = map(float_bits, (b1, 1 - b1, b2, 1 - b2, 1 / root_correction, eps, step_size, shrink))
    ADAMW(*arrays, p.size, *factors, tasks=math.ceil(p.size / CHUNK))


def square_sum(g: np.ndarray) -> float:
    """As optim.square_sum."""
    g = np.ascontiguousarray(g)
    if g.dtype != np.float32:
        return optim.square_sum(g)
    sums = np.empty(math.ceil(g.size / CHUNK), np.float32)
    SQUARES(g, g.size, sums, tasks=len(sums))
    return float(sums.sum(dtype=np.float64))


adamw_step: Any = update_wrapper(partial(optim.adamw_step, update=adamw_update), optim.adamw_step)
clip_by_global_norm: Any = update_wrapper(partial(optim.clip_by_global_norm, square_sum=square_sum), optim.clip_by_global_norm)


# ---- kernels -----------------------------------------------------------------------------------------------------------------------------


def _norm_bwd(table: Any) -> None:
    """A task is some rows; the gradients of weight and bias are summed for each task, and then over the tasks, in order."""
    a = at(table, ARGUMENTS)
    dy, x, weight, dx, sums = floats(a[0]), floats(a[1]), floats(a[2]), floats(a[3]), floats(a[4])
    rows, D, some, eps = a[5], a[6], a[7], float_of(a[8])
    xhat = memory(table)
    task = claim(table, TASKS)
    while task * some < rows:
        for i in range(task * some, min((task + 1) * some, rows)):
            _norm_bwd_row(at(dy, i * D), at(x, i * D), weight, at(dx, i * D), at(sums, 2 * task * D), xhat, D, eps)
        task = claim(table, TASKS)


@inner
def _norm_bwd_row(dy: Any, x: Any, weight: Any, dx: Any, sums: Any, xhat: Any, D: int, eps: Any) -> None:
    products, n = at(xhat, D), np.float32(D)
    rstd = centre(x, xhat, D, eps)
    for d in range(D):
        xhat[d] *= rstd
        sums[d] += dy[d] * xhat[d]
        sums[D + d] += dy[d]
        dx[d] = dy[d] * weight[d]  # for now dx̂
        products[d] = dx[d] * xhat[d]
    mean, along = total(dx, D) / n, total(products, D) / n
    for d in range(D):
        dx[d] = (dx[d] - mean - xhat[d] * along) * rstd


def _relu_bwd(table: Any) -> None:
    a = at(table, ARGUMENTS)
    dy, x, dx, size = floats(a[0]), floats(a[1]), floats(a[2]), a[3]
    first = claim(table, TASKS) * CHUNK
    while first < size:
        for i in range(first, min(first + CHUNK, size)):
            dx[i] = dy[i] * (np.float32(1) if x[i] > 0 else np.float32(0))
        first = claim(table, TASKS) * CHUNK


def _cross_entropy(table: Any) -> None:
    """A task is some rows."""
    a = at(table, ARGUMENTS)
    logits, labels, losses, N, V, some = floats(a[0]), int64s(a[1]), floats(a[2]), a[3], a[4], a[5]
    first = claim(table, TASKS) * some
    while first < N:
        for i in range(first, min(first + some, N)):
            losses[i] = _cross_entropy_row(at(logits, i * V), labels[i], V)
        first = claim(table, TASKS) * some


@inner
def _cross_entropy_row(row: Any, label: int, V: int) -> Any:
    whole, highest, sum_ = V // WIDTH * WIDTH, np.float32(-np.inf), np.float32(0)
    if whole:
        highest = maximum(row, whole)
    for c in range(whole, V):
        highest = max(highest, row[c])
    wanted = row[label] - highest
    for c in range(0, whole, BLOCK):
        sum_ += exponentials(at(row, c), min(BLOCK, whole - c), highest)
    for c in range(whole, V):
        row[c] = math.exp(row[c] - highest)
        sum_ += row[c]
    for c in range(V):
        row[c] /= sum_
    row[label] -= np.float32(1)
    return math.log(sum_) - wanted


def _adamw(table: Any) -> None:
    a = at(table, ARGUMENTS)
    p, g, m, v, size = floats(a[0]), floats(a[1]), floats(a[2]), floats(a[3]), a[4]
    b1, rest1, b2, rest2, correction = float_of(a[5]), float_of(a[6]), float_of(a[7]), float_of(a[8]), float_of(a[9])
    eps, step_size, shrink = float_of(a[10]), float_of(a[11]), float_of(a[12])
    first = claim(table, TASKS) * CHUNK
    while first < size:
        for i in range(first, min(first + CHUNK, size)):
            m[i] = m[i] * b1 + rest1 * g[i]
            v[i] = v[i] * b2 + rest2 * (g[i] * g[i])
            p[i] = p[i] * shrink - m[i] / (math.sqrt(v[i]) * correction + eps) * step_size
        first = claim(table, TASKS) * CHUNK


def _squares(table: Any) -> None:
    a = at(table, ARGUMENTS)
    g, size, sums = floats(a[0]), a[1], floats(a[2])
    task = claim(table, TASKS)
    while task * CHUNK < size:
        sums[task] = squares(at(g, task * CHUNK), min(CHUNK, size - task * CHUNK))
        task = claim(table, TASKS)


NORM_BWD, RELU_BWD, CROSS_ENTROPY, ADAMW, SQUARES = Kernel(_norm_bwd), Kernel(_relu_bwd), Kernel(_cross_entropy), Kernel(_adamw), Kernel(_squares)
