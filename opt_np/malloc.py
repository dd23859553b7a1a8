"""What becomes of memory that arrays no longer need: kept for the next ones, or given back. Requests to glibc; elsewhere they do nothing."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, MOST_FREED = -1, -3, (1 << 31) - 1  # of mallopt: freed memory that is retained, in bytes


@functools.cache
def keep_freed() -> None:
    """From now on makes the C library retain freed memory, up to 2 GB: each layer, and each training step, frees and allocates the same arrays, and
    fresh memory costs page faults, in a virtual machine a tenth to a sixth of the time."""
    if set_option := c_library("mallopt"):
        for option in M_MMAP_THRESHOLD, M_TRIM_THRESHOLD:
            set_option(option, MOST_FREED)


def give_back() -> None:
    """Makes the C library return freed memory to the system: it would retain freed arrays of a few MB, several hundred MB for a whole model."""
    if trim := c_library("malloc_trim"):
        trim(0)


def c_library(name: str) -> Any:
    """This function of the C library, if it has it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
