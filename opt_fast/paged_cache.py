"""Keys and values in pages of PAGE tokens: allocated once, handed out one by one, and shared by rows that begin alike.

A row holds a list of pages. Rows that continue the same text hold the same pages; a page with other holders is copied before it is written to
(copy on write). A full page is indexed by its ids and the page before it, hence by all the text up to its end: a row that begins with the same text
takes it instead of computing it (prefix cache). That is exact: a token's keys and values have the same bits whichever row computes them. An indexed
page without holders stays until its place is needed; the least recently used goes first.
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
    """How many pages so many rows of so many tokens need."""
    return rows * math.ceil(tokens / PAGE)


def last_of(counts: Iterable[int], kept: Iterable[int]) -> np.ndarray:
    """Where the last so many of each row's tokens stand, if all rows' stand side by side.  counts: (R);  kept: (R)  ->  (sum(kept))"""
    ends = itertools.accumulate(counts)
    return np.concatenate([np.arange(end - keep, end) for end, keep in zip(ends, kept, strict=True)])


class Full(Exception):
    """All pages are held."""


class Pages:
    """The arrays, who holds what, and which text is known."""

    def __init__(self, cfg: OPTConfig, count: int, like: Any, shape: tuple[int, ...] | None = None) -> None:
        self.shape = shape or (PAGE, cfg.num_attention_heads, cfg.head_dim)
        self.size, self.step = math.prod(self.shape), math.prod(self.shape[1:])  # of a page; from token to token in it
        self.most = math.ceil(cfg.max_position_embeddings / PAGE)  # of a row
        self.layers, self.dtype = cfg.num_hidden_layers, like.dtype
        self.counts: list[int] = []  # of each page's holders
        self.free: list[int] = []
        self.idle: dict[int, None] = {}  # known and held by nobody, the longest unused first
        self.known: dict[Key, int] = {}
        self.labels: dict[int, tuple[int, Key]] = {}  # of known pages: a name that no page had before, and the key
        self.names = itertools.count(1)
        self.keys = self.values = empty((self.layers, 0, *self.shape), like)  # or torch tensors, where `like` is one
        self.add(count)

    def add(self, count: int) -> None:
        """Makes so many pages more."""
        have = len(self.counts)
        try:
            self.keys, self.values = (enlarged(a, have + count) for a in (self.keys, self.values))
        except MemoryError:
            size = 2 * self.layers * self.size * self.keys.itemsize * (have + count) / 1e9
            raise MemoryError(f"{have + count} pages of {PAGE} tokens are {size:.1f} GB of keys and values; ask for fewer, or for float16") from None
        self.counts += [0] * count
        self.free += range(have + count - 1, have - 1, -1)

    def make_room(self, count: int) -> None:
        """Adds pages if so many cannot be taken: more than that, for memory that nobody writes to costs nothing."""
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
        """A page for one holder, with anything in it. Raises Full."""
        if not self.free and self.idle:
            self.forget(next(iter(self.idle)))
        if not self.free:
            raise Full
        page = self.free.pop()
        self.counts[page] = 1
        return page

    def copy(self, old: int, new: int, count: int) -> None:
        """The first so many tokens of a page to another one."""
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
        """The name of the page with this text: this one from now on, if there was none."""
        if key not in self.known:
            self.known[key], self.labels[page] = page, (next(self.names), key)
        return self.labels[self.known[key]][0]

    def forget(self, page: int) -> None:
        _, key = self.labels.pop(page)
        del self.known[key], self.idle[page]
        self.free.append(page)

    def check(self, rows: Iterable[Row] = ()) -> None:
        """Raises AssertionError unless every page is free, idle or held, once, and held by just these rows."""
        held = np.bincount([page for row in rows for page in row.pages], minlength=len(self.counts)).tolist()
        assert held == self.counts, (held, self.counts)
        assert sorted([*self.free, *self.idle, *(page for page, n in enumerate(held) if n)]) == list(range(len(held)))
        assert {key: page for page, (_, key) in self.labels.items()} == self.known
        assert self.idle.keys() <= self.labels.keys()


def enlarged(a: Any, count: int) -> Any:
    """An array with room for `count` pages, the old ones in their places."""
    bigger = empty((a.shape[0], count, *a.shape[2:]), a)
    bigger[:, : a.shape[1]] = a
    return bigger


class Row:
    """A text that grows, and the pages with the first `length` of its tokens."""

    def __init__(self, pool: Pages) -> None:
        self.pool, self.length = pool, 0
        self.pages: list[int] = []
        self.places = np.zeros(pool.most, np.int64)  # where each page begins in a layer's array, as attention wants it
        self.address = self.places.ctypes.data
        self.name = 0  # of the last full page
        self.text = np.empty(0, np.int64)  # what is to be read, with what was
        self.hidden: list[np.ndarray] | None = None  # last hidden states of what is read, where they are wanted
        self.logits: tuple[Any, int] | None = None  # (N, V) and the row in it: what follows the text, once it was read
        self.likely = 0  # as in opt_np.reader.Reading
        self.ends: tuple[int, ...] = ()
        self.ahead: list[tuple[int, tuple[Any, int] | None]] = []  # tokens that are expected, and logits where they were read
        self.sure = False  # whether the last one came

    @property
    def left(self) -> int:
        """Tokens of the text still to be read."""
        return len(self.text) - self.length

    def wanted(self, count: int) -> int:
        """Of the next so many tokens, how many at their end are asked for; of the others, keys and values are enough."""
        return int(self.left == count) if self.hidden is None else count

    def next_key(self) -> Key | None:
        """Of the page that comes next, if the text fills it and goes on."""
        start, stop = self.length, self.length + PAGE
        return (self.name, self.text[start:stop].tobytes()) if start % PAGE == 0 and stop < len(self.text) else None

    def grow(self, text: np.ndarray) -> None:
        """Gives it its text: as it was, and more. What comes as expected may have been read already."""
        self.text = text
        token, logits = self.ahead.pop(0) if self.ahead else (None, None)
        self.sure = self.left == 1 and token == text[-1]
        if not self.sure:
            self.ahead.clear()
        elif logits is not None:
            self.wrote(1)
            self.logits = logits

    def adopt(self) -> None:
        """Takes the pages that are known, but never the last token's: what follows from it is wanted."""
        while (key := self.next_key()) and (page := self.pool.known.get(key)) is not None:
            self._drop(self.length // PAGE)  # what was reserved for it
            self.pool.hold(page)
            self._append(page)
            self.length += PAGE
            self.name = self.pool.labels[page][0]

    def lacks(self, count: int) -> int:
        """Pages that have to be taken, at most, before so many tokens more are written."""
        return math.ceil((self.length + count) / PAGE) - len(self.pages) + self._shared()

    def reserve(self, count: int) -> None:
        """Makes room for so many tokens more, in pages that nobody else holds. Raises Full."""
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
        """Where the next tokens go, in a layer's array.  ->  (count)"""
        at = np.arange(self.length, self.length + count)
        return self.places[at // PAGE] + at % PAGE * self.pool.step

    def wrote(self, count: int) -> None:
        """The next tokens are in their slots; the pages that they filled are known from now on."""
        first, self.length = self.length // PAGE, self.length + count
        for i in range(first, self.length // PAGE):
            self.name = self.pool.learn((self.name, self.text[i * PAGE : (i + 1) * PAGE].tobytes()), self.pages[i])

    def fork(self) -> Row:
        """Another row that goes on from the same text."""
        other = Row(self.pool)
        other.length, other.name, other.text, other.pages = self.length, self.name, self.text, [*self.pages]
        other.places[:] = self.places
        for page in self.pages:
            self.pool.hold(page)
        return other

    def release(self) -> None:
        """Gives all pages back, the last first, for without those before it is of no use; the text is to be read again."""
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
