"""The operations of OPT in plain NumPy. Every backend is a module with these functions, under these names and signatures.

N stands for any leading axes. The result has the dtype of the input: no op promotes float32 to float64.
Backward passes are in grad.py, except the four that backends replace with their own: attention, LayerNorm, the activation and the loss are here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from opt_np.malloc import keep_freed

LAYER_NORM_EPS = 1e-5  # torch's default; config.json has no key for it
QUERY_BLOCK = 64  # query rows per block of attention: the block's scores stay in the processor's cache


def description() -> str:
    """This backend, described for a human reader."""
    return f"NumPy {np.__version__}"


def pack(params: dict, release: bool = False) -> dict:
    """The parameters laid out as this backend computes with them, once, after loading: NumPy takes them as they are.

    `release` lets a backend that copies them remove each array from the given tree as soon as it has copied it.
    """
    keep_freed()
    return params


def embed(ids: np.ndarray, weight: np.ndarray, scale: np.ndarray | None = None, columns: np.ndarray | None = None) -> np.ndarray:
    """The row of the table for each id; with `scale`, of an int8 or int4 table, in float32.

    ids: (*N);  weight: (V, D)  ->  (*N, D)

    Equals torch.nn.Embedding. Backward: grad.embed_bwd.
    """
    return weight[ids] if scale is None else dequantized(weight[ids], scale[ids], columns)


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, scale: np.ndarray | None = None,
           columns: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    """x times the transposed weight, plus the bias; with `scale`, of an int8 or int4 weight.

    x: (*N, I);  weight: (O, I);  bias: (O)  ->  (*N, O)

    Equals torch.nn.Linear. Backward: grad.linear_bwd.
    """
    if scale is not None:
        weight = dequantized(weight, scale, columns).astype(x.dtype, copy=False)
    y = x.reshape(-1, x.shape[-1]) @ weight.T  # two axes: one matrix product, whatever N is
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], weight.shape[0])


def dequantized(weight: np.ndarray, scale: np.ndarray, columns: np.ndarray | None = None) -> np.ndarray:
    """The float32 matrix that int8 or int4 weights represent; this defines both formats. quantize.py makes them.

    int8: weight (*N, I), times its row's scale (*N).  int4: weight (*N, I/2) of uint8 holds columns 2j and 2j + 1 in the lower and upper half of byte
    j, each 0 to 15 for -8 to 7, times the scale (*N, G) of its group of 32 or 64 columns. Then times `columns` (I), if present.  ->  (*N, I)
    """
    if weight.dtype == np.int8:
        w = weight * scale[..., None]
    else:
        I = 2 * weight.shape[-1]
        w = np.stack([weight & 15, weight >> 4], axis=-1).reshape(*weight.shape[:-1], I).astype(np.float32) - 8
        w *= np.repeat(scale.astype(np.float32), group_size(I, scale.shape[-1]), axis=-1)[..., :I]
    return w if columns is None else w * columns


def group_size(I: int, groups: int) -> int:
    """Columns of an int4 matrix that share a scale: ⌈I / groups⌉ rounded up to a power of two; the last group may be short."""
    return 1 << (-(-I // groups) - 1).bit_length()


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product of two matrices, for the backward pass.

    a: (M, K);  b: (K, N)  ->  (M, N)
    """
    return a @ b


def layer_norm(x: np.ndarray, weight: np.ndarray | None = None, bias: np.ndarray | None = None) -> np.ndarray:
    """x with mean 0 and variance 1 over its last axis, then scaled and shifted.

    x: (*N, D);  weight: (D);  bias: (D)  ->  (*N, D)

    Equals torch.nn.LayerNorm (biased variance, eps inside the root). Backward: layer_norm_bwd.
    """
    y, _ = normalize(x)
    if weight is not None:
        y *= weight
        y += bias
    return y


def normalize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """LayerNorm before its weight and bias, and the reciprocal standard deviation that the backward pass needs.

    x: (*N, D)  ->  (*N, D), (*N, 1)
    """
    y = x - x.sum(-1, keepdims=True) / x.shape[-1]
    variance = np.einsum("...d,...d->...", y, y)[..., None] / x.shape[-1]
    rstd = 1 / np.sqrt(variance + LAYER_NORM_EPS)
    y *= rstd
    return y, rstd


