"""Contrastive search (Su et al., arXiv:2202.06417): of the top_k likeliest tokens, one whose hidden state is unlike those of the text so far."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np

from opt_np.arrays import host
from opt_np.ops import softmax
from opt_np.processors import highest, process
from opt_np.reader import Answer, Reading

if TYPE_CHECKING:
    from opt_np.generate import Request


def picker(request: Request) -> Any:
    """Picks the candidate with the highest (1 - α) P - α max cos(h, h_j), over the tokens j that the model sees before it, padding excluded.

    h is the last hidden state, after the final norm and project_out; P comes after the processors. Each step runs the model on all
    candidates of a row together. Equals HF's `_contrastive_search`, which left transformers with version 5.
    """
    B, k, alpha = len(request.ids), request.settings.top_k, request.settings.penalty_alpha
    processors, reader = request.chain(), request.reader
    context: Any = None  # (B, S, W): unit vectors of the tokens read so far
    logits: Any = None  # (B, V): of the next token

    def pick(ids: np.ndarray, mask: np.ndarray, step: int) -> Generator[Reading, Answer, tuple[np.ndarray, np.ndarray]]:
        nonlocal context, logits
        if step == 0:
            h, logits = yield Reading(ids, mask, hidden=True)
            context = unit_vectors(h)
        P = softmax(process(processors, np.asarray(logits), ids)[0])
        tokens = highest(P, min(k, P.shape[1]))  # (B, K)
        K = tokens.shape[1]
        rows = np.repeat(np.arange(B), K)
        reader.reorder(rows)
        longer = np.concatenate([ids[rows], tokens.reshape(-1, 1)], 1), np.concatenate([mask[rows], np.ones((B * K, 1), mask.dtype)], 1)
        read, after = yield Reading(*longer, hidden=True)
        h = unit_vectors(read)  # (B·K, 1, W)
        if h.shape[1] > 1:  # past the model's positions, the whole window was recomputed: these are its tokens
            context = h[::K, :-1]
        candidates = h[:, -1].reshape(B, K, -1)
        text = mask[:, None, mask.shape[1] - context.shape[1] :] != 0  # (B, 1, S)
        similarity = np.where(text, candidates @ context.swapaxes(1, 2), -np.inf)  # (B, K, S)
        best = ((1 - alpha) * np.take_along_axis(P, tokens, 1) - alpha * similarity.max(-1)).argmax(1)  # (B)
        kept = np.arange(B) * K + best
        reader.reorder(kept)
        context = np.concatenate([context, candidates[np.arange(B), best][:, None]], 1)
        before, logits = logits, after[kept]
        return tokens[np.arange(B), best], before

    return pick


def unit_vectors(h: Any) -> np.ndarray:
    """Vectors of length 1.  h: (N, T, W)  ->  (N, T, W)"""
    h = host(h)
    h = h.astype(np.float32) if h.dtype == np.float16 else h  # squares of float16 overflow early
    return h / np.maximum(np.linalg.norm(h, axis=-1, keepdims=True), np.finfo(h.dtype).tiny)
