"""What the model would predict after each layer, and which of its parts contribute how much to a prediction.

The logit lens (nostalgebraist, 2020) applies the model's own head to every layer's output. Attribution splits one logit: the residual stream is the
sum of what each part added to it, so every logit is a sum over the parts as well (Elhage et al., A Mathematical Framework for Transformer Circuits,
2021), exactly, in both norm orders.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from opt_np import taps
from opt_np.arrays import host
from opt_np.model import final, lm_logits, mask_array, no_tap
from opt_np.ops import LAYER_NORM_EPS

PIECES = ("embed_tokens", "project_in", "embed_positions", "resid_pre", "resid_mid", "resid_post", "attn_output", ".self_attn", "fc2")
Pieces = dict[str, np.ndarray]  # by name, the terms whose sum is the stream: (B, D) each


def unembed(model: Any, x: Any) -> Any:
    """The logits if the stream ended as x: the final norm and projection, if the model has them, and the head.

    x: (B, T, D)  ->  (B, T, V)
    """
    return lm_logits(model.params, final(model.params, x, model.config, model.ops, no_tap), model.ops)


def logit_lens(model: Any, input_ids: Any, **inputs: Any) -> Iterator[tuple[str, Any]]:
    """The logits after the embeddings and after each block, one layer at a time, L + 1 in all; the last are the model's own.

    input_ids: (B, T)  ->  names and (B, T, V)
    """
    states = model(input_ids, output_hidden_states=True, logits_to_keep=1, **inputs).hidden_states
    for i, x in enumerate(states[:-1]):
        yield (f"layer {i - 1}" if i else "embeddings"), unembed(model, x)
    yield f"layer {len(states) - 2}", lm_logits(model.params, states[-1], model.ops)  # the final norm and projection are already applied to these


def attribution(model: Any, input_ids: Any, tokens: Any, position: int = -1, heads: bool = False, **inputs: Any) -> Pieces:
    """What each part of the model contributes to the logits of some tokens at a position; the sum over all parts is the logits.

    input_ids: (B, T);  tokens: (K)  ->  by name, (B, K)

    position -1 is each row's last real token; any other is a column, in which every row must have a real token.
    Parts are the embeddings, each block's attention (each of its heads, and the bias, with heads=True) and mlp, and the biases of the LayerNorms that
    the stream passes through. A LayerNorm's divisor counts as a constant, so that the rest is linear. Raises ValueError for an unknown token.
    """
    tokens, vocab = np.atleast_1d(tokens), model.config.vocab_size
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= vocab:
        raise ValueError(f"tokens is {tokens.tolist()}; it lists ids from 0 to {vocab - 1}, as tok.encode(text, add_special_tokens=False) gives them")
    directions = host(model.ops.embed(tokens, **model.params.get("lm_head", model.params["embed_tokens"])))  # (K, W)
    return {name: piece @ directions.T for name, piece in residual_pieces(model, input_ids, position, heads, **inputs).items()}


def residual_pieces(model: Any, input_ids: Any, position: int = -1, heads: bool = False, **inputs: Any) -> Pieces:
    """The last hidden state at a position, split into what each part of the model contributed; see `attribution`.

    input_ids: (B, T)  ->  by name, (B, W)
    """
    cfg, params, column = model.config, model.params, columns(input_ids, position, inputs.get("attention_mask"))
    rows = np.arange(len(column))
    _, cache = taps.run_with_cache(model, input_ids, lambda path: path.endswith(PIECES), logits_to_keep=1, **inputs)

    def at(name: str) -> np.ndarray:
        value = host(cache[name])
        return value[rows if len(value) > 1 else 0, column]  # position embeddings may be (1, T, D), shared by all rows

    B = at("blocks.0.hook_resid_pre").shape[0]
    pieces = {name: np.broadcast_to(at(point), (B, cfg.hidden_size)) for name, point in (("tokens", "hook_embed"), ("positions", "hook_pos_embed"))}
    for i, layer in enumerate(params["layers"]):
        here = taps.LAYER.format(i=i)
        if heads:
            z = at(f"{here}.self_attn.attn_output")[:, None]
            out_proj = layer["self_attn"]["out_proj"]
            pieces |= {f"layer {i} head {h}": result[:, 0] for h, result in taps.head_results(z, out_proj, model.ops)}
            if "bias" in out_proj:
                pieces[f"layer {i} attention bias"] = np.broadcast_to(host(out_proj["bias"]), (B, cfg.hidden_size))
        else:
            pieces[f"layer {i} attention"] = at(f"{here}.self_attn")
        if not cfg.do_layer_norm_before:
            pieces = normed(pieces, at(f"{here}.resid_mid"), layer.get("self_attn_layer_norm", {}), f"layer {i} attention norm bias")
        pieces[f"layer {i} mlp"] = at(f"{here}.fc2")
        if not cfg.do_layer_norm_before:
            pieces = normed(pieces, at(f"{here}.resid_post"), layer.get("final_layer_norm", {}), f"layer {i} mlp norm bias")
    if cfg.has_final_layer_norm:
        pieces = normed(pieces, at(f"{here}.resid_post"), params.get("final_layer_norm", {}), "final norm bias")
    if "project_out" in params:
        pieces = {name: host(model.ops.linear(np.ascontiguousarray(piece), **params["project_out"])) for name, piece in pieces.items()}
    return pieces


def columns(input_ids: Any, position: Any, attention_mask: Any) -> np.ndarray:
    """The column to look at in each row.  input_ids: (B, T);  attention_mask: (B, T)  ->  (B).  Raises ValueError for padding or out of range."""
    real = np.ones(np.shape(input_ids), bool) if attention_mask is None else mask_array(attention_mask).astype(bool)
    T = real.shape[1]
    if not isinstance(position, int | np.integer) or not -T <= position < T:
        raise ValueError(f"position is {position!r}; it is a column from 0 to {T - 1}, or from -{T} to -1, or -1 for each row's last real token")
    found = T - 1 - real[:, ::-1].argmax(1) if position == -1 else np.full(len(real), position % T)
    if not real[np.arange(len(real)), found].all():
        padded = int((~real[np.arange(len(real)), found]).argmax())
        raise ValueError(f"column {int(found[padded])} of row {padded} is padding; choose a column in which every row has a real token, or -1")
    return found


def normed(pieces: Pieces, x: np.ndarray, p: dict, bias: str) -> Pieces:
    """The pieces of LayerNorm(x) from those of x: each centred, divided by x's own divisor and weighted; the bias is a further piece.  x: (B, D)"""
    weight = host(p.get("weight", np.ones((), x.dtype))) / np.sqrt(x.var(-1, keepdims=True) + LAYER_NORM_EPS)
    found = {name: (piece - piece.mean(-1, keepdims=True)) * weight for name, piece in pieces.items()}
    return found | ({bias: np.broadcast_to(host(p["bias"]), x.shape)} if "bias" in p else {})
