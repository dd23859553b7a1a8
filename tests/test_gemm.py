"""Packed matrix products: right for every shape and every processor's tile, and the same bits however the work is cut."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_fast import gemm
from opt_fast.gemm import Tile, matmul, pack, pointer, rows_of

ROOT = Path(__file__).resolve().parents[1]
SIZES = st.integers(1, 3 * gemm.COLUMNS + 1)
TILES = (Tile(6, 2, 8, True, "AVX2"), Tile(6, 4, 16, True, "AVX-512"), Tile(6, 4, 4, True, "NEON"), Tile(4, 2, 4, False, "plain"))


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


@given(O=SIZES, I=st.integers(1, 40))
def test_rows_are_the_weights(O, I):
    _, weight, _ = case(1, I, O)
    ids = np.random.default_rng(1).integers(0, O, (2, 3))
    np.testing.assert_array_equal(rows_of(pack(weight), ids), weight[ids])


@pytest.mark.parametrize(("x", "bias"), [((2, 4), (6,)), ((2, 5), (5,)), ((5,), (6,)), ((1, 2, 5), (6,))])
def test_shapes_that_do_not_fit(x, bias):
    with pytest.raises(ValueError, match=r"a weight of \(6, 5\) wants"):
        matmul(np.ones(x, np.float32), pack(np.ones((6, 5), np.float32)), np.ones(bias, np.float32))


def test_no_rows():
    assert matmul(np.ones((0, 5), np.float32), pack(np.ones((6, 5), np.float32))).shape == (0, 6)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
def test_the_micro_kernel_of_every_processor(tile, rows):
    """Vectors wider than this processor's are cut by LLVM: slower, and right."""
    kernel = gemm.micro_kernel(rows, tile)

    @numba.njit
    def run(y, stride, x, panel, n):
        kernel(pointer(y, 0), stride, pointer(x, 0), pointer(panel, 0), n)

    columns, n, rng = tile.vectors * tile.width, 37, np.random.default_rng(0)
    x, panel, start = (rng.normal(size=shape).astype(np.float32) for shape in ((n, rows), (n, columns), (rows, columns + 3)))
    y = start.copy()
    run(y, columns + 3, x, panel, n)
    np.testing.assert_allclose(y[:, :columns], start[:, :columns] + x.astype(np.float64).T @ panel, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(y[:, columns:], start[:, columns:])


PROGRAM = """
import numpy as np
from opt_fast import gemm
x, w = np.random.default_rng(0).normal(size=(9, 50)).astype(np.float32), np.random.default_rng(1).normal(size=(21, 50)).astype(np.float32)
y = gemm.matmul(x, gemm.pack(w))
assert np.abs(y - x.astype(float) @ w.T).max() < 1e-5
assert (gemm.matmul(x[3:4], gemm.pack(w)) == y[3:4]).all()
print(gemm.TILE.name)
"""


def test_a_processor_without_wide_vectors(tmp_path):
    """The whole product, compiled as for the plainest processor of this kind."""
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in ("plain", "NEON")
