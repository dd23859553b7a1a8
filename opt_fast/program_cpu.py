"""A step of decoding, one new token for each row, through all blocks in a single call.

With one row, the products of a block take less time than what Python needs to start them. So the kernels that ops_cpu would start one after the
other are written down beforehand, each with its table, and one loop runs the list on all threads: a thread that finds no task left in a kernel waits
until those that were taken are done, then goes on to the next. They are the same kernels in the same order, so the numbers are the same bits.
A thread waits for tasks, not for threads: it does not matter how many come. The list is kept with the cache, and only what changes from token to
token is written into it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import get_num_threads

from opt_fast.attention_cpu import FORWARD, attending, hidden_keys
from opt_fast.gemm import NEEDED, ROWS, Packed, matmul_call
from opt_fast.kernel import ARGUMENTS, DONE, MEMORY, Kernel, address, at, call, float_bits, int64s, wait
from opt_fast.rowwise import ADD, CHUNK, norm_call
from opt_np.config import OPTConfig
from opt_np.kv_cache import KVCache

WIDTH = ARGUMENTS + 20  # of a table, at most
KERNELS = 11  # of a block


def step(layers: list[dict], x: np.ndarray, cfg: OPTConfig, visible: np.ndarray | None, cache: KVCache) -> np.ndarray | None:
    """All blocks for one token a row, whose keys and values are written into the cache; None where the parameters are not as `pack` left them.

    x: (B, 1, D);  visible: (B, S)  ->  (B, 1, D)
    """
    if cache.program is None or not cache.program.serves(layers, cfg, x):
        if not all(fits(layer, cfg) for layer in layers):
            return None
        cache.program = Program(layers, cfg, len(x))
    y = cache.program.run(x, visible, cache)
    cache.advance(1)
    return y


def fits(layer: dict, cfg: OPTConfig) -> bool:
    """Whether the tables can hold these parameters' addresses: packed matrices, contiguous float32 vectors, all of the right length."""
    D, F = cfg.hidden_size, cfg.ffn_dim
    shapes = [(D, D)] * 4 + [(F, D), (D, F)]
    known = all(p.keys() <= {"weight", "bias"} for p in (*matrices(layer), *layer_norms(layer)))
    whole = known and all(isinstance(p["weight"], Packed) and p["weight"].shape == shape for p, shape in zip(matrices(layer), shapes, strict=True))
    vectors = [(p.get("bias"), O) for p, (O, _) in zip(matrices(layer), shapes, strict=True)] + [
        (a, D) for p in layer_norms(layer) for a in p.values()
    ]
    return whole and all(a is None or (a.dtype == np.float32 and a.shape == (n,) and a.flags.c_contiguous) for a, n in vectors)


def matrices(layer: dict) -> list[dict]:
    attn = layer["self_attn"]
    return [attn["q_proj"], attn["k_proj"], attn["v_proj"], attn["out_proj"], layer["fc1"], layer["fc2"]]


def layer_norms(layer: dict) -> list[dict]:
    """{} where there is no scale and no shift."""
    return [layer.get(name, {}) for name in ("self_attn_layer_norm", "final_layer_norm")]


def leaves(layers: list[dict]) -> list[Any]:
    return [p.get(name) for layer in layers for p in (*matrices(layer), *layer_norms(layer)) for name in ("weight", "bias")]


Line = tuple[Kernel, list, int, bool]  # a kernel, its arguments, how many tasks they make, and whether what comes after needs its result


