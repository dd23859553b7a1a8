"""Decoding: from logits to tokens, one step at a time. Option names, order and defaults are those of HF's GenerationMixin (transformers 5).

The path of a call: `generate` → `prepare` (checks) → `decode` → `steps`, which asks `pick` for a token per row; `pick` yields a Reading, a request
to run the model (reader.py), and is sent the logits. Random numbers depend on (seed, row, step) alone, so a row's text does not depend on others.
The options are in settings.py, the processors that change scores in processors.py, beam search in beam.py, contrastive search in contrastive.py.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from opt_np import beam, contrastive
from opt_np import ops as numpy_ops
from opt_np.config import OPTConfig
from opt_np.model import check_ids, id_array, mask_array
from opt_np.processors import Processor, chain, log_softmax, process
from opt_np.reader import Answer, Decoding, Reader, Reading, read
from opt_np.settings import Settings, resolve
from opt_np.stopping import stop_check

DEFAULT_NEW_TOKENS = 20  # HF's default length

Pick = Callable[[np.ndarray, np.ndarray, int], Generator[Reading, Answer, tuple[np.ndarray, np.ndarray]]]
# ids (N, T), mask (N, T), step -> chosen (N), logits (N, V)


@dataclass
class Request:
    """A validated request: the prompt as given (`prompt`) and left-padded (`ids`, `mask`), and everything needed to decode it."""

    settings: Settings
    prompt: np.ndarray  # (B, T)
    ids: np.ndarray  # (B, T)
    mask: np.ndarray  # (B, T)
    new: int  # tokens to generate, at most
    seed: int
    reader: Reader
    ended: Callable[[np.ndarray], np.ndarray]  # ids (N, T) -> (N): whether the last token ends the row
    pad: int  # the id that fills a finished row
    tokenizer: Any = None

    def chain(self, copies: int = 1) -> list[tuple[str, Processor]]:
        """The processors for the prompt's rows, each `copies` times."""
        return chain(self.settings, np.repeat(self.mask.argmax(1), copies), self.ids.shape[1])

    def random_numbers(self, row: int, step: int, sequence: int = 0) -> np.random.Generator:
        """The generator for one step of a row; a row's first sequence draws what a row with only one would."""
        return np.random.default_rng([self.seed, row, step, *([sequence] if sequence else [])])


def prepare(params: dict, input_ids: Any, cfg: OPTConfig, attention_mask: Any = None, generation_config: dict | None = None, tokenizer: Any = None,
            ops: ModuleType = numpy_ops, **options: Any) -> Request:  # fmt: skip
    """Checks everything before anything is computed.  input_ids: (B, T);  attention_mask: (B, T)        Raises ValueError, TypeError."""
    input_ids = id_array(input_ids)
    if input_ids.ndim != 2 or not input_ids.size:
        raise ValueError(f"input_ids is {input_ids.shape}; generation continues at least one token per row, (B, T): for one prompt pass [ids]")
    check_ids(cfg, input_ids)
    input_ids = input_ids.astype(np.int64, copy=False)  # of whatever whole numbers: new ones are appended
    s = resolve(options, generation_config, cfg)
    if high := [word for word in s.bad_words_ids if max(word) >= cfg.vocab_size]:
        raise ValueError(f"bad_words_ids has {high[0]}; vocab_size={cfg.vocab_size} allows 0 to {cfg.vocab_size - 1}")
    if s.pad_token_id is not None and s.pad_token_id >= cfg.vocab_size:
        raise ValueError(f"pad_token_id is {s.pad_token_id}; vocab_size={cfg.vocab_size} allows 0 to {cfg.vocab_size - 1}")
    mask = prompt_mask(input_ids, attention_mask, s.pad_token_id, s.eos_token_id)
    new = new_tokens(input_ids, mask, cfg, s)
    prompt, (ids, mask) = input_ids, left_padded(input_ids, mask)
    kept = most_tokens(cfg, s) - new if s.overflow == "truncate_left" else ids.shape[1]  # of each row's prompt
    # the first column that is read, and the most rows and tokens, for allocation
    first = max(int(mask.any(0).argmax()), ids.shape[1] - kept)
    most = len(ids) * max(s.num_beams, s.num_return_sequences), min(ids.shape[1] - first + new, cfg.max_position_embeddings)
    reader = getattr(ops, "reader", Reader)(params, cfg, ops, first, most)
    pad = s.pad_token_id if s.pad_token_id is not None else next(iter(s.eos_token_id), 0)
    seed = int(np.random.SeedSequence().entropy) if s.seed is None else s.seed  # type: ignore[arg-type]
    return Request(s, prompt, ids, mask, new, seed, reader, stop_check(s.eos_token_id, s.stop_strings, tokenizer), pad, tokenizer)


