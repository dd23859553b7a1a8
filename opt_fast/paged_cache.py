"""Keys and values in pages of PAGE tokens: allocated once, handed out one by one, and shared by rows that begin with the same text.

A row holds a list of pages. Rows that continue the same text hold the same pages; a page with other holders is copied before it is written to
(copy on write). A full page is indexed by its ids and the page before it, hence by all the text up to its end: a row that begins with the same text
takes it instead of computing it (prefix cache). That is exact: a token's keys and values have the same bits whichever row computes them. An indexed
page without holders is retained until its memory is needed; the least recently used one is reused first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from opt_np.arrays import empty
from opt_np.config import OPTConfig

PAGE = 64  # tokens
Key = tuple[int, bytes]  # the name of the page before, 0 for none, and the page's own ids


def pages_for(rows: int, tokens: int) -> int:
    """How many pages this many rows need, each of this many tokens."""
    return rows * math.ceil(tokens / PAGE)


def last_of(counts: Iterable[int], kept: Iterable[int]) -> np.ndarray:
    """The indices of each row's last `kept` tokens, if rows of `counts` tokens are concatenated.  counts: (R);  kept: (R)  ->  (sum(kept))"""
    ends = itertools.accumulate(counts)
    return np.concatenate([np.arange(end - keep, end) for end, keep in zip(ends, kept, strict=True)])


class Full(Exception):
    """Raised if a page is wanted and all are held."""


class Pages:
    """The pool: the arrays, each page's number of holders, and the index of known texts."""

    def __init__(self, cfg: OPTConfig, count: int, like: Any, shape: tuple[int, ...] | None = None) -> None:
        self.shape = shape or (PAGE, cfg.num_attention_heads, cfg.head_dim)
        self.size, self.step = math.prod(self.shape), math.prod(self.shape[1:])  # elements of a page, and from token to token in it
        self.most = math.ceil(cfg.max_position_embeddings / PAGE)  # pages of a row
        self.layers, self.dtype = cfg.num_hidden_layers, like.dtype
        self.counts: list[int] = []  # holders of each page
        self.free: list[int] = []
        self.idle: dict[int, None] = {}  # known pages without holders, the least recently used first
        self.known: dict[Key, int] = {}
        self.labels: dict[int, tuple[int, Key]] = {}  # of known pages: a name that is never used twice, and the key
        self.names = itertools.count(1)
        self.keys = self.values = empty((self.layers, 0, *self.shape), like)  # or torch tensors, where `like` is one
        self.add(count)

    def add(self, count: int) -> None:
        """Allocates `count` more pages."""
        have = len(self.counts)
        try:
            self.keys, self.values = (enlarged(a, have + count) for a in (self.keys, self.values))
        except MemoryError:
            size = 2 * self.layers * self.size * self.keys.itemsize * (have + count) / 1e9
            raise MemoryError(f"{have + count} pages of {PAGE} tokens are {size:.1f} GB of keys and values; ask for fewer, or for float16") from None
        self.counts += [0] * count
        self.free += range(have + count - 1, have - 1, -1)

    def make_room(self, count: int) -> None:
        """Adds pages if fewer than `count` are available, and more than needed, since memory that is never written costs nothing."""
        if count > self.available:
            self.add(max(2 * count, len(self.counts)))

    def clear(self) -> None:
        """Forgets everything: no page is held or known."""
        self.counts, self.free = [0] * len(self.counts), [*range(len(self.counts) - 1, -1, -1)]
        for known in (self.idle, self.known, self.labels):
            known.clear()

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def available(self) -> int:
        return len(self.free) + len(self.idle)

    def take(self) -> int:
        """A page with one holder and arbitrary contents. Raises Full."""
        if not self.free and self.idle:
            self.forget(next(iter(self.idle)))
        if not self.free:
            raise Full
        page = self.free.pop()
        self.counts[page] = 1
        return page

    def copy(self, old: int, new: int, count: int) -> None:
        """Copies the first `count` tokens of page `old` to page `new`."""
        for a in (self.keys, self.values):
            a[:, new, :count] = a[:, old, :count]

    def hold(self, page: int) -> None:
        self.idle.pop(page, None)
        self.counts[page] += 1

    def release(self, page: int) -> None:
        self.counts[page] -= 1
        if not self.counts[page]:
            if page in self.labels:
                self.idle[page] = None
            else:
                self.free.append(page)

    def learn(self, key: Key, page: int) -> int:
        """The name of the known page with this text; `page` becomes it if there was none."""
        if key not in self.known:
            self.known[key], self.labels[page] = page, (next(self.names), key)
        return self.labels[self.known[key]][0]

    def forget(self, page: int) -> None:
        _, key = self.labels.pop(page)
        del self.known[key], self.idle[page]
        self.free.append(page)

    def check(self, rows: Iterable[Row] = ()) -> None:
        """Raises AssertionError unless every page is exactly one of free, idle and held, and is held by these rows and no others."""
        held = np.bincount([page for row in rows for page in row.pages], minlength=len(self.counts)).tolist()
        assert held == self.counts, (held, self.counts)
        assert sorted([*self.free, *self.idle, *(page for page, n in enumerate(held) if n)]) == list(range(len(held)))
        assert {key: page for page, (_, key) in self.labels.items()} == self.known
        assert self.idle.keys() <= self.labels.keys()


