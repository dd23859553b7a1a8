"""A model larger than memory: its layers read from disk compute the same bits, within the limit that loading it whole would break."""

import gc
import json
import struct
import threading
import time
import warnings
import weakref

import large
import ml_dtypes  # noqa: F401  (bfloat16)
import numpy as np
import pytest
import small

from opt_np import (
    CheckpointError,
    OPTConfig,
    OPTForCausalLM,
    OPTForQuestionAnswering,
    OPTForSequenceClassification,
    OPTModel,
    checkpoint,
    cli,
    grad,
    quantize,
)
from opt_np import layers_on_disk as on_disk
from opt_np.kv_cache import KVCache
from opt_np.tree import flatten

VARIANTS = {
    "pre_norm": {},
    "like_350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 12},
    "galactica_30b": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    "untied": {"tie_word_embeddings": False},
}
CLASSES = {"model": OPTModel, "score": OPTForSequenceClassification, "qa_outputs": OPTForQuestionAnswering}
EMBED, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"
COMPUTED = [("numpy", "float32"), ("numpy", "float64"), ("cpu", "float32"), ("cpu", "float16"), ("cpu", "bfloat16")]


def both(folder, cls=OPTForCausalLM, **how):
    """The model loaded whole, and with its layers on disk."""
    whole, streamed = (cls.from_pretrained(folder, stream_layers=stream, **how) for stream in (False, True))
    assert isinstance(streamed.params["layers"], on_disk.LayersOnDisk)
    assert isinstance(whole.params["layers"], list)
    return whole, streamed


def streamed(folder, **how):
    return OPTForCausalLM.from_pretrained(folder, stream_layers=True, **how)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def deep(**changes):
    return small.config(num_hidden_layers=5, **changes)


# The same bits


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("backend", "dtype"), COMPUTED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_have_the_same_bits(tmp_path, variant, backend, dtype, storage):
    cfg = deep(**VARIANTS[variant])
    folder = small.write(tmp_path, small.stored_as(small.named(cfg), storage), cfg)
    whole, streamed = both(folder, backend=backend, dtype=dtype)
    ids, mask = small.ids(cfg), np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    for _ in range(2):  # the first pass also looks for NaN
        assert same_bits(streamed(ids, mask).logits, whole(ids, mask).logits)
    assert streamed.num_parameters() == whole.num_parameters()
    for i in (0, 4, -1):
        wanted, found = flatten(whole.params["layers"][i]), flatten(streamed.params["layers"][i])
        assert found.keys() == wanted.keys()
        assert all(same_bits(np.asarray(found[name]), np.asarray(wanted[name])) for name in wanted)
    with pytest.raises(IndexError):
        streamed.params["layers"][5]


@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder.", "language_model.model.decoder.", "model.", ""])
@pytest.mark.parametrize("kept", [(EMBED,), (HEAD,), (EMBED, HEAD)], ids=["embed_tokens", "lm_head", "both"])
def test_every_prefix_and_either_tied_name(tmp_path, prefix, kept):
    cfg, tensors = small.config(), small.named(small.config())
    matrix = tensors.pop(EMBED)
    outer = prefix.removesuffix("decoder.").removesuffix("model.")
    tensors = {name.replace("model.decoder.", prefix): a for name, a in tensors.items()}
    tensors |= {outer + HEAD if name == HEAD else prefix + "embed_tokens.weight": matrix for name in kept}
    whole, streamed = both(small.write(tmp_path, tensors, cfg))
    assert same_bits(streamed(small.ids(cfg)).logits, whole(small.ids(cfg)).logits)


