"""Checkpoints as found in practice: every layout of the same weights gives the same bits, and damaged, forged or foreign files one clear error.

tests/test_checkpoint.py has the common cases; here are the formats side by side, the hostile files, and a comparison with the official reader.
"""

import json
import os
import shutil
import struct
import warnings

import ml_dtypes  # noqa: F401  (bfloat16 for safetensors' NumPy reader)
import numpy as np
import pytest
import safetensors.numpy
import small
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opt_np import CheckpointError, OPTForCausalLM, OPTTokenizer, checkpoint, cli, layers_on_disk
from opt_np.tree import flatten

CONFIGS = {"pre_norm": {}, "like_350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 12}}
EMBED, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"
NAMES = list(small.named(small.config()))


# Layouts


def renamed(tensors, prefix, head="lm_head.weight"):
    return {head if name == HEAD else name.replace("model.decoder.", prefix): a for name, a in tensors.items()}


def metaseq(tensors):
    """The names of metaseq's own checkpoints, with what HF's conversion drops."""
    new = {
        "decoder.final_layer_norm": "decoder.layer_norm",
        "decoder.project_in.": "decoder.project_in_dim.",
        "decoder.project_out.": "decoder.project_out_dim.",
    }
    out = {}
    for name, a in renamed(tensors, "decoder.").items():
        for ours, theirs in new.items():
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        out[name] = a
    return {**out, "decoder.version": np.ones(1, np.float32), "decoder.output_projection.weight": tensors[EMBED]}


def one_file(names, **metadata):
    return lambda folder, tensors, cfg: small.write(folder, names(tensors), cfg, **metadata)


def part_of_blip2(folder, tensors, cfg):
    beside = {"vision_model.embeddings.position_embedding": np.ones((1, 5, 4), np.float32), "query_tokens": np.ones((1, 2, 4), np.float32)}
    small.write(folder, renamed(tensors, "language_model.model.decoder.") | beside, cfg)
    whole = {"model_type": "blip-2", "hidden_size": 4, "vision_config": {"hidden_size": 4}, "text_config": cfg.to_dict()}
    (folder / "config.json").write_text(json.dumps(whole))


def lm_head_only(tensors):
    return {HEAD if name == EMBED else name: a for name, a in tensors.items()}


def sharded(folder, tensors, cfg):
    """As the converter leaves it: the index is the .bin's, and names the twin that was dropped."""
    kept = lm_head_only(tensors)
    files = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(kept)}
    for file in set(files.values()):
        small.write(folder, {name: kept[name] for name in kept if files[name] == file}, cfg, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {**files, EMBED: files[HEAD]}}))


def as_torch(tensors):
    return {name: torch.tensor(a.astype(np.float32)).to(getattr(torch, a.dtype.name)) for name, a in tensors.items()}


def bin_file(folder, tensors, cfg, **how):
    saved = as_torch(tensors)
    torch.save({**saved, HEAD: saved[EMBED]}, folder / "pytorch_model.bin", **how)  # one storage, two names
    (folder / "config.json").write_text(json.dumps(cfg.to_dict()))


