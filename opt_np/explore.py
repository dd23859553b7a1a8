"""One HTML page, readable offline in any browser, of how a model processed a text: predictions, attention, every layer's prediction, costs.

`gather` computes the data as plain arrays, `page` puts them into explore.html, which draws them. Attention is also available in the shapes that
CircuitsVis and BertViz take. The page loads nothing from elsewhere, and sends nothing anywhere.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from opt_np import costs
from opt_np.arrays import host
from opt_np.classes import collecting
from opt_np.config import OPTConfig
from opt_np.lens import logit_lens
from opt_np.score import blocks, check_head, judged

TEMPLATE = Path(__file__).with_name("explore.html")
TOP = 10  # candidates listed for each position, after each layer
MOST_BYTES = 100_000_000  # the largest page: browsers open it, slowly
FIXED_POINT = 65535  # attention weights are written in 16 bits, as multiples of 1/65535: half the bytes, with an error below 1e-5
KINDS = {  # the last part of a step's name -> its name on the page
    "embed_tokens": "embeddings", "embed_positions": "embeddings", "project_in": "projections in and out", "project_out": "projections in and out",
    "self_attn_layer_norm": "LayerNorm", "final_layer_norm": "LayerNorm", "resid_pre": "residual sums", "resid_mid": "residual sums",
    "resid_post": "residual sums", "q_proj": "queries, keys, values", "k_proj": "queries, keys, values", "v_proj": "queries, keys, values",
    "attn_scores": "attention: scores", "attn_weights": "attention: softmax", "attn_output": "attention: weighted values",
    "self_attn": "attention: output", "fc1": "MLP: first matrix", "activation_fn": "MLP: activation", "fc2": "MLP: second matrix", "lm_head": "head",
}  # fmt: skip


# ---- the data ----------------------------------------------------------------------------------------------------------------------------


def gather(model: Any, tokenizer: Any, text: str) -> dict[str, Any]:
    """Everything that the page shows of a text, from one pass of a language model; the embeddings count as a layer, M = L + 1.

    attention: (L, H, T, T);  top_ids, top_logprobs: (M, T, K);  logprob, rank, entropy: (M, T)

    Entry [m, t] is what the stream after layer m predicts to follow token t: its likeliest tokens, its entropy in nats, and the log probability and
    rank (how many tokens were likelier) of the token that came (NaN and -1 for the last token, which none follows). Also included are ids, tokens
    and pieces of the text, names of the M layers, costs, and the strings of all ids. Raises ValueError as the model does, for a text without a
    token, and for one whose page would be too large.
    """
    check_head(model)
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the text has no tokens, and this tokenizer puts none before it: give a text")
    check_size(model.config, len(ids))
    attentions: list[Any] = []
    layers = {name: predicted(host(logits)[0], ids, name) for name, logits in logit_lens(model, [ids], tap=collecting(attentions, None))}
    arrays = {name: np.stack([found[name] for found in layers.values()]) for name in next(iter(layers.values()))}
    used = {*ids, *arrays["top_ids"].ravel().tolist()}
    return {
        **arrays,
        "attention": np.stack([host(P)[0] for P in attentions]),
        "text": text,
        "ids": np.array(ids),
        "tokens": token_strings(tokenizer, ids),
        "pieces": pieces(tokenizer, ids),
        "layers": list(layers),
        "strings": dict(zip(sorted(used), token_strings(tokenizer, sorted(used)), strict=True)),
        "shape": shape(model.config),
        "costs": cost_rows(model, len(ids)),
    }


def predicted(logits: np.ndarray, ids: list[int], layer: str) -> dict[str, np.ndarray]:
    """A layer's predictions of the next token, and how they rate the token that came.  logits: (T, V);  ids: (T)  ->  by name, (T) and (T, K)"""
    if not np.isfinite(logits.max(-1)).all():
        raise ValueError(f"the logits after {layer} are NaN or infinite, and there is nothing to show; --strict or strict=True names such weights")
    T, V = logits.shape
    following = np.array([*ids[1:], 0])
    parts = [judged(logits[some], following[some], min(TOP, V)) for some in blocks(T, V, few=True)]
    found = {name: np.concatenate([part[name] for part in parts]) for name in ("top_ids", "top_logprobs", "logprob", "rank", "entropy")}
    found["logprob"][-1], found["rank"][-1] = np.nan, -1
    return found


def check_size(cfg: OPTConfig, tokens: int) -> None:
    """Raises ValueError if the page would be too large to open; the model itself refuses a text longer than its context."""
    size = page_bytes(cfg, tokens)
    if tokens <= cfg.max_position_embeddings and size > MOST_BYTES:
        heads = f"{cfg.num_hidden_layers} layers of {cfg.num_attention_heads} heads"
        raise ValueError(
            f"the page would take {size / 1e6:.0f} MB: {tokens} tokens, and the attention of {heads} between every two of them; "
            f"at most {MOST_BYTES / 1e6:.0f} MB open well: shorten the text to {longest(cfg)} tokens"
        )


def page_bytes(cfg: OPTConfig, tokens: int) -> int:
    """About how large a page becomes: attention is nearly all of it."""
    attention = cfg.num_hidden_layers * cfg.num_attention_heads * tokens * (tokens + 1) // 2 * 2
    predictions = (cfg.num_hidden_layers + 1) * tokens * (8 * TOP + 12)
    return (attention + predictions) * 4 // 3 + 100_000  # base64 turns 3 bytes into 4 characters


def longest(cfg: OPTConfig) -> int:
    """The most tokens of a page that is not too large."""
    tokens = 1
    while page_bytes(cfg, tokens + 1) <= MOST_BYTES:
        tokens += 1
    return tokens


