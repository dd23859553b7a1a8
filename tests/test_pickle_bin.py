"""pytorch_model.bin: what torch.save wrote is read as torch.load reads it, to the bit; what others wrote runs nothing, costs little, is refused."""

import io
import json
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_np import CheckpointError, checkpoint, pickle_bin
from opt_np.tree import flatten

FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}, "protocol 4": {"pickle_protocol": 4}, "protocol 5": {"pickle_protocol": 5}}
DTYPES = ("float16", "bfloat16", "float32", "float64")
SIZES = [-1, 2**63, 2**200, True, "4", None, 1.0, (1,), [], {}]


def read(path):
    return dict(pickle_bin.read_bin(path))


def refused(path, *words):
    """The message of the one error that reading may raise."""
    with pytest.raises(CheckpointError) as error:
        read(path)
    assert_useful(str(error.value), str(path), *words)


def assert_useful(message, *words):
    assert all(word in message for word in words), message
    assert message.isprintable()
    assert len(message) <= checkpoint.LONGEST_MESSAGE
    assert not message.rstrip().endswith(":"), message


def assert_same(ours, theirs):
    """The same names, types, shapes and bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype.name, ours[name].shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)), name
        bits = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).reshape(-1).view(torch.uint8)
        assert ours[name].tobytes() == bits.numpy().tobytes(), name


def as_torch_loads(path, weights_only=True):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old formats
        return torch.load(path, weights_only=weights_only)  # which knows no protocol but 2


def agrees_with_torch(path, how):
    assert_same(read(path), as_torch_loads(path, "protocol" not in how))


# What torch.save writes


def everything(dtype):
    """Each way in which a tensor can lie in its storage, and each wrapping that a checkpoint has."""
    torch.manual_seed(0)
    base = torch.randn(6, 5, dtype=torch.float64).to(getattr(torch, dtype))
    base[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    return OrderedDict(
        whole=base, tied=base, transposed=base.T, rows=base[2:4], columns=base[:, 1::2], element=base[3, 3],
        one=base[4:5, 2:3].T, three=torch.randn(2, 3, 4).to(base.dtype).permute(2, 0, 1), scalar=torch.tensor(3.5).to(base.dtype),
        empty=torch.empty(0, 3, dtype=base.dtype), none=base[3:3],
        trained=torch.nn.Parameter(base.clone()), view_of_trained=torch.nn.Parameter(base)[1:].detach())  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", FORMATS)
def test_every_view_reads_as_torch_reads_it(tmp_path, how, dtype):
    torch.save(everything(dtype), tmp_path / "x.bin", **FORMATS[how])
    agrees_with_torch(tmp_path / "x.bin", how)


@pytest.mark.parametrize("how", FORMATS)
def test_a_state_dict_reads_as_torch_reads_it(tmp_path, how):
    module = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 7, bias=False)).half()
    module[2].weight = module[0].weight  # tied
    saved = module.state_dict()
    assert saved._metadata  # an attribute of the dict, which the pickle sets with BUILD
    torch.save(saved, tmp_path / "x.bin", **FORMATS[how])
    agrees_with_torch(tmp_path / "x.bin", how)


@given(data=st.data())
def test_any_view_reads_as_torch_reads_it(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("view") / "x.bin"
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    stride = data.draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
    offset = data.draw(st.integers(0, 9))
    base = torch.arange(200, dtype=torch.float32)
    how = data.draw(st.sampled_from(list(FORMATS)))
    torch.save({"a": base, "x": base.as_strided(shape, stride, offset)}, path, **FORMATS[how])
    agrees_with_torch(path, how)


@given(numel=st.integers(0, 12), offset=st.integers(0, 14), axes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=3))
def test_a_view_reaches_what_it_names_or_is_refused(numel, offset, axes):
    shape, stride = tuple(n for n, _ in axes), tuple(step for _, step in axes)
    tensor = pickle_bin.Tensor(pickle_bin.Storage("0", np.dtype("float32"), numel), offset, shape, stride)
    reached = np.array([offset + int(np.dot(index, stride)) for index in np.ndindex(shape)])
    raw = np.arange(numel, dtype=np.float32)
    if reached.size and reached.max() >= numel:
        with pytest.raises(pickle_bin.Refused, match="reaches number"):
            pickle_bin.view("x", tensor, raw.tobytes())
    else:
        np.testing.assert_array_equal(pickle_bin.view("x", tensor, raw.tobytes()).ravel(), reached)


@pytest.mark.parametrize("how", FORMATS)
def test_tied_names_in_different_shards(tmp_path, how):
    cfg = small.config()
    tensors = {name: torch.tensor(a) for name, a in small.named(cfg).items()}
    first = dict(list(tensors.items())[:9])
    second = {name: t for name, t in tensors.items() if name not in first} | {"lm_head.weight": tensors["model.decoder.embed_tokens.weight"]}
    shards = {"pytorch_model-00001-of-00002.bin": first, "pytorch_model-00002-of-00002.bin": second}
    for name, part in shards.items():
        torch.save(part, tmp_path / name, **FORMATS[how])
    index = {"weight_map": {tensor: name for name, part in shards.items() for tensor in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_dict()))
    read_params, wanted = flatten(checkpoint.load(tmp_path)[0]), flatten(small.params(cfg))
    assert read_params.keys() == wanted.keys()
    assert all(np.array_equal(read_params[name], wanted[name]) for name in wanted)


def test_reading_imports_neither_torch_nor_what_could_run_a_pickle(tmp_path):
    torch.save(everything("bfloat16"), tmp_path / "x.bin")
    code = (
        "import sys; from pathlib import Path; from opt_np.pickle_bin import read_bin; import pickle\n"
        "pickle.load = pickle.loads = pickle.Unpickler = pickle._Unpickler = None\n"
        f"print(len(dict(read_bin(Path({str(tmp_path / 'x.bin')!r})))), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(len(everything("bfloat16"))), "False"], done.stderr


@pytest.mark.parametrize("how", FORMATS)
def test_a_negated_view_is_refused_and_not_read_with_the_wrong_sign(tmp_path, how):
    torch.save({"x": torch._neg_view(torch.arange(4.0))}, tmp_path / "x.bin", **FORMATS[how])
    refused(tmp_path / "x.bin", "negated", "resolve_neg")


# An assembler of pickles


class Code(bytes):
    """Instructions as they are."""


def call(module, name, *args):
    return Code(b"c" + f"{module}\n{name}\n".encode() + assembled(args) + b"R")


def assembled(value):
    """The instructions that make a value."""
    match value:
        case Code():
            return value
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            number = pickle.encode_long(value)
            return b"\x8a" + bytes([len(number)]) + number
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode("utf-8", "surrogatepass"))) + value.encode("utf-8", "surrogatepass")
        case tuple():
            return b"(" + b"".join(map(assembled, value)) + b"t"
        case list():
            return b"](" + b"".join(map(assembled, value)) + b"e"
        case dict():
            return b"}(" + b"".join(assembled(key) + assembled(v) for key, v in value.items()) + b"u"
    raise TypeError(value)


FLOATS = Code(b"ctorch\nFloatStorage\n")
EMPTY = call("collections", "OrderedDict")


def storage(kind=FLOATS, key="0", numel=4, view=()):
    return Code(assembled(("storage", kind, key, "cpu", numel, *view)) + b"Q")


def tensor(stored=None, offset=0, shape=(4,), stride=(1,), hooks=EMPTY, metadata=()):
    return call("torch._utils", "_rebuild_tensor_v2", stored or storage(), offset, shape, stride, False, hooks, *metadata)


def program(value):
    return b"\x80\x02" + assembled(value) + b"."


FOUR = np.arange(4, dtype=np.float32).tobytes()


def zipped(path, value, storages=(("0", FOUR),), compression=zipfile.ZIP_STORED, extra=()):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", value if isinstance(value, bytes) and not isinstance(value, Code) else program(value))
        for key, raw in storages:
            archive.writestr(f"archive/data/{key}", raw)
        for name, raw in extra:
            archive.writestr(name, raw)
    return path


def legacy(path, value, keys=("0",), raw=b"\x04" + bytes(7) + FOUR, little=True):
    pickles = (pickle_bin.LEGACY_MAGIC, 1001, {"protocol_version": 1001, "little_endian": little}, value, list(keys))
    path.write_bytes(b"".join(map(program, pickles)) + raw)
    return path


WRITERS = {"zip": zipped, "legacy": legacy}


@pytest.mark.parametrize("write", WRITERS)
def test_the_assembler_writes_what_both_read(tmp_path, write):
    """Else the refusals below would prove nothing."""
    four = storage(view=(None,) if write == "legacy" else ())
    value = {"a": tensor(four), "b": tensor(four, offset=1, shape=(2, 1), stride=(2, 7)), "c": tensor(four, metadata=({},))}
    path = WRITERS[write](tmp_path / "x.bin", value, **({} if write == "legacy" else {"extra": [("archive/version", "3\n")]}))
    assert_same(read(path), as_torch_loads(path))


# Attacks


def attacks(canary):
    """What would touch a file, in each way that a pickle can name, call or build something."""
    touch = f"touch {canary}"
    python = f"open({canary!r}, 'w')"
    inner = pickle.dumps({"x": 1}).decode("latin-1")
    out = {
        "os.system": call("os", "system", touch),
        "posix.system": call("posix", "system", touch),
        "nt.system": call("nt", "system", touch),
        "eval": call("builtins", "eval", python),
        "exec": call("builtins", "exec", python),
        "Python 2's eval": call("__builtin__", "eval", python),
        "open": call("builtins", "open", canary, "w"),
        "subprocess.call": call("subprocess", "call", ["touch", canary]),
        "subprocess.Popen": call("subprocess", "Popen", ["touch", canary]),
        "getattr": call("builtins", "getattr", Code(b"cos\nsystem\n"), "__call__"),
        "import": call("builtins", "__import__", "os"),
        "runpy": call("runpy", "_run_code", python, {}),
        "nested pickle": call("pickle", "loads", inner),
        "torch.load": call("torch", "load", canary),
        "torch.storage": call("torch.storage", "_load_from_bytes", inner),
        "numpy": call("numpy.core.multiarray", "_reconstruct", Code(b"cnumpy\nndarray\n"), (0,), "b"),
        "numpy's new name": call("numpy._core.multiarray", "_reconstruct", Code(b"cnumpy\nndarray\n"), (0,), "b"),
        "torch, another name": call("torch", "Tensor"),
        "torch, a dotted name": call("torch", "serialization.os.system", touch),
        "a dotted name of a good one": Code(b"\x8c\x05torch\x8c\x1aFloatStorage.__class__.mro\x93"),
        "OrderedDict's class": Code(b"\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93" + assembled((canary,)) + b"R"),
        "STACK_GLOBAL": Code(b"\x8c\x02os\x8c\x06system\x93" + assembled((touch,)) + b"R"),
        "STACK_GLOBAL of numbers": Code(b"K\x01K\x02\x93"),
        "a name with a line end": Code(assembled("os\n\x1b[2J") + assembled("system") + b"\x93"),
        "INST": Code(b"(" + assembled(touch) + b"ios\nsystem\n"),
        "OBJ": Code(b"(cos\nsystem\n" + assembled(touch) + b"o"),
        "NEWOBJ": Code(b"cbuiltins\nobject\n)\x81"),
        "NEWOBJ of a good one": Code(b"ccollections\nOrderedDict\n)\x81"),
        "NEWOBJ_EX": Code(b"ccollections\nOrderedDict\n)}\x92"),
        "EXT1": Code(b"\x82\x01"),
        "EXT2": Code(b"\x83\x01\x00"),
        "EXT4": Code(b"\x84\x01\x00\x00\x00"),
        "PERSID": Code(b"P0\n"),
        "BYTEARRAY8": Code(b"\x96" + struct.pack("<Q", 2**62)),
        "BINBYTES8": Code(b"\x8e" + struct.pack("<Q", 2**40) + b"x"),
        "NEXT_BUFFER": Code(b"\x97"),
        "an opcode that is none": Code(b"\xff"),
        "BUILD on a constructor": Code(FLOATS + assembled({"__reduce__": canary}) + b"b"),
        "BUILD on a storage": Code(storage() + assembled((3, "<", None, None, None, -1, -1, 0)) + b"b"),
        "BUILD on a tensor": Code(tensor() + assembled({"storage": 1}) + b"b"),
        "BUILD on a tuple": Code(b")" + assembled((None, {"__class__": 1})) + b"b"),
        "a call of a storage's type": call("torch", "FloatStorage", 2**40),
        "a call of a string": Code(assembled("os.system") + assembled((touch,)) + b"R"),
        "a call of a call": Code(EMPTY + b")R"),
        "a call with a list": Code(b"ccollections\nOrderedDict\n" + assembled([touch]) + b"R"),
        "OrderedDict of something": call("collections", "OrderedDict", [[canary, canary]]),
        "items of a tensor": Code(tensor() + assembled("x") + assembled("y") + b"s"),
        "items of a list": Code(b"]" + assembled("x") + assembled("y") + b"s"),
        "a parameter of nothing": call("torch._utils", "_rebuild_parameter"),
        "a parameter of a name": call("torch._utils", "_rebuild_parameter", canary, True, EMPTY),
        "a tensor of nothing": call("torch._utils", "_rebuild_tensor_v2"),
        "an older tensor": call("torch._utils", "_rebuild_tensor", storage(), 0, (4,), (1,)),
        "get before put": Code(b"h\x05"),
        "marks below the ground": Code(b"tttt"),
        "a stack below the ground": Code(b"RRRR"),
    }
    return out


ATTACKS = list(attacks("canary"))
PLACES = {
    "value": lambda code: {"a": tensor(), "x": code},
    "alone": lambda code: code,
    "hooks, which are not used": lambda code: {"a": tensor(hooks=code)},
    "state, which is not used": lambda code: Code(assembled({"a": tensor()}) + code + b"b"),
    "shape": lambda code: {"a": tensor(shape=code)},
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_a_file_brings_along_is_run(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    for write in WRITERS.values():
        for place in PLACES.values():
            refused(write(tmp_path / "x.bin", place(attacks("canary")[attack])))
            assert not Path("canary").exists(), (write, place)


@pytest.mark.parametrize("attack", ["os.system", "posix.system", "eval", "exec", "open", "subprocess.call", "STACK_GLOBAL", "INST", "OBJ"])
def test_pythons_own_pickle_would_have_run_it(tmp_path, monkeypatch, attack):
    """The canary can be touched: so the test above can fail."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pickle.loads(program(attacks("canary")[attack]))
    assert Path("canary").exists()


