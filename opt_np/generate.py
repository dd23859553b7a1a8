"""Decoding: from logits to tokens, one step at a time. Names, order and defaults are HF's GenerationMixin's (transformers 5).

A row's random numbers depend on (seed, row, step) alone, so that what a row says does not change with its neighbours.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any

import numpy as np

from opt_np import ops as numpy_ops
from opt_np.config import OPTConfig
from opt_np.kv_cache import KVCache
from opt_np.model import forward, id_array, mask_array
from opt_np.ops import softmax

DEFAULT_NEW_TOKENS = 20  # HF's default length


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily, or drawn after temperature, top_k and top_p (in this order). Raises ValueError.

    top_k is 50 unless set otherwise, as in HF; top_k=0 turns it off.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; for the likeliest token every time use do_sample=False")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not isinstance(self.top_k, int | np.integer) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be a whole number of at least 0 (0 turns it off)")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0 (1 turns it off)")
        unused = [name for name in ("temperature", "top_k", "top_p") if not self.do_sample and getattr(self, name) != getattr(Sampling, name)]
        if unused:
            warnings.warn(f"{', '.join(unused)}: of effect only with do_sample=True", stacklevel=4)

    def process(self, scores: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Scores after every processor, in HF's order.  scores: (B, V);  ids: (B, T);  mask: (B, T)  ->  (B, V)"""
        if self.repetition_penalty != 1:
            scores = repetition_penalty(scores, ids, mask, self.repetition_penalty)
        if self.do_sample:
            if self.temperature != 1:
                scores = scores / scores.dtype.type(self.temperature)
            if self.top_k:
                scores = top_k(scores, self.top_k)
            if self.top_p < 1:
                scores = top_p(scores, self.top_p)
        return scores


def sampling_from(options: dict[str, Any]) -> Sampling:
    """Sampling, without the options left at None. Raises TypeError naming what it does not have."""
    known = [f.name for f in fields(Sampling)]
    unknown = options.keys() - set(known)
    if unknown:
        others = "attention_mask, max_new_tokens, max_length, eos_token_id, pad_token_id, seed, tokenizer"
        raise TypeError(f"generate has no option {', '.join(sorted(unknown))}; it has {others}, {', '.join(known)}")
    return Sampling(**{name: value for name, value in options.items() if value is not None})


def repetition_penalty(scores: np.ndarray, ids: np.ndarray, mask: np.ndarray, penalty: float) -> np.ndarray:
    """Scores of tokens already seen, divided by the penalty where positive and multiplied where negative; padding has not been seen.

    scores: (B, V);  ids: (B, T);  mask: (B, T)  ->  (B, V)        Source: CTRL, arXiv:1909.05858; HF's RepetitionPenaltyLogitsProcessor
    """
    scores = scores.copy()
    for b, row in enumerate(scores):
        seen = np.unique(ids[b][mask[b] != 0])
        row[seen] = np.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    return scores


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """-inf for all but the k highest; ties with the k-th stay.  scores: (B, V)  ->  (B, V)"""
    k = min(k, scores.shape[-1])
    return np.where(scores < np.partition(scores, -k, axis=-1)[:, -k, None], -np.inf, scores).astype(scores.dtype)


def top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """-inf for all but the smallest set of likeliest tokens that reaches probability p (nucleus sampling, arXiv:1904.09751).

    scores: (B, V)  ->  (B, V)        Among equal scores the lower ids go first; in HF the order of ties is not defined.
    """
    order = np.argsort(scores, axis=-1, kind="stable")  # ascending: the tail is cut from the front
    cumulative = np.cumsum(softmax(np.take_along_axis(scores, order, -1)), axis=-1)
    cut = cumulative <= 1 - p
    cut[:, -1] = False
    removed = np.empty_like(cut)
    np.put_along_axis(removed, order, cut, -1)
    return np.where(removed, -np.inf, scores).astype(scores.dtype)


def choose(scores: np.ndarray, do_sample: bool, seed: int, step: int) -> np.ndarray:
    """The highest score, or one drawn by inverting the distribution's sum at this row's random number.  scores: (B, V)  ->  (B)"""
    if not do_sample:
        return scores.argmax(-1)
    cumulative = np.cumsum(softmax(scores.astype(np.float64)), axis=-1)
    draws = [np.random.default_rng([seed, row, step]).random() for row in range(len(scores))]
    return np.array([np.searchsorted(c, u * c[-1], side="right") for c, u in zip(cumulative, draws, strict=True)])


@dataclass
class Step:
    """One new token per row: ids, whether the row has finished, and text where a tokenizer was given. (B,) each.

    logprobs and entropies (nats) are the model's own, before any processor; both are 0 for rows that had finished before.
    """

    ids: np.ndarray
    finished: np.ndarray
    active: np.ndarray = field(repr=False)
    logits: np.ndarray = field(repr=False)  # (B, V)
    text: list[str] | None = None

    @functools.cached_property
    def _log_probabilities(self) -> np.ndarray:
        shifted = self.logits - self.logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    @property
    def logprobs(self) -> np.ndarray:
        return np.where(self.active, self._log_probabilities[np.arange(len(self.ids)), self.ids], 0)

    @property
    def entropies(self) -> np.ndarray:
        log_p = self._log_probabilities
        return np.where(self.active, -(np.exp(log_p) * log_p).sum(-1), 0)