def shape(cfg: OPTConfig) -> dict[str, Any]:
    """The model's sizes, for the page's head."""
    return {
        "layers": cfg.num_hidden_layers, "heads": cfg.num_attention_heads, "head_dim": cfg.head_dim, "hidden": cfg.hidden_size, "ffn": cfg.ffn_dim,
        "vocabulary": cfg.vocab_size, "context": cfg.max_position_embeddings, "norm": "pre-norm" if cfg.do_layer_norm_before else "post-norm",
        "parameters": costs.parameters(cfg),
    }  # fmt: skip


def cost_rows(model: Any, tokens: int) -> list[dict[str, Any]]:
    """The costs of each kind of step in this pass, in order of first appearance: FLOPs, and bytes of weights and of activations."""
    cfg, weight = model.config, model.params["embed_tokens"]["weight"]
    dtype, kind = ("float32", cfg.quantized[0]) if cfg.quantized else (str(weight.dtype).removeprefix("torch."), None)
    rows: dict[str, dict[str, Any]] = {}
    for step in costs.steps(cfg, 1, tokens, dtype=dtype, kind=kind):
        last = step.name.rpartition(".")[2]
        name = KINDS.get(last, last)  # a step without an entry gets a row of its own, so that totals are complete
        row = rows.setdefault(name, {"kind": name, "steps": 0, "flops": 0, "weights": 0, "activations": 0})
        row["steps"] += 1
        row["flops"] += step.flops
        row["weights"] += step.weights
        row["activations"] += step.read + step.written
    return list(rows.values())


# ---- tokens as text ----------------------------------------------------------------------------------------------------------------------


def token_strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    r"""Each id's own text, spaces included; bytes of an incomplete character as \xf0, an id without a token as <id 301>."""
    found = [tokenizer.token_bytes(i).decode("utf-8", "backslashreplace") for i in ids]
    return [string or f"<id {i}>" for string, i in zip(found, ids, strict=True)]


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The characters that begin in each token; one spread over several tokens belongs to the first. Joined, they are the text."""
    parts = [tokenizer.token_bytes(i) for i in ids]
    whole = b"".join(parts)
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    cuts = [next((i for i in range(end, len(whole)) if whole[i] & 0xC0 != 0x80), len(whole)) for end in ends]  # bytes 0b10…… continue a character
    return [whole[a:b].decode("utf-8", "replace") for a, b in pairwise(cuts)]


# ---- the page ----------------------------------------------------------------------------------------------------------------------------


def page(model: Any, tokenizer: Any, text: str, name: str = "OPT") -> str:
    """The page as one HTML string, with the model's name. Raises ValueError as `gather`."""
    data = json.dumps({"name": name, **dict(packed(gather(model, tokenizer, text)))})
    title = html.escape(f"{name}: {text if len(text) <= 40 else text[:40] + '…'}")
    blanks = {"title": title, "data": data.replace("<", r"\u003c")}  # so that no token's text can end the script
    return re.sub(r"\{\{(title|data)\}\}", lambda blank: blanks[blank[1]], TEMPLATE.read_text(encoding="utf-8"))


def packed(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The arrays of `gather` ready for JSON; attention as its lower triangles in fixed point, a string for each layer."""
    for name, value in found.items():
        if name == "attention":
            yield name, [base64_of(fixed_point(P)) for P in value]
        elif isinstance(value, np.ndarray):
            yield name, base64_of(value.astype("<i4" if value.dtype.kind in "iu" else "<f4"))
        else:
            yield name, value


def fixed_point(P: np.ndarray) -> np.ndarray:
    """The weights on and below the diagonal, row by row, as multiples of 1/65535 in 16 bits.  P: (H, T, T)  ->  (H, T(T + 1)/2)"""
    queries, keys = np.tril_indices(P.shape[-1])
    return np.rint(P[:, queries, keys] * FIXED_POINT).astype("<u2")


def base64_of(array: np.ndarray) -> str:
    """An array's bytes in base64."""
    return base64.b64encode(array.tobytes()).decode()


def check_out(path: str | Path) -> Path:
    """The path to write, for a link its target. Raises ValueError for a folder, a device, and for a folder that is missing or read-only."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the file to write in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file that can be replaced; name one")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: {path.parent} is read-only here")
    return path


def write(path: str | Path, text: str) -> int:
    """Writes a page atomically, replacing an existing one; returns its size in bytes. Raises ValueError, OSError."""
    from opt_np.checkpoint import write_text

    path = check_out(path)
    write_text(path, text)
    return path.stat().st_size


# ---- for CircuitsVis and BertViz ---------------------------------------------------------------------------------------------------------


def circuitsvis(attentions: Sequence[Any], layer: int, row: int = 0) -> np.ndarray:
    """A layer's attention of one row of the batch, as CircuitsVis takes it: [head, to, from].  attentions: L of (B, H, T, T)  ->  (H, T, T)

    circuitsvis.attention.attention_heads(attention=explore.circuitsvis(out.attentions, 3), tokens=explore.token_strings(tokenizer, ids)), where out
    is model([ids], output_attentions=True).
    """
    return host(attentions[layer])[row]


def bertviz(attentions: Sequence[Any], row: int = 0) -> list[np.ndarray]:
    """All layers' attention of one row of the batch, as BertViz takes it once they are tensors.  attentions: L of (B, H, T, T)  ->  L of (1, H, T, T)

    bertviz.head_view([torch.from_numpy(P) for P in explore.bertviz(out.attentions)], explore.token_strings(tokenizer, ids)), where out is
    model([ids], output_attentions=True); so does model_view.
    """
    return [host(P)[row][None] for P in attentions]