def test_a_twin_that_only_the_metadata_names(tmp_path):
    cfg = small.config(tie_word_embeddings=False)
    tensors = {name: a for name, a in small.named(cfg).items() if name != HEAD}
    whole, streamed = both(small.write(tmp_path, tensors, cfg, **{HEAD: EMBED}))
    assert same_bits(streamed(small.ids(cfg)).logits, whole(small.ids(cfg)).logits)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_shards_that_cut_through_layers(tmp_path, backend):
    cfg = deep()
    checkpoint.save(tmp_path, small.params(cfg), cfg, max_shard_bytes=5000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    whole, streamed = both(tmp_path, backend=backend)
    assert same_bits(streamed(small.ids(cfg)).logits, whole(small.ids(cfg)).logits)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_numbers_at_odd_addresses(tmp_path, backend):
    """The format lets a tensor begin anywhere: here everything does after one byte."""
    cfg, data, entries = small.config(), b"\x01", {"decoder.version": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    for name, a in small.named(cfg).items():
        entries[name] = {"dtype": "F32", "shape": list(a.shape), "data_offsets": [len(data), len(data) + a.nbytes]}
        data += a.tobytes()
    header = json.dumps(entries)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    checkpoint.write_text(tmp_path / "config.json", json.dumps(cfg.to_dict()))
    whole, streamed = both(tmp_path, backend=backend)
    assert same_bits(streamed(small.ids(cfg)).logits, whole(small.ids(cfg)).logits)
    assert backend == "cpu" or all(a.flags.aligned for a in flatten(streamed.params["layers"][1]).values())


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_model(tmp_path, kind, backend):
    cfg = deep(hidden_size=32, ffn_dim=64)
    checkpoint.save(tmp_path, *quantize.quantized(small.params(cfg), cfg, kind))
    whole, streamed = both(tmp_path, backend=backend)
    assert same_bits(streamed(small.ids(cfg)).logits, whole(small.ids(cfg)).logits)
    assert streamed.num_parameters() == whole.num_parameters()
    with pytest.raises(ValueError, match=r"quantize='int8' and stream_layers: .*opt-np quantize"):
        OPTForCausalLM.from_pretrained(tmp_path, quantize="int8", stream_layers=True)


@pytest.mark.parametrize("head", CLASSES)
def test_the_other_classes(tmp_path, head):
    folder, ids = small.folder(tmp_path, deep(), with_tokenizer=False), small.ids(deep())
    how = {} if head == "model" else {"new_head": True, "num_labels": 3}
    whole, streamed = both(folder, CLASSES[head], **how)
    fields = {"model": ["last_hidden_state"], "score": ["logits"], "qa_outputs": ["start_logits", "end_logits"]}[head]
    for field in fields:
        assert same_bits(getattr(streamed(ids), field), getattr(whole(ids), field))


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3}, {"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 4}], ids=str)
def test_generating(tmp_path, backend, options):
    """One, two and many tokens at a time; the left row is padded."""
    whole, streamed = both(small.folder(tmp_path, deep(), with_tokenizer=False), backend=backend)
    ids, mask = small.ids(deep()), np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1], [1] * 9])
    wanted, found = (m.generate(ids, mask, max_new_tokens=12, no_repeat_ngram_size=1, **options) for m in (whole, streamed))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_a_cache_filled_in_cuts(tmp_path, backend):
    whole, streamed = both(small.folder(tmp_path, deep(), with_tokenizer=False), backend=backend)
    caches, ids = (KVCache(), KVCache()), small.ids(deep())
    for cut in (slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 9)):
        wanted, found = (m(ids[:, cut], past_key_values=cache).logits for m, cache in zip((whole, streamed), caches, strict=True))
        assert same_bits(found, wanted)


def test_taps_hidden_states_attentions_and_loss(tmp_path):
    whole, streamed = both(small.folder(tmp_path, deep(), with_tokenizer=False))
    ids, seen = small.ids(deep()), ([], [])
    outs = [
        m(ids, labels=ids, output_hidden_states=True, output_attentions=True, tap=lambda name, value, names=names: names.append(name) or value)
        for m, names in zip((whole, streamed), seen, strict=True)
    ]
    assert seen[0] == seen[1]
    assert outs[0].loss == outs[1].loss
    for field in ("hidden_states", "attentions"):
        assert all(same_bits(a, b) for a, b in zip(*(getattr(out, field) for out in outs), strict=True))


