"""The backward pass, written by hand: each forward function has a pair *_fwd, *_bwd.

`f_fwd` calls the same op as model.py and also returns `saved`, what its backward needs; `f_bwd(dy, saved)` returns the gradient of the input and,
where there are parameters, their gradients in a tree of the same shape. dy is the gradient of the loss by y. Dropout exists only here: without an rng
nothing is dropped, and `decoder_layer_fwd` then equals model.decoder_layer bit for bit. The formulas for attention, LayerNorm, the activation and
the loss are in ops.py, because each backend has its own. Axes as in model.py; F is ffn_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from opt_np import ops as numpy_ops
from opt_np.config import POSITION_OFFSET, OPTConfig
from opt_np.model import Layout, embeddings, id_array, label_array, make_layout, no_tap
from opt_np.ops import cross_entropy

IGNORED = -100  # the label of a position without a target
LOGIT_ROWS = 1024  # the loss is computed for this many tokens at a time, to bound the memory of their logits
COPIED_ROWS = 32  # … and from given logits for this many, so that their copy stays in the cache


# ---- operations --------------------------------------------------------------------------------------------------------------------------


def embed_bwd(dx: np.ndarray, ids: np.ndarray, dweight: np.ndarray, padding_idx: int | None = None) -> np.ndarray:
    """Adds the gradient of each lookup to its row of dweight, in place; the row padding_idx gets none, as in torch.

    dx: (*N, D);  ids: (*N);  dweight: (V, D)  ->  (V, D)
    """
    order = np.argsort(ids, axis=None, kind="stable")
    used, first = np.unique(ids.ravel()[order], return_index=True)
    sums = np.add.reduceat(dx.reshape(-1, dx.shape[-1])[order], first, axis=0)  # (used rows, D)
    learns = used != padding_idx
    dweight[used[learns]] += sums[learns]
    return dweight


def linear_fwd(x: np.ndarray, p: dict, ops: ModuleType = numpy_ops) -> tuple[np.ndarray, tuple]:
    """x: (*N, I)  ->  (*N, O), saved"""
    return ops.linear(x, **p), (x, p, ops)


def linear_bwd(dy: np.ndarray, saved: tuple) -> tuple[np.ndarray, dict]:
    """y = x Wᵀ + b:  dx = dy W,  dW = dyᵀ x,  db = Σ dy.

    dy: (*N, O)  ->  (*N, I), gradients of weight and bias
    """
    x, p, ops = saved
    dy2, x2 = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])  # (*N, O) -> (ΣN, O)
    dp = {"weight": ops.matmul(dy2.T, x2)}
    if "bias" in p:
        dp["bias"] = dy2.sum(0)
    return ops.matmul(dy2, p["weight"]).reshape(x.shape), dp


def layer_norm_fwd(x: np.ndarray, p: dict, ops: ModuleType = numpy_ops) -> tuple[np.ndarray, tuple]:
    """x: (*N, D)  ->  (*N, D), saved"""
    return ops.layer_norm(x, **p), (x, p, ops)


def layer_norm_bwd(dy: np.ndarray, saved: tuple) -> tuple[np.ndarray, dict]:
    """dy: (*N, D)  ->  (*N, D), gradients of weight and bias"""
    x, p, ops = saved
    dx, dweight, dbias = ops.layer_norm_bwd(dy, x, p.get("weight"))
    return dx, {"weight": dweight, "bias": dbias} if p else {}


def mlp_fwd(h: np.ndarray, fc1: dict, fc2: dict, function: str, ops: ModuleType = numpy_ops) -> tuple[np.ndarray, tuple]:
    """h: (*N, D)  ->  (*N, D), saved"""
    a, saved1 = linear_fwd(h, fc1, ops)  # (B, T, D) -> (B, T, F)
    y, saved2 = linear_fwd(ops.activation(a, function), fc2, ops)
    return y, (saved1, a, function, saved2, ops)


def mlp_bwd(dy: np.ndarray, saved: tuple) -> tuple[np.ndarray, dict, dict]:
    """dy: (*N, D)  ->  (*N, D), gradients of fc1 and of fc2"""
    saved1, a, function, saved2, ops = saved
    da, dfc2 = linear_bwd(dy, saved2)
    dh, dfc1 = linear_bwd(ops.activation_bwd(da, a, function), saved1)
    return dh, dfc1, dfc2


def dropout_fwd(x: np.ndarray, rate: float, rng: np.random.Generator | None) -> tuple[np.ndarray, tuple | None]:
    """Zeroes a share `rate` of x and scales the rest by 1 / (1 - rate); without an rng, x itself.  x: (*N)  ->  (*N), saved"""
    if rng is None or rate == 0:
        return x, None
    saved = rng.random(x.shape, np.float32) >= rate, 1 / (1 - rate)
    return dropout_bwd(x, saved), saved


def dropout_bwd(dy: np.ndarray, saved: tuple | None) -> np.ndarray:
    """The same elements are dropped and scaled as in the forward pass.  dy: (*N)  ->  (*N)"""
    if saved is None:
        return dy
    kept, scale = saved
    return dy * kept * scale


# ---- attention ---------------------------------------------------------------------------------------------------------------------------


def attention_fwd(q: Any, k: Any, v: Any, scale: float, layout: Layout, rate: float, rng: np.random.Generator | None,
                  ops: ModuleType = numpy_ops) -> tuple[np.ndarray, tuple]:  # fmt: skip
    """ops.attention; with attention_dropout (Galactica: 0.1) dropout acts on the attention weights, so they are computed in full.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh)  ->  (B, T, H, Dh), saved
    """
    if rng is None or rate == 0:
        O, L = ops.attention_lse(q, k, v, scale, layout)
        return O, (q, k, v, scale, layout, ops, O, L, None, None)
    P = ops.attention_probs(q, k, scale, layout)
    thinned, dropped = dropout_fwd(P, rate, rng)
    return (thinned @ v.swapaxes(1, 2)).swapaxes(1, 2), (q, k, v, scale, layout, ops, None, None, P, dropped)


def attention_bwd(dO: np.ndarray, saved: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ops.attention_bwd, or the same with dropout between the weights and the values.

    dO: (B, T, H, Dh)  ->  (B, T, H, Dh), (B, S, H, Dh), (B, S, H, Dh)
    """
    q, k, v, scale, layout, ops, O, L, P, dropped = saved
    if P is None:
        return ops.attention_bwd(dO, q, k, v, O, L, scale, layout)
    dO, q, k, v = (a.swapaxes(1, 2) for a in (dO, q, k, v))  # (B, T, H, Dh) -> (B, H, T, Dh)
    dv = dropout_bwd(P, dropped).swapaxes(2, 3) @ dO
    dP = dropout_bwd(dO @ v.swapaxes(2, 3), dropped)
    dscores = P * (dP - (dP * P).sum(-1, keepdims=True)) * scale
    return (dscores @ k).swapaxes(1, 2), (dscores.swapaxes(2, 3) @ q).swapaxes(1, 2), dv.swapaxes(1, 2)


