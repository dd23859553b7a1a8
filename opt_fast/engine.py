"""Continuous batching: each round runs one pass over the newest token of every text being generated, and a piece of the prompts not yet read.

    engine = Engine(model)
    handles = [engine.submit([ids], max_new_tokens=50) for ids in prompts]
    for step in handles[0]: ...

A request's output equals that of model.stream or model.generate, to the last bit: opt_np.generate decodes and yields Readings (opt_np/reader.py:
requests to run the model on some rows), a Reader answers them, the engine runs the readings of all requests together, and no row's result depends on
its neighbours. Keys and values are cached in pages (paged_cache.py); a machine (machine_cpu.py, machine_cuda.py) is the model over a pool of pages.
The engine has no thread of its own: a caller that waits for a step runs rounds until the step is there.
"""

from __future__ import annotations

import bisect
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from opt_fast.paged_cache import PAGE, Key, Row, pages_for
from opt_np import generate, model
from opt_np.config import OPTConfig
from opt_np.generate import Request, Step
from opt_np.reader import Answer, Reading
from opt_np.settings import whole

UNREAD = 16  # steps that a request retains with all their logits until the caller takes them; older ones are reduced


class Reader:
    """opt_np.reader.Reader over pages, without padding. A prefix that rows have in common is computed once and shared."""

    def __init__(self, machine: Any, first: int) -> None:
        self.machine, self.first = machine, first
        self.rows: list[Row] = []
        self.answered = first  # columns of the ids that are already answered

    def __call__(self, reading: Reading) -> Answer:
        self.ask(reading)
        while any(row.left for row in self.rows):
            coming: set[Key] = set()
            pieces = [(row, count) for row in self.rows if (count := ready(row, coming))]
            self.machine.pool.make_room(sum(row.lacks(count) for row, count in pieces))
            for row, count in pieces:
                row.reserve(count)
            self.machine.read(pieces)
        return self.answer()

    def ask(self, reading: Reading) -> None:
        """Opens a reading, to be answered once no row has tokens left. Raises ValueError for ids outside the vocabulary."""
        self.reading, cfg = reading, self.machine.cfg
        ids, mask = np.asarray(reading.ids, np.int64)[:: reading.copies], reading.mask[:: reading.copies]
        start = max(self.first, ids.shape[1] - cfg.max_position_embeddings)
        if not self.rows:
            model.make_layout(cfg, ids[:, start:], mask[:, start:])  # only for its checks
            self.rows = [Row(self.machine.pool) for _ in ids]
        if start > self.first:  # as nanoGPT: the window restarts at position 0 with every token, so no cached key stays valid
            self.release()
            self.answered = start
        for row, text, pads in zip(self.rows, ids[:, start:], mask[:, start:].argmax(1).tolist(), strict=True):
            row.likely, row.ends, row.hidden = reading.likely, reading.ends, [] if reading.hidden else None
            row.grow(text[pads:])

    def answer(self) -> Answer:
        """The answer to the open reading, once no row has tokens left."""
        (ids, _, copies, hidden, *_), rows = self.reading, self.rows
        h, logits = None, logits_of(rows)
        if hidden:  # (N, T, W) of the new tokens, 0 before a shorter row's
            new = ids.shape[1] - self.answered
            parts = [np.concatenate(row.hidden or [])[-min(new, len(row.text)) :] for row in rows]
            h = np.stack([np.pad(part, ((new - len(part), 0), (0, 0))) for part in parts])
        self.answered = ids.shape[1]
        if copies > 1:
            logits = np.repeat(logits, copies, axis=0)
            self.reorder(np.repeat(np.arange(len(rows)), copies))
        return h, logits

    def reorder(self, rows: np.ndarray) -> None:
        """Makes row b continue from what was row rows[b].  rows: (N)"""
        before, gone = self.rows, dict(enumerate(self.rows))
        self.rows = [gone.pop(r) if r in gone else before[r].fork() for r in rows.tolist()]
        for row in gone.values():
            row.release()

    def release(self) -> None:
        """Releases all pages; what was read has to be read again."""
        for row in self.rows:
            row.release()


