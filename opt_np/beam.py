"""Beam search: extends the num_beams likeliest continuations of each prompt side by side; with do_sample=True, draws them at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from opt_np.processors import highest, log_softmax, process
from opt_np.reader import Decoding, Reading

if TYPE_CHECKING:
    from opt_np.generate import Request

WORST = np.float32(-1e9)  # HF's score for a candidate that must not win; sums with it are rounded as in HF


def search(request: Request) -> Decoding:
    """Finds the new tokens of the num_return_sequences best continuations, best first, (B·n, new); shorter ones end in pads.

    A continuation's score is Σ log P / length^length_penalty over the new tokens. Equals HF's `_beam_search`, in float32 as there. Among equal
    scores the better beam comes first, then the lower id; HF leaves their order to torch.topk.
    """
    s, T, k = request.settings, request.ids.shape[1], request.settings.num_beams
    B = len(request.ids)
    wide = max(2, 1 + len(s.eos_token_id)) * k  # enough candidates for k to continue, even if every end token is among them
    first_beam = np.arange(B)[:, None] * k
    ids, mask = np.repeat(request.ids, k, 0), np.repeat(request.mask, k, 0)  # (B·k, T)
    running = np.where(np.arange(k) == 0, np.float32(0), WORST)[None].repeat(B, 0)  # (B, k): beams start equal, so only the first one counts
    best = Finished(request, B, k)
    processors = request.chain(k)
    for length in range(1, request.new + 1):  # number of new tokens
        _, logits = yield Reading(ids, mask, copies=1 if length > 1 else k)
        scores, _ = process(processors, log_softmax(np.asarray(logits)), ids, beams=k)
        log_p = scores.reshape(B, k, -1) + running[:, :, None]
        picked = candidates_of(log_p.reshape(B, -1), wide, request, length - 1)  # (B, wide)
        scores = np.take_along_axis(log_p.reshape(B, -1), picked, 1)
        beams, tokens = np.divmod(picked, log_p.shape[-1])
        candidates = np.concatenate([ids[first_beam + beams], tokens[..., None]], axis=2)  # (B, wide, T + length)
        ended = request.ended(candidates.reshape(B * wide, -1)).reshape(B, wide) | (length == request.new)

        running_scores = scores + ended * WORST
        next_beams = highest(running_scores, k)  # (B, k): the beams that continue
        running = np.take_along_axis(running_scores, next_beams, 1)
        ids = np.take_along_axis(candidates, next_beams[..., None], 1).reshape(B * k, -1)
        mask = np.concatenate([mask, np.ones((B * k, 1), mask.dtype)], axis=1)
        request.reader.reorder((first_beam + np.take_along_axis(beams, next_beams, 1)).ravel())

        best.add(candidates[..., T:], scores, ended, length)
        if best.complete(running, length) or ended.all():
            break
    yield best.returned()


def candidates_of(scores: np.ndarray, wide: int, request: Request, step: int) -> np.ndarray:
    """Indices of the highest scores, or of a draw without replacement: the highest after adding Gumbel noise are such a draw (arXiv:1903.06059).

    scores: (B, N)  ->  (B, wide)
    """
    if not request.settings.do_sample:
        return highest(scores, wide)
    noise = [request.random_numbers(row, step).gumbel(size=scores.shape[1]) for row in range(len(scores))]
    return highest(scores + np.stack(noise), wide)


class Finished:
    """The k best finished continuations of each prompt, and whether a running one could still be better."""

    def __init__(self, request: Request, B: int, k: int) -> None:
        self.s, self.new, self.pad = request.settings, request.new, request.pad  # if the pad is 0, HF fills with an end token instead
        self.length_penalty = float(request.settings.length_penalty)  # a Python number does not promote float32
        self.ids = np.empty((B, k, 0), int)  # grows with the longest
        self.lengths = np.zeros((B, k), int)
        self.scores = np.full((B, k), WORST)
        self.is_finished = np.zeros((B, k), bool)
        self.improvable = np.ones((B, 1), bool)  # once a prompt's beams cannot improve, they never can

    def divisor(self, length: int) -> float:
        """length^length_penalty, within bounds that keep scores finite in float32."""
        return min(max(length**self.length_penalty, 1e-28), 1e28)

    def add(self, candidates: np.ndarray, scores: np.ndarray, ended: np.ndarray, length: int) -> None:
        """Adds the candidates that ended, if they are among the first k.  candidates: (B, wide, L);  scores: (B, wide);  ended: (B, wide)"""
        k = self.scores.shape[1]
        allowed = ended & (np.arange(scores.shape[1]) < k)
        full = self.is_finished.all(1, keepdims=True) & (self.s.early_stopping is True)
        scores = scores / self.divisor(length) + full * WORST + ~self.improvable * WORST + ~allowed * WORST
        kept = np.pad(self.ids, ((0, 0), (0, 0), (0, length - self.ids.shape[2])), constant_values=self.pad)
        merged = np.concatenate([self.scores, scores], 1)
        real = np.concatenate([self.is_finished, allowed & ~full & self.improvable], 1)  # a real one may be worse than WORST
        order = highest(np.where(real, merged, -np.inf), k)
        self.scores = np.take_along_axis(merged, order, 1)
        self.ids = np.take_along_axis(np.concatenate([kept, candidates], 1), order[..., None], 1)
        self.lengths = np.take_along_axis(np.concatenate([self.lengths, np.full(allowed.shape, length)], 1), order, 1)
        self.is_finished = np.take_along_axis(np.concatenate([self.is_finished, allowed], 1), order, 1)

    def complete(self, running: np.ndarray, length: int) -> bool:
        """Whether no prompt can still improve, by HF's estimate; with early_stopping=True also whether all have k finished.  running: (B, k)"""
        longest = self.new if self.s.early_stopping == "never" and self.length_penalty > 0 else length
        first, possible = running[:, :1], running[:, :1] / self.divisor(longest)
        better = np.where(self.is_finished, possible > self.scores.min(1, keepdims=True), np.maximum(first, possible) > WORST)
        self.improvable = self.improvable & better.any(1, keepdims=True)
        return not self.improvable.any() or bool(self.is_finished.all() and self.s.early_stopping is True)

    def returned(self) -> np.ndarray:
        """->  (B·n, new)"""
        n = self.s.num_return_sequences
        return self.ids[:, :n, : self.lengths[:, :n].max()].reshape(-1, self.lengths[:, :n].max())
