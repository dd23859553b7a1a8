"""TensorFlow's and Flax's checkpoints (tf_model.h5, flax_model.msgpack and their shards), read under PyTorch's names and in PyTorch's orientation.

Both store a matrix as (in, out), call it `kernel`, and hold the tied head once, as embed_tokens. HDF5 needs h5py; msgpack, a small format, is read
here: maps of names, whose leaves are the tensors' bytes. Nothing in either file is ever executed.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opt_np.checkpoint import FLOATS, CheckpointError

LEAVES = dict.fromkeys(("kernel", "weight", "embedding", "embeddings", "gamma", "scale"), "weight") | {"bias": "bias", "beta": "bias"}


def read_h5(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) for each weight of a TensorFlow file, in its stored dtype. Raises CheckpointError for a damaged one, or without h5py."""
    import ml_dtypes

    try:
        import h5py
    except ImportError:
        raise CheckpointError(f'{path} needs h5py to be read: pip install "opt-np[frameworks]"') from None
    name, names = "", []
    try:
        with h5py.File(path, "r") as file:
            file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)  # follows no link out of the file
            for name in names:
                data = file[name]
                stored = "bfloat16" if data.dtype == "V2" else data.dtype.name  # Keras leaves a bfloat16 as two bytes of no declared meaning
                if stored not in FLOATS or data.shape is None:
                    raise ValueError(f"it is {stored} {data.shape}; weights are {', '.join(FLOATS)}")
                here = min(data.id.get_storage_size(), os.path.getsize(path))  # checked before allocating: the shape in the file need not be true
                if data.chunks or data.external or data.nbytes > here:
                    raise ValueError(f"it is {data.shape}, and the file does not hold that many {stored} in one uncompressed piece")
                array = data[()]
                yield as_pytorch(name, array.view(ml_dtypes.bfloat16) if stored == "bfloat16" else array)
    except Exception as error:  # HDF5 raises a dozen types of errors
        raise damaged(path, name, "HDF5", error) from None


def read_msgpack(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) for each weight of a Flax file, in its stored dtype. Raises CheckpointError for a damaged one."""
    name = ""
    try:
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # tensors stay on disk until they are used
        tree, end = unpack(data)
        if end != len(data):
            raise ValueError(f"{len(data) - end} bytes follow its end")
        for name, leaf in leaves(tree):
            yield as_pytorch(name, flax_array(leaf))
    except (ValueError, TypeError, LookupError, RecursionError, OSError) as error:
        raise damaged(path, name, "msgpack", error) from None


def damaged(path: str | Path, name: str, kind: str, error: Exception) -> CheckpointError:
    """The error for a file that cannot be read, in one line."""
    part, told = f", {name!r}" if name else "", " ".join(str(error).split())
    return CheckpointError(f"{path}{part} cannot be read as {kind}: {told}. Is it an OPT checkpoint's, and was it copied whole?")


def as_pytorch(path: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """PyTorch's name and orientation: …/model/decoder/layers.0/fc1/kernel:0 (in, out) -> model.decoder.layers.0.fc1.weight (out, in), contiguous."""
    *modules, leaf = path.removesuffix(":0").replace("/", ".").split(".")
    if leaf not in LEAVES:
        raise ValueError(f"it is called none of {', '.join(LEAVES)}")
    if leaf == "kernel":
        if array.ndim != 2:
            raise ValueError(f"it is {array.shape}; a kernel is (in, out)")
        array = array.T
    name = ".".join([*modules, LEAVES[leaf]])
    _, inside, rest = f".{name}".rpartition(".decoder.")  # before it are the names of the class and, twice, of its parts
    return f"model.decoder.{rest}" if inside else name, np.asarray(array, array.dtype.newbyteorder("="), order="C")


# Flax: a tree of maps, each leaf an extension of type 1 (array) or 3 (scalar) that holds [shape, dtype's name, bytes], again in msgpack


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of a tree of maps. An array that Flax cut into chunks is one leaf."""
    if not isinstance(tree, dict) or "__msgpack_chunked_array__" in tree:
        yield path, tree
        return
    for name, branch in tree.items():
        yield from leaves(branch, f"{path}/{name}" if path else name)


def flax_array(leaf: Any) -> np.ndarray:
    """The array that a leaf encodes, a view of the file unless it was cut into chunks."""
    if isinstance(leaf, dict):  # over 2^30 bytes: the flattened array in pieces; tuples became maps {"0": …, "1": …}
        shape, chunks = ([part[str(i)] for i in range(len(part))] for part in (leaf["shape"], leaf["chunks"]))
        pieces = [flax_array(chunk) for chunk in chunks]
        if len({piece.dtype for piece in pieces}) != 1:
            raise ValueError("its chunks are of several dtypes, or there are none")
        return np.concatenate(pieces).reshape(shape)
    import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)

    kind, content = leaf
    (shape, name, buffer), _ = unpack(content)
    if kind not in (1, 3) or name not in FLOATS:
        raise ValueError(f"extension {kind}, dtype {name!r}; weights are of extension 1, {', '.join(FLOATS)}")
    return np.frombuffer(buffer, name).reshape(shape)  # ValueError unless bytes and shape agree


# msgpack: one byte (the tag) gives the kind of value and, if small, its length; otherwise the length is in the next 1, 2, 4 or 8 bytes, big-endian

SMALL = ((0x80, 0x00, "int"), (0x90, 0x80, "map"), (0xA0, 0x90, "list"), (0xC0, 0xA0, "str"))  # tags below the first: length = tag - second
TAGS = {first + i: (kind, 2**i * width) for first, kind, width, sizes in
        ((0xC4, "bytes", 1, 3), (0xC7, "ext", 1, 3), (0xCC, "int", 1, 4), (0xD9, "str", 1, 3), (0xDC, "list", 2, 1), (0xDE, "map", 2, 1))
        for i in range(sizes)}  # fmt: skip


def unpack(data: memoryview, at: int = 0) -> tuple[Any, int]:
    """The value that starts at this byte, and where it ends. Bytes stay a view of data; an extension is (type, view). Raises ValueError."""
    if at >= len(data):
        raise ValueError(f"it ends at byte {len(data)}, where a value should begin")
    tag, start = data[at], at + 1
    if tag < 0xC0:
        kind, amount = next((kind, tag - base) for end, base, kind in SMALL if tag < end)
    elif tag == 0xC3:
        return True, start
    elif 0xD4 <= tag <= 0xD8:
        kind, amount = "ext", 2 ** (tag - 0xD4)
    elif tag in TAGS:
        kind, width = TAGS[tag]
        amount, start = int.from_bytes(data[start : start + width], "big"), start + width
    else:
        raise ValueError(f"byte {at} is {tag:#x}, which begins nothing that a Flax checkpoint holds")
    if kind == "int":
        return amount, start
    if kind in ("map", "list"):
        values = []
        for _ in range(2 * amount if kind == "map" else amount):
            value, start = unpack(data, start)
            values.append(value)
        if kind == "list":
            return values, start
        keys = values[::2]
        if not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
            raise ValueError(f"the map at byte {at} does not name its parts, each once")
        return dict(zip(keys, values[1::2], strict=True)), start
    content = start + (kind == "ext")  # an extension's type is between its length and its content
    end = content + amount
    if end > len(data):
        raise ValueError(f"it ends at byte {len(data)}, inside a value that goes on to byte {end}")
    view = data[content:end]
    return str(view, "utf-8") if kind == "str" else (data[start], view) if kind == "ext" else view, end
