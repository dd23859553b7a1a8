"""Checks of attention in bfloat16, and in float32 by parts, whichever instructions compute it: for tests that run in their own process."""

import numba
import numpy as np
from ml_dtypes import bfloat16

from opt_fast import attention_cpu, attention_parts, gemm
from opt_fast.attention_bf16 import IN_BFLOAT16


def attend(way, q, k, v, scale, visible=None):
    O, L = attention_cpu.attention_lse(q[None], k[None], v[None], scale, None if visible is None else visible[None], way)
    return O[0], L[0]


def stored(way, q, k, v, scale, dtype):
    """With keys and values in 16 bits."""
    T, S = len(q), len(k)
    rows = attention_cpu.rows_of(np.zeros(1, int), T, np.zeros(1, int), np.array([S]), k[0].size, k.shape[2])
    return attention_cpu.attend(q, *(a.astype(dtype).view(gemm.BITS[np.dtype(dtype)]) for a in (k, v)), rows, scale, way)[0]


def exact(way, q, k, v, scale, seen):
    """In float64, of the same rounded numbers: outputs, what a weight's rounding can change, and log-sum-exps.  seen: (T, S)"""
    dtype = bfloat16 if way is IN_BFLOAT16 else np.float32
    q, k, v = (a.astype(dtype).astype(float).swapaxes(0, 1) for a in (q * scale, k, v))  # (H, T, Dh)
    scores = q @ k.swapaxes(1, 2)
    rounding = 2.0**-8 if way is IN_BFLOAT16 else 2.0**-23 * (4 + np.abs(scores).max())  # in float32, as scores round
    scores = np.where(seen, scores, -np.inf)
    highest = np.maximum(scores.max(-1, keepdims=True), -1e30)
    weights = np.exp(scores - highest)
    sums = weights.sum(-1, keepdims=True)
    weights /= np.where(sums == 0, 1, sums)
    with np.errstate(divide="ignore"):
        return (weights @ v).swapaxes(0, 1), (weights @ np.abs(v)).swapaxes(0, 1) * rounding, (highest + np.log(sums))[..., 0].T


def checked(real, way=IN_BFLOAT16, name="attention"):
    """Right, and the same bits however queries and keys come; returns what was computed. `real` processors take subnormal numbers as 0."""
    rng, found = np.random.default_rng(0), {}
    BC = (attention_cpu if way is IN_BFLOAT16 else attention_parts).BC
    shapes = (1, 1, 32, 0), (5, 5, 7, 0), (17, BC + 40, 64, 0), (40, 40, 80, 13), (BC + 9, BC + 30, 16, 3), (33, BC, 128, 0)
    for T, S, Dh, first in shapes:  # which is the first real key
        case, scale = (T, S, Dh, first), np.float32(Dh**-0.5)
        q, k, v = (rng.normal(size=(n, 2, Dh)).astype(np.float32) for n in (T, S, S))
        q[-1] *= 30  # weights of 0 and 1
        visible = np.arange(S) >= first
        seen = (np.arange(S) <= np.arange(T)[:, None] + S - T) & visible
        O, L = attend(way, q, k, v, scale, visible)
        expected, allowed, lse = exact(way, q, k, v, scale, seen)
        assert (np.abs(O - expected) <= allowed + 1e-7).all(), case
        np.testing.assert_allclose(L, lse, rtol=1e-5, atol=1e-5)
        assert not O[~seen.any(1)].any()
        found[f"{name} {case}"] = O
        if real:
            for a, rows in ((q, 3), (k, 5), (v, 5)):
                a[-rows:, :, ::3] *= np.float32(1e-38)
        same_bits(way, q, k, v, scale, first, case)
        hidden_places_count_for_nothing(way, q, k, v, scale, visible)
    return found


def same_bits(way, q, k, v, scale, first, case):
    """Alone, with those before it, without padding, from 16 bits, on one thread."""
    T, S = len(q), len(k)
    visible = np.arange(S) >= first
    O, L = attend(way, q, k, v, scale, visible)
    for i in range(0, T, 7):
        end = S - T + i + 1
        for begin in {0, i // 2, i} if end > first else ():
            part = attend(way, q[begin : i + 1], k[:end], v[:end], scale, visible[:end])
            assert (part[0][-1] == O[i]).all(), (case, begin, i)
            assert (part[1][-1] == L[i]).all(), (case, begin, i)
        if end > first:
            assert (attend(way, q[i : i + 1], k[first:end], v[first:end], scale)[0][0] == O[i]).all(), (case, i)
    if first == 0:
        rounded = O if way is IN_BFLOAT16 else attend(way, q, *(a.astype(bfloat16).astype(np.float32) for a in (k, v)), scale)[0]
        assert (stored(way, q, k, v, scale, bfloat16) == rounded).all(), case
        assert (stored(way, q[-1:], k, v, scale, bfloat16)[0] == rounded[-1]).all(), case
    numba.set_num_threads(1)
    assert (attend(way, q, k, v, scale, visible)[0] == O).all(), case
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


def hidden_places_count_for_nothing(way, q, k, v, scale, visible):
    hole = visible & (np.arange(len(k)) % 5 != 2)
    before, broken = attend(way, q, k, v, scale, hole), (k.copy(), v.copy())
    for a in broken:
        a[~hole] = np.nan
    after = attend(way, q, *broken, scale, hole)
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
    if len(q) > 1:
        k = k.copy()
        k[-1] = np.nan  # which the last query alone sees
        O = attend(way, q, k, v, scale, visible)[0]
        assert np.isnan(O[-1]).all()
        assert not np.isnan(O[:-1]).any()