def test_a_stranger_is_named(tmp_path):
    refused(zipped(tmp_path / "x.bin", {"a": call("os", "system", "true")}), "os.system", "not run", "stranger")


# Descriptions that make no sense


@pytest.mark.parametrize("size", SIZES, ids=repr)
@pytest.mark.parametrize("where", ["offset", "shape", "stride", "numel"])
def test_a_size_that_is_none(tmp_path, where, size):
    code = {
        "offset": lambda: tensor(offset=size),
        "shape": lambda: tensor(shape=(size,)),
        "stride": lambda: tensor(stride=(size,)),
        "numel": lambda: tensor(storage(numel=size)),
    }[where]()
    for write in WRITERS.values():
        refused(write(tmp_path / "x.bin", {"x": code}), "stands where a size belongs")


SENSELESS = {
    "one beyond": (tensor(offset=1), "reaches number 4 of a storage of 4"),
    "a row beyond": (tensor(shape=(5,)), "5"),
    "a step beyond": (tensor(shape=(2,), stride=(4,)), "reaches number 4"),
    "far beyond": (tensor(offset=2**62), "reaches number"),
    "a terabyte": (tensor(shape=(2**40,), stride=(0,)), "from a storage of 4"),
    "more than there are bytes": (tensor(shape=(2**62, 2**62), stride=(0, 0)), "from a storage of 4"),
    "nine axes": (tensor(shape=(1,) * 9, stride=(1,) * 9), "at most 8"),
    "fewer strides than axes": (tensor(stride=()), "as long as each other"),
    "a shape that is a list": (tensor(shape=[4]), "shape a list"),
    "a shape that is a word": (tensor(shape="4", stride="1"), "shape a str"),
    "no storage": (tensor(assembled("0") and Code(assembled("0"))), "storage is a str"),
    "a word for a type": (tensor(storage("FloatStorage")), "no storage of a known type"),
    "a tensor for a type": (tensor(storage(tensor())), "no storage of a known type"),
    "a dict for a type": (tensor(storage(Code(b"ccollections\nOrderedDict\n"))), "no storage of a known type"),
    "a type for a key": (tensor(storage(key=FLOATS)), "no storage of a known type"),
    "a number for a key": (tensor(storage(key=0)), "no storage of a known type"),
    "a view of a storage": (tensor(storage(view=(("1", 0, 4),))), "no storage of a known type"),
    "a storage of too many parts": (tensor(storage(view=(None, None))), "no storage of a known type"),
    "a storage that is no tuple": (tensor(Code(assembled("storage") + b"Q")), "no storage of a known type"),
    "a complex storage": (tensor(storage(Code(b"ctorch\nComplexFloatStorage\n"))), "ComplexFloatStorage"),
    "metadata": (tensor(metadata=({"neg": True},)), "negated"),
    "wrong length": (tensor(storage(numel=3), shape=(3,)), "3"),
    "too great a length": (tensor(storage(numel=2**61), shape=(3,)), "Was it copied whole"),
    "another type": (tensor(storage(Code(b"ctorch\nDoubleStorage\n"))), "Was it copied whole"),
}


