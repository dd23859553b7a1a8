"""One new token for each row, through all blocks in one kernel: between its products, calls from Python cost more than what they start.

The numbers are those of model.decoder over ops_cpu, bit for bit, for the same functions compute them. A block is cut into phases (q, k and v;
attention; out_proj; fc1; fc2), each a number of tasks; a thread that finds no task left waits until those that were taken are done. It waits for
tasks and not for threads, so it does not matter how many threads come. What is little work (the residual stream, LayerNorm) each thread does for
itself, and nothing is overwritten within a token: a thread that comes late still reads what it should.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import get_num_threads, njit, types

from opt_fast.attention_cpu import attend, attending, hidden_keys
from opt_fast.gemm import COLUMNS, NEEDED, PARTS, Packed, multiply
from opt_fast.kernel import ARGUMENTS, Kernel, address, at, bytes_, claim, float_bits, float_of, floats, int16s, int64s, intrinsic, memory, uint16s
from opt_fast.rowwise import FUNCTIONS, norm_row
from opt_np.config import OPTConfig
from opt_np.kv_cache import KVCache

MOST_ROWS = 16  # beyond, what each thread does for itself is no longer little
PHASES = 5
MATRICES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LAYER_NORMS = ("self_attn_layer_norm", "final_layer_norm")
KEYS, VALUES, ROW, PLACES = 16, 17, 18, 19  # a layer's places in the table of layers: matrices with biases, LayerNorms, then its part of the cache


def decode(layers: list[dict], x: np.ndarray, cfg: OPTConfig, visible: np.ndarray | None, cache: KVCache) -> np.ndarray | None:
    """All blocks for one token a row; its keys and values are written into the cache. None where a matrix is not packed, or in another dtype.

    x: (B, 1, D);  visible: (B, S)  ->  (B, 1, D)
    """
    B, _, D = x.shape
    F, H, L, S, threads = cfg.ffn_dim, cfg.num_attention_heads, len(layers), cache.length + 1, get_num_threads()
    ones, zeros = np.ones(D, np.float32), np.zeros(max(D, F), np.float32)
    table, stored = np.empty((L, PLACES), np.int64), None
    for i, layer in enumerate(layers):
        matrices = [(layer["self_attn"] if name.endswith("proj") else layer)[name] for name in MATRICES]
        for j, p in enumerate(matrices):
            weight = p["weight"]
            if not isinstance(weight, Packed) or weight.panels.dtype != (stored := stored or weight.panels.dtype):
                return None
            table[i, 2 * j : 2 * j + 2] = weight.address, address(p.get("bias", zeros))
        for j, name in enumerate(LAYER_NORMS):
            p = layer.get(name, {})
            table[i, 12 + 2 * j : 14 + 2 * j] = address(p.get("weight", ones)), address(p.get("bias", zeros))
    for i in range(L):
        keys, values = cache.room(i, (B, 1, H, cfg.head_dim), np.dtype(np.float32))
        table[i, KEYS:] = address(keys), address(values), keys.strides[0] // 4
    y, shared, done = np.empty_like(x), np.empty(L * B * (4 * D + F + H), np.float32), np.zeros(2 * (L * PHASES + 1), np.int64)
    kernel, pre, function = DECODE[np.dtype(stored).str], int(cfg.do_layer_norm_before), FUNCTIONS[cfg.activation_function]
    kernel(table, L, B, D, F, H, S, float_bits(cfg.head_dim**-0.5), pre, function, *hidden_keys(keys, visible), np.ascontiguousarray(x), y, shared,
           done, threads * PARTS, tasks=threads, scratch=2 * B * D + max(NEEDED, attending(1, cfg.head_dim)))  # fmt: skip
    return y


@njit
def _decode(table: Any, kind: Any) -> None:
    a = at(table, ARGUMENTS)
    layers, L, B, D, F, H, S, scale, pre, function = int64s(a[0]), a[1], a[2], a[3], a[4], a[5], a[6], float_of(a[7]), a[8], a[9]
    visible, hides, start, end, x_in, x_out, shared = bytes_(a[10]), a[11], int64s(a[12]), int64s(a[13]), floats(a[14]), floats(a[15]), floats(a[16])
    done, most = int64s(a[17]), a[18]
    x, Dh = memory(table), D // H  # the residual stream, as this thread has it
    h = at(x, B * D)
    xs = at(h, B * D)
    for j in range(B * D):
        x[j] = x_in[j]
    for i in range(L):
        p = at(layers, i * PLACES)
        keys, values, row = floats(p[KEYS]), floats(p[VALUES]), p[ROW]
        q = at(shared, i * B * (4 * D + F + H))
        O = at(q, B * D)
        attn_out = at(O, B * D)
        ff = at(attn_out, B * D)
        mlp_out = at(ff, B * F)
        lse = at(mlp_out, B * D)
        phase = at(done, 2 * PHASES * i)
        if pre:
            norm(x, p[12], p[13], h, B, D)
        else:
            same(x, h, B * D)
        parts = min(most, (D + COLUMNS - 1) // COLUMNS)
        task = claim(phase, 0)
        while task < 3 * parts:
            which, part = task // parts, task % parts
            y, y_row = (q, D) if which == 0 else (at(keys if which == 1 else values, (S - 1) * D), row)
            some_columns(h, p[2 * which], p[2 * which + 1], D, D, part, parts, 0, y, y_row, B, xs, kind)
            claim(phase, 1)
            task = claim(phase, 0)
        wait(phase, 1, 3 * parts)

        task = claim(phase, 2)
        while task < B * H:
            b, head = task % B, task // B
            query, key = b * D + head * Dh, b * row + head * Dh
            attend(at(q, query), at(keys, key), D, at(values, key), D, at(visible, b * S), hides, start[b], end[b], at(O, query),
                   at(lse, b * H + head), S - 1, 0, 1, H, Dh, scale, xs)  # fmt: skip
            claim(phase, 3)
            task = claim(phase, 2)
        wait(phase, 3, B * H)

        task = claim(phase, 4)
        while task < parts:
            some_columns(O, p[6], p[7], D, D, task, parts, 0, attn_out, D, B, xs, kind)
            claim(phase, 5)
            task = claim(phase, 4)
        wait(phase, 5, parts)

        add(x, attn_out, B * D)
        if pre:
            norm(x, p[14], p[15], h, B, D)
        else:
            norm(x, p[12], p[13], x, B, D)
            same(x, h, B * D)
        wide = min(most, (F + COLUMNS - 1) // COLUMNS)
        task = claim(phase, 6)
        while task < wide:
            some_columns(h, p[8], p[9], D, F, task, wide, function, ff, F, B, xs, kind)
            claim(phase, 7)
            task = claim(phase, 6)
        wait(phase, 7, wide)

        task = claim(phase, 8)
        while task < parts:
            some_columns(ff, p[10], p[11], F, D, task, parts, 0, mlp_out, D, B, xs, kind)
            claim(phase, 9)
            task = claim(phase, 8)
        wait(phase, 9, parts)

        add(x, mlp_out, B * D)
        if not pre:
            norm(x, p[14], p[15], x, B, D)
    if claim(done, 2 * PHASES * L) == 0:
        same(x, x_out, B * D)


def _decode_float32(table: Any) -> None:
    _decode(table, floats(0))


def _decode_float16(table: Any) -> None:
    _decode(table, int16s(0))


def _decode_bfloat16(table: Any) -> None:
    _decode(table, uint16s(0))


@njit
def some_columns(
    x: Any, weight: int, bias: int, K: int, O: int, part: int, parts: int, function: int, y: Any, y_row: int, B: int, xs: Any, kind: Any
) -> None:
    """A part of the columns of one product."""
    P = (O + COLUMNS - 1) // COLUMNS
    multiply(x, K, 1, like(weight, kind), K, O, P * part // parts, P * (part + 1) // parts, floats(bias), function, y, y_row, 0, B, xs)


@njit
def norm(x: Any, weight: int, bias: int, y: Any, B: int, D: int) -> None:
    for b in range(B):
        norm_row(at(x, b * D), floats(weight), floats(bias), at(y, b * D), D)


@njit
def add(x: Any, y: Any, n: int) -> None:
    for j in range(n):
        x[j] += y[j]


@njit
def same(x: Any, y: Any, n: int) -> None:
    for j in range(n):
        y[j] = x[j]


@intrinsic
def like(typing_context, number, pointer):
    """The address as a pointer to what another points to."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], arguments[1].type)

    return pointer(types.int64, pointer), generate


@intrinsic
def wait(typing_context, counters, place, n):
    """Until counters[place] is n."""

    def generate(context, builder, signature, arguments):
        counter = builder.gep(arguments[0], [arguments[1]])
        again, done = builder.append_basic_block("again"), builder.append_basic_block("done")
        builder.branch(again)
        builder.position_at_end(again)
        builder.cbranch(builder.icmp_signed("<", builder.load_atomic(counter, "acquire", 8), arguments[2]), again, done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(counters, types.int64, types.int64), generate


DECODE = {"<f4": Kernel(_decode_float32), "<i2": Kernel(_decode_float16), "<u2": Kernel(_decode_bfloat16)}