# What is in memory, and when it is read


def reads(monkeypatch):
    """Which layers were read, in order, and weak references to what was; 16 tensors are a layer."""
    of, arrays, read = [], [], on_disk.Tensor.read

    def noted(tensor):
        array = read(tensor)
        arrays.append(weakref.ref(array))
        of.append((tensor.path.name, tensor.offset))
        return array

    monkeypatch.setattr(on_disk.Tensor, "read", noted)
    return of, arrays


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def test_one_layer_is_read_ahead_and_none_is_kept(tmp_path, monkeypatch):
    layers = streamed(small.folder(tmp_path, deep(), with_tokenizer=False)).params["layers"]
    of, arrays = reads(monkeypatch)
    for i, layer in enumerate(layers):
        wait_for(lambda i=i: len(of) == 16 * min(i + 2, 5))  # while this layer would compute
        time.sleep(0.01)
        gc.collect()
        alive = {at // 16 for at, array in enumerate(arrays) if array() is not None}
        assert alive == {i, min(i + 1, 4)}
        assert any(array() is layer["fc1"]["weight"] for array in arrays[16 * i : 16 * (i + 1)])
    del layer
    gc.collect()
    assert not any(array() is not None for array in arrays)
    assert len(of) == len(set(of)) == 5 * 16


def test_layers_are_packed_in_the_callers_thread(tmp_path):
    """Not every threading layer that Numba has can be entered by two threads at once."""
    layers, packed_in = streamed(small.folder(tmp_path, deep(), with_tokenizer=False)).params["layers"], []
    layers._pack = lambda layer, release: packed_in.append(threading.current_thread()) or layer
    assert len(list(layers)) == 5
    assert packed_in == [threading.current_thread()] * 5


def test_what_the_file_has_in_the_right_type_is_not_copied(tmp_path):
    layer = streamed(small.folder(tmp_path, with_tokenizer=False)).params["layers"][0]
    for array in flatten(layer).values():
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_only_the_layers_stay_on_disk(tmp_path):
    params = streamed(small.folder(tmp_path, small.config(tie_word_embeddings=False), with_tokenizer=False)).params
    assert list(params) == ["embed_tokens", "embed_positions", "final_layer_norm", "lm_head", "layers"]
    in_memory = flatten({name: p for name, p in params.items() if name != "layers"}).values()
    assert all(array.flags.writeable and array.base is None for array in in_memory)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, OSError(5, "Input/output error")])
def test_an_error_while_reading_ahead_reaches_the_caller(tmp_path, monkeypatch, error):
    model = streamed(small.folder(tmp_path, deep(), with_tokenizer=False))
    ids = small.ids(deep())
    wanted = model(ids).logits

    def failing(*args, **options):
        if threading.current_thread() is threading.main_thread():
            raise AssertionError("not in the background")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(np, "memmap", failing)
        with pytest.raises((MemoryError, KeyboardInterrupt, CheckpointError), match="Input/output error" if isinstance(error, OSError) else None):
            model(ids)
    assert same_bits(model(ids).logits, wanted)
    assert not threads()


def test_an_interrupted_pass_leaves_no_thread(tmp_path):
    model = streamed(small.folder(tmp_path, deep(), with_tokenizer=False))

    def interrupt(name, value):
        if name == "model.decoder.layers.2":
            assert len(threads()) == 1
            raise KeyboardInterrupt
        return value

    with pytest.raises(KeyboardInterrupt) as interrupted:
        model(small.ids(deep()), tap=interrupt)
    del interrupted  # its traceback holds the pass
    gc.collect()
    assert not threads()


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_two_passes_at_once(tmp_path, backend):
    whole, streamed = both(small.folder(tmp_path, deep(), with_tokenizer=False), backend=backend)
    wanted = [whole(small.ids(deep(), seed=seed)).logits for seed in range(2)]
    found, barrier = [[], []], threading.Barrier(2)

    def run(seed):
        barrier.wait(20)
        for _ in range(10):
            found[seed].append(streamed(small.ids(deep(), seed=seed)).logits)

    running = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert [len(logits) for logits in found] == [10, 10]
    assert all(same_bits(logits, wanted[seed]) for seed in range(2) for logits in found[seed])