def self_attention_fwd(h: np.ndarray, p: dict, cfg: OPTConfig, layout: Layout, rng: np.random.Generator | None,
                       ops: ModuleType = numpy_ops) -> tuple[np.ndarray, tuple]:  # fmt: skip
    """model.self_attention, saving what the backward pass needs.  h: (B, T, D)  ->  (B, T, D), saved"""
    heads = (*h.shape[:-1], cfg.num_attention_heads, cfg.head_dim)
    q, k, v = (ops.linear(h, **p[name]).reshape(heads) for name in ("q_proj", "k_proj", "v_proj"))
    O, attn = attention_fwd(q, k, v, cfg.head_dim**-0.5, layout, cfg.attention_dropout, rng, ops)
    y, out_proj = linear_fwd(O.reshape(h.shape), p["out_proj"], ops)
    return y, (h, p, attn, out_proj, ops)


def self_attention_bwd(dy: np.ndarray, saved: tuple) -> tuple[np.ndarray, dict]:
    """dy: (B, T, D)  ->  (B, T, D), gradients of the four projections"""
    h, p, attn, out_proj, ops = saved
    dO, d_out = linear_bwd(dy, out_proj)
    dqkv = attention_bwd(dO.reshape(attn[0].shape), attn)  # attn[0] is q
    dh, dp = np.zeros_like(h), {}
    for name, d in zip(("q_proj", "k_proj", "v_proj"), dqkv, strict=True):
        dh_, dp[name] = linear_bwd(d.reshape(h.shape), (h, p[name], ops))
        dh += dh_
    return dh, {**dp, "out_proj": d_out}


