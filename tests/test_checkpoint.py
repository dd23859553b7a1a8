"""Checkpoints: every published layout reads to the same parameters, HF reads ours and we read HF's, and damage is named, never guessed away."""

import dataclasses
import json
import os
import stat
import subprocess
import warnings

import numpy as np
import pytest
import safetensors.torch
import small
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from opt_np import CheckpointError, OPTConfig, OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification, OPTModel, checkpoint
from opt_np.quantize import quantized
from opt_np.tree import flatten, unflatten

VARIANTS = {
    "pre_norm": {},
    "post_norm": {"do_layer_norm_before": False},
    "like_350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 12},
    "galactica_30b": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    "gelu": {"activation_function": "gelu"},
    "untied": {"tie_word_embeddings": False},
    "no_final_norm": {"_remove_final_layer_norm": True},
}
PREFIXES = ("model.decoder.", "decoder.", "language_model.model.decoder.", "model.", "")
EMBED, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"


def same(ours, theirs):
    """The same names in the same tree, with the same bits."""
    a, b = flatten(ours), flatten(theirs)
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a)


def refused(path, *words, load=checkpoint.load):
    """The message of the CheckpointError that loading raises, once all words stand in it."""
    with pytest.raises(CheckpointError) as error:
        load(path)
    message = str(error.value)
    assert all(word in message for word in (str(path), *words)), message
    assert "\n" not in message


# Layouts


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_reads_the_same(tmp_path, variant, prefix):
    cfg = small.config(**VARIANTS[variant])
    read, read_cfg = checkpoint.load(small.write(tmp_path, small.named(cfg, prefix), cfg))
    assert same(read, small.params(cfg))
    assert read_cfg == OPTConfig.from_dict(cfg.to_dict())


@pytest.mark.parametrize("kept", [(EMBED,), (HEAD,), (EMBED, HEAD)], ids=["embed_tokens", "lm_head", "both"])
@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder."])
def test_a_tied_matrix_under_either_name_reads_the_same(tmp_path, prefix, kept):
    cfg = small.config()
    tensors = small.named(cfg, prefix)
    matrix = tensors.pop(prefix + "embed_tokens.weight")
    tensors |= {name.replace("model.decoder.", prefix): matrix for name in kept}
    assert same(checkpoint.load(small.write(tmp_path, tensors, cfg))[0], small.params(cfg))


def test_a_tied_matrix_with_nan_under_both_names_is_one_matrix(tmp_path):
    cfg = small.config()
    tensors = small.named(cfg)
    tensors[EMBED][7, 3] = np.nan
    with pytest.warns(UserWarning, match="hold NaN"):
        read, _ = checkpoint.load(small.write(tmp_path, {**tensors, HEAD: tensors[EMBED]}, cfg))
    assert np.isnan(flatten(read)["embed_tokens.weight"][7, 3])