def stream(params: dict, input_ids: Any, cfg: OPTConfig, attention_mask: Any = None, max_new_tokens: int | None = None, max_length: int | None = None,
           eos_token_id: Any = None, pad_token_id: int | None = None, seed: int | None = None, tokenizer: Any = None,
           ops: ModuleType = numpy_ops, **sampling: Any) -> Iterator[Step]:  # fmt: skip
    """Yields a Step per new token until every row has met eos_token_id or the length is reached. Checks its arguments when called.

    input_ids: (B, T);  attention_mask: (B, T)

    eos_token_id: one id, several, or [] for none; default config.json's. Without a mask, pad_token_id in the prompt counts as padding (as HF).
    Raises ValueError for a prompt and length that outgrow the model's positions.
    """
    input_ids = id_array(input_ids)
    if input_ids.ndim != 2 or not input_ids.size:
        raise ValueError(f"input_ids is {input_ids.shape}; generation continues at least one token per row, (B, T): for one prompt pass [ids]")
    settings = sampling_from(sampling)
    if seed is not None and seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    pad = cfg.pad_token_id if pad_token_id is None else pad_token_id
    eos: Any = next((e for e in (eos_token_id, cfg.eos_token_id) if e is not None), [])
    mask = prompt_mask(input_ids, attention_mask, pad, eos)
    new = new_tokens(input_ids, mask, cfg, max_new_tokens, max_length)
    fill = pad if pad is not None else int(np.ravel(eos)[0]) if np.size(eos) else 0  # what follows a finished row
    seed = int(np.random.SeedSequence().entropy) if seed is None else seed  # type: ignore[arg-type]
    return _stream(params, *left_padded(input_ids, mask), cfg, new, eos, fill, seed, settings, tokenizer, ops)


def _stream(params: dict, ids: np.ndarray, mask: np.ndarray, cfg: OPTConfig, new: int, eos: Any, pad: int, seed: int, sampling: Sampling,
            tokenizer: Any, ops: ModuleType) -> Iterator[Step]:  # fmt: skip
    B = len(ids)
    active = np.ones(B, bool)
    cache, fresh = KVCache(), ids
    detokenizers = [tokenizer.detokenizer() for _ in range(B)] if tokenizer else []
    for step in range(new):
        logits = np.asarray(forward(params, fresh, cfg, cache, mask, ops, logits_to_keep=1))[:, -1].astype(np.float32, copy=False)  # (B, V)
        chosen = choose(sampling.process(logits, ids, mask), sampling.do_sample, seed, step)
        fresh = np.where(active, chosen, pad)[:, None]  # (B, 1)
        ids, mask = np.concatenate([ids, fresh], 1), np.concatenate([mask, np.ones_like(fresh)], 1)
        still = active & ~np.isin(chosen, eos)
        last = step + 1 == new
        text = [pieces(d, fresh[b, 0], active[b], last or not still[b]) for b, d in enumerate(detokenizers)] if tokenizer else None
        yield Step(fresh[:, 0], ~still, active, logits, text)
        active = still
        if not active.any():
            return


def pieces(detokenizer: Any, token: int, active: bool, last: bool) -> str:
    """The text that this token completes; with the row's last token, also what was held back."""
    return (detokenizer.put(int(token)) + (detokenizer.end() if last else "")) if active else ""


def generate(params: dict, input_ids: Any, cfg: OPTConfig, **options: Any) -> np.ndarray:
    """The prompt and what `stream` adds to it; rows that finished early are filled with pad_token_id.  input_ids: (B, T)  ->  (B, T + new)"""
    steps = [step.ids for step in stream(params, input_ids, cfg, **options)]
    return np.concatenate([np.asarray(input_ids), np.stack(steps, axis=1)], axis=1)


def prompt_mask(input_ids: np.ndarray, attention_mask: Any, pad: int | None, eos: Any) -> np.ndarray:
    """The mask given; without one, pads are hidden unless the pad is also an end (HF's rule).  ->  (B, T) int64"""
    if attention_mask is None:
        return (input_ids != pad).astype(np.int64) if pad is not None and not np.isin(pad, eos) else np.ones_like(input_ids)
    mask = mask_array(attention_mask)
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask is {mask.shape}, input_ids {input_ids.shape}; both cover the prompt")
    return mask


def new_tokens(input_ids: np.ndarray, mask: np.ndarray, cfg: OPTConfig, max_new_tokens: int | None, max_length: int | None) -> int:
    """How many tokens may be added: max_new_tokens, else up to max_length in all, else 20 as far as the positions reach."""
    longest, limit = int(mask.sum(1).max()), cfg.max_position_embeddings
    if not mask.any(1).all():
        raise ValueError(f"row {int((~mask.any(1)).argmax())} of the prompt is all padding; generation continues at least one token")
    room = limit - longest + 1  # the last token is never fed back, so it needs no position
    new = max_new_tokens
    if new is None:
        T = input_ids.shape[1]
        new = min(DEFAULT_NEW_TOKENS, max(limit - T, 1)) if max_length is None else max_length - T
    if new < 1:
        asked = f"max_new_tokens={max_new_tokens}" if max_new_tokens is not None else f"max_length={max_length}"
        raise ValueError(f"nothing to generate: {asked}, and the prompt has {input_ids.shape[1]} tokens")
    if new > room:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones outgrow this model's max_position_embeddings={limit}: "
            + (f"ask for at most {room}, or keep the end of the prompt" if room > 0 else f"keep its last {limit} tokens")
        )
    return new


def left_padded(input_ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows rolled so that each ends in a real token: what follows a right-padded prompt then has the right positions (in HF it has not)."""
    trailing = mask[:, ::-1].argmax(1)
    if not trailing.any():
        return input_ids, mask
    return tuple(np.stack([np.roll(row, n) for row, n in zip(a, trailing, strict=True)]) for a in (input_ids, mask))  # type: ignore[return-value]