# ---- the block and the stack -------------------------------------------------------------------------------------------------------------


def decoder_layer_fwd(x: np.ndarray, p: dict, cfg: OPTConfig, layout: Layout, rng: np.random.Generator | None = None,
                      ops: ModuleType = numpy_ops) -> tuple[np.ndarray, tuple]:  # fmt: skip
    """model.decoder_layer, saving what the backward pass needs, with dropout after out_proj and after fc2 (HF's OPTDecoderLayer).

    x: (B, T, D)  ->  (B, T, D), saved
    """
    pre, ln1, ln2 = cfg.do_layer_norm_before, p.get("self_attn_layer_norm", {}), p.get("final_layer_norm", {})
    h, norm1 = layer_norm_fwd(x, ln1, ops) if pre else (x, None)
    h, attn = self_attention_fwd(h, p["self_attn"], cfg, layout, rng, ops)
    h, drop1 = dropout_fwd(h, cfg.dropout, rng)
    x = x + h
    if not pre:
        x, norm1 = layer_norm_fwd(x, ln1, ops)

    h, norm2 = layer_norm_fwd(x, ln2, ops) if pre else (x, None)
    h, ffn = mlp_fwd(h, p["fc1"], p["fc2"], cfg.activation_function, ops)
    h, drop2 = dropout_fwd(h, cfg.dropout, rng)
    x = x + h
    if not pre:
        x, norm2 = layer_norm_fwd(x, ln2, ops)
    return x, (pre, norm1, attn, drop1, norm2, ffn, drop2)


def decoder_layer_bwd(dx: np.ndarray, saved: tuple) -> tuple[np.ndarray, dict]:
    """The lines of decoder_layer_fwd from the last to the first; at each `x = x + h` the gradient flows into both terms.

    dx: (B, T, D)  ->  (B, T, D), gradients of the layer's tree
    """
    pre, norm1, attn, drop1, norm2, ffn, drop2 = saved
    if not pre:
        dx, d_ln2 = layer_norm_bwd(dx, norm2)
    dh = dropout_bwd(dx, drop2)
    dh, d_fc1, d_fc2 = mlp_bwd(dh, ffn)
    if pre:
        dh, d_ln2 = layer_norm_bwd(dh, norm2)
    dx = dx + dh

    if not pre:
        dx, d_ln1 = layer_norm_bwd(dx, norm1)
    dh = dropout_bwd(dx, drop1)
    dh, d_attn = self_attention_bwd(dh, attn)
    if pre:
        dh, d_ln1 = layer_norm_bwd(dh, norm1)
    dp = {"self_attn": d_attn, "fc1": d_fc1, "fc2": d_fc2}
    if d_ln1:
        dp |= {"self_attn_layer_norm": d_ln1, "final_layer_norm": d_ln2}
    return dx + dh, dp