# What is refused


@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen", "another type", "more layers", "cut"])
def test_a_bad_layer_is_told_before_anything_is_computed(tmp_path, monkeypatch, damage):
    cfg, tensors = deep(), small.named(deep())
    name = "model.decoder.layers.3.fc1.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors["model.decoder.layers.3.fc3.weight"] = tensors[name]
    elif damage == "misshapen":
        tensors[name] = tensors[name].T
    elif damage == "another type":
        tensors[name] = tensors[name].astype(np.int8)
    elif damage == "more layers":
        cfg = small.config(num_hidden_layers=6)
    folder = small.write(tmp_path, tensors, cfg)
    if damage == "cut":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    monkeypatch.setattr(on_disk.LayersOnDisk, "_read", lambda *_: pytest.fail("read a layer"))
    messages = []
    for load in (streamed, OPTForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError) as error:
            load(folder)
        messages.append(str(error.value))
        assert messages[-1].isprintable()
    if damage == "cut":
        assert all("model.safetensors cannot be read as safetensors" in message and "copied whole" in message for message in messages)
    else:
        assert messages[0] == messages[1]


A = '"dtype":"F32","shape":[2],"data_offsets":'
HEADERS = {  # of 8 bytes of numbers
    "no object": "[1]",
    "a number": "1",
    "a hole": f'{{"a":{{{A}[4,12]}}}}',
    "an overlap": f'{{"a":{{{A}[0,8]}},"b":{{{A}[0,8]}}}}',
    "a name twice": f'{{"a":{{{A}[0,8]}},"a":{{{A}[0,8]}}}}',
    "a field twice": f'{{"a":{{"dtype":"F32",{A}[0,8]}}}}',
    "-0": f'{{"a":{{{A}[-0,8]}}}}',
    "a fraction": f'{{"a":{{{A}[0,8.0]}}}}',
    "a name that is no text": f'{{"a\\ud800":{{{A}[0,8]}}}}',
    "no JSON": f'{{"a":{{{A}[0,8],"x":NaN}}}}',
    "too deep": "[" * 100_000,
    "digits without end": f'{{"a":{{{A}[0,{"9" * 5000}]}}}}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_refused(tmp_path, case):
    path, text = tmp_path / "a.safetensors", HEADERS[case].encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(12 if case == "a hole" else 8))
    for read in (checkpoint.read_safetensors, on_disk.tensors_of):
        with pytest.raises(CheckpointError, match=r"a\.safetensors (cannot be read as safetensors: .*copied whole|names a twice)"):
            list(read(path))


@pytest.mark.parametrize("format", ["bin", "h5", "msgpack"])
def test_other_formats_are_to_be_converted(tmp_path, format):
    folder = small.folder(tmp_path, with_tokenizer=False)
    file = {"bin": "pytorch_model.bin", "h5": "tf_model.h5", "msgpack": "flax_model.msgpack"}[format]
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(CheckpointError, match=f"{file} cannot be read one layer at a time; .*opt-np convert"):
        streamed(folder)


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("where", ["layers.3.fc1.weight", "embed_positions.weight"])
def test_nan_is_told_when_first_read(tmp_path, where, storage):
    cfg, tensors = deep(), small.named(deep())
    tensors[f"model.decoder.{where}"][2, 3] = np.nan
    folder, ids = small.write(tmp_path, small.stored_as(tensors, storage), cfg), small.ids(cfg)
    told = pytest.warns(UserWarning, match=f"{tmp_path}: {where} hold NaN or infinite weights")
    with warnings.catch_warnings(action="error") if "layers" in where else told:
        model = streamed(folder)
    with told if "layers" in where else warnings.catch_warnings(action="error"):
        first = model(ids).logits
    with warnings.catch_warnings(action="error"):
        assert same_bits(model(ids).logits, first)
    with pytest.raises(CheckpointError, match=f"{where} hold NaN or infinite weights; .*without strict"):
        streamed(folder, strict=True)(ids)


