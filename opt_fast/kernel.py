"""Compiling kernels with Numba and running them on all threads, and the vector instructions that kernels are built from.

A Numba parallel loop takes seconds to compile, and compiles everything that it calls once more. So there are none here: a kernel is a plain function,
compiled on its own at first use, cached in __pycache__, and handed to Numba's thread pool by its address. Its only parameter is its table, an int64
array: counters that give out the tasks, then its arguments, arrays among them as addresses. Each thread claims tasks until none is left, so a slow
thread delays no other.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import config as numba_config
from numba.core import event
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target
from numba.core.typing import Signature
from numba.extending import intrinsic as numba_intrinsic

from opt_np.malloc import give_back

LANES = 16  # partial sums of a reduction: the same number on every processor
LINE = 64  # bytes of a cache line
PIECE, LARGEST = 1 << 26, 1 << 28  # bytes: of a block of memory that many weights share; and, at most, retained for weights packed for a single use
SPINS = 200  # looks at a counter before a waiting thread yields, some 10 µs
GOMP_SPINS = "20000"  # the same for libgomp, whose waiting threads then sleep: some 1 ms, enough for what Python does between two tokens
TASKS, DONE, THREADS, MEMORY, BYTES, ARGUMENTS = range(6)  # the table's slots: tasks begun, tasks done, threads, scratch memory, bytes of it each …
KERNEL = types.void(types.CPointer(types.int64))
intrinsic: Any = numba_intrinsic
config: Any = numba_config
_local, _lock = threading.local(), threading.Lock()
_libraries: list = []  # own the machine code, and keep it alive
_elsewhere: dict[Callable, subprocess.Popen] = {}  # kernels that another process is compiling
COMPILED = (
    "kernel.py", "gemm.py", "gemm_int.py", "gemm_amx.py", "gemm_amx_int4.py", "gemm_parts.py", "rowwise.py", "attention_cpu.py", "attention_bf16.py",
    "attention_parts.py", "train_cpu.py", "program_cpu.py", "paged_cache.py",
)  # fmt: skip
inner: Any = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)  # type: ignore[call-overload] # called only by kernels: no entry point for Python


def load_openmp() -> None:
    """Loads libgomp, if Numba's threads are libgomp's, with GOMP_SPINS, which only the environment can tell it. By default its threads spin for
    16 ms, which takes their processors from others, perhaps from the very thread that they wait for."""
    if sys.platform == "linux" and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = GOMP_SPINS
        try:
            with suppress(ImportError):
                import_module("numba.np.ufunc.omppool")
        finally:
            del os.environ["GOMP_SPINCOUNT"]


load_openmp()


class Kernel:
    """A compiled function of a table; kernel(*arguments, tasks=…, scratch=…) runs it on one thread per task at most, each with `scratch` float32.

    Inside, claim(table, TASKS) is the next task, memory(table) the thread's scratch memory, and table[ARGUMENTS + i] the i-th argument. A kernel that
    may be part of a Program (program_cpu.py) also counts finished tasks, with claim(table, DONE), and writes to its memory only once it has a task: a
    thread that arrives after the last task may find another thread using the same memory in the next kernel.
    """

    def __init__(self, function: Callable[[Any], None]) -> None:
        self._function = function

    @cached_property
    def address(self) -> int:
        return compiled(self._function, KERNEL)

    @cached_property
    def alone(self) -> Any:
        return ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(self.address)

    def ahead(self, name: str) -> None:
        """Has another process compile it, if not cached, while this one compiles others. name: its place in opt_fast, like "rowwise.ADD"."""
        if "address" in self.__dict__ or self._function in _elsewhere or numba.get_num_threads() == 1 or not runs_python():
            return
        with _lock, kept_compiled():
            found = kept(self._function, KERNEL)
            if found is None:
                with suppress(OSError):  # no process can be started
                    _elsewhere[self._function] = in_another_process(name)
            else:
                _libraries.append(found[0])
                self.address = found[1]

    def __call__(self, *arguments: Any, tasks: int, scratch: int = 0) -> None:
        threads, scratch = min(numba.get_num_threads(), tasks), lines(scratch)
        table = np.array(self.table(arguments, workspace(threads * scratch), scratch), np.int64)
        if threads > 1:
            on_threads(self.address, address(table), threads)
        else:
            self.alone(address(table))

    @staticmethod
    def table(arguments: Iterable[Any], memory: np.ndarray, scratch: int) -> list[int]:
        return [0, 0, 0, address(memory), 4 * scratch, *(address(a) if isinstance(a, np.ndarray) else a for a in arguments)]


def variant(function: Callable[[Any], None], name: str, **meanings: Any) -> Kernel:
    """A kernel from the same source, with some of the module's global names bound to other values."""
    made = FunctionType(function.__code__, function.__globals__ | meanings)
    made.__name__ = made.__qualname__ = f"{function.__name__}_{name}"  # Numba's cache finds it by this name
    return Kernel(made)


