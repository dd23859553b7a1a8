"""int8 and int4 weights: only a matrix's leaves in the parameter tree change. opt_np.ops.dequantized defines the formats; opt_fast packs them.

A matrix (O, I) becomes `weight`, integers, and `scale`, the factor of each: for int8 one per row, for int4 one per group of 32 or 64
columns of a row. Values are rounded to nearest, one matrix at a time; no calibration text is needed.

Columns much larger than the rest would inflate the scale of the others, and much smaller ones would be rounded to 0. (OPT from 6.7b on has a few
channels that are far larger than all others, in the stream, in the LayerNorms, or in the matrices that read them.) So they are first brought to the
same size by powers of two, stored in `columns`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from opt_np.config import QUANTIZED, OPTConfig
from opt_np.ops import dequantized
from opt_np.tree import flatten, unflatten

UNEVEN = 4.0  # columns this many times larger or smaller than the median are brought to its size
CLIPS = (7.0, 7.5, 8.0, 8.5, 9.0, 9.5)  # int4: scales to try, a group's largest value over -7 to -9.5; the one with the least error is used
ROWS = 256  # rows quantised at a time, so that they stay in the processor's cache


def quantize_matrix(weight: np.ndarray, kind: str, group_size: int = 32) -> dict[str, np.ndarray]:
    """The leaves of an int8 or int4 matrix: weight, scale, and columns where some are much larger or smaller than the rest.

    weight: (O, I)
    """
    columns = column_sizes(weight)
    rows = int8_rows if kind == "int8" else lambda w: int4_rows(w, group_size)
    parts = []
    for i in range(0, len(weight), ROWS):
        w = np.asarray(weight[i : i + ROWS], np.float32)
        parts.append(rows(w if columns is None else w / columns))
    leaf = {name: np.concatenate([part[name] for part in parts]) for name in ("weight", "scale")}
    return leaf if columns is None else {**leaf, "columns": columns}


def column_sizes(weight: np.ndarray) -> np.ndarray | None:
    """Powers of two by which uneven columns differ from the median one, 1 for all others; None if none is uneven.  weight: (O, I)  ->  (I)"""
    squares = np.zeros(weight.shape[1], np.float64)
    for i in range(0, len(weight), ROWS):
        w = np.asarray(weight[i : i + ROWS], np.float64)
        squares += np.einsum("oi,oi->i", w, w)
    size = np.sqrt(squares / len(weight))
    median = np.median(size[size > 0]) if size.any() else 1.0
    ratio = np.where(size > 0, size / median, 1.0)
    uneven = (ratio > UNEVEN) | (ratio < 1 / UNEVEN)
    if not uneven.any():
        return None
    return np.where(uneven, np.exp2(np.clip(np.rint(np.log2(ratio)), -60, 60)), 1.0).astype(np.float32)


def int8_rows(w: np.ndarray) -> dict[str, np.ndarray]:
    """Each row quantised to 127 steps on either side of 0.  w: (O, I)"""
    scale = np.abs(w).max(1, initial=0) / np.float32(127)
    weight = np.clip(np.rint(w * inverse(scale)[:, None]), -127, 127).astype(np.int8)
    return {"weight": weight, "scale": scale}


def int4_rows(w: np.ndarray, group_size: int) -> dict[str, np.ndarray]:
    """Each group in steps from -8 to 7, stored as 0 to 15, two a byte, the even column in its lower half; the last group may be short.  w: (O, I)"""
    O, I = w.shape
    x = np.zeros((O, math.ceil(I / group_size), group_size), np.float32)
    x.reshape(O, -1)[:, :I] = w
    low, high = x.min(-1), x.max(-1)
    largest = np.where(high > -low, high, low)  # with its sign: the scale gets the opposite one, so that this becomes about -8; there is no 8
    best, least, scale = np.zeros(x.shape, np.float32), np.full(largest.shape, np.inf, np.float32), np.zeros(largest.shape, np.float16)
    for clip in CLIPS:
        s = np.clip(largest / np.float32(-clip), -65504, 65504).astype(np.float16)
        q = np.clip(np.rint(x * inverse(s.astype(np.float32))[..., None]), -8, 7)
        error = q * s[..., None].astype(np.float32) - x
        squares = np.einsum("ogi,ogi->og", error, error)
        better = squares < least
        least, scale = np.where(better, squares, least), np.where(better, s, scale)
        np.copyto(best, q, where=better[..., None])
    nibbles = (best + 8).astype(np.uint8).reshape(O, -1)[:, :I]
    return {"weight": nibbles[:, ::2] | nibbles[:, 1::2] << 4, "scale": scale}


def inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale; 0 where the scale is 0, or so small that 1 / scale overflows."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


# ---- whole models ------------------------------------------------------------------------------------------------------------------------


class Quantized(NamedTuple):
    """A quantised matrix's leaves, between file and tree; `shape` is that of the original matrix."""

    leaves: dict[str, np.ndarray]
    shape: tuple[int, ...]


