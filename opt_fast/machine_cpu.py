"""The CPU's machine: the model over a pool of pages, as engine.py needs it of a backend. A pass reads new tokens of any rows, without padding."""

from __future__ import annotations

import functools
import itertools
import operator
from typing import Any

import numpy as np
from numba import get_num_threads

from opt_fast import attention_cpu, attention_parts, ops_cpu, paged_cache, program_cpu
from opt_fast.gemm import BITS
from opt_fast.kernel import address
from opt_fast.paged_cache import PAGE, Row, last_of
from opt_np import model
from opt_np.config import OPTConfig
from opt_np.tree import flatten

KEPT = 1 << 28  # most bytes that a model retains between two calls of generate: pages, and programs if both fit
AHEAD, TOKENS, AT_ONCE = 8, 128, 1 << 30  # most greedy steps, tokens and bytes of weights read per call from Python: hundredths of a second


class Pages(paged_cache.Pages):
    """Pages in NumPy arrays, and the addresses of those. In a page, a head's keys are contiguous, as attention reads them."""

    def __init__(self, cfg: OPTConfig, count: int, dtype: str = "float32") -> None:
        stored = np.dtype(dtype)
        super().__init__(cfg, count, np.empty(0, BITS.get(stored, stored)), shape=(cfg.num_attention_heads, PAGE, cfg.head_dim))
        self.step, self.apart = cfg.head_dim, PAGE * cfg.head_dim

    def add(self, count: int) -> None:
        super().add(count)
        self.bases = np.array([[address(k), address(v)] for k, v in zip(self.keys, self.values, strict=True)])  # (L, 2)

    def copy(self, old: int, new: int, count: int) -> None:
        for a in (self.keys, self.values):
            a[:, new, :, :count] = a[:, old, :, :count]