def layer_norm_bwd(dy: np.ndarray, x: np.ndarray, weight: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `layer_norm` by x, weight and bias: y = x̂ w + b with x̂ = (x - mean)·rstd gives dx = rstd (dx̂ - mean(dx̂) - x̂ mean(dx̂ x̂)).

    dy: (*N, D);  x: (*N, D);  weight: (D)  ->  (*N, D), (D), (D)
    """
    xhat, rstd = normalize(x)
    dy2, xhat2 = dy.reshape(-1, x.shape[-1]), xhat.reshape(-1, x.shape[-1])
    dweight, dbias = np.einsum("nd,nd->d", dy2, xhat2), dy2.sum(0)
    dxhat = dy if weight is None else dy * weight
    along = np.einsum("...d,...d->...", dxhat, xhat)[..., None] / x.shape[-1]
    dx = dxhat - dxhat.mean(-1, keepdims=True)
    dx -= xhat * along
    dx *= rstd
    return dx, dweight, dbias


def activation(x: np.ndarray, function: str) -> np.ndarray:
    """relu, gelu in its exact form x·Φ(x), or gelu_new, GPT-2's tanh approximation of it.

    x: (*N, F)  ->  (*N, F)

    Equals torch.nn.functional.relu, gelu(approximate="none") and gelu(approximate="tanh"). Backward: activation_bwd.
    """
    if function == "gelu_new":
        return x * (np.tanh((x * x * x * 0.044715 + x) * math.sqrt(2 / math.pi)) + 1) * 0.5
    return np.maximum(x, 0) if function == "relu" else x * normal_cdf(x)


def activation_bwd(dy: np.ndarray, x: np.ndarray, function: str) -> np.ndarray:
    """relu passes the gradient where x > 0; gelu' = Φ(x) + x φ(x); gelu_new = x (1 + t) / 2 with t = tanh(u): ' = (1 + t) / 2 + x (1 - t²) u' / 2.

    dy: (*N, F);  x: (*N, F)  ->  (*N, F)
    """
    if function == "relu":
        return dy * (x > 0)
    if function == "gelu_new":
        t = np.tanh((x * x * x * 0.044715 + x) * math.sqrt(2 / math.pi))
        du = (3 * 0.044715 * x * x + 1) * math.sqrt(2 / math.pi)
        return dy * (1 + t + x * (1 - t * t) * du) / 2
    return dy * (normal_cdf(x) + x * np.exp(-x * x / 2) * (1 / math.sqrt(2 * math.pi)))


def mlp(h: np.ndarray, fc1: dict[str, Any], fc2: dict[str, Any], function: str) -> np.ndarray:
    """fc1, activation, fc2; fc1 and fc2 hold weight (F, D) and (D, F), and bias.

    h: (*N, D)  ->  (*N, D)

    Equals the feed-forward half of HF's OPTDecoderLayer. Backward: grad.mlp_bwd.
    """
    return linear(activation(linear(h, **fc1), function), **fc2)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, layout: Any = None) -> np.ndarray:
    """Causal attention, aligned to the end of the keys: softmax(scale·q kᵀ) v over the keys that each query sees.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh)  ->  (B, T, H, Dh)

    `layout.visible`, (B, S), hides keys (padding); a query that sees no key gives exactly 0.
    Equals torch's scaled_dot_product_attention. Backward: attention_bwd.
    """
    return attention_lse(q, k, v, scale, layout)[0]


def attention_lse(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, layout: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """`attention`, and L, the log-sum-exp of each query's scores, from which the backward pass recomputes the weights: exp(score - L).

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh)  ->  (B, T, H, Dh), (B, T, H)
    """
    O, L = np.empty_like(q), np.empty(q.shape[:3], q.dtype)
    for rows, scores in _score_blocks(q, k, scale, layout):
        P, total, m = softmax_terms(scores)
        O[:, rows] = ((P @ v[:, : P.shape[-1]].swapaxes(1, 2)) / total).swapaxes(1, 2)  # dividing O is less work than dividing P
        L[:, rows] = (m + np.log(total))[..., 0].swapaxes(1, 2)  # (B, H, n, 1) -> (B, n, H)
    return O, L


def attention_scores(q: np.ndarray, k: np.ndarray, scale: float, layout: Any = None) -> np.ndarray:
    """The full score matrix, before `attention`'s softmax: -inf where a key is hidden or in the future.

    q: (B, T, H, Dh);  k: (B, S, H, Dh)  ->  (B, H, T, S)
    """
    B, T, H, _ = q.shape
    whole = np.full((B, H, T, k.shape[1]), -np.inf, q.dtype)
    for rows, scores in _score_blocks(q, k, scale, layout):
        whole[:, :, rows, : scores.shape[-1]] = scores
    return whole


def attention_probs(q: np.ndarray, k: np.ndarray, scale: float, layout: Any = None, rows: Any = None) -> np.ndarray:
    """The weights that `attention` gives each key, for all queries, or only for those at the positions in `rows`: (B, H, R, S).

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  rows: (R)  ->  (B, H, T, S)

    Equals HF's `attentions`, except that a query which sees no key has zeros.
    """
    B, T, H, _ = q.shape
    probs = np.zeros((B, H, T, k.shape[1]), q.dtype)
    for block, scores in _score_blocks(q, k, scale, layout):
        probs[:, :, block, : scores.shape[-1]] = softmax(scores)
    return probs if rows is None else probs[:, :, rows]


def attention_bwd(dO: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, O: np.ndarray, L: np.ndarray, scale: float,
                  layout: Any = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Gradients of `attention` by q, k and v; the weights are recomputed from L, block by block, so memory stays O(T).

    dO: (B, T, H, Dh);  q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh);  O: (B, T, H, Dh);  L: (B, T, H)
    -> (B, T, H, Dh), (B, S, H, Dh), (B, S, H, Dh)
    """
    dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
    for rows, P in _score_blocks(q, k, scale, layout):
        P -= np.maximum(L[:, rows], np.finfo(q.dtype).min).swapaxes(1, 2)[..., None]  # scores, until exp(scores - L). L is -inf where no key is seen
        np.exp(P, out=P)
        keys = slice(P.shape[-1])
        dO_, O_, q_, k_, v_ = (a.swapaxes(1, 2) for a in (dO[:, rows], O[:, rows], q[:, rows], k[:, keys], v[:, keys]))  # (B, H, ·, Dh)
        dv[:, keys] += (P.swapaxes(2, 3) @ dO_).swapaxes(1, 2)
        dscores = dO_ @ v_.swapaxes(2, 3)  # this is dP
        dscores -= np.einsum("bhtd,bhtd->bht", dO_, O_)[..., None]  # softmax: dscores = P (dP - Σ dP P), and Σ dP P is Σ dO O
        dscores *= P
        dscores *= scale
        dq[:, rows] = (dscores @ k_).swapaxes(1, 2)
        dk[:, keys] += (dscores.swapaxes(2, 3) @ q_).swapaxes(1, 2)
    return dq, dk, dv


