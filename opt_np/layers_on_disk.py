"""A model larger than memory: its layers stay in safetensors files, and each is read while the one before it computes.

Every pass reads all layers once, whatever the batch: the more rows it has, the fewer bytes are read per row. Embeddings, the final norm and the head
stay in memory.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np

from opt_np import checkpoint
from opt_np.checkpoint import MEANINGLESS, STORED, TIED, CheckpointError
from opt_np.config import OPTConfig
from opt_np.tree import flatten, unflatten

OF_A_LAYER = re.compile(r"\blayers\.\d+\.")
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
BYTES = {"BOOL": 1, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8,
         "U64": 8, "F64": 8}  # fmt: skip
NUMPY = {"I8": "int8", "U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def load_from(source: Any, dtype: str, strict: bool, copy: bool, pack: Callable[..., dict]) -> tuple[dict, OPTConfig]:
    """As checkpoint.load_from, but params["layers"] is a LayersOnDisk. The files' headers are checked now, a layer's values when first read.

    Raises CheckpointError, also for weights that are not in safetensors.
    """
    cfg = checkpoint.load_config(source.config)
    tensors = dict(checkpoint.read_weights(source.weights, tensors_of))
    for name, tensor in tensors.items():
        checkpoint.stays_whole(name, tensor.dtype, cfg, source.name)  # raises for a tensor that is no weight
    flat = {name: tensor if OF_A_LAYER.search(name) else tensor.read() for name, tensor in tensors.items()}
    params = unflatten(checkpoint.checked(checkpoint.rooted_at_decoder(flat, cfg, source.name), cfg, source.name))
    layers = LayersOnDisk(source.name, cfg, params.pop("layers"), dtype, strict, pack)
    in_memory = checkpoint.as_type(flatten(params).items(), cfg, source.name, dtype, strict, copy)
    return {**unflatten(in_memory), "layers": layers}, cfg


class LayersOnDisk:
    """Replaces the list of a model's layers: `for layer in layers` reads them in order and keeps none; `layers[i]` reads one.

    Each is cast to dtype and laid out by a backend's `pack`. Raises CheckpointError for a file that has changed meanwhile. NaN and infinite weights
    cause a warning, or with strict a CheckpointError.
    """

    def __init__(self, name: str, cfg: OPTConfig, layers: list[dict], dtype: str, strict: bool, pack: Callable[..., dict]) -> None:
        self._name, self._cfg, self._dtype, self._strict, self._pack = name, cfg, dtype, strict, pack
        self.tensors = layers  # a tree of Tensor
        self._looked_at: set[int] = set()  # layers already checked for NaN

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, i: int) -> dict:
        return self._pack(self._read(range(len(self))[i]), release=True)

    def __iter__(self) -> Iterator[dict]:
        """A thread of this pass reads the next layer ahead. It does not pack it: kernels run on the caller's threads."""
        with ThreadPoolExecutor(1, "read-ahead") as thread:
            ahead = thread.submit(self._read, 0)
            for i in range(1, len(self) + 1):
                layer = ahead.result()
                if i < len(self):
                    ahead = thread.submit(self._read, i)
                yield self._pack(layer, release=True)

    def _read(self, i: int) -> dict:
        """Layer i as loaded; tensors that the file has in dtype are still its mapped memory."""
        tensors = ((f"layers.{i}.{name}", tensor.read()) for name, tensor in flatten(self.tensors[i]).items())
        strict = None if i in self._looked_at else self._strict
        loaded = checkpoint.as_type(tensors, self._cfg, self._name, self._dtype, strict, copy=False)
        self._looked_at.add(i)
        return unflatten({name.removeprefix(f"layers.{i}."): array for name, array in loaded.items()})


