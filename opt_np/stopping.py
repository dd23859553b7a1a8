"""When a row ends: at an end token, or at a stop string, which may begin and end inside tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def stop_check(eos: Sequence[int], strings: Sequence[str], tokenizer: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A function ids (N, T) -> (N) bool: whether a row's last token ends it. Raises ValueError for stop strings without a tokenizer.

    Equals HF's EosTokenCriteria and StopStringCriteria.
    """
    if strings and tokenizer is None:
        raise ValueError(f"stop_strings={[*strings]} needs tokenizer=, to know what text the ids stand for")
    wanted, ends = [string.encode() for string in strings], np.array(eos, np.int64)

    def ended(ids: np.ndarray) -> np.ndarray:
        at_string = [any(stops(row, stop, tokenizer) for stop in wanted) for row in ids]
        return (ids[:, -1:] == ends).any(1) | np.array(at_string, bool)  # np.isin takes many times as long for so few ids

    return ended


def stops(row: np.ndarray, stop: bytes, tokenizer: Any) -> bool:
    """Whether `stop` ends inside the last token of the row, or with it. It may begin in the prompt; special tokens count by their text."""
    last = text = tokenizer.token_bytes(row[-1])
    for i in row[-2::-1]:
        piece = tokenizer.token_bytes(i)
        if not piece or len(text) >= len(last) + len(stop):  # an id without a token is part of no text
            break
        text = piece + text
    return stop in text[max(0, len(text) - len(last) - len(stop) + 1) :]