def compiled(function: Any, types_: Signature) -> int:
    """The address of a function's machine code, which stays loaded: from Numba's cache, or compiled now."""
    with _lock, kept_compiled(), event.install_listener("numba:run_pass", _Announcer()):
        found = kept(function, types_)
        if found is None and function in _elsewhere:
            _elsewhere.pop(function).wait()
            found = kept(function, types_)
        if found is None:
            made: Any
            try:
                made = numba.cfunc(types_, cache=True)(function)
            except OSError as error:  # a full disk, for one
                not_kept(str(error))
                made = numba.cfunc(types_)(function)
            found = made._library, made.address
        _libraries.append(found[0])
        return found[1]


def in_another_process(name: str) -> subprocess.Popen:
    """Starts compiling a kernel of opt_fast into the cache that this process reads. If that fails, this process compiles it itself."""
    announce()
    code = f"import sys; sys.path[:] = {sys.path!r}; from opt_fast import {name.split('.')[0]}; {name}.address"
    environment = os.environ | {"NUMBA_CACHE_DIR": os.path.dirname(config.CACHE_DIR)}
    silent: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, **silent)
    atexit.register(process.wait)
    atexit.register(process.kill)  # runs before `wait` (last in, first out), and does nothing to a process that has ended
    return process


def runs_python() -> bool:
    """Whether sys.executable is Python, and not a program that embeds it."""
    return not getattr(sys, "frozen", False) and os.path.basename(sys.executable or "").startswith("python")


def kept(function: Any, types_: Signature) -> tuple[Any, int] | None:
    """The compiled function from Numba's cache: (library, address). It does what Numba's own loading does, without setting up the compiler, which
    takes a quarter of a second and 40 MB. None if it is not cached, or if this release of Numba lacks the internals used here."""
    try:
        from numba.core.runtime import _nrt_python  # type: ignore[attr-defined]

        for name, place in _nrt_python.c_helpers.items():  # runtime functions that machine code may call; as in numba.core.runtime.nrt
            binding.add_symbol(name if name.startswith("_") else f"NRT_{name}", place)
        found = FunctionCache(function)._load_overload(types_, cpu_target.target_context)
        return found and (found.library, found.library.get_pointer_to_function(found.fndesc.llvm_cfunc_wrapper_name))
    except (ImportError, AttributeError, TypeError):
        return None
    except Exception:  # a damaged file: whatever pickle makes of it
        with suppress(OSError):
            FunctionCache(function).flush()
        return None


@contextmanager
def kept_compiled() -> Iterator[None]:
    """Inside, Numba's cache is a folder named after a checksum of all kernel sources: Numba itself notices only changes to a function's own file, not
    to the files of the functions that it calls."""
    sources = b"".join((Path(__file__).parent / name).read_bytes() for name in COMPILED)
    wanted, before = Path(config.CACHE_DIR or Path(__file__).parent / "__pycache__"), config.CACHE_DIR
    name, places = f"kernels-{zlib.crc32(sources):08x}", (wanted, Path(os.path.expanduser("~/.cache/opt_fast")))
    place = next((place for place in places if can_be_written(place / name)), None) or for_this_process()
    config.CACHE_DIR = str(place / name)
    try:
        yield
    finally:
        config.CACHE_DIR = before


def can_be_written(folder: Path) -> bool:
    """Whether the folder can be written to; creates it if possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@functools.cache
def for_this_process() -> Path:
    """A temporary folder, deleted when Python exits."""
    not_kept("set NUMBA_CACHE_DIR to a folder that can be written")
    folder = tempfile.mkdtemp(prefix="opt_fast-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def address(a: np.ndarray) -> int:
    """The address of an array's first element."""
    return a.__array_interface__["data"][0]


