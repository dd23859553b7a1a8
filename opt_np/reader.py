"""The protocol between decoding and the model. A decoding method (greedy, beams …) is a generator that never calls the model itself.

When it needs logits it yields a Reading, and is sent an Answer; anything else that it yields is a result. So its caller decides how the model runs:
`read` answers one generator with a Reader; opt_fast/engine.py batches the readings of many.
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
    """A request to run the model on these whole rows; the reader skips what its cache already holds."""

    ids: np.ndarray  # (N, T)
    mask: np.ndarray  # (N, T)
    copies: int = 1  # each prompt's row appears this many times in succession; only one of them is run
    hidden: bool = False  # whether the last hidden states are wanted, too
    likely: int = 0  # how many more greedy steps will follow, unless a row ends: a reader may run them ahead
    ends: tuple[int, ...] = ()  # ids at which those steps stop


Answer = tuple[Any, np.ndarray]  # last hidden states of the new tokens, (N / copies, T, W), if wanted, and the logits that follow, (N, V) float32
Decoding = Generator[Any, Answer, None]  # yields Readings and results


@dataclass
class Reader:
    """The model and a KV cache, for rows that grow. Past max_position_embeddings (overflow="slide") each step recomputes the last window, uncached.

    `first` is the first column that is read: before it is only padding common to all rows, or what "truncate_left" drops. `most`: the most rows
    and tokens to expect, for allocation.
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
        if ids.shape[1] - start > longest:  # as in nanoGPT: the window restarts at position 0 at every step, so no cached key stays valid
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
        """Makes row b continue from what was row rows[b].  rows: (N)"""
        self.cache.reorder(rows)


def read(decoding: Decoding, reader: Callable[[Reading], Answer]) -> Iterator[Any]:
    """Runs one decoding generator to its end, answering its Readings with `reader`, and yields its results."""
    answer: Any = None  # a generator's first send has to be None
    while True:
        try:
            found = decoding.send(answer)
        except StopIteration:
            return
        answer = reader(found) if isinstance(found, Reading) else None
        if answer is None:
            yield found