@pytest.mark.parametrize("variant", ["pre_norm", "untied", "like_350m"])
@settings(max_examples=12)
@given(data=st.data())
def test_shards_read_as_one_file(tmp_path_factory, variant, data):
    cfg, folder = small.config(**VARIANTS[variant]), tmp_path_factory.mktemp("shards")
    tensors = small.named(cfg)
    shard_of = {name: f"model-{data.draw(st.integers(1, 3))}-of-3.safetensors" for name in tensors}
    for shard in set(shard_of.values()):
        small.write(folder, {n: a for n, a in tensors.items() if shard_of[n] == shard}, cfg, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    assert same(checkpoint.load(folder)[0], small.params(cfg))


def test_an_index_may_name_the_tied_twin_that_its_shard_lacks(tmp_path):
    cfg = small.config()
    folder = small.write(tmp_path, small.named(cfg), cfg, "a.safetensors")
    index = {"weight_map": dict.fromkeys([*small.named(cfg), HEAD], "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(checkpoint.load(folder)[0], small.params(cfg))


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_storage_is_cast_once(tmp_path, storage, dtype):
    cfg = small.config()
    stored = small.stored_as(small.named(cfg), storage)
    read = flatten(checkpoint.load(small.write(tmp_path, stored, cfg), dtype)[0])
    for name, array in read.items():
        assert array.dtype == dtype
        wanted = torch.tensor(small.named(cfg)["model.decoder." + name]).to(getattr(torch, storage)).to(getattr(torch, dtype)).numpy()
        np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("name", ["decoder.version", "model.decoder.version", "decoder.output_projection.weight"])
def test_buffers_of_old_conversions_are_passed_over(tmp_path, name):
    cfg = small.config()
    folder = small.write(tmp_path, {**small.named(cfg), name: np.ones(1, np.float32)}, cfg)
    assert same(checkpoint.load(folder)[0], small.params(cfg))


def test_parameters_are_writable(tmp_path):
    """Training updates them in place."""
    params, _ = checkpoint.load(small.folder(tmp_path))
    assert all(array.flags.writeable for array in flatten(params).values())


# HF


@pytest.mark.parametrize("variant", VARIANTS)
def test_hf_reads_what_we_save(tmp_path, variant):
    cfg = small.config(**VARIANTS[variant])
    ours = OPTForCausalLM(small.params(cfg), cfg)
    ours.save_pretrained(tmp_path)
    theirs = transformers.OPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="sdpa")
    ids = small.ids(cfg)
    assert worst(ours(ids).logits, theirs(torch.tensor(ids)).logits) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shard", ["5GB", "5KB"])
def test_we_read_what_hf_saves(tmp_path, variant, shard):
    cfg = small.config(**VARIANTS[variant])
    theirs = hf_model(transformers.OPTForCausalLM, cfg)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "5GB")
    ids = small.ids(cfg)
    ours = OPTForCausalLM.from_pretrained(tmp_path, dtype="float64")
    assert worst(ours(ids).logits, theirs.double()(torch.tensor(ids)).logits) < 1e-12


@pytest.mark.parametrize("name", ["OPTModel", "OPTForSequenceClassification", "OPTForQuestionAnswering"])
def test_the_other_classes_read_what_hf_saves(tmp_path, name):
    theirs = hf_model(getattr(transformers, name), small.config(), num_labels=3)
    theirs.save_pretrained(tmp_path)
    ids = small.ids(small.config())
    ours = {"OPTModel": OPTModel, "OPTForSequenceClassification": OPTForSequenceClassification, "OPTForQuestionAnswering": OPTForQuestionAnswering}
    out, wanted = ours[name].from_pretrained(tmp_path, dtype="float64")(ids), theirs.double()(torch.tensor(ids))
    for field in ("last_hidden_state", "logits", "start_logits", "end_logits"):
        if field in wanted:
            assert worst(getattr(out, field), wanted[field]) < 1e-12


@pytest.mark.parametrize("head", ["score", "qa_outputs"])
def test_hf_reads_the_head_that_we_save(tmp_path, head):
    cls, theirs_cls = {
        "score": (OPTForSequenceClassification, transformers.OPTForSequenceClassification),
        "qa_outputs": (OPTForQuestionAnswering, transformers.OPTForQuestionAnswering),
    }[head]
    ours = cls.from_pretrained(small.folder(tmp_path / "base"), new_head=True, num_labels=4)
    ours.save_pretrained(tmp_path / "head")
    theirs, told = theirs_cls.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    np.testing.assert_array_equal(theirs.state_dict()[f"{head}.weight"].numpy(), ours.params[head]["weight"])


def hf_model(cls, cfg, **changes):
    """A random HF model without a bias of 0 or a LayerNorm of 1."""
    torch.manual_seed(0)
    theirs = cls(transformers.OPTConfig(**{**cfg.to_dict(), **changes}, attn_implementation="sdpa")).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return theirs


def worst(ours, theirs):
    """The largest difference, as a share of the largest value."""
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


# Saving


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_read_again(tmp_path, variant):
    cfg = small.config(**VARIANTS[variant], extra={"a_key_of_its_own": [1, "é"]})
    checkpoint.save(tmp_path, small.params(cfg), cfg)
    params, read = checkpoint.load(tmp_path)
    assert same(params, small.params(cfg))
    assert {**read.to_dict(), **cfg.to_dict()} == read.to_dict()


def test_a_saved_config_says_what_was_saved(tmp_path):
    cfg = small.config(extra={"dtype": "bfloat16", "torch_dtype": "bfloat16", "architectures": ["Other"]})
    checkpoint.save(tmp_path, small.params(cfg), cfg, "float16")
    keys = json.loads((tmp_path / "config.json").read_text())
    assert (keys["torch_dtype"], keys["architectures"], keys["model_type"]) == ("float16", ["OPTForCausalLM"], "opt")
    assert "dtype" not in keys
    assert {a.dtype for a in load_file(tmp_path / "model.safetensors").values()} == {np.dtype("float16")}


def test_saved_files_follow_the_umask(tmp_path):
    small.folder(tmp_path)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~checkpoint.UMASK}


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, fails):
    folder, cfg = small.folder(tmp_path, with_tokenizer=False), small.config()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == {"config.json", "model.safetensors"}

    def full_disk(*args, **_):
        if fails == "write":
            args[1].write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    if fails == "write":
        monkeypatch.setattr("safetensors.numpy.save_file", full_disk)
    else:
        monkeypatch.setattr(os, fails, full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(folder, small.params(cfg, seed=1), cfg)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# What cannot be read


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "nowhere", "not there")