class Program:
    """The tables of all kernels of a step, and the buffers that they work on."""

    def __init__(self, layers: list[dict], cfg: OPTConfig, B: int) -> None:
        D, F, H = cfg.hidden_size, cfg.ffn_dim, cfg.num_attention_heads
        self.cfg = cfg
        self.parameters, self.threads, self.heads = leaves(layers), get_num_threads(), (H, cfg.head_dim)
        self.x, self.h, self.q, self.O, self.out = (np.empty((B, D), np.float32) for _ in range(5))  # the stream; a branch's input, …, output
        self.ff, self.lse = np.empty((B, F), np.float32), np.empty((B, H), np.float32)
        self.ones, self.zeros = np.ones(D, np.float32), np.zeros(max(D, F), np.float32)
        scratch = max(NEEDED, attending(1, cfg.head_dim))
        self.memory = np.empty((3, self.threads * scratch), np.float32)  # of their own for q, k and v, in which threads are at the same time
        kernels = [line for layer in layers for line in self.block(layer, cfg)]
        self.list = np.array([(kernel.address, tasks, after) for kernel, _, tasks, after in kernels], np.int64)
        self.tables = np.zeros((len(layers), KERNELS, WIDTH), np.int64)
        place = 0
        for table, (_, arguments, _, after) in zip(self.tables.reshape(-1, WIDTH), kernels, strict=True):
            filled = Kernel.table(arguments, self.memory[place], scratch)
            table[: len(filled)] = filled
            place = 0 if after else place + 1
        self.first = 1 if cfg.do_layer_norm_before else 0  # a pre-norm block begins with a LayerNorm; then come q, k, v, attention

    def block(self, layer: dict, cfg: OPTConfig) -> list[Line]:
        """model.decoder_layer, kernel by kernel. What depends on the cache is 0 here, and written by `run`."""
        (B, D), pre, x, h, H, Dh = self.x.shape, cfg.do_layer_norm_before, self.x, self.h, cfg.num_attention_heads, cfg.head_dim
        (q, k, v, out, fc1, fc2), (norm1, norm2) = matrices(layer), layer_norms(layer)
        source = h if pre else x  # a post-norm block's branch reads the stream itself

        def norm(p: dict, y: np.ndarray) -> Line:
            return *norm_call(x, p.get("weight", self.ones), p.get("bias", self.zeros), y, B, D), True

        def linear(x: np.ndarray, p: dict, y: Any, function: str | None = None, after: bool = True) -> Line:
            return *matmul_call(x, x.shape[1], 1, p["weight"], p.get("bias", self.zeros), function, y, B), after

        attention = [self.q, 0, 0, 0, 0, 0, 0, self.O, self.lse, B, 1, 0, H, Dh, 0, D, 0, D, ROWS, float_bits(Dh**-0.5)]
        add = ADD, [x, self.out, x.size], math.ceil(x.size / CHUNK), True
        return [
            *([norm(norm1, h)] if pre else []),
            linear(source, q, self.q, after=False),
            linear(source, k, 0, after=False),
            linear(source, v, 0),
            (FORWARD, attention, B * H, True),
            linear(self.O, out, self.out),
            add,
            *([] if pre else [norm(norm1, x)]),
            *([norm(norm2, h)] if pre else []),
            linear(source, fc1, self.ff, cfg.activation_function),
            linear(self.ff, fc2, self.out),
            add,
            *([] if pre else [norm(norm2, x)]),
        ]

    def serves(self, layers: list[dict], cfg: OPTConfig, x: np.ndarray) -> bool:
        """Whether these are still the parameters, the rows and the threads that the tables were written for."""
        found = leaves(layers)
        same = get_num_threads() == self.threads and len(x) == len(self.x) and cfg == self.cfg and len(found) == len(self.parameters)
        return same and all(a is b for a, b in zip(found, self.parameters, strict=True))

    def run(self, x: np.ndarray, visible: np.ndarray | None, cache: KVCache) -> np.ndarray:
        """x: (B, 1, D);  visible: (B, S)  ->  (B, 1, D)"""
        B, _, D = x.shape
        arguments, past = self.tables[:, :, ARGUMENTS:], cache.length
        for i in range(len(arguments)):
            keys, values = cache.room(i, (B, 1, *self.heads), np.dtype(np.float32))
            row = keys.strides[0] // 4
            for a, place in ((keys, 1), (values, 2)):
                arguments[i, self.first + place, 7:9] = address(a) + 4 * past * D, row
            attention = arguments[i, self.first + 3]
            attention[[1, 2, 11, 14, 16]] = address(keys), address(values), past + 1, row, row
        masks = *hidden_keys(keys, visible), np.full(B, past + 1)
        arguments[:, self.first + 3, 3:7] = [address(a) if isinstance(a, np.ndarray) else a for a in masks]
        self.tables[:, :, :MEMORY] = 0  # nothing is begun or done yet
        self.x[:] = x[:, 0]
        PROGRAM(self.list, len(self.list), self.tables, tasks=self.threads)
        return self.x[:, None].copy()


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
