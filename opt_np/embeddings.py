"""A text as one vector: the hidden states of a layer, pooled over the text's own tokens; and which layer finds the right document.

Padding on either side changes nothing: only each row's real tokens are pooled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opt_np.arrays import host
from opt_np.model import id_array, last_hidden_state, mask_array

POOLINGS = ("mean", "last", "weighted", "max")
BATCH = 16  # texts per batch


def embed(model: Any, input_ids: Any, attention_mask: Any = None, layer: int | Sequence[int] | str = -1, pooling: str = "mean",
          normalize: bool = True, skip_bos: bool = False) -> Any:  # fmt: skip
    """A vector for each row. `layer` counts as hidden_states do: 0 is the embeddings, -1 what the head reads; several, or "all", give a list.

    input_ids: (B, T);  attention_mask: (B, T)  ->  (B, D)

    pooling: "mean"; "last" token; "weighted", where token i of n weighs i/Σi (SGPT, arXiv:2202.08904); "max" per dimension. normalize: to length 1,
    so that a dot product is the cosine. skip_bos: leave out the </s> with which every text begins. opt-350m's last layer is narrower than the rest.
    Raises ValueError.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is none of {', '.join(POOLINGS)}")
    one, wanted = isinstance(layer, int | np.integer), layers_wanted(layer, model.config.num_hidden_layers)
    states: list | None = None if wanted == [-1] else []  # the last one is computed anyway
    last = last_hidden_state(model.params, input_ids, model.config, attention_mask=attention_mask, ops=model.ops, hidden_states=states)
    kept = tokens_kept(id_array(input_ids), attention_mask, model.config.bos_token_id if skip_bos else None)
    found = [pool(host(last if states is None else states[i]), kept, pooling) for i in wanted]
    found = [unit(rows) for rows in found] if normalize else found
    return found[0] if one else found


def layers_wanted(layer: Any, depth: int) -> list[int]:
    """`layer` of `embed` as a list of indices. Raises ValueError."""
    if isinstance(layer, str) and layer == "all":
        return list(range(depth + 1))
    wanted = list(layer) if isinstance(layer, list | tuple) else [layer]
    if not wanted or not all(isinstance(i, int | np.integer) and not isinstance(i, bool) and -depth - 1 <= i <= depth for i in wanted):
        span = f"0, the embeddings, to {depth}, the last, or -1 to {-depth - 1} from there"
        raise ValueError(f'layer={layer!r} is none of {span}; nor a list of these, nor "all"')
    return wanted


def tokens_kept(ids: np.ndarray, attention_mask: Any, bos: int | None) -> list[np.ndarray]:
    """The columns of each row's real tokens, without the first if it is `bos`.  ids: (B, T);  attention_mask: (B, T)"""
    mask = np.ones(ids.shape) if attention_mask is None else mask_array(attention_mask)
    kept = [np.flatnonzero(row) for row in mask]
    kept = [at[1:] if len(at) and ids[b, at[0]] == bos else at for b, at in enumerate(kept)]
    if not all(map(len, kept)):
        empty = next(b for b, at in enumerate(kept) if not len(at))
        raise ValueError(f"row {empty} has no token to embed: {'nothing but </s>' if mask[empty].any() else 'all of it is padding'}")
    return kept


def pool(h: np.ndarray, kept: list[np.ndarray], pooling: str) -> np.ndarray:
    """h: (B, T, D)  ->  (B, D)"""
    return np.stack([pooled(h[b, at], pooling) for b, at in enumerate(kept)])


def pooled(x: np.ndarray, pooling: str) -> np.ndarray:
    """One row's token vectors as one.  x: (N, D)  ->  (D)"""
    if pooling == "last":
        return x[-1]
    if pooling == "weighted":
        i = np.arange(1, len(x) + 1, dtype=x.dtype)[:, None]
        return (x * (i / i.sum())).sum(0)
    return x.mean(0) if pooling == "mean" else x.max(0)


def unit(rows: np.ndarray) -> np.ndarray:
    """Each row divided by its length; a row of zeros stays as it is.  rows: (B, D)  ->  (B, D)"""
    length = np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
    return (rows / np.where(length > 0, length, 1)).astype(rows.dtype)


def embed_texts(model: Any, tokenizer: Any, texts: Sequence[str], layer: int | Sequence[int] | str = -1, **how: Any) -> Any:
    """`embed` of texts, BATCH at a time; for several layers a list with an array for each.  ->  (N, D)        Raises ValueError."""
    if isinstance(texts, str):
        raise ValueError(f"texts is the text {texts[:40]!r}; it is a list of texts: [text] for one")
    if not len(texts):
        raise ValueError("there are no texts to embed")
    if "" in texts:
        raise ValueError(f"text {texts.index('') + 1} of {len(texts)} is empty, and has no vector; take it out")
    parts = []
    for first in range(0, len(texts), BATCH):
        batch = tokenizer(texts[first : first + BATCH], padding=True)
        parts.append(embed(model, batch["input_ids"], batch["attention_mask"], layer, **how))
    if isinstance(layer, int | np.integer):
        return np.concatenate(parts)
    return [np.concatenate(of_layer) for of_layer in zip(*parts, strict=True)]


@dataclass(frozen=True)
class LayerScore:
    """How well a layer finds documents."""

    layer: int
    recall_at_1: float  # share of queries whose own document is the nearest
    mean_reciprocal_rank: float  # mean of 1 / its rank among all documents, from 1


def layer_sweep(model: Any, tokenizer: Any, pairs: Iterable[tuple[str, str]], pooling: str = "mean", skip_bos: bool = False) -> list[LayerScore]:
    """For each layer, how often a query's own document is the nearest of all by cosine: which layer to search with.

    Documents of equal text count as one; of equally near ones the earlier ranks first. Raises ValueError.
    """
    pairs = list(pairs)
    documents = list(dict.fromkeys(document for _, document in pairs))
    if len(documents) < 2:
        raise ValueError(f"the pairs have {len(documents)} different documents; to find one takes at least 2")
    own = np.array([documents.index(document) for _, document in pairs])
    queries = embed_texts(model, tokenizer, [query for query, _ in pairs], "all", pooling=pooling, skip_bos=skip_bos)
    found = embed_texts(model, tokenizer, documents, "all", pooling=pooling, skip_bos=skip_bos)
    places = [place(q @ d.T, own) for q, d in zip(queries, found, strict=True)]
    return [LayerScore(i, float((rank == 1).mean()), float((1 / rank).mean())) for i, rank in enumerate(places)]


def place(similarity: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The rank of each query's own document among all, from 1.  similarity: (N, M);  own: (N)  ->  (N)"""
    mine = similarity[np.arange(len(own)), own][:, None]
    earlier = np.arange(similarity.shape[1]) < own[:, None]
    return 1 + (similarity > mine).sum(-1) + ((similarity == mine) & earlier).sum(-1)


def table(found: list[LayerScore]) -> str:
    """A line per layer, the best marked: by recall, then by mean reciprocal rank."""
    best = max(found, key=lambda score: (score.recall_at_1, score.mean_reciprocal_rank))
    where = [f"{s.layer:5}  {f'after block {s.layer - 1}' if s.layer else 'embeddings':<14}" for s in found]
    lines = [f"{w}  {s.recall_at_1:8.4f}  {s.mean_reciprocal_rank:20.4f}{'  best' if s is best else ''}" for w, s in zip(where, found, strict=True)]
    return "\n".join([f"layer  {'':<14}  recall@1  mean reciprocal rank", *lines])