Quantizer = Callable[[str, np.ndarray], Quantized]  # (name in a checkpoint or a tree, matrix) -> Quantized


def quantizer(kind: str, group_size: int = 32, seen: Callable[[str, float], None] | None = None) -> Quantizer:
    """A function that quantises a matrix. seen(name, error), if given, gets the relative error ‖W - Ŵ‖ / ‖W‖ of each, which doubles the time.

    Raises ValueError, now for an unknown kind, then for weights that are NaN or infinite.
    """
    if kind not in QUANTIZED:
        raise ValueError(f"quantize={kind!r} is none of {', '.join(QUANTIZED)}")
    if group_size not in QUANTIZED["int4"]:
        raise ValueError(f"group_size is {group_size}; it is one of {', '.join(map(str, QUANTIZED['int4']))}")

    def quantize(name: str, weight: np.ndarray) -> Quantized:
        if weight.dtype.kind in "iu":
            raise ValueError(f"{name} is {weight.dtype}: these weights are quantised already")
        if weight.shape[1] % 2 and kind == "int4":
            raise ValueError(f"{name} has {weight.shape[1]} columns; int4 keeps two in a byte, and takes an even number: quantise to int8")
        if not all(np.isfinite(np.asarray(weight[i : i + ROWS], np.float32)).all() for i in range(0, len(weight), ROWS)):
            raise ValueError(f"{name} holds NaN or infinite numbers, and cannot be {kind}")
        leaves = quantize_matrix(weight, kind, group_size)
        if seen:
            seen(name, relative_error(weight, leaves))
        return Quantized(leaves, weight.shape)

    return quantize


def quantized(params: dict, cfg: OPTConfig, kind: str, group_size: int = 32) -> tuple[dict, OPTConfig]:
    """A tree like `params` whose matrices are int8 or int4, all but position embeddings and classifiers' heads, and its config."""
    quantize = quantizer(kind, group_size)
    flat = {name: quantize(name, a) if is_quantized_matrix(name, a.ndim) else a for name, a in flatten(params).items()}
    return expanded(unflatten(flat)), with_kind(cfg, kind, group_size)


def expanded(tree: Any) -> Any:
    """The tree with each Quantized matrix replaced by its leaves."""
    if isinstance(tree, list):
        return [expanded(child) for child in tree]
    if not isinstance(tree, dict):
        return tree
    found: dict[str, Any] = {}
    for name, child in tree.items():
        found |= child.leaves if isinstance(child, Quantized) else {name: expanded(child)}
    return found


def is_quantized_matrix(name: str, ndim: int) -> bool:
    """Whether a tensor of this name is quantised: every matrix is, but position embeddings and the heads of classifiers."""
    return ndim == 2 and name.endswith("weight") and not {"embed_positions", "score", "qa_outputs"} & set(name.split("."))


def num_parameters(params: dict) -> int:
    """The number of parameters; scales are not counted, and int4's two per byte are."""
    flat = {name: a for name, a in flatten(params).items() if not name.endswith((".scale", ".columns"))}
    return sum(math.prod(a.shape) * (2 if str(a.dtype).endswith("uint8") else 1) for a in flat.values())


def relative_error(weight: np.ndarray, leaves: dict[str, np.ndarray]) -> float:
    """‖W - Ŵ‖ / ‖W‖, 0 for a matrix of zeros."""
    error = total = 0.0
    for i in range(0, len(weight), ROWS):
        rows = slice(i, i + ROWS)
        w = np.asarray(weight[rows], np.float32)
        d = w - dequantized(leaves["weight"][rows], leaves["scale"][rows], leaves.get("columns"))
        error, total = error + float(np.vdot(d, d)), total + float(np.vdot(w, w))
    return math.sqrt(error / total) if total else 0.0


# ---- checkpoints -------------------------------------------------------------------------------------------------------------------------


def with_kind(cfg: OPTConfig, kind: str, group_size: int = 32) -> OPTConfig:
    """The config with a quantization_config for config.json."""
    entry = {"quant_method": "opt-np", "kind": kind, **({"group_size": group_size} if kind == "int4" else {})}
    return dataclasses.replace(cfg, extra={**cfg.extra, "quantization_config": entry})


def stored(tensors: dict[str, tuple[int, ...]], cfg: OPTConfig) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """Shape, and dtype (None: any), of each tensor as a checkpoint of this config stores it; `columns` may be absent."""
    found: dict[str, tuple[tuple[int, ...], str | None]] = {}
    for name, shape in tensors.items():
        if cfg.quantized is None or not is_quantized_matrix(name, len(shape)):
            found[name] = (shape, None)
            continue
        (O, I), stem, (kind, group_size) = shape, name.removesuffix("weight"), cfg.quantized
        found[name] = ((O, I), "int8") if kind == "int8" else ((O, I // 2), "uint8")
        found[f"{stem}scale"] = ((O,), "float32") if kind == "int8" else ((O, math.ceil(I / group_size)), "float16")
        found[f"{stem}columns"] = ((I,), "float32")
    return found