@pytest.mark.parametrize("case", SENSELESS)
@pytest.mark.parametrize("write", WRITERS)
def test_a_description_that_makes_no_sense(tmp_path, write, case):
    code, word = SENSELESS[case]
    refused(WRITERS[write](tmp_path / "x.bin", {"x": code}), word)


def test_a_storage_described_twice_differently(tmp_path):
    value = {"a": tensor(), "b": tensor(storage(Code(b"ctorch\nIntStorage\n")))}
    refused(zipped(tmp_path / "x.bin", value), "float32", "int32", "'b'")


def test_one_storage_for_many_names(tmp_path):
    """Else a small file could fill the memory, each name becoming an array of its own."""
    assert len(read(zipped(tmp_path / "x.bin", {f"{i}": tensor() for i in range(pickle_bin.SHARED)}))) == pickle_bin.SHARED
    refused(zipped(tmp_path / "x.bin", {f"{i}": tensor() for i in range(pickle_bin.SHARED + 1)}), "storage of 4")


def test_a_name_twice(tmp_path):
    refused(zipped(tmp_path / "x.bin", Code(b"}(" + 2 * (assembled("a") + tensor()) + b"u")), "one name")


CONTENTS = {
    "a list": ([tensor()], "a list"),
    "a tensor": (tensor(), "a tensor"),
    "nothing": (None, "None"),
    "an empty dict": ({}, "an empty dict"),
    "a training checkpoint": ({"model": {"a": tensor()}, "optimizer": {"state": {0: 1}}, "epoch": 3}, "'model' is a dict"),
    "a number beside": ({"a": tensor(), "step": 3}, "'step' is a int"),
    "a number for a name": ({3: tensor()}, "under a int"),
    "a tuple for a name": ({(): tensor()}, "under a tuple"),
    "a tensor for a name": (Code(b"}(" + tensor() + tensor() + b"u"), "under a tensor"),
    "half an item": (Code(b"}(" + assembled("a") + b"u"), "ValueError"),
    "a name that steers": ({"a\n\x1b[2J\u202e\ud800": 1}, "\\n", "\\x1b"),
    "a name without end": ({"a" * 100_000: 1}, "aaa", "Save model.state_dict() alone"),
}


