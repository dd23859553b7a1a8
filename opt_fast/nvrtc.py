"""Compiles the CUDA C++ kernels at first use and launches them: NVRTC through cuda.core, so no compiler to install, and no GPU needed to compile.

The machine code is cached on disk, keyed by source, flags, compiler version and architecture, under ~/.cache/opt_fast (or XDG_CACHE_HOME).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import re
import threading
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from opt_np.checkpoint import write_atomically

KERNELS = Path(__file__).parent / "kernels"
NEEDED = [
    ("cuda.core", "cuda-core", (1, 0)),
    ("cuda.bindings.nvrtc", "cuda-bindings", (12,)),
    ("numba.cuda", "numba-cuda", (0, 30, 2)),
]  # modules, their packages, and the oldest: before it, a launch fails with cuda-core 1.0
OPTIONS: dict[str, Any] = {"std": "c++17", "ptxas_options": "-v"}


def compile(file: str, arch: str, **macros: int) -> tuple[bytes, str]:
    """The machine code of kernels/`file` for an architecture such as "sm_90", and ptxas's report: registers, shared memory, spills.

    Raises RuntimeError with the compiler's message.
    """
    from cuda.core import Program, ProgramOptions

    defined = [(name, str(value)) for name, value in macros.items()] or None
    options = ProgramOptions(name=file, arch=arch, include_path=str(KERNELS), define_macro=defined, **OPTIONS)
    report = StringIO()
    try:
        code = Program((KERNELS / file).read_text(), "c++", options).compile("cubin", logs=report).code
    except Exception as error:  # cuda.core's own exception classes are private
        raise RuntimeError(f"{file} does not compile for {arch}: {error}") from None
    return bytes(code), report.getvalue()


def cubin(file: str, arch: str, **macros: int) -> bytes:
    """The machine code that `compile` returns, read from the disk cache where it has been compiled before."""
    path = cache_folder() / f"{Path(file).stem}-{arch}-{key(file, arch, macros)}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        code, _ = compile(file, arch, **macros)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_bytes(code))
    except OSError:  # without a writable cache, every process compiles anew
        pass
    return code


def key(file: str, arch: str, macros: dict[str, int]) -> str:
    """A hash, 16 hexadecimal digits, of everything that the machine code depends on; all headers count, whether `file` includes them or not."""
    from cuda.bindings import nvrtc

    parts = [file, arch, repr(sorted(macros.items())), repr(OPTIONS), repr(nvrtc.nvrtcVersion()[1:])]
    parts += [path.read_text() for path in [KERNELS / file, *sorted(KERNELS.glob("*.cuh"))]]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opt_fast"


@functools.cache
def kernel(device: int, file: str, name: str, shared: int, **macros: int) -> Any:
    """A kernel loaded on a GPU, which becomes the current one, and allowed `shared` bytes of dynamic shared memory per block."""
    from cuda.bindings import driver

    bind(device)
    major, minor = core().Device(device).compute_capability
    arch = f"sm_{major}{minor}" + "a" * (major == 9)  # sm_90a: the letter enables Hopper's own instructions
    found = core().ObjectCode.from_cubin(cubin(file, arch, **macros)).get_kernel(name)
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuKernelSetAttribute(limit, shared, found.handle, driver.CUdevice(device))
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name} needs {shared} bytes of shared memory a block, which this GPU does not give: {error.name}")
    return found


def launch(found: Any, device: int, stream: int, grid: tuple[int, ...], block: int, shared: int, *arguments: Any, cooperative: bool = False) -> None:
    """Launches a kernel on a stream, given by its handle. Python integers are passed as pointers or 64-bit numbers, narrower ones as NumPy scalars.

    `cooperative`: all blocks are on the GPU at once, so that they may wait for each other; CUDA refuses a grid that does not fit.
    """
    bind(device)
    together = {"is_cooperative": True} if cooperative else {}
    config = core().LaunchConfig(grid=grid, block=block, shmem_size=shared, **together)
    core().launch(stream_of(device, stream), config, found, *arguments)


class Bound(threading.local):
    """The devices whose contexts this thread has made current."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


bound = Bound()


def bind(device: int) -> None:
    """Makes the context that torch uses (the device's primary one) current in this thread; a new thread has none."""
    if device not in bound.devices:
        core().Device(device).set_current()
        bound.devices.add(device)


@functools.lru_cache(256)
def stream_of(device: int, handle: int) -> Any:
    """The stream object of a handle, on the current device; cached, since making it takes longer than the rest of a launch."""
    return core().Stream.from_handle(handle)


@functools.cache
def core() -> Any:
    return importlib.import_module("cuda.core")


def missing() -> str:
    """A message about what compiling needs and is not installed or too old; an empty string where nothing is missing."""
    for module, package, oldest in NEEDED:
        try:
            importlib.import_module(module)
            found = version(package)
        except ImportError as error:
            return f"{module} does not import ({error}); pip install 'opt-np[kernels]' brings it"
        if tuple(map(int, re.findall(r"\d+", found)[: len(oldest)])) < oldest:
            return f"{package} is {found}, and {'.'.join(map(str, oldest))} or later is needed; pip install 'opt-np[kernels]' brings it"
    return ""