def bin_shards(folder, tensors, cfg):
    saved = renamed(as_torch(tensors), "decoder.") | {HEAD: as_torch(tensors)[EMBED]}
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(saved)}
    for file in set(files.values()):
        torch.save({name: t for name, t in saved.items() if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(cfg.to_dict()))


LAYOUTS = {
    "decoder.": one_file(lambda t: renamed(t, "decoder.")),
    "no prefix": one_file(lambda t: renamed(t, "")),
    "part of BLIP-2": part_of_blip2,
    "lm_head only": one_file(lm_head_only),
    "both tied names": one_file(lambda t: {**t, HEAD: t[EMBED]}),
    "an alias in the metadata": one_file(lm_head_only, **{EMBED: HEAD}),
    "the other alias": one_file(lambda t: t, **{HEAD: EMBED}),
    "metaseq": one_file(metaseq),
    "shards, the index naming a dropped twin": sharded,
    "bin": bin_file,
    "legacy bin": lambda *where: bin_file(*where, _use_new_zipfile_serialization=False),
    "bin shards": bin_shards,
}


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_same_weights_computes_the_same(tmp_path, layout, variant, storage):
    cfg = small.config(**CONFIGS[variant])
    tensors = small.stored_as(small.named(cfg), storage)
    plain = OPTForCausalLM.from_pretrained(small.write(tmp_path / "plain", tensors, cfg), backend="numpy")
    (tmp_path / "other").mkdir()
    LAYOUTS[layout](tmp_path / "other", tensors, cfg)
    if layout == "part of BLIP-2":
        with pytest.warns(UserWarning, match=r"2 tensors outside language_model\. .* not OPT's"):
            other = OPTForCausalLM.from_pretrained(tmp_path / "other", backend="numpy")
    else:
        other = OPTForCausalLM.from_pretrained(tmp_path / "other", backend="numpy")
    wanted, found = flatten(plain.params), flatten(other.params)
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == wanted[name].dtype == np.float32 and found[name].tobytes() == wanted[name].tobytes() for name in wanted)
    exact = {name.replace("model.decoder.", ""): a.astype(np.float32) for name, a in tensors.items()}
    assert all(np.array_equal(found[name], exact[name]) for name in exact)
    ids = small.ids(cfg)
    assert other(ids).logits.tobytes() == plain(ids).logits.tobytes()


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32", "float64"])
def test_a_layout_keeps_its_storage_when_asked(tmp_path, storage):
    cfg = small.config()
    bin_file(tmp_path, small.stored_as(small.named(cfg), storage), cfg)
    assert {a.dtype.name for a in flatten(checkpoint.load(tmp_path, None)[0]).values()} == {storage}


# What is refused


def assert_one_line(message, *words):
    """One line that a terminal shows as it is, with what it must name; an f-string's leftovers would end in a colon."""
    assert all(word in message for word in words), message
    assert message.isprintable(), message
    assert 20 < len(message) <= checkpoint.LONGEST_MESSAGE


def edited_config(**keys):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return edit


