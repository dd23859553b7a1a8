"""Packed matrix products: right for every shape and every processor's tile, and the same bits however the work is cut."""

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_fast import gemm
from opt_fast.gemm import Tile, matmul, pack, product
from opt_fast.kernel import floats, int16s, uint16s
from opt_np import ops

ROOT = Path(__file__).resolve().parents[1]
SIZES = st.integers(1, 3 * gemm.COLUMNS + 1)
TILES = (
    Tile(6, 2, 8, True, True, "AVX2"),
    Tile(6, 4, 16, True, True, "AVX-512"),
    Tile(6, 4, 4, True, True, "NEON"),
    Tile(4, 2, 4, False, False, "plain"),
)
HALVES = (np.float16, ml_dtypes.bfloat16)


def case(M, I, O, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return tuple((rng.normal(size=shape) * scale).astype(np.float32) for shape in ((M, I), (O, I), (O,)))


def within_rounding(y, x, weight, bias):
    """As close to the exact product as one rounding per product and sum allows."""
    exact = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    allowed = (np.abs(x).astype(np.float64) @ np.abs(weight).T + np.abs(bias)) * np.finfo(np.float32).eps * (min(x.shape[1], gemm.BLOCK_K) + 4)
    return (np.abs(y - exact) <= allowed).all()


@given(M=st.integers(1, 2 * gemm.BLOCK_ROWS + 1), I=SIZES | st.sampled_from([gemm.BLOCK_K, gemm.BLOCK_K + 1, 2 * gemm.BLOCK_K + 5]), O=SIZES)
def test_every_shape(M, I, O):
    x, weight, bias = case(M, I, O)
    y = matmul(x, pack(weight), bias)
    assert y.dtype == np.float32
    assert within_rounding(y, x, weight, bias)
    assert within_rounding(matmul(x, pack(weight)), x, weight, 0 * bias)


def test_the_error_is_like_that_of_numpys_product():
    x, weight, bias = case(128, 3072, 256)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    ours, numpys = (np.sqrt(((y - exact) ** 2).mean()) for y in (matmul(x, pack(weight), bias), x @ weight.T + bias))
    assert ours <= 2 * numpys


@given(M=st.integers(1, 3 * gemm.BLOCK_ROWS), data=st.data())
@settings(max_examples=20)
def test_a_row_has_the_same_bits_alone_anywhere_and_with_any_number_of_threads(M, data):
    x, weight, bias = case(M, 2 * gemm.BLOCK_K + 3, 2 * gemm.COLUMNS + 5)
    packed = pack(weight)
    whole = matmul(x, packed, bias)
    some = data.draw(st.lists(st.integers(0, M - 1), min_size=1, max_size=9))
    np.testing.assert_array_equal(matmul(x[some], packed, bias), whole[some])
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        np.testing.assert_array_equal(matmul(x, packed, bias), whole)
    finally:
        numba.set_num_threads(before)
    np.testing.assert_array_equal(matmul(x, pack(weight[:7]), bias[:7]), whole[:, :7])  # nor do other columns matter


@given(M=st.integers(1, 20), I=SIZES, O=SIZES, dtype=st.sampled_from(HALVES))
def test_weights_of_16_bits_are_widened_exactly(M, I, O, dtype):
    x, weight, bias = case(M, I, O)
    stored = weight.astype(dtype)
    np.testing.assert_array_equal(matmul(x, pack(stored), bias), matmul(x, pack(stored.astype(np.float32)), bias))


@given(M=st.integers(1, 2 * gemm.BLOCK_ROWS), K=SIZES, N=SIZES, turned=st.sampled_from(["neither", "a", "b", "both"]))
def test_products_of_matrices_and_their_transposes(M, K, N, turned):
    a, b, _ = case(M, K, N)
    b = np.ascontiguousarray(b.T)
    a = np.asfortranarray(a) if turned in ("a", "both") else a
    b = np.asfortranarray(b) if turned in ("b", "both") else b
    assert within_rounding(product(a, b), a, b.T, np.zeros(N))


@pytest.mark.parametrize("function", ["relu", "gelu", "gelu_new"])
def test_an_activation_is_applied_to_the_finished_sums(function):
    x, weight, bias = case(7, gemm.BLOCK_K + 5, 19)
    plain = matmul(x, pack(weight), bias).astype(np.float64)
    np.testing.assert_allclose(matmul(x, pack(weight), bias, function), ops.activation(plain, function), rtol=1e-5, atol=1e-5)


@given(O=SIZES, I=st.integers(1, 40), dtype=st.sampled_from((np.float32, *HALVES)))
def test_a_packed_weight_gives_back_its_rows_and_itself(O, I, dtype):
    weight = case(1, I, O)[1].astype(dtype)
    packed, ids = pack(weight), np.random.default_rng(1).integers(0, O, (2, 3))
    np.testing.assert_array_equal(packed.rows(ids), weight[ids].astype(np.float32))
    assert packed.rows(ids).dtype == np.float32
    again = np.asarray(packed)
    assert (again.dtype, again.shape, packed.shape, packed.size) == (weight.dtype, (O, I), (O, I), O * I)
    np.testing.assert_array_equal(again, weight)


@pytest.mark.parametrize(("x", "bias"), [((2, 4), (6,)), ((2, 5), (5,)), ((5,), (6,)), ((1, 2, 5), (6,))])
def test_shapes_that_do_not_fit(x, bias):
    with pytest.raises(ValueError, match=r"a weight of \(6, 5\) wants"):
        matmul(np.ones(x, np.float32), pack(np.ones((6, 5), np.float32)), np.ones(bias, np.float32))


def test_no_rows():
    assert matmul(np.ones((0, 5), np.float32), pack(np.ones((6, 5), np.float32))).shape == (0, 6)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("rows", "abreast"), [(1, 4), (3, 2), (4, 1)])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