def test_a_file_in_place_of_a_folder(tmp_path):
    path = small.folder(tmp_path) / "model.safetensors"
    refused(path, "a file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(tmp_path, name):
    (small.folder(tmp_path) / name).unlink()
    refused(tmp_path, name)


def test_a_config_that_is_not_json(tmp_path):
    (small.folder(tmp_path) / "config.json").write_text("{")
    refused(tmp_path, "config.json", "not JSON")


@pytest.mark.parametrize("name", list(small.named(small.config(), "")))
def test_a_missing_tensor(tmp_path, name):
    cfg = small.config()
    tensors = small.named(cfg)
    del tensors["model.decoder." + name]
    refused(small.write(tmp_path, tensors, cfg), name)


@pytest.mark.parametrize("name", ["model.decoder.layers.2.fc1.weight", "model.decoder.layers.0.fc3.weight", "model.encoder.x", "stray"])
def test_an_unknown_tensor(tmp_path, name):
    cfg = small.config()
    refused(small.write(tmp_path, {**small.named(cfg), name: np.ones((2, 2), np.float32)}, cfg), name.removeprefix("model.decoder."), "unknown")


@pytest.mark.parametrize("name", list(small.named(small.config(), "")))
def test_a_wrong_shape(tmp_path, name):
    cfg = small.config()
    tensors = small.named(cfg)
    array = tensors["model.decoder." + name]
    tensors["model.decoder." + name] = array[:-1]
    refused(small.write(tmp_path, tensors, cfg), name, str(array.shape), str(array[:-1].shape))


def test_a_position_table_without_the_offset(tmp_path):
    cfg = small.config()
    tensors = small.named(cfg)
    tensors["model.decoder.embed_positions.weight"] = tensors["model.decoder.embed_positions.weight"][2:]
    refused(small.write(tmp_path, tensors, cfg), "embed_positions.weight", "(32, 16)", "(34, 16)")


def test_biases_that_the_config_denies(tmp_path):
    tensors = small.named(small.config())
    refused(small.write(tmp_path, tensors, small.config(enable_bias=False)), "unknown", "bias")


def test_two_different_matrices_under_the_tied_names(tmp_path):
    cfg = small.config()
    tensors = small.named(cfg)
    refused(small.write(tmp_path, {**tensors, HEAD: tensors[EMBED] + 1}, cfg), "lm_head.weight", "embed_tokens.weight", "tie_word_embeddings")


def test_an_untied_model_without_its_head(tmp_path):
    cfg = small.config(tie_word_embeddings=False)
    tensors = small.named(cfg)
    del tensors[HEAD]
    refused(small.write(tmp_path, tensors, cfg), "lm_head.weight", load=OPTForCausalLM.from_pretrained)


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short(tmp_path_factory, share):
    folder = small.folder(tmp_path_factory.mktemp("cut"), with_tokenizer=False)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(folder, "model.safetensors")


@pytest.mark.parametrize("stored", ["int8", "int64", "bool", "float8_e4m3fn"])
def test_weights_that_are_no_floats(tmp_path, stored):
    cfg = small.config()
    folder = small.folder(tmp_path, cfg, with_tokenizer=False)
    tensors = {name: torch.tensor(a).to(getattr(torch, stored)) for name, a in small.named(cfg).items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    refused(folder, "stored as", "model.decoder.")


def test_no_opt_at_all(tmp_path):
    refused(small.write(tmp_path, {"transformer.wte.weight": np.ones((3, 2), np.float32)}, small.config()), "transformer.wte.weight")


def test_two_decoders(tmp_path):
    cfg = small.config()
    refused(small.write(tmp_path, small.named(cfg, "a.") | small.named(cfg, "b."), cfg), "2 tensors")


@pytest.mark.parametrize("shard", ["gone.safetensors", "../evil.safetensors", "/etc/passwd", "", ".", "sub/model.safetensors", 7, None, ["a"]])
def test_an_index_that_names_no_shard_of_this_folder(tmp_path, shard):
    cfg = small.config()
    folder = small.write(tmp_path / "model", small.named(cfg), cfg, "a.safetensors")
    save_file(small.named(cfg), tmp_path / "evil.safetensors")
    (folder / "sub").mkdir()
    save_file(small.named(cfg), folder / "sub" / "model.safetensors")
    index = {"weight_map": dict.fromkeys(small.named(cfg), "a.safetensors") | {EMBED: shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "index", str(shard))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\xff"])
def test_an_index_that_is_none(tmp_path, content):
    cfg = small.config()
    folder = small.write(tmp_path, small.named(cfg), cfg, "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    refused(folder)


@given(cut=st.lists(st.sampled_from(list(small.named(small.config(), ""))), unique=True, min_size=1), extra=st.lists(st.integers(0, 9), unique=True))
def test_every_difference_is_counted(cut, extra):
    cfg = small.config()
    flat = {name: a for name, a in flatten(small.params(cfg)).items() if name not in cut} | {f"extra.{i}": np.ones(1) for i in extra}
    with pytest.raises(CheckpointError) as error:
        checkpoint.checked(flat, cfg)
    assert f"{len(cut)} missing" in str(error.value)
    assert (f"{len(extra)} unknown" in str(error.value)) == bool(extra)


# Heads


TASKS = {"score": OPTForSequenceClassification, "qa_outputs": OPTForQuestionAnswering}


@pytest.mark.parametrize("head", TASKS)
def test_a_missing_head_is_refused(tmp_path, head):
    refused(small.folder(tmp_path), head, "new_head=True", load=TASKS[head].from_pretrained)


def test_a_new_head_has_num_labels_rows(tmp_path):
    model = OPTForSequenceClassification.from_pretrained(small.folder(tmp_path), new_head=True, num_labels=5)
    assert model.params["score"]["weight"].shape == (5, 16)
    assert model.config.num_labels == 5


@pytest.mark.parametrize("head", TASKS)
def test_a_new_head_follows_its_seed(tmp_path, head):
    small.folder(tmp_path)
    first, again, other = (TASKS[head].from_pretrained(tmp_path, new_head=True, seed=s).params[head] for s in (3, 3, 4))
    assert same(first, again)
    assert not same(first, other)
    assert np.ptp(first["weight"]) > 0


@pytest.mark.parametrize("head", TASKS)
def test_a_head_in_the_file_is_read_and_no_fresh_one_put_in_its_place(tmp_path, head):
    model = TASKS[head].from_pretrained(small.folder(tmp_path / "base"), new_head=True, num_labels=3)
    model.save_pretrained(tmp_path / "head")
    assert same(TASKS[head].from_pretrained(tmp_path / "head").params, model.params)
    with pytest.raises(ValueError, match="has a head already"):
        TASKS[head].from_pretrained(tmp_path / "head", new_head=True, num_labels=7)


@pytest.mark.parametrize(("head", "cls"), [("score", OPTForCausalLM), ("score", OPTModel), ("qa_outputs", OPTForCausalLM), ("lm_head", OPTModel)])
def test_an_unused_head_is_dropped_with_a_word(tmp_path, head, cls):
    cfg = small.config(tie_word_embeddings=head != "lm_head")
    shapes = {"score": {"weight": (2, 16)}, "qa_outputs": {"weight": (2, 16), "bias": (2,)}, "lm_head": {"weight": (308, 16)}}
    params = small.params(cfg) | {head: {name: np.ones(shape, np.float32) for name, shape in shapes[head].items()}}
    checkpoint.save(tmp_path, params, cfg)
    with pytest.warns(UserWarning, match=f"{head} is not used by {cls.__name__}"):
        model = cls.from_pretrained(tmp_path)
    assert head not in model.params


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_language_model_reads_without_a_word(tmp_path, variant):
    cfg = small.config(**VARIANTS[variant])
    small.folder(tmp_path, cfg, with_tokenizer=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OPTForCausalLM.from_pretrained(tmp_path).num_parameters() == sum(a.size for a in flatten(small.params(cfg)).values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float16"}, ("float16", "float32")),
        ({"backend": "tpu"}, ("'tpu'", "numpy")),
        ({"quantize": "int3"}, ("int3",)),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_is_refused_by_name(tmp_path, options, words):
    with pytest.raises(ValueError, match=r"numpy|quantize") as error:
        OPTForCausalLM.from_pretrained(small.folder(tmp_path), **{"backend": "numpy", **options})
    assert all(word in str(error.value) for word in words)


# Trees


NAMES = st.text(alphabet="abz_", min_size=1, max_size=3)
TREES = st.recursive(st.integers(), lambda node: st.dictionaries(NAMES, node, min_size=1) | st.lists(node, min_size=1, max_size=12), max_leaves=30)


@settings(max_examples=20)
@given(tree=st.dictionaries(NAMES, TREES, min_size=1))
def test_flat_and_nested_are_one(tree):
    flat = flatten(tree)
    assert unflatten(flat) == tree
    assert flatten(unflatten(flat)) == flat


@given(order=st.randoms())
def test_the_order_of_the_file_does_not_matter(order):
    cfg = small.config()
    flat = list(flatten(small.params(cfg)).items())
    order.shuffle(flat)
    assert list(flatten(unflatten(checkpoint.checked(dict(flat), cfg)))) == list(flatten(small.params(cfg)))


def test_a_config_is_not_changed_by_loading(tmp_path):
    cfg = small.config(extra={"note": 1})
    _, read = checkpoint.load(small.folder(tmp_path, cfg))
    assert dataclasses.replace(read, extra={}) == dataclasses.replace(cfg, extra={})


def test_a_quantised_model_is_saved_as_it_is(tmp_path):
    tree, cfg = quantized(small.params(small.config()), small.config(), "int8")
    with pytest.raises(CheckpointError, match=r"is int8, of a quantised model.*leave out dtype=float16"):
        checkpoint.save(tmp_path / "there", tree, cfg, "float16")
    assert not (tmp_path / "there").exists()


def test_a_class_without_a_head_makes_none(tmp_path):
    with pytest.raises(ValueError, match="OPTModel has no head to make"):
        OPTModel.from_pretrained(small.folder(tmp_path), new_head=True)


def test_what_killed_writers_left_is_removed_and_a_files_mode_stays(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left, other = tmp_path / f".a.txt.{gone.pid}-1.tmp", tmp_path / f".a.txt.{os.getpid()}-1.tmp"
    for folder in (left, other):
        folder.mkdir()
        (folder / "a.txt").write_text("half")
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "a.txt").chmod(0o600)
    checkpoint.write_text(tmp_path / "a.txt", "new")
    assert sorted(tmp_path.iterdir()) == [other, tmp_path / "a.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o600
