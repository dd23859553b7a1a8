"""The operations of opt_np.ops on the CPU's vector units: the same names, arguments and meaning, in float32, with Numba beneath.

Same bits: a row's numbers do not depend on the batch around it, on padding, on the number of threads, or on how a prompt was cut into the cache,
as long as backend, dtype and machine stay the same. Weights may be stored in float32, float16 or bfloat16. `pack` lays the matrices out once, after
loading; one that is not packed is packed at each use, as training wants it.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
from numba import njit

from opt_fast import attention_cpu, gemm
from opt_fast.gemm import FUNCTIONS, Packed, activate
from opt_fast.kernel import ARGUMENTS, TASKS, Kernel, at, claim, floats, squares, total
from opt_np import model
from opt_np.config import OPTConfig
from opt_np.kv_cache import KVCache
from opt_np.ops import LAYER_NORM_EPS

CHUNK = 1 << 14  # numbers that a thread takes at a time, where each is little work


def pack(params: dict, release: bool = False) -> dict:
    """A tree like `params` with its matrices packed and its biases and LayerNorms in float32; positions are looked up as they are.

    release=True takes every array out of the given tree as soon as it is packed, so that the weights are never held twice.
    """

    def packed(node: Any, path: str) -> Any:
        if isinstance(node, dict):
            return {name: packed(node.pop(name) if release else node[name], f"{path}.{name}") for name in list(node)}
        if isinstance(node, list):
            return [packed(item, path) for item in node]
        if isinstance(node, Packed) or path.endswith("embed_positions.weight"):
            return node
        return gemm.pack(node) if node.ndim == 2 else np.asarray(node, np.float32)

    return packed(params, "")


def embed(ids: np.ndarray, weight: Any) -> np.ndarray:
    """As opt_np.ops.embed, in float32.  ids: (*N);  weight: (V, D)  ->  (*N, D)"""
    return weight.rows(ids) if isinstance(weight, Packed) else weight[ids].astype(np.float32, copy=False)


def linear(x: np.ndarray, weight: Any, bias: np.ndarray | None = None) -> np.ndarray:
    """As opt_np.ops.linear.  x: (*N, I);  weight: (O, I);  bias: (O)  ->  (*N, O)"""
    return _linear(x, weight, bias, None)


def _linear(x: np.ndarray, weight: Any, bias: np.ndarray | None, function: str | None) -> np.ndarray:
    weight = weight if isinstance(weight, Packed) else gemm.pack(weight)
    return gemm.matmul(float32(x).reshape(-1, x.shape[-1]), weight, bias, function).reshape(*x.shape[:-1], weight.shape[0])


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As opt_np.ops.matmul.  a: (M, K);  b: (K, N)  ->  (M, N)"""
    return gemm.product(float32(a), float32(b))


def layer_norm(x: np.ndarray, weight: np.ndarray | None = None, bias: np.ndarray | None = None) -> np.ndarray:
    """As opt_np.ops.layer_norm.  x: (*N, D);  weight: (D);  bias: (D)  ->  (*N, D)"""
    x = np.ascontiguousarray(float32(x))
    y, D = np.empty_like(x), x.shape[-1]
    weight, bias = (np.full(D, other, np.float32) if a is None else np.ascontiguousarray(a, np.float32) for a, other in ((weight, 1), (bias, 0)))
    NORM(x, weight, bias, y, x.size // D, D, max(CHUNK // D, 1))
    return y


def activation(x: np.ndarray, function: str) -> np.ndarray:
    """As opt_np.ops.activation.  x: (*N, F)  ->  (*N, F)"""
    x = np.ascontiguousarray(float32(x))
    y = np.empty_like(x)
    ACTIVATION(x, y, x.size, FUNCTIONS[function])
    return y


def mlp(h: np.ndarray, fc1: dict[str, Any], fc2: dict[str, Any], function: str) -> np.ndarray:
    """As opt_np.ops.mlp; the activation is applied while its numbers are at hand.  h: (*N, D)  ->  (*N, D)"""
    return linear(_linear(h, fc1["weight"], fc1.get("bias"), function), **fc2)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, layout: Any = None) -> np.ndarray:
    """As opt_np.ops.attention; queries that are padding after a row's last token get 0.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh)  ->  (B, T, H, Dh)
    """
    if isinstance(layout, Ragged):
        q, k, v = (a if a.ndim == 4 else layout.spread(a) for a in (q, k, v))
        return attention_lse(q, k, v, scale, layout.layout)[0][layout.real]
    return attention_lse(q, k, v, scale, layout)[0]