class Params(dict):
    """A backend's parameters, and an idle machine over them, if any, whose pages and programs the next call reuses."""

    def __init__(self, tree: dict) -> None:
        super().__init__(tree)
        self.idle: list[Any] = []

    def __reduce__(self) -> tuple:
        return Params, (dict(self),)  # a copy builds its own machines


def reader(params: dict, cfg: OPTConfig, make: Callable[[int], Any], first: int, most: tuple[int, int]) -> Reader:
    """A Reader for `most` rows and tokens, over the idle machine or a new one, which becomes idle again when the Reader is garbage-collected."""
    count, idle = pages_for(*most), getattr(params, "idle", [])
    try:
        found = idle.pop()
    except IndexError:  # pop first, check later: another thread may take it in between
        found = None
    if found is None or not found.serves(params, cfg):
        found = make(count)
    found.pool.make_room(count)
    made = Reader(found, first)

    def give_back() -> None:
        if found.rests():
            idle.append(found)
            del idle[1:]  # another thread may have returned one too

    weakref.finalize(made, give_back)
    return made


def logits_of(rows: list[Row]) -> np.ndarray:
    """The rows' logits, as a view without copying if all rows were read in the same pass.  ->  (N, V)"""
    found: Any = [row.logits for row in rows]
    logits, first = found[0]
    if all(some is logits and i == first + b for b, (some, i) in enumerate(found)):
        return logits[first : first + len(rows)]
    return np.stack([some[i] for some, i in found])


def ready(row: Row, coming: set[Key]) -> int:
    """How many tokens of a row to read now, after adopting known pages: none if another row reads the same next page in this pass."""
    if row.hidden is not None:
        return row.left
    row.adopt()
    key = row.next_key()
    if key in coming:
        return 0
    coming |= {key} if key else set()
    return row.left


class Handle:
    """A submitted request; iterating over it is engine.stream(handle)."""

    def __init__(self, engine: Engine, number: int, request: Request) -> None:
        self.engine, self.number, self.request = engine, number, request
        self.reader: Reader = request.reader  # type: ignore[assignment]
        self.decoding = generate.decode(request)
        self.steps: deque[Step] = deque()  # not yet taken by the caller
        self.new: list[np.ndarray] = []  # ids, (N, 1) of each step
        self.done = self.cancelled = False
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[Step]:
        return self.engine.stream(self)

    def go_on(self) -> None:
        """Continues decoding with the answer to the open reading, up to the next reading, which it opens, or to the end."""
        try:
            found = self.decoding.send(self.reader.answer() if self.reader.rows else None)  # type: ignore[arg-type]
            while not isinstance(found, Reading):
                self.take(found)
                found = next(self.decoding)
            self.reader.ask(found)
        except StopIteration:
            self.done = True
        except BaseException as error:  # raised to the caller that waits for this request; the others continue
            self.done, self.error = True, error
            if not isinstance(error, Exception):
                raise

    def take(self, found: Any) -> None:
        self.new.append(generate.ids_of(found))
        if isinstance(found, Step):
            with self.engine.turn:  # so that a step is never shrunk after the caller has taken it
                self.steps.append(found)
                if len(self.steps) > UNREAD:
                    self.steps[-1 - UNREAD].shrink()


