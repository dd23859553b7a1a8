"""Logits that stay on the GPU: greedy search and most ways of sampling fetch only a number or two per row, not all logits."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opt_np import processors
from opt_np.arrays import host
from opt_np.generate import choose


class Scores:
    """Logits (N, V) on the GPU, which convert to a NumPy array of float32.

    `found`, (2, N), has the index and the value of each row's highest logit; it and the logits are valid once the event `ready` has happened.
    """

    def __init__(self, logits: Tensor, found: Tensor | None = None, ready: Any = None) -> None:
        self.logits, self.found, self.ready = logits, found, ready

    @classmethod
    def fetched(cls, logits: Tensor, found: Tensor) -> Scores:
        """Scores whose `found` is being copied from the GPU, without waiting for it."""
        if not logits.is_cuda:
            return cls(logits, found.clone())
        there, ready = torch.empty(found.shape, dtype=found.dtype, device="cpu", pin_memory=True), torch.cuda.Event()
        there.copy_(found, non_blocking=True)
        ready.record()
        return cls(logits, there, ready)

    @functools.cached_property
    def highest(self) -> np.ndarray:
        """The index and the value of each row's highest logit.  ->  (2, N)"""
        if self.ready:
            self.ready.synchronize()
        return host(highest(self.logits) if self.found is None else self.found)

    @property
    def best(self) -> np.ndarray:
        """The index of each row's highest logit.  ->  (N)"""
        return self.highest[0].astype(np.int64)

    def argmax(self, axis: int = -1) -> np.ndarray:
        return self.best

    def max(self, axis: int = -1) -> np.ndarray:
        return self.highest[1]

    @functools.cached_property
    def array(self) -> np.ndarray:
        """All logits, on the host.  ->  (N, V)"""
        if not self.ready:
            return host(self.logits).astype(np.float32, copy=False)
        with torch.cuda.stream(beside(self.logits.get_device())):  # else the copy would wait for the next token's pass
            self.ready.wait()
            return host(self.logits).astype(np.float32, copy=False)

    def after(self, processor: Any) -> Scores | None:
        """The scores after a processor of opt_np.processors, computed on the GPU; None where it exists only for NumPy arrays."""
        if torch.are_deterministic_algorithms_enabled():  # cumsum on a GPU is not deterministic
            return None
        own = PROCESSORS.get(processor.func) if isinstance(processor, processors.Warper) else None
        return None if own is None else Scores(own(self.logits.float(), **processor.keywords))

    def drawn(self, draws: list[float]) -> np.ndarray:
        """As opt_np.generate.choose.  draws: (N)  ->  (N)"""
        if torch.are_deterministic_algorithms_enabled():
            return choose(self.array, draws)
        cumulative = torch.softmax(self.logits.double(), -1).cumsum(-1)
        at = torch.tensor(draws, dtype=torch.float64, device=cumulative.device)[:, None] * cumulative[:, -1:]
        return host(torch.searchsorted(cumulative, at, right=True)[:, 0])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.array if dtype is None else self.array.astype(dtype)

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, rows: Any) -> Any:
        if not isinstance(rows, slice):
            return self.array[rows]
        if rows.indices(len(self)) == (0, len(self), 1):
            return self
        return Scores(self.logits[rows], None if self.found is None else self.found[:, rows], self.ready)


def highest(logits: Tensor) -> Tensor:
    """The index and the value of each row's highest logit.  logits: (N, V)  ->  (2, N)"""
    best, at = logits.max(-1)
    return torch.stack([at.double(), best.double()])


@functools.cache
def beside(device: int) -> Any:
    """A second stream, whose copies do not wait for the work on torch's current one."""
    return torch.cuda.Stream(device)


# ---- opt_np.processors on tensors; their docstrings define them --------------------------------------------------------------------------


def temperature(scores: Tensor, temperature: float) -> Tensor:
    return scores / temperature


def top_k(scores: Tensor, k: int) -> Tensor:
    return scores.masked_fill(scores < scores.topk(min(k, scores.shape[-1])).values[:, -1:], -math.inf)


def top_p(scores: Tensor, p: float, least: int = 1) -> Tensor:
    ascending, order = scores.sort(stable=True)
    cut = torch.softmax(ascending, -1).cumsum(-1) <= 1 - p
    cut[:, -least:] = False
    return scores.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -math.inf)


def min_p(scores: Tensor, p: float, least: int = 1) -> Tensor:
    probabilities = torch.softmax(scores, -1)
    cut = probabilities < p * probabilities.amax(-1, keepdim=True)
    best = probabilities.sort(descending=True, stable=True).indices[:, :least]
    return scores.masked_fill(cut.scatter(-1, best, False), -math.inf)


PROCESSORS: dict[Any, Any] = {processors.temperature: temperature, processors.top_k: top_k, processors.top_p: top_p, processors.min_p: min_p}
