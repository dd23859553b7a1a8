"""Decoding over pages on a GPU: the machine, which is what engine.py needs of a backend.

A row is a text that grows, with the pages (paged_cache.py) that hold its keys and values. Prompts go through ops_cuda, all rows packed end to end.
Single tokens, one of each row, go through a Program (program_cuda.py): everything the GPU does for them is captured once as a CUDA graph, and then
started with one call. Logits stay on the GPU until they are needed (Scores): greedy search fetches two numbers per row. And the GPU does not wait for
Python: it continues with the highest-scoring tokens while the host still looks at them. If the host continues with others, that work is discarded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opt_fast import ops_cuda, paged_cache
from opt_fast.attention_cuda import attention_lse
from opt_fast.paged_cache import PAGE, Row, last_of
from opt_fast.program_cuda import Aside, Program, leaves
from opt_fast.scores_cuda import Scores, highest
from opt_np import model
from opt_np.arrays import host
from opt_np.config import OPTConfig

KEPT = 2**30  # at most this many bytes of pages stay allocated between two calls of generate


class Pages(paged_cache.Pages):
    """Pages on a GPU."""

    last: Any = None  # an event: the previous work on them has ended

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Runs its body after all earlier ones, on any stream, and without gradients, inference mode or autocast, whatever the caller has set."""
        device = self.keys.device
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            if not self.keys.is_cuda:
                yield
                return
            with torch.cuda.device(device):
                if self.last is not None:
                    torch.cuda.current_stream().wait_event(self.last)
                self.last = torch.cuda.Event()
                try:
                    yield
                finally:
                    self.last.record()

    def copy(self, old: int, new: int, count: int) -> None:
        with self.alone():
            super().copy(old, new, count)

    def add(self, count: int) -> None:
        try:
            with self.alone():
                super().add(count)
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"{len(self.counts) + count} pages of {PAGE} tokens do not fit on the GPU; ask for fewer ({error})") from None


class Machine:
    """The model over a pool of pages; one pass reads new tokens of any rows."""

    def __init__(self, params: dict, cfg: OPTConfig, pool: Pages) -> None:
        self.params, self.cfg, self.pool = dict(params), cfg, pool
        self.leaves, self.aside, self.whole = leaves(params), Aside(), True
        self.programs: dict[tuple[int, int], Program] = {}  # by (rows, pages per row)

    def serves(self, params: dict, cfg: OPTConfig) -> bool:
        """Whether these are still the parameters and the config that the programs were made for."""
        found = leaves(params)
        same = cfg == self.cfg and len(found) == len(self.leaves)
        return same and all(a is b and p == q for (a, p), (b, q) in zip(found, self.leaves, strict=True))

    def rests(self) -> bool:
        """Forgets all texts, and returns whether the machine may be used again."""
        self.pool.clear()
        return self.whole and self.pool.nbytes <= KEPT

    def read(self, pieces: list[tuple[Row, int]]) -> None:
        """Reads the next n tokens of each (row, n), whose pages are reserved; a row that has then been read to its end gets its logits."""
        with self.pool.alone():
            self.whole = False
            self._read(pieces)
            self.whole = True  # a machine whose pass was broken off is not used again

    def _read(self, pieces: list[tuple[Row, int]]) -> None:
        tokens = [row for row, _ in pieces if row.left == 1 and row.hidden is None]
        prompts = [(row, count) for row, count in pieces if row.left > 1 or row.hidden is not None]
        if prompts:
            self.read_prompts(prompts)
        if tokens:
            scores = self.program(tokens).read(tokens)
            for i, row in enumerate(tokens):
                row.wrote(1)
                row.logits = scores, i

    def read_prompts(self, pieces: list[tuple[Row, int]]) -> None:
        rows, counts = [row for row, _ in pieces], [count for _, count in pieces]
        ids = np.concatenate([row.text[row.length : row.length + count] for row, count in pieces])
        done = [i for i, row in enumerate(rows) if row.left == counts[i]]
        kept = [row.wanted(count) for row, count in pieces]
        batch: Any = Batch(self.pool, pieces, kept)
        x = model.embeddings(self.params, ids, batch, ops_cuda, model.no_tap)
        x = model.decoder(self.params, x, self.cfg, batch, ops_cuda, batch, kept=batch.kept)
        ends = np.cumsum(kept)
        if done:
            h = self.final(x[torch.as_tensor(ends[done] - 1, device=x.device)])
            logits = model.lm_logits(self.params, h[None], ops_cuda)[0]
            scores = Scores.fetched(logits, highest(logits))
        for row, count, end in zip(rows, counts, ends, strict=True):  # only now, because a pass may be broken off and repeated
            if row.hidden is not None:  # then all its tokens are in x
                row.hidden.append(host(self.final(x[end - count : end])))
            row.wrote(count)
        for i, place in enumerate(done):
            rows[place].logits = scores, i

    def final(self, x: Tensor) -> Tensor:
        return model.final(self.params, x, self.cfg, ops_cuda, model.no_tap)

    def program(self, rows: list[Row]) -> Program:
        """A program for at least this many rows and pages per row, made at first use."""
        B, pages = room_for(len(rows)), min(power_of_two(max(len(row.pages) for row in rows)), self.pool.most)
        if any(program.keys is not self.pool.keys for program in self.programs.values()):  # the pool has grown and moved
            self.programs.clear()
            self.aside.renew()
        if (B, pages) not in self.programs:
            self.programs[B, pages] = Program(self.params, self.cfg, self.pool, B, pages, self.aside)
        return self.programs[B, pages]


