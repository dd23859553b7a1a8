"""The emulator that runs CUDA kernels on a CPU: every instruction against NumPy, and every rule by breaking it."""

import math
import re
import shutil
from pathlib import Path

import cuda_emulator
import ml_dtypes
import numpy as np
import pytest
from cuda_emulator import HERE, KernelError, Table, compile_for_cpu

from opt_fast import __file__ as opt_fast

if cuda_emulator.why_not():
    pytest.skip(cuda_emulator.why_not(), allow_module_level=True)

SOURCE = HERE / "instructions.cu"
HALVES = {0: np.dtype(np.float16), 1: np.dtype(ml_dtypes.bfloat16)}
LANE = np.arange(32)
both = pytest.mark.parametrize("bf16", HALVES)


def kernel(name, bf16=0):
    return compile_for_cpu(SOURCE, name, {"BF16": bf16})


def halves(*shape, bf16=0, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(HALVES[bf16])


def words(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).integers(0, 2**32, shape, np.uint32)


# ---- instructions ------------------------------------------------------------------------------------------------------------------------


def test_ldmatrix_gives_each_lane_its_two_neighbours():
    rows, plain, transposed = words(32, 4).view(np.uint16), np.zeros((32, 4, 2), np.uint16), np.zeros((32, 4, 2), np.uint16)
    kernel("matrices")(1, 32, rows.nbytes, rows, plain.view(np.uint32), transposed.view(np.uint32))
    m = rows.reshape(4, 8, 8)  # the manual's figures: T0 holds row 0, columns 0 and 1; T1 columns 2 and 3; T4 row 1
    assert (plain == m.reshape(4, 32, 2).swapaxes(0, 1)).all()
    assert (transposed == m.swapaxes(1, 2).reshape(4, 32, 2).swapaxes(0, 1)).all()


@both
def test_mma_has_the_manuals_layout(bf16):
    a, b = halves(32, 8, bf16=bf16), halves(32, 4, bf16=bf16)
    c = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    A, B, C = np.full((16, 16), np.nan), np.full((16, 8), np.nan), np.full((16, 8), np.nan)
    group, within, i = (LANE // 4)[:, None], (LANE % 4)[:, None], np.arange(8)[None]
    A[group + 8 * (i // 2 % 2), within * 2 + i % 2 + 8 * (i // 4)] = a
    B[within * 2 + i[:, :4] % 2 + 8 * (i[:, :4] // 2), group] = b
    places = group + 8 * (i[:, :4] // 2), within * 2 + i[:, :4] % 2
    C[places] = c
    kernel("fragments", bf16)(1, 32, 0, a.view(np.uint32), b.view(np.uint32), c)
    assert (c == (C + A @ B).astype(np.float32)[places]).all()  # float64 holds these products and sums without an error that shows


@both
def test_product_through_shared_memory(bf16):
    A, B, C = halves(16, 16, bf16=bf16), halves(16, 16, bf16=bf16, seed=1), np.full((2, 16, 16), np.nan, np.float32)
    kernel("product", bf16)(1, 32, 3 * A.nbytes, A, B, np.ascontiguousarray(B.T), C)
    exact = A.astype(np.float64) @ B.astype(np.float64)
    assert (exact.astype(np.float32) == C).all()
    assert np.abs(C - A.astype(np.float32) @ B.astype(np.float32)).max() <= 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize(("numbers", "expected"), [((np.inf, 1.0), np.inf), ((np.inf, 0.0), np.nan), ((65504.0, 65504.0), 65504.0**2)])
def test_mma_with_the_extremes(numbers, expected):
    a, b, c = np.zeros((32, 8), np.float16), np.zeros((32, 4), np.float16), np.zeros((32, 4), np.float32)
    a[0, 0], b[0, 0] = numbers  # A[0, 0], B[0, 0]
    kernel("fragments")(1, 32, 0, a.view(np.uint32), b.view(np.uint32), c)
    assert np.array_equal(c[0, 0], np.float32(expected), equal_nan=True)


def interesting(dtype):
    """Every half, what lies halfway between neighbours, a float32 to either side, and the ends."""
    every = np.arange(2**16).astype(np.uint16).view(dtype).astype(np.float64)
    every = np.sort(every[np.isfinite(every)])
    middle = ((every[1:] + every[:-1]) / 2).astype(np.float32)
    edge = np.float32(every[-1] + (every[-1] - every[-2]) / 2)  # from here on infinite
    ends = np.array([edge, -edge, np.inf, -np.inf, np.nan, np.finfo(np.float32).max, 0, -0.0], np.float32)
    one = np.concatenate([every.astype(np.float32), middle, ends])
    beside = [np.nextafter(one, np.float32(np.inf)), np.nextafter(one, np.float32(-np.inf))]
    return np.resize(np.concatenate([one, *beside]), 6 * (len(one) // 2 + 1))


@both
def test_pack2_rounds_to_the_nearest_even(bf16):
    with np.errstate(over="ignore", invalid="ignore"):
        x = interesting(HALVES[bf16])
        expected = x.astype(HALVES[bf16])
    packed, powers = np.zeros(len(x) // 2, np.uint32), np.zeros_like(x)
    kernel("each", bf16)(3, 64, 0, x, packed, powers, len(packed))
    ours, nan = packed.view(np.uint16), np.isnan(x)
    assert (ours[~nan] == expected.view(np.uint16)[~nan]).all()
    assert nan.any()
    assert (ours[nan] == 0x7FFF).all()  # the manual's one NaN


def test_exp2_approx_flushes_to_zero():
    x = np.array([*np.linspace(-130, 130, 2000), 0, -np.inf, np.inf, np.nan, 1e-40, -125.9, -126, -126.1, -200, -150], np.float32)
    packed, powers = np.zeros(len(x) // 2, np.uint32), np.full_like(x, 7)
    kernel("each")(1, 32, 0, x, packed, powers, len(packed))
    with np.errstate(over="ignore"):
        exact = np.exp2(x.astype(float))
        expected = np.where(exact < 2.0**-126, 0, exact).astype(np.float32)
    finite = np.isfinite(expected)
    np.testing.assert_array_almost_equal_nulp(powers[finite], expected[finite], 1)
    assert (powers[expected == np.inf] == np.inf).all()
    assert np.isnan(powers[np.isnan(x)]).all()


@both
def test_numbers_of_other_widths(bf16):
    every, n = np.arange(2**16).astype(np.uint16), 2**16
    a, b = (halves(n, 2, bf16=bf16, seed=seed) for seed in (1, 2))
    which = words(n) & 0x7777
    y, less, chosen = np.zeros(n, np.float32), np.zeros((n, 2), HALVES[bf16]), np.zeros(n, np.uint32)
    kernel("widths", bf16)(64, 1024, 0, every, a.view(np.uint32), b.view(np.uint32), which, y, less.view(np.uint32), chosen)
    np.testing.assert_array_equal(y, every.view(HALVES[bf16]).astype(np.float32))
    assert bf16 or (less == a - b).all()
    both_words = np.concatenate([a.view(np.uint8).reshape(n, 4), b.view(np.uint8).reshape(n, 4)], 1)
    places = which[:, None] >> 4 * np.arange(4) & 7
    assert (chosen == np.take_along_axis(both_words, places.astype(np.int64), 1).view(np.uint32)[:, 0]).all()


@pytest.mark.parametrize("lanes", [1, 2, 5, 16, 31])
def test_shuffles(lanes):
    x = np.random.default_rng(lanes).normal(size=96).astype(np.float32)
    exchanged, given = np.zeros_like(x), np.zeros_like(x)
    kernel("shuffles")(1, 96, 0, x, exchanged, given, lanes, lanes, seed=lanes)
    t = np.arange(96)
    assert (exchanged == x[t // 32 * 32 + (t % 32 ^ lanes)]).all()
    assert (given == x[t // 32 * 32 + lanes]).all()


@pytest.mark.parametrize("early", [False, True])
def test_cp_async_fills_with_zeros(early):
    source, target = words(50, 4), words(64, 4, seed=1)
    kernel("copies")(1, 64, target.nbytes, source, target, 50, early=early)  # rows past the 50th are not there to be read
    assert (target[:50] == source).all()
    assert (target[50:] == 0).all()


def test_a_wait_covers_its_groups_and_no_more():
    source, target = words(3, 32, 4), words(3, 32, 4, seed=1)
    kernel("groups")(1, 32, target.nbytes, source, target)
    assert (target[0] == source[0]).all()
    assert (target[1:] == 0xFFFFFFFF).all()  # not yet written


def test_threads_know_their_places():
    out = np.zeros((2 * 3 * 5, 4 * 2 * 8, 6), np.uint32)
    kernel("places")((5, 3, 2), (8, 2, 4), 0, out)
    assert (out.reshape(2, 3, 5, 4, 2, 8, 6) == np.moveaxis(np.indices((2, 3, 5, 4, 2, 8)), 0, -1)).all()


def test_functions():
    x = np.linspace(0.1, 3, 64, dtype=np.float32)
    y = np.zeros((8, 64), np.float32)
    kernel("functions")(1, 64, 0, x, y)
    steps = np.maximum(x, 1).view(np.int32) + np.minimum(np.arange(64), 5).astype(np.int32)
    exact = [np.exp(x), np.log(x), np.log2(x), x / 3, 1 / np.sqrt(x), steps.view(np.float32), [*map(math.erf, x)], np.tanh(x)]
    np.testing.assert_allclose(y, exact, rtol=1e-6, atol=1e-6)
    assert (y[5] == steps.view(np.float32)).all()


# ---- barriers ----------------------------------------------------------------------------------------------------------------------------

TILES, THREADS = 6, 128


def piped(wait, arrived, done, **options):
    tiles, sums = words(TILES, THREADS, 4), np.zeros(THREADS, np.uint32)
    kernel("pipeline")(1, THREADS, 2 * THREADS * 16, tiles, sums, TILES, wait, arrived, done, **options)
    t, i = np.arange(THREADS)[:, None], np.arange(4)[None]
    rows = (t // 32 * 32 + 8 * i + t % 32 // 4 + 37) % THREADS
    return sums, tiles[:, rows, t % 4].sum((0, 2), dtype=np.uint32)


@pytest.mark.parametrize("early", [False, True])
def test_the_whole_pipeline_is_right_in_every_order(early):
    for seed in range(20):
        ours, expected = piped(True, True, True, seed=seed, early=early)
        assert (ours == expected).all()


MISSING = {  # the wait, the barrier after it, the barrier before the next copy; when copies land; what the checker says
    "wait": ((False, True, True), False, "race: reads the shared bytes at .*, where thread .*'s cp.async has not been waited for"),
    "arrived": ((True, False, True), False, "race: "),
    "done": ((True, True, False), True, "race: cp.async writes the shared bytes at .*, which thread .* read since the last barrier"),
}


@pytest.mark.parametrize("missing", MISSING)
def test_a_barrier_left_out_is_seen_in_the_numbers(missing):
    barriers, early, _ = MISSING[missing]
    differ = 0
    for seed in range(10):
        ours, expected = piped(*barriers, seed=seed, early=early, races=False)
        differ += bool((ours != expected).any())
    assert differ >= 5


@pytest.mark.parametrize("missing", MISSING)
def test_a_barrier_left_out_is_told(missing):
    barriers, early, said = MISSING[missing]
    messages = []
    for seed in range(12):  # whichever of the two accesses comes second tells
        with pytest.raises(KernelError, match="race: ") as error:
            piped(*barriers, seed=seed, early=not early)
        messages.append(str(error.value))
    assert any(re.search(said, message) for message in messages)


@pytest.mark.parametrize("threads", [32, 128])
def test_plain_shared_memory_needs_its_barrier(threads):
    x, y = np.arange(threads, dtype=np.float32), np.zeros(threads, np.float32)
    results = set()
    for seed in range(10):
        kernel("rotated<true>")(1, threads, 0, x, y, seed=seed)
        assert (y == np.roll(x, -1)).all()
        kernel("rotated<false>")(1, threads, 0, x, y, seed=seed)
        assert np.isnan(y).any()  # what nobody has written yet
        results.add(y.tobytes())
    assert len(results) > 5


def test_a_seed_is_one_order():
    x, y = np.arange(128, dtype=np.float32), np.zeros((2, 128), np.float32)
    for row in y:
        kernel("rotated<false>")(1, 128, 0, x, row, seed=3)
    assert y[0].tobytes() == y[1].tobytes()


# ---- blocks that wait for each other, and operands in tables ----------------------------------------------------------------------------


def relayed(blocks, rounds, without=-1, seed=0, stays_away=-1, cooperative=True, state=None):
    x = np.zeros((2, blocks), np.int32)
    kernel("relay")(blocks, 64, 16, x, np.zeros(1, np.uint32) if state is None else state, rounds, without, stays_away, seed=seed,
                    cooperative=cooperative)  # fmt: skip
    return x[rounds % 2]


def in_rounds(blocks, rounds):
    x = np.zeros(blocks, np.int32)
    for _ in range(rounds):
        x = np.roll(x, -1) + np.arange(blocks, dtype=np.int32)
    return x


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_a_grid_barrier_holds_in_every_order(blocks):
    state = np.zeros(1, np.uint32)
    for seed in range(10):
        assert (relayed(blocks, 5, seed=seed, state=state) == in_rounds(blocks, 5)).all()  # and leaves its state ready for the next launch
        assert state[0] in (0, 2**31)


def test_a_grid_barrier_left_out_is_seen_in_the_numbers():
    wrong = [(relayed(7, 5, without=2, seed=seed) != in_rounds(7, 5)).any() for seed in range(20)]
    assert sum(wrong) >= 10


def test_a_grid_barrier_that_a_block_never_reaches_is_told():
    with pytest.raises(KernelError, match=r"deadlock: nothing can happen any more; .*grid_barrier, to which 2 of 3 blocks have come"):
        relayed(3, 2, stays_away=1)
    with pytest.raises(KernelError, match="grid_barrier, to which 1 of 3 blocks have come"):  # each block alone
        relayed(3, 2, cooperative=False)
    with pytest.raises(KernelError, match="its state counts 2 blocks, and 0 have come: it was not 0 at first"):
        relayed(3, 2, state=np.full(1, 2, np.uint32))
    assert (relayed(3, 2) == in_rounds(3, 2)).all()


def test_what_blocks_would_share_is_refused():
    with pytest.raises(KernelError, match="in a cooperative launch; here each block has dynamic shared memory only"):
        kernel("fixed_place")(2, 32, 0, np.zeros(32, np.int32), cooperative=True)


def test_a_table_holds_the_addresses_of_arrays():
    whole = np.arange(40, dtype=np.float32)
    a, b, y = whole[:16], whole[24:], np.full((2, 16), -1, np.float32)
    whole.flags.writeable = False
    kernel("moves")(1, 32, 0, Table([[a, y[1], 16], [b, y[0], 10]]), 2)
    assert (y[1] == a).all()
    assert (y[0] == [*b[:10], *[-1] * 6]).all()
    with pytest.raises(KernelError, match="reads or writes where it may not: 160 bytes from the start of argument 0, which has 160"):
        kernel("moves")(1, 32, 0, Table([[b, y[0], 17]]), 1)
    a.flags.writeable = False
    with pytest.raises(KernelError, match="reads or writes where it may not"):
        kernel("moves")(1, 32, 0, Table([[y[0], a, 10]]), 1)


# ---- rules -------------------------------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    1: "thread .37, 0, 0., warp 1, lane 5: ldmatrix: the shared address .* is no multiple of 16",
    2: "thread .37, 0, 0.,.*ldmatrix: the 16 bytes at 1104 are outside the 1024 bytes of dynamic shared memory",
    3: "thread .37, 0, 0.,.*cp.async: the shared address .* is no multiple of 16",
    4: "thread .37, 0, 0.,.*cp.async: the 16 bytes at -1024 are outside",
    5: "thread .37, 0, 0.,.*cp.async: the global address .* is no multiple of 16",
    6: "thread .37, 0, 0.,.*cp.async: the 16 bytes at .* are outside the caller's arrays",
    7: "lane 0: waits at ldmatrix_x4 while lane 31 of its warp waits at mma_m16n8k16",
    8: "warp 1, lane 0: waits at __syncwarp, which lane 5 never reaches: it has exited",
    9: "warp 0, lane 0: deadlock: waits at __syncthreads, which warp 1 never reaches: it has exited",
    10: "lane 0: waits at __syncthreads while lane 31 of its warp waits at __syncwarp",
    11: "thread .37, 0, 0.,.*reads or writes where it may not: 1024 bytes from the start of argument 1, which has 1024",
    12: "some thread wrote just outside an array uint16.64, 8.",
    13: "thread .37, 0, 0.,.*reads or writes where it may not: 0 bytes from the start of argument 1",
    14: "thread .37, 0, 0.,.*reads or writes where it may not: 8192 bytes from the start of dynamic shared memory, which has 1024",
    15: "thread .37, 0, 0.,.*an index outside its array",
    16: "thread .37, 0, 0.,.*a misaligned pointer",
    17: "thread .37, 0, 0.,.*divides an integer by zero",
    18: "thread .37, 0, 0.,.*an integer that overflows",
    19: "__shfl_sync: only the mask of all 32 lanes",
    20: "shared_address: .* is not in dynamic shared memory",
    21: "thread .37, 0, 0.,.*reads or writes where it may not: 1024 bytes from the start of argument 2, which has 1024",
    22: "some thread wrote 1040 bytes from the start of dynamic shared memory, which has 1024",
}


def forbidden(what, **options):
    x, y = words(64, 4).view(np.uint16), np.zeros((64, 8), np.uint16)
    x.flags.writeable = False
    kernel("forbidden")(1, 64, 1024, what, x, y, 0, **options)
    return True


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_is_forbidden_is_told(what):
    with pytest.raises(KernelError, match=FORBIDDEN[what]) as error:
        forbidden(what, seed=what)
    assert str(error.value).startswith("forbidden: ")
    assert forbidden(0)  # and the next launch is as good as the first
    if shutil.which("addr2line") and (line := re.search(r"instructions.cu:(\d+)", str(error.value))):
        assert f"case {what}:" in SOURCE.read_text().split("\n")[int(line[1]) - 1]


def test_a_line_is_named():
    if not shutil.which("addr2line"):
        pytest.skip("no addr2line to find lines with")
    for what in (1, 3, 7, 11):
        with pytest.raises(KernelError, match=r"\(instructions.cu:\d+\)$"):
            forbidden(what)


@pytest.mark.parametrize(("arguments", "words"), [
    ((1, 64, 0), "has 5 parameters"),
    ((1, 64, 0, 1.0, None, None, 0, 0), "argument 0 is float; float32. takes an array"),
    ((1, 64, 0, np.zeros(64, np.float16), None, None, 0, 0), "argument 0 is an array of float16; the parameter is float32"),
    ((1, 64, 0, None, None, None, 2**31, 0), "argument 3 is 2147483648, too large for int32"),
])  # fmt: skip
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(TypeError, match=words):
        kernel("shuffles")(*arguments)


@pytest.mark.parametrize(("block", "shared_bytes", "words"), [(48, 0, "whole warps"), (2048, 0, "at most 1024"), (32, 228 * 1024, "shared memory")])
def test_wrong_launches_are_refused(block, shared_bytes, words):
    with pytest.raises(KernelError, match=words):
        kernel("shuffles")(1, block, shared_bytes, None, None, None, 0, 0)


def test_fibres_without_assembly():
    x, y = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    compile_for_cpu(SOURCE, "rotated<true>", {"CUDA_ON_CPU_UCONTEXT": 1})(1, 128, 0, x, y)
    assert (y == np.roll(x, -1)).all()


def test_null_pointers_are_told():
    with pytest.raises(KernelError, match=r"where it may not: through a null pointer"):
        kernel("shuffles")(1, 32, 0, None, None, None, 0, 0)


def test_views_share_their_array():
    """q, k and v are often slices of one array: all of it may be read, and what is written comes back to its place."""
    whole = np.arange(4 * 32, dtype=np.float32).reshape(4, 32)
    before = whole.copy()
    kernel("shuffles")(1, 32, 0, whole[1], whole[2], whole[3], 1, 0)
    assert (whole[:2] == before[:2]).all()
    assert (whole[2] == before[1, LANE ^ 1]).all()
    assert (whole[3] == before[1, 0]).all()


def test_what_is_not_supported_does_not_compile(tmp_path):
    path = tmp_path / "vote.cu"
    path.write_text('#include "mma.cuh"\n__global__ void vote(int* x) { *x = __ballot_sync(0xffffffff, *x); }\n')
    with pytest.raises(RuntimeError, match=r"(?s)vote.cu does not compile for the CPU.*__ballot_sync"):
        compile_for_cpu(path, "vote")


def test_the_same_file_compiles_for_a_gpu():
    core = pytest.importorskip("cuda.core")
    names = (
        "matrices",
        "fragments",
        "product",
        "each",
        "shuffles",
        "copies",
        "groups",
        "places",
        "widths",
        "relay",
        "moves",
        "functions",
        "pipeline",
        "rotated<true>",
        "forbidden",
    )
    for arch in ("sm_80", "sm_90"):
        options = core.ProgramOptions(std="c++17", arch=arch, include_path=str(Path(opt_fast).parent / "kernels"), define_macro=["BF16=0"])
        try:
            code = core.Program(SOURCE.read_text(), "c++", options).compile("cubin", name_expressions=names)
        except Exception as error:  # a missing NVRTC is no fault of the kernels
            if "nvrtc" in str(error).lower() and "not" in str(error).lower() and "found" in str(error).lower():
                pytest.skip(f"no NVRTC: {error}")
            raise
        assert len(code.code) > 1000
