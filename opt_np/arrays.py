"""The few operations that differ between NumPy arrays and torch tensors; everywhere else the same code runs on both."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def empty(shape: tuple[int, ...], like: Any) -> Any:
    """An array, or a torch tensor on the same device, of the dtype of `like`, uninitialised."""
    return np.empty(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_empty(shape)


def host(x: Any) -> np.ndarray:
    """x as a NumPy array; a torch tensor comes from its device, without its gradient, and bfloat16, which NumPy lacks, as float32."""
    if not hasattr(x, "detach"):
        return np.asarray(x)
    x = x.detach().cpu()
    return (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()


def as_kind(a: np.ndarray, like: Any) -> Any:
    """An array with the dtype, and on the device, of `like`."""
    return a.astype(like.dtype) if isinstance(like, np.ndarray) else like.new_tensor(a)


def size(x: Any) -> int:
    """The number of elements."""
    return math.prod(x.shape)