@pytest.mark.parametrize("change", ["cut", "rewritten", "replaced", "removed"])
def test_a_file_that_changes_while_in_use(tmp_path, change):
    folder = small.folder(tmp_path, deep(), with_tokenizer=False)
    model, path = streamed(folder), folder / "model.safetensors"
    model(small.ids(deep()))
    if change == "cut":
        with open(path, "r+b") as file:
            file.truncate(file.seek(0, 2) // 2)
    elif change == "rewritten":
        path.write_bytes(path.read_bytes())
    elif change == "replaced":
        checkpoint.save(folder, small.params(deep(), seed=1), deep())
    else:
        path.unlink()
    told = "cannot be read: No such file" if change == "removed" else "has changed since the model was loaded"
    with pytest.raises(CheckpointError, match=f"{path} {told}"):
        model(small.ids(deep()))


def test_saving_and_training_are_refused(tmp_path):
    model = streamed(small.folder(tmp_path / "a", with_tokenizer=False))
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'b'}: .*without stream_layers"):
        model.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()
    ids = small.ids(small.config())
    with pytest.raises(ValueError, match=r"gradients need every layer in memory.*without stream_layers"):
        grad.loss_and_grads(model.params, ids, ids, model.config)


# The command line


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("command", [["generate", "the cat", "--max-new-tokens", "6"], ["logits", "the cat"]], ids=lambda words: words[0])
def test_the_command_line_prints_the_same(tmp_path, capsys, monkeypatch, command, backend):
    words = [*command, "--model", str(small.folder(tmp_path)), "--backend", backend]
    assert cli.main(words) == 0
    wanted, kept = capsys.readouterr(), []
    monkeypatch.setattr(on_disk.LayersOnDisk, "__init__", lambda self, *args, of=on_disk.LayersOnDisk.__init__: kept.append(self) or of(self, *args))
    assert cli.main([*words, "--stream-layers"]) == 0
    assert capsys.readouterr() == wanted
    assert len(kept) == 1


# A limit of memory

GENERATES = """
folder, out, stream = sys.argv[3:]
model = OPTForCausalLM.from_pretrained(folder, backend=sys.argv[1], stream_layers=stream == "True")
ids = np.arange(4, 20).reshape(2, 8)
np.savez(out, logits=model(ids).logits, ids=model.generate(ids, max_new_tokens=3))
"""


@pytest.fixture(scope="module")
def of_256_mb(tmp_path_factory):
    cfg = OPTConfig(vocab_size=300, hidden_size=576, num_hidden_layers=16, num_attention_heads=8, ffn_dim=2304, max_position_embeddings=64)
    folder = large.checkpoint(tmp_path_factory.mktemp("large"), cfg, "float32")
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 255e6
    return folder


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_a_model_runs_in_half_the_memory_that_it_needs(of_256_mb, tmp_path, backend):
    done = large.limited(GENERATES, backend, 128_000_000, of_256_mb, tmp_path / "out.npz", True)
    assert done.returncode == 0, done.stderr
    model, found = OPTForCausalLM.from_pretrained(of_256_mb, backend=backend), np.load(tmp_path / "out.npz")
    ids = np.arange(4, 20).reshape(2, 8)
    assert same_bits(found["logits"], model(ids).logits)
    np.testing.assert_array_equal(found["ids"], model.generate(ids, max_new_tokens=3))


def test_and_loaded_whole_it_needs_them(of_256_mb, tmp_path):
    """So that the limit is one."""
    for limit, fits in ((128_000_000, False), (700_000_000, True)):
        done = large.limited(GENERATES, "numpy", limit, of_256_mb, tmp_path / "out.npz", False)
        assert (done.returncode == 0, (tmp_path / "out.npz").exists()) == (fits, fits), done.stderr
