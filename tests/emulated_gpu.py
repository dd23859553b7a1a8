"""An emulated GPU, as a pytest plugin: python -m pytest -p emulated_gpu -m "gpu and not large", with this folder on PYTHONPATH.

It gives torch's CPU build a device "cuda" whose memory is the host's (cuda_on_cpu/gpu.cpp). As on a GPU, NumPy cannot read its tensors, and no
operation mixes them with CPU tensors; fresh memory is garbage (NaN); a non-blocking copy arrives only when something waits for it; operations that
a graph captures happen when it is replayed. CUDA C++ kernels are launched through cuda.core and run by cuda_emulator.py. Numba's kernels have their
own simulator, which other tests use: here plain torch replaces them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import json
import math
import subprocess
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda_emulator
import pytest
import torch

from opt_fast import attention_cuda, nvrtc

INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")  # these take indices from the CPU as well
FRESH = ("aten::empty", "aten::empty_strided")
WAITING = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select")  # the host needs their result to continue
MULTIPROCESSORS, LAUNCH_FAILED = 16, 719  # constants of the driver's API: a device attribute, an error
LIBRARY = torch.ops.emulated_gpu


def pytest_configure(config: pytest.Config) -> None:
    if torch.version.cuda is not None:
        pytest.exit("no GPU is emulated: this torch is built for real ones, where tests marked gpu run as they are", returncode=0)
    if reason := cuda_emulator.why_not():
        pytest.exit(f"no GPU is emulated: {reason}", returncode=0)
    begin(build(Path(config.cache.mkdir("emulated_gpu"))))  # type: ignore[union-attr]


def build(folder: Path) -> Path:
    """gpu.cpp, compiled under the driver library's name: code that then loads the driver gets this one."""
    source, root = cuda_emulator.HERE / "gpu.cpp", Path(torch.__file__).parent
    library = folder / hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16] / "libcuda.so.1"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        made = library.with_suffix(".made")
        flags = ("-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", f"-Wl,-soname,{library.name}", "-isystem", str(root / "include"))
        subprocess.run(["g++", *flags, str(source), "-o", str(made), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"], check=True)
        made.rename(library)
    return library


def begin(library: Path) -> None:
    """Gives this process the emulated GPU."""
    torch.cuda._lazy_init = lambda: None
    torch.ops.load_library(library)
    for name, value in vars(Cuda).items():
        if not name.startswith("_"):
            setattr(torch.cuda, name, value)
    every, some = (torch.library.Library(names, "IMPL") for names in ("_", "aten"))
    every.fallback(compute, "CUDA")
    some.impl("copy_", copy, "CUDA")
    KEPT.extend((every, some))
    copied = torch.Tensor.__deepcopy__  # replaced, as is pickling: they need a storage type that this build of torch lacks
    torch.Tensor.__deepcopy__ = lambda a, memo: a.detach().clone() if a.is_cuda else copied(a, memo)  # type: ignore[method-assign]
    reduced = torch.Tensor.__reduce_ex__
    torch.Tensor.__reduce_ex__ = lambda a, protocol: (torch.Tensor.cuda, (a.cpu(),)) if a.is_cuda else reduced(a, protocol)  # type: ignore
    begin_driver(ctypes.CDLL(str(library)))
    stand_in_for_numba()


KEPT: list[Any] = []  # objects that must not be garbage-collected


# ---- operations --------------------------------------------------------------------------------------------------------------------------


def compute(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an operation on CPU twins of its tensors; the result is on the GPU if `device` is, or else if an argument is."""
    name, given = operation._schema.name, tensors((args, kwargs))
    refuse_a_mixture(name, args, given)
    if name in WAITING:
        wait(name)
    args, there = with_numbers(operation, args, given), any(a.is_cuda for a in given)
    if (device := kwargs.get("device")) is not None:
        there, kwargs = device.type == "cuda", {**kwargs, "device": torch.device("cpu"), "pin_memory": None}
    twins = Twins()
    args, kwargs = changed(twins.on_cpu, (args, kwargs))
    if here.graph:
        here.graph.keep(given)
    found = operation(*args, **kwargs)
    if name in FRESH:
        found.untyped_storage().fill_(0xFF)
    results = changed(twins.on_gpu, found) if there else found
    if here.graph and name not in FRESH:
        here.graph.add(lambda: refill(results, operation(*args, **kwargs)))
    return results


def with_numbers(operation: Any, args: tuple, given: list[torch.Tensor]) -> tuple:
    """Turns numbers into tensors where the operation takes tensors: the dispatcher passes such tensors to Python as numbers."""
    floats = torch.float64 if any(a.dtype == torch.float64 for a in given) else torch.float32
    return tuple(torch.tensor(a, dtype=floats if isinstance(a, float) else None) if wanted and isinstance(a, (bool, int, float)) else a
                 for a, wanted in zip(args, tensors_wanted(operation), strict=False))  # fmt: skip


@functools.cache
def tensors_wanted(operation: Any) -> list[bool]:
    return [str(argument.type) == "Tensor" for argument in operation._schema.arguments]


def tensors(x: Any) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts; torch's own functions for trees take longer than the operations."""
    found: list[torch.Tensor] = []
    changed(found.append, x)
    return found


def changed(change: Callable[[torch.Tensor], Any], x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return change(x)
    if isinstance(x, dict):
        return {name: changed(change, value) for name, value in x.items()}
    return type(x)([changed(change, value) for value in x]) if isinstance(x, (list, tuple)) else x


class Twins:
    """The tensors of one operation, each on the GPU and as a CPU tensor over the same memory."""

    def __init__(self) -> None:
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_cpu(self, gpu: torch.Tensor) -> torch.Tensor:
        if not gpu.is_cuda:
            return gpu
        cpu = LIBRARY.on_cpu(gpu) if gpu.untyped_storage().nbytes() else torch.empty(gpu.shape, dtype=gpu.dtype)
        self.pairs.append((cpu, gpu))
        return cpu

    def on_gpu(self, found: torch.Tensor) -> torch.Tensor:
        for cpu, gpu in self.pairs:
            if cpu is found:
                if cpu.shape != gpu.shape:  # it was empty, and has been resized
                    LIBRARY.become(gpu, LIBRARY.on_gpu(cpu))
                return gpu
            if cpu.untyped_storage()._cdata == found.untyped_storage()._cdata:
                return LIBRARY.view(gpu, found)
        return LIBRARY.on_gpu(found)


def refill(results: Any, found: Any) -> None:
    """Copies an operation's new results to the memory of its first ones."""
    for there, new in zip(tensors(results), tensors(found), strict=True):
        if there.data_ptr() != new.data_ptr():
            LIBRARY.on_cpu(there).untyped_storage().copy_(new.untyped_storage())


def refuse_a_mixture(name: str, args: tuple, given: list[torch.Tensor]) -> None:
    """Raises RuntimeError, as torch does, for tensors of two devices; only 0-d tensors and indices may be on the CPU."""
    free = args[1] if name in INDEXING else ()
    others = [a for a in given if not a.is_cuda and a.dim() and not any(a is b for b in free)]
    if others and any(a.is_cuda for a in given):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})")


def copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """aten::copy_; the target of a non-blocking copy from the GPU is NaN, or -1, until something waits for it."""
    twins = Twins()
    cpu, numbers = map(twins.on_cpu, (to, source))
    if to.is_cuda and source.is_cuda:
        if here.graph:
            here.graph.keep([to])
            here.graph.add(lambda: cpu.copy_(numbers))
        cpu.copy_(numbers)
    elif to.is_cuda or not non_blocking:
        wait("a copy from one to the other")
        cpu.copy_(numbers)
    else:
        wait_not_while_capturing("a copy to the host")
        late, number = numbers.clone(), next(counted)
        to.fill_(math.nan if to.is_floating_point() else -1)
        under_way[number] = lambda: cpu.copy_(late)
    return to


# ---- time --------------------------------------------------------------------------------------------------------------------------------

counted = itertools.count()
under_way: dict[int, Callable[[], Any]] = {}  # copies that have not been waited for, by the time at which they began


@torch.inference_mode()
def wait(what: str, until: float = float("inf")) -> None:
    """The host waits for all copies that began before `until`."""
    wait_not_while_capturing(what)
    for number in [number for number in list(under_way) if number < until]:
        if arrived := under_way.pop(number, None):
            arrived()


def wait_not_while_capturing(what: str) -> None:
    if here.graph:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")


class Here(threading.local):
    """State of one thread."""

    def __init__(self) -> None:
        self.graph: Graph | None = None  # being captured
        self.streams = [Stream(0)]


class Stream:
    handles = itertools.count(0x1000)

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.cuda_stream = 0 if device == 0 else next(self.handles)

    def wait_stream(self, _: Stream) -> None: ...

    def wait_event(self, event: Event) -> None:
        event.wait()


class Event:
    def __init__(self, **_: Any) -> None:
        self.recorded: int | None = None

    def record(self, _: Any = None) -> None:
        self.recorded = next(counted)

    def wait(self, _: Any = None) -> None:
        assert self.recorded is not None, "nobody has recorded this event"

    def synchronize(self) -> None:
        self.wait()
        wait("an event", self.recorded)  # type: ignore[arg-type]


class Graph:
    """A captured graph: capturing computes, and then undoes it; each replay computes again."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], Any]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def keep(self, tensors: list[torch.Tensor]) -> None:
        for a in tensors:
            if a.is_cuda and a.untyped_storage().nbytes() and a.untyped_storage().data_ptr() not in self.before:
                storage = LIBRARY.on_cpu(a).untyped_storage()
                self.before[storage.data_ptr()] = storage, storage.clone()

    def add(self, step: Callable[[], Any]) -> None:
        self.steps.append(step)

    @torch.inference_mode()
    def replay(self) -> None:
        for step in self.steps:
            step()


@contextmanager
def capture(graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    with on_stream(stream):
        here.graph = graph
        try:
            yield
        finally:
            here.graph = None
            for storage, numbers in graph.before.values():
                storage.copy_(numbers)
            graph.before.clear()


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    here.streams.append(stream)
    try:
        yield
    finally:
        here.streams.pop()


here = Here()
PROPERTIES = SimpleNamespace(name="an emulated GPU", major=9, minor=0, total_memory=2**34, L2_cache_size=2**20)


class Cuda:
    """The replacements for members of torch.cuda."""

    Stream, Event, CUDAGraph, graph, stream, device = Stream, Event, Graph, staticmethod(capture), staticmethod(on_stream), nullcontext
    is_available = is_initialized = staticmethod(lambda: True)
    device_count, current_device = staticmethod(lambda: 1), staticmethod(lambda: 0)
    current_stream = staticmethod(lambda _=None: here.streams[-1])
    synchronize = staticmethod(lambda _=None: wait("all"))
    graph_pool_handle = staticmethod(lambda: (0, 1))
    manual_seed_all = empty_cache = staticmethod(lambda *_: None)
    get_device_properties = staticmethod(lambda _=None: PROPERTIES)
    get_device_name = staticmethod(lambda _=None: PROPERTIES.name)
    get_device_capability = staticmethod(lambda _=None: (PROPERTIES.major, PROPERTIES.minor))


# ---- kernels -------------------------------------------------------------------------------------------------------------------------------

RUN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_size_t, ctypes.c_int,
                       ctypes.POINTER(ctypes.c_void_p))  # fmt: skip


def begin_driver(library: ctypes.CDLL) -> None:
    """Makes nvrtc's "machine code" a file's name and macros, from which `run`, called by the driver, compiles the kernel for the CPU."""

    def cubin(file: str, arch: str, **macros: int) -> bytes:
        assert arch == "sm_90a"
        return json.dumps([file, macros]).encode()

    def run(code: bytes, name: bytes, dims: Any, shared: int, stream: int, cooperative: int, parameters: Any) -> int:
        try:
            file, macros = json.loads(code)
            kernel = cuda_emulator.compile_for_cpu(nvrtc.KERNELS / file, name.decode(), macros)
            values = [value(type_, parameters[i]) for i, type_ in enumerate(kernel.types)]
            grid, block = cuda_emulator.Dim(*dims[:3]), cuda_emulator.Dim(*dims[3:6])

            def step() -> None:
                kernel.launch(grid, block, shared, values, allocated(library), 0, True, False, bool(cooperative))

            assert stream == here.streams[-1].cuda_stream, "launched on another stream than torch's current one"
            here.graph.add(step) if here.graph else step()
        except BaseException:  # must not propagate through the driver's C++
            traceback.print_exc()
            return LAUNCH_FAILED
        return 0

    count = ctypes.c_int()
    library.cuDeviceGetAttribute(ctypes.byref(count), MULTIPROCESSORS, 0)
    PROPERTIES.multi_processor_count = count.value
    KEPT.append(RUN(run))
    library.emulated_gpu_run(KEPT[-1])
    nvrtc.cubin = cubin


def value(type_: str, at: int) -> Any:
    """A kernel's parameter, read from the address that the driver was given."""
    kinds = {"struct": ctypes.c_uint64 * 16, **cuda_emulator.SCALARS}
    return (ctypes.c_void_p if type_.endswith("*") else kinds[type_]).from_buffer_copy(ctypes.string_at(at, 128 if type_ == "struct" else 8))


def allocated(library: ctypes.CDLL) -> Any:
    """The memory that a kernel may read."""
    room = library.emulated_gpu_allocated(None, 0) + 1000  # other threads may allocate meanwhile
    found = ((ctypes.c_uint64 * 2) * room)()
    count = library.emulated_gpu_allocated(found, room)
    return (cuda_emulator.Region * count)(*(cuda_emulator.Region(begin, end, 0) for begin, end in found[:count]))


def stand_in_for_numba() -> None:
    """Replaces Numba's kernels by plain torch; hidden keys and values, which the kernels do not read, may be NaN."""
    from opt_fast import attention_numba

    def shown(k: torch.Tensor, v: torch.Tensor, visible: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
        if visible is None:
            return k, v, None
        return *(a.masked_fill(~visible[..., None, None], 0) for a in (k, v)), attention_cuda.Seen(visible, None)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, visible: Any = None) -> Any:
        k, v, seen = shown(k, v, visible)
        return attention_cuda.plain(q, k, v, scale, seen)

    def backward(dO: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, O: torch.Tensor, L: torch.Tensor, scale: float,
                 visible: Any = None) -> Any:  # fmt: skip
        k, v, seen = shown(k, v, visible)
        return attention_cuda.plain_bwd(dO, q, k, v, O, L, scale, seen)

    attention_numba.v1 = attention_numba.v2 = attention_numba.v3 = attention_numba.decode = forward
    attention_numba.v3_bwd = backward
