"""How Python runs a compiled function on all threads, and the vector instructions that such functions are written with.

Numba takes seconds to compile a parallel loop, and compiles all that the loop calls once more with it. So there is none: Numba's threads are given
a kernel by its address; a kernel is compiled by itself, at its first use, and kept in __pycache__. It is given a table of whole numbers: where the
next task stands, its arguments, and arrays as addresses. Threads take tasks until none is left, so one that is held up holds up no other.
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

LANES = 16  # sums are kept side by side, on every processor
LINE = 64  # bytes of the cache that are read together
PIECE, LARGEST = 1 << 26, 1 << 28  # bytes of memory that many weights share, and that are kept at most for those that are packed for one use
TASKS, DONE, THREADS, MEMORY, BYTES, ARGUMENTS = range(6)  # places in the table: tasks begun and done, threads, their memory, how much each has …
KERNEL = types.void(types.CPointer(types.int64))
intrinsic: Any = numba_intrinsic
config: Any = numba_config
_local, _lock = threading.local(), threading.Lock()
_libraries: list = []  # in which the machine code is
_elsewhere: dict[Callable, subprocess.Popen] = {}  # what another process compiles
COMPILED = (
    "kernel.py", "gemm.py", "gemm_int.py", "gemm_amx.py", "gemm_amx_int4.py", "gemm_parts.py", "rowwise.py", "attention_cpu.py", "attention_bf16.py",
    "attention_parts.py", "train_cpu.py", "program_cpu.py", "paged_cache.py",
)  # fmt: skip
inner: Any = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)  # type: ignore[call-overload] # for functions that only kernels call: Python has no way in


class Kernel:
    """A function of the table; kernel(*arguments, tasks=…, scratch=…) runs it on as many threads as find work, each with so many float32 of memory.

    In it, claim(table, TASKS) is the next task, memory(table) the thread's own memory, and table[ARGUMENTS + i] the i-th argument. A kernel that may
    be part of a program (program_cpu.py) also counts the tasks that are done: claim(table, DONE). It writes nothing before it has a task: a thread
    that comes too late for one may come while another has the same memory in the next kernel.
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
        """Where it was never compiled, has another process do so while this one compiles others. name: what opt_fast has it as, as rowwise.ADD."""
        if "address" in self.__dict__ or self._function in _elsewhere or numba.get_num_threads() == 1 or not runs_python():
            return
        with _lock, kept_compiled():
            found = kept(self._function, KERNEL)
            if found is None:
                with suppress(OSError):  # where no process can be begun
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
    """A kernel of the same lines in which some of the module's names have other meanings."""
    made = FunctionType(function.__code__, function.__globals__ | meanings)
    made.__name__ = made.__qualname__ = f"{function.__name__}_{name}"  # by which Numba keeps it
    return Kernel(made)


def compiled(function: Any, types_: Signature) -> int:
    """The address of a function that Numba has compiled, now or once, and that stays."""
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
    """Compiles a kernel of opt_fast where this process will find it. Should that fail, this one compiles it itself."""
    announce()
    code = f"import sys; sys.path[:] = {sys.path!r}; from opt_fast import {name.split('.')[0]}; {name}.address"
    environment = os.environ | {"NUMBA_CACHE_DIR": os.path.dirname(config.CACHE_DIR)}
    silent: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, **silent)
    atexit.register(process.wait)
    atexit.register(process.kill)  # which comes first, and does nothing to one that has ended
    return process


def runs_python() -> bool:
    """Whether sys.executable is Python, and not a program that holds it."""
    return not getattr(sys, "frozen", False) and os.path.basename(sys.executable or "").startswith("python")


def kept(function: Any, types_: Signature) -> tuple[Any, int] | None:
    """The same, from the file in which Numba keeps it, as its own loading does, but for all that it would need to compile: which takes a quarter of a
    second and 40 MB. None where there is no such file, or where another release of Numba has not what this takes from it."""
    try:
        from numba.core.runtime import _nrt_python  # type: ignore[attr-defined]

        for name, place in _nrt_python.c_helpers.items():  # what machine code may call, as numba.core.runtime.nrt tells LLVM of it
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
    """Numba keeps what it compiles in __pycache__, and looks whether the function's own file has changed, but not the files of what it calls: so the
    folder's name holds a checksum of all of them."""
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
    """Makes the folder where it can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@functools.cache
def for_this_process() -> Path:
    """A folder that is gone when Python ends."""
    not_kept("set NUMBA_CACHE_DIR to a folder that can be written")
    folder = tempfile.mkdtemp(prefix="opt_fast-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def address(a: np.ndarray) -> int:
    """Where an array's numbers begin in memory."""
    return a.__array_interface__["data"][0]


