"""The model over pages on the CPU: what engine.py needs of a backend. One pass reads new tokens of any rows, side by side and without padding."""

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

KEPT = 1 << 28  # bytes of pages and of programs that stay with a model between two calls of generate, at most
AHEAD, TOKENS, AT_ONCE = 8, 128, 1 << 30  # steps, tokens, and bytes of weights, at most, that are read before Python looks: hundredths of a second


class Pages(paged_cache.Pages):
    """Pages of NumPy arrays, and where they begin in memory. A head's keys stand side by side in a page, for so they are read."""

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
    """The model over pages: one pass reads new tokens of any rows."""

    def __init__(self, params: dict, cfg: OPTConfig, pool: Pages) -> None:
        self.params, self.cfg, self.pool, self.way = dict(params), cfg, pool, attention_parts.way_for(params)
        self.threads, self.leaves = get_num_threads(), leaves(params)
        self.programs: dict[int, program_cpu.Program] = {}  # by the number of rows
        self.reading: dict[bool, program_cpu.Program] = {}  # two, for as many tokens of texts as were last read at once, and asked for

    def serves(self, params: dict, cfg: OPTConfig) -> bool:
        """Whether these are still the parameters, the config and the threads that programs were written for."""
        found = leaves(params)
        same = get_num_threads() == self.threads and cfg == self.cfg and len(found) == len(self.leaves)
        return same and all(map(operator.is_, found, self.leaves))

    def rests(self) -> bool:
        """Forgets all texts. Whether it may serve again."""
        self.pool.clear()
        if self.pool.nbytes + sum(program.nbytes for program in (*self.programs.values(), *self.reading.values())) > KEPT:
            self.programs, self.reading = {}, {}
        return self.has_programs and self.pool.nbytes <= KEPT

    @functools.cached_property
    def has_programs(self) -> bool:
        return program_cpu.fit(self.params["layers"], self.cfg) and program_cpu.fits_ends(self.params, self.cfg)

    def read(self, pieces: list[tuple[Row, int]]) -> None:
        """The next so many tokens of each row, for which it has reserved room; a row that is then at its end has its logits."""
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
        for row, count, h in zip(rows, counts, hidden, strict=True):  # only now, for a pass may be broken off and repeated
            row.wrote(count)
            if row.hidden is not None:
                row.hidden.append(h)
        for i, place in enumerate(done):
            rows[place].logits = logits, i

    def go_on(self, rows: list[Row], batch: Batch) -> None:
        """One token of each row; and if greedy search goes on, as it did before, those that come next, up to where a row's page ends."""
        program, ids = self.program(len(rows)), self.params["embed_tokens"]["weight"].checked_rows([row.text[-1] for row in rows])
        sure = all(row.sure and row.ends == rows[0].ends for row in rows)
        room = [min(row.likely, len(row.pages) * PAGE - row.length - 1, self.cfg.max_position_embeddings - row.length - 1) for row in rows]
        steps = max(1, min(self.most, 1 + min(room), TOKENS // len(rows))) if sure else 1
        places = ops_cpu.embed(batch.positions + np.arange(steps)[:, None] + model.POSITION_OFFSET, **self.params["embed_positions"])
        logits, best = program.steps(ids, np.ascontiguousarray(places), self.pool.bases, batch.slots, batch.rows, rows[0].ends)
        now, *later = logits
        for i, row in enumerate(rows):
            if row.hidden is not None:
                row.hidden.append(self.final(program.x[i : i + 1].copy()))  # `final` may give back what it is given
            row.wrote(1)
            row.logits, after = (now, i), [(some, i) for some in later]
            row.ahead = [*zip(best[:, i].tolist(), [*after, None], strict=True)]

    def blocks(self, x: np.ndarray, batch: Batch, kept: list[int]) -> np.ndarray:
        """All blocks; but of the last one nobody needs more than keys and values, except for the tokens asked for.  x: (N, D)  ->  (sum(kept), D)"""
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
        """Steps at once."""
        return max(1, min(AHEAD, AT_ONCE // sum(leaf.nbytes for leaf in self.leaves)))

    def program(self, B: int) -> program_cpu.Program:
        if B not in self.programs:
            self.programs[B] = program_cpu.Program(self.params["layers"], self.cfg, B, self.pool.dtype, self.way, self.params)
        return self.programs[B]

    def reader(self, layers: list[dict], N: int, rest: bool) -> program_cpu.Program:
        """One that reads texts: all but what comes after the last layer's keys and values, or just that."""
        if rest not in self.reading or len(self.reading[rest].x) != N:
            self.reading[rest] = program_cpu.Program(layers, self.cfg, N, self.pool.dtype, self.way, keys=not rest, rest=rest)
        return self.reading[rest]


def leaves(params: dict) -> list[Any]:
    """What programs hold on to; of layers that come and go nothing."""
    return [*flatten(params).values()] if type(params["layers"]) is list else []


class Batch:
    """New tokens of some rows, (N, …), side by side: what model.decoder takes as its layout and as its cache."""

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
        """Where the last so many tokens of each row stand, and as queries of the same keys."""
        table = self.rows.table.copy()
        where = last_of(table[:, 1], kept)
        table[:, 0], table[:, 1] = np.cumsum(kept) - kept, kept
        return where, self.rows._replace(table=table[table[:, 1] > 0])

    def extend(self, i: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Layer i's new keys and values to their pages.  k: (N, H, Dh);  v: (N, H, Dh)"""
        keys, values = self.pool.keys[i], self.pool.values[i]
        attention_cpu.write(k, v, keys, values, self.slots, self.pool.apart)
        return keys, values

    def advance(self, _: int) -> None: ...