def choose(scores: Any, draws: list[float]) -> np.ndarray:
    """Draws a token per row by inverting its cumulative distribution at a number in [0, 1); scores on a GPU may do it there.

    scores: (N, V);  draws: (N)  ->  (N)
    """
    if hasattr(scores, "drawn"):
        return scores.drawn(draws)
    tokens = []
    for row, u in zip(scores, draws, strict=True):
        left = np.flatnonzero(row > -np.inf)  # processors may have removed all but a few
        cumulative = np.cumsum(np.exp(row[left].astype(np.float64) - row.max()))
        tokens.append(left[np.searchsorted(cumulative, u * cumulative[-1], side="right")])
    return np.array(tokens)


def picker(request: Request, tap: Callable[[str, np.ndarray], None] | None = None) -> Pick:
    """Greedy search, or sampling; `tap` sees the scores after each processor."""
    s = request.settings
    n, ends, processors = s.num_return_sequences, tuple(s.eos_token_id), request.chain(s.num_return_sequences)
    # The best logit decides, so a reader may run several steps ahead. These two processors only remove ends, and at an end it stops anyway.
    greedy = not s.do_sample and all(name in ("min_length", "min_new_tokens") for name, _ in processors)

    def pick(ids: np.ndarray, mask: np.ndarray, step: int) -> Generator[Reading, Answer, tuple[np.ndarray, np.ndarray]]:
        _, logits = yield Reading(ids, mask, copies=1 if step else n, likely=request.new - step - 1 if greedy else 0, ends=ends)
        scores, best = process(processors, logits, ids, tap)
        if not s.do_sample:
            return best, logits
        return choose(scores, [request.random_numbers(i // n, step, i % n).random() for i in range(len(ids))]), logits

    return pick


@dataclass
class Step:
    """One new token per row: ids, whether the row has finished, and text if a tokenizer was given. (N,) each, N = B·num_return_sequences.

    logprobs and entropies (nats) are the model's own, before any processor; both are 0 for rows that had finished before.
    """

    ids: np.ndarray
    finished: np.ndarray
    active: np.ndarray = field(repr=False)  # rows that had not finished before this step
    scores: Any = field(repr=False)  # logits, in NumPy or on a GPU
    text: list[str] | None = None

    @functools.cached_property
    def logits(self) -> np.ndarray:
        """->  (N, V)"""
        return np.asarray(self.scores)

    @functools.cached_property
    def _log_probabilities(self) -> np.ndarray:
        return log_softmax(self.logits)

    @functools.cached_property
    def logprobs(self) -> np.ndarray:
        return np.where(self.active, self._log_probabilities[np.arange(len(self.ids)), self.ids], 0)

    @functools.cached_property
    def entropies(self) -> np.ndarray:
        log_p = self._log_probabilities
        return np.where(self.active, -(np.exp(log_p) * log_p).sum(-1), 0)

    def shrink(self) -> None:
        """Computes logprobs and entropies, and then frees the logits."""
        _ = self.logprobs, self.entropies  # both are cached from here on
        self.scores = self.logits = self.__dict__["_log_probabilities"] = np.empty((len(self.ids), 0))


def stream(params: dict, input_ids: Any, cfg: OPTConfig, **options: Any) -> Iterator[Step]:
    """Yields a Step per new token until every row has ended or the length is reached. Arguments are checked at once, in the call.

    input_ids: (B, T);  attention_mask: (B, T)

    Options: attention_mask, tokenizer, generation_config, and those of settings.Settings. Each prompt is continued num_return_sequences times; all
    sequences of the first prompt come first. Without a mask, pad_token_id in the prompt counts as padding (as in HF). Right-padded rows continue from
    their last real token, where HF gives them wrong positions. Past the model's positions, overflow="slide" recomputes a whole window for each token.
    Raises ValueError for a prompt and length that exceed the model's positions, and for beams, which find no token before they end.
    """
    request = prepare(params, input_ids, cfg, **options)
    no_beams(request.settings)
    return read(decode(request), request.reader)


def no_beams(s: Settings) -> None:
    """Raises ValueError for beam search, which cannot be streamed."""
    if s.beams:
        raise ValueError(f"num_beams={s.num_beams}: beam search knows no token before its end; use generate, or num_beams=1")


def decode(request: Request) -> Decoding:
    """The generator that the settings select. It yields Steps, or, with beams, one array of all new tokens at the end."""
    if request.settings.beams:
        return beam.search(request)
    return steps(request, contrastive.picker(request) if request.settings.contrastive else picker(request))


def steps(request: Request, pick: Pick) -> Decoding:
    """Yields Steps of the tokens that `pick` chooses, until all rows have ended or the length is reached."""
    n, pad, tokenizer = request.settings.num_return_sequences, request.pad, request.tokenizer
    ids, mask = np.repeat(request.ids, n, 0), np.repeat(request.mask, n, 0)
    active = np.ones(len(ids), bool)
    detokenizers = [tokenizer.detokenizer() for _ in ids] if tokenizer else []
    for step in range(request.new):
        chosen, logits = yield from pick(ids, mask, step)
        fresh = np.where(active, chosen, pad)[:, None]  # (N, 1)
        ids, mask = np.concatenate([ids, fresh], 1), np.concatenate([mask, np.ones_like(fresh)], 1)
        still = active & ~request.ended(ids)
        last = step + 1 == request.new
        text = [pieces(d, fresh[b, 0], active[b], last or not still[b]) for b, d in enumerate(detokenizers)] if tokenizer else None
        yield Step(fresh[:, 0], ~still, active, logits, text)
        active = still
        if not active.any():
            return


def pieces(detokenizer: Any, token: int, active: bool, last: bool) -> str:
    """The text that this token completes; with the row's last token, also what was held back."""
    return (detokenizer.put(int(token)) + (detokenizer.end() if last else "")) if active else ""


def generate(params: dict, input_ids: Any, cfg: OPTConfig, **options: Any) -> np.ndarray:
    """The prompts, each num_return_sequences times, followed by their new tokens; rows that finish early are filled with pad_token_id.

    input_ids: (B, T)  ->  (B·n, T + new)
    """
    request = prepare(params, input_ids, cfg, **options)
    return continued(request, [ids_of(found) for found in read(decode(request), request.reader)])


def ids_of(found: Any) -> np.ndarray:
    """The new tokens of one Step, or all of them, as a beam search yields.  ->  (N, new)"""
    return found.ids[:, None] if isinstance(found, Step) else found


def continued(request: Request, new: list[np.ndarray]) -> np.ndarray:
    """The prompts as they were given, followed by the new tokens.  new: (N, new), several  ->  (N, T + new)"""
    return np.concatenate([np.repeat(request.prompt, request.settings.num_return_sequences, axis=0), *new], axis=1)


def prompt_mask(input_ids: np.ndarray, attention_mask: Any, pad: int | None, eos: Any) -> np.ndarray:
    """The mask given; without one, pads are hidden unless the pad is also an end (HF's rule).  ->  (B, T) int64"""
    if attention_mask is None:
        return (input_ids != pad).astype(np.int64) if pad is not None and pad not in eos else np.ones_like(input_ids)
    mask = mask_array(attention_mask)
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask is {mask.shape}, input_ids {input_ids.shape}; both cover the prompt")
    return mask


def most_tokens(cfg: OPTConfig, s: Settings) -> int:
    """The most tokens of prompt and continuation together: the last is never fed back and needs no position, except in contrastive search."""
    return cfg.max_position_embeddings + (0 if s.contrastive else 1)


def new_tokens(input_ids: np.ndarray, mask: np.ndarray, cfg: OPTConfig, s: Settings) -> int:
    """How many tokens may be added: max_new_tokens, else up to max_length in all, else 20 as far as the positions reach."""
    longest, limit, T = int(mask.sum(1).max()), cfg.max_position_embeddings, input_ids.shape[1]
    if not mask.any(1).all():
        raise ValueError(f"row {int((~mask.any(1)).argmax())} of the prompt is all padding; generation continues at least one token")
    fits = {"error": most_tokens(cfg, s) - longest, "truncate_left": most_tokens(cfg, s) - 1, "slide": None}[s.overflow]
    new = s.max_new_tokens if s.max_new_tokens is not None else s.max_length - T if s.max_length is not None else None
    if new is None:
        new = min(DEFAULT_NEW_TOKENS, {"error": max(limit - T, 1), "truncate_left": fits, "slide": DEFAULT_NEW_TOKENS}[s.overflow])
    if new < 1:
        asked = f"max_new_tokens={s.max_new_tokens}" if s.max_new_tokens is not None else f"max_length={s.max_length}"
        raise ValueError(f"nothing to generate: {asked}, and the prompt has {T} tokens")
    if fits is not None and new > fits:
        least = longest if s.overflow == "error" else 1  # tokens of the prompt that have to stay
        raise ValueError(
            f"a prompt of {least} tokens and {new} new ones outgrow this model's max_position_embeddings={limit}: "
            + (f"ask for at most {fits}, or " if fits > 0 else "")
            + ('keep the end of the prompt: overflow="truncate_left" or "slide"' if s.overflow == "error" else 'overflow="slide"')
        )
    if new < (least := s.min_new_tokens if s.min_new_tokens is not None else s.min_length - T):
        warnings.warn(f"at least {least} new tokens are asked for, and at most {new}: there will be {new}", stacklevel=4)
    return new


def left_padded(input_ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moves hidden tokens to the left of each row, keeping order, so that it ends in a real token and new tokens get the right positions."""
    order = np.argsort(mask, axis=1, kind="stable")
    return np.take_along_axis(input_ids, order, 1), np.take_along_axis(mask, order, 1)
