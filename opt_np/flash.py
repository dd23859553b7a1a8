"""FlashAttention-2 in NumPy: tiled attention, forward and backward, in O(T) memory. The reference for every attention kernel in opt_fast.

Symbols of the paper (arXiv:2307.08691): Q, K, V, O; scores = scale·Q Kᵀ and P = softmax(scores), never held in full; m and l, each query's running
maximum and sum; L = m + log l, all that the backward pass needs to recompute P; Br and Bc, rows and columns of a tile.
One head: Q is (T, Dh), K and V are (S, Dh). Query t is at key S - T + t (causal, aligned to the end) and sees the keys up to that one.
"""

from __future__ import annotations

import numpy as np

BR, BC = 64, 64  # a tile of a real kernel, sized so that its rows of Q, K, V and O fit in fast memory


def attention(Q: np.ndarray, K: np.ndarray, V: np.ndarray, scale: float, visible: np.ndarray | None = None, Br: int = BR, Bc: int = BC):
    """Algorithm 1, causal; `visible` hides keys. A query that sees no key gets O = 0 and L = -inf.

    Q: (T, Dh);  K: (S, Dh);  V: (S, Dh);  visible: (S)  ->  (T, Dh), (T)

    Equals ops.attention for one head. Backward: attention_bwd.
    """
    T, S = len(Q), len(K)
    O, L = np.zeros_like(Q), np.full(T, -np.inf, Q.dtype)
    for i in range(0, T, Br):
        rows = slice(i, min(i + Br, T))
        m, l, acc = L[rows].copy(), np.zeros_like(L[rows]), np.zeros_like(O[rows])  # L is still -inf: the maximum over no keys
        for j in range(0, S - T + rows.stop, Bc):  # tiles that lie wholly above the diagonal are never reached
            cols = slice(j, min(j + Bc, S))
            scores = tile_scores(Q, K, scale, visible, rows, cols, S - T)  # (Br, Bc)
            m_new = np.maximum(m, scores.max(1))
            safe = np.where(m_new == -np.inf, 0, m_new)  # nothing seen yet: exp(-inf - 0) = 0, where -inf - -inf would be NaN
            P = np.exp(scores - safe[:, None])
            shrink = np.exp(m - safe)  # rescales what was summed under the old maximum
            l = l * shrink + P.sum(1)
            acc = acc * shrink[:, None] + P @ V[cols]
            m = m_new
        seen = l > 0
        O[rows][seen] = acc[seen] / l[seen, None]  # divided once, at the end
        L[rows][seen] = m[seen] + np.log(l[seen])
    return O, L


def attention_bwd(dO: np.ndarray, Q: np.ndarray, K: np.ndarray, V: np.ndarray, O: np.ndarray, L: np.ndarray, scale: float,
                  visible: np.ndarray | None = None, Br: int = BR, Bc: int = BC) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Algorithm 2: P is recomputed from L, tile by tile, with D = Σ dO·O in place of the softmax's row sums.

    dO: (T, Dh);  Q: (T, Dh);  K: (S, Dh);  V: (S, Dh);  O: (T, Dh);  L: (T);  visible: (S)  ->  (T, Dh), (S, Dh), (S, Dh)
    """
    T, S = len(Q), len(K)
    dQ, dK, dV = np.zeros_like(Q), np.zeros_like(K), np.zeros_like(V)
    D = (dO * O).sum(1)
    for j in range(0, S, Bc):
        cols = slice(j, min(j + Bc, S))
        first = max(0, j - (S - T)) // Br * Br  # the first tile of queries that reaches column j
        for i in range(first, T, Br):
            rows = slice(i, min(i + Br, T))
            scores = tile_scores(Q, K, scale, visible, rows, cols, S - T)
            P = np.exp(scores - np.where(L[rows] == -np.inf, 0, L[rows])[:, None])
            dV[cols] += P.T @ dO[rows]
            dP = dO[rows] @ V[cols].T
            dscores = P * (dP - D[rows, None]) * scale
            dQ[rows] += dscores @ K[cols]
            dK[cols] += dscores.T @ Q[rows]
    return dQ, dK, dV


def tile_scores(Q: np.ndarray, K: np.ndarray, scale: float, visible: np.ndarray | None, rows: slice, cols: slice, past: int) -> np.ndarray:
    """One tile of scale·Q Kᵀ, with -inf where the key is in the query's future or hidden.  -> (Br, Bc)"""
    scores = (Q[rows] * scale) @ K[cols].T
    keys = np.arange(cols.start, cols.stop)
    hidden = keys > past + np.arange(rows.start, rows.stop)[:, None]
    if visible is not None:
        hidden |= ~visible[cols]
    scores[hidden] = -np.inf
    return scores
