"""pytorch_model.bin without torch: a reader of torch.save's files that runs no code from them.

Such a file is a pickle, which is a program for a small stack machine, and the raw bytes of the storages. Python's pickle runs that program: it
imports and calls whatever the file names. Here the few instructions that a dict of tensors needs build plain descriptions (Pairs, Storage, Tensor);
constructors are only names, and anything else is refused. Storages are read one at a time.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opt_np.checkpoint import CheckpointError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file from before torch 1.6, or saved without the zip format
PICKLE_BYTES = 2_000_000  # at most, of the pickle; about 250 per tensor is usual, and the largest OPT has 1540 tensors
SHARED = 8  # a storage's tensors may have at most this many times its elements: tied weights have twice
MOST_AXES = 8
STORAGES = {"HalfStorage": "float16", "BFloat16Storage": "bfloat16", "FloatStorage": "float32", "DoubleStorage": "float64", "LongStorage": "int64",
            "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool"}  # fmt: skip
ORDERED_DICT, TENSOR, PARAMETER = "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
CONSTRUCTORS = {ORDERED_DICT, TENSOR, PARAMETER, *(f"torch {name}" for name in STORAGES)}
STRANGER = "Do not load this file elsewhere if it came from a stranger"


class Constructor(NamedTuple):
    """The name of something that Python's pickle would import and call."""

    name: str


class Pairs(list):
    """A dict's keys and values, never hashed or compared: a malicious file can have keys for which that takes forever."""


class Storage(NamedTuple):
    """A block of values in the file, of which tensors are views."""

    key: str
    dtype: np.dtype
    numel: int


class Tensor(NamedTuple):
    """A view of a storage, as torch defines it: offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Refused(Exception):
    """Raised for anything in the file that a dict of tensors does not need."""


def read_bin(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) for each tensor of a dict saved by torch.save, in its stored dtype. Raises CheckpointError; runs no code from the file."""
    import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)

    try:
        with open(path, "rb") as file:
            tensors, storage_bytes = opened_zip(file) if file.read(4) == b"PK\x03\x04" else opened_legacy(file)
            last: tuple[Any, bytes] = (None, b"")
            for name, tensor in sorted(tensors.items(), key=lambda item: item[1].storage.key):  # each storage is read once, however many share it
                if tensor.storage.key != last[0]:
                    last = (tensor.storage.key, storage_bytes(tensor.storage))
                yield name, view(name, tensor, last[1])
    except Refused as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle or archive can fail in any way at all
        raise CheckpointError(f"{path} cannot be read as a PyTorch checkpoint: {type(error).__name__}: {error}. Was it copied whole?") from None


def opened_zip(file: Any) -> tuple[dict[str, Tensor], Callable[[Storage], bytes]]:
    """The tensors' descriptions, from NAME/data.pkl, and a function that reads a storage's bytes, from NAME/data/KEY."""
    archive = zipfile.ZipFile(file)
    entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in entries if name.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1 or len(entries) != len(archive.infolist()):
        raise Refused(f"an archive with {len(pickles)} data.pkl among {len(archive.infolist())} entries of {len(entries)} names is not torch.save's")
    if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
        raise Refused("its entries are compressed, which torch.save never does; unpack it and zip it again without (zip -0)")
    if sum(info.file_size for info in entries.values()) > file.seek(0, io.SEEK_END):
        raise Refused("its entries are together longer than the file, so they overlap or are cut. Was it copied whole?")
    if entries[pickles[0]].file_size > PICKLE_BYTES:
        raise Refused(f"its data.pkl has {entries[pickles[0]].file_size:,} bytes; a dict of weights needs at most {PICKLE_BYTES:,}")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in entries:
        little_endian(archive.read(f"{root}byteorder") == b"little")

    def storage_bytes(storage: Storage) -> bytes:
        if f"{root}data/{storage.key}" not in entries:
            raise Refused(f"it lacks {root}data/{storage.key}, which its data.pkl names. Was it copied whole?")
        return archive.read(f"{root}data/{storage.key}")

    return tensor_dict(unpickled(io.BytesIO(archive.read(pickles[0])))), storage_bytes