def attention_lse(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, layout: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """As opt_np.ops.attention_lse.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh)  ->  (B, T, H, Dh), (B, T, H)
    """
    return attention_cpu.attention_lse(float32(q), float32(k), float32(v), scale, getattr(layout, "visible", None))


def attention_probs(q: np.ndarray, k: np.ndarray, scale: float, layout: Any = None, rows: Any = None) -> np.ndarray:
    """As opt_np.ops.attention_probs.  q: (B, T, H, Dh);  k: (B, S, H, Dh);  rows: (R)  ->  (B, H, T, S), or (B, H, R, S)"""
    return attention_cpu.attention_probs(float32(q), float32(k), scale, getattr(layout, "visible", None), rows)


def attention_bwd(dO: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, O: np.ndarray, L: np.ndarray, scale: float,
                  layout: Any = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """As opt_np.ops.attention_bwd.

    dO: (B, T, H, Dh);  q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  O: (B, T, H, Dh);  L: (B, T, H)
    -> (B, T, H, Dh), (B, S, H, Dh), (B, S, H, Dh)
    """
    return attention_cpu.attention_bwd(float32(dO), float32(q), float32(k), float32(v), float32(O), L, scale, getattr(layout, "visible", None))


def float32(x: np.ndarray) -> np.ndarray:
    """x, if it is what these operations compute with."""
    if x.dtype != np.float32:
        raise ValueError(f"backend 'cpu' computes in float32, and was given {x.dtype}; backend 'numpy' computes in float64")
    return x


# ---- a batch of rows of different lengths, without its padding ---------------------------------------------------------------------------


def decoder(params: dict, x: np.ndarray, cfg: OPTConfig, layout: model.Layout, ops: ModuleType, cache: KVCache | None = None,
            tap: model.Tap = model.no_tap, hidden_states: list | None = None) -> np.ndarray:  # fmt: skip
    """model.decoder, with the padding left out where there is some: the same lines run on (N, D), the real tokens alone; padding becomes 0.

    x: (B, T, D)  ->  (B, T, D)
    """
    if layout.visible is None or (real := layout.visible[:, layout.past :]).all():
        return model.decoder(params, x, cfg, layout, ops, cache, tap, hidden_states)
    ragged = Ragged(layout, real, cache)
    packed_states: list | None = None if hidden_states is None else []
    y = model.decoder(params, x[real], cfg, ragged, ops, None if cache is None else ragged, tap, packed_states)  # type: ignore[arg-type]
    if hidden_states is not None:
        hidden_states += map(ragged.spread, packed_states or [])
    return ragged.spread(y)


class Ragged:
    """A layout of real tokens alone, (N, …), and the cache as the model's lines see it then."""

    def __init__(self, layout: model.Layout, real: np.ndarray, cache: KVCache | None) -> None:
        self.layout, self.real, self.cache = layout, real, cache  # real: (B, T)

    def spread(self, packed: np.ndarray) -> np.ndarray:
        """Real tokens to their places, zeros between.  packed: (N, …)  ->  (B, T, …)"""
        whole = np.zeros((*self.real.shape, *packed.shape[1:]), packed.dtype)
        whole[self.real] = packed
        return whole

    def extend(self, i: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert self.cache is not None
        return self.cache.extend(i, self.spread(k), self.spread(v))

    def advance(self, _: int) -> None:
        assert self.cache is not None
        self.cache.advance(self.real.shape[1])


# ---- kernels -----------------------------------------------------------------------------------------------------------------------------


def _norm(table: Any) -> None:
    """A task is some rows."""
    a = at(table, ARGUMENTS)
    x, weight, bias, y, rows, D, some = floats(a[0]), floats(a[1]), floats(a[2]), floats(a[3]), a[4], a[5], a[6]
    first = claim(table, TASKS) * some
    while first < rows:
        for i in range(first, min(first + some, rows)):
            _norm_row(at(x, i * D), weight, bias, at(y, i * D), D)
        first = claim(table, TASKS) * some


@njit
def _norm_row(x: Any, weight: Any, bias: Any, y: Any, D: int) -> None:
    mean = total(x, D) / np.float32(D)
    for d in range(D):
        y[d] = x[d] - mean
    rstd = np.float32(1) / math.sqrt(squares(y, D) / np.float32(D) + np.float32(LAYER_NORM_EPS))
    for d in range(D):
        y[d] = y[d] * rstd * weight[d] + bias[d]


def _activation(table: Any) -> None:
    a = at(table, ARGUMENTS)
    x, y, size, function = floats(a[0]), floats(a[1]), a[2], a[3]
    first = claim(table, TASKS) * CHUNK
    while first < size:
        for i in range(first, min(first + CHUNK, size)):
            y[i] = activate(x[i], function)
        first = claim(table, TASKS) * CHUNK


NORM, ACTIVATION = Kernel(_norm), Kernel(_activation)
