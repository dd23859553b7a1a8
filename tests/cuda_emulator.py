"""Runs a CUDA C++ kernel on a CPU, from the file that NVRTC compiles for a GPU: cuda_on_cpu/ implements CUDA's keywords and instructions for g++.

A kernel's warps and lanes run in an order drawn from a seed; behaviour that the hardware leaves undefined is an error that names the line. This
checks indexing, masks, barriers and results, not speed. cuda_on_cpu.h lists what a kernel may use; sm90.cuh has the instructions of Hopper.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import operator
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent / "cuda_on_cpu"
KERNELS = HERE.parents[1] / "opt_fast" / "kernels"
CACHE = HERE.parents[1] / ".pytest_cache" / "cuda_on_cpu"  # compiled kernels, keyed by everything they depend on
# The sanitizers' traps become the emulator's own errors and need no library. No strict aliasing: kernels access the same bytes as several types.
FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-shared", "-fPIC", "-x", "c++", "-include", "cuda_on_cpu.h"),
    *("-fno-strict-aliasing", "-ffp-contract=off", "-fvisibility=hidden", "-fno-threadsafe-statics", "-U_FORTIFY_SOURCE"),
    *("-fsanitize=alignment,bounds,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"),
    *("-fno-crossjumping", "-fno-tree-tail-merge"),  # each trap keeps its line
)
SHARED = re.compile(r"(extern\s+)?__shared__\s+(?:__align__\s*\(\s*\d+\s*\)\s*)?([\w ]+?)\s+(\w+)\s*((?:\[[^]]*\]\s*)*);")
LAUNCHER = """
#line 1 "launcher"
extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_signature() {{ return cuda_on_cpu::signature(&{name}); }}
extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_launch(const cuda_on_cpu::Launch* launch, const void** site) {{
  return cuda_on_cpu::launch<&{name}>(&{name}, *launch, site);
}}
"""
SCALARS: dict[str, Any] = {
           "float32": ctypes.c_float, "float64": ctypes.c_double, "bool": ctypes.c_bool, "int8": ctypes.c_int8, "uint8": ctypes.c_uint8,
           "int16": ctypes.c_int16, "uint16": ctypes.c_uint16, "int32": ctypes.c_int32, "uint32": ctypes.c_uint32, "int64": ctypes.c_int64,
           "uint64": ctypes.c_uint64}  # fmt: skip


class KernelError(RuntimeError):
    """A kernel did something that the hardware forbids or leaves undefined."""


class Dim(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class Region(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("argument", ctypes.c_uint))


class Launch(ctypes.Structure):
    _fields_ = (("grid", Dim), ("block", Dim), ("shared_bytes", ctypes.c_uint), ("region_count", ctypes.c_uint), ("regions", ctypes.c_void_p),
                ("values", ctypes.c_void_p), ("seed", ctypes.c_uint64), ("races", ctypes.c_int), ("early", ctypes.c_int),
                ("cooperative", ctypes.c_int))  # fmt: skip


def why_not() -> str | None:
    """Why kernels cannot be compiled here, as a reason to skip a test; None where they can."""
    if sys.platform != "linux":
        return "the emulator's memory and signals are Linux's"
    return None if shutil.which("g++") else "no g++ to compile kernels with"


@functools.cache
def headers() -> bytes:
    return b"".join(path.read_bytes() for folder in (HERE, KERNELS) for path in sorted(folder.glob("*.*h")))


def compile_for_cpu(path: str | os.PathLike, name: str, macros: Mapping[str, Any] | None = None) -> Kernel:
    """The kernel `name` of a .cu file (a template with its arguments), with macros as -D. Raises RuntimeError with the compiler's message."""
    source = SHARED.sub(shared_in_cpp, Path(path).read_text(encoding="utf-8"))
    return compiled(source, str(path), name, tuple(f"-D{key}={value}" for key, value in (macros or {}).items()))


def shared_in_cpp(declaration: re.Match) -> str:
    """Rewrites a declaration of shared memory as C++; forms that SHARED does not match stay, and do not compile."""
    extern, type_, name, sizes = declaration.groups()
    if extern:
        return f"{type_}* const {name} = reinterpret_cast<{type_}*>(cuda_on_cpu::dynamic_shared());"
    return f"static {type_} (&{name}){sizes} = cuda_on_cpu::fixed<{type_}{sizes}>();"


