"""This machine's limits: memory bandwidth and float32 FLOP/s, each measured in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
REPEATS = 8


def measure(threads: int, read: int = 2**29, width: int = 2048) -> dict[str, float]:
    """{"bandwidth": bytes/s read from an array of `read` bytes, "matmul": FLOP/s of a (width, width) float32 product in NumPy}"""
    return {"bandwidth": alone(threads, bandwidth, threads, read), "matmul": alone(threads, matmul, width)}


def bandwidth(threads: int, size: int) -> float:
    """Bytes read per second, as each thread takes the maximum of its part: NumPy vectorizes this, releases the GIL, and is limited by memory only."""
    from concurrent.futures import ThreadPoolExecutor

    parts = np.array_split(np.ones(size // 4, np.int32), threads)
    with ThreadPoolExecutor(threads) as pool:
        return size / fastest(lambda: list(pool.map(np.max, parts)))


def matmul(width: int) -> float:
    """FLOP/s of NumPy's BLAS, which is well tuned but no strict limit: a faster kernel shows more than 100 %."""
    a, b = np.random.default_rng(0).random((2, width, width), np.float32)
    return 2 * width**3 / fastest(lambda: a @ b)


def fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest call, as a limit is the best that can be reached."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def alone(threads: int, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a fresh process: a thread pool left over from one measurement would slow the next."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with thread_limit(threads), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@contextmanager
def thread_limit(threads: int) -> Iterator[None]:
    """Processes started inside use this many threads in OpenMP, OpenBLAS, MKL and Numba, which read these variables at import."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
