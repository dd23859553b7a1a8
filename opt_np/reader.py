"""What decoding asks of the model: a way of decoding is a generator, and this is what it and the model say to each other.

It yields a Reading when it needs the model, is sent the hidden states and logits back, and yields what it has found. So whoever runs it may read for
it alone, as `read` does with a Reader, or for many of them at once (opt_fast/engine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from opt_np.arrays import host
from opt_np.config import OPTConfig
from opt_np.kv_cache import KVCache
from opt_np.model import last_hidden_state, lm_logits


class Reading(NamedTuple):
    """Rows to be read, as far as they were not read before."""

    ids: np.ndarray  # (N, T)
    mask: np.ndarray  # (N, T)
    copies: int = 1  # rows come in runs of so many equal ones, and one of each is read
    hidden: bool = False  # whether the last hidden states are wanted, too
    likely: int = 0  # so many tokens more will be asked for, each the best by the logits before it, unless an end comes: a reader may read on
    ends: tuple[int, ...] = ()


Answer = tuple[Any, np.ndarray]  # last hidden states of what was read now, (N / copies, T, W), if wanted, and the logits that follow, (N, V) float32
Decoding = Generator[Any, Answer, None]  # yields Readings, and what it finds


@dataclass
class Reader:
    """The model, and what it has read of rows that grow: a cache while they fit its positions; with "slide", the last of them read again each step.

    `first` is the first column that it reads: padding that all rows share, and what "truncate_left" drops, stand before it. `most` is for how many
    rows and tokens it should make room at once.
    """

    params: dict
    cfg: OPTConfig
    ops: ModuleType
    first: int
    most: tuple[int, int] = (0, 0)
    cache: KVCache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = KVCache(self.most[1])

    def __call__(self, reading: Reading) -> Answer:
        ids, mask, copies, hidden, *_ = reading
        longest, start, cache = self.cfg.max_position_embeddings, self.first, self.cache
        if ids.shape[1] - start > longest:  # nanoGPT's rule: positions restart at 0 with every token, and no key stays right
            start, cache = ids.shape[1] - longest, KVCache()
        new, seen, kept = ids[::copies, start + cache.length :], mask[::copies, start:], ... if hidden else np.s_[:, -1:]
        h = last_hidden_state(self.params, new, self.cfg, cache, seen, self.ops, kept=kept)
        logits = host(lm_logits(self.params, h, self.ops, logits_to_keep=1))[:, -1].astype(np.float32, copy=False)
        if copies > 1:
            rows = np.repeat(np.arange(len(logits)), copies)
            self.cache.reorder(rows)
            logits = logits[rows]
        return h, logits

    def reorder(self, rows: np.ndarray) -> None:
        """Makes row b go on from what was row rows[b].  rows: (N)"""
        self.cache.reorder(rows)


def read(decoding: Decoding, reader: Callable[[Reading], Answer]) -> Iterator[Any]:
    """What a way of decoding finds, with a reader for it alone."""
    answer: Any = None
    while True:
        try:
            found = decoding.send(answer)
        except StopIteration:
            return
        answer = reader(found) if isinstance(found, Reading) else None
        if answer is None:
            yield found
