"""All blocks, or the whole model, in a single call from Python: for a decoding step (one new token per row) or for many tokens of a prompt.

With one row, launching a block's products from Python takes longer than the products. So the kernels that ops_cpu would call one by one are recorded
once as a list (a Program), each with its table of counters and arguments (kernel.py), and one call runs the list on all threads. A thread that finds
no task left in a kernel waits until the tasks already claimed are done, then moves to the next kernel. The kernels and their order are unchanged, so
the results are bit-identical. Threads wait for tasks, not for each other, so any number of them may join. Between tokens only what changes is written
into the tables: where each row's keys are (attention_cpu.Rows), in a KVCache or in pages. For a prompt the gain is that buffers are reused and
additions run on all threads.

Between two tokens, Python costs as much time as one or two blocks. In greedy search the list therefore runs several times before Python takes over
again: it then begins with the token lookup and ends with the argmax, and whatever changes from token to token advances by a fixed stride.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numba import get_num_threads

from opt_fast import gemm_amx
from opt_fast.attention_cpu import Forward, Rows, attention_call, blocks, write_call
from opt_fast.gemm import Packed
from opt_fast.gemm_amx import PackedTiles, Rounded
from opt_fast.gemm_parts import PackedParts
from opt_fast.kernel import ARGUMENTS, DONE, LINE, MEMORY, Kernel, address, aligned, at, call, int64s, launch, lines, threads_of_numba, wait
from opt_fast.rowwise import ADD, CHUNK, PICK, norm_call
from opt_np.config import OPTConfig
from opt_np.kv_cache import KVCache

WIDTH = ARGUMENTS + 26  # slots of a table, at most
MANY = 128  # tokens of a pass, from which on each block is a call of its own: its work takes a thousand times as long as the call


def program_for(layers: list[dict], cfg: OPTConfig, N: int, way: Forward, cache: KVCache | None) -> Program | None:
    """The Program for N new tokens; None if the parameters are not those that `pack` makes. A cache, if given, keeps it for the next ones."""
    if cache is not None and cache.program is not None and cache.program.serves(layers, cfg, N, way):
        return cache.program
    if not fit(layers, cfg):
        return None
    made = Program(layers, cfg, N, np.dtype(np.float32), way)
    if cache is not None:
        cache.program = made
    return made


def fit(layers: Any, cfg: OPTConfig) -> bool:
    """Whether a Program can run these layers: packed, and all in memory, since its tables hold their addresses."""
    D, F = cfg.hidden_size, cfg.ffn_dim
    shapes = [(D, D)] * 4 + [(F, D), (D, F)]
    return type(layers) is list and all(fits(matrices(layer), shapes, layer_norms(layer), D) for layer in layers)


def fits_ends(params: dict, cfg: OPTConfig) -> bool:
    """`fit` for the parameters before and after the layers."""
    D, W, V = cfg.hidden_size, cfg.word_embed_proj_dim, cfg.vocab_size
    first, (last, norms) = beginning(params), end(params)
    return fits(first, [(V, W), (D, W)][: len(first)], [], D) and fits(last, [(W, D), (V, W)][-len(last) :], norms, D)


def fits(found: list[dict], shapes: list[tuple[int, int]], norms: list[dict], D: int) -> bool:
    """Whether these are packed matrices of these shapes, and contiguous float32 vectors."""
    known = all(p.keys() <= {"weight", "bias"} for p in (*found, *norms))
    whole = known and all(isinstance(p["weight"], Packed) and p["weight"].shape == shape for p, shape in zip(found, shapes, strict=True))
    vectors = [(p.get("bias"), O) for p, (O, _) in zip(found, shapes, strict=True)] + [(a, D) for p in norms for a in p.values()]
    return whole and all(a is None or (a.dtype == np.float32 and a.shape == (n,) and a.flags.c_contiguous) for a, n in vectors)


def in_tiles(layers: list[dict]) -> np.dtype | None:
    """The common dtype of all matrices, if all are PackedTiles (gemm_amx.py) without factors for x's columns; else None."""
    weights = [p["weight"] for layer in layers for p in matrices(layer)]
    found = {weight.stored for weight in weights if isinstance(weight, PackedTiles) and not weight.columns.size}
    return found.pop() if len(found) == 1 and all(isinstance(weight, PackedTiles) and not weight.columns.size for weight in weights) else None


