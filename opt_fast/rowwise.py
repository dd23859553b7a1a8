"""Elementwise and row-wise kernels on the CPU: activations, LayerNorm, addition, and the argmax of decoding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from opt_fast.kernel import ARGUMENTS, DONE, TASKS, Kernel, at, claim, float_bits, float_of, floats, inner, int64s, largest, squares, total
from opt_np.ops import LAYER_NORM_EPS

CHUNK = 1 << 14  # elements of a task: each is little work
FUNCTIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_new": 3}


def activation(x: np.ndarray, function: str) -> np.ndarray:
    """relu, gelu or gelu_new.  x: (*N, F)  ->  (*N, F)"""
    x = np.ascontiguousarray(x)
    y = np.empty_like(x)
    ACTIVATION(x, y, x.size, FUNCTIONS[function], tasks=math.ceil(x.size / CHUNK))
    return y


def layer_norm(x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None) -> np.ndarray:
    """x: (*N, D);  weight: (D);  bias: (D)  ->  (*N, D)"""
    x, D = np.ascontiguousarray(x), x.shape[-1]
    y = np.empty_like(x)
    weight = np.ones(D, np.float32) if weight is None else np.ascontiguousarray(weight, np.float32)
    bias = np.zeros(D, np.float32) if bias is None else np.ascontiguousarray(bias, np.float32)
    if weight.shape != (D,) or bias.shape != (D,):
        raise ValueError(f"x is {x.shape}, weight {weight.shape} and bias {bias.shape}; a LayerNorm over {D} numbers wants {(D,)} twice")
    kernel, arguments, tasks = norm_call(x, weight, bias, y, x.size // D, D)
    kernel(*arguments, tasks=tasks)
    return y


def norm_call(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, y: np.ndarray, rows: int, D: int) -> tuple[Kernel, list, int]:
    """LayerNorm's kernel, its arguments, and the number of tasks."""
    some = max(CHUNK // D, 1)
    return NORM, [x, weight, bias, y, rows, D, some, float_bits(LAYER_NORM_EPS)], math.ceil(rows / some)


def _activation(table: Any) -> None:
    a = at(table, ARGUMENTS)
    x, y, size, function = floats(a[0]), floats(a[1]), a[2], a[3]
    first = claim(table, TASKS) * CHUNK
    while first < size:
        for i in range(first, min(first + CHUNK, size)):
            y[i] = activate(x[i], function)
        first = claim(table, TASKS) * CHUNK


def _norm(table: Any) -> None:
    """A task is some rows."""
    a = at(table, ARGUMENTS)
    x, weight, bias, y, rows, D, some, eps = floats(a[0]), floats(a[1]), floats(a[2]), floats(a[3]), a[4], a[5], a[6], float_of(a[7])
    first = claim(table, TASKS) * some
    while first < rows:
        for i in range(first, min(first + some, rows)):
            norm_row(at(x, i * D), weight, bias, at(y, i * D), D, eps)
        claim(table, DONE)
        first = claim(table, TASKS) * some


def _add(table: Any) -> None:
    """x += y, as part of a Program (program_cpu.py); elsewhere NumPy does it."""
    a = at(table, ARGUMENTS)
    x, y, size = floats(a[0]), floats(a[1]), a[2]
    first = claim(table, TASKS) * CHUNK
    while first < size:
        for i in range(first, min(first + CHUNK, size)):
            x[i] += y[i]
        claim(table, DONE)
        first = claim(table, TASKS) * CHUNK


def _pick(table: Any) -> None:
    """The index of the highest score in each row, the first of equal ones; sets state[0] = 1 if it is one of `ends`. A task is a row."""
    a = at(table, ARGUMENTS)
    scores, best, rows, V, ends, count, state = floats(a[0]), int64s(a[1]), a[2], a[3], int64s(a[4]), a[5], int64s(a[6])
    row = claim(table, TASKS)
    while row < rows:
        some, i = at(scores, row * V), 0
        most = largest(some, V)
        while i < V - 1 and some[i] != most:
            i += 1
        best[row] = i
        for e in range(count):
            if i == ends[e]:
                state[0] = 1
        claim(table, DONE)
        row = claim(table, TASKS)


@inner
def activate(x: Any, function: int) -> Any:
    """relu (1), gelu (2) in its exact form x·Φ(x), or gelu_new (3), GPT-2's; NaN stays NaN."""
    if function == 1:
        return np.float32(0) if x < 0 else x
    if function == 3:
        return x * np.float32(0.5) * (math.tanh((x * x * x * np.float32(0.044715) + x) * np.float32(math.sqrt(2 / math.pi))) + np.float32(1))
    return x * np.float32(0.5) * math.erfc(x * np.float32(-math.sqrt(0.5)))


@inner
def centre(x: Any, y: Any, D: int, eps: Any) -> Any:
    """y = x - mean(x); returns the reciprocal standard deviation."""
    mean = total(x, D) / np.float32(D)
    for d in range(D):
        y[d] = x[d] - mean
    return np.float32(1) / math.sqrt(squares(y, D) / np.float32(D) + eps)


@inner
def norm_row(x: Any, weight: Any, bias: Any, y: Any, D: int, eps: Any) -> None:
    """LayerNorm of one row; y may be x itself."""
    rstd = centre(x, y, D, eps)
    for d in range(D):
        y[d] = y[d] * rstd * weight[d] + bias[d]


ACTIVATION, NORM, ADD, PICK = Kernel(_activation), Kernel(_norm), Kernel(_add), Kernel(_pick)