def test_the_micro_kernel_of_every_processor(tile, rows, abreast, stored):
    """Vectors wider than this processor's are cut by LLVM: slower, and right."""
    kernel, pointers = gemm.micro_kernel(rows, abreast, 1, rows, tile), {"float32": floats, "float16": int16s, "bfloat16": uint16s}[stored]

    @numba.njit
    def run(y, stride, x, panel, gap, n):
        kernel(floats(y), stride, floats(x), pointers(panel), gap, n)

    columns, n, rng = tile.vectors * tile.width, 37, np.random.default_rng(0)
    x, panel, start = (rng.normal(size=shape).astype(np.float32) for shape in ((n, rows), (abreast, n, columns), (rows, abreast * columns + 3)))
    panel = panel.astype(ml_dtypes.bfloat16 if stored == "bfloat16" else stored)
    y = start.copy()
    run(y.ctypes.data, y.shape[1], x.ctypes.data, panel.ctypes.data, n * columns, n)
    wide = np.concatenate(list(panel.astype(np.float64)), axis=1)  # (n, abreast · columns)
    np.testing.assert_allclose(y[:, : abreast * columns], start[:, : abreast * columns] + x.astype(np.float64).T @ wide, rtol=0, atol=3e-5)
    np.testing.assert_array_equal(y[:, abreast * columns :], start[:, abreast * columns :])


def test_every_float16_is_widened_without_the_instruction():
    """Subnormals, infinities and NaN too."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(-1, 8)
    kernel = gemm.micro_kernel(1, 1, 0, 1, Tile(4, 2, 4, False, False, "plain"))

    @numba.njit
    def run(y, one, panel, rows):
        for i in range(rows):
            kernel(floats(y + 32 * i), 0, floats(one), int16s(panel + 16 * i), 0, 1)

    y, one = np.full(every.shape, -0.0, np.float32), np.ones(1, np.float32)
    run(y.ctypes.data, one.ctypes.data, every.ctypes.data, len(every))
    np.testing.assert_array_equal(y, every.astype(np.float32))


PROGRAM = """
import numpy as np
from opt_fast import attention_cpu, gemm, gemm_int
from opt_np import ops, quantize
x, w = np.random.default_rng(0).normal(size=(9, 50)).astype(np.float32), np.random.default_rng(1).normal(size=(21, 50)).astype(np.float32)
y = gemm.matmul(x, gemm.pack(w))
assert np.abs(y - x.astype(float) @ w.T).max() < 1e-5
assert (gemm.matmul(x[3:4], gemm.pack(w)) == y[3:4]).all()
for kind in ("int8", "int4"):
    leaf = quantize.quantize_matrix(w, kind)
    y = gemm.matmul(x, gemm_int.PackedIntegers(**leaf))
    assert np.abs(y - x.astype(float) @ ops.dequantized(**leaf).astype(float).T).max() < 2e-3
    assert (gemm.matmul(x[3:4], gemm_int.PackedIntegers(**leaf)) == y[3:4]).all()