class Machine:
    """The model over a pool of pages, with the Programs (program_cpu.py) that run it."""

    def __init__(self, params: dict, cfg: OPTConfig, pool: Pages) -> None:
        self.params, self.cfg, self.pool, self.way = dict(params), cfg, pool, attention_parts.way_for(params)
        self.threads, self.leaves = get_num_threads(), leaves(params)
        self.programs: dict[int, program_cpu.Program] = {}  # for single tokens, by the number of rows
        self.reading: dict[bool, program_cpu.Program] = {}  # for prompts: the two from `reader`, for the number of tokens that each last had

    def serves(self, params: dict, cfg: OPTConfig) -> bool:
        """Whether the programs were written for these parameters, this config and the present number of threads."""
        found = leaves(params)
        same = get_num_threads() == self.threads and cfg == self.cfg and len(found) == len(self.leaves)
        return same and all(map(operator.is_, found, self.leaves))

    def rests(self) -> bool:
        """Forgets all texts, and returns whether the machine is worth retaining for the next call."""
        self.pool.clear()
        if self.pool.nbytes + sum(program.nbytes for program in (*self.programs.values(), *self.reading.values())) > KEPT:
            self.programs, self.reading = {}, {}
        return self.has_programs and self.pool.nbytes <= KEPT

    @functools.cached_property
    def has_programs(self) -> bool:
        return program_cpu.fit(self.params["layers"], self.cfg) and program_cpu.fits_ends(self.params, self.cfg)

    def read(self, pieces: list[tuple[Row, int]]) -> None:
        """Reads the next `count` tokens of each row, which has reserved room for them; a row read to its end gets its logits."""
        batch = Batch(self.pool, pieces, self.way)
        if self.has_programs and all(count == row.left == 1 for row, count in pieces):
            return self.go_on([row for row, _ in pieces], batch)
        rows, counts = [row for row, _ in pieces], [count for _, count in pieces]
        ids = np.concatenate([row.text[row.length : row.length + count] for row, count in pieces])
        done = [i for i, (row, count) in enumerate(pieces) if row.left == count]
        kept = [row.wanted(count) for row, count in pieces]
        x = self.blocks(model.embeddings(self.params, ids, batch, ops_cpu, model.no_tap), batch, kept)  # type: ignore[arg-type]
        ends = [*itertools.accumulate(kept)]
        logits = self.logits(x[[ends[i] - 1 for i in done]]) if done else None
        hidden: Any = [row.hidden is not None and self.final(x[end - keep : end]) for row, keep, end in zip(rows, kept, ends, strict=True)]
        for row, count, h in zip(rows, counts, hidden, strict=True):  # only now, as an interrupted pass is repeated
            row.wrote(count)
            if row.hidden is not None:
                row.hidden.append(h)
        for i, place in enumerate(done):
            rows[place].logits = logits, i

    def go_on(self, rows: list[Row], batch: Batch) -> None:
        """Reads one token of each row; if greedy search is expected to continue in all of them, also the next ones, until some row's page is full."""
        program, ids = self.program(len(rows)), self.params["embed_tokens"]["weight"].checked_rows([row.text[-1] for row in rows])
        sure = all(row.sure and row.ends == rows[0].ends for row in rows)
        room = [min(row.likely, len(row.pages) * PAGE - row.length - 1, self.cfg.max_position_embeddings - row.length - 1) for row in rows]
        steps = max(1, min(self.most, 1 + min(room), TOKENS // len(rows))) if sure else 1
        places = ops_cpu.embed(batch.positions + np.arange(steps)[:, None] + model.POSITION_OFFSET, **self.params["embed_positions"])
        logits, best = program.steps(ids, np.ascontiguousarray(places), self.pool.bases, batch.slots, batch.rows, rows[0].ends)
        now, *later = logits
        for i, row in enumerate(rows):
            if row.hidden is not None:
                row.hidden.append(self.final(program.x[i : i + 1].copy()))  # copied, as `final` may return its argument
            row.wrote(1)
            row.logits, after = (now, i), [(some, i) for some in later]
            row.ahead = [*zip(best[:, i].tolist(), [*after, None], strict=True)]

    def blocks(self, x: np.ndarray, batch: Batch, kept: list[int]) -> np.ndarray:
        """All blocks; for tokens whose output is not wanted, of the last block only keys and values.  x: (N, D)  ->  (sum(kept), D)"""
        layers, bases, (where, ends) = self.params["layers"], self.pool.bases, batch.last(kept)
        if not self.has_programs:
            return model.decoder(self.params, x, self.cfg, batch, ops_cpu, batch)[where]  # type: ignore[arg-type]
        x = self.reader(layers, len(x), rest=False).run(x, bases, batch.slots, batch.rows)[where]
        return self.reader(layers[-1:], len(x), rest=True).run(x, bases[-1:], batch.slots[where], ends).copy() if len(x) else x

    def logits(self, x: np.ndarray) -> np.ndarray:
        """x: (N, D)  ->  (N, V)"""
        return np.asarray(model.lm_logits(self.params, self.final(x)[None], ops_cpu))[0].astype(np.float32, copy=False)

    def final(self, x: np.ndarray) -> np.ndarray:
        return model.final(self.params, x, self.cfg, ops_cpu, model.no_tap)

    @functools.cached_property
    def most(self) -> int:
        """Greedy steps in one call, at most."""
        return max(1, min(AHEAD, AT_ONCE // sum(leaf.nbytes for leaf in self.leaves)))

    def program(self, B: int) -> program_cpu.Program:
        if B not in self.programs:
            self.programs[B] = program_cpu.Program(self.params["layers"], self.cfg, B, self.pool.dtype, self.way, self.params)
        return self.programs[B]

    def reader(self, layers: list[dict], N: int, rest: bool) -> program_cpu.Program:
        """The Program for reading prompts: everything up to the last layer's keys and values, or, with `rest`, what follows them."""
        if rest not in self.reading or len(self.reading[rest].x) != N:
            self.reading[rest] = program_cpu.Program(layers, self.cfg, N, self.pool.dtype, self.way, keys=not rest, rest=rest)
        return self.reading[rest]


def leaves(params: dict) -> list[Any]:
    """The arrays that programs point to; none if layers are read from disk."""
    return [*flatten(params).values()] if type(params["layers"]) is list else []


class Batch:
    """New tokens of some rows, packed as (N, …), in the roles of model.decoder's layout and of its cache."""

    def __init__(self, pool: Pages, pieces: list[tuple[Row, int]], way: attention_cpu.Forward) -> None:
        self.pool, self.way = pool, way
        where = [(row.pages[n // PAGE] * pool.size + n % PAGE * pool.step, n) for row, count in pieces for n in range(row.length, row.length + count)]
        self.slots, self.positions = np.array(where).T  # (N), (N)
        table, first = [], 0
        for row, count in pieces:
            table.append((first, count, row.length + count, row.address, 0))
            first += count
        self.rows = attention_cpu.Rows(np.array(table), pool.step, pool.apart, tuple(pieces))

    def last(self, kept: list[int]) -> tuple[np.ndarray, attention_cpu.Rows]:
        """The indices of the last kept[r] tokens of each row r, and the Rows in which only these are queries."""
        table = self.rows.table.copy()
        where = last_of(table[:, 1], kept)
        table[:, 0], table[:, 1] = np.cumsum(kept) - kept, kept
        return where, self.rows._replace(table=table[table[:, 1] > 0])

    def extend(self, i: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Writes layer i's new keys and values to their pages.  k: (N, H, Dh);  v: (N, H, Dh)"""
        keys, values = self.pool.keys[i], self.pool.values[i]
        attention_cpu.write(k, v, keys, values, self.slots, self.pool.apart)
        return keys, values

    def advance(self, _: int) -> None: ...