class Engine:
    """Continuous batching over a fixed number of pages, 64 tokens each.

    pages        for keys and values; by default as many as max_batch rows of the full context need. On the CPU
                 memory is taken when a page is first used, on a GPU at once
    max_batch    rows that generate a token in a round; if there are more, they take turns
    dtype        of keys and values. On the CPU by default what attention multiplies: float32, or bfloat16 for bfloat16, int8 and int4 models where
                 the processor can. float16 or bfloat16 in place of float32 takes half the memory, and results then differ from model.generate's.
                 On a GPU only the model's own dtype
    chunk        tokens of prompts that are read in a round, at most: this bounds how long a prompt delays the others

    The model's parameters must not change. Raises ValueError.
    """

    def __init__(self, model: Any, pages: int | None = None, max_batch: int = 16, dtype: str | None = None, chunk: int = 256) -> None:
        if not hasattr(model.ops, "machine"):
            raise ValueError(f"the engine runs on backends 'cpu' and 'cuda', and this model's is {model.ops.__name__}; load it with one of them")
        for name, value, least in (("pages", pages, 1), ("max_batch", max_batch, 1), ("chunk", chunk, PAGE)):
            if value is not None and not whole(least)(value):
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        self.model, self.max_batch, self.chunk = model, max_batch, chunk
        pages = pages_for(max_batch, model.config.max_position_embeddings) if pages is None else pages
        self.machine = model.ops.machine(model.params, model.config, pages, dtype)
        self.pool = self.machine.pool
        self.running: dict[Handle, None] = {}  # admitted requests, in the order of their open readings
        self.waiting: list[Handle] = []  # in the order of submission
        self.number, self.turn, self.busy = 0, threading.Condition(), 0  # busy: the thread that does a round

    def submit(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Handle:
        """Queues a request with any options of model.generate, checked at once.  input_ids: (B, T)        Raises ValueError, TypeError."""
        m = self.model
        request = generate.prepare(m.params, input_ids, m.config, attention_mask, m.generation_config, ops=m.ops, **options)
        request.reader = Reader(self.machine, request.reader.first)  # type: ignore[assignment]
        if (most := most_pages(request, m.config)) > len(self.pool.counts):
            raise ValueError(
                f"this request may need {most} pages of {PAGE} tokens, and the engine has {len(self.pool.counts)}: "
                f"make it with pages={most}, or ask for fewer tokens, sequences or beams"
            )
        with self.turn:
            self.number += 1
            handle = Handle(self, self.number, request)
            handle.go_on()
            if handle.error:
                raise handle.error
            self.waiting.append(handle)
        return handle

    def stream(self, handle: Handle) -> Iterator[Step]:
        """The request's steps, as model.stream yields them, ending early if it is cancelled. Raises the request's own error; ValueError for beams."""
        self._own(handle)
        generate.no_beams(handle.request.settings)
        return self._stream(handle)

    def _stream(self, handle: Handle) -> Iterator[Step]:
        while True:
            self._until(lambda: bool(handle.steps or handle.done))
            with self.turn:
                step = handle.steps.popleft() if handle.steps else None
            if step is None:
                break
            yield step
        if handle.error:
            raise handle.error

    def result(self, handle: Handle) -> np.ndarray:
        """All tokens, as model.generate returns them.  ->  (B·num_return_sequences, T + new)        Raises the request's own error."""
        self._own(handle)
        self._until(lambda: handle.done)
        if handle.error:
            raise handle.error
        if handle.cancelled:
            raise ValueError(f"request {handle.number} was cancelled, after {len(handle.new)} tokens; its steps so far are in engine.stream")
        return generate.continued(handle.request, handle.new)

    def cancel(self, handle: Handle) -> None:
        """Stops a request and releases its pages, at the end of the present round; does nothing if it has already finished."""
        self._own(handle)
        with self.turn:
            if not handle.done:
                handle.done = handle.cancelled = True
            if not self.busy:
                self._sweep()
            self.turn.notify_all()

    def step(self) -> bool:
        """Runs one round, and returns whether there is more to do."""
        rounds = iter((False, True))
        self._until(lambda: next(rounds))
        return bool(self.running or self.waiting)

    def _own(self, handle: Handle) -> None:
        if handle.engine is not self:
            raise ValueError(f"request {handle.number} was submitted to another engine; ask that one")

    # ---- rounds --------------------------------------------------------------------------------------------------------------------------

    def _until(self, there: Callable[[], bool]) -> None:
        """Runs rounds in this thread, unless another thread is running them, until there() is true."""
        while True:
            with self.turn:
                if self.busy == threading.get_ident():
                    raise RuntimeError("within a round, as in what the engine calls itself, no request can be waited for; submit and cancel work")
                while not (ready := there()) and self.busy:
                    self.turn.wait()
                if ready:
                    return
                self.busy = threading.get_ident()
            try:
                self._round()
            finally:
                with self.turn:
                    self.busy = 0
                    self._sweep()
                    self.turn.notify_all()

    def _round(self) -> None:
        self._admit()
        if not self._answered() and (pieces := self._pieces()):  # rows that are ahead continue first, without a pass, until none is
            self.machine.read(pieces)
        for handle in self._answered():
            del self.running[handle]  # its next reading goes to the end of the queue
            self.running[handle] = None
            handle.go_on()

    def _answered(self) -> list[Handle]:
        """The running requests whose open reading can be answered: no row has tokens left."""
        return [handle for handle in self.running if not any(row.left for row in handle.reader.rows)]

    def _admit(self) -> None:
        """Admits waiting requests, first come first served, while their texts fit and leave a page for each running row."""
        while self.waiting:
            running = [row for handle in self.running for row in handle.reader.rows]
            if running and sum(row.lacks(row.left) for row in (*running, *self.waiting[0].reader.rows)) + len(running) > self.pool.available:
                return
            self.running[self.waiting.pop(0)] = None

    def _pieces(self) -> list[tuple[Row, int]]:
        """What this round reads, in the order of the open readings: up to max_batch single tokens and `chunk` tokens of prompts."""
        pieces, singles, prompts, coming = [], self.max_batch, self.chunk, set[Key]()
        for handle in list(self.running):
            for row in handle.reader.rows:
                if handle not in self.running or not (left := ready(row, coming)):
                    continue
                count = min(left, singles) if left == 1 else left if left <= prompts else prompts // PAGE * PAGE  # cut at whole pages
                if count and self._reserved(row, count, handle):
                    pieces.append((row, count))
                    singles, prompts = (singles - 1, prompts) if left == 1 else (singles, prompts - count)
        pieces = [(row, count) for row, count in pieces if row.pages]  # without those that were preempted meanwhile
        if self.waiting or len(pieces) < sum(len(handle.reader.rows) for handle in self.running):  # no row runs ahead while others wait for a turn
            for row, _ in pieces:
                row.likely = 0
        return pieces

    def _reserved(self, row: Row, count: int, handle: Handle) -> bool:
        """Reserves the row's pages, and returns whether it could. If pages run out, the newest request is preempted: it rereads its text later."""
        while self.pool.available < row.lacks(count):
            last = max(self.running, key=lambda other: other.number)
            del self.running[last]
            last.reader.release()
            bisect.insort(self.waiting, last, key=lambda other: other.number)
            if last is handle:
                return False
        row.reserve(count)
        return True

    def _sweep(self) -> None:
        """Releases and forgets the requests that are done."""
        for handle in [handle for handle in (*self.running, *self.waiting) if handle.done]:
            handle.reader.release()
            self.running.pop(handle, None)
            if handle in self.waiting:
                self.waiting.remove(handle)


def most_pages(request: Request, cfg: OPTConfig) -> int:
    """The most pages that a request may hold at once: a prompt's full pages, which its rows share, and each row's others."""
    s = request.settings
    copies = s.num_beams if s.beams else min(s.top_k, cfg.vocab_size) if s.contrastive else s.num_return_sequences
    total = 0
    for prompt in request.mask[:, request.reader.first :].sum(1).tolist():
        read = prompt + request.new - (0 if s.contrastive else 1)
        slides = read > cfg.max_position_embeddings
        common = 0 if slides or s.contrastive else prompt // PAGE
        total += common + copies * (math.ceil(min(read, cfg.max_position_embeddings) / PAGE) - common)
    return total