def matrices(layer: dict) -> list[dict]:
    """A block's matrices, in the order in which a step uses them."""
    attn = layer["self_attn"]
    return [attn["q_proj"], attn["k_proj"], attn["v_proj"], attn["out_proj"], layer["fc1"], layer["fc2"]]


def layer_norms(layer: dict) -> list[dict]:
    """A block's two LayerNorms; {} for one without weight and bias."""
    return [layer.get(name, {}) for name in ("self_attn_layer_norm", "final_layer_norm")]


def beginning(params: dict) -> list[dict]:
    """The matrices before the first layer: the token embedding, then project_in if there is one."""
    return [params["embed_tokens"], *([params["project_in"]] if "project_in" in params else [])]


def end(params: dict) -> tuple[list[dict], list[dict]]:
    """The matrices after the last layer, the head last, and the final LayerNorm."""
    head = params.get("lm_head", params["embed_tokens"])
    return [*([params["project_out"]] if "project_out" in params else []), head], [params.get("final_layer_norm", {})]


def leaves(layers: list[dict]) -> list[Any]:
    """The arrays that a Program holds pointers to: if any has been replaced by another object, the Program is stale."""
    return [p.get(name) for layer in layers for p in (*matrices(layer), *layer_norms(layer)) for name in ("weight", "bias")]


Line = tuple[Kernel, list, int, bool]  # kernel, arguments, number of tasks, and whether the next kernel must wait for it