@functools.cache
def compiled(source: str, path: str, name: str, macros: tuple[str, ...]) -> Kernel:
    library = CACHE / (hashlib.sha256(repr((source, path, name, macros, FLAGS)).encode() + headers()).hexdigest() + ".so")
    if library.exists():
        return Kernel(library, Path(path).name, name)
    CACHE.mkdir(parents=True, exist_ok=True)
    made = library.with_suffix(f".{os.getpid()}")  # other processes may be compiling it as well
    text = f'#line 1 "{path}"\n{source}{LAUNCHER.format(name=name)}'
    # The source comes from standard input, so that "mma.cuh" is this folder's; other headers may be beside the kernel.
    command = ["g++", *FLAGS, *macros, "-I", str(HERE), "-iquote", str(Path(path).resolve().parent), "-", "-o", str(made), "-ldl"]
    result = subprocess.run(command, input=text, cwd=HERE, text=True, capture_output=True)
    if result.returncode:
        raise RuntimeError(f"{path} does not compile for the CPU:\n{result.stderr}")
    made.replace(library)
    return Kernel(library, Path(path).name, name)


class Kernel:
    """A compiled kernel: kernel(grid, block, shared_bytes, *arguments) runs it, block by block or, if cooperative, all concurrently."""

    def __init__(self, library: Path, file: str, name: str):
        self.file, self.name, self.path = file, name, library
        self.library = ctypes.PyDLL(str(library))  # PyDLL holds the interpreter's lock: one launch at a time
        self.library.cuda_on_cpu_signature.restype = self.library.cuda_on_cpu_launch.restype = ctypes.c_char_p
        self.library.cuda_on_cpu_allocate.restype = ctypes.c_void_p
        self.library.cuda_on_cpu_allocate.argtypes = (ctypes.c_size_t,)
        self.library.cuda_on_cpu_only_read.argtypes = self.library.cuda_on_cpu_free.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self.types = self.library.cuda_on_cpu_signature().decode().split()

    def __call__(self, grid: int | Sequence[int], block: int | Sequence[int], shared_bytes: int, *arguments: Any, seed: int = 0, races: bool = True,
                 early: bool = False, cooperative: bool = False) -> None:  # fmt: skip
        """Arguments are, for pointers, NumPy arrays, a Table or None; and numbers, and ctypes structures such as tensor_map's. Writing to an array
        that is not writeable is an error.

        `races` also makes it an error if no barrier orders an ldmatrix or cp.async after another thread's, and what sm90.cuh lists. Asynchronous
        operations happen when they are waited for or, with `early`, when they are issued: test a kernel both ways. `cooperative`: blocks may wait for
        each other. Raises KernelError, and TypeError for wrong arguments.
        """
        if len(arguments) != len(self.types):
            raise TypeError(f"{self.name} has {len(self.types)} parameters: {', '.join(self.types)}; {len(arguments)} were given")
        memories = [Memory(self.library, owner, arrays) for owner, arrays in owners(arguments)]
        try:
            for x in arguments:
                if isinstance(x, Table):
                    x.write(memories)
            for memory in memories:
                memory.protect()
            values = [self.value(i, type_, x, memories) for i, (type_, x) in enumerate(zip(self.types, arguments, strict=True))]
            self.launch(three(grid), three(block), shared_bytes, values, regions(arguments, memories), seed, races, early,
                        cooperative)  # fmt: skip
        finally:
            damaged = [memory for memory in memories if not memory.close()]
        if damaged:
            raise KernelError(f"{self.name}: some thread wrote just outside {', '.join(map(str, damaged))}")

    def launch(self, grid: Dim, block: Dim, shared_bytes: int, values: list, regions: Any, seed: int, races: bool, early: bool,
               cooperative: bool) -> None:  # fmt: skip
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        site = ctypes.c_void_p()
        launch = Launch(grid, block, shared_bytes, len(regions), ctypes.addressof(regions), ctypes.addressof(pointers), seed, races, early,
                        cooperative)  # fmt: skip
        message = self.library.cuda_on_cpu_launch(ctypes.byref(launch), ctypes.byref(site))
        if message is not None:
            raise KernelError(f"{self.name}: {message.decode()}{self.line(site.value)}")

    def value(self, i: int, type_: str, x: Any, memories: list[Memory]) -> Any:
        """One argument, converted to the type of the kernel's parameter."""
        if isinstance(x, TensorMap) and type_ != "struct":
            raise TypeError(f"{self.name}: argument {i} is a TensorMap; the parameter is {type_}")
        x = x.words if isinstance(x, Table) else x
        if type_.endswith("*"):
            if x is not None and not isinstance(x, np.ndarray):
                raise TypeError(f"{self.name}: argument {i} is {type(x).__name__}; {type_} takes an array or None")
            if x is not None and type_ != "*" and x.itemsize != np.dtype(type_[:-1]).itemsize:
                raise TypeError(f"{self.name}: argument {i} is an array of {x.dtype}; the parameter is {type_}")
            return ctypes.c_void_p(None if x is None else address_of(x, memories))
        if type_ == "struct":
            return x.words(memories) if isinstance(x, TensorMap) else x
        if type_.startswith("float"):
            return SCALARS[type_](float(x))
        number = operator.index(x.value if isinstance(x, ctypes._SimpleCData) else x)
        if SCALARS[type_](number).value != number:
            raise TypeError(f"{self.name}: argument {i} is {number}, too large for {type_}")
        return SCALARS[type_](number)

    def line(self, site: int | None) -> str:
        """The line of an instruction in the kernel's file, if addr2line finds it, else an empty string."""
        if site is None or not shutil.which("addr2line"):
            return ""
        lines = subprocess.run(["addr2line", "-i", "-e", str(self.path), hex(site - 1)], text=True, capture_output=True).stdout.split("\n")
        found = [line.split(" ")[0].rpartition("/")[2] for line in lines if re.search(rf"(^|/){re.escape(self.file)}:\d", line)]
        return f" ({' from '.join(found)})" if found else ""