def decoder_fwd(
    params: dict, input_ids: np.ndarray, cfg: OPTConfig, attention_mask: Any, rng: np.random.Generator | None, ops: ModuleType = numpy_ops
) -> tuple[np.ndarray, tuple]:
    """model.last_hidden_state, saving what the backward pass needs.  input_ids: (B, T)  ->  (B, T, W), saved"""
    tokens = params["embed_tokens"]
    if "scale" in tokens or getattr(tokens["weight"], "kind", None):
        raise ValueError("whole numbers have no gradients, and this model's weights are int8 or int4; train the checkpoint that they were made from")
    if not isinstance(params["layers"], list):
        raise ValueError("gradients need every layer in memory, and this model's are read from disk one by one; load it without stream_layers")
    layout = make_layout(cfg, input_ids, attention_mask)
    x = embeddings(params, input_ids, layout, ops, no_tap)
    project_in = (ops.embed(input_ids, **params["embed_tokens"]), params["project_in"], ops) if "project_in" in params else None
    layers, norm, project_out = [], None, None
    for p in params["layers"]:
        x, saved = decoder_layer_fwd(x, p, cfg, layout, rng, ops)
        layers.append(saved)
    if cfg.has_final_layer_norm:
        x, norm = layer_norm_fwd(x, params.get("final_layer_norm", {}), ops)
    if "project_out" in params:
        x, project_out = linear_fwd(x, params["project_out"], ops)
    return x, (input_ids, layout, cfg, project_in, layers, norm, project_out)


def decoder_bwd(dx: np.ndarray, saved: tuple, d_head: dict) -> dict:
    """Gradients of the decoder, merged with the head's; a tied token matrix sums those of embedding and head.  dx: (B, T, W)"""
    input_ids, layout, cfg, project_in, layers, norm, project_out = saved
    grads: dict[str, Any] = dict(d_head)
    if project_out is not None:
        dx, grads["project_out"] = linear_bwd(dx, project_out)
    if norm is not None:
        dx, d_norm = layer_norm_bwd(dx, norm)
        grads |= {"final_layer_norm": d_norm} if d_norm else {}
    grads["layers"] = [None] * len(layers)
    for i in reversed(range(len(layers))):
        dx, grads["layers"][i] = decoder_layer_bwd(dx, layers.pop())  # popped, so that its arrays are freed once used
    rows = np.broadcast_to(layout.positions, input_ids.shape) + POSITION_OFFSET
    d_positions = np.zeros((cfg.max_position_embeddings + POSITION_OFFSET, cfg.hidden_size), dx.dtype)
    grads["embed_positions"] = {"weight": embed_bwd(dx, rows, d_positions)}
    if project_in is not None:
        dx, grads["project_in"] = linear_bwd(dx, project_in)
    if "embed_tokens" not in grads:
        grads["embed_tokens"] = {"weight": np.zeros((cfg.vocab_size, cfg.word_embed_proj_dim), dx.dtype)}
    embed_bwd(dx, input_ids, grads["embed_tokens"]["weight"], cfg.pad_token_id)
    return grads


# ---- losses and heads: each returns the loss, the gradient of the decoder's output, and the gradients of the head's own tree ---------------

Head = Callable[..., tuple[float, np.ndarray, dict]]


def language_model_head(h: np.ndarray, params: dict, input_ids: np.ndarray, labels: np.ndarray, cfg: OPTConfig, num_items: int | None = None,
                        ops: ModuleType = numpy_ops):  # fmt: skip
    """Next-token cross-entropy: labels are shifted here, -100 is ignored, the mean is over the rest (or over num_items).

    h: (B, T, W);  labels: (B, T)  ->  loss, (B, T, W), gradients

    Equals HF's ForCausalLMLoss. Logits are computed for LOGIT_ROWS tokens at a time.
    """
    name = "lm_head" if "lm_head" in params else "embed_tokens"
    weight = params[name]["weight"]
    kept, wanted = wanted_tokens(labels, input_ids.shape, cfg.vocab_size)
    h_kept, count = h[:, :-1][kept], num_items or len(wanted)  # (n, W)
    loss, dh, dweight, dh_kept = 0.0, np.zeros_like(h), np.empty(0), np.empty_like(h_kept)
    for first in range(0, len(wanted), LOGIT_ROWS):
        rows = slice(first, first + LOGIT_ROWS)
        part, dlogits = ops.cross_entropy(ops.linear(h_kept[rows], weight), wanted[rows])
        loss += part / count
        dh_kept[rows] = ops.matmul(dlogits, weight)
        dh_kept[rows] /= count  # the mean's divisor: on (n, W) less work than on (n, V)
        part_dweight = ops.matmul(dlogits.T, h_kept[rows] / count)
        dweight = dweight + part_dweight if first else part_dweight
    dh[kept] = dh_kept  # positions index the first T-1 columns, so they index h itself too
    return loss, dh, {name: {"weight": dweight}}