half = w.astype(np.float16)
assert (gemm.matmul(x, gemm.pack(half)) == gemm.matmul(x, gemm.pack(half.astype(np.float32)))).all()
q, k, v = np.random.default_rng(2).normal(size=(3, 1, 40, 2, 10)).astype(np.float32)
O, L = attention_cpu.attention_lse(q, k, v, 0.3, None)
scores = np.where(np.tri(40, dtype=bool), 0.3 * np.einsum("bthd,bshd->bhts", q, k, dtype=float), -np.inf)
P = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
assert np.abs(np.einsum("bhts,bshd->bthd", P, v) - O).max() < 1e-5
print(gemm.TILE.name)
"""


def test_a_processor_without_wide_vectors(tmp_path):
    """The whole product, compiled as for the plainest processor of this kind."""
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in ("plain", "NEON")


MODEL = """
import importlib.util, sys
import numpy as np
sys.path[:0] = [root, root + "/tests"]
import opt_fast
spec = importlib.util.spec_from_file_location("opt_fast.gemm", file)
sys.modules["opt_fast.gemm"] = opt_fast.gemm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(opt_fast.gemm)
import small
from opt_fast import ops_cpu
from opt_np import grad, model, quantize
from opt_np.kv_cache import KVCache
assert ops_cpu.TILE.name == name
cfg = small.config(hidden_size=60, num_attention_heads=3, ffn_dim=70, num_hidden_layers=1, max_position_embeddings=260)
params, ids = small.params(cfg), small.ids(cfg, 2, 230)
mask = np.ones_like(ids)
mask[0, :7] = 0
plain, ours = model.forward(params, ids, cfg, attention_mask=mask), model.forward(params, ids, cfg, attention_mask=mask, ops=ops_cpu)
loss, plain_grads = grad.loss_and_grads(params, ids, ids, cfg, mask)
our_loss, our_grads = grad.loss_and_grads(params, ids, ids, cfg, mask, ops=ops_cpu)
assert np.abs(ours - plain)[mask == 1].max() < 1e-4 * np.abs(plain).max(), np.abs(ours - plain)[mask == 1].max()
assert abs(our_loss - loss) < 1e-4 * loss
for (_, a), (_, b) in zip(*(sorted(small.flatten(g).items()) for g in (our_grads, plain_grads))):
    assert np.abs(a - b).max() < 1e-3 * max(np.abs(b).max(), 1e-2)
packed, cache = ops_cpu.pack(params), KVCache()
parts = [model.forward(packed, part, cfg, cache=cache, attention_mask=mask[:, :end], ops=ops_cpu)
         for part, end in ((ids[:, :220], 220), *((ids[:, t : t + 1], t + 1) for t in range(220, 230)))]
assert cache.program is not None
assert (np.concatenate(parts, axis=1)[mask == 1] == ours[mask == 1]).all()
assert (model.forward(packed, ids[1:, :50], cfg, ops=ops_cpu) == ours[1:, :50]).all()
for kind in ("int8", "int4"):
    tree, _ = quantize.quantized(params, cfg, kind)
    plain, ours = model.forward(tree, ids[:, :20], cfg), model.forward(ops_cpu.pack(tree), ids[:, :20], cfg, ops=ops_cpu)
    assert np.abs(ours - plain).max() < 1e-3 * np.abs(plain).max(), (kind, np.abs(ours - plain).max())
    assert (model.forward(ops_cpu.pack(tree), ids[1:, :19], cfg, ops=ops_cpu) == ours[1:, :19]).all()
"""


@pytest.mark.parametrize("tile", [tile for tile in TILES if tile.name != gemm.TILE.name], ids=lambda tile: tile.name)
def test_a_model_in_another_processors_tiles(tile, tmp_path):
    """Everything but the registers' width: a model forward, backward and step by step, in the tiles of the processors that this is not."""
    source = (ROOT / "opt_fast" / "gemm.py").read_text(encoding="utf-8")
    assert source.count("TILE = best_tile()") == 1
    (tmp_path / "gemm.py").write_text(source.replace("TILE = best_tile()", f"TILE = {tile!r}"), encoding="utf-8")
    program = f"root, file, name = {str(ROOT)!r}, {str(tmp_path / 'gemm.py')!r}, {tile.name!r}\n{MODEL}"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