def room_for(rows: int) -> int:
    """How many rows the program for `rows` rows has: 1, 2, 4, 8, 16, 24, 32 …"""
    return power_of_two(rows) if rows <= 8 else -(-rows // 8) * 8


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


class Batch:
    """New tokens of some rows, packed end to end, (N, …): model.decoder's layout and cache. The last block computes only those in `kept`."""

    def __init__(self, pool: Pages, pieces: list[tuple[Row, int]], kept: list[int]) -> None:
        self.pool, self.layer, device = pool, 0, pool.keys.device
        self.slots = torch.as_tensor(np.concatenate([row.slots(count) for row, count in pieces]) // pool.step, device=device)  # (N)
        self.positions = np.concatenate([np.arange(row.length, row.length + count) for row, count in pieces])
        ends, kept_ends = np.cumsum([count for _, count in pieces]), np.cumsum(kept)
        self.kept = torch.as_tensor(last_of((count for _, count in pieces), kept), device=device)
        alike: dict[tuple[int, int, int], list[int]] = {}  # rows of the same lengths, which attention takes together
        for r, (row, count) in enumerate(pieces):
            alike.setdefault((count, row.length, kept[r]), []).append(r)
        self.groups: list[Any] = []  # (new tokens, past tokens, indices of the new ones, indices of those kept, pages)
        for (count, past, keep), rows in alike.items():
            tokens, asking = ((last[rows][:, None] + np.arange(-n, 0)).ravel() for last, n in ((ends, count), (kept_ends, keep)))
            pages = np.array([pieces[r][0].pages[: -(-(past + count) // PAGE)] for r in rows])
            self.groups.append((count, past, *(torch.as_tensor(a, device=device) for a in (tokens, asking, pages))))

    def extend(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes layer i's new keys and values to their pages.  k: (N, H, Dh);  v: (N, H, Dh)"""
        self.layer = i
        for pages, new in ((self.pool.keys[i], k), (self.pool.values[i], v)):
            pages.view(-1, *new.shape[1:])[self.slots] = new
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Each row's queries (all, or those kept) over its own keys: its past ones in its pages, and the new ones.

        q: (M, H, Dh);  k: (N, H, Dh);  v: (N, H, Dh)  ->  (M, H, Dh)
        """
        O, whole = torch.empty_like(q), len(q) == len(k)
        for count, past, tokens, asking, pages in self.groups:
            queries = tokens if whole else asking
            if not len(queries):
                continue
            if past:
                keys, values = (a[self.layer][pages].flatten(1, 2)[:, : past + count] for a in (self.pool.keys, self.pool.values))
            else:
                keys, values = (a[tokens].unflatten(0, (-1, count)) for a in (k, v))
            O[queries] = attention_lse(q[queries].unflatten(0, (len(keys), -1)), keys, values, scale)[0].flatten(0, 1)
        return O

    def advance(self, _: int) -> None: ...