def enlarged(a: Any, count: int) -> Any:
    """A larger array with room for `count` pages, which starts with the old ones."""
    bigger = empty((a.shape[0], count, *a.shape[2:]), a)
    bigger[:, : a.shape[1]] = a
    return bigger


class Row:
    """A text that grows, and the pages that hold its first `length` tokens."""

    def __init__(self, pool: Pages) -> None:
        self.pool, self.length = pool, 0
        self.pages: list[int] = []
        self.places = np.zeros(pool.most, np.int64)  # offset of each page in a layer's array, for attention
        self.address = self.places.ctypes.data
        self.name = 0  # of the last full page
        self.text = np.empty(0, np.int64)  # all ids, read and not yet read
        self.hidden: list[np.ndarray] | None = None  # last hidden states of the tokens read, if they are wanted
        self.logits: tuple[Any, int] | None = None  # (N, V) and the row in it: what follows the text, once it is read
        self.likely = 0  # as in opt_np.reader.Reading
        self.ends: tuple[int, ...] = ()
        self.ahead: list[tuple[int, tuple[Any, int] | None]] = []  # the next tokens as expected, with their logits if they were read ahead
        self.sure = False  # whether the last token was the expected one

    @property
    def left(self) -> int:
        """Tokens of the text still to be read."""
        return len(self.text) - self.length

    def wanted(self, count: int) -> int:
        """How many of the next `count` tokens, counted from their end, need an output; the others need only keys and values."""
        return int(self.left == count) if self.hidden is None else count

    def next_key(self) -> Key | None:
        """The key of the next page, if the row is at a page's start and its text continues beyond that page; else None."""
        start, stop = self.length, self.length + PAGE
        return (self.name, self.text[start:stop].tobytes()) if start % PAGE == 0 and stop < len(self.text) else None

    def grow(self, text: np.ndarray) -> None:
        """Sets the text, which extends the old one. If the new token is the expected one, it may already have been read."""
        self.text = text
        token, logits = self.ahead.pop(0) if self.ahead else (None, None)
        self.sure = self.left == 1 and token == text[-1]
        if not self.sure:
            self.ahead.clear()
        elif logits is not None:
            self.wrote(1)
            self.logits = logits

    def adopt(self) -> None:
        """Takes over known pages, but never one with the last token, which has to be read for its logits."""
        while (key := self.next_key()) and (page := self.pool.known.get(key)) is not None:
            self._drop(self.length // PAGE)  # pages reserved for these tokens
            self.pool.hold(page)
            self._append(page)
            self.length += PAGE
            self.name = self.pool.labels[page][0]

    def lacks(self, count: int) -> int:
        """How many pages have to be taken, at most, before `count` more tokens are written."""
        return math.ceil((self.length + count) / PAGE) - len(self.pages) + self._shared()

    def reserve(self, count: int) -> None:
        """Takes pages for `count` more tokens, and copies a partly filled one that other rows hold too. Raises Full."""
        if self._shared():
            old, new = self.pages[-1], self.pool.take()
            try:
                self.pool.copy(old, new, self.length % PAGE)
            except BaseException:
                self.pool.release(new)
                raise
            self._drop(len(self.pages) - 1)
            self._append(new)
        while len(self.pages) * PAGE < self.length + count:
            self._append(self.pool.take())

    def slots(self, count: int) -> np.ndarray:
        """The offsets of the next `count` tokens in a layer's array.  ->  (count)"""
        at = np.arange(self.length, self.length + count)
        return self.places[at // PAGE] + at % PAGE * self.pool.step

    def wrote(self, count: int) -> None:
        """Records that the next `count` tokens are written, and makes the pages that they filled known."""
        first, self.length = self.length // PAGE, self.length + count
        for i in range(first, self.length // PAGE):
            self.name = self.pool.learn((self.name, self.text[i * PAGE : (i + 1) * PAGE].tobytes()), self.pages[i])

    def fork(self) -> Row:
        """Another row that continues from the same text."""
        other = Row(self.pool)
        other.length, other.name, other.text, other.pages = self.length, self.name, self.text, [*self.pages]
        other.places[:] = self.places
        for page in self.pages:
            self.pool.hold(page)
        return other

    def release(self) -> None:
        """Releases all pages, the last first, as it is useless without those before it; the text has to be read again."""
        self._drop(0)
        self.length = self.name = 0
        self.ahead.clear()

    def _append(self, page: int) -> None:
        self.places[len(self.pages)] = page * self.pool.size
        self.pages.append(page)

    def _drop(self, kept: int) -> None:
        while len(self.pages) > kept:
            self.pool.release(self.pages.pop())

    def _shared(self) -> bool:
        return self.length % PAGE > 0 and self.pool.counts[self.pages[-1]] > 1