@pytest.mark.parametrize("case", CONTENTS)
@pytest.mark.parametrize("write", WRITERS)
def test_what_is_no_dict_of_tensors(tmp_path, write, case):
    value, *words = CONTENTS[case]
    refused(WRITERS[write](tmp_path / "x.bin", value), *words)


def test_saving_too_much_with_torch(tmp_path):
    model = torch.nn.Linear(2, 2)
    torch.save({"model": model.state_dict(), "optimizer": torch.optim.Adam(model.parameters()).state_dict(), "step": 1}, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", "'model' is a dict", "Save model.state_dict() alone")
    torch.save(model, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", "NEWOBJ" if sys.version_info < (3, 11) else "torch.nn.modules.linear.Linear")


# Costs: a child with little memory and a limit of time reads them all


def costly():
    """Small files that cost without end where values are hashed, printed, compared or copied."""
    doubled = Code(b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(200)))  # 2^200 empty tuples
    deep = Code(b")" + b"\x85" * 100_000)
    itself = Code(b"]q\x00h\x00a")
    ring = Code(b"}q\x00" + assembled("a") + b"h\x00s")
    shapes = Code(b"(" + b"K\x01" * 300_000 + b"tq\x010")
    many = b"".join(assembled(f"{i}") + tensor(shape=Code(b"h\x01"), stride=Code(b"h\x01")) for i in range(4000))
    clash = Code(b"}(" + b"".join(assembled(i * (2**61 - 1)) + b"N" for i in range(1, 100_000)) + b"u")  # ints that all hash to 0
    for name, code in {"doubled": doubled, "deep": deep, "itself": itself, "ring": ring}.items():
        yield f"{name} as a name", Code(b"}" + code + tensor() + b"s")
        yield f"{name} as a tensor", Code(b"}" + assembled("a") + code + b"s")
        yield f"{name} alone", code
        yield f"{name} as a shape", {"x": tensor(shape=code)}
        yield f"{name} as a size", {"x": tensor(offset=code)}
        yield f"{name} as a storage", {"x": tensor(code)}
        yield f"{name} as a key", {"x": tensor(storage(key=code))}
        yield f"{name} as a type", {"x": tensor(storage(kind=code))}
        yield f"{name} as a device's number", {"x": Code(code + b"Q")}
        yield f"{name} as a function", Code(code + b")R")
        yield f"{name} as arguments", Code(b"ccollections\nOrderedDict\n" + code + b"R")
    yield "long shapes", Code(shapes[:-1] + b"}(" + many + b"u")
    yield "long storages", Code(shapes[:-1] + b"}(" + b"".join(assembled(f"{i}") + b"h\x01Q" for i in range(4000)) + b"u")
    yield "clashes", clash
    yield "a far place in the memo", Code(b"}r\xff\xff\xff\xff")
    yield "a long word", Code(b"X\xff\xff\xff\xff")
    yield "lists", Code(b"]" * 200_000)
    yield "marks", Code(b"(" * 200_000)
    yield "too long", Code(b"N" * (pickle_bin.PICKLE_BYTES + 1))


def test_small_files_cost_little(tmp_path):
    resource = pytest.importorskip("resource")
    for i, (_, value) in enumerate(costly()):
        WRITERS["legacy" if i % 5 == 4 else "zip"](tmp_path / f"{i}.bin", value)
    code = (
        "import sys; from pathlib import Path; from opt_np.pickle_bin import read_bin; from opt_np import CheckpointError\n"
        "for i in range(int(sys.argv[1])):\n"
        "    try:\n"
        "        dict(read_bin(Path(f'{i}.bin')))\n"
        "        print('accepted', flush=True)\n"
        "    except CheckpointError as error:\n"
        "        print(error, flush=True)\n"
    )
    count, root = i + 1, str(Path(__file__).parent.parent)

    def little():
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))

    done = subprocess.run([sys.executable, "-c", code, str(count)], cwd=tmp_path, env={"PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=100, preexec_fn=little)  # fmt: skip
    told = done.stdout.splitlines()
    assert len(told) == count, done.stderr
    for i, line in enumerate(told):
        assert_useful(line, f"{i}.bin")
        assert "MemoryError" not in line


# Files that are something else, or were damaged


def saved(how="zip"):
    stream = io.BytesIO()
    torch.save({"a": torch.arange(6.0).view(2, 3), "b.é": torch.nn.Parameter(torch.ones(3).half())}, stream, **FORMATS[how])
    return stream.getvalue()


NO_CHECKPOINTS = {
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 25\n", "git-lfs", "Download it again"),
    "a web page": (b"<!DOCTYPE html>\n<html><title>404</title>", "DOCTYPE", "web page"),
    "nothing": (b"", "b''"),
    "zeros": (bytes(1000), "\\x00"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "not torch.save's"),
    "a plain pickle": (pickle.dumps({"a": 1}), "not torch.save's"),
    "the start of a zip": (b"PK\x03\x04", "copied whole"),
    "steering": (b"\x1b[2J\n", "\\x1b"),
    "an empty archive": (b"PK\x05\x06" + bytes(18), "not torch.save's"),
}


@pytest.mark.parametrize("case", NO_CHECKPOINTS)
def test_a_file_that_is_something_else(tmp_path, case):
    content, *words = NO_CHECKPOINTS[case]
    (tmp_path / "x.bin").write_bytes(content)
    refused(tmp_path / "x.bin", *words)


def test_an_archive_that_torch_did_not_write(tmp_path):
    path, value = tmp_path / "x.bin", {"x": tensor()}
    assert read(zipped(path, value))
    refused(zipped(path, value, compression=zipfile.ZIP_DEFLATED), "compressed")
    refused(zipped(path, value, extra=[("other/data.pkl", program(value))]), "2 data.pkl")
    refused(zipped(path, value, storages=[("1", FOUR)]), "lacks archive/data/0", "copied whole")
    refused(zipped(path, value, extra=[("archive/byteorder", b"big")]), "big-endian", "save it again")
    refused(legacy(path, value, little=False), "big-endian", "save it again")
    for raw in (b"", FOUR[:-1], FOUR + b"\0", FOUR + FOUR):
        refused(zipped(path, value, storages=[("0", raw)]), f"{len(raw)} bytes", "'x'", "copied whole")
    refused(zipped(path, b"N" * (pickle_bin.PICKLE_BYTES + 1)), "2,000,001", "2,000,000")
    with pytest.warns(UserWarning, match="Duplicate name"):
        zipped(path, value, storages=[("0", FOUR), ("0", FOUR)])
    refused(path, "3 entries of 2 names")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/version", "3")
    refused(path, "0 data.pkl")


def test_entries_that_overlap(tmp_path):
    """Else a small archive could hold much: many names, the same bytes."""
    path = zipped(tmp_path / "x.bin", {"x": tensor()}, storages=[("0", FOUR * 1000), ("1", b"")])
    content = path.read_bytes()
    entry = content.rindex(b"PK\x01\x02")  # of storage 1: now its size is storage 0's
    path.write_bytes(content[: entry + 20] + struct.pack("<II", 16000, 16000) + content[entry + 28 :])
    refused(path, "longer than the file")


@pytest.mark.parametrize("keys", [[], ["1"], ["0", "0"], ["0", "1"], [0], [["0"]], "0", None], ids=repr)
def test_storages_that_a_legacy_file_does_not_list(tmp_path, keys):
    path = tmp_path / "x.bin"
    pickles = (pickle_bin.LEGACY_MAGIC, 1001, {"little_endian": True}, {"x": tensor()}, keys)
    path.write_bytes(b"".join(map(program, pickles)) + struct.pack("<q", 4) + FOUR)
    refused(path, "not those of its tensors")


@pytest.mark.parametrize("numel", [-1, 0, 3, 5, 2**62])
def test_a_legacy_storage_of_another_length(tmp_path, numel):
    refused(legacy(tmp_path / "x.bin", {"x": tensor()}, raw=struct.pack("<q", numel) + FOUR), str(numel), "4")


def test_a_damaged_storage(tmp_path):
    content = bytearray(saved())
    at = content.index(np.arange(6, dtype=np.float32).tobytes())
    content[at + 5] ^= 1
    (tmp_path / "x.bin").write_bytes(content)
    refused(tmp_path / "x.bin", "CRC", "copied whole")


def test_a_folder_and_a_file_that_is_not_there(tmp_path):
    refused(tmp_path, "directory")
    refused(tmp_path / "x.bin", "No such file")


@pytest.mark.parametrize("how", FORMATS)
def test_a_file_cut_short_anywhere(tmp_path, how):
    content = saved(how)
    step = max(1, len(content) // 150)
    for end in {*range(0, len(content), step), *range(len(content) - 30, len(content))}:
        (tmp_path / "x.bin").write_bytes(content[:end])
        refused(tmp_path / "x.bin")


# Chance


def edits(draw, content):
    """The content with a few bytes changed, put in, taken out or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        at, new = draw(st.integers(0, max(0, len(content) - 1))), draw(st.binary(max_size=5))
        length = draw(st.sampled_from([0, 1, 1, 2, len(new), 8]))
        repeated = content[at : at + length] if draw(st.booleans()) else b""
        content = content[:at] + new + repeated + content[at + length :]
    return content


def agrees_with_torch_or_is_refused(path):
    try:
        ours = read(path)
    except CheckpointError as error:
        assert_useful(str(error), str(path))
        return
    try:
        theirs = as_torch_loads(path)
    except Exception:  # what torch checks and weights do not need: the device's name, say
        return
    assert_same(ours, theirs)


@settings(max_examples=250)
@given(data=st.data())
def test_edited_files_agree_with_torch_or_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "edited.bin"
    path.write_bytes(edits(data.draw, saved(data.draw(st.sampled_from(list(FORMATS))))))
    agrees_with_torch_or_is_refused(path)


@settings(max_examples=400)
@given(data=st.data())
def test_edited_pickles_agree_with_torch_or_are_refused(tmp_path_factory, data):
    """Inside an archive that is whole again, so that no checksum stops them."""
    path = tmp_path_factory.getbasetemp() / "edited.bin"
    with zipfile.ZipFile(io.BytesIO(saved(data.draw(st.sampled_from(["zip", "protocol 4"]))))) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    root = "archive/data"
    content = edits(data.draw, parts.pop(f"{root}.pkl"))
    zipped(path, content, [(name.removeprefix(f"{root}/"), raw) for name, raw in parts.items() if name.startswith(f"{root}/")], extra=[
        (name, raw) for name, raw in parts.items() if not name.startswith(f"{root}/")])  # fmt: skip
    agrees_with_torch_or_is_refused(path)


OPCODES = [b"]", b"}", b")", b"(", b"N", b"\x88", b"K\x04", b"K\x00", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"R", b"b", b"Q"]
OPCODES += [b"q\x00", b"h\x00", b"\x94", b"0", b"2", b"1", b"\x93", b"\x81"]
WORDS = [*OPCODES, *map(assembled, ("storage", "0", "a", "touch canary")), FLOATS, storage(), tensor(), EMPTY, b"cos\nsystem\n"]
WORDS += [b"ctorch._utils\n_rebuild_tensor_v2\n"]


@settings(max_examples=400)
@given(words=st.lists(st.sampled_from(WORDS), max_size=25), start=st.sampled_from([b"}", b"}(", b""]))
def test_chance_programs_are_refused_or_describe_tensors(tmp_path_factory, words, start):
    path = tmp_path_factory.getbasetemp() / "chance.bin"
    zipped(path, b"\x80\x02" + start + b"".join(words) + b".")
    agrees_with_torch_or_is_refused(path)
    assert not Path("canary").exists()