def lines(size: int) -> int:
    """`size` float32, rounded up to whole cache lines."""
    return -(-size * 4 // LINE) * LINE // 4


def aligned(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """np.empty, aligned to a cache line: an unaligned vector of a line's length would span two lines."""
    size = math.prod(shape if isinstance(shape, tuple) else (shape,)) * np.dtype(dtype).itemsize
    return begun_at_a_line(np.empty(size + LINE, np.uint8), size)[0].view(dtype).reshape(shape)


def begun_at_a_line(memory: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The memory's first `size` bytes from a cache line's start, and the rest behind them."""
    start = -address(memory) % LINE
    return memory[start : start + size], memory[start + size :]


@contextmanager
def side_by_side() -> Iterator[None]:
    """Inside, for_weights allocates from shared blocks, large enough for the system to back with huge pages: fewer TLB misses."""
    _local.piece = np.empty(0, np.uint8)
    try:
        yield
    finally:
        del _local.piece


@contextmanager
def for_one_use() -> Iterator[None]:
    """Inside, for_weights reuses the memory of the previous weight, no longer needed: fresh memory's page faults cost as much as packing."""
    _local.once = getattr(_local, "kept", np.empty(0, np.uint8))
    try:
        yield
    finally:
        _local.kept = _local.once if _local.once.size <= LARGEST else np.empty(0, np.uint8)
        del _local.once


def for_weights(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """As `aligned`, from the memory that `side_by_side` or `for_one_use` provides, if one of them is active."""
    size = math.prod(shape if isinstance(shape, tuple) else (shape,)) * np.dtype(dtype).itemsize
    if hasattr(_local, "once"):
        if _local.once.size < size + LINE:
            _local.once = np.empty(size + LINE, np.uint8)
        return begun_at_a_line(_local.once, size)[0].view(dtype).reshape(shape)
    if not hasattr(_local, "piece"):
        return aligned(shape, dtype)
    if _local.piece.size < size + LINE:
        give_back()  # so that the new block is fresh from the system: whatever it never uses then takes no physical memory
        _local.piece = np.empty(max(PIECE, size + LINE), np.uint8)
    found, _local.piece = begun_at_a_line(_local.piece, size)
    return found.view(dtype).reshape(shape)


def workspace(size: int) -> np.ndarray:
    """Scratch memory of at least `size` float32, retained between calls: fresh memory costs a page fault for every 4096 bytes."""
    if not hasattr(_local, "memory") or _local.memory.size < size:
        _local.memory = aligned(size, np.float32)
    return _local.memory


@functools.cache
def announce() -> None:
    """Prints, once, why the first call takes seconds."""
    say("compiling kernels for this processor; it takes some seconds, once for each kind of weights")


@functools.cache
def not_kept(why: str) -> None:
    say(f"compiled kernels cannot be kept for the next run; {why}")


def say(text: str) -> None:
    """To stderr, where there is one that can be written."""
    if sys.stderr:
        with suppress(OSError, ValueError):
            print(f"opt_fast: {text}", file=sys.stderr)


# Threads do not survive a fork, and OpenMP's library ends a child that uses them: the child computes alone.
os.register_at_fork(after_in_child=lambda: numba.set_num_threads(1))


class _Announcer(event.Listener):
    def on_start(self, event: Any) -> None:
        announce()

    def on_end(self, event: Any) -> None: ...


# ---- instructions that Numba does not have -----------------------------------------------------------------------------------------------


def _pointer_to(kind: Any) -> Any:
    @intrinsic
    def cast(typing_context, number):
        """An integer address as a typed pointer."""

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return cast


floats, int16s, uint16s, int32s, int64s, bytes_, int8s = (
    _pointer_to(kind) for kind in (types.float32, types.int16, types.uint16, types.int32, types.int64, types.uint8, types.int8)
)


def float_bits(number: float) -> int:
    """A float32's bits as an integer, for the table."""
    return int(np.float32(number).view(np.int32))


@intrinsic
def float_of(typing_context, number):
    """The float32 that float_bits encoded."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.trunc(arguments[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), generate


@intrinsic
def at(typing_context, pointer, offset):
    """pointer + offset"""

    def generate(context, builder, signature, arguments):
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), generate


@intrinsic
def claim(typing_context, table, place):
    """Atomically adds 1 to table[place], and returns its previous value."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", builder.gep(arguments[0], [arguments[1]]), ir.IntType(64)(1), "acq_rel")

    return types.int64(table, types.int64), generate


@intrinsic
def call(typing_context, function, table):
    """Calls the kernel at an address."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [arguments[1].type])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.int64, table), generate


@intrinsic
def launch(typing_context, run, enter, size, what):
    """on_threads from machine code: runs a kernel on size[0] of Numba's threads; `what` points to the addresses of the kernel and of its table."""

    def generate(context, builder, signature, arguments):
        byte, index, single = ir.IntType(8).as_pointer(), ir.IntType(64), ir.IntType(32)
        run, enter, size, what = arguments
        kind = ir.FunctionType(ir.VoidType(), [byte] * 5 + [index, index, single])
        sizes, threads = builder.inttoptr(size, byte), builder.trunc(builder.load(builder.inttoptr(size, index.as_pointer())), single)
        builder.call(builder.inttoptr(run, kind.as_pointer()),
                     [builder.inttoptr(enter, byte), sizes, sizes, sizes, builder.inttoptr(what, byte), index(0), index(0), threads])  # fmt: skip
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def wait(typing_context, counters, place, n):
    """Waits until counters[place] is at least n. After SPINS looks, before each further one, other threads may have the processor: perhaps the one
    that is waited for has none."""

    def generate(context, builder, signature, arguments):
        counter, index, before = builder.gep(arguments[0], [arguments[1]]), ir.IntType(64), builder.block
        again, sooner, later, done = (builder.append_basic_block(name) for name in ("again", "sooner", "later", "done"))
        builder.branch(again)
        builder.position_at_end(again)
        looks = builder.phi(index)
        builder.cbranch(builder.icmp_signed("<", builder.load_atomic(counter, "acquire", 8), arguments[2]), sooner, done)
        builder.position_at_end(sooner)
        if cpu_target.target_context.codegen().magic_tuple()[0].startswith("x86_64"):
            instruction(builder, "llvm.x86.sse2.pause", ir.VoidType())
        after = builder.add(looks, index(1))
        builder.cbranch(builder.icmp_signed("<", after, index(SPINS)), again, later)
        builder.position_at_end(later)
        if hasattr(os, "sched_yield"):
            instruction(builder, "sched_yield", ir.IntType(32))
        builder.branch(again)
        for value, block in ((index(0), before), (after, sooner), (after, later)):
            looks.add_incoming(value, block)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(counters, types.int64, types.int64), generate


def on_threads(function: int, table: int, threads: int) -> None:
    """Calls the kernel on this many of Numba's threads."""
    _, run, enter = threads_of_numba()
    size, what = np.array([threads], np.int64), np.array([function, table], np.int64)
    run(enter, address(size), address(size), address(size), address(what), 0, 0, threads)


@functools.cache
def threads_of_numba() -> tuple[int, Any, int]:
    """Numba's entry point for parallel loops: its address, the same callable from Python, and the address of _enter, the loop body to pass it. Its
    arguments: the body; arrays (none here); the iteration count and strides; the body's own data; and, last, the number of threads."""
    numba.get_num_threads()  # starts the threads
    place, count, run = ctypes.c_void_p, ctypes.c_size_t, binding.address_of_symbol("numba_parallel_for")
    function = ctypes.PYFUNCTYPE(None, place, place, place, place, place, count, count, ctypes.c_int)(run)
    return run, function, compiled(_enter, types.void(*[types.CPointer(types.int64)] * 4))


def _enter(arrays: Any, times: Any, steps: Any, what: Any) -> None:
    """A thread's share of a parallel loop: the kernel, times[0] times."""
    for _ in range(times[0]):
        call(what[0], int64s(what[1]))


@njit(inline="always")
def memory(table: Any) -> Any:
    """The calling thread's own scratch memory; call it once per thread and kernel, since each call claims the next share."""
    return floats(table[MEMORY] + claim(table, THREADS) * table[BYTES])


# ---- LLVM vectors: building blocks of intrinsics -----------------------------------------------------------------------------------------


def load(builder: Any, address: Any, vector: Any) -> Any:
    """LLVM: a vector from an address that need not be aligned."""
    value = builder.load(builder.bitcast(address, vector.as_pointer()))
    value.align = 1
    return value


def store(builder: Any, value: Any, address: Any) -> None:
    """LLVM: a vector to an address that need not be aligned."""
    builder.store(value, builder.bitcast(address, value.type.as_pointer())).align = 1


def instruction(builder: Any, name: str, returned: Any, *arguments: Any) -> Any:
    """LLVM: calls its intrinsic of this name."""
    kind = ir.FunctionType(returned, [argument.type for argument in arguments])
    return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), arguments)


def prefetch(builder: Any, pointer: Any, level: int = 1, write: bool = False) -> None:
    """LLVM: prefetches a cache line, for reading or writing, into this cache level; used where the hardware prefetcher would be too late."""
    byte, single = ir.IntType(8).as_pointer(), ir.IntType(32)
    instruction(builder, "llvm.prefetch.p0", ir.VoidType(), builder.bitcast(pointer, byte), single(int(write)), single(4 - level), single(1))


def every(vector: Any, value: float) -> Any:
    """LLVM: a vector of one constant."""
    return ir.Constant(vector, [value] * vector.count)


def broadcast(builder: Any, number: Any, vector: Any) -> Any:
    """LLVM: one value in every lane."""
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None))


