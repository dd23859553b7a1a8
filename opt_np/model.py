"""OPT's decoder: one block on one screen, the stack, and the heads.

The parameters are the checkpoint's tensors in nested dicts under the checkpoint's names, unpacked as keyword arguments.
`ops` is a backend: a module with the functions of opt_np.ops. Axes: B rows, T new tokens, S keys (past + T), D hidden_size, V vocab_size,
W word_embed_proj_dim (D for all sizes but 350m). The backward pass is in grad.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from opt_np import ops as numpy_ops
from opt_np.arrays import host
from opt_np.config import POSITION_OFFSET, OPTConfig
from opt_np.kv_cache import KVCache

Tap = Callable[[str, Any], Any]  # tap(name, value) -> value: called with each named activation; what it returns is used


def no_tap(name: str, value: Any) -> Any:
    """The tap that does nothing; with it the fused ops run."""
    return value


def within(path: str, tap: Tap) -> Tap:
    """The same tap for names below `path`."""
    return tap if tap is no_tap else lambda name, value: tap(f"{path}.{name}", value)


class Layout(NamedTuple):
    """The position of each token, and which keys are visible; built once per call, on the host (the CPU)."""

    positions: np.ndarray  # (B, T) or (1, T); -1 at pads
    visible: np.ndarray | None  # (B, S) bool: False hides a key from every query; None: all visible
    past: int  # keys already in the cache


def id_array(input_ids: Any, name: str = "input_ids", way_out: str = "pad them, tok(…, padding=True), and pass the attention_mask") -> np.ndarray:
    """Lists or an array as a NumPy array; raises ValueError for rows of different lengths."""
    try:
        return host(input_ids)
    except ValueError:
        lengths = [len(row) if hasattr(row, "__len__") else 1 for row in input_ids]
        raise ValueError(f"{name} has rows of {min(lengths)} to {max(lengths)} tokens; {way_out}") from None


def mask_array(attention_mask: Any) -> np.ndarray:
    """bool, int or float 0 and 1 as int64; raises ValueError for other values."""
    mask = id_array(attention_mask, "attention_mask", "make them as long as those of input_ids, 0 at padding")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("attention_mask holds values other than 0 (hidden) and 1 (visible)")
    return mask.astype(np.int64)


def label_array(labels: Any) -> np.ndarray:
    """Labels as a NumPy array; raises ValueError for rows of different lengths."""
    return id_array(labels, "labels", "make them equally long")


def check_ids(cfg: OPTConfig, input_ids: np.ndarray) -> None:
    """Raises ValueError unless input_ids is (B, T), T at least 1, of ids in the vocabulary."""
    if input_ids.ndim != 2 or (input_ids.size and input_ids.dtype.kind not in "iu"):
        raise ValueError(f"input_ids is {input_ids.dtype}{input_ids.shape}; it is whole numbers, (B, T): for one row pass [ids]")
    if not input_ids.size or input_ids.min() < 0 or input_ids.max() >= cfg.vocab_size:
        span = f"hold {input_ids.min()} to {input_ids.max()}" if input_ids.size else f"are empty, {input_ids.shape}"
        raise ValueError(f"input_ids {span}; a row needs at least one token, and vocab_size={cfg.vocab_size} allows 0 to {cfg.vocab_size - 1}")


def make_layout(cfg: OPTConfig, input_ids: np.ndarray, attention_mask: Any = None, position_ids: Any = None, past: int = 0) -> Layout:
    """Positions count the real tokens of a row, as HF does: cumsum(mask)·mask - 1, so left padding does not shift them.

    input_ids: (B, T);  attention_mask: (B, S);  position_ids: (B, T)

    Raises ValueError for ids outside the vocabulary, a mask of another length, and rows with more real tokens than the model has positions.
    """
    check_ids(cfg, input_ids)
    B, T = input_ids.shape
    positions, visible = np.arange(past, past + T)[None], None
    if attention_mask is not None:
        mask = mask_array(attention_mask)
        if mask.shape != (B, past + T):
            raise ValueError(
                f"attention_mask is {mask.shape}; {past} cached and {T} new tokens of {B} rows want {(B, past + T)}: pass the whole mask"
            )
        positions = (np.cumsum(mask, axis=1) * mask - 1)[:, past:]  # mask 0 0 1 1 1 -> positions -1 -1 0 1 2
        visible = None if mask.all() else mask.astype(bool)
    if position_ids is not None:
        positions = np.atleast_2d(host(position_ids))
        if positions.shape not in ((B, T), (1, T)) or positions.dtype.kind not in "iu":
            raise ValueError(f"position_ids is {positions.dtype}{positions.shape}; it is whole numbers, {(B, T)} or {(1, T)}")
    if positions.min() < -1:
        raise ValueError(f"position {positions.min()} is outside this model's 0 to {cfg.max_position_embeddings - 1}; a pad's is -1")
    if positions.max() >= cfg.max_position_embeddings:
        raise ValueError(
            f"position {positions.max()} is outside this model's 0 to {cfg.max_position_embeddings - 1}: "
            f"max_position_embeddings={cfg.max_position_embeddings} is the most real tokens a row may have. "
            f"Shorten the text, keep its last {cfg.max_position_embeddings} tokens, or score it in windows"
        )
    return Layout(positions, visible, past)


def self_attention(h: Any, p: dict, cfg: OPTConfig, layout: Layout, ops: ModuleType, cache: KVCache | None, i: int, tap: Tap, kept: Any = ...) -> Any:
    """Queries come from h[kept], the last tokens (by default all: h[...] is h), keys and values from all of h.  h: (B, T, D)  ->  (B, T, D)"""
    wanted, heads = h[kept], (cfg.num_attention_heads, cfg.head_dim)
    inputs = ("q_proj", wanted), ("k_proj", h), ("v_proj", h)
    q, k, v = (tap(f"self_attn.{name}", ops.linear(x, **p[name])).reshape(*x.shape[:-1], *heads) for name, x in inputs)  # -> (B, T, H, Dh)
    if cache is not None:
        k, v = cache.extend(i, k, v)  # (B, T, H, Dh) -> (B, S, H, Dh)
    if tap is no_tap:
        O = ops.attention(q, k, v, cfg.head_dim**-0.5, layout)
    else:  # the same up to rounding, by the unfused ops, so that scores and weights can be seen and edited
        scores = tap("self_attn.attn_scores", ops.attention_scores(q, k, cfg.head_dim**-0.5, layout))  # (B, H, T, S), -inf where a key is hidden
        probs = tap("self_attn.attn_weights", ops.softmax(scores))
        O = tap("self_attn.attn_output", (probs @ v.swapaxes(1, 2)).swapaxes(1, 2))  # (B, H, T, Dh) -> (B, T, H, Dh)
    return ops.linear(O.reshape(wanted.shape), **p["out_proj"])  # (B, T, H, Dh) -> (B, T, D)


def mlp(h: Any, p: dict, cfg: OPTConfig, ops: ModuleType, tap: Tap) -> Any:
    """h: (B, T, D)  ->  (B, T, D)"""
    if tap is no_tap:
        return ops.mlp(h, p["fc1"], p["fc2"], cfg.activation_function)
    a = tap("activation_fn", ops.activation(tap("fc1", ops.linear(h, **p["fc1"])), cfg.activation_function))  # (B, T, F)
    return ops.linear(a, **p["fc2"])


def decoder_layer(x: Any, p: dict, cfg: OPTConfig, layout: Layout, ops: ModuleType, cache: KVCache | None, i: int, tap: Tap, kept: Any = ...) -> Any:
    """One transformer block. Pre-norm: x + f(LN(x)). Post-norm (opt-350m): LN(x + f(x)).  x: (B, T, D)  ->  (B, T, D)

    Keys and values are computed for all tokens; queries, and all that follows, for x[kept] alone (default: all). Equals HF's OPTDecoderLayer.
    Backward: grad.decoder_layer_bwd.
    """
    pre = cfg.do_layer_norm_before

    def norm(name: str, x: Any) -> Any:
        return tap(name, ops.layer_norm(x, **p.get(name, {})))  # no tensors where layer_norm_elementwise_affine is false

    x = tap("resid_pre", x)
    h = norm("self_attn_layer_norm", x) if pre else x
    x = tap("resid_mid", x[kept] + tap("self_attn", self_attention(h, p["self_attn"], cfg, layout, ops, cache, i, tap, kept)))
    x = x if pre else norm("self_attn_layer_norm", x)

    h = norm("final_layer_norm", x) if pre else x  # the block's second norm, by HF's name; the one after the last block is in `final`
    x = tap("resid_post", x + tap("fc2", mlp(h, p, cfg, ops, tap)))
    return x if pre else norm("final_layer_norm", x)


def embeddings(params: dict, input_ids: np.ndarray, layout: Layout, ops: ModuleType, tap: Tap) -> Any:
    """Token plus learned position embeddings; opt-350m projects those of the tokens first.  input_ids: (B, T)  ->  (B, T, D)"""
    x = tap("model.decoder.embed_tokens", ops.embed(input_ids, **params["embed_tokens"]))
    if "project_in" in params:
        x = tap("model.decoder.project_in", ops.linear(x, **params["project_in"]))  # (B, T, W) -> (B, T, D)
    return x + tap("model.decoder.embed_positions", ops.embed(layout.positions + POSITION_OFFSET, **params["embed_positions"]))


def decoder(params: dict, x: Any, cfg: OPTConfig, layout: Layout, ops: ModuleType, cache: KVCache | None = None, tap: Tap = no_tap,
            hidden_states: list | None = None, kept: Any = ...) -> Any:  # fmt: skip
    """The stack of blocks; `hidden_states`, if given, collects each block's input.  x: (B, T, D)  ->  (B, T, D)

    kept: an index of the last tokens of x, if only their output is wanted: for the others the last block computes only keys and values.
    """
    T, last = x.shape[1], cfg.num_hidden_layers - 1
    for i, p in enumerate(params["layers"]):
        if hidden_states is not None:
            hidden_states.append(x)
        here = f"model.decoder.layers.{i}"
        x = tap(here, decoder_layer(x, p, cfg, layout, ops, cache, i, within(here, tap), kept if i == last else ...))
    if cache is not None:
        cache.advance(T)
    return x


def last_hidden_state(params: dict, input_ids: Any, cfg: OPTConfig, cache: KVCache | None = None, attention_mask: Any = None,
                      ops: ModuleType = numpy_ops, position_ids: Any = None, tap: Tap | None = None,
                      hidden_states: list | None = None, padding: bool = False, kept: Any = ...) -> Any:  # fmt: skip
    """Everything but the head: embeddings, blocks, final norm, projection.

    input_ids: (B, T);  attention_mask: (B, S);  position_ids: (B, T)  ->  (B, T, W)

    With a cache, the mask covers past and new tokens; no mask means that all are real. `padding`: compute padded positions too; otherwise a backend
    may leave them at 0. `kept`: an index of the last tokens, if only their output is wanted. Equals HF's OPTModel.
    """
    input_ids, tap = id_array(input_ids), tap or no_tap
    layout = make_layout(cfg, input_ids, attention_mask, position_ids, 0 if cache is None else cache.length)
    x = embeddings(params, input_ids, layout, ops, tap)
    if tap is no_tap and hasattr(ops, "decoder"):  # a backend's own, which may leave padding at 0
        x = ops.decoder(params, x, cfg, layout, ops, cache, tap, hidden_states, padding)[kept]
    else:
        x = decoder(params, x, cfg, layout, ops, cache, tap, hidden_states, kept)
    x = final(params, x, cfg, ops, tap)
    if hidden_states is not None:
        hidden_states.append(x)
    return x


def final(params: dict, x: Any, cfg: OPTConfig, ops: ModuleType, tap: Tap) -> Any:
    """After the last block: the final norm, if there is one, and opt-350m's projection.  x: (B, T, D)  ->  (B, T, W)"""
    if cfg.has_final_layer_norm:
        x = tap("model.decoder.final_layer_norm", ops.layer_norm(x, **params.get("final_layer_norm", {})))
    if "project_out" in params:
        x = tap("model.decoder.project_out", ops.linear(x, **params["project_out"]))  # (B, T, D) -> (B, T, W)
    return x