def opened_legacy(file: Any) -> tuple[dict[str, Tensor], Callable[[Storage], bytes]]:
    """The same for the format before torch 1.6: five pickles (mark, version, machine, tensors, keys), then the storages in the keys' order."""
    file.seek(0)
    head = io.BytesIO(file.read(PICKLE_BYTES))
    if LEGACY_MAGIC.to_bytes(10, "little") not in head.getvalue()[:32] or unpickled(head) != LEGACY_MAGIC:
        raise Refused(f"it is not torch.save's: it starts with {head.getvalue()[:24]!r}. Is it a web page or LFS pointer? Download it again")
    _version, machine, found, keys = (unpickled(head) for _ in range(4))
    little_endian(not isinstance(machine, Pairs) or ("little_endian", False) not in machine)
    tensors = tensor_dict(found)
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise Refused("the storages that it lists are not those of its tensors. Was it copied whole?")
    file.seek(head.tell())
    start = {}
    for key in keys:
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != storages[key].numel:
            raise Refused(f"storage {key} holds {numel} numbers; its tensors want {storages[key].numel}. Was it copied whole?")
        start[key] = file.tell()
        file.seek(numel * storages[key].dtype.itemsize, io.SEEK_CUR)

    def storage_bytes(storage: Storage) -> bytes:
        file.seek(start[storage.key])
        return file.read(storage.numel * storage.dtype.itemsize)

    return tensors, storage_bytes


def little_endian(is_little: bool) -> None:
    """Raises Refused for a file from a big-endian machine."""
    if not is_little:
        raise Refused("it was saved on a big-endian machine; save it again on a little-endian one")


def unpickled(stream: io.BytesIO) -> Any:
    """The value that the stream's next pickle describes, built instruction by instruction; nothing is imported or called. Raises Refused."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def take(start: int) -> list[Any]:
        """Removes and returns the stack's values from `start` on."""
        if not 0 <= start <= len(stack):
            raise Refused("its pickle takes more from its stack than there is. Was it copied whole?")
        taken = stack[start:]
        del stack[start:]
        return taken

    def put_into(sort: type, items: Any) -> None:
        if type(stack[-1]) is not sort:
            raise Refused(f"its pickle fills a {kind(stack[-1])} like a {'list' if sort is list else 'dict'}, so it was not run. {STRANGER}")
        filled: Any = stack[-1]
        filled.extend(items if sort is list else zip(items[::2], items[1::2], strict=True))

    for opcode, argument, _ in pickletools.genops(stream):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": Pairs}[opcode.name]())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(take(len(stack) - int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(take(marks.pop())))
            case "APPEND" | "APPENDS":
                put_into(list, take(len(stack) - 1 if opcode.name == "APPEND" else marks.pop()))
            case "SETITEM" | "SETITEMS":
                put_into(Pairs, take(len(stack) - 2 if opcode.name == "SETITEM" else marks.pop()))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(constructor(argument))
            case "STACK_GLOBAL":
                stack.append(constructor(" ".join(take(len(stack) - 2))))
            case "REDUCE":
                stack.append(made(*take(len(stack) - 2)))
            case "BUILD":  # attributes of an object: state_dict()'s _metadata, which no weight needs
                take(len(stack) - 1)
                put_into(Pairs, [])
            case "BINPERSID":
                stack.append(storage(*take(len(stack) - 1)))
            case "STOP":
                return take(len(stack) - 1)[0]
            case name:
                raise Refused(f"its pickle uses {name}, which a dict of tensors never needs, so it was not run. {STRANGER}")
    raise Refused("its pickle has no end. Was it copied whole?")


def constructor(name: Any) -> Constructor:
    """A stand-in for what a pickle wants to import. Raises Refused for any name that weights do not need."""
    if name not in CONSTRUCTORS:
        raise Refused(f"it asks for {name.replace(' ', '.')}, which weights do not need, so it was not run; they need collections.OrderedDict, "
                      f"torch._utils._rebuild_tensor_v2 and torch's storages. {STRANGER}")  # fmt: skip
    return Constructor(name)


def made(function: Any, args: Any) -> Any:
    """A description of what the constructor would return. Raises Refused."""
    if isinstance(function, Constructor) and type(args) is tuple:
        if function.name == ORDERED_DICT and not args:
            return Pairs()
        if function.name == TENSOR and 4 <= len(args) <= 7:  # storage, offset, shape, strides; requires_grad, hooks, metadata
            if any(args[6:]):
                raise Refused("it holds a conjugated or negated view; save it again with tensor.resolve_conj().resolve_neg()")
            return tensor(*args[:4])
        if function.name == PARAMETER and args and isinstance(args[0], Tensor):
            return args[0]
    called = function.name if isinstance(function, Constructor) else f"a {kind(function)}"
    raise Refused(f"its pickle calls {called} as no dict of tensors does. {STRANGER}")


