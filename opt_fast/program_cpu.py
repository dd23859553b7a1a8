"""A pass through all blocks, or through the whole model, in a single call: a step of decoding, one new token for each row, or many of a prompt.

With one row, the products of a block take less time than what Python needs to start them. So the kernels that ops_cpu would start one after the
other are written down beforehand, each with its table, and one loop runs the list on all threads: a thread that finds no task left in a kernel waits
until those that were taken are done, then goes on to the next. They are the same kernels in the same order, so the numbers are the same bits.
A thread waits for tasks, not for threads: it does not matter how many come. The list is kept, and only what changes from token to token is written
into it: where the rows' keys stand (attention_cpu.Rows), in a KVCache or in pages. Reading a prompt, what is spared is memory that is new at every
kernel, and additions by one thread.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import get_num_threads

from opt_fast import gemm_amx
from opt_fast.attention_cpu import Forward, Rows, attention_call, blocks, rows_of, steps, write_call
from opt_fast.gemm import Packed
from opt_fast.gemm_amx import PackedTiles, Rounded
from opt_fast.kernel import ARGUMENTS, DONE, MEMORY, Kernel, address, aligned, at, call, int64s, lines, wait
from opt_fast.rowwise import ADD, CHUNK, norm_call
from opt_np.config import OPTConfig
from opt_np.kv_cache import KVCache

WIDTH = ARGUMENTS + 25  # of a table, at most


def step(layers: list[dict], x: np.ndarray, cfg: OPTConfig, visible: np.ndarray | None, cache: KVCache, way: Forward) -> np.ndarray | None:
    """All blocks for one token a row, whose keys and values are written into the cache; None where the parameters are not as `pack` left them.

    x: (B, 1, D);  visible: (B, S)  ->  (B, 1, D)
    """
    B, past = len(x), cache.length
    if cache.program is None or not cache.program.serves(layers, cfg, B, way):
        if not fit(layers, cfg):
            return None
        cache.program = Program(layers, cfg, B, np.dtype(np.float32), way)
    arrays = [cache.room(i, (B, 1, cfg.num_attention_heads, cfg.head_dim), x) for i in range(len(layers))]
    row, step = steps(arrays[0][0])
    rows = rows_of(np.arange(B), 1, np.arange(B) * row, np.full(B, past + 1), step, cfg.head_dim, visible)
    bases = np.array([[address(keys), address(values)] for keys, values in arrays])
    y, _ = cache.program.run(x[:, 0], bases, np.arange(B) * row + past * step, rows)
    cache.advance(1)
    return y[:, None]


def fit(layers: Any, cfg: OPTConfig) -> bool:
    """Whether the tables can hold the layers' addresses: not of layers that come and go."""
    D, F = cfg.hidden_size, cfg.ffn_dim
    shapes = [(D, D)] * 4 + [(F, D), (D, F)]
    return type(layers) is list and all(fits(matrices(layer), shapes, layer_norms(layer), D) for layer in layers)


def fits_end(params: dict, cfg: OPTConfig) -> bool:
    """The same of what comes after the layers."""
    D, W, V = cfg.hidden_size, cfg.word_embed_proj_dim, cfg.vocab_size
    found, norms = end(params)
    return fits(found, [(W, D), (V, W)][-len(found) :], norms, D)


def fits(found: list[dict], shapes: list[tuple[int, int]], norms: list[dict], D: int) -> bool:
    """Whether these are packed matrices of these shapes, and contiguous float32 vectors."""
    known = all(p.keys() <= {"weight", "bias"} for p in (*found, *norms))
    whole = known and all(isinstance(p["weight"], Packed) and p["weight"].shape == shape for p, shape in zip(found, shapes, strict=True))
    vectors = [(p.get("bias"), O) for p, (O, _) in zip(found, shapes, strict=True)] + [(a, D) for p in norms for a in p.values()]
    return whole and all(a is None or (a.dtype == np.float32 and a.shape == (n,) and a.flags.c_contiguous) for a, n in vectors)


def in_tiles(layers: list[dict]) -> np.dtype | None:
    """The one dtype of all matrices, if their products are in tiles and take x as it is."""
    weights = [p["weight"] for layer in layers for p in matrices(layer)]
    found = {weight.stored for weight in weights if isinstance(weight, PackedTiles) and not weight.columns.size}
    return found.pop() if len(found) == 1 and all(isinstance(weight, PackedTiles) and not weight.columns.size for weight in weights) else None


def matrices(layer: dict) -> list[dict]:
    """A block's matrices, in the order in which a step uses them."""
    attn = layer["self_attn"]
    return [attn["q_proj"], attn["k_proj"], attn["v_proj"], attn["out_proj"], layer["fc1"], layer["fc2"]]


def layer_norms(layer: dict) -> list[dict]:
    """{} where there is no scale and no shift."""
    return [layer.get(name, {}) for name in ("self_attn_layer_norm", "final_layer_norm")]


