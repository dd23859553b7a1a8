"""int8 and int4: their definition, their distance from the weights, the packed kernels against the definition, and models that use them."""

import copy

import numba
import numpy as np
import pytest
import small
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import build

from opt_fast import attention_parts, gemm, ops_cpu
from opt_fast.gemm import TILE
from opt_fast.gemm_int import BLOCK_K, PackedIntegers
from opt_np import CheckpointError, OPTForCausalLM, OPTForSequenceClassification, OPTTokenizer, checkpoint, grad, model, ops
from opt_np.cli import SHIPPED, main
from opt_np.quantize import column_sizes, quantize_matrix, quantized, relative_error
from opt_np.tasks import read_texts
from opt_np.tree import flatten, unflatten

KINDS = [("int8", 32), ("int4", 32), ("int4", 64)]
MOST = {"int8": 0.01, "int4": 0.11}  # relative error of a matrix of normal numbers


def matrix(O, I, seed=0, size=0.02):
    return (np.random.default_rng([O, I, seed]).normal(size=(O, I)) * size).astype(np.float32)


def with_outliers(w, columns=(0, 3), factor=60.0):
    w = w.copy()
    w[:, [c for c in columns if c < w.shape[1]]] *= np.float32(factor)
    return w


shapes = {"O": st.integers(1, 70), "half": st.sampled_from([1, 2, 3, 8, 15, 16, 17, 20, 33, 48, 96, BLOCK_K // 2, BLOCK_K // 2 + 5, BLOCK_K])}
kinds = st.sampled_from(KINDS)


# ---- what the numbers mean ---------------------------------------------------------------------------------------------------------------


def test_what_the_leaves_mean():
    eight = {"weight": np.array([[1, -2], [127, 0]], np.int8), "scale": np.array([0.5, 2], np.float32)}
    np.testing.assert_array_equal(ops.dequantized(**eight), [[0.5, -1], [254, 0]])
    np.testing.assert_array_equal(ops.dequantized(**eight, columns=np.array([1, 4], np.float32)), [[0.5, -4], [254, 0]])
    weight = np.zeros((1, 20), np.uint8)  # 40 columns: two groups of 32, the second short
    weight[0, :2], weight[0, 16] = [0x0F, 0x98], 0xF8
    four = {"weight": weight, "scale": np.array([[0.5, 2]], np.float16)}
    expected = np.full(40, -4.0)
    expected[32:], expected[:4], expected[32:34] = -16, [3.5, -4, 0, 0.5], [0, 14]
    np.testing.assert_array_equal(ops.dequantized(**four)[0], expected)
    x = np.arange(40, dtype=np.float64)[None]
    np.testing.assert_array_equal(ops.linear(x, **four, bias=np.ones(1)), [[x[0] @ expected + 1]])
    assert ops.linear(x, **four).dtype == np.float64
    np.testing.assert_array_equal(ops.embed(np.array([[0, 0]]), **four), np.tile(expected, (1, 2, 1)))


@given(**shapes, kind=kinds, outliers=st.booleans(), size=st.sampled_from([1e-6, 0.02, 30.0]))
def test_no_weight_is_further_away_than_half_a_step(O, half, kind, outliers, size):
    w = matrix(O, 2 * half, size=size)
    w = with_outliers(w) if outliers else w
    leaf = quantize_matrix(w, *kind)
    error = np.abs(ops.dequantized(**leaf) - w)
    columns = leaf.get("columns", np.ones(2 * half, np.float32))
    if kind[0] == "int8":
        assert (error <= 0.5001 * leaf["scale"][:, None] * columns).all()
        assert np.abs(leaf["weight"]).max() <= 127
    else:  # the largest of a group may be cut off, by less than two steps
        scale = np.repeat(leaf["scale"].astype(np.float32), kind[1], axis=1)[:, : 2 * half]
        assert (error <= (1.6 * np.abs(scale) + 6e-8 * 9) * columns).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_error_of_normal_numbers(kind):
    w = matrix(200, 512)
    assert relative_error(w, quantize_matrix(w, *kind)) < MOST[kind[0]]
    for outliers in (with_outliers(w), with_outliers(w, factor=1 / 60)):
        leaf = quantize_matrix(outliers, *kind)
        d = (ops.dequantized(**leaf) - outliers) / outliers.std(0)  # each column on its own scale: none is lost
        assert np.sqrt((d**2).mean(0)).max() < 2 * MOST[kind[0]]


def test_a_better_step_is_found_than_the_largest_number_gives():
    w = matrix(100, 320)
    groups = w.reshape(-1, 32)
    largest = groups[np.arange(len(groups)), np.abs(groups).argmax(1)][:, None]
    plain = np.clip(np.rint(groups / (largest / -8)), -8, 7) * (largest / -8)
    leaf = quantize_matrix(w, "int4")
    assert relative_error(w, leaf) < 0.97 * np.linalg.norm(plain - groups) / np.linalg.norm(groups)


def test_uneven_columns():
    w = matrix(64, 128)
    assert column_sizes(w) is None
    assert "columns" not in quantize_matrix(w, "int8")
    sizes = column_sizes(with_outliers(w, (5, 9)))
    np.testing.assert_array_equal(np.flatnonzero(sizes != 1), [5, 9])
    np.testing.assert_array_equal(sizes[[5, 9]], [64, 64])
    np.testing.assert_array_equal(column_sizes(with_outliers(w, (5,), 1 / 60))[5], 1 / 64)
    w[:, 7] = 0
    assert column_sizes(w) is None
    np.testing.assert_array_equal(ops.dequantized(**quantize_matrix(np.zeros((3, 8), np.float32), "int4")), np.zeros((3, 8)))
    np.testing.assert_array_equal(ops.dequantized(**quantize_matrix(np.zeros((3, 8), np.float32), "int8")), np.zeros((3, 8)))


# ---- the packed kernels ------------------------------------------------------------------------------------------------------------------


@given(**shapes, kind=kinds, outliers=st.booleans(), seed=st.integers(0, 9))
def test_a_packed_weight_is_what_its_leaves_mean(O, half, kind, outliers, seed):
    w = matrix(O, 2 * half, seed)
    leaf = quantize_matrix(with_outliers(w) if outliers else w, *kind)
    packed, meaning = PackedIntegers(**leaf), ops.dequantized(**leaf)
    np.testing.assert_array_equal(np.asarray(packed), meaning)
    ids = np.random.default_rng(seed).integers(0, O, (2, 3))
    np.testing.assert_array_equal(ops_cpu.embed(ids, packed), meaning[ids])
    np.testing.assert_array_equal(ops_cpu.embed(ids, **leaf), meaning[ids])
    assert (packed.size, packed.shape) == (w.size, w.shape)


def test_an_odd_number_of_columns():
    leaf, x = quantize_matrix(matrix(20, 21), "int8"), matrix(3, 21, size=1)
    np.testing.assert_array_equal(np.asarray(PackedIntegers(**leaf)), ops.dequantized(**leaf))
    np.testing.assert_allclose(ops_cpu.linear(x, **leaf), ops.linear(x, **leaf), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="has 21 columns; int4 keeps two in a byte"):
        quantized({"fc1": {"weight": matrix(20, 21)}}, small.config(), "int4")


@given(**shapes, M=st.integers(1, 80), kind=kinds, outliers=st.booleans(), bias=st.booleans(), relu=st.booleans(),
       threads=st.integers(1, numba.config.NUMBA_NUM_THREADS))  # fmt: skip
@settings(max_examples=60)
def test_a_product_is_that_of_the_meaning_and_its_rows_are_what_they_are_alone(O, half, M, kind, outliers, bias, relu, threads):
    w, x = matrix(O, 2 * half), matrix(M, 2 * half, seed=1, size=1)
    leaf, b = quantize_matrix(with_outliers(w) if outliers else w, *kind), matrix(1, O, seed=2)[0] if bias else None
    if outliers:
        x[:, -1] *= 60  # a channel of x that is far larger than the others
    packed, function, before = PackedIntegers(**leaf), "relu" if relu else None, numba.get_num_threads()
    try:
        numba.set_num_threads(threads)
        y = gemm.matmul(x, packed, b, function)
    finally:
        numba.set_num_threads(before)
    meaning = ops.dequantized(**leaf).astype(float)
    exact = x.astype(float) @ meaning.T + (0 if b is None else b)
    exact = np.maximum(exact, 0) if relu else exact
    # each number of x is off by at most half of the largest of its row over 32767, at random
    allowed = np.abs(x).max(1, keepdims=True) / 32767 * np.linalg.norm(meaning * np.ones(2 * half), axis=1) * 2.5 + 1e-5 * np.abs(exact).max()
    columns = leaf.get("columns")
    if columns is not None:
        allowed = np.abs(x * columns).max(1, keepdims=True) / 32767 * np.linalg.norm(meaning / columns, axis=1) * 2.5 + 1e-5 * np.abs(exact).max()
    assert (np.abs(y - exact) <= allowed).all()
    for i in np.random.default_rng(0).integers(0, M, 3):
        np.testing.assert_array_equal(gemm.matmul(x[i : i + 1], packed, b, function)[0], y[i])
        np.testing.assert_array_equal(gemm.matmul(x[: i + 1], packed, b, function)[i], y[i])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("M", [1, 5, 13])
def test_rows_that_are_rounded_once_serve_every_task(kind, M):
    """Few rows, several blocks of k, and more panels than a thread takes at a time: against one panel alone."""
    w, x = matrix(700, 2 * BLOCK_K + 64), matrix(M, 2 * BLOCK_K + 64, seed=1, size=1)
    y = gemm.matmul(x, PackedIntegers(**quantize_matrix(w, *kind)))
    for first in range(0, 700, 64):
        panel = PackedIntegers(**quantize_matrix(w[first : first + 64], *kind))
        np.testing.assert_array_equal(gemm.matmul(x, panel), y[:, first : first + 64])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sums_are_exact_to_the_last_unit(kind):
    """x and weights that are whole numbers already, at their largest: every product and sum must fit."""
    for sign in (1, -1):
        w = np.full((5, 2 * BLOCK_K), 127.0 if kind[0] == "int8" else -8.0, np.float32)
        w[1:3, ::2] *= -0.875 if kind[0] == "int4" else -1
        w[4, ::7] = 0
        x = np.full((9, 2 * BLOCK_K), sign * 32767, np.float32)
        x[3:5, 1::2] *= -1
        leaf = quantize_matrix(w, *kind)
        np.testing.assert_array_equal(ops.dequantized(**leaf), w)
        y, exact = gemm.matmul(x, PackedIntegers(**leaf)), x.astype(float) @ w.T.astype(float)
        np.testing.assert_allclose(y, exact, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nan_and_infinity_stay_in_their_rows_and_zero_is_zero(kind):
    x = matrix(9, 800, size=1)
    packed = PackedIntegers(**quantize_matrix(matrix(20, 800), *kind))
    before = gemm.matmul(x, packed)
    for i, value in ((2, np.nan), (4, np.inf), (7, -np.inf)):
        x[i, 100 * i] = value
    x[5], x[6] = 0, 1e-38
    y, bias = gemm.matmul(x, packed), np.arange(20, dtype=np.float32)
    assert np.isnan(y[[2, 4, 7]]).all()
    np.testing.assert_array_equal(y[[0, 1, 3, 8]], before[[0, 1, 3, 8]])
    np.testing.assert_array_equal(gemm.matmul(x[5:6], packed, bias)[0], bias)
    assert not y[6].any()
    with pytest.raises(ValueError, match="takes whole rows"):
        gemm.matmul(np.asfortranarray(x), packed)


# ---- models ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("variant", ["pre_norm", "like_350m", "galactica_30b", "untied", "wide_embeddings"])
def test_both_backends_compute_what_the_leaves_mean(variant, kind, monkeypatch):
    _, cfg, exact = build(variant)
    tree, cfg = quantized(small.cast(exact, "float32"), cfg, *kind)
    meaning = {name: a for name, a in flatten(tree).items() if not name.endswith((".scale", ".columns"))}
    for name in [name for name in flatten(tree) if name.endswith(".scale")]:
        stem = name.removesuffix("scale")
        leaf = {part: flatten(tree)[stem + part] for part in ("weight", "scale", "columns") if stem + part in flatten(tree)}
        meaning[f"{stem}weight"] = ops.dequantized(**leaf)
    ids = np.random.default_rng(0).integers(4, cfg.vocab_size, (2, 11))
    expected = model.forward(unflatten({name: np.asarray(a, np.float64) for name, a in meaning.items()}), ids, cfg)
    assert np.abs(model.forward(tree, ids, cfg) - expected).max() < 1e-5 * np.abs(expected).max()
    with monkeypatch.context() as patch:
        patch.setattr(attention_parts, "TILE", TILE._replace(pairs=""))  # attention in float32, for it hides small errors where it is in bfloat16
        assert np.abs(model.forward(ops_cpu.pack(tree), ids, cfg, ops=ops_cpu) - expected).max() < 3e-4 * np.abs(expected).max()
    if TILE.pairs:
        assert np.abs(model.forward(ops_cpu.pack(tree), ids, cfg, ops=ops_cpu) - expected).max() < 5e-3 * np.abs(expected).max()
    np.testing.assert_array_equal(model.forward(tree, ids, cfg, ops=ops_cpu), model.forward(ops_cpu.pack(tree), ids, cfg, ops=ops_cpu))
    lm = OPTForCausalLM(small.cast(exact, "float32"), build(variant)[1])
    assert OPTForCausalLM(tree, cfg).num_parameters() == OPTForCausalLM(tree, cfg, backend="cpu").num_parameters() == lm.num_parameters()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_folder_is_what_loading_makes(kind, tmp_path, capsys):
    source, out = small.folder(tmp_path / "model"), tmp_path / "small"
    assert main(["quantize", str(source), str(out), "--kind", kind]) == 0
    told = capsys.readouterr().out
    assert "layers.1.fc2.weight" in told
    assert "relative error" in told
    assert "embed_positions" not in told
    ids = small.ids(small.config())
    for backend in ("numpy", "cpu"):
        made = OPTForCausalLM.from_pretrained(source, backend=backend, quantize=kind)
        read = OPTForCausalLM.from_pretrained(out, backend=backend)
        streamed = OPTForCausalLM.from_pretrained(out, backend=backend, stream_layers=True)
        np.testing.assert_array_equal(made(ids).logits, read(ids).logits)
        np.testing.assert_array_equal(made(ids).logits, streamed(ids).logits)
        assert made.config == read.config
        assert made.config.quantized == (kind, 32 if kind == "int4" else None)
    assert main(["info", "--model", str(out)]) == 0
    assert f"{OPTForCausalLM.from_pretrained(source).num_parameters():,} in" in capsys.readouterr().out
    assert main(["generate", "the cat", "--model", str(out), "--max-new-tokens", "3"]) == 0
    OPTForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")  # unpacked leaves are saved as they are
    np.testing.assert_array_equal(OPTForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, OPTForCausalLM.from_pretrained(out)(ids).logits)


def test_what_cannot_be_done_with_whole_numbers_says_so(tmp_path, capsys):
    source, out = small.folder(tmp_path / "model"), tmp_path / "small"
    main(["quantize", str(source), str(out)])
    ids = small.ids(small.config())
    packed = OPTForCausalLM.from_pretrained(out, backend="cpu")
    with pytest.raises(CheckpointError, match="is packed as int8, and cannot be saved; opt-np quantize"):
        packed.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    for lm in (packed, OPTForCausalLM.from_pretrained(out)):
        with pytest.raises(ValueError, match="whole numbers have no gradients"):
            grad.loss_and_grads(lm.params, ids, ids, lm.config, ops=lm.ops)
    with pytest.raises(CheckpointError, match="is int8 already"):
        OPTForCausalLM.from_pretrained(out, quantize="int4")
    with pytest.raises(ValueError, match="quantize='int3' is none of int8, int4"):
        OPTForCausalLM.from_pretrained(source, quantize="int3")
    with pytest.raises(ValueError, match="group_size is 48; it is one of 32, 64"):
        quantized(small.params(small.config()), small.config(), "int4", 48)
    with pytest.raises(ValueError, match="are quantised already"):
        quantized(OPTForCausalLM.from_pretrained(out).params, small.config(), "int4")
    with pytest.raises(ValueError, match="every pass would quantise again"):
        OPTForCausalLM.from_pretrained(source, quantize="int8", stream_layers=True)
    capsys.readouterr()
    assert main(["quantize", str(out), str(tmp_path / "twice")]) == 1
    assert main(["quantize", str(source), str(out)]) == 1
    assert main(["quantize", str(source), str(tmp_path / "groups"), "--kind", "int8", "--group-size", "32"]) == 1
    assert main(["train", "--model", str(out), "--text", __file__, "--out", str(tmp_path / "t"), "--steps", "1", "--context", "8"]) == 1
    told = capsys.readouterr().err.splitlines()
    for part, line in zip(("is int8 already", "is there already", "int8 has a scale for each row", "whole numbers have no"), told, strict=True):
        assert part in line
    broken = small.params(small.config())
    broken["layers"][0]["fc1"]["weight"][3, 4] = np.nan
    with pytest.raises(ValueError, match=r"fc1\.weight holds NaN or infinite numbers, and cannot be int8"):
        quantized(broken, small.config(), "int8")


def test_a_quantised_folder_that_does_not_fit_its_config(tmp_path):
    cfg = small.config()
    tree, said = quantized(small.params(cfg), cfg, "int8")
    checkpoint.save(tmp_path / "good", tree, said)
    checkpoint.save(tmp_path / "unsaid", tree, cfg)
    with pytest.raises(CheckpointError, match=r"is stored as int8; weights are .* Is the checkpoint quantised"):
        OPTForCausalLM.from_pretrained(tmp_path / "unsaid")
    for name, edit, told in (
        ("float", lambda leaf: leaf.update(weight=leaf["weight"] * np.float32(1)), "fc1.weight is float32; config.json's quantization_config wants"),
        ("scale", lambda leaf: leaf.update(scale=leaf["scale"].astype(np.float16)), "fc1.scale is float16"),
        ("missing", lambda leaf: leaf.pop("scale"), "1 missing (layers.0.fc1.scale)"),
        ("shape", lambda leaf: leaf.update(scale=leaf["scale"][:-1]), "layers.0.fc1.scale is (23,); config.json wants (24,)"),
    ):  # fmt: skip
        wrong = copy.deepcopy(tree)
        edit(wrong["layers"][0]["fc1"])
        checkpoint.save(tmp_path / name, wrong, said)
        for options in ({}, {"stream_layers": True}):
            with pytest.raises(CheckpointError) as error:
                OPTForCausalLM.from_pretrained(tmp_path / name, **options)
            assert told in str(error.value)
    ours = {"quant_method": "opt-np"}
    for entry in ({"quant_method": "gptq", "bits": 4}, {**ours, "kind": "int3"}, {**ours, "kind": "int4"}, "int8"):
        with pytest.raises(ValueError, match="opt_np computes only None and what opt-np quantize writes"):
            small.config(extra={"quantization_config": entry})


def test_a_classifier_keeps_its_head_in_floats(tmp_path):
    lm = OPTForSequenceClassification.from_pretrained(small.folder(tmp_path), quantize="int8", backend="cpu", new_head=True, num_labels=3)
    assert lm.params["score"]["weight"].dtype == np.float32
    assert lm(small.ids(lm.config)).logits.shape == (2, 3)


# ---- how much a model loses --------------------------------------------------------------------------------------------------------------


def outlier_channels(params):
    """The same function with six channels 60 times as large: LayerNorm makes them so, and what reads them undoes it."""
    channels, factor = (3, 40, 77, 128, 200, 251), np.float32(60)
    params = copy.deepcopy(params)
    for layer in params["layers"]:
        attn = layer["self_attn"]
        for norm, readers in (("self_attn_layer_norm", [attn["q_proj"], attn["k_proj"], attn["v_proj"]]), ("final_layer_norm", [layer["fc1"]])):
            for part in layer[norm].values():
                part[list(channels)] *= factor
            for p in readers:
                p["weight"][:, list(channels)] /= factor
    return params


@pytest.fixture(scope="module")
def shipped_text():
    """The model in the box, and 6 rows of text: a book it never saw, or, where that is not at hand, what it says itself."""
    lm = OPTForCausalLM.from_pretrained(SHIPPED, backend="cpu")
    if (SHARED / "corpus").is_dir():
        tokens = OPTTokenizer.from_pretrained(SHIPPED).encode(read_texts([SHARED / "corpus" / "valid"])[0])[1 : 6 * 300 + 1]
        return lm, np.insert(np.reshape(tokens, (6, 300)), 0, 2, axis=1)
    return lm, lm.generate(np.full((6, 1), 2), do_sample=True, top_k=0, seed=0, max_new_tokens=300, eos_token_id=-1)


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_shipped_model_loses_little(shipped_text, kind, outliers):
    perplexity, logits = {"int8": (0.01, 0.01), "int4": (0.04, 0.1)}[kind[0]]
    lm, ids = shipped_text
    params = OPTForCausalLM.from_pretrained(SHIPPED).params
    tree, cfg = quantized(outlier_channels(params) if outliers else params, lm.config, *kind)
    exact, ours = lm(ids, labels=ids), OPTForCausalLM(tree, cfg, backend="cpu")(ids, labels=ids)
    assert np.linalg.norm(ours.logits - exact.logits) < logits * np.linalg.norm(exact.logits)
    assert abs(np.exp(ours.loss - exact.loss) - 1) < perplexity


def test_eight_bits_for_activations_would_not_survive_outliers(shipped_text):
    """Why x is rounded to 16 bits: with one scale of 8 bits for a token, six large channels leave nothing of the others."""
    lm, ids = shipped_text
    params = outlier_channels(OPTForCausalLM.from_pretrained(SHIPPED).params)
    exact = model.forward(params, ids[:1], lm.config)

    class Naive:
        def __getattr__(self, name):
            return getattr(ops, name)

        def linear(self, x, weight, bias=None):
            scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
            return ops.linear(np.rint(x / scale) * scale, weight, bias)

        def mlp(self, h, fc1, fc2, function):
            return self.linear(ops.activation(self.linear(h, **fc1), function), **fc2)

    naive = model.forward(params, ids[:1], lm.config, ops=Naive())
    tree, _ = quantized(params, lm.config, "int8")
    ours = model.forward(ops_cpu.pack(tree), ids[:1], lm.config, ops=ops_cpu)
    size = np.linalg.norm(exact)
    assert np.linalg.norm(naive - exact) > 0.05 * size
    assert np.linalg.norm(ours - exact) < 0.01 * size
