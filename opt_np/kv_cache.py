"""KVCache: the keys and values of every position already seen, so that decoding computes only the new ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opt_np.arrays import empty

AT_ONCE = 512  # spare tokens allocated at first: up to `capacity`, but no more than this (or than the prompt, if longer), as a text may end early
SPARE = 64  # spare tokens of a copy: beams are copied at every step, and allocating more costs time


class KVCache:
    """Keys and values per layer, (B, S, H, Dh), keys unscaled; grows by doubling, so that adding a token rarely copies anything.

    `length` is the number of positions held. `capacity`, if known, is the most it should ever hold, and growing does not overshoot it. Same
    contents as HF's DynamicCache. Given torch tensors, it stores torch tensors.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.length, self.capacity = 0, capacity
        self._layers: list[tuple[np.ndarray, np.ndarray]] = []  # capacity in axis 1
        self.program: Any = None  # a backend's own state between tokens; NumPy has none

    def extend(self, i: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Writes layer i's new keys and values after the past ones, and returns all of them.

        k: (B, T, H, Dh);  v: (B, T, H, Dh)  ->  (B, S, H, Dh), (B, S, H, Dh)
        """
        keys, values = self.room(i, k.shape, k)
        keys[:, self.length :], values[:, self.length :] = k, v
        return keys, values

    def __getstate__(self) -> dict:
        return self.__dict__ | {"program": None}  # a copy creates its own

    def room(self, i: int, shape: tuple[int, ...], like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Layer i's keys and values, with uninitialised space at their end for new ones of this shape, (B, T, H, Dh), in the dtype of `like`.

        -> (B, S, H, Dh), (B, S, H, Dh)
        """
        S = self.length + shape[1]
        if i == len(self._layers):
            if self.length:
                raise ValueError(
                    f"this cache holds {self.length} positions of {len(self._layers)} layers, and was filled by another model; start a new one"
                )
            capacity = self._layers[0][0].shape[1] if i else S + min(max(self.capacity - S, 0), max(S, AT_ONCE))
            self._layers.append(tuple(empty((shape[0], capacity, *shape[2:]), like) for _ in range(2)))
        keys, values = self._layers[i]
        B, _, *heads = keys.shape
        if shape[0] != B or [*shape[2:]] != heads:
            raise ValueError(
                f"this cache holds {B} rows with heads {tuple(heads)}; the new keys are {shape[0]} rows with {tuple(shape[2:])}: start a new one"
            )
        if keys.dtype != like.dtype:
            raise ValueError(f"this cache holds {keys.dtype}, and the new keys are {like.dtype}: another backend or dtype needs a cache of its own")
        if keys.shape[1] < S:  # all layers grow at once, to keep equal strides; one by one, so only one is held twice
            for layer, (k, v) in enumerate(self._layers):
                self._layers[layer] = self._grown(k, S), self._grown(v, S)
            keys, values = self._layers[i]
        return keys[:, :S], values[:, :S]

    def advance(self, T: int) -> None:
        """Counts T new positions, once every layer has been extended by them."""
        self.length += T

    def crop(self, length: int) -> None:
        """Forgets all but the first `length` positions."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} positions to {length}; choose 0 to {self.length}")
        self.length = length

    def reorder(self, rows: np.ndarray) -> None:
        """Makes row b continue from what was row rows[b]; rows may repeat or shrink the batch.  rows: (B)"""
        for i, (k, v) in enumerate(self._layers):
            self._layers[i] = self._copied(k, rows), self._copied(v, rows)

    def fork(self) -> KVCache:
        """An independent copy."""
        copy = KVCache(self.capacity)
        copy.length, copy._layers = self.length, [(self._copied(k, range(len(k))), self._copied(v, range(len(v)))) for k, v in self._layers]
        return copy

    @property
    def nbytes(self) -> int:
        return sum(k[:, : self.length].nbytes + v[:, : self.length].nbytes for k, v in self._layers)

    def _copied(self, a: np.ndarray, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """These rows, with space for SPARE more tokens, or up to the capacity, if known and less."""
        most = max(self.capacity, self.length) if self.capacity else self.length + SPARE
        copy = empty((len(rows), min(most, self.length + SPARE), *a.shape[2:]), a)
        for b, row in enumerate(rows):
            copy[b, : self.length] = a[row, : self.length]
        return copy

    def _grown(self, a: np.ndarray, S: int) -> np.ndarray:
        B, capacity, H, Dh = a.shape
        doubled = min(2 * capacity, self.capacity) if self.capacity >= S else 2 * capacity
        bigger = empty((B, max(S, doubled), H, Dh), a)
        bigger[:, : self.length] = a[:, : self.length]
        return bigger
