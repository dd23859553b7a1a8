"""Perplexity of a text by the published conventions: each gives the same model and text another number, so every result names its convention.

A text longer than the model's context is read in windows. The conventions differ in where windows begin, which tokens each scores, whether </s>
comes first, and what is averaged: a mean over tokens, over words or over bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from opt_np.score import Window, blocks, check_stride, hidden, logits_of, stride_windows, window_of

CONVENTIONS = {  # the meaning of each, in one line
    "gptq": "</s> and the text in windows of {window} that do not overlap, the tail left out; a window's first token is not scored",
    "lm-eval": "0.4.10 and later: </s> before the tokenizer's own </s> and the text, all of which is scored, {window} tokens at a time",
    "lm-eval<0.4.10": "one </s> before the text, all of which is scored, {window} tokens at a time",
    "stride": "</s> and the text in windows of {window} every {stride} tokens, each scoring what is new to it; every token weighs the same",
}


class TooShort(ValueError):
    """A text so short that a convention scores none of it."""


@dataclass(frozen=True)
class Perplexity:
    """The result for a text under one convention. `words` and `bytes` are those of the text if all of it is scored, else None."""

    convention: str
    meaning: str
    nats: float  # of all scored tokens together
    scored: int  # tokens
    dropped: int  # the text's own tokens (without </s>) that are not scored
    words: int | None = None  # len(re.split(r"\\s+", text))
    bytes: int | None = None  # UTF-8
    hf_docs: float | None = None  # stride: by the code of HF's page, which weights each window by its new tokens less one

    @property
    def perplexity(self) -> float:
        """Per token."""
        return exp(self.nats / self.scored)

    @property
    def word_perplexity(self) -> float | None:
        return exp(self.nats / self.words) if self.words else None

    @property
    def byte_perplexity(self) -> float | None:
        return exp(self.nats / self.bytes) if self.bytes else None

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / self.bytes / math.log(2) if self.bytes else None


def perplexity(model: Any, tokenizer: Any, text: str, convention: str = "gptq", window: int | None = None, stride: int | None = None) -> Perplexity:
    """The perplexity of a text under one of CONVENTIONS; `window` is min(2048, the context) and `stride` half of it unless given.

    Raises TooShort, a ValueError, for a text of which the convention scores nothing, and ValueError for an invalid window or stride.
    Sources: gptq, arXiv:2210.17323 and its code; lm-eval, loglikelihood_rolling and get_rolling_token_windows of EleutherAI/lm-evaluation-harness;
    stride, HF's page "Perplexity of fixed-length models".
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention {convention!r} is none of {', '.join(CONVENTIONS)}")
    if not text:
        raise ValueError("the text is empty; there is nothing to score")
    window = window_of(model.config, window)
    stride = window // 2 if stride is None else stride
    check_stride(stride, window)
    name = convention.partition("<")[0]
    ids = tokenizer.encode(text, add_special_tokens=convention != "lm-eval<0.4.10")
    tokens = np.array([tokenizer.bos_token_id, *ids] if name == "lm-eval" else ids)
    windows = {"gptq": disjoint_windows, "lm-eval": rolling_windows, "stride": stride_windows}[name]
    cut = [w for w in windows(len(tokens), window, stride) if w.first < w.stop]
    if not cut:
        wanted = f"one window of {window}" if name == "gptq" else "2, as each is scored by those before it"
        raise TooShort(f"{convention}: the text is {len(tokens)} tokens, and it takes {wanted}; add text or shorten the window")
    from tqdm import tqdm  # imported here: only loading, training and this need more than NumPy

    nats = np.array([-window_logprobs(model, tokens, w).sum() for w in tqdm(cut, desc=convention, unit=" windows", disable=None, leave=False)])
    scored = sum(w.stop - w.first for w in cut)
    dropped = max(len(tokenizer.encode(text, add_special_tokens=False)) - scored, 0)
    return Perplexity(
        convention, CONVENTIONS[convention].format(window=window, stride=stride), float(nats.sum()), scored, dropped,
        None if dropped else len(re.split(r"\s+", text)), None if dropped else len(text.encode()), hf_docs(cut, nats) if name == "stride" else None,
    )  # fmt: skip


