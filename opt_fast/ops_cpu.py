"""The operations of opt_np.ops on the CPU's vector units: the same names, arguments and meaning, on float32 arrays, in Numba.

Bit-identical: a row's results do not depend on the batch around it, on padding, on the number of threads, or on the pieces in which a prompt entered
the cache, as long as backend, dtype and processor stay the same. Weights may be stored in float32, float16 or bfloat16. `pack` lays the matrices out
once, after loading; a matrix that is not packed is packed at each use, as in training. int8 and int4 weights (opt_np/quantize.py) stay integers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16
from numba import get_num_threads

from opt_fast import attention_cpu, attention_parts, engine, gemm, gemm_amx, gemm_parts, kernel, program_cpu, rowwise, train_cpu
from opt_fast.gemm import TILE, Packed
from opt_fast.gemm_amx import PackedTiles
from opt_fast.gemm_amx_int4 import PackedNibbles
from opt_fast.gemm_int import PackedIntegers
from opt_np import model
from opt_np import ops as numpy_ops
from opt_np.config import OPTConfig
from opt_np.kv_cache import KVCache
from opt_np.malloc import give_back, keep_freed

adamw_step, clip_by_global_norm = train_cpu.adamw_step, train_cpu.clip_by_global_norm  # these accept any tree of arrays


def description() -> str:
    """As opt_np.ops.description: the vector instructions that Numba targets, and the number of threads."""
    products = "tiles of bfloat16 and int8 (AMX), float32 and float16 in parts, " if gemm_amx.UNIT else "pairs of bfloat16, " if TILE.pairs else ""
    return f"{TILE.name} vectors of {TILE.width} float32, {products}{get_num_threads()} threads"


def pack(params: dict, release: bool = False) -> dict:
    """A tree like `params` with its matrices packed and its biases and LayerNorms in float32; the position embedding stays as it is.

    release=True removes every array from the given tree as soon as it is packed, so that the weights are never held twice; the result then shares no
    memory with the given arrays, which may be memory-mapped from a file.
    """
    kept = np.array if release else np.asarray
    if "embed_tokens" in params:  # a whole model
        attention_parts.ahead(params)

    def packed(node: Any, path: str) -> Any:
        if isinstance(node, dict) and "scale" in node:
            leaf: Any = {name: node.pop(name) if release else node[name] for name in ("weight", "scale", "columns") if name in node}
            return {"weight": pack_matrix(**leaf)} | {name: packed(node[name], f"{path}.{name}") for name in node.keys() - leaf.keys()}
        if isinstance(node, dict):
            return {name: packed(node.pop(name) if release else node[name], f"{path}.{name}") for name in list(node)}
        if isinstance(node, list):
            return [packed(item, path) for item in node]
        if not isinstance(node, np.ndarray):  # already packed, or layers on disk, which are packed when they are read
            return node
        if path.endswith("embed_positions.weight"):
            return kept(node)
        return pack_matrix(node) if node.ndim == 2 else kept(node, np.float32)

    whole = "embed_tokens" in params and isinstance(params["layers"], list)  # layers on disk are loaded and dropped one by one
    with kernel.side_by_side() if whole else nullcontext():
        found = engine.Params(packed(params, ""))
    if whole and release:
        give_back()
    return found


def pack_matrix(weight: np.ndarray, scale: np.ndarray | None = None, columns: np.ndarray | None = None) -> Packed:
    """A weight in the layout of the kernel that is fastest here.  weight: (O, I)"""
    if gemm_amx.UNIT and weight.dtype in (np.int8, bfloat16):
        return PackedTiles(weight, scale, columns)
    if scale is None:
        return (gemm_parts if gemm_amx.UNIT else gemm).pack(weight)
    return (PackedNibbles if gemm_amx.UNIT and weight.dtype == np.uint8 else PackedIntegers)(weight, scale, columns)


def embed(ids: np.ndarray, weight: Any, scale: np.ndarray | None = None, columns: np.ndarray | None = None) -> np.ndarray:
    """As opt_np.ops.embed, in float32.  ids: (*N);  weight: (V, D)  ->  (*N, D)"""
    return weight.rows(ids) if isinstance(weight, Packed) else numpy_ops.embed(ids, weight, scale, columns).astype(np.float32, copy=False)


def linear(
    x: np.ndarray, weight: Any, bias: np.ndarray | None = None, scale: np.ndarray | None = None, columns: np.ndarray | None = None
) -> np.ndarray:
    """As opt_np.ops.linear.  x: (*N, I);  weight: (O, I);  bias: (O)  ->  (*N, O)"""
    return _linear(x, None, weight, bias, scale, columns)


def _linear(x: np.ndarray, function: str | None, weight: Any, bias: np.ndarray | None = None, scale: np.ndarray | None = None,
            columns: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    if not isinstance(weight, Packed):
        with kernel.for_one_use():
            weight = pack_matrix(weight, scale, columns)
    return gemm.matmul(float32(x).reshape(-1, x.shape[-1]), weight, bias, function).reshape(*x.shape[:-1], weight.shape[0])


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As opt_np.ops.matmul.  a: (M, K);  b: (K, N)  ->  (M, N)"""
    with kernel.for_one_use():
        weight = pack_matrix(float32(np.asarray(b)).T)
    return gemm.matmul(float32(np.asarray(a)), weight)