def forward(params: dict, input_ids: Any, cfg: OPTConfig, cache: KVCache | None = None, attention_mask: Any = None, ops: ModuleType = numpy_ops,
            position_ids: Any = None, logits_to_keep: Any = 0, tap: Tap | None = None, hidden_states: list | None = None) -> Any:  # fmt: skip
    """The language model: after each token, a logit for every token of the vocabulary to come next.

    input_ids: (B, T);  attention_mask: (B, S);  position_ids: (B, T)  ->  (B, T, V)

    logits_to_keep: an int n keeps the last n positions, an array keeps those positions; 0 keeps all (the logits of 2048 tokens are 400 MB).
    Raises ValueError as `make_layout` does. Equals HF's OPTForCausalLM. Backward: grad.loss_and_grads.
    """
    h = last_hidden_state(params, input_ids, cfg, cache, attention_mask, ops, position_ids, tap, hidden_states)
    return lm_logits(params, h, ops, logits_to_keep, tap or no_tap)


def lm_logits(params: dict, h: Any, ops: ModuleType, logits_to_keep: Any = 0, tap: Tap = no_tap) -> Any:
    """The head: the token-embedding matrix, or lm_head if the two are not tied.  h: (B, T, W)  ->  (B, T, V)"""
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int | np.integer) else logits_to_keep  # [-0:] keeps all
    return tap("lm_head", ops.linear(h[:, kept], **params.get("lm_head", params["embed_tokens"])))