def shifted_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The loss of language_model_head without gradients, from given logits.  logits: (B, T, V);  labels: (B, T)"""
    (rows, columns), wanted = wanted_tokens(labels, logits.shape[:2], logits.shape[2])
    parts = (slice(first, first + COPIED_ROWS) for first in range(0, len(wanted), COPIED_ROWS))
    return sum(cross_entropy(logits[rows[part], columns[part]], wanted[part])[0] for part in parts) / len(wanted)


def wanted_tokens(labels: np.ndarray, shape: tuple[int, ...], vocab_size: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The positions (rows, columns) that have a target, and the targets: the labels of the next tokens.  Raises ValueError.

    labels: (B, T)  ->  indices of the n positions, (n)
    """
    if labels.shape != shape:
        raise ValueError(f"labels is {labels.shape}, input_ids {shape}; there is one label for each token, shifted inside")
    kept = np.nonzero(labels[:, 1:] != IGNORED)
    wanted = labels[:, 1:][kept]
    if not len(wanted):
        raise ValueError(f"no label is left to learn from: after shifting by one, all {labels.size} labels are {IGNORED} or cut off")
    check_labels(wanted, vocab_size)
    return kept, wanted


def check_labels(labels: np.ndarray, count: int) -> None:
    """Raises ValueError for a label that is not an integer from 0 to count - 1."""
    if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0 or labels.max(initial=0) >= count:
        raise ValueError(
            f"labels hold {labels.dtype} from {labels.min()} to {labels.max()}; they are whole numbers from 0 to {count - 1}, or {IGNORED} for none"
        )


def pooled_rows(input_ids: np.ndarray, pad_token_id: int | None) -> np.ndarray:
    """The column at which each row is classified: its rightmost token that is not the pad (HF's rule: by id, whatever the mask).

    input_ids: (B, T)  ->  (B)
    """
    if pad_token_id is None:
        if len(input_ids) > 1:
            raise ValueError(
                f"config.json's pad_token_id is null, so the end of each of {len(input_ids)} rows cannot be found; set it, or pass one row"
            )
        return np.array([input_ids.shape[1] - 1])
    return (np.arange(input_ids.shape[1]) * (input_ids != pad_token_id)).argmax(-1)


def classification_loss(logits: np.ndarray, labels: np.ndarray, problem_type: str | None) -> tuple[float, np.ndarray]:
    """Mean loss and its gradient by HF's three problem types: regression (MSE), single_label (CE), multi_label (BCE with logits).

    logits: (B, L);  labels: (B) or (B, L)  ->  loss, (B, L)
    """
    labels = np.asarray(labels)
    B, L = logits.shape
    if problem_type is None:
        problem_type = "regression" if L == 1 else "single_label_classification" if labels.dtype.kind in "iu" else "multi_label_classification"
    if problem_type == "regression":
        difference = logits - labels.reshape(B, L).astype(logits.dtype)
        return float((difference**2).mean()), difference * (2 / difference.size)
    if problem_type == "single_label_classification":
        kept = np.nonzero(labels.reshape(B) != IGNORED)[0]
        check_labels(labels.reshape(B)[kept], L)
        loss, part = cross_entropy(logits[kept], labels.reshape(B)[kept])
        dlogits = np.zeros_like(logits)
        dlogits[kept] = part / max(len(kept), 1)
        return loss / len(kept) if len(kept) else math.nan, dlogits
    if problem_type == "multi_label_classification":
        if labels.shape != logits.shape:
            raise ValueError(f"labels is {labels.shape}; multi_label_classification wants a 0 or 1 for each row and label, {logits.shape}")
        wanted = labels.astype(logits.dtype)
        loss = np.maximum(logits, 0) - logits * wanted + np.log1p(np.exp(-np.abs(logits)))
        return float(loss.mean()), (np.exp(np.minimum(logits, 0)) / (1 + np.exp(-np.abs(logits))) - wanted) / logits.size
    raise ValueError(f"problem_type {problem_type!r} is none of regression, single_label_classification, multi_label_classification")


