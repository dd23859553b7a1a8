"""TensorFlow's and Flax's files: every layout that transformers 4.20 to 4.44 wrote reads to the same bits, and damage is named, never guessed away.

The writers here reproduce the files of those versions, from examples that they wrote; neither TensorFlow nor Flax is needed.
"""

import re
import sys
import tracemalloc

import h5py
import ml_dtypes
import msgpack
import numpy as np
import pytest
import small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opt_np import CheckpointError, tf_flax

DTYPES = ("float16", "bfloat16", "float32", "float64")
ON_DISK = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])  # each example overwrites the one file
VARIANTS = {"pre_norm": {}, "like_350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 12}, "untied": {"tie_word_embeddings": False}}


def same(read, tensors):
    """The same names, each once, with the same bits."""
    read, want = list(read), {f"model.decoder.{n}" if "." in n and not n.startswith(("model.", "lm_head")) else n: a for n, a in tensors.items()}
    bits = {name: (array.dtype, array.shape, array.tobytes()) for name, array in read}
    return len(read) == len(bits) and bits == {name: (a.dtype, a.shape, a.tobytes()) for name, a in want.items()}


def drawn(variant="pre_norm", dtype="float32"):
    return small.stored_as(small.named(small.config(**VARIANTS[variant])), dtype)


def refused(read, path, *words):
    """The message of the CheckpointError that reading raises holds all words, in one line."""
    with pytest.raises(CheckpointError) as error:
        list(read(path))
    message = str(error.value)
    assert all(word in message for word in (str(path), *words)), message
    assert "\n" not in message


# The writers


def theirs(name, array, matrix, norm):
    """A tensor's path and orientation in either framework, from PyTorch's name."""
    module, _, kind = name.rpartition(".")
    if module.endswith("layer_norm"):
        return f"{module}.{norm[kind]}", array
    if "embed" in module:
        return f"{module}.{matrix[module.rpartition('.')[2]]}", array
    return (f"{module}.kernel", array.T) if kind == "weight" else (name, array)


def tensorflow_paths(tensors, positions="embeddings"):
    """model/decoder/layers.0/fc1/kernel:0 and the like. `positions` was `weight` in 2022, when Meta's files were made."""
    for name, array in tensors.items():
        if name != "lm_head.weight":  # TensorFlow's OPT has no head of its own, tied or not
            path, array = theirs(name, array, {"embed_tokens": "weight", "embed_positions": positions}, {"weight": "gamma", "bias": "beta"})
            yield re.sub(r"(?<!layers)\.", "/", path) + ":0", array


def write_h5(path, tensors, cls="tfopt_for_causal_lm", **old):
    """As save_pretrained leaves tf_model.h5; a shard (cls None) has the bare names."""
    paths = dict(tensorflow_paths(tensors, **old))
    with h5py.File(path, "w") as file:
        if cls is None:
            file.attrs["layer_names"] = [name.encode() for name in paths]
            group, before = file, ""
        else:
            file.attrs["layer_names"], file.attrs["backend"], file.attrs["keras_version"] = [b"model"], b"tensorflow", b"2.9.0"
            file.create_group("top_level_model_weights").attrs["weight_names"] = []
            group, before = file.create_group("model"), f"{cls}/"
            group.attrs["weight_names"] = [(before + name).encode() for name in paths]
        for name, array in paths.items():
            group.create_dataset(before + name, data=array)
    return path


def packed(array, kind=1, shape=None):
    """An array as flax.serialization encodes it."""
    return msgpack.ExtType(kind, msgpack.packb((array.shape if shape is None else shape, array.dtype.name, array.tobytes("C")), use_bin_type=True))


def chunked(array, size):
    """The same, as Flax cuts it when it has more than 2^30 bytes."""
    flat = array.reshape(-1)
    chunks = {str(i): packed(flat[start : start + size]) for i, start in enumerate(range(0, flat.size, size))}
    return {"__msgpack_chunked_array__": True, "shape": {str(i): n for i, n in enumerate(array.shape)}, "chunks": chunks}


def flax_tree(tensors, prefix="model.decoder.", limit=10**9):
    tree = {}
    for name, array in tensors.items():
        name, array = theirs(name, array, {"embed_tokens": "embedding", "embed_positions": "embedding"}, {"weight": "scale", "bias": "bias"})
        *modules, leaf = name.replace("model.decoder.", prefix).split(".")
        branch = tree
        for module in modules:
            branch = branch.setdefault(module, {})
        branch[leaf] = packed(array) if array.size <= limit else chunked(array, limit)
    return tree


def write_msgpack(path, tensors, **how):
    path.write_bytes(msgpack.packb(flax_tree(tensors, **how), strict_types=True))
    return path


FORMATS = {"h5": (write_h5, tf_flax.read_h5), "msgpack": (write_msgpack, tf_flax.read_msgpack)}


# Layouts


@pytest.mark.parametrize("variant", ["pre_norm", "like_350m"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", ["tfopt_for_causal_lm", "tfopt_model", "tfopt_for_causal_lm_3", None])
@pytest.mark.parametrize("positions", ["weight", "embeddings"])
def test_tensorflow_layouts(tmp_path, variant, dtype, cls, positions):
    tensors = drawn(variant, dtype)
    assert same(tf_flax.read_h5(write_h5(tmp_path / "tf_model.h5", tensors, cls, positions=positions)), tensors)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder."])
@pytest.mark.parametrize("limit", [10**9, 100], ids=["whole", "chunked"])
def test_flax_layouts(tmp_path, variant, dtype, prefix, limit):
    tensors = drawn(variant, dtype)
    assert same(tf_flax.read_msgpack(write_msgpack(tmp_path / "flax_model.msgpack", tensors, prefix=prefix, limit=limit)), tensors)


@pytest.mark.parametrize("kind", FORMATS)
def test_shards_hold_the_tensors_among_them_and_one_may_be_empty(tmp_path, kind):
    write, read = FORMATS[kind]
    tensors, how = drawn("like_350m", "float16"), {"cls": None} if kind == "h5" else {}
    names = list(tensors)
    shards = [{}, *({name: tensors[name] for name in names[i::3]} for i in range(3))]  # an empty one comes before an embed_tokens larger than a shard
    paths = [write(tmp_path / f"{i}.{kind}", shard, **how) for i, shard in enumerate(shards)]
    assert [len(list(read(path))) for path in paths] == [len(shard) for shard in shards]
    assert same((pair for path in paths for pair in read(path)), tensors)


def test_big_endian_numbers_come_in_the_machine_s_order(tmp_path):
    tensors = drawn()
    write_h5(tmp_path / "tf_model.h5", {name: a.astype(">f4") for name, a in tensors.items()})
    assert same(tf_flax.read_h5(tmp_path / "tf_model.h5"), tensors)


def test_arrays_are_contiguous(tmp_path):
    """A cast keeps the order of axes in memory, so a transposed view would stay one through the whole run."""
    for kind, (write, read) in FORMATS.items():
        assert all(array.flags.c_contiguous for _, array in read(write(tmp_path / kind, drawn("like_350m"))))


def test_a_scalar_of_flax_is_an_array_without_axes(tmp_path):
    (tmp_path / "a").write_bytes(msgpack.packb({"bias": packed(np.array(1.5, np.float16), kind=3)}))
    ((name, array),) = tf_flax.read_msgpack(tmp_path / "a")
    assert (name, array.shape, array.dtype, array) == ("bias", (), np.float16, 1.5)


@pytest.mark.parametrize("kind", FORMATS)
def test_one_tensor_at_a_time(tmp_path, kind):
    write, read = FORMATS[kind]
    size = 2**18
    path = write(tmp_path / "file", {f"model.decoder.layers.{i}.fc1.weight": np.ones((512, size // 512), np.float32) for i in range(12)})
    list(read(path))  # imports
    tracemalloc.start()
    try:
        assert sum(1 for _ in read(path)) == 12
        assert tracemalloc.get_traced_memory()[1] < 3.5 * 4 * size
    finally:
        tracemalloc.stop()


# msgpack

json_like = st.recursive(
    st.integers(0, 2**64 - 1) | st.sampled_from([0, 127, 128, 255, 256, 65535, 65536, 2**32]) | st.just(True) | st.text(max_size=40)
    | st.binary(max_size=40) | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20)),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=3), inner, max_size=20),
    max_leaves=40,
)  # fmt: skip


def plain(value):
    """Views as bytes, so that values can be compared."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return bytes(value) if isinstance(value, memoryview) else value


@given(json_like)
def test_unpack_reads_what_msgpack_writes(value):
    data = msgpack.packb(value)
    read, end = tf_flax.unpack(memoryview(data))
    assert end == len(data)
    assert plain(read) == plain(value)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 8, 15, 16, 17, 31, 32, 255, 256, 65535, 65536])
def test_unpack_at_the_borders_of_its_lengths(size):
    short = range(min(size, 65535))  # no map or list of Flax is longer
    for value in (b"x" * size, "y" * size, msgpack.ExtType(5, b"z" * size), list(short), {str(i): i for i in short}):
        assert plain(tf_flax.unpack(memoryview(msgpack.packb(value)))[0]) == plain(value)


# Damage


def h5_with(path, name="model/decoder/layers.0/fc1/kernel:0", **dataset):
    with h5py.File(path, "w") as file:
        file.create_dataset(name, **dataset)
    return path


ONES = np.ones((4, 4), np.float32)
BAD_H5 = {
    "integers": ({"data": np.ones((4, 4), np.int32)}, ["int32", "float16"]),
    "too_wide": ({"data": np.ones((4, 4), np.longdouble)}, ["float128"]),
    "complex": ({"data": np.ones((4, 4), np.complex64)}, ["complex64"]),
    "strings": ({"data": "text"}, ["object"]),
    "opaque": ({"data": np.zeros(4, "V3")}, ["void"]),
    "compound": ({"data": np.zeros(4, "f4,f4")}, ["void"]),
    "kernel_of_one_axis": ({"data": np.ones(4, np.float32)}, ["(4,)", "(in, out)"]),
    "kernel_of_three": ({"data": np.ones((2, 2, 2), np.float32)}, ["(2, 2, 2)", "(in, out)"]),
    "no_shape": ({"data": h5py.Empty("f4")}, ["None"]),
    "compressed": ({"data": ONES, "compression": "gzip"}, ["one uncompressed piece"]),
    "in_chunks": ({"data": ONES, "chunks": (2, 2)}, ["one uncompressed piece"]),
    "never_written": ({"shape": (2**30, 2**20), "dtype": "f4"}, ["one uncompressed piece"]),
    "another_leaf": ({"name": "model/decoder/layers.0/fc1/kernel:0/qweight", "data": ONES}, ["qweight", "none of kernel"]),
}


@pytest.mark.parametrize("bad", BAD_H5)
def test_a_foreign_h5_is_refused_by_name(tmp_path, bad):
    how, words = BAD_H5[bad]
    refused(tf_flax.read_h5, h5_with(tmp_path / "tf_model.h5", **how), *words, "fc1/kernel", "copied whole")


def test_an_h5_leads_to_no_other_file(tmp_path):
    (tmp_path / "secret").write_bytes(b"s" * 64)
    path = h5_with(tmp_path / "tf_model.h5", shape=(4, 4), dtype="f4", external=[(tmp_path / "secret", 0, 64)])
    refused(tf_flax.read_h5, path, "one uncompressed piece")
    other = h5_with(tmp_path / "other.h5", data=ONES)
    with h5py.File(path, "w") as file:
        file["decoder/fc1/kernel:0"] = h5py.ExternalLink(other, "model/decoder/layers.0/fc1/kernel:0")
    assert list(tf_flax.read_h5(path)) == []


@pytest.mark.parametrize("kind", [OSError, RuntimeError, KeyError, ValueError, TypeError, SystemError, MemoryError, NotImplementedError])
def test_whatever_hdf5_stumbles_over_is_one_error(tmp_path, monkeypatch, kind):
    def stumble(*_):
        raise kind("bad heap free list\n")

    path = write_h5(tmp_path / "tf_model.h5", drawn())
    monkeypatch.setattr(h5py.Dataset, "__getitem__", stumble)
    refused(tf_flax.read_h5, path, "embed_positions", "bad heap free list", "copied whole")


BAD_FLAX = {
    "integers": (packed(np.ones((4, 4), np.int32)), ["int32", "float16"]),
    "objects": (msgpack.ExtType(1, msgpack.packb(((1,), "object", b"x" * 8))), ["object"]),
    "complex": (packed(np.ones((4, 4), np.complex64)), ["complex64"]),
    "complex_scalar": (msgpack.ExtType(2, msgpack.packb((1, 2))), []),
    "other_extension": (packed(ONES, kind=4), ["extension 4"]),
    "a_number": (5, []),
    "text": ("ab", []),
    "kernel_of_one_axis": (packed(np.ones(4, np.float32)), ["(4,)", "(in, out)"]),
    "shape_too_large": (packed(ONES, shape=(2**40, 2**20)), []),
    "shape_beyond_all": (packed(ONES, shape=(2**64 - 1, 2**63)), []),
    "shape_too_small": (packed(ONES, shape=(4, 3)), ["(4,3)"]),
    "shape_of_text": (packed(ONES, shape=("4", "4")), []),
    "negative_shape": (packed(ONES, shape=(4, -1)), ["0xff"]),
    "no_bytes": (msgpack.ExtType(1, msgpack.packb(((4, 4), "float32"))), []),
    "half_a_number": (msgpack.ExtType(1, msgpack.packb(((1,), "float32", b"abc"))), []),
    "empty_extension": (msgpack.ExtType(1, b""), []),
    "chunks_missing": (dict(chunked(ONES, 8), chunks={"0": packed(ONES[0])}), []),
    "chunks_none": (dict(chunked(ONES, 8), chunks={}), ["chunks"]),
    "chunks_misnamed": (dict(chunked(ONES, 8), chunks={"1": packed(ONES.reshape(-1))}), []),
    "chunks_of_two_dtypes": (dict(chunked(ONES, 8), chunks={"0": packed(ONES[:2].ravel()), "1": packed(np.ones(8, np.float16))}), ["several dtypes"]),
    "chunk_mark_alone": ({"__msgpack_chunked_array__": True}, []),
}


@pytest.mark.parametrize("bad", BAD_FLAX)
def test_a_foreign_msgpack_is_refused_by_name(tmp_path, bad):
    leaf, words = BAD_FLAX[bad]
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack.packb({"model": {"decoder": {"layers": {"0": {"fc1": {"kernel": leaf}}}}}}))
    refused(tf_flax.read_msgpack, tmp_path / "flax_model.msgpack", *words, "fc1/kernel", "copied whole")


@pytest.mark.parametrize(("data", "word"), [
    (b"", "empty"), (b"\x05", "non-iterable"), (b"\xdf\xff\xff\xff\xff", "0xdf"), (b"\xdd\xff\xff\xff\xff", "0xdd"),
    (b"\x81\xa1a", "should begin"), (b"\x81" * 100_000, "recursion"),
    (b"\x81\xa4bias\xc9\xff\xff\xff\xff\x01abc", "goes on"), (b"\x82\xa1a\x01\xa1a\x02", "each once"), (b"\x80\x80", "1 bytes follow"),
    (b"\x81\xa4bias\xc0", "byte 6 is 0xc0"), (b"\x81\x01\x80", "does not name"),
    (b"\x81\xa1\xff\x80", "utf-8"), (b"version https://git-lfs.github.com/spec/v1\n", "bytes follow"),
])  # fmt: skip
def test_bytes_that_are_no_tree_are_refused(tmp_path, data, word):
    (tmp_path / "flax_model.msgpack").write_bytes(data)
    refused(tf_flax.read_msgpack, tmp_path / "flax_model.msgpack", word, "copied whole")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_not_there_or_no_file_is_refused(tmp_path, kind):
    refused(FORMATS[kind][1], tmp_path / "missing", "copied whole")
    refused(FORMATS[kind][1], tmp_path, "copied whole")


@pytest.mark.parametrize("kind", FORMATS)
@ON_DISK
@given(data=st.data())
def test_damage_ends_in_a_checkpoint_error_or_is_none(tmp_path, kind, data):
    """Flipped bytes in a tensor cannot be seen; wherever else they are, one CheckpointError says so, and nothing else is ever raised."""
    write, read = FORMATS[kind]
    path = write(tmp_path / "file", drawn("like_350m", "float16"))
    content = bytearray(path.read_bytes())
    near = st.integers(0, len(content) - 1) | st.integers(0, min(len(content) - 1, 3000))  # the structure is mostly there
    for at, byte in data.draw(st.lists(st.tuples(near, st.integers(0, 255) | st.sampled_from([0, 127, 255])), max_size=6)):
        content[at] = byte
    path.write_bytes(content[: data.draw(st.just(len(content)) | near)])
    try:
        size = sum(array.nbytes for _, array in read(path))
    except CheckpointError:
        refused(read, path, "copied whole")
    else:
        assert size <= len(content)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_anywhere_is_refused(tmp_path, kind):
    """Cut short, a file misses something: never fewer tensors without a word."""
    write, read = FORMATS[kind]
    content = write(tmp_path / "file", drawn()).read_bytes()
    for end in [*range(0, len(content), 997), len(content) - 1]:
        (tmp_path / "file").write_bytes(content[:end])
        with pytest.raises(CheckpointError, match="copied whole"):
            list(read(tmp_path / "file"))


# Packages


def test_without_h5py_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = write_h5(tmp_path / "tf_model.h5", drawn())
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(tf_flax.read_h5, path, "h5py", 'pip install "opt-np[frameworks]"')


def test_flax_files_need_no_package(tmp_path, monkeypatch):
    tensors = drawn("pre_norm", "bfloat16")
    path = write_msgpack(tmp_path / "flax_model.msgpack", tensors)
    for package in ("msgpack", "flax", "jax", "h5py"):
        monkeypatch.setitem(sys.modules, package, None)
    assert same(tf_flax.read_msgpack(path), tensors)
    assert next(array for _, array in tf_flax.read_msgpack(path)).dtype == ml_dtypes.bfloat16
