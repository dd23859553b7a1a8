"""Decoding on a GPU: a Program is everything that one token of each of some rows needs, started with one call.

It works on tensors at fixed addresses: each row's newest token, how many tokens its pages hold, and the numbers of these pages. Its work is captured
as a CUDA graph at its first use, and ends by writing the inputs of greedy search's next step: the likeliest tokens, and lengths larger by one. So it
can start again before Python has seen a token, and it does: if `read` is then given the tokens that scored highest, their logits are already being
computed. If it is given others, that work is discarded.

float16 and bfloat16 models with heads of 64, 80 or 128 are computed by one kernel (kernels/program.cu), for which program_lines.py writes the table
of lines (operations); all others go through model.py, in torch's operations.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opt_fast import ops_cuda
from opt_fast.attention_cuda import Seen, plain
from opt_fast.paged_cache import PAGE, Pages, Row
from opt_fast.program_lines import one_kernel
from opt_fast.scores_cuda import Scores, highest
from opt_np import model
from opt_np.config import OPTConfig
from opt_np.tree import flatten

_capturing = threading.Lock()


class Program:
    """The pass of one token for up to B rows with up to P pages each, over a pool's pages."""

    def __init__(self, params: dict, cfg: OPTConfig, pool: Pages, B: int, P: int, aside: Aside | None = None) -> None:
        self.params, self.cfg, self.keys, self.values, self.layer, self.aside = params, cfg, pool.keys, pool.values, 0, aside or Aside()
        self.ids, self.lengths, self.pages = self.zeros(torch.int64, B), self.zeros(torch.int32, B), self.zeros(torch.int32, B, P)
        self.logits, self.found = self.zeros(self.keys.dtype, B, cfg.vocab_size), self.zeros(torch.float64, 2, B)
        self.kernel = one_kernel(params, cfg, self)
        self.graph: Any = None
        self.next: Next | None = None

    def zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.keys.device)

    def read(self, rows: list[Row]) -> Scores:
        """The scores of what follows the next token of each row, for which room is reserved in its pages.

        A row only grows, or is released and read again from its beginning, so a pass begun early for its next token stays valid until that is read.
        """
        expected, self.next = self.next, None
        ids, lengths, pages = [int(row.text[row.length]) for row in rows], [row.length for row in rows], [[*row.pages] for row in rows]
        if expected and (expected.rows != rows or expected.lengths != lengths):
            expected = None  # not the rows, or not the positions, that the early pass was for
        guessed = expected is None or expected.before.best.tolist() == ids
        if expected and guessed and expected.scores and expected.pages == pages:
            scores = expected.scores
        else:
            self.put(ids, lengths, pages)
            scores = self.start(len(rows))
        room = all(n + 1 < min(PAGE * len(row.pages), self.cfg.max_position_embeddings) for n, row in zip(lengths, rows, strict=True))
        ahead = self.start(len(rows)) if guessed and room else None  # sampling, unlike greedy search, seldom takes the likeliest
        self.next = Next(rows, [n + 1 for n in lengths], pages, scores, ahead)
        return scores

    def put(self, ids: list[int], lengths: list[int], pages: list[list[int]]) -> None:
        """Copies a step's inputs to the GPU; unused rows of the program repeat the last row."""
        B, P = self.pages.shape
        table = np.zeros((B, P), np.int32)
        for row, some in zip(table, pages, strict=False):
            row[: len(some)] = some
        table[len(pages) :] = table[len(pages) - 1]
        more = B - len(ids)
        for target, source in ((self.ids, ids + ids[-1:] * more), (self.lengths, lengths + lengths[-1:] * more), (self.pages, table)):
            target.copy_(torch.as_tensor(np.asarray(source)))

    def start(self, rows: int) -> Scores:
        """Starts a pass and returns its scores; on a GPU it does not wait for them."""
        if not self.keys.is_cuda:
            self.compute()
        else:
            if self.graph is None:
                self.capture()
            self.graph.replay()
        return Scores.fetched(self.logits[:rows].clone(), self.found[:, :rows])

    def capture(self) -> None:
        """Computes once without a graph, so that kernels are compiled and libraries have allocated; then captures, which computes nothing."""
        before, graph, (stream, memory) = [a.clone() for a in (self.ids, self.lengths)], torch.cuda.CUDAGraph(), self.aside.of(self.keys.device)
        with _capturing:  # torch allows one capture at a time in a process
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.compute()
                for a, b in zip((self.ids, self.lengths), before, strict=True):
                    a.copy_(b)
                with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):  # other threads may be generating
                    self.compute()
            torch.cuda.current_stream().wait_stream(stream)
        self.graph = graph  # only now, because a capture may be broken off

    def compute(self) -> None:
        """The logits, and the inputs of greedy search's next step."""
        if self.kernel:
            self.kernel.launch(self.lengths, self.pages)
        else:
            x = model.embeddings(self.params, self.ids, self, ops_cuda, model.no_tap)  # type: ignore[arg-type]
            x = model.decoder(self.params, x, self.cfg, self, ops_cuda, self)  # type: ignore[arg-type]
            h = model.final(self.params, x, self.cfg, ops_cuda, model.no_tap)
            self.logits.copy_(model.lm_logits(self.params, h[None], ops_cuda)[0])
        self.found.copy_(highest(self.logits))
        self.ids.copy_(self.found[0])
        self.lengths += 1

    # ---- the interface that model.decoder expects of its layout and its cache ------------------------------------------------------------

    @property
    def positions(self) -> Tensor:
        return self.lengths

    def extend(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes layer i's new keys and values to their pages.  k: (B, H, Dh);  v: (B, H, Dh)"""
        self.layer = i
        page = self.pages.gather(1, self.lengths[:, None].long() // PAGE)[:, 0]
        for pages, new in ((self.keys[i], k), (self.values[i], v)):
            pages.view(-1, *new.shape[1:])[(page * PAGE + self.lengths % PAGE).long()] = new
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q: (B, H, Dh);  k: (B, H, Dh);  v: (B, H, Dh)  ->  (B, H, Dh)"""
        keys, values = (a[self.layer][self.pages.long()].flatten(1, 2) for a in (self.keys, self.values))  # (B, P · PAGE, H, Dh)
        visible = torch.arange(keys.shape[1], device=q.device) <= self.lengths[:, None]
        values = values.masked_fill(~visible[..., None, None], 0)  # unwritten slots may hold NaN, and 0 · NaN is NaN
        return plain(q[:, None], keys, values, scale, Seen(visible, None))[0][:, 0]

    def advance(self, _: int) -> None: ...


class Aside:
    """A stream to capture graphs on, and a memory pool that they share, since they never run at the same time."""

    def __init__(self) -> None:
        self.made: tuple[Any, Any] | None = None

    def of(self, device: torch.device) -> tuple[Any, Any]:
        if self.made is None:
            self.made = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        return self.made

    def renew(self) -> None:
        """A new memory pool, once all graphs are gone: torch may by then have freed the old one."""
        if self.made is not None:
            self.made = self.made[0], torch.cuda.graph_pool_handle()


@dataclass
class Next:
    """What greedy search would read after a step, and the scores of that pass if it has been started."""

    rows: list[Row]
    lengths: list[int]
    pages: list[list[int]]
    before: Scores  # whose best tokens would be the next ones
    scores: Scores | None


def leaves(params: dict) -> list[tuple[Tensor, int]]:
    """The parameters that programs refer to, with their addresses: if a tensor or its address has changed, the programs are stale."""
    return [(leaf, leaf.data_ptr() if leaf.is_cuda else 0) for leaf in flatten(params).values()]