def classification_head(h: np.ndarray, params: dict, input_ids: np.ndarray, labels: np.ndarray, cfg: OPTConfig, num_items: int | None = None,
                        ops: ModuleType = numpy_ops):  # fmt: skip
    """`score`, read at each row's last real token.  h: (B, T, W)  ->  loss, (B, T, W), gradients.  Equals OPTForSequenceClassification."""
    at = np.arange(len(h)), pooled_rows(input_ids, cfg.pad_token_id)
    logits, saved = linear_fwd(h[at], params["score"], ops)  # (B, W) -> (B, L)
    loss, dlogits = classification_loss(logits, labels, cfg.extra.get("problem_type"))
    share = len(h) / (num_items or len(h))
    dh = np.zeros_like(h)
    dh[at], d_score = linear_bwd(dlogits * share, saved)
    return loss * share, dh, {"score": d_score}


def question_loss(logits: np.ndarray, positions: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean of the start's and the end's cross-entropy over the T tokens; positions are clamped to [0, T], and T is ignored.

    logits: (B, T, 2);  positions: (B, 2)  ->  loss, (B, T, 2)
    """
    B, T = logits.shape[:2]
    if positions.shape != (B, 2):
        raise ValueError(f"start and end positions are {positions.shape}; {B} rows want {(B, 2)}")
    loss, dlogits = 0.0, np.zeros_like(logits)
    for side in (0, 1):
        wanted = np.clip(positions[:, side], 0, T)
        rows = np.nonzero(wanted < T)[0]
        part, d = cross_entropy(logits[rows, :, side], wanted[rows])
        loss += part / len(rows) / 2 if len(rows) else math.nan
        dlogits[rows, :, side] = d / (2 * max(len(rows), 1))
    return loss, dlogits


def question_head(h: np.ndarray, params: dict, input_ids: np.ndarray, labels: np.ndarray, cfg: OPTConfig, num_items: int | None = None,
                  ops: ModuleType = numpy_ops):  # fmt: skip
    """`qa_outputs`, a start and an end score per token; labels (B, 2) hold both positions.  Equals OPTForQuestionAnswering."""
    logits, saved = linear_fwd(h, params["qa_outputs"], ops)  # (B, T, W) -> (B, T, 2)
    loss, dlogits = question_loss(logits, np.asarray(labels))
    share = len(h) / (num_items or len(h))
    dh, d_qa = linear_bwd(dlogits * share, saved)
    return loss * share, dh, {"qa_outputs": d_qa}


def loss_and_grads(params: dict, input_ids: Any, labels: Any, cfg: OPTConfig, attention_mask: Any = None, head: Head = language_model_head,
                   num_items: int | None = None, rng: np.random.Generator | None = None,
                   ops: ModuleType = numpy_ops) -> tuple[float, dict]:  # fmt: skip
    """The loss and its gradient by every parameter, in a tree like the parameters'.

    input_ids: (B, T);  labels: (B, T);  attention_mask: (B, T)  ->  loss, grads

    `num_items` replaces the count that the mean divides by (gradient accumulation: the count of the whole batch); `rng` turns dropout on;
    `ops` is the backend.
    As in HF, labels are shifted inside and -100 is ignored. Raises ValueError as `make_layout` does, and if no label is left.
    """
    input_ids, labels, num_items = id_array(input_ids), label_array(labels), None if num_items is None else int(num_items)
    h, saved = decoder_fwd(params, input_ids, cfg, attention_mask, rng, ops)
    loss, dh, d_head = head(h, params, input_ids, labels, cfg, num_items, ops)
    return loss, decoder_bwd(dh, saved, d_head)