def lines(size: int) -> int:
    """So many float32 as fill whole lines of the cache, `size` at least."""
    return -(-size * 4 // LINE) * LINE // 4


def aligned(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """np.empty that begins at a whole LINE: a vector as long as a line of the cache that does not would be read from two."""
    size = math.prod(shape if isinstance(shape, tuple) else (shape,)) * np.dtype(dtype).itemsize
    return begun_at_a_line(np.empty(size + LINE, np.uint8), size)[0].view(dtype).reshape(shape)


def begun_at_a_line(memory: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """So many bytes of the memory, and what is left behind them."""
    start = -address(memory) % LINE
    return memory[start : start + size], memory[start + size :]


@contextmanager
def side_by_side() -> Iterator[None]:
    """Inside, weights share pieces of memory so large that the system gives them large pages, which are looked up less often."""
    _local.piece = np.empty(0, np.uint8)
    try:
        yield
    finally:
        del _local.piece


@contextmanager
def for_one_use() -> Iterator[None]:
    """Inside, a weight's memory is that of the one before, which is not used any more: fresh memory costs as much as packing into it."""
    _local.once = getattr(_local, "kept", np.empty(0, np.uint8))
    try:
        yield
    finally:
        _local.kept = _local.once if _local.once.size <= LARGEST else np.empty(0, np.uint8)
        del _local.once


def for_weights(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """As `aligned`."""
    size = math.prod(shape if isinstance(shape, tuple) else (shape,)) * np.dtype(dtype).itemsize
    if hasattr(_local, "once"):
        if _local.once.size < size + LINE:
            _local.once = np.empty(size + LINE, np.uint8)
        return begun_at_a_line(_local.once, size)[0].view(dtype).reshape(shape)
    if not hasattr(_local, "piece"):
        return aligned(shape, dtype)
    if _local.piece.size < size + LINE:
        give_back()  # lest the piece be of memory that was used before: what is left of the last one is then no memory at all
        _local.piece = np.empty(max(PIECE, size + LINE), np.uint8)
    found, _local.piece = begun_at_a_line(_local.piece, size)
    return found.view(dtype).reshape(shape)


def give_back() -> None:
    """Has the C library return to the system what was freed: else it keeps arrays of some MB for itself, for a whole model some hundred MB."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc has it
        trim(0)


def workspace(size: int) -> np.ndarray:
    """At least so many float32, kept from call to call: fresh memory costs a page fault for every 4096 bytes."""
    if not hasattr(_local, "memory") or _local.memory.size < size:
        _local.memory = aligned(size, np.float32)
    return _local.memory


@functools.cache
def announce() -> None:
    """Says, once, why the first call takes seconds."""
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
        """The pointer that an address is."""

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return cast


floats, int16s, uint16s, int32s, int64s, bytes_, int8s = (
    _pointer_to(kind) for kind in (types.float32, types.int16, types.uint16, types.int32, types.int64, types.uint8, types.int8)
)


def float_bits(number: float) -> int:
    """A float32 as a whole number, for the table."""
    return int(np.float32(number).view(np.int32))


@intrinsic
def float_of(typing_context, number):
    """float_bits undone."""

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
    """Adds 1 to table[place] in one step, whichever thread asks, and returns what it was."""

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
    """Calls a kernel on size[0] of Numba's threads, as on_threads does from Python; `what` is the kernel and its table."""

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


def on_threads(function: int, table: int, threads: int) -> None:
    """Calls the kernel on so many of Numba's threads."""
    _, run, enter = threads_of_numba()
    size, what = np.array([threads], np.int64), np.array([function, table], np.int64)
    run(enter, address(size), address(size), address(size), address(what), 0, 0, threads)


@functools.cache
def threads_of_numba() -> tuple[int, Any, int]:
    """What Numba's parallel loops call: its address, and as Python calls it; and _enter for it. It takes a function; arrays, of which there are none;
    how many times, shared among so many threads; the arrays' steps; and what the function is given."""
    numba.get_num_threads()  # which begins the threads
    place, count, run = ctypes.c_void_p, ctypes.c_size_t, binding.address_of_symbol("numba_parallel_for")
    function = ctypes.PYFUNCTYPE(None, place, place, place, place, place, count, count, ctypes.c_int)(run)
    return run, function, compiled(_enter, types.void(*[types.CPointer(types.int64)] * 4))


def _enter(arrays: Any, times: Any, steps: Any, what: Any) -> None:
    """A thread's part of a loop: so many times the kernel."""
    for _ in range(times[0]):
        call(what[0], int64s(what[1]))


@njit(inline="always")
def memory(table: Any) -> Any:
    """The calling thread's own memory; to be asked for once."""
    return floats(table[MEMORY] + claim(table, THREADS) * table[BYTES])


# ---- vectors, as LLVM has them: for intrinsics -------------------------------------------------------------------------------------------


def load(builder: Any, address: Any, vector: Any) -> Any:
    """LLVM: a vector from an address that need not be aligned."""
    value = builder.load(builder.bitcast(address, vector.as_pointer()))
    value.align = 1
    return value


def store(builder: Any, value: Any, address: Any) -> None:
    """LLVM: a vector to an address that need not be aligned."""
    builder.store(value, builder.bitcast(address, value.type.as_pointer())).align = 1


def instruction(builder: Any, name: str, returned: Any, *arguments: Any) -> Any:
    """LLVM: calls what it has under this name."""
    kind = ir.FunctionType(returned, [argument.type for argument in arguments])
    return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), arguments)


def prefetch(builder: Any, pointer: Any, level: int = 1, write: bool = False) -> None:
    """LLVM: asks for the memory there, to read it or to write it, where the processor by itself would do so too late: to this level of the cache."""
    byte, single = ir.IntType(8).as_pointer(), ir.IntType(32)
    instruction(builder, "llvm.prefetch.p0", ir.VoidType(), builder.bitcast(pointer, byte), single(int(write)), single(4 - level), single(1))


def every(vector: Any, value: float) -> Any:
    """LLVM: a vector of one constant."""
    return ir.Constant(vector, [value] * vector.count)


def broadcast(builder: Any, number: Any, vector: Any) -> Any:
    """LLVM: a vector of one number."""
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None))