def storage(pid: Any) -> Storage:
    """The storage that a pickle's persistent id refers to. Raises Refused."""
    if type(pid) is tuple and len(pid) in (5, 6):  # "storage", type, key, device, length; a view of another, only from old versions of torch
        word, dtype, key, _, numel = pid[:5]
        if word == "storage" and isinstance(dtype, Constructor) and dtype.name.startswith("torch ") and isinstance(key, str) and not any(pid[5:]):
            return Storage(key, np.dtype(STORAGES[dtype.name.removeprefix("torch ")]), whole(numel))
    raise Refused(f"its pickle refers to a {kind(pid)} that is no storage of a known type. {STRANGER}")


def tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> Tensor:
    """A view of a storage, as torch rebuilds it. Raises Refused for arguments that no tensor has."""
    if not isinstance(storage, Storage) or type(shape) is not tuple or type(stride) is not tuple or not len(shape) == len(stride) <= MOST_AXES:
        raise Refused(f"a tensor whose storage is a {kind(storage)}, shape a {kind(shape)} and strides a {kind(stride)} makes no sense; "
                      f"shape and strides are as long as each other, and at most {MOST_AXES}")  # fmt: skip
    return Tensor(storage, whole(offset), tuple(map(whole, shape)), tuple(map(whole, stride)))


def whole(number: Any) -> int:
    """The number, if it can be a size. Raises Refused."""
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**63:
        told = number if isinstance(number, bool | float) or (isinstance(number, int) and abs(number) < 2**99) else f"a {kind(number)}"
        raise Refused(f"{told} stands where a size belongs; sizes are whole numbers from 0 to 2^63 - 1. Was it copied whole?")
    return number


def tensor_dict(found: Any) -> dict[str, Tensor]:
    """The described dict; raises Refused unless it maps names to tensors that agree on their storages."""
    if not isinstance(found, Pairs) or not found:
        raise Refused(f"it holds {'an empty' if found == [] else 'a'} {kind(found)}; a checkpoint is a dict of names and tensors")
    storages: dict[str, Storage] = {}
    wanted: dict[str, int] = {}
    for name, value in found:
        if not isinstance(name, str) or not isinstance(value, Tensor):
            which = f"{name!r} is" if isinstance(name, str) else f"under a {kind(name)} stands"
            raise Refused(f"{which} a {kind(value)}; a checkpoint is a dict of names and tensors. Save model.state_dict() alone")
        key, numel = value.storage.key, value.storage.numel
        if storages.setdefault(key, value.storage) != value.storage:
            first = f"{storages[key].numel} {storages[key].dtype}"
            raise Refused(f"storage {key!r} is {first} for one tensor and {numel} {value.storage.dtype} for {name!r}; save it again")
        wanted[key] = wanted.get(key, 0) + math.prod(value.shape)
        if wanted[key] > SHARED * numel:
            told = f"its tensors up to {name!r} take {wanted[key]} numbers from a storage of {numel}"
            raise Refused(f"{told}; more than {SHARED} names for one number is no model. Save them apart")
    if len(dict(found)) != len(found):
        raise Refused("two of its tensors have one name; save it again")
    return dict(found)


def kind(value: Any) -> str:
    """The kind of a value, without looking inside: some take forever to print."""
    return {"Pairs": "dict", "Constructor": "class", "NoneType": "None"}.get(type(value).__name__, type(value).__name__.lower())


def view(name: str, tensor: Tensor, raw: bytes) -> np.ndarray:
    """The tensor as a view of its storage's bytes. Raises Refused if it would reach beyond them."""
    dtype, numel = tensor.storage.dtype, tensor.storage.numel
    if len(raw) != numel * dtype.itemsize:
        raise Refused(f"the storage of {name!r} has {len(raw)} bytes; {numel} numbers of {dtype} take {numel * dtype.itemsize}. Was it copied whole?")
    if not math.prod(tensor.shape):
        return np.empty(tensor.shape, dtype)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    if last >= numel:
        raise Refused(f"{name!r} {tensor.shape} with strides {tensor.stride} reaches number {last} of a storage of {numel}. Was it copied whole?")
    steps = [step * dtype.itemsize if n > 1 else 0 for n, step in zip(tensor.shape, tensor.stride, strict=True)]
    return np.lib.stride_tricks.as_strided(np.frombuffer(raw, dtype)[tensor.offset :], tensor.shape, steps, writeable=False)