def multiply_add(builder: Any, a: Any, b: Any, c: Any, fused: bool) -> Any:
    """LLVM: a · b + c, rounded once if `fused`."""
    if not fused:
        return builder.fadd(builder.fmul(a, b), c)
    return instruction(builder, f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)


def loop(builder: Any, count: Any, step: int, carried: list, body: Callable[[Any, list], list]) -> list:
    """LLVM: for k in range(0, count, step): carried = body(k, carried), run at least once. Returns the final carried values."""
    entry, block, done = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("done")
    index = ir.IntType(64)
    builder.branch(block)
    builder.position_at_end(block)
    k, *values = phis = [builder.phi(value.type) for value in (index(0), *carried)]
    after = [builder.add(k, index(step)), *body(k, values)]
    for phi, first, again in zip(phis, (index(0), *carried), after, strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(again, builder.block)
    builder.cbranch(builder.icmp_signed("<", after[0], count), block, done)
    builder.position_at_end(done)
    return after[1:]


def larger(builder: Any, a: Any, b: Any) -> Any:
    """LLVM: the lane-wise maximum; b's value where either is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def rows_from(builder: Any, rows: Any, step: Any, n: Any, count: int) -> list:
    """LLVM: the addresses of `count` rows, `step` apart; only n exist, and the last stands in for those beyond."""
    index = ir.IntType(64)
    last = builder.sub(n, index(1))
    there = [builder.select(builder.icmp_signed("<", index(r), n), index(r), last) for r in range(count)]
    return [builder.gep(rows, [builder.mul(step, row)]) for row in there]


def transposed(builder: Any, lines: list) -> list:
    """LLVM: the transpose of an n × n square, given as n vectors."""
    lines, n, apart = list(lines), len(lines), 1
    while apart < n:  # swaps the off-diagonal quarters of every square of 2 · apart
        above = [lane if not lane & apart else n + lane - apart for lane in range(n)]
        below = [lane + apart if not lane & apart else n + lane for lane in range(n)]
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), n), lanes) for lanes in (above, below)]
        for r in range(n):
            if not r & apart:
                lines[r], lines[r + apart] = (builder.shuffle_vector(lines[r], lines[r + apart], mask) for mask in masks)
        apart *= 2
    return lines


def across(builder: Any, lanes: Any, combine: Any) -> Any:
    """LLVM: reduces a vector's lanes to one value, always in the same order."""
    while (half := lanes.type.count // 2) > 0:
        low, high = (ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(first, first + half))) for first in (0, half))
        lanes = combine(builder, builder.shuffle_vector(lanes, lanes, low), builder.shuffle_vector(lanes, lanes, high))
    return builder.extract_element(lanes, ir.IntType(32)(0))