def replaced(name, content):
    def replace(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return replace


def header(entries, data=b"", name="model.safetensors"):
    """A file of safetensors with any header at all."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return replaced(name, struct.pack("<Q", len(text)) + text + data)


def floats(shape, start, stop, dtype="F32", **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **more}


def tensors(change, **metadata):
    def write(folder):
        named = small.named(small.config())
        change(named)
        small.write(folder, named, small.config(), **metadata)

    return write


def index(of, content=None):
    """model.safetensors becomes a shard beside an index; `of` changes the map."""

    def write(folder):
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "a_folder").mkdir()
        text = content if content is not None else json.dumps({"weight_map": {**dict.fromkeys(NAMES, "a.safetensors"), **of}})
        (folder / "model.safetensors.index.json").write_text(text)

    return write


def linked(name, target):
    def link(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return link


def a_folder(name):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


def instead(name, content):
    """Another format's file in place of the safetensors."""

    def write(folder):
        (folder / "model.safetensors").unlink()
        replaced(name, content)(folder)

    return write


def poisoned(value):
    def write(named):
        named["model.decoder.layers.1.fc1.weight"][2, 3] = value

    return write


TWICE = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
STEERING = "x\n\x1b[2J\u202e"
WEIGHTS = {
    "overlapping": (header({"a": floats([2], 0, 8), "b": floats([2], 0, 8)}, bytes(8)), "model.safetensors", "copied whole"),
    "a hole": (header({"a": floats([2], 0, 8), "b": floats([2], 12, 20)}, bytes(20)), "model.safetensors", "copied whole"),
    "bytes left over": (header({"a": floats([2], 0, 8)}, bytes(9)), "model.safetensors", "copied whole"),
    "too few bytes": (header({"a": floats([2], 0, 8)}, bytes(7)), "model.safetensors", "copied whole"),
    "backwards": (header({"a": floats([2], 8, 0)}, bytes(8)), "model.safetensors", "copied whole"),
    "a huge header": (replaced("model.safetensors", struct.pack("<Q", 2**63) + b"{}"), "model.safetensors", "header"),
    "a header beyond the file": (replaced("model.safetensors", struct.pack("<Q", 90_000_000) + b"{}"), "model.safetensors", "header"),
    "a header that is not JSON": (header(b"not JSON"), "model.safetensors", "header"),
    "a header that is a list": (header(b"[]"), "model.safetensors", "header"),
    "a deep header": (header(b'{"a":' * 50_000), "model.safetensors", "header"),
    "a name twice": (header(TWICE, bytes(16)), "model.safetensors", "names a twice", "get the file again"),
    "a huge shape": (header({"a": floats([2**63, 2], 0, 8)}, bytes(8)), "model.safetensors"),
    "a negative shape": (header({"a": floats([-2], 0, 8)}, bytes(8)), "model.safetensors"),
    "an unknown type": (header({"a": floats([2], 0, 8, "F33")}, bytes(8)), "F33"),
    "a type that is no float": (
        header({STEERING: floats([4], 0, 8, "I16")}, bytes(8)),
        "stored as I16",
        "F16, BF16, F32, F64",
        "quantised",
        "x\\n\\x1b[2J",
    ),
    "no tensor at all": (header({}), "0 tensors named"),
    "no OPT": (header({STEERING: floats([2], 0, 8)}, bytes(8)), "embed_positions.weight", "x\\n\\x1b[2J"),
    "empty": (replaced("model.safetensors", b""), "model.safetensors", "copied whole"),
    "a pointer of LFS": (
        replaced("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"),
        "model.safetensors",
        "copied whole",
    ),
    "a web page": (replaced("model.safetensors", "<!DOCTYPE html><html>"), "model.safetensors", "copied whole"),
    "a bin with the wrong name": (replaced("model.safetensors", b"PK\x03\x04" + bytes(60)), "model.safetensors", "copied whole"),
    "a missing tensor": (tensors(lambda t: t.pop("model.decoder.layers.1.fc1.bias")), "1 missing (layers.1.fc1.bias)", "copied whole"),
    "extra tensors": (tensors(lambda t: t.update({STEERING: np.ones(1, np.float32)})), "1 unknown", "x\\n\\x1b[2J", "config.json"),
    "a name under two prefixes": (
        tensors(lambda t: t.update({"final_layer_norm.weight": np.ones(16, np.float32)})),
        "final_layer_norm.weight under two names",
    ),
    "metaseq's name and HF's": (
        tensors(lambda t: t.update({"model.decoder.layer_norm.bias": np.ones(16, np.float32)})),
        "final_layer_norm.bias under two names",
    ),
    "a wrong shape": (
        tensors(lambda t: t.update({EMBED: np.ones((300, 16), np.float32)})),
        "embed_tokens.weight",
        "(300, 16)",
        "(308, 16)",
        "config.json",
    ),
    "an alias for another tensor": (
        tensors(lambda t: t.pop("model.decoder.layers.1.fc1.bias"), **{"model.decoder.layers.1.fc1.bias": "model.decoder.layers.0.fc1.bias"}),
        "1 missing (layers.1.fc1.bias)",
    ),
    "a folder for weights": (a_folder("model.safetensors"), "model.safetensors is no file"),
    "a link to nothing": (linked("model.safetensors", "gone"), "model.safetensors is a link that leads nowhere"),
    "a link to itself": (linked("model.safetensors", "model.safetensors"), "model.safetensors is a link that leads nowhere"),
    "a way out": (index({NAMES[0]: "../a.safetensors"}), "index.json", "'../a.safetensors'", "Do not trust"),
    "a way out by Windows' rules": (index({NAMES[0]: "..\\a.safetensors"}), "index.json", "..\\", "a.safetensors"),
    "an absolute path": (index({NAMES[0]: "/etc/passwd"}), "index.json", "'/etc/passwd'", "Do not trust"),
    "a null byte": (index({NAMES[0]: "a\0b"}), "index.json", "'a\\x00b'"),
    "a very long name": (index({NAMES[0]: "a" * 5000}), "index.json", "copy the missing file"),
    "a folder for a shard": (index({NAMES[0]: "a_folder"}), "index.json", "'a_folder'", "copy the missing file"),
    "another file for a shard": (index({NAMES[0]: "config.json"}), "config.json cannot be read as safetensors"),
    "a tensor that no shard has": (index({f"model.decoder.{STEERING}": "a.safetensors"}), "index.json", "x\\n\\x1b[2J", "no shard holds"),
    "a deep index": (index({}, "[" * 100_000), "index.json is not JSON"),
    "an index of huge numbers": (index({}, '{"metadata": ' + "9" * 5000 + "}"), "index.json is not JSON"),
    "a malicious pickle": (instead("pytorch_model.bin", b"cos\nsystem\n(S'touch canary'\ntR."), "pytorch_model.bin", "not torch.save's"),
    "a folder for a bin": (
        lambda folder: (shutil.rmtree(folder), folder.mkdir(), a_folder("pytorch_model.bin")(folder), edited(folder)),
        "is no file",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights", "copied whole"),
}


def edited(folder):
    (folder / "config.json").write_text(json.dumps(small.config().to_dict()))


CONFIG = {
    "missing": (lambda folder: (folder / "config.json").unlink(), "config.json is not there", "copy it"),
    "a folder": (a_folder("config.json"), "config.json cannot be read", "Is it a file"),
    "a link to itself": (linked("config.json", "config.json"), "config.json cannot be read"),
    "empty": (replaced("config.json", ""), "config.json is not JSON"),
    "cut": (replaced("config.json", '{"vocab_size": 3'), "config.json is not JSON"),
    "no UTF-8": (replaced("config.json", b"\xff{}"), "config.json is not JSON"),
    "a web page": (replaced("config.json", "<!DOCTYPE html>"), "config.json is not JSON"),
    "a list": (replaced("config.json", "[]"), "config.json holds a JSON list"),
    "null": (replaced("config.json", "null"), "config.json holds"),
    "deep": (replaced("config.json", '{"a":' * 100_000), "config.json is not JSON"),
    "deep lists": (replaced("config.json", "[" * 100_000), "config.json is not JSON"),
    "a number of 5000 digits": (replaced("config.json", '{"vocab_size": ' + "9" * 5000 + "}"), "config.json is not JSON"),
    "not OPT": (edited_config(model_type="gpt2"), "model_type is 'gpt2'", "'opt'"),
    "quantised": (edited_config(quantization_config={"bits": 4}), "quantization_config", "opt_np computes only"),
    "steering": (edited_config(activation_function=STEERING), "activation_function is 'x\\n\\x1b[2J"),
    "heads that do not divide": (edited_config(num_attention_heads=3), "hidden_size=16", "num_attention_heads=3", "multiple"),
    "layers without end": (edited_config(num_hidden_layers=10**15), "36 tensors", f"num_hidden_layers={10**15}"),
    "more layers": (edited_config(num_hidden_layers=3), "16 missing (layers.2.", "config.json"),
    "fewer layers": (edited_config(num_hidden_layers=1), "16 unknown (layers.1.", "config.json"),
    "a vocabulary without end": (edited_config(vocab_size=10**30), "embed_tokens.weight is (308, 16)", f"{10**30}"),
    "positions without end": (edited_config(max_position_embeddings=10**30), "embed_positions.weight is (34, 16)"),
    "a width without end": (edited_config(hidden_size=10**30), "tensors"),
    "another class's labels": (edited_config(id2label=[1]), "id2label is [1]", "object"),
    "text_config of nothing": (edited_config(text_config={}), "missing (layers.2."),
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "ffn_dim",
    "max_position_embeddings",
    "word_embed_proj_dim",
    "num_attention_heads",
    "num_labels",
)
WRONG = {key: ["16", -1, 0, 1.5, True, [16], {}, float("inf"), float("nan")] for key in SIZES}
WRONG |= {key: ["1", 1.5, True, {}] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
WRONG |= {key: ["0.1", -0.1, 1.5, None, True, [], float("nan")] for key in ("dropout", "attention_dropout", "layerdrop")}
WRONG |= {"init_std": ["x", -1, None, float("nan")]}
WRONG |= {key: ["true", 1, None] for key in ("do_layer_norm_before", "_remove_final_layer_norm", "enable_bias", "tie_word_embeddings")}
WRONG |= {
    "activation_function": ["swish", 1, None, [], {}],
    "model_type": ["bert", 1, None, []],
    "pad_token_id": ["1", 1.5, True, {}, [1], -1, 308, 10**30],
}
for wrong_key, wrong_values in WRONG.items():
    for wrong_value in wrong_values:
        CONFIG[f"{wrong_key} {wrong_value!r}"] = (edited_config(**{wrong_key: wrong_value}), "config.json", f"{wrong_key} is {wrong_value!r}")

TOKENIZER = {
    "no vocabulary": (lambda folder: (folder / "vocab.json").unlink(), "vocab.json with merges.txt nor tokenizer.json", "copy them"),
    "no merges": (lambda folder: (folder / "merges.txt").unlink(), "vocab.json with merges.txt nor tokenizer.json", "copy them"),
    "a vocabulary that is not JSON": (replaced("vocab.json", "{"), "vocab.json", "cannot be read as a tokenizer"),
    "a vocabulary that is a list": (replaced("vocab.json", "[]"), "vocab.json", "cannot be read as a tokenizer"),
    "negative ids": (replaced("vocab.json", '{"a": -1}'), "vocab.json", "cannot be read as a tokenizer"),
    "a deep vocabulary": (replaced("vocab.json", '{"a":' * 100_000), "vocab.json", "cannot be read as a tokenizer"),
    "no UTF-8": (replaced("merges.txt", b"\xff\xfe"), "merges.txt", "cannot be read as a tokenizer"),
    "merges of nothing known": (replaced("merges.txt", "#version: 0.2\nqqqq zzzz\n"), "merges.txt", "cannot be read as a tokenizer"),
    "a config that is not JSON": (replaced("tokenizer_config.json", "{"), "tokenizer_config.json is not JSON"),
    "a config that is a list": (replaced("tokenizer_config.json", "[]"), "tokenizer_config.json holds a JSON list"),
    "a deep config": (replaced("special_tokens_map.json", "[" * 100_000), "special_tokens_map.json is not JSON"),
    "a folder for a config": (a_folder("tokenizer_config.json"), "tokenizer_config.json cannot be read", "Is it a file"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return small.folder(tmp_path_factory.mktemp("good") / "model")


def broken(good, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    damage(folder)
    return folder


@pytest.mark.parametrize("case", [*WEIGHTS, *(f"config: {case}" for case in CONFIG)])
def test_a_bad_checkpoint_is_one_clear_line(good, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    damage, *words = CONFIG[case.removeprefix("config: ")] if case.startswith("config: ") else WEIGHTS[case]
    folder = broken(good, tmp_path, damage)
    for load in (checkpoint.load, OPTForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError) as error:
            load(folder)
        assert isinstance(error.value, ValueError)
        assert_one_line(str(error.value), str(folder), *words)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("case", TOKENIZER)
def test_a_bad_tokenizer_is_one_clear_line(good, tmp_path, case):
    damage, *words = TOKENIZER[case]
    folder = broken(good, tmp_path, damage)
    with pytest.raises(CheckpointError) as error:
        OPTTokenizer.from_pretrained(folder)
    assert_one_line(str(error.value), str(folder), *words)


FOLDERS = {
    "missing": (lambda path: None, "not there"),
    "empty": (lambda path: path.mkdir(), "config.json is not there"),
    "a file": (lambda path: path.write_text("x"), "is a file", "a model is a folder"),
    "a link to nothing": (lambda path: path.symlink_to("gone"), "is a link that leads nowhere"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "is a link that leads nowhere"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_none(tmp_path, case):
    make, *words = FOLDERS[case]
    make(tmp_path / "model")
    for load in (checkpoint.load, OPTForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError) as error:
            load(tmp_path / "model")
        assert_one_line(str(error.value), str(tmp_path / "model"), *words)
    with pytest.raises(CheckpointError) as error:
        OPTTokenizer.from_pretrained(tmp_path / "model")
    assert_one_line(str(error.value), str(tmp_path / "model"))


def test_a_name_too_long_for_a_file(tmp_path):
    with pytest.raises(CheckpointError, match="not there"):
        checkpoint.load(tmp_path / ("x" * 5000))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_a_file_that_may_not_be_read(good, tmp_path, name):
    folder = broken(good, tmp_path, lambda folder: (folder / name).chmod(0))
    load = OPTTokenizer.from_pretrained if name.startswith("tokenizer") else checkpoint.load
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert_one_line(str(error.value), name)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_file_that_cannot_be_read_for_any_reason(good, monkeypatch, name):
    from pathlib import Path

    open_text = Path.read_text

    def read_text(path, *args, **options):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return open_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    load = OPTTokenizer.from_pretrained if name.startswith("tokenizer") else checkpoint.load
    with pytest.raises(CheckpointError) as error:
        load(good)
    assert_one_line(str(error.value), f"{good / name} cannot be read: Permission denied", "may you read it")


@pytest.mark.parametrize("stored", ["I64", "F8_E4M3", "BOOL", "F32"])
def test_metaseqs_version_may_have_any_type(tmp_path, stored):
    size = {"I64": 1, "F8_E4M3": 8, "BOOL": 8, "F32": 2}[stored]
    header({"decoder.version": floats([size], 0, 8, stored), "a": floats([2], 8, 16)}, bytes(16), "x.safetensors")(tmp_path)
    assert "a" in dict(checkpoint.read_safetensors(tmp_path / "x.safetensors"))


# NaN and infinite weights


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64", None])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_weights_that_are_no_numbers_are_told_and_strictly_refused(tmp_path, value, dtype, storage):
    cfg, named = small.config(), small.named(small.config())
    poisoned(value)(named)
    folder = small.write(tmp_path, small.stored_as(named, storage), cfg)
    with pytest.warns(UserWarning, match="layers.1.fc1.weight hold NaN or infinite"):
        read = checkpoint.load(folder, dtype)[0]
    np.testing.assert_array_equal(read["layers"][1]["fc1"]["weight"][2, 3].astype(float), value)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder, dtype, strict=True)
    assert_one_line(str(error.value), str(folder), "layers.1.fc1.weight", "NaN or infinite", "without strict")


def test_a_signalling_nan_is_told_and_nothing_else(tmp_path):
    cfg, named = small.config(), small.named(small.config())
    named[NAMES[5]].view(np.uint32).ravel()[0] = 0x7F800001
    with pytest.warns(UserWarning, match="NaN or infinite") as told:
        checkpoint.load(small.write(tmp_path, named, cfg), "float64")
    assert len(told) == 1


def test_a_number_too_large_for_float32_is_told(tmp_path):
    cfg, named = small.config(), small.stored_as(small.named(small.config()), "float64")
    poisoned(1e300)(named)
    with pytest.warns(UserWarning, match="layers.1.fc1.weight"):
        checkpoint.load(small.write(tmp_path, named, cfg))
    checkpoint.load(tmp_path, "float64")  # which holds it, and says nothing


def test_names_in_a_warning_do_not_steer(tmp_path):
    cfg = small.config()
    named = small.named(cfg, "language_model.model.decoder.") | {STEERING: np.ones(1, np.float32)}
    with pytest.warns(UserWarning, match="not OPT's") as told:
        checkpoint.load(small.write(tmp_path, named, cfg))
    assert str(told[0].message).isprintable()


# Costs


def test_many_small_tensors_are_read_in_one_go(tmp_path):
    """Not with a fresh look at the header for each."""
    count, opened = 3000, []
    path = tmp_path / "x.safetensors"
    header({f"{i}": floats([0], 0, 0) for i in range(count)}, name=path.name)(tmp_path)
    opener = safetensors.safe_open

    def counted(*args, **options):
        opened.append(args)
        return opener(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "safe_open", counted)
        assert len(dict(checkpoint.read_safetensors(path))) == count
    assert len(opened) == 1


def test_a_large_file_is_not_kept_in_memory(tmp_path, monkeypatch):
    cfg, opened = small.config(), []
    monkeypatch.setattr(checkpoint, "KEPT_OPEN", 20_000)
    opener = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda *args, **options: opened.append(args) or opener(*args, **options))
    folder = small.write(tmp_path, small.named(cfg), cfg)
    read = dict(checkpoint.read_safetensors(folder / "model.safetensors"))
    assert len(opened) > 1
    assert all(np.array_equal(read[name], a) for name, a in small.named(cfg).items())


def test_aliases_without_end_make_no_arrays_without_end(tmp_path):
    entries = {"__metadata__": {f"{i}.lm_head.weight": "a" for i in range(1000)}, "a": floats([2], 0, 8)}
    header(entries, bytes(8), "x.safetensors")(tmp_path)
    assert len(list(checkpoint.read_safetensors(tmp_path / "x.safetensors"))) == 2


# The command line

COMMANDS = {
    "info": lambda folder, out: ["info", "--model", folder],
    "generate": lambda folder, out: ["generate", "the cat", "--model", folder, "--backend", "numpy"],
    "logits": lambda folder, out: ["logits", "the cat", "--model", folder, "--backend", "numpy"],
    "convert": lambda folder, out: ["convert", folder, out],
}
SAMPLE = {
    **{
        case: WEIGHTS[case]
        for case in ("overlapping", "a name twice", "extra tensors", "a wrong shape", "a link to nothing", "a way out", "no weights")
    },
    **{case: WEIGHTS[case] for case in ("a malicious pickle", "a tensor that no shard has", "a type that is no float")},
    **{
        f"config: {case}": CONFIG[case]
        for case in ("missing", "deep", "not OPT", "steering", "layers without end", "pad_token_id '1'", "dropout None")
    },
    **{f"tokenizer: {case}": TOKENIZER[case] for case in ("no vocabulary", "a config that is a list", "negative ids")},
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", SAMPLE)
def test_the_command_line_says_it_in_one_line(good, tmp_path, capsys, command, case):
    if command == "convert" and case.startswith("tokenizer: "):
        pytest.skip("convert copies the tokenizer's files, unread")
    if command == "info" and case == "tokenizer: no vocabulary":
        pytest.skip("info says that there is no tokenizer, which is no mistake")
    damage, *words = SAMPLE[case]
    folder, out = broken(good, tmp_path, damage), tmp_path / "out"
    with warnings.catch_warnings():  # cli.main shows warnings its own way
        status = cli.main([str(word) for word in COMMANDS[command](folder, out)])
    printed, told = capsys.readouterr()
    assert status == 1
    assert told.startswith("opt-np: ")
    assert told.endswith("\n")
    assert_one_line(told[:-1], str(folder), *words)
    assert "Traceback" not in printed + told
    assert not out.exists()


@pytest.mark.parametrize("command", ["info", "generate", "logits"])
def test_a_good_folder_says_nothing_on_stderr(good, capsys, command):
    """So that the lines above are the damage's."""
    with warnings.catch_warnings():
        assert cli.main([str(word) for word in COMMANDS[command](good, "")]) == 0
    assert capsys.readouterr().err == ""


# The official reader as referee


def as_the_library_reads(path):
    """Its arrays, or None where it refuses."""
    try:
        return safetensors.numpy.load_file(path)
    except Exception:  # of any kind
        return None


def as_we_read(path, read=checkpoint.read_safetensors):
    """Our arrays, or None where we refuse, in the one way that is allowed."""
    try:
        return dict(read(path))
    except CheckpointError as error:
        assert_one_line(str(error), str(path))
        return None


def from_disk(path):
    """As layers that stay on disk are read: from a header that we check ourselves."""
    return [(name, tensor.read()) for name, tensor in layers_on_disk.tensors_of(path)]


def assert_referee_agrees(path):
    return all(agrees(path, read) for read in (checkpoint.read_safetensors, from_disk))


def agrees(path, read):
    theirs, ours = as_the_library_reads(path), as_we_read(path, read)
    if theirs is None:
        assert ours is None, "accepted what the library refuses"
    if theirs is None or ours is None:
        return ours is not None
    assert ours.keys() >= theirs.keys()  # more by an alias only
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape, ours[name].tobytes()) == (array.dtype, array.shape, array.tobytes())
    return True


def content(dtype="F32"):
    size = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}[dtype]
    entries = {"a": floats([2, 3], 0, 6 * size, dtype), "e": floats([0], 6 * size, 6 * size, dtype), "b.é": floats([], 6 * size, 7 * size, dtype)}
    return {"__metadata__": {"format": "pt", "b.lm_head.weight": "a"}, **entries}, bytes(range(7 * size))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_the_referee_reads_what_the_edits_start_from(tmp_path, dtype):
    header(*content(dtype), "x.safetensors")(tmp_path)
    assert assert_referee_agrees(tmp_path / "x.safetensors")
    assert {"a", "e", "b.é", "b.lm_head.weight"} == as_we_read(tmp_path / "x.safetensors").keys()


NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 6, 8, 12, 24, 28, 56, 2**31, 2**53, 2**63, 2**64, 10**30, 1.5, True, None, "2", [2], {}])
FIELDS = {
    "dtype": st.sampled_from(["F16", "BF16", "F32", "F64", "I8", "BOOL", "F8_E4M3", "F4", "U64", "f32", "", None, 1]),
    "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
    "data_offsets": st.lists(NUMBERS, max_size=3) | NUMBERS,
}


@settings(max_examples=300)
@given(data=st.data())
def test_edited_headers_are_read_as_the_library_reads_them(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    entries, raw = content(data.draw(st.sampled_from(["F16", "BF16", "F32", "F64"])))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(["a", "e", "b.é", "new", "decoder.version", "__metadata__"]))
        field = data.draw(st.sampled_from(list(FIELDS)))
        value = data.draw(FIELDS[field])
        how = data.draw(st.sampled_from(["set", "set", "set", "remove", "replace"]))
        if how == "set":
            entries[name] = {**(entries.get(name) or {}), field: value} if isinstance(entries.get(name, {}), dict) else value
        elif how == "remove":
            entries.pop(name, None)
        else:
            entries[name] = value
    pieces = [json.dumps({name: value})[1:-1] for name, value in entries.items()]
    repeated = data.draw(st.lists(st.sampled_from(pieces), max_size=1)) if pieces and data.draw(st.booleans()) else []
    text = "{" + ", ".join(pieces + repeated) + "}" + data.draw(st.sampled_from(["", "", "   ", "x"]))
    raw = raw[: data.draw(st.sampled_from([len(raw), len(raw), len(raw) - 1, 0]))]
    header(text.encode(), raw, "edited.safetensors")(folder)
    assert_referee_agrees(folder / "edited.safetensors")


@settings(max_examples=300)
@given(data=st.data())
def test_edited_files_are_read_as_the_library_reads_them(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    header(*content(data.draw(st.sampled_from(["F16", "BF16", "F32", "F64"]))), "edited.safetensors")(folder)
    path = folder / "edited.safetensors"
    raw = path.read_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        raw = raw[:at] + data.draw(st.binary(max_size=3)) + raw[at + data.draw(st.sampled_from([0, 1, 1, 2])) :]
    path.write_bytes(raw)
    assert_referee_agrees(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v),
)


KEYS = [*small.config().to_dict(), "num_labels", "id2label", "text_config", "scale_embeddings", "quantization_config"]


@settings(max_examples=200)
@given(key=st.sampled_from(KEYS), value=JSON)
@example(key="id2label", value={"a": 1})
def test_any_value_of_a_config_is_taken_or_refused(tmp_path_factory, key, value):
    (tmp_path_factory.getbasetemp() / "config.json").write_text(json.dumps({**small.config().to_dict(), key: value}))
    read = None
    try:
        read = checkpoint.load_config(tmp_path_factory.getbasetemp())
    except CheckpointError as error:
        message = str(error)
    if read is None:
        assert_one_line(message, "config.json")
    else:
        assert isinstance(read.num_labels, int)
        assert read.head_dim * read.num_attention_heads == read.hidden_size


@settings(max_examples=60)
@given(text=st.text(max_size=30) | JSON.map(json.dumps), name=st.sampled_from(["config.json", "model.safetensors.index.json"]))
def test_any_text_for_a_json_file_is_read_or_refused(good, tmp_path_factory, name, text):
    folder = tmp_path_factory.getbasetemp() / "chance"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    if "index" in name:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    assert_one_line(str(error.value), str(folder))