def layer_norm(x: np.ndarray, weight: np.ndarray | None = None, bias: np.ndarray | None = None) -> np.ndarray:
    """As opt_np.ops.layer_norm.  x: (*N, D);  weight: (D);  bias: (D)  ->  (*N, D)"""
    return rowwise.layer_norm(float32(x), weight, bias)


def activation(x: np.ndarray, function: str) -> np.ndarray:
    """As opt_np.ops.activation.  x: (*N, F)  ->  (*N, F)"""
    return rowwise.activation(float32(x), function)


def mlp(h: np.ndarray, fc1: dict[str, Any], fc2: dict[str, Any], function: str) -> np.ndarray:
    """As opt_np.ops.mlp; the activation is applied while fc1's results are still in the cache.  h: (*N, D)  ->  (*N, D)"""
    return linear(_linear(h, function, **fc1), **fc2)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, layout: Any = None) -> np.ndarray:
    """As opt_np.ops.attention.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh)  ->  (B, T, H, Dh)
    """
    if rows := getattr(layout, "rows", None):
        return attention_cpu.attend(float32(q), k, v, rows, scale, layout.way)[0]
    return attention_lse(q, k, v, scale, layout)[0]


def attention_lse(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, layout: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """As opt_np.ops.attention_lse.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh)  ->  (B, T, H, Dh), (B, T, H)
    """
    way, visible = getattr(layout, "way", attention_parts.IN_FLOAT32), getattr(layout, "visible", None)
    return attention_cpu.attention_lse(float32(q), float32(k), float32(v), scale, visible, way)


def attention_scores(q: np.ndarray, k: np.ndarray, scale: float, layout: Any = None) -> np.ndarray:
    """As opt_np.ops.attention_scores, in NumPy: only for inspection.  q: (B, T, H, Dh);  k: (B, S, H, Dh)  ->  (B, H, T, S)"""
    return numpy_ops.attention_scores(float32(q), float32(k), scale, layout)


def softmax(scores: np.ndarray) -> np.ndarray:
    """As opt_np.ops.softmax, in NumPy: only for inspection.  scores: (*N, S)  ->  (*N, S)"""
    return numpy_ops.softmax(float32(scores))


def attention_probs(q: np.ndarray, k: np.ndarray, scale: float, layout: Any = None, rows: Any = None) -> np.ndarray:
    """As opt_np.ops.attention_probs.  q: (B, T, H, Dh);  k: (B, S, H, Dh);  rows: (R)  ->  (B, H, T, S), or (B, H, R, S)"""
    return attention_cpu.attention_probs(float32(q), float32(k), scale, getattr(layout, "visible", None), rows)


def attention_bwd(dO: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, O: np.ndarray, L: np.ndarray, scale: float,
                  layout: Any = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """As opt_np.ops.attention_bwd.

    dO: (B, T, H, Dh);  q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  O: (B, T, H, Dh);  L: (B, T, H)
    -> (B, T, H, Dh), (B, S, H, Dh), (B, S, H, Dh)
    """
    keep_freed()
    visible = getattr(layout, "visible", None)
    dO, q, k, v, O = map(float32, (dO, q, k, v, O))
    return attention_cpu.attention_bwd(dO, q, k, v, O, L, scale, visible, attention_parts.IN_FLOAT32_BWD)


def layer_norm_bwd(dy: np.ndarray, x: np.ndarray, weight: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As opt_np.ops.layer_norm_bwd.  dy: (*N, D);  x: (*N, D);  weight: (D)  ->  (*N, D), (D), (D)"""
    return train_cpu.layer_norm_bwd(float32(dy), float32(x), weight)


def activation_bwd(dy: np.ndarray, x: np.ndarray, function: str) -> np.ndarray:
    """As opt_np.ops.activation_bwd.  dy: (*N, F);  x: (*N, F)  ->  (*N, F)"""
    return train_cpu.activation_bwd(float32(dy), float32(x), function)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """As opt_np.ops.cross_entropy.  logits: (N, V);  labels: (N)  ->  loss, (N, V)"""
    return train_cpu.cross_entropy(float32(logits), labels)


def float32(x: np.ndarray) -> np.ndarray:
    """x, if it is float32. Raises ValueError for any other dtype."""
    if x.dtype != np.float32:
        raise ValueError(f"backend 'cpu' computes in float32, and was given {x.dtype}; cast it, or compute in float64 with backend 'numpy'")
    return x


# ---- a batch of rows of different lengths, without its padding ---------------------------------------------------------------------------


def decoder(params: dict, x: np.ndarray, cfg: OPTConfig, layout: model.Layout, ops: ModuleType, cache: KVCache | None = None,
            tap: model.Tap = model.no_tap, hidden_states: list | None = None, padding: bool = False) -> np.ndarray:  # fmt: skip
    """model.decoder, faster, with bit-identical results: all blocks in a single call, unless hidden_states are wanted; and unless `padding` is, for
    the N real tokens only, (N, D), with 0 as the result for padding. If the weights' products are in tiles, so are attention's (attention_parts.py).

    x: (B, T, D)  ->  (B, T, D)
    """
    real, way = None if layout.visible is None else layout.visible[:, layout.past :], attention_parts.way_for(params)  # real: (B, T)
    at_once, keeps = hidden_states is None and (cache is None or type(cache) is KVCache), cache if x.shape[1] == 1 else None
    if padding or real is None or real.all() or with_holes(real):
        whole = Whole(layout.visible, way)
        if at_once and (program := program_cpu.program_for(params["layers"], cfg, len(x) * x.shape[1], way, keeps)):
            return run(program, x.reshape(-1, x.shape[-1]), cache, x.shape[1], *whole.placed(x, cache, cfg)).reshape(x.shape)
        return model.decoder(params, x, cfg, whole, ops, cache, tap, hidden_states)  # type: ignore[arg-type]
    ragged, packed = Ragged(layout, real, cache, cfg, way), x[real]
    packed_states: list | None = None if hidden_states is None else []
    if at_once and len(packed) and (program := program_cpu.program_for(params["layers"], cfg, len(packed), way, keeps)):
        y = run(program, packed, cache, x.shape[1], ragged.rows, ragged.slots, ragged.room)
    else:
        y = model.decoder(params, packed, cfg, ragged, ops, None if cache is None else ragged, tap, packed_states)  # type: ignore[arg-type]
    if hidden_states is not None:
        hidden_states += map(ragged.spread, packed_states or [])
    return ragged.spread(y)


def run(program: program_cpu.Program, x: np.ndarray, cache: KVCache | None, T: int, rows: attention_cpu.Rows, slots: np.ndarray,
        room: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:  # fmt: skip
    """All blocks for new tokens, T in each row with padding: keys and values go to layer i's room(i), or without a cache to arrays that all layers
    use in turn.  x: (N, D);  slots: (N)  ->  (N, D)"""
    L = program.cfg.num_hidden_layers
    arrays = [tuple(np.empty(x.shape, np.float32) for _ in range(2))] * L if cache is None else [room(i) for i in range(L)]
    y = program.run(float32(x), np.array([[kernel.address(a) for a in both] for both in arrays]), slots, rows)
    if cache is None:
        return y
    cache.advance(T)
    return y.copy() if program is cache.program else y


def with_holes(real: np.ndarray) -> bool:
    """Whether a row has padding between real tokens.  real: (B, T)"""
    return bool((np.diff(real, axis=1, prepend=False, append=False).sum(1) > 2).any())


class Whole(NamedTuple):
    """A layout of rows of equal length, for `attention`."""

    visible: np.ndarray | None  # (B, S)
    way: attention_cpu.Forward

    def placed(self, x: np.ndarray, cache: KVCache | None, cfg: OPTConfig) -> tuple[attention_cpu.Rows, np.ndarray, Any]:
        """Where the new tokens and their keys are, for `run`.  x: (B, T, D)"""
        (B, T, D), past, room = x.shape, 0, None
        row, step = T * D, D
        if cache is not None:
            past, room = cache.length, lambda i: cache.room(i, (B, T, cfg.num_attention_heads, cfg.head_dim), x)
            row, step = attention_cpu.steps(room(0)[0])
        origins = np.arange(B) * row
        rows = attention_cpu.rows_of(np.arange(B) * T, T, origins, np.full(B, past + T), step, cfg.head_dim, self.visible)
        return rows, (origins[:, None] + (past + np.arange(T)) * step).ravel(), room


class Ragged:
    """A layout of the real tokens only, (N, …), each row's in succession; in model.decoder it also takes the place of the cache."""

    def __init__(self, layout: model.Layout, real: np.ndarray, cache: KVCache | None, cfg: OPTConfig, way: attention_cpu.Forward) -> None:
        self.real, self.cache, self.way, self.heads = real, cache, way, (cfg.num_attention_heads, cfg.head_dim)  # real: (B, T)
        some, counts = real.any(1), real.sum(1)
        first, counts = (np.cumsum(counts) - counts)[some], counts[some]  # of the rows that have any token
        assert layout.visible is not None
        if cache is None:
            self.rows = attention_cpu.rows_of(first, counts, first * cfg.hidden_size, counts, cfg.hidden_size, cfg.head_dim)
            self.slots = np.arange(counts.sum()) * cfg.hidden_size
        else:
            row, step = attention_cpu.steps(self.room(0)[0])
            ends = layout.past + real.shape[1] - real[:, ::-1].argmax(1)
            self.rows = attention_cpu.rows_of(first, counts, np.flatnonzero(some) * row, ends[some], step, cfg.head_dim, layout.visible[some])
            b, t = np.nonzero(real)
            self.slots = b * row + (layout.past + t) * step

    def spread(self, packed: np.ndarray) -> np.ndarray:
        """Puts real tokens back at their positions, with 0 for padding.  packed: (N, …)  ->  (B, T, …)"""
        whole = np.zeros((*self.real.shape, *packed.shape[1:]), packed.dtype)
        whole[self.real] = packed
        return whole

    def extend(self, i: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Writes layer i's new keys and values to their positions in the cache, with 0 for padding.  k: (N, H, Dh);  v: (N, H, Dh)"""
        keys, values = self.room(i)
        attention_cpu.write(k, v, keys, values, self.slots, self.heads[1])
        return keys, values

    def room(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Layer i's keys and values in the cache, with 0 for the new padding."""
        assert self.cache is not None
        keys, values = self.cache.room(i, (*self.real.shape, *self.heads), np.empty(0, np.float32))
        for a in (keys, values):
            a[:, -self.real.shape[1] :][~self.real] = 0
        return keys, values

    def advance(self, _: int) -> None:
        assert self.cache is not None
        self.cache.advance(self.real.shape[1])


def machine(params: dict, cfg: OPTConfig, pages: int, dtype: str | None = None) -> Any:
    """The engine's machine: the model over `pages` pages. `dtype` is that of keys and values; None leaves results unchanged. Raises ValueError."""
    from opt_fast.machine_cpu import Machine, Pages  # here, as that module imports this one

    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise ValueError(f"dtype={dtype!r} must be float32, float16 or bfloat16")
    return Machine(params, cfg, Pages(cfg, pages, dtype or attention_parts.way_for(params).stored))


def reader(params: dict, cfg: OPTConfig, _: ModuleType, first: int, most: tuple[int, int] = (0, 0)) -> Any:
    """As opt_np.reader.Reader, over pages."""
    return engine.reader(params, cfg, lambda count: machine(params, cfg, count), first, most)