def multiply_add(builder: Any, a: Any, b: Any, c: Any, fused: bool) -> Any:
    """a · b + c, rounded once where the processor can."""
    if not fused:
        return builder.fadd(builder.fmul(a, b), c)
    return instruction(builder, f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)


def loop(builder: Any, count: Any, step: int, carried: list, body: Callable[[Any, list], list]) -> list:
    """for k in range(0, count, step): carried = body(k, carried); at least once.  Returns what is carried."""
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
    """LLVM: of each pair of numbers the larger one; the second where one is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def rows_from(builder: Any, rows: Any, step: Any, n: Any, count: int) -> list:
    """LLVM: where `count` rows begin, `step` apart; beyond the n there are, the last."""
    index = ir.IntType(64)
    last = builder.sub(n, index(1))
    there = [builder.select(builder.icmp_signed("<", index(r), n), index(r), last) for r in range(count)]
    return [builder.gep(rows, [builder.mul(step, row)]) for row in there]


def transposed(builder: Any, lines: list) -> list:
    """LLVM: n vectors of n numbers, the first of which holds the first number of each, and so on."""
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
    """The lanes of a vector combined into one number, always in the same order."""
    while (half := lanes.type.count // 2) > 0:
        low, high = (ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(first, first + half))) for first in (0, half))
        lanes = combine(builder, builder.shuffle_vector(lanes, lanes, low), builder.shuffle_vector(lanes, lanes, high))
    return builder.extract_element(lanes, ir.IntType(32)(0))


@intrinsic
def total(typing_context, row, n):
    """The sum of some numbers."""
    return _summing(row, n, lambda builder, sums, x: builder.fadd(sums, x))


@intrinsic
def squares(typing_context, row, n):
    """The sum of their squares."""
    return _summing(row, n, lambda builder, sums, x: builder.fadd(sums, builder.fmul(x, x)))


@intrinsic
def largest(typing_context, row, n):
    """The largest of some numbers; of NaN nothing is said."""
    return _summing(row, n, larger, larger, -math.inf)


def _summing(row: Any, n: Any, add: Callable[[Any, Any, Any], Any], combine: Any = None, start: float = 0.0) -> Any:
    """A vector of sums over whole vectors of numbers, then the rest one by one."""
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