def end(params: dict) -> tuple[list[dict], list[dict]]:
    """The matrices and the LayerNorm after the last layer; the head is the last matrix."""
    head = params.get("lm_head", params["embed_tokens"])
    return [*([params["project_out"]] if "project_out" in params else []), head], [params.get("final_layer_norm", {})]


def leaves(layers: list[dict]) -> list[Any]:
    """What a program holds pointers to: if any of these is another object, the program is stale."""
    return [p.get(name) for layer in layers for p in (*matrices(layer), *layer_norms(layer)) for name in ("weight", "bias")]


Line = tuple[Kernel, list, int, bool]  # a kernel, its arguments, how many tasks they make, and whether what comes after needs its result


class Program:
    """The tables of all kernels of a pass over B tokens, and the buffers that they work on; the cache stores this dtype, attention goes this way.

    With `params`, that is the whole model, the pass goes on to the logits.
    """

    def __init__(self, layers: list[dict], cfg: OPTConfig, B: int, dtype: np.dtype, way: Forward, params: dict | None = None) -> None:
        D, F, H = cfg.hidden_size, cfg.ffn_dim, cfg.num_attention_heads
        self.cfg, self.dtype, self.way, self.parameters, self.threads = cfg, dtype, way, leaves(layers), get_num_threads()
        self.whole, self.written = params is not None, np.empty(0)
        self.x, self.h, self.O, self.out, self.k, self.v = (np.empty((B, D), np.float32) for _ in range(6))  # the stream; a branch's input, …, output
        self.q = np.empty((B, H, cfg.head_dim), np.float32)
        self.slots, self.rows, self.tasks = np.zeros(B, np.int64), np.zeros((B, 5), np.int64), np.zeros((B, 2), np.int64)
        self.ff, self.lse = np.empty((B, F), np.float32), np.empty((B, H), np.float32)
        self.ones, self.zeros = np.ones(D, np.float32), np.zeros(max(D, F, cfg.vocab_size), np.float32)
        products = [p["weight"].needed for found in (*map(matrices, layers), end(params)[0] if params else []) for p in found]
        scratch = lines(max(way.needed(B, cfg.head_dim), *products))
        self.memory = aligned((3, self.threads * scratch), np.float32)  # of their own for q, k and v, in which threads are at the same time
        self.tiles = in_tiles(layers)
        self.rounded: dict[int, Rounded] = {}
        blocks = [self.block(layer, cfg) for layer in layers]
        kernels = [line for block in blocks for line in block] + (self.ending(params, cfg) if params else [])
        K = len(blocks[0]) if blocks else 1
        self.lines = kernels  # with the arrays that the tables point to
        self.list = np.array([(kernel.address, tasks, after) for kernel, _, tasks, after in kernels], np.int64)
        self.tables = np.zeros((len(kernels), WIDTH), np.int64)
        self.blocks = self.tables[: len(layers) * K].reshape(len(layers), K, WIDTH)
        place = 0
        for table, (_, arguments, _, after) in zip(self.tables, kernels, strict=True):
            filled = Kernel.table(arguments, self.memory[place], scratch)
            table[: len(filled)] = filled
            place = 0 if after else place + 1
        self.writing = 4 if cfg.do_layer_norm_before else 3  # after q, k, v, and a pre-norm block's LayerNorm; then comes attention
        self.attends = self.list[self.writing + 1 : len(layers) * K : K, 1]  # its tasks

    def block(self, layer: dict, cfg: OPTConfig) -> list[Line]:
        """model.decoder_layer, kernel by kernel. Where the cache's arrays begin is written by `run`.

        Products in tiles take from each other, and from LayerNorm, rows that are rounded already, and add to the stream themselves.
        """
        (B, D), pre, x, H, Dh = self.x.shape, cfg.do_layer_norm_before, self.x, cfg.num_attention_heads, cfg.head_dim
        (q, k, v, out, fc1, fc2), (norm1, norm2) = matrices(layer), layer_norms(layer)
        h = self.as_read(self.h)
        ff = self.as_read(self.ff) if self.tiles and fc1["weight"].writes_rounded(B) else self.ff
        source = h if pre else x  # a post-norm block's branch reads the stream itself
        norm, linear, nowhere = self.norm, self.linear, np.empty(0, self.dtype)
        write, writes, tasks = write_call(self.k, self.v, nowhere, nowhere, self.slots, Dh, Dh)
        attention, attends = attention_call(self.way, self.q, nowhere, nowhere, self.O, self.lse, self.rows, self.tasks, D, Dh, 1, Dh**-0.5)

        def branch(source: Any, p: dict) -> list[Line]:
            if self.tiles:
                return [linear(source, p, x, adds=True)]
            return [linear(source, p, self.out), (ADD, [x, self.out, x.size], math.ceil(x.size / CHUNK), True)]

        return [
            *([norm(norm1, h)] if pre else []),
            linear(source, q, self.q, after=False),
            linear(source, k, self.k, after=False),
            linear(source, v, self.v),
            (write, writes, tasks, True),
            (attention, attends, B * H, True),
            *branch(self.O, out),
            *([] if pre else [norm(norm1, x)]),
            *([norm(norm2, h)] if pre else []),
            linear(source, fc1, ff, cfg.activation_function),
            *branch(ff, fc2),
            *([] if pre else [norm(norm2, x)]),
        ]

    def ending(self, params: dict, cfg: OPTConfig) -> list[Line]:
        """model.final and model.lm_logits. Where the logits go is written by `run`."""
        (*projections, head), (norm,) = end(params)
        h, self.shape = self.h if cfg.has_final_layer_norm else self.x, (len(self.x), cfg.vocab_size)
        lines = [self.norm(norm, h)] if cfg.has_final_layer_norm else []
        for p in projections:
            self.projected = np.empty((len(h), p["weight"].shape[0]), np.float32)
            lines.append(self.linear(h, p, self.projected))
            h = self.projected
        nowhere = np.empty((1, cfg.vocab_size), np.float32)
        lines.append(self.linear(h, head, nowhere))
        self.logits_at = next(i for i, argument in enumerate(lines[-1][1]) if argument is nowhere)
        return lines

    def as_read(self, a: np.ndarray) -> Any:
        """What stands for a buffer where products read it rounded; itself, where they round it."""
        if self.tiles is None:
            return a
        if id(a) not in self.rounded:
            self.rounded[id(a)] = Rounded(a.shape[0], a.shape[1], self.tiles)
        return self.rounded[id(a)]

    def norm(self, p: dict, y: Any) -> Line:
        weight, bias = p.get("weight", self.ones), p.get("bias", self.zeros)
        if isinstance(y, Rounded):
            return *gemm_amx.norm_call(self.x, weight, bias, y), True
        return *norm_call(self.x, weight, bias, y, *self.x.shape), True

    def linear(self, x: Any, p: dict, y: Any, function: str | None = None, after: bool = True, adds: bool = False) -> Line:
        weight, bias = p["weight"], p.get("bias", self.zeros)
        return *weight.call(x, weight.shape[1], 1, bias, function, y, len(self.x), **({"adds": True} if adds else {})), after

    def serves(self, layers: list[dict], cfg: OPTConfig, B: int, way: Forward) -> bool:
        """Whether these are still the parameters, the rows and the threads that the tables were written for."""
        found = leaves(layers)
        same = get_num_threads() == self.threads and len(self.x) == B and cfg == self.cfg and way is self.way and len(found) == len(self.parameters)
        return same and all(a is b for a, b in zip(found, self.parameters, strict=True))

    def run(self, x: np.ndarray, bases: np.ndarray, slots: np.ndarray, rows: Rows) -> tuple[np.ndarray, np.ndarray | None]:
        """x: (B, D);  bases: (L, 2), where each layer's keys and values begin;  slots: (B), as write_call has them  ->  (B, D), (B, V)

        Any number of rows, up to B, share the tokens.
        """
        arguments, logits = self.blocks[:, :, ARGUMENTS:], None
        if self.written is not bases:  # a KVCache's are new at each step, pages stay
            self.written = bases
            arguments[:, self.writing, 2:4] = arguments[:, self.writing + 1, 1:3] = bases
            arguments[:, self.writing, 5], arguments[:, self.writing + 1, 9:11] = rows.apart, (rows.step, rows.apart)
        if self.whole:
            logits = np.empty(self.shape, np.float32)
            self.tables[-1, ARGUMENTS + self.logits_at] = address(logits)
        R, H = len(rows.table), self.cfg.num_attention_heads
        Br, tasks = self.way.rows, len(self.x)
        self.slots[:], self.rows[:R] = slots, rows.table
        if tasks == R:
            self.tasks[:, 0], self.tasks[:, 1] = np.argsort(-rows.table[:, 2]), 0  # the row with most keys first
        else:
            Br, found = blocks(self.way, rows.table, H)
            tasks = len(found)
            self.tasks[:tasks] = found
        arguments[:, self.writing + 1, 7:9] = tasks, Br
        self.attends[:] = tasks * H
        self.tables[:, :MEMORY] = 0  # nothing is begun or done yet
        self.x[:] = x
        PROGRAM(self.list, len(self.list), self.tables, tasks=self.threads)
        return self.x.copy(), logits


def _program(table: Any) -> None:
    """Every thread goes through the whole list."""
    a = at(table, ARGUMENTS)
    lines, n, tables = int64s(a[0]), a[1], int64s(a[2])
    waiting = 0  # from here on, kernels are not known to be done
    for i in range(n):
        call(lines[3 * i], at(tables, i * WIDTH))
        if lines[3 * i + 2]:
            for j in range(waiting, i + 1):
                wait(at(tables, j * WIDTH), DONE, lines[3 * j + 1])
            waiting = i + 1


PROGRAM = Kernel(_program)
