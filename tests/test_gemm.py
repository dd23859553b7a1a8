"""Packed matrix products: right for every shape and every processor's tile, and the same bits however the work is cut."""

import copy
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import ml_dtypes
import numba
import numpy as np
import pytest
import small
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import batch, build, worst

from opt_fast import gemm
from opt_fast.gemm import EMULATED, Tile, matmul, pack
from opt_fast.kernel import floats, int16s, int32s, uint16s
from opt_np import model, ops
from opt_np.tree import flatten, unflatten

ROOT = Path(__file__).resolve().parents[1]
SIZES = st.integers(1, 3 * gemm.COLUMNS + 1)
TILES = (
    Tile(6, 2, 8, True, True, "", "AVX2"),
    Tile(6, 4, 16, True, True, "", "AVX-512"),
    Tile(6, 4, 4, True, True, "", "NEON"),
    Tile(4, 2, 4, False, False, "", "plain"),
)
HALVES = (np.float16, ml_dtypes.bfloat16)
WIDENED = HALVES[:1] if gemm.TILE.pairs else HALVES  # where there are products of bfloat16, x is rounded to it


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


@given(M=st.integers(1, 20), I=SIZES, O=SIZES, dtype=st.sampled_from(WIDENED))
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
    assert within_rounding(matmul(a, pack(b.T)), a, b.T, np.zeros(N))


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
    bias = np.array([-1, 2], np.float32)
    np.testing.assert_array_equal(matmul(np.ones((3, 0), np.float32), pack(np.ones((2, 0), np.float32)), bias, "relu"), [[0, 2]] * 3)