class Program:
    """The tables of all kernels of a pass over B tokens, and their buffers; `dtype` is the cache's, `way` the implementation of attention.

    With `params` it covers the whole model, and `steps` goes from one token of each row to the next. Otherwise `run` applies the blocks. The last
    block may be reduced to its keys and values (rest=False), or to everything else (keys=False).
    """

    def __init__(self, layers: list[dict], cfg: OPTConfig, B: int, dtype: np.dtype, way: Forward, params: dict | None = None,
                 keys: bool = True, rest: bool = True) -> None:  # fmt: skip
        D, F, H = cfg.hidden_size, cfg.ffn_dim, cfg.num_attention_heads
        self.cfg, self.dtype, self.way, self.parameters, self.threads = cfg, dtype, way, leaves(layers), get_num_threads()
        self.written, self.state = np.empty(0), np.zeros(2, np.int64)
        self.kept: list[np.ndarray] = []  # keeps alive what `calls` point to
        self.x, self.h, self.out = (np.empty((B, D), np.float32) for _ in range(3))  # the stream; a branch's input, and its output
        self.slots, self.rows, self.tasks = np.zeros(B, np.int64), np.zeros((B, 5), np.int64), np.zeros((B, 2), np.int64)
        self.parts = all(isinstance(p["weight"], PackedParts) for layer in layers for p in matrices(layer))
        apart = LINE // 4 * self.parts  # padding for PackedParts, which reads x by columns: rows 12 kB apart would share few cache sets
        self.inside = aligned(B * max(4 * D, F + apart), np.float32)  # q, k, v and O, and in their place, when they are no longer needed, ff
        q, self.k, self.v, self.O = self.inside[: 4 * B * D].reshape(4, B, D)
        self.q = q.reshape(B, H, cfg.head_dim)
        self.ff = self.inside[: B * (F + apart)].reshape(B, F + apart)[:, :F]
        self.lse = np.empty((B, H), np.float32)
        self.ones, self.zeros = np.ones(D, np.float32), np.zeros(max(D, F, cfg.vocab_size, cfg.word_embed_proj_dim), np.float32)
        around = [*beginning(params)[1:], *end(params)[0]] if params else []
        needed = [[p["weight"].needed(B) for p in found] for found in (*map(matrices, layers), around)]
        of_k_and_v = max(n for sizes in needed[:-1] for n in sizes[1:3])  # separate memory: threads run q, k and v at the same time
        scratch = [lines(n) for n in (max(way.needed(B, cfg.head_dim), *itertools.chain(*needed)), of_k_and_v, of_k_and_v)]
        self.memory = [aligned(self.threads * n, np.float32) for n in scratch]
        self.tiles = in_tiles(layers)
        self.rounded: dict[int, Rounded] = {}
        before = len(layers) - 1  # the blocks before the last are always whole
        per_layer = [self.block(layer, cfg, keys or i < before, rest or i < before) for i, layer in enumerate(layers)]
        begins, ends = (self.beginning(params, cfg), self.ending(params, cfg)) if params else ([], [])
        kernels = [*begins, *itertools.chain(*per_layer), *ends]
        self.lines = kernels  # keeps alive the arrays that the tables point to
        self.list = np.array([(kernel.address, tasks, after) for kernel, _, tasks, after in kernels], np.int64)
        self.tables = np.zeros((len(kernels), WIDTH), np.int64)
        place = 0
        for table, (_, arguments, _, after) in zip(self.tables, kernels, strict=True):
            filled = Kernel.table(arguments, self.memory[place], scratch[place])
            table[: len(filled)] = filled
            place = 0 if after else place + 1
        self.writes, self.attentions = (
            np.array([i for i, (_, arguments, *_) in enumerate(kernels) if any(a is wanted for a in arguments)], np.int64)
            for wanted in (self.slots, self.rows)
        )
        self.moves = np.array(self.moving() if params else np.empty((0, 2)), np.int64)
        self.calls = [self.call(0, len(kernels))]
        if params is None and B >= MANY:  # a call per block, between which Python may stop, or run other threads
            stops = [*itertools.accumulate(map(len, per_layer))]
            self.calls = list(itertools.starmap(self.call, itertools.pairwise([0, *stops])))

    def block(self, layer: dict, cfg: OPTConfig, keys: bool, rest: bool) -> list[Line]:
        """model.decoder_layer as kernels: its keys and values, the rest, or both. `prepare` later fills in the addresses of the cache's arrays.

        Between products in tiles, and from LayerNorm to them, rows are passed already rounded. Products in tiles also add to the stream themselves.
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
            if self.parts:
                return [linear(source, p, self.out, adds_to=x)]
            return [linear(source, p, self.out), (ADD, [x, self.out, x.size], math.ceil(x.size / CHUNK), True)]

        begins = [norm(norm1, h)] if pre else []
        if rest:
            begins.append(linear(source, q, self.q, after=not keys))
        if keys:
            begins += [linear(source, k, self.k, after=False), linear(source, v, self.v), (write, writes, tasks, True)]
        if not rest:
            return begins
        return [
            *begins,
            (attention, attends, B * H, True),
            *branch(self.O, out),
            *([] if pre else [norm(norm1, x)]),
            *([norm(norm2, h)] if pre else []),
            linear(source, fc1, ff, cfg.activation_function),
            *branch(ff, fc2),
            *([] if pre else [norm(norm2, x)]),
        ]

    def beginning(self, params: dict, cfg: OPTConfig) -> list[Line]:
        """model.embeddings; position vectors are looked up beforehand. `steps` fills in the addresses of tokens and position vectors."""
        (tokens, *projections), (B, D) = beginning(params), self.x.shape
        self.tokens, self.places = np.empty(B, np.int64), np.empty(0, np.float32)
        found = np.empty((B, cfg.word_embed_proj_dim), np.float32) if projections else self.x
        looking_up = *tokens["weight"].rows_call(self.tokens, found), True
        adding = ADD, [self.x, self.places, B * D], math.ceil(B * D / CHUNK), True
        return [looking_up, *(self.linear(found, p, self.x) for p in projections), adding]

    def ending(self, params: dict, cfg: OPTConfig) -> list[Line]:
        """model.final, model.lm_logits and the argmax. `steps` fills in the addresses to which logits and tokens are written."""
        (*projections, head), (norm,) = end(params)
        h, B, V = self.h if cfg.has_final_layer_norm else self.x, len(self.x), cfg.vocab_size
        lines = [self.norm(norm, h)] if cfg.has_final_layer_norm else []
        for p in projections:
            projected = np.empty((B, p["weight"].shape[0]), np.float32)
            lines.append(self.linear(h, p, projected))
            h = projected
        self.scores, self.best, self.ends = np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int64)
        return [*lines, self.linear(h, head, self.scores), (PICK, [self.scores, self.best, B, V, self.ends, 0, self.state], B, True)]

    def as_read(self, a: np.ndarray) -> Any:
        """The rounded copy of a buffer, if products in tiles read it already rounded; else the buffer itself."""
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

    def linear(self, x: Any, p: dict, y: Any, function: str | None = None, after: bool = True, **adds: Any) -> Line:
        weight, bias = p["weight"], p.get("bias", self.zeros)
        row = x.strides[0] // 4 if isinstance(x, np.ndarray) else weight.shape[1]
        return *weight.call(x, row, 1, bias, function, y, len(self.x), **adds), after

    def moving(self) -> list[tuple[int, int]]:
        """The integers that advance at every step, as (address, stride): pointers in the tables, slots, and each row's number of keys."""
        wanted = [id(a) for a in (self.tokens, self.places, self.scores, self.best, self.ends)]
        arguments = [(i, j, a) for i, (_, arguments, *_) in enumerate(self.lines) for j, a in enumerate(arguments)]
        self.written_at = [(i, ARGUMENTS + j) for i, j, a in arguments if id(a) in wanted]
        moving = [(address(self.tables[i, j:]), 0) for i, j in self.written_at[:-1]]
        return [*moving, *((address(self.slots[b:]), 0) for b in range(len(self.x))), *((address(self.rows[b, 2:]), 1) for b in range(len(self.x)))]

    def serves(self, layers: list[dict], cfg: OPTConfig, B: int, way: Forward) -> bool:
        """Whether the tables were written for these parameters, this number of rows, this way of attention, and the present number of threads."""
        found = leaves(layers)
        same = get_num_threads() == self.threads and len(self.x) == B and cfg == self.cfg and way is self.way and len(found) == len(self.parameters)
        return same and all(a is b for a, b in zip(found, self.parameters, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        rounded = [r.memory for r in self.rounded.values()]
        return sum(a.nbytes for a in (self.x, self.h, self.out, self.inside, *self.memory, *rounded))

    def run(self, x: np.ndarray, bases: np.ndarray, slots: np.ndarray, rows: Rows) -> np.ndarray:
        """All blocks.  x: (B, D);  bases: (L, 2), addresses of each layer's keys and values;  slots: (B), as for write_call  ->  (B, D)

        The B tokens may belong to any number of rows up to B. The result is the program's own buffer, which the next run overwrites.
        """
        self.prepare(bases, slots, rows)
        self.x[:] = x
        self.go(1)
        return self.x

    def steps(self, ids: np.ndarray, places: np.ndarray, bases: np.ndarray, slots: np.ndarray, rows: Rows,
              ends: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """N steps of greedy search: the logits and best tokens of each, which the next step reads; a best token in `ends` makes that step the last.

        ids: (B);  places: (N, B, D), vectors of the positions;  bases, slots: as for `run`  ->  (n, B, V), (n, B), n ≤ N
        """
        N, B, _ = places.shape
        logits, found, self.ends = np.empty((N, B, self.cfg.vocab_size), np.float32), np.empty((N + 1, B), np.int64), np.array(ends, np.int64)
        found[0] = ids
        self.prepare(bases, slots, rows)
        arrays: list[np.ndarray] = [found, places, logits, logits, found[1:], self.ends]
        for (i, j), array in zip(self.written_at, arrays, strict=True):
            self.tables[i, j] = address(array)
        self.tables[-1, self.written_at[-1][1] + 1] = len(ends)
        self.moves[:5, 1] = [array.strides[0] for array in arrays[:5]]
        self.moves[5 : 5 + B, 1] = rows.step
        self.go(N)
        n = self.state[1]
        return logits[:n], found[1 : n + 1]

    def prepare(self, bases: np.ndarray, slots: np.ndarray, rows: Rows) -> None:
        """Writes the addresses of keys and values into the tables, and attention's tasks."""
        arguments, writes, attentions = self.tables[:, ARGUMENTS:], self.writes, self.attentions
        if self.written is not bases:  # a KVCache's arrays may move at each step; pages stay where they are
            self.written = bases
            arguments[writes, 2:4], arguments[writes, 5] = bases[: len(writes)], rows.apart
            arguments[attentions, 1:3], arguments[attentions, 9:11] = bases[: len(attentions)], (rows.step, rows.apart)
        R, H = len(rows.table), self.cfg.num_attention_heads
        Br, tasks = self.way.rows, len(self.x)
        self.slots[:], self.rows[:R] = slots, rows.table
        if tasks == R:
            self.tasks[:, 0], self.tasks[:, 1] = np.argsort(-rows.table[:, 2]), 0  # the row with the most keys first
        else:
            Br, found = blocks(self.way, rows.table, H)
            tasks = len(found)
            self.tasks[:tasks] = found
        arguments[attentions, 7:9] = tasks, Br
        self.list[attentions, 1] = tasks * H

    def call(self, first: int, stop: int) -> list:
        """STEPS's arguments for some of the list, less those that `go` gives."""
        run, _, enter = threads_of_numba()
        one = np.array(Kernel.table([self.list[first:stop], stop - first, self.tables[first:]], self.memory[0], 0), np.int64)
        self.kept.append(one)
        program = np.array([PROGRAM.address, address(one)], np.int64)
        return [self.tables[first:], stop - first, self.moves, len(self.moves), run, enter, np.array([self.threads], np.int64), program]

    def go(self, steps: int) -> None:
        for arguments in self.calls:
            self.state[:] = 0
            STEPS(*arguments, steps, self.state, tasks=1)


def _steps(table: Any) -> None:
    """Runs the list up to `steps` times, advancing the moving integers after each, until a kernel sets state[0]; counts the runs in state[1]."""
    a = at(table, ARGUMENTS)
    tables, n, moves, changes, run, enter = int64s(a[0]), a[1], int64s(a[2]), a[3], a[4], a[5]
    threads, program, steps, state = a[6], a[7], a[8], int64s(a[9])  # the first two as `launch` wants them
    while state[1] < steps and not state[0]:
        for i in range(n):
            for place in range(MEMORY):  # reset the counters of tasks and threads
                tables[i * WIDTH + place] = 0
        if int64s(threads)[0] > 1:
            launch(run, enter, threads, program)
        else:
            call(int64s(program)[0], int64s(int64s(program)[1]))
        for i in range(changes):
            number = int64s(moves[2 * i])
            number[0] += moves[2 * i + 1]
        state[1] += 1


def _program(table: Any) -> None:
    """Every thread goes through the whole list."""
    a = at(table, ARGUMENTS)
    lines, n, tables = int64s(a[0]), a[1], int64s(a[2])
    waiting = 0  # the first kernel not yet known to be done
    for i in range(n):
        call(lines[3 * i], at(tables, i * WIDTH))
        if lines[3 * i + 2]:
            for j in range(waiting, i + 1):
                wait(at(tables, j * WIDTH), DONE, lines[3 * j + 1])
            waiting = i + 1


PROGRAM, STEPS = Kernel(_program), Kernel(_steps)