def every_convention(model: Any, tokenizer: Any, text: str, window: int | None = None, stride: int | None = None) -> list[Perplexity | TooShort]:
    """`perplexity` under each convention, or the TooShort that explains why there is none. Raises ValueError."""
    found: list[Perplexity | TooShort] = []
    for convention in CONVENTIONS:
        try:
            found.append(perplexity(model, tokenizer, text, convention, window, stride))
        except TooShort as reason:
            found.append(reason)
    return found


def table(found: list[Perplexity | TooShort]) -> str:
    """A line per convention, and below them the meaning of each."""
    known = [p for p in found if isinstance(p, Perplexity)]
    lines = [["perplexity", "per token", "per word", "per byte", "bits per byte", "tokens", "dropped", "words", "bytes"]]
    for p in known:
        numbers = (p.perplexity, p.word_perplexity, p.byte_perplexity, p.bits_per_byte)
        shown = ["-" if x is None else f"{x:.4f}" for x in numbers]
        lines.append([p.convention, *shown, *("-" if n is None else str(n) for n in (p.scored, p.dropped, p.words, p.bytes))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]) for line in lines]
    meanings = [f"{p.convention}: {p.meaning}" for p in known]
    docs = [f"stride, as the code of HF's page averages (each window weighs its new tokens less one): {p.hf_docs:.4f}" for p in known if p.hf_docs]
    advice = "Compare only numbers of one convention and one window. Across tokenizers compare bits per byte; with quantisation papers, gptq at 2048."
    return "\n".join([*rows, "", *meanings, *docs, *(str(reason) for reason in found if isinstance(reason, TooShort)), "", advice])


def disjoint_windows(n: int, window: int, stride: int = 0) -> Iterator[Window]:
    """GPTQ's windows: full ones in order, without the tail."""
    return (Window(start, start + window, start + 1) for start in range(0, n - window + 1, window))


def rolling_windows(n: int, window: int, stride: int = 0) -> Iterator[Window]:
    """lm-eval's windows of n tokens, prefix included: the model reads at most `window` and predicts one more; all but the prefix are scored once.

    The first scores the `window` tokens after the prefix, each later one as many more; the last starts early enough to be full, and scores the rest.
    """
    for first in range(1, n, window):
        stop = min(first + window, n)
        yield Window(max(0, stop - window - 1), stop, first)


def window_logprobs(model: Any, tokens: np.ndarray, w: Window) -> np.ndarray:
    """The log probability of each token that the window scores.  tokens: (N)  ->  (n), float64"""
    h = hidden(model, tokens[None, w.start : w.stop - 1])[0, w.first - w.start - 1 :]  # (n, W): the last token is predicted, but not read
    wanted = tokens[w.first : w.stop]
    found, V = np.empty(len(wanted)), model.config.vocab_size
    for block in blocks(len(h), V):
        logits = logits_of(model, h[block])
        for some in blocks(len(logits), V, few=True):
            found[block][some] = logprobs(logits[some].astype(np.float64), wanted[block][some])
    return found


def logprobs(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """log_softmax for one id of each row; overwrites the logits.  logits: (N, V);  ids: (N)  ->  (N)"""
    logits -= logits.max(-1, keepdims=True)
    own = logits[np.arange(len(ids)), ids]
    return own - np.log(np.exp(logits, out=logits).sum(-1))


def hf_docs(windows: list[Window], nats: np.ndarray) -> float:
    """The average by the code of HF's page, which weights each window's mean by its new tokens less one.

    That is the number it scored only if nothing precedes its new tokens, as in the first window; in later windows all new tokens are scored.
    nats: (N), of each window
    """
    scored = np.array([w.stop - w.first for w in windows])
    new = np.diff([w.stop for w in windows], prepend=0)
    return exp(float((nats / scored * (new - 1)).sum() / (new - 1).sum()))


def exp(x: float) -> float:
    """e to the x; infinity if that is too large for a float."""
    return math.exp(x) if x < 709 else math.inf