@intrinsic
def total(typing_context, row, n):
    """The sum of n values."""
    return _summing(row, n, lambda builder, sums, x: builder.fadd(sums, x))


@intrinsic
def squares(typing_context, row, n):
    """The sum of the squares of n values."""
    return _summing(row, n, lambda builder, sums, x: builder.fadd(sums, builder.fmul(x, x)))


@intrinsic
def largest(typing_context, row, n):
    """The largest of n values; undefined if one is NaN."""
    return _summing(row, n, larger, larger, -math.inf)


def _summing(row: Any, n: Any, add: Callable[[Any, Any, Any], Any], combine: Any = None, start: float = 0.0) -> Any:
    """A reduction: LANES partial sums over whole vectors, combined, then the remaining values one by one."""
    combine = combine or (lambda builder, a, b: builder.fadd(a, b))

    def generate(context, builder, signature, arguments):
        row, n = arguments
        vector, index = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)
        whole = builder.and_(n, index(-LANES))
        sums, single = builder.alloca(vector), builder.alloca(ir.FloatType())
        builder.store(every(vector, start), sums)
        with builder.if_then(builder.icmp_signed(">", whole, index(0))):
            (lanes,) = loop(builder, whole, LANES, [every(vector, start)],
                            lambda k, carried: [add(builder, carried[0], load(builder, builder.gep(row, [k]), vector))])  # fmt: skip
            builder.store(lanes, sums)
        builder.store(across(builder, builder.load(sums), combine), single)
        rest = builder.sub(n, whole)
        with builder.if_then(builder.icmp_signed(">", rest, index(0))):
            (last,) = loop(builder, rest, 1, [builder.load(single)],
                           lambda k, carried: [add(builder, carried[0], builder.load(builder.gep(row, [builder.add(whole, k)])))])  # fmt: skip
            builder.store(last, single)
        return builder.load(single)

    return types.float32(row, types.int64), generate
