"""Processors: functions (scores, ids) -> scores that run between the model and the choice of a token; `chain` lists them in HF's order.

They see the whole row, its left padding included; only the repetition penalty skips padding (as in HF 5.23). A removed token has score -inf. Equal to
HF's classes in transformers/generation/logits_process.py; where ties matter, the docstring says how they are broken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from opt_np.ops import softmax
from opt_np.settings import Settings

Processor = Callable[[np.ndarray, np.ndarray], np.ndarray]  # scores (B, V), ids (B, T) -> scores (B, V)


class Warper(partial):
    """A processor that ignores the ids."""

    def __call__(self, scores: np.ndarray, _: np.ndarray) -> np.ndarray:
        return super().__call__(scores)


def chain(s: Settings, padding: np.ndarray, prompt: int) -> list[tuple[str, Processor]]:
    """The processors that are on, by the name of their option, in HF's order.

    padding: (B)        how many ids on the left of each row are padding; `prompt`: tokens in the prompt, padding included.
    """
    least = max(len(s.eos_token_id) + 1, 2) if s.beams else 1  # a beam needs a token that is not an end; as in HF, at least two are kept
    words = [word for word in s.bad_words_ids if [*word] not in [[end] for end in s.eos_token_id]]  # HF's rule: an end is no bad word
    shortest = s.min_length if s.min_new_tokens is None else 0
    steps: list[tuple[str, bool, Processor]] = [
        ("repetition_penalty", s.repetition_penalty != 1, partial(repetition_penalty, padding=padding, penalty=float(s.repetition_penalty))),
        ("no_repeat_ngram_size", s.no_repeat_ngram_size > 0, partial(no_repeat_ngram, size=s.no_repeat_ngram_size)),
        ("bad_words_ids", len(s.bad_words_ids) > 0, partial(bad_words, words=words)),
        ("min_length", shortest > 0, partial(min_length, length=shortest, eos=s.eos_token_id)),
        ("min_new_tokens", bool(s.min_new_tokens), partial(min_length, length=prompt + (s.min_new_tokens or 0), eos=s.eos_token_id)),
        ("temperature", s.do_sample and s.temperature != 1, Warper(temperature, temperature=float(s.temperature))),
        ("top_k", s.do_sample and s.top_k > 0, Warper(top_k, k=max(s.top_k, least))),
        ("top_p", s.do_sample and s.top_p < 1, Warper(top_p, p=s.top_p, least=least)),
        ("min_p", s.do_sample and s.min_p > 0, Warper(min_p, p=s.min_p, least=least)),
        ("typical_p", s.do_sample and s.typical_p < 1, Warper(typical_p, p=s.typical_p, least=least)),
    ]
    return [(name, processor) for name, on, processor in steps if on]


def process(processors: list[tuple[str, Processor]], scores: Any, ids: np.ndarray,
            tap: Callable[[str, np.ndarray], None] | None = None, beams: int = 1) -> tuple[Any, np.ndarray]:  # fmt: skip
    """Scores after every processor, and the best token of each row, the first of equal ones; `tap` sees the scores after each processor.

    scores: (B, V);  ids: (B, T)  ->  (B, V), (B)        Raises ValueError.
    Each prompt has `beams` rows in succession. GPU scores (scores_cuda.py) run some processors there, in `after`; the others get NumPy arrays.
    """
    for name, processor in processors:
        own = scores.after(processor) if hasattr(scores, "after") else None
        scores = processor(np.asarray(scores), ids) if own is None else own
        if tap:
            tap(name, np.asarray(scores))
    tokens = scores.argmax(-1)
    best = scores.max(-1) if hasattr(scores, "after") else scores[np.arange(len(tokens)), tokens]  # argmax picks NaN if there is any
    good = np.isfinite(best)
    good |= (best == -np.inf) & np.repeat(good.reshape(-1, beams).any(1), beams)  # a beam may have no token left, if another of its prompt has one
    if not good.all():
        raise ValueError(f"row {int((~good).argmax()) // beams} has no token to choose: the model's scores are NaN or infinite (are its weights? "
                         f"strict=True tells), or the options remove every token")  # fmt: skip
    return scores, tokens


def removed(scores: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Scores with -inf where `which` is true.  scores: (N, V);  which: (N, V)  ->  (N, V)"""
    return np.where(which, scores.dtype.type(-np.inf), scores)


def repetition_penalty(scores: np.ndarray, ids: np.ndarray, padding: np.ndarray, penalty: float) -> np.ndarray:
    """Scores of tokens already seen, divided by the penalty where positive and multiplied where negative; padding does not count as seen.

    scores: (B, V);  ids: (B, T);  padding: (B)  ->  (B, V)        Source: CTRL, arXiv:1909.05858
    """
    scores = scores.copy()
    for row, seen, pads in zip(scores, ids, padding, strict=True):
        said = np.unique(seen[pads:])
        row[said] = np.where(row[said] < 0, row[said] * penalty, row[said] / penalty)
    return scores