class Memory:
    """A copy of an array between inaccessible pages, so that an access beyond it is an error."""

    def __init__(self, library: Any, owner: np.ndarray, writeable: bool):
        self.library, self.owner, self.writeable = library, owner, writeable
        self.host, end = np.lib.array_utils.byte_bounds(owner)
        self.bytes = end - self.host
        pages = -(-self.bytes // 4096) * 4096
        first = self.library.cuda_on_cpu_allocate(pages)
        if not first:
            raise MemoryError(f"no {pages} bytes for a copy of an array")
        self.pages = np.ctypeslib.as_array((ctypes.c_ubyte * pages).from_address(first))
        self.first, self.offset = first, pages - -(-self.bytes // 16) * 16  # as close to the end as 16-byte alignment allows
        self.begin = first + self.offset
        self.pages[:] = 0xFF
        ctypes.memmove(self.begin, self.host, self.bytes)

    def protect(self) -> None:
        """Makes a write to an array that is not writeable an error from here on."""
        if not self.writeable:
            self.library.cuda_on_cpu_only_read(self.first, len(self.pages))

    def __str__(self) -> str:
        return f"an array {self.owner.dtype}{self.owner.shape}"

    def close(self) -> bool:
        """Copies the kernel's results back, and frees the copy; returns False if the bytes around the array were written to."""
        whole = bool((self.pages[: self.offset] == 0xFF).all() and (self.pages[self.offset + self.bytes :] == 0xFF).all())
        if self.writeable:
            ctypes.memmove(self.host, self.begin, self.bytes)
        self.library.cuda_on_cpu_free(self.first, len(self.pages))
        del self.pages
        return whole


def owner_of(x: np.ndarray) -> np.ndarray:
    """The array that a view belongs to: what a GPU's allocation would be."""
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


def owners(arguments: Sequence[Any]) -> list[tuple[np.ndarray, bool]]:
    """Each array that owns an argument's memory, once, and whether any argument in it is writeable."""
    found: dict[int, tuple[np.ndarray, bool]] = {}
    for x in (x for argument in arguments for x in arrays_of(argument)):
        owner = owner_of(x)
        found[id(owner)] = owner, x.flags.writeable or found.get(id(owner), (owner, False))[1]
    return list(found.values())


def memory_of(x: np.ndarray, memories: list[Memory]) -> Memory:
    return next(memory for memory in memories if memory.owner is owner_of(x))


def address_of(x: np.ndarray, memories: list[Memory]) -> int:
    memory = memory_of(x, memories)
    return memory.begin + x.ctypes.data - memory.host


def regions(arguments: Sequence[Any], memories: list[Memory]) -> Any:
    """The memory that cp.async may read."""
    found = [(memory_of(x, memories), i) for i, argument in enumerate(arguments) for x in arrays_of(argument)]
    return (Region * len(found))(*(Region(memory.begin, memory.begin + memory.bytes, i) for memory, i in found))


class TensorMap:
    """A box of an array for TMA, as a kernel's argument `const __grid_constant__ TensorMap`; tensor_map makes it."""

    MARK = 0x54656E736F724D61

    def __init__(self, array: np.ndarray, box: tuple[int, ...]):
        self.array, self.box = array, box

    def words(self, memories: list[Memory]) -> Any:
        """sm90.cuh's Map."""
        sizes, strides = self.array.shape[::-1], self.array.strides[-2::-1]
        address = address_of(self.array, memories)
        return (ctypes.c_uint64 * 16)(address, *sizes, *strides, *self.box, self.array.flags.writeable, 0, 0, self.MARK)


def tensor_map(array: np.ndarray, box: Sequence[int]) -> TensorMap:
    """A map of an array (c3, c2, c1, c0) of 16-bit elements, copied in boxes (c0, c1, c2, c3), c0 first as in CUDA, with a 128-byte swizzle.

    Raises ValueError for what cuTensorMapEncodeTiled would refuse.
    """
    if array.ndim != 4 or array.itemsize != 2 or len(box) != 4:
        raise ValueError(f"an array {array.dtype}{array.shape} and a box {tuple(box)}; they have 4 axes, and numbers 16 bits")
    if array.size == 0 or (array.shape[3] > 1 and array.strides[3] != 2):
        raise ValueError(f"an array of shape {array.shape} and strides {array.strides}; it has numbers, and the last axis is contiguous")
    if any(stride < 0 or stride % 16 or stride >= 2**40 for stride in array.strides[:3]):
        raise ValueError(f"strides of {array.strides[:3]} bytes; they are multiples of 16 below 2^40")
    if box[0] * 2 != 128 or not all(1 <= n <= 256 for n in box):
        raise ValueError(f"a box {tuple(box)}; its first axis has 64 numbers, the others 1 to 256")
    return TensorMap(array, tuple(int(n) for n in box))


class Table:
    """Rows of 64-bit words from which a kernel reads its operands: numbers, and arrays, in place of which the kernel sees their addresses."""

    def __init__(self, rows: Sequence[Sequence[int | np.ndarray]]):
        self.rows = rows
        self.words = np.zeros((len(rows), len(rows[0])), np.int64)
        self.words.flags.writeable = False

    def write(self, memories: list[Memory]) -> None:
        """Writes the addresses of this launch's copies of the arrays into the copy of the table."""
        memory = memory_of(self.words, memories)
        words = np.array([address_of(x, memories) if isinstance(x, np.ndarray) else x for row in self.rows for x in row], np.int64)
        ctypes.memmove(memory.begin, words.ctypes.data, memory.bytes)


def arrays_of(x: Any) -> list[np.ndarray]:
    """The arrays that a kernel can access through an argument."""
    if isinstance(x, Table):
        return [x.words, *(word for row in x.rows for word in row if isinstance(word, np.ndarray))]
    return [x.array] if isinstance(x, TensorMap) else [x] if isinstance(x, np.ndarray) else []


def three(n: int | Sequence[int]) -> Dim:
    """Dimensions as in <<< >>>: missing ones are 1."""
    return Dim(*(([n] if isinstance(n, int) else [*n]) + [1, 1])[:3])