@settings(max_examples=200)
@given(M=st.integers(1, 12 * gemm.BLOCK_ROWS), threads=st.integers(1, 8), panels=st.integers(1, 100))
@example(M=gemm.BLOCK_ROWS + 12, threads=2, panels=48)  # of two blocks, one was of 12 rows, and a thread's whole work
@example(M=1024, threads=2, panels=48)
def test_no_thread_waits_long_for_another(M, threads, panels):
    """Threads take task after task, and find about as much work: if there is more than one block, and panels that can be shared out."""
    with mock.patch.object(gemm, "get_num_threads", return_value=threads):
        most, blocks, parts = gemm.cut(panels, M)
    assert most % gemm.ROWS == 0
    assert most * (blocks - 1) < M <= most * blocks
    groups = math.ceil(panels / gemm.ABREAST)
    assert 1 <= parts <= groups
    busy = [0.0] * threads
    for task in range(blocks * parts):
        rows, part = min(most, M - task % blocks * most), task // blocks
        busy[busy.index(min(busy))] += rows * (groups * (part + 1) // parts - groups * part // parts)
    if blocks > 1 and groups % threads == 0:
        assert max(busy) <= (1 + gemm.ROWS * blocks / M) * M * groups / threads


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
    kernel = gemm.micro_kernel(1, 1, 0, 1, Tile(4, 2, 4, False, False, "", "plain"))

    @numba.njit
    def run(y, one, panel, rows):
        for i in range(rows):
            kernel(floats(y + 32 * i), 0, floats(one), int16s(panel + 16 * i), 0, 1)

    y, one = np.full(every.shape, -0.0, np.float32), np.ones(1, np.float32)
    run(y.ctypes.data, one.ctypes.data, every.ctypes.data, len(every))
    np.testing.assert_array_equal(y, every.astype(np.float32))


IN_TILES = """
import importlib.util, sys
import numpy as np
sys.path[:0] = [root, root + "/tests"]
import opt_fast
spec = importlib.util.spec_from_file_location("opt_fast.gemm", folder + "/gemm.py")
sys.modules["opt_fast.gemm"] = opt_fast.gemm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(opt_fast.gemm)
from opt_fast import ops_cpu
assert (ops_cpu.TILE.name, ops_cpu.TILE.pairs) == (name, pairs)
"""

MODEL = """
import small
from opt_np import grad, model, quantize
from opt_np.kv_cache import KVCache
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


PROGRAM = """
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
GENERIC = "plain" if platform.machine() in ("x86_64", "AMD64") else "NEON"  # the tile of the plainest processor of this kind


def test_a_processor_without_wide_vectors(tmp_path):
    """Products, attention and the model, compiled as for the plainest processor of this kind."""
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    paths = f"import sys\nimport numpy as np\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\nfrom opt_fast import ops_cpu\n"
    run = subprocess.run([sys.executable, "-c", paths + MODEL + PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == GENERIC


@pytest.mark.parametrize("tile", [tile for tile in TILES if tile.name not in (gemm.TILE.name, GENERIC)], ids=lambda tile: tile.name)
def test_a_model_in_another_processors_tiles(tile, tmp_path):
    """Everything but the registers' width: a model forward, backward and step by step, in the tiles of the processors that this is not."""
    assert run_in(tile, MODEL, tmp_path)


def run_in(tile, program, folder):
    """Runs a program, in a process of its own, in which gemm.py has this tile; `folder` is there for its files."""
    source = (ROOT / "opt_fast" / "gemm.py").read_text(encoding="utf-8")
    assert source.count("TILE = best_tile()") == 1
    (folder / "gemm.py").write_text(source.replace("TILE = best_tile()", f"TILE = {tile!r}"), encoding="utf-8")
    variables = f"root, folder, pairs, name = {str(ROOT)!r}, {str(folder)!r}, {tile.pairs!r}, {tile.name!r}\n"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "cache")}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", variables + IN_TILES + program], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    return True


# ---- products of bfloat16 pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "abreast"), [(1, 4), (3, 2), (4, 1)])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
def test_the_micro_kernel_of_pairs(tile, rows, abreast):
    """Bit for bit what Intel's manual says of VDPBF16PS: the upper product first, each sum rounded once."""
    kernel = gemm.micro_kernel(rows, abreast, 1, rows, tile._replace(pairs=EMULATED))

    @numba.njit
    def run(y, stride, x, panel, gap, n):
        kernel(floats(y), stride, floats(x), int32s(panel), gap, n)

    columns, n, rng = tile.vectors * tile.width, 37, np.random.default_rng(0)
    x, panel = (rng.normal(size=shape).astype(ml_dtypes.bfloat16) for shape in ((n, rows, 2), (abreast, n, columns, 2)))
    y = np.zeros((rows, abreast * columns), np.float32)
    run(y.ctypes.data, y.shape[1], x.ctypes.data, panel.ctypes.data, n * columns, n)
    expected, wide = np.zeros_like(y), np.concatenate(list(panel), axis=1)  # (n, abreast · columns, 2)
    for k in range(n):
        for half in (1, 0):
            products = x[k, :, None, half].astype(np.float64) * wide[k, None, :, half].astype(np.float64)  # exact
            expected = (expected + products).astype(np.float32)
    np.testing.assert_array_equal(y, expected)


PAIRS = """
import pickle
import ml_dtypes
from opt_fast import gemm
from opt_fast.engine import Engine
from opt_np import OPTForCausalLM, OPTConfig, model
from opt_np.kv_cache import KVCache
from opt_np.tree import unflatten
bfloat16 = ml_dtypes.bfloat16

# a weight in pairs
assert "pairs of bfloat16" in ops_cpu.description()
rng = np.random.default_rng(0)
for M, I, O, turned in ((1, 1, 1, False), (8, 50, 21, True), (3, 17, 70, False), (gemm.BLOCK_ROWS + 4, 2 * gemm.BLOCK_K + 3, 37, False),
                        (gemm.BLOCK_ROWS + 4, gemm.BLOCK_K + 3, 37, True)):
    x, weight, bias = rng.normal(size=(M, I)).astype(np.float32), rng.normal(size=(O, I)).astype(bfloat16), rng.normal(size=O).astype(np.float32)
    x, weight = (np.asfortranarray(x), np.asfortranarray(weight)) if turned else (x, weight)
    packed = pickle.loads(pickle.dumps(gemm.pack(weight)))
    assert (packed.dtype, packed.shape, packed.size, packed.panels.shape[1:]) == (bfloat16, (O, I), O * I, ((I + 1) // 2, gemm.COLUMNS))
    assert packed.nbytes == 4 * -(-O // gemm.COLUMNS) * gemm.COLUMNS * -(-I // 2)
    again, ids = np.asarray(packed), np.array([[0, O - 1, O // 2]])
    assert again.dtype == bfloat16 and (again == weight).all()
    assert packed.rows(ids).dtype == np.float32 and (packed.rows(ids) == weight[ids].astype(np.float32)).all()
    y, rounded, wide = gemm.matmul(x, packed, bias), x.astype(bfloat16).astype(float), weight.astype(float)
    allowed = (np.abs(rounded) @ np.abs(wide).T + np.abs(bias)) * np.finfo(np.float32).eps * (min(I, gemm.BLOCK_K) + 4)
    assert (np.abs(y - (rounded @ wide.T + bias)) <= allowed).all()
    for rows in ([0], [M - 1], list(range(M // 2, M)), [M - 1, 0, M // 2]):
        assert (gemm.matmul(x[rows], packed, bias) == y[rows]).all()
    assert (gemm.matmul(x, gemm.pack(weight[:7]), bias[:7]) == y[:, :7]).all()

# x is rounded as NumPy's bfloat16 rounds it, in vectors and one by one: halfway between two, subnormal, infinite, NaN
some = rng.integers(0, 2**32, 4000, np.uint32)
x = np.concatenate([some, some & 0xFFFF8000 | 0x8000, some & 0xFF, [0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF]])
x = x.astype(np.uint32).view(np.float32)
packed = gemm.pack(np.eye(1, dtype=bfloat16))  # the product with 1, of a column and of rows
with np.errstate(over="ignore", invalid="ignore"):
    expected = x.astype(bfloat16).astype(np.float32)
np.testing.assert_array_equal(gemm.matmul(x[:, None], packed)[:, 0], expected)
tail = x[-64:]
with np.errstate(over="ignore", invalid="ignore"):
    finite = np.where(np.isfinite(tail.astype(bfloat16).astype(np.float32)), tail, 0)[None]
np.testing.assert_array_equal(gemm.matmul(finite, gemm.pack(np.eye(64, dtype=bfloat16))), finite.astype(bfloat16).astype(np.float32))
for broken in (np.inf, -np.inf, np.nan):
    row = np.ones((1, 64), np.float32)
    row[0, 5] = broken
    np.testing.assert_array_equal(gemm.matmul(row, gemm.pack(np.ones((3, 64), bfloat16))), np.full((1, 3), broken, np.float32))

# other dtypes are as they were
for dtype, stored in ((np.float32, "f4"), (np.float16, "i2")):
    assert gemm.pack(np.ones((3, 5), dtype)).panels.dtype == stored

# attention in pairs
import rounded_attention
rounded_attention.checked(real=False)

# a model: as precise as torch's; the same bits in a batch, step by step, and in the engine
given = np.load(folder + "/given.npz")
cfg = OPTConfig.from_dict(eval(str(given["config"])))
params = unflatten({name[7:]: given[name].astype(bfloat16) for name in given.files if name.startswith("params.")})
ids, mask = given["ids"], given["mask"]
packed = ops_cpu.pack(params)
logits = model.forward(packed, ids, cfg, attention_mask=mask, ops=ops_cpu)
np.save(folder + "/logits.npy", logits)
for row, seen, found in zip(ids, mask, logits):
    alone = row[seen == 1][None]
    assert (model.forward(packed, alone, cfg, ops=ops_cpu)[0] == found[seen == 1]).all()
cache, T = KVCache(), ids.shape[1]
parts = [model.forward(packed, ids[:, start:stop], cfg, cache=cache, attention_mask=mask[:, :stop], ops=ops_cpu)
         for start, stop in ((0, T - 6), (T - 6, T - 3), (T - 3, T - 2), (T - 2, T - 1), (T - 1, T))]
assert cache.program is not None
assert (np.concatenate(parts, axis=1)[mask == 1] == logits[mask == 1]).all()
lm = OPTForCausalLM(params, cfg, backend="cpu")
tokens = lm.generate(ids[:1, :5], max_new_tokens=5)
engine = Engine(lm)
handles = [engine.submit(ids[:1, :5], max_new_tokens=5), engine.submit(ids[1:2, :9], max_new_tokens=3)]
assert (engine.result(handles[0]) == tokens).all()

# weights that are not packed are packed at each use
assert (model.forward(params, ids, cfg, attention_mask=mask, ops=ops_cpu)[mask == 1] == logits[mask == 1]).all()
"""


def test_a_model_in_products_of_bfloat16(tmp_path):
    """By instructions that every processor has. Our error against float64 is at most twice that of torch's model in bfloat16."""
    hf, cfg, exact_params = build("pre_norm")
    (ids, mask), stored = batch("left", T=17), {name: a.astype(ml_dtypes.bfloat16) for name, a in flatten(exact_params).items()}
    arrays = {f"params.{name}": a.astype(np.float32) for name, a in stored.items()}
    np.savez(tmp_path / "given.npz", ids=ids, mask=mask, config=repr(cfg.to_dict()), **arrays)
    assert run_in(gemm.TILE._replace(pairs=EMULATED), PAIRS, tmp_path)
    exact = model.forward(small.cast(unflatten(stored), "float64"), ids, cfg, attention_mask=mask)
    with torch.no_grad():
        torchs = copy.deepcopy(hf).to(torch.bfloat16)(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.double()
    assert worst(np.load(tmp_path / "logits.npy"), exact, mask) <= 2 * worst(torchs, exact, mask)


ASSEMBLY = """
import pathlib
import numba
from numba import types
from opt_fast import attention_bf16, gemm, gemm_int
from opt_fast.kernel import KERNEL, floats, int16s, int32s, uint16s
many, many_integers = gemm.many, gemm_int.many

def float32(y, stride, x, panel, n):
    many(floats(y), stride, floats(x), floats(panel), 0, n)

def pairs(y, stride, x, panel, n):
    many(floats(y), stride, floats(x), int32s(panel), 0, n)

def int8(y, stride, x, panel, n):
    many_integers(floats(y), stride, int16s(x), floats(x), int32s(x), uint16s(panel), uint16s(panel), floats(panel), n, 384)

for function in (float32, pairs, int8):
    compiled = numba.cfunc(types.void(*[types.int64] * 5))(function)  # compiled, not called
    pathlib.Path(folder, function.__name__ + ".s").write_text(compiled._library.get_asm_str())
if cpu == "znver4":  # which has pairs and no tiles
    attention = numba.cfunc(KERNEL)(attention_bf16.IN_BFLOAT16.kernels["<u2"]._function)
    pathlib.Path(folder, "attention.s").write_text(attention._library.get_asm_str())
print(gemm.TILE.name, gemm.TILE.pairs, gemm_int.PAIR_INSTRUCTION)
"""
AVX512 = "+avx,+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512vnni"


def loops(assembly):
    """The lines of each loop, from a label to a jump back to it; those without another loop inside."""
    lines, labels, found = assembly.splitlines(), {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = i
        elif (jump := re.match(r"\s+j\w+\s+(\.L\w+)", line)) and jump[1] in labels:
            found.append((labels[jump[1]], i))
    return [lines[a : b + 1] for a, b in found if not any(a <= c and d <= b for c, d in found if (c, d) != (a, b))]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="LLVM compiles here for another kind of processor")
@pytest.mark.parametrize("cpu", ["znver4", "sapphirerapids"])
def test_what_the_compiler_makes_for_processors_that_are_not_here(cpu, tmp_path):
    """Tiles stay in registers, and every product of the innermost loop is the instruction that it should be; nothing of it is run."""
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": f"{AVX512},+avx512bf16", "PYTHONPATH": str(ROOT)}
    program = f"folder, cpu = {str(tmp_path)!r}, {cpu!r}\n{ASSEMBLY}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["AVX-512", gemm.DPBF16, "llvm.x86.avx512.pmaddw.d.512"]
    if cpu == "znver4":
        attention = (tmp_path / "attention.s").read_text()
        assert "vdpbf16ps" in attention
        assert "tilecfg" not in attention
        assert "tilerelease" not in attention
    for name, instruction, per_step in (("float32", "vfmadd231ps", 24), ("pairs", "vdpbf16ps", 24), ("int8", "vpdpwssd", 16)):
        assembly = (tmp_path / f"{name}.s").read_text()
        loop = max(loops(assembly), key=lambda loop: sum(instruction in line for line in loop))
        count = sum(bool(re.search(rf"{instruction}\s.*%zmm\d+, %zmm\d+", line)) for line in loop)
        if name == "int8" and cpu == "sapphirerapids":  # LLVM takes vpmaddwd and vpaddd for every second one there
            count += sum("vpmaddwd" in line for line in loop)
        assert count, name
        assert count % per_step == 0, (name, count)  # the loop may be unrolled
        assert sum("broadcast" in line for line in loop) == count // 4, name  # one for each row's number, which meets four vectors
        assert not any(re.search(r"\(%r[sb]p", line) for line in loop), name  # nothing goes by way of the stack


@pytest.mark.parametrize(("features", "pairs"), [(AVX512, False), (f"{AVX512},+avx512bf16", True), ("+avx2,+fma,+avx512bf16", False)])
def test_bfloat16_is_multiplied_in_pairs_where_numba_compiles_for_it(features, pairs, monkeypatch):
    codegen = SimpleNamespace(magic_tuple=lambda: ("x86_64-unknown-linux-gnu", "x86-64", features))
    monkeypatch.setattr(gemm, "cpu_target", SimpleNamespace(target_context=SimpleNamespace(codegen=lambda: codegen)))
    assert gemm.best_tile().pairs == (gemm.DPBF16 if pairs else "")


def test_weights_of_a_model_share_pieces_of_memory_and_each_begins_at_a_line():
    from opt_fast import kernel

    weight = np.ones((70, 50), np.float32)
    with kernel.side_by_side():
        one, other = (gemm.pack(weight).panels for _ in range(2))
        large = kernel.for_weights(kernel.PIECE + 1, np.uint8)
    places = [kernel.address(a) for a in (one, other, large)]
    assert 0 <= places[1] - places[0] - one.nbytes < kernel.LINE
    assert not any(place % kernel.LINE for place in places)
    assert kernel.address(gemm.pack(weight).panels) != places[1] + other.nbytes  # outside, each has its own
    assert (np.asarray(gemm.Packed(one, weight.shape)) == weight).all()


# ---- a process's life --------------------------------------------------------------------------------------------------------------------

CHILDREN = """
import multiprocessing, numpy as np
from opt_fast import gemm
rng = np.random.default_rng(0)
x, weight = rng.normal(size=(40, 300)).astype(np.float32), gemm.pack(rng.normal(size=(500, 300)).astype(np.float32))
y = gemm.matmul(x, weight)
def again(i):
    return gemm.matmul(x, weight)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all((found == y).all() for found in pool.map(again, range(4)))
print("children are done")
"""
DAMAGED = """
import pathlib
from opt_fast import kernel, rowwise
found = rowwise.ADD.address
(data,) = pathlib.Path(folder).rglob("*.nbc")
index, = pathlib.Path(folder).rglob("*.nbi")
for file, size in ((data, 0), (data, data.stat().st_size // 2), (index, 10)):
    with open(file, "r+b") as half:
        half.truncate(size)
    for call in range(2):
        assert kernel.compiled(rowwise.ADD._function, kernel.KERNEL), file
    with kernel.kept_compiled():
        assert kernel.kept(rowwise.ADD._function, kernel.KERNEL), file
print("repaired")
"""


@pytest.mark.parametrize(("program", "said"), [(CHILDREN, "children are done"), (DAMAGED, "repaired")], ids=["forked", "damaged"])
def test_kernels_survive(program, said, tmp_path):
    """A fork, in whose child there are no threads; and what is left of files when a machine stops."""
    own = {"NUMBA_CACHE_DIR": str(tmp_path)} if program is DAMAGED else {}
    command = [sys.executable, "-c", f"folder = {str(tmp_path)!r}\n{program}"]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), **own}, check=False, timeout=100)
    assert (ran.returncode, ran.stdout.strip()) == (0, said), ran.stderr