def no_repeat_ngram(scores: np.ndarray, ids: np.ndarray, size: int) -> np.ndarray:
    """Removes each token that would complete a run of `size` tokens that the row already contains.  scores: (B, V);  ids: (B, T)  ->  (B, V)"""
    T = ids.shape[1]
    if size > T:
        return scores
    runs = np.lib.stride_tricks.sliding_window_view(ids, size, axis=1)  # (B, T - size + 1, size)
    row, at = np.nonzero((runs[..., :-1] == ids[:, None, T + 1 - size :]).all(-1))
    banned = np.zeros(scores.shape, bool)
    banned[row, runs[row, at, -1]] = True
    return removed(scores, banned)


def bad_words(scores: np.ndarray, ids: np.ndarray, words: Sequence[Sequence[int]]) -> np.ndarray:
    """Removes the last id of each word whose other ids end the row.  scores: (B, V);  ids: (B, T)  ->  (B, V)"""
    banned = np.zeros(scores.shape, bool)
    for *before, last in words:
        if len(before) <= ids.shape[1]:
            banned[:, last] |= (ids[:, ids.shape[1] - len(before) :] == before).all(-1)
    return removed(scores, banned)


def min_length(scores: np.ndarray, ids: np.ndarray, length: int, eos: Sequence[int]) -> np.ndarray:
    """Removes the end tokens while a row, padding included, is shorter than `length`.  scores: (B, V);  ids: (B, T)  ->  (B, V)"""
    if ids.shape[1] >= length:
        return scores
    scores = scores.copy()
    scores[:, [end for end in eos if 0 <= end < scores.shape[-1]]] = -np.inf
    return scores


def temperature(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Divides the scores: below 1 the distribution sharpens, above 1 it flattens.  scores: (B, V)  ->  (B, V)"""
    return scores / temperature


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Removes all but the k highest; ties with the k-th stay.  scores: (B, V)  ->  (B, V)"""
    k = min(k, scores.shape[-1])
    return removed(scores, scores < np.partition(scores, -k, axis=-1)[:, -k, None])


def top_p(scores: np.ndarray, p: float, least: int = 1) -> np.ndarray:
    """Removes all but the smallest set of likeliest tokens that reaches probability p (nucleus sampling, arXiv:1904.09751).

    scores: (B, V)  ->  (B, V)        At least `least` stay. Of equal scores the lower ids are removed first; in HF the order of ties is not defined.
    """
    ordered = np.sort(scores, axis=-1)  # ascending: the tail is cut from the front
    cut = np.cumsum(softmax(ordered), axis=-1) <= 1 - p
    cut[:, -least:] = False
    count = cut.sum(-1, keepdims=True)
    lowest = np.take_along_axis(ordered, count, -1)  # of those that stay
    tied = scores == lowest
    lower = scores < lowest
    return removed(scores, lower | tied & (np.cumsum(tied, -1) <= count - lower.sum(-1, keepdims=True)))


def min_p(scores: np.ndarray, p: float, least: int = 1) -> np.ndarray:
    """Removes tokens less likely than p times the likeliest (arXiv:2407.01082); at least `least` stay.  scores: (B, V)  ->  (B, V)"""
    probabilities = softmax(scores)
    cut = probabilities < scores.dtype.type(p) * probabilities.max(-1, keepdims=True)
    if least > 1:  # the likeliest is never cut
        np.put_along_axis(cut, np.argsort(-probabilities, axis=-1, kind="stable")[:, :least], False, -1)
    return removed(scores, cut)


def typical_p(scores: np.ndarray, p: float, least: int = 1) -> np.ndarray:
    """Keeps the tokens whose surprise -log P is nearest to the entropy, until they reach probability p (arXiv:2202.00666).

    scores: (B, V)  ->  (B, V)        At least `least` stay, and so do ties with the last one kept.
    """
    P = softmax(scores)
    surprise = -log_softmax(scores)
    entropy = np.where(P > 0, P * np.where(P > 0, surprise, 0), 0).sum(-1, keepdims=True)
    distance = np.abs(surprise - entropy)
    order = np.argsort(distance, axis=-1)
    reached = np.cumsum(np.take_along_axis(P, order, -1), axis=-1)
    last = np.clip((reached < p).sum(-1, keepdims=True), least - 1, scores.shape[-1] - 1)
    return removed(scores, distance > np.take_along_axis(distance, np.take_along_axis(order, last, -1), -1))


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log probabilities.  scores: (B, V)  ->  (B, V)"""
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def highest(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k highest, best first; of equal scores the lower index comes first.  scores: (B, N)  ->  (B, K)"""
    kth = np.partition(scores, -k, axis=-1)[:, -k]
    rows = []
    for row, least in zip(scores, kth, strict=True):
        among = np.flatnonzero(row >= least)
        rows.append(among[np.argsort(-row[among], kind="stable")[:k]])
    return np.stack(rows)