def _score_blocks(q: np.ndarray, k: np.ndarray, scale: float, layout: Any) -> Iterator[tuple[slice, np.ndarray]]:
    """A block of query rows at a time: their scores, -inf where a key is hidden or in the future.  -> rows, (B, H, n, keys)

    Only keys up to the block's last row: what lies above the diagonal is never computed.
    """
    T, S = q.shape[1], k.shape[1]
    visible = getattr(layout, "visible", None)
    for first in range(0, T, QUERY_BLOCK):
        rows = slice(first, min(first + QUERY_BLOCK, T))
        keys = S - T + rows.stop  # the block's last query sees this many keys
        n = rows.stop - first
        # HF scales q, bias and all, before the product.  (B, n, H, Dh), (B, keys, H, Dh) -> (B, H, n, keys)
        scores = (q[:, rows] * scale).swapaxes(1, 2) @ k[:, :keys].transpose(0, 2, 3, 1)
        if n > 1:
            scores[..., keys - n :] += np.triu(np.full((n, n), -np.inf, q.dtype), 1)  # the block on the diagonal
        if visible is not None:
            np.copyto(scores, -np.inf, where=~visible[:, None, None, :keys])
        yield rows, scores


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; a row of -inf becomes zeros, not NaN.

    scores: (*N, S)  ->  (*N, S)
    """
    weights, total, _ = softmax_terms(scores.copy())
    weights /= total
    return weights


def softmax_terms(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """exp(scores - their maximum), in place, its sum, and the maximum.

    scores: (*N, S)  ->  (*N, S), (*N, 1), (*N, 1)
    """
    m = scores.max(-1, keepdims=True)
    scores -= np.maximum(m, np.finfo(scores.dtype).min)  # a row of -inf stays -inf, and becomes 0
    np.exp(scores, out=scores)
    return scores, np.maximum(scores.sum(-1, keepdims=True), 1), m  # the sum is at least exp(0) = 1, unless the row is all 0


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Sum over rows of -log softmax(logits)[label], and its gradient, written over the logits.

    logits: (N, V);  labels: (N)  ->  loss, (N, V)

    Equals torch.nn.functional.cross_entropy(reduction="sum").
    """
    rows = np.arange(len(labels))
    logits -= logits.max(-1, keepdims=True)
    wanted = logits[rows, labels]
    np.exp(logits, out=logits)
    total = logits.sum(-1, keepdims=True)
    logits /= total
    logits[rows, labels] -= 1
    return float(np.sum(np.log(total[:, 0]) - wanted, dtype=np.float64)), logits


def normal_cdf(x: np.ndarray) -> np.ndarray:
    """Φ(x) = (1 + erf(x/√2)) / 2, to the dtype's precision; NumPy has no erf.

    x: (*N)  ->  (*N)
    """
    z = np.minimum(np.abs(x) * math.sqrt(0.5), 6)  # beyond 6, erfc is under 1e-16
    t = 2 / (2 + z)
    u = (8 * t - 5) / 3  # t in [1/4, 1] -> u in [-1, 1]
    b, c = np.zeros_like(u), np.zeros_like(u)
    for coefficient in _ERFC[:0:-1]:  # Clenshaw's recurrence
        b, c = 2 * u * b - c + coefficient, b
    tail = t * np.exp(u * b - c + _ERFC[0] - z * z) / 2 * (z < 6)  # erfc(z) / 2
    return np.where(x < 0, tail, 1 - tail)


def _erfc_coefficients(degree: int = 26) -> list[float]:
    """Chebyshev coefficients of log(erfc(z)/t) + z² as a function of u, which is nearly a straight line and so needs few terms."""

    def smooth(u: Any) -> Any:
        t = (5 + 3 * u) / 8
        z = 2 / t - 2
        return np.array([math.log(math.erfc(zi) / ti) + zi * zi for zi, ti in zip(z, t, strict=True)])

    return [float(c) for c in np.polynomial.chebyshev.chebinterpolate(smooth, degree)]


_ERFC = _erfc_coefficients()