class Tensor(NamedTuple):
    """A tensor's place in its file."""

    path: Path
    state: tuple[int, ...]  # of the file, when its header was read
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The tensor, memory-mapped: only its own part of the file takes memory, which the system may reclaim. Waits for the disk."""
        if 0 in self.shape:  # nothing to map
            return np.empty(self.shape, self.dtype)
        try:
            with open(self.path, "rb") as file:
                if state(file) != self.state:  # reading a map beyond the end of a truncated file kills the process
                    raise CheckpointError(f"{self.path} has changed since the model was loaded from it; load the model again")
                array = np.memmap(file, self.dtype, "r", self.offset, self.shape)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}; the layers stay there while the model is used") from None
        array.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE].max()
        return np.require(array, requirements=("ENSUREARRAY", "ALIGNED"))  # a copy if the values are at unaligned addresses

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def state(file: BinaryIO) -> tuple[int, ...]:
    """A value that changes when a file is written to or replaced."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, Tensor) for each weight of a file, as checkpoint.read_safetensors, from its header alone. Raises CheckpointError.

    The safetensors library would map the whole file, which a limit on addresses (ulimit -v) may forbid; what it refuses is refused here too.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} cannot be read one layer at a time; write the model as safetensors: opt-np convert MODEL NEW_FOLDER")
    try:
        with open(path, "rb") as file:
            now = state(file)
            entries, start = header(file, size=now[2])
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}. Was it copied whole?") from None
    twins = {kept: dropped for dropped, kept in entries.pop("__metadata__", {}).items() if dropped.endswith(TIED)}
    for name, entry in entries.items():
        if entry["dtype"] not in STORED:
            if name.endswith(MEANINGLESS):
                continue
            raise CheckpointError(f"{path}: {name} is stored as {entry['dtype']}; weights are {', '.join(STORED)}. Is the checkpoint quantised?")
        dtype, shape = np.dtype(NUMPY[entry["dtype"]]), tuple(entry["shape"])
        tensor = Tensor(path, now, start + entry["data_offsets"][0], dtype, shape)
        yield name, tensor
        if name in twins and twins[name] not in entries:
            yield twins[name], tensor


def header(file: BinaryIO, size: int) -> tuple[dict, int]:
    """The header's entries, and where their bytes begin. Raises ValueError unless the tensors fill the file without gap or overlap."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(LONGEST_HEADER, size - 8):
        raise ValueError(f"its header is {length} bytes, the file {size}")
    entries = json.loads(file.read(length).decode(), object_pairs_hook=once, parse_int=natural)
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    metadata = entries.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not text")
    json.dumps(entries, ensure_ascii=False).encode()  # raises where a name is no text
    tensors, end = {name: entry for name, entry in entries.items() if name != "__metadata__"}, 0
    for name, entry in tensors.items():
        if not well_formed(entry):
            raise ValueError(f"{name} is described by {entry}")
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != end or last - first != math.prod(entry["shape"]) * BYTES[entry["dtype"]]:
            raise ValueError(f"{name}, {entry['dtype']} {tuple(entry['shape'])}, has the bytes {first} to {last}, after those to {end}")
        end = last
    if 8 + length + end != size:
        raise ValueError(f"its header and tensors are {8 + length + end} bytes, the file {size}")
    return entries, 8 + length


def well_formed(entry: Any) -> bool:
    """Whether a header's entry of a tensor has the right keys and kinds of values."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"} or not isinstance(entry["dtype"], str):
        return False
    lists = [entry["shape"], entry["data_offsets"]]
    numbers = all(isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers) for numbers in lists)
    return entry["dtype"] in BYTES and numbers and len(entry["data_offsets"]) == 2


def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object; raises ValueError if a name is repeated."""
    if len(found := dict(items)) < len(items):
        raise ValueError(f"it names {Counter(name for name, _ in items).most_common(1)[0][0]} twice")
    return found


def natural(digits: str) -> int:
    """The integer that these digits spell; -1 for anything else."""
    return int(digits) if digits.isdigit() else -1  # "-0" is refused
