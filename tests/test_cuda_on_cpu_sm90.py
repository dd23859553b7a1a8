"""Hopper's instructions on a CPU: every function of cuda_on_cpu/sm90.cuh against NumPy and the manual's layouts, and every rule by breaking it."""

import re
import shutil

import cuda_emulator
import ml_dtypes
import numpy as np
import pytest
from cuda_emulator import HERE, KernelError, compile_for_cpu, tensor_map

from opt_fast import nvrtc

if cuda_emulator.why_not():
    pytest.skip(cuda_emulator.why_not(), allow_module_level=True)

SOURCE = HERE / "instructions_sm90.cu"
HALVES = {0: np.dtype(np.float16), 1: np.dtype(ml_dtypes.bfloat16)}
THREAD = np.arange(128)[:, None]


def kernel(name, bf16=0):
    return compile_for_cpu(SOURCE, name, {"BF16": bf16})


def halves(*shape, bf16=0, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(HALVES[bf16])


def words(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).integers(0, 2**16, shape, np.uint16)


def swizzled(slab):
    """Rows of 64 numbers as they lie in shared memory: (rows, 64) -> (rows, 64), and back."""
    rows = np.arange(len(slab))[:, None]
    return slab.reshape(-1, 8, 8)[rows, np.arange(8) ^ rows % 8].reshape(slab.shape)


def slabs(x):
    """(rows, columns), columns padded to whole slabs of 64, one slab after the other."""
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % 64)))
    return np.concatenate([swizzled(x[:, i : i + 64]) for i in range(0, x.shape[1], 64)])


def fragment(n):
    """Row and column of each accumulator: (128, n / 2)."""
    i = np.arange(n // 2)[None]
    return THREAD // 32 * 16 + THREAD % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + THREAD % 4 * 2 + i % 2


def added_up(D, A, B):
    """D + A B as the emulator rounds it: once after each 16 products."""
    for k in range(0, A.shape[1], 16):
        D = (D + A[:, k : k + 16].astype(np.float64) @ B[k : k + 16].astype(np.float64)).astype(np.float32)
    return D


# ---- products ----------------------------------------------------------------------------------------------------------------------------


def product(N, image, a, places, D, add, bf16=0, leading=1024, stride=1024, transposed=False, **options):
    """Adds up k-steps whose tiles begin at places (steps, 2) of an image; D: (64, N) -> (64, N)."""
    d, places = np.ascontiguousarray(D[fragment(N)]), np.array(places, np.int32)
    shape = len(places), leading, stride
    kernel("products", bf16)(1, 128, image.nbytes, N, image.view(np.uint16), image.size, a, transposed, places, *shape, add, d, **options)
    D = np.full_like(D, np.nan)
    D[fragment(N)] = d
    return D


def numbers(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("K", [16, 64, 80, 128])
@pytest.mark.parametrize("bf16", HALVES)
@pytest.mark.parametrize("N", [8, 64, 80, 128, 256])
def test_both_operands_from_shared_memory(N, K, bf16):
    A, B, D = halves(64, K, bf16=bf16), halves(N, K, bf16=bf16, seed=1), numbers(64, N)
    image = np.concatenate([slabs(A), slabs(B)])  # A: (slabs, 64, 64);  B: (slabs, N, 64)
    first_b = -(-K // 64) * 64 * 64
    places = [(k // 64 * 64 * 64 + k % 64, first_b + k // 64 * N * 64 + k % 64) for k in range(0, K, 16)]
    for add in (False, True):
        for early in (False, True):
            found = product(N, image, None, places, D, add, bf16, early=early)
            np.testing.assert_allclose(found, added_up(D * add, A, B.T), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("K", [16, 48, 128])
@pytest.mark.parametrize("bf16", HALVES)
@pytest.mark.parametrize("N", [8, 64, 80, 128, 256])
def test_a_from_registers_and_b_as_rows_of_k(N, K, bf16):
    A, B, D = halves(64, K, bf16=bf16), halves(K, N, bf16=bf16, seed=1), numbers(64, N)
    i = np.arange(8)[None]
    rows, columns = THREAD // 32 * 16 + THREAD % 32 // 4 + 8 * (i // 2 % 2), THREAD % 4 * 2 + i % 2 + 8 * (i // 4)  # mma.m16n8k16's
    a = np.stack([A[rows, k + columns] for k in range(0, K, 16)]).view(np.uint32)
    for early in (False, True):  # B: (slabs, K, 64)
        found = product(N, slabs(B), a, [(0, k * 64) for k in range(0, K, 16)], D, True, bf16, leading=K * 128, early=early)
        np.testing.assert_allclose(found, added_up(D, A, B), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("K", [16, 48, 128])
@pytest.mark.parametrize("bf16", HALVES)
@pytest.mark.parametrize("N", [16, 64, 80, 128])
def test_both_operands_as_rows_of_k(N, K, bf16):
    """A: 64 numbers of each row, one swizzled tile wide;  B: (slabs, K, 64)."""
    A, B, D = halves(K, 64, bf16=bf16), halves(K, N, bf16=bf16, seed=1), numbers(64, N)
    image = np.concatenate([slabs(A), slabs(B)])
    places = [(k * 64, (K + k) * 64) for k in range(0, K, 16)]
    for add in (False, True):
        for early in (False, True):
            found = product(N, image, None, places, D, add, bf16, leading=K * 128, transposed=True, early=early)
            np.testing.assert_allclose(found, added_up(D * add, A.T, B), rtol=1e-6, atol=1e-6)


def test_groups_of_8_rows_of_k_may_lie_apart():
    A, B, D = halves(16, 64), halves(16, 16, seed=1), numbers(64, 16)
    image = np.full((4, 2, 8, 64), np.nan, np.float16)  # 2048 bytes from one group to the next
    image[:, 0] = slabs(np.concatenate([A, np.pad(B, ((0, 0), (0, 48)))])).reshape(4, 8, 64)
    found = product(16, image, None, [(0, 4 * 512)], D, True, stride=2048, transposed=True)
    np.testing.assert_allclose(found, added_up(D, A.T, B), rtol=1e-6, atol=1e-6)


def test_numbers_are_added_where_they_lie():
    """By threads of several blocks to the same places."""
    rng = np.random.default_rng(0)
    x, to = rng.integers(-99, 99, (128, 4)).astype(np.float32), 4 * rng.integers(0, 9, 128, np.int32)
    sums = np.ones(36, np.float32)
    kernel("added")(4, 32, 0, x, to, sums)
    expected = np.ones((9, 4), np.float32)
    np.add.at(expected, to // 4, x)
    assert (sums.reshape(9, 4) == expected).all()


@pytest.mark.parametrize(("place", "said"), [(2, "no multiple of 16"), (36, "in none of the arrays"), (34, "no multiple of 16")])
def test_sums_lie_in_an_array_at_multiples_of_16_bytes(place, said):
    to = np.zeros(32, np.int32)
    to[7] = place
    with pytest.raises(KernelError, match=f"thread .7, 0, 0.,.* reduce_add_v4: .*{said}"):
        kernel("added")(1, 32, 0, np.ones((32, 4), np.float32), to, np.ones(36, np.float32))


def test_groups_of_8_rows_may_lie_apart():
    A, B, D = halves(64, 16), halves(8, 16, seed=1), numbers(64, 8)
    image = np.full((9, 2, 8, 64), np.nan, np.float16)  # 2048 bytes from one group to the next
    image[:, 0] = slabs(np.concatenate([A, B])).reshape(9, 8, 64)
    np.testing.assert_allclose(product(8, image, None, [(0, 8 * 1024)], D, True, stride=2048), added_up(D, A, B.T), rtol=1e-6, atol=1e-6)


def test_accumulators_in_flight_are_nan():
    A, B = halves(64, 16), halves(8, 16, seed=1)
    image = np.concatenate([slabs(A), slabs(B)])
    seen = np.zeros((3, 128, 4), np.float32)
    kernel("in_flight")(1, 128, image.nbytes, image.view(np.uint16), image.size, seen)
    product = added_up(np.zeros((64, 8), np.float32), A, B.T)[fragment(8)]
    assert np.isnan(seen[0]).all()
    np.testing.assert_allclose(seen[1, :, :3], product[:, :3] + 1, rtol=1e-5, atol=1e-5)
    assert np.isnan(seen[1, :, 3]).all()  # the second group's
    np.testing.assert_allclose(seen[2], product + 2, rtol=1e-5, atol=1e-5)


# ---- copies ------------------------------------------------------------------------------------------------------------------------------


AROUND = (5, 5, 40, 80)  # numbers outside the array that a test may reach, on each side of each axis


def padded(x):
    return np.pad(x, [(n, n) for n in AROUND])


def in_box(at, box):
    """A box's place in a padded array."""
    return tuple(slice(n + a, n + a + size) for n, a, size in zip(AROUND, at[::-1], box[::-1], strict=True))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("at", [(0, 0, 0, 0), (16, 10, 1, 1), (64, 69, 2, 1), (-8, -3, -1, 0), (-5, 68, 1, -1), (80, 0, 0, 0), (0, 0, 3, 0)])
@pytest.mark.parametrize("box", [(64, 16, 1, 1), (64, 24, 2, 2)])
def test_a_box_lands_swizzled_and_zeros_are_around_the_array(box, at, early):
    x = words(2, 3, 70, 80)
    expected = padded(x)[in_box(at, box)]
    image = np.full((expected.size // 64, 64), 7, np.uint16)
    for seed in range(3):
        kernel("boxes")(1, 64, image.nbytes, tensor_map(x, box), image, image.nbytes, *at, True, seed=seed, early=early)
        assert (swizzled(image) == expected.reshape(image.shape)).all()


def test_before_its_barrier_a_box_is_nan():
    x, image, seen = words(1, 1, 64, 64), np.zeros((64, 64), np.uint16), 0
    for seed in range(12):
        with pytest.raises(KernelError, match="nobody has waited for the last loads"):
            kernel("boxes")(1, 64, image.nbytes, tensor_map(x, (64, 64, 1, 1)), image, image.nbytes, 0, 0, 0, 0, False, seed=seed)
        seen += (image == 0xFFFF).all()
    assert 4 <= seen < 12


def test_an_array_may_have_strides():
    whole = words(2, 50, 3, 4, 64)  # (B, T, 3, H, Dh): k of one projection, heads before rows
    k = whole[:, :, 1].swapaxes(1, 2)
    image = np.zeros((64, 64), np.uint16)
    kernel("boxes")(1, 64, image.nbytes, tensor_map(k, (64, 64, 1, 1)), image, image.nbytes, 0, 3, 2, 1, True)
    assert (swizzled(image)[:47] == whole[1, 3:, 1, 2]).all()
    assert (image[47:] == 0).all()


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("at", [(0, 0, 0, 0), (16, 60, 1, 1), (-5, -3, 2, 1), (80, 0, 0, 0)])
def test_a_store_leaves_out_what_is_outside(at, early):
    image, box = words(32, 64), (64, 16, 2, 1)
    x = words(2, 3, 70, 80, seed=1)
    expected = padded(x)
    expected[in_box(at, box)] = swizzled(image).reshape(box[::-1])
    kernel("stored")(1, 64, image.nbytes, tensor_map(x, box), image, image.size, *at, True, early=early)
    assert (x == expected[tuple(slice(n, -n) for n in AROUND)]).all()


def test_a_store_must_be_waited_for():
    x, image = words(1, 1, 64, 64), words(64, 64)
    with pytest.raises(KernelError, match="exits, and has not waited for this tma_store_4d"):
        kernel("stored")(1, 64, image.nbytes, tensor_map(x, (64, 64, 1, 1)), image, image.size, 0, 0, 0, 0, False)


@pytest.mark.parametrize(("array", "box", "said"), [
    (np.zeros((2, 2, 64), np.uint16), (64, 2, 2), "4 axes"),
    (np.zeros((1, 2, 2, 64), np.float32), (64, 2, 2, 1), "numbers 16 bits"),
    (np.zeros((1, 2, 2, 65), np.uint16), (64, 2, 2, 1), "multiples of 16"),
    (np.zeros((1, 2, 2, 128), np.uint16)[..., ::2], (64, 2, 2, 1), "the last axis is contiguous"),
    (np.zeros((1, 0, 2, 64), np.uint16), (64, 2, 2, 1), "it has numbers"),
    (np.zeros((1, 2, 2, 64), np.uint16), (32, 2, 2, 1), "its first axis has 64"),
    (np.zeros((1, 2, 2, 64), np.uint16), (64, 257, 1, 1), "1 to 256"),
])  # fmt: skip
def test_wrong_maps_are_refused(array, box, said):
    with pytest.raises(ValueError, match=said):
        tensor_map(array, box)


def test_a_map_is_no_pointer():
    m = tensor_map(words(1, 1, 8, 64), (64, 8, 1, 1))
    with pytest.raises(TypeError, match="argument 1 is a TensorMap; the parameter is uint16"):
        kernel("boxes")(1, 64, 1024, m, m, 1024, 0, 0, 0, 0, True)


# ---- pipelines ---------------------------------------------------------------------------------------------------------------------------

TILES = 5
BROKEN = ("nothing", "no wait full", "no wait empty", "fewer bytes", "more bytes", "no expect", "no arrive empty", "no product wait", "no init fence",
          "no sync", "wrong parity", "no wgmma fence", "arrive before product", "twice arrived",
          "many registers")  # the kernel's enum # fmt: skip


def piped(broken="nothing", **options):
    x, y = halves(TILES, 1, 64, 64), halves(TILES, 1, 64, 64, seed=1)
    maps = [tensor_map(a.view(np.uint16), (64, 64, 1, 1)) for a in (x, y)]
    d = np.zeros((2, 128, 32), np.float32)
    kernel("pipeline")(1, 384, 4 * 8192, *maps, d, TILES, BROKEN.index(broken), **options)
    A, B = np.concatenate(x[:, 0], 1), np.concatenate(y[:, 0], 1)
    return d, np.broadcast_to(added_up(np.zeros((64, 64), np.float32), A, B.T)[fragment(64)], d.shape)


@pytest.mark.parametrize("early", [False, True])
def test_a_producer_and_two_consumers_are_right_in_every_order(early):
    for seed in range(15):
        ours, expected = piped(seed=seed, early=early)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


RACE = "race: (wgmma reads|tma_load_4d to|the mbarrier at .* has completed phases)"
SAID = {  # what is left out, and what the checker says
    "no wait full": RACE,
    "no wait empty": RACE + "|one more than the 1 arrivals|deadlock: .*warp .*: mbarrier_wait",
    "fewer bytes": "8192 bytes more than expected|land after phase|no thread of the warpgroup has waited",
    "more bytes": "deadlock: .*warp 4, 5, 6, 7, 8, 9, 10, 11: mbarrier_wait for parity 0 .phase 0. of .*: 0 of 1 arrivals and 16 bytes are missing",
    "no expect": RACE + "|more than expected|land after phase",
    "no arrive empty": "deadlock: .*warp 0: mbarrier_wait for parity 0 .phase 0. of the mbarrier at .*: 2 of 2 arrivals and 0 bytes are missing",
    "no product wait": "race: tma_load_4d to the shared bytes at .*, which a wgmma that was not waited for still reads",
    "no init fence": "race: .*no mbarrier_init_fence",
    "no sync": "is none: not initialised yet|race: .* thread 0 has initialised",
    "wrong parity": "deadlock: .*warp 0: mbarrier_wait for parity 0 .phase 0.*warp 4, 5, 6, 7, 8, 9, 10, 11: ",
    "no wgmma fence": "no wgmma_fence before it",
    "arrive before product": RACE + "|deadlock: .*wgmma_ss with the rest of its warpgroup",  # some lanes missed a phase
    "many registers": "the warpgroups ask for 65536 registers together; a block of 384 threads has 64512",
    "twice arrived": "one more than the 1 arrivals of the mbarrier at",
}  # fmt: skip


def error_of(run, *what, **options):
    """What the checker says, or nothing."""
    try:
        run(*what, **options)
    except KernelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("broken", BROKEN[1:])
def test_what_is_left_out_of_a_pipeline_is_seen(broken):
    for early in (False, True):
        said = [error for seed in range(10) if (error := error_of(piped, broken, seed=seed, early=early))]
        assert len(said) >= (2 if broken in ("no wait empty", "no product wait", "arrive before product") else 10)  # in some orders of warps
        assert [error for error in said if not re.search(SAID[broken], error)] == []


@pytest.mark.parametrize("seed", range(6))
def test_named_barriers_give_turns(seed):
    digits = np.full(12, -1, np.int32)
    kernel("turns")(1, 384, 0, digits, 4, True, True, seed=seed)
    assert digits.tolist() == [0, 1, 2] * 4


def test_without_the_wait_there_are_no_turns():
    orders = set()
    for seed in range(6):
        digits = np.full(12, -1, np.int32)
        kernel("turns")(1, 384, 0, digits, 4, False, False, seed=seed)
        orders.add(tuple(digits.tolist()))
    assert len(orders) > 1
    with pytest.raises(KernelError, match=r"deadlock: .*warp 0, 1, 2, 3: named_barrier_sync 1, to which 128 of 256 threads have come"):
        kernel("turns")(1, 384, 0, digits, 4, True, False)


def test_lanes_of_a_warp_wait_for_each_other():
    for seed in range(5):
        order = np.zeros(32, np.int32)
        kernel("chain")(1, 32, 0, order, seed=seed)
        assert (order == (5 + 11 * np.arange(32)) % 32).all()


# ---- rules -------------------------------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    1: "mbarrier_init: the mbarrier at 0 of fixed shared memory is one already",
    2: "thread .37, 0, 0.,.*mbarrier_arrive: the mbarrier at 16 of fixed shared memory is none",
    3: "mbarrier_arrive: the mbarrier's address .* is no multiple of 8",
    4: "mbarrier_arrive: the mbarrier at .* is not in shared memory",
    5: "mbarrier_arrive: the mbarrier at 8 of fixed shared memory is none: not initialised yet, or written over",
    6: "mbarrier_arrive: one more than the 1 arrivals of .* phase 0 still waits for 8192 bytes",
    7: "1048576 bytes; 1048575 are the most",
    8: "the parity is 2",
    9: "0 arrivals",
    10: "the shared place 128 is no multiple of 1024",
    11: "the 8192 bytes at 9216 are outside the 16384 bytes",
    12: "race: tma_load_4d to the shared bytes at 0, where thread 37's has not landed yet",
    13: "the array may only be read",
    14: "exits, and has not waited for this tma_store_4d",
    15: "exits, and has not waited for this tma_store_4d",
    16: "nobody has waited for the last loads of the mbarrier at 0 of fixed",
    17: r"deadlock: .*warp 1: mbarrier_wait for parity 0 \(phase 0\) of .*: 1 of 1 arrivals and 0 bytes are missing",
    18: "this is no tensor map",
    19: "no mbarrier_init_fence has followed",
    20: "which a tma_store_4d that was not waited for still reads",
    21: "4096 bytes more than expected have come to the mbarrier at 0 of fixed shared memory in its phase 0",
    22: "8192 bytes of this load land after phase 0 of the mbarrier",
    30: "no wgmma_fence before it",
    31: "thread .64, 0, 0.,.*N, the descriptors or `add` are not those of thread 0",
    32: "A's descriptor .* has no 128-byte swizzle",
    33: "A begins at 128: 128-byte swizzle",
    34: "A reaches .*, outside the 16384 bytes",
    35: "nobody|warpgroup 0 has not waited for this wgmma",
    36: "warpgroup 0 has not waited for this wgmma",
    37: "waits at wgmma_ss, which warp 2 of its warpgroup never reaches: it has exited|deadlock: .*wgmma_ss with the rest of its warpgroup",
    38: "waits at (wgmma_ss while warp 2 of its warpgroup waits at registers_more|registers_more while warp . of its warpgroup waits at wgmma_ss)",
    39: "warp 2, .*this warp has committed 0 groups and waited for 0; warp 0 1 and 0",
    40: "its accumulators are a part of those of one",
    41: "B, MN-major, begins at 32, which is no multiple of 1024",
    42: "waits at wgmma_ss while lane 5 of its warp waits at wgmma_commit",
    43: "deadlock: .*warp 2: registers_more with the rest|waits at registers_more, which warp . of its warpgroup never reaches",
    44: "thread .37, 0, 0.,.*`add` are not those",
    45: "race: wgmma reads the shared bytes at 0, where a plain write has no async_proxy_fence after it",
    46: "race: wgmma reads the shared bytes at (0|1024|2048|3072), where a plain write has no async_proxy_fence after it, or is late",
    47: "thread .37, 0, 0.,.*its accumulator 3 has been written since this wgmma, which was not waited for",
    48: "thread .37, 0, 0.,.*race: tma_store_4d reads the shared bytes at 0, where a plain write has no async_proxy_fence after it",
    49: "some thread has written the shared byte at 18, to which this load was on its way",
    50: "barrier 0; they are 1 to 15",
    51: "barrier 16; they are 1 to 15",
    52: "100 threads; it must be a multiple of 32",
    53: r"named_barrier_sync\(1, 64\), and lane 0 of its warp \(1, 128\)",
    54: "barrier 1 for (64|128) threads, and others have come to it for (64|128)",
    55: "warp . comes to barrier 1 a second time",
    56: "deadlock: .*named_barrier_sync 1, to which 96 of 128 threads have come",
    57: "waits at named_barrier_sync, which lane 5 never reaches: it has exited",
}


def forbidden(what, **options):
    maps = [tensor_map(words(1, 1, 64, 64), (64, 64, 1, 1)) for _ in range(2)]
    maps[1].array.flags.writeable = False
    kernel("forbidden_sm90")(1, 128, 16384, what, *maps, np.zeros(128, np.float32), **options)
    return True


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_is_forbidden_is_told(what):
    with pytest.raises(KernelError, match=FORBIDDEN[what]) as error:
        forbidden(what, seed=what)
    assert str(error.value).startswith("forbidden_sm90: ")
    assert forbidden(0)  # and the next launch is as good as the first
    if shutil.which("addr2line") and (line := re.search(r"instructions_sm90.cu:(\d+)", str(error.value))):
        assert re.search(rf"case {what}:|what == {what}\)", SOURCE.read_text().split("\n")[int(line[1]) - 1])


@pytest.mark.parametrize(("what", "said"), [
    (60, "race: the mbarrier at 0 of fixed shared memory has completed phases 0 and 1 while this thread waited for the first"),
    (61, "race: wgmma reads the shared bytes at 0, which have changed since warp . reached it"),
])  # fmt: skip
def test_what_shows_in_some_orders(what, said):
    assert sum(bool(re.search(said, error_of(forbidden, what, seed=seed))) for seed in range(16)) >= 2


def test_others_may_go_on_between_an_arrival_and_what_follows_it():
    assert {error_of(forbidden, 60, seed=seed) == "" for seed in range(24)} == {
        True,
        False,
    }  # thread 37 between the two arrivals of thread 70, and not


def test_a_line_is_named():
    if not shutil.which("addr2line"):
        pytest.skip("no addr2line to find lines with")
    for what in (2, 11, 14, 17, 31, 36, 54):
        with pytest.raises(KernelError, match=r"\(instructions_sm90.cu:\d+\)$"):
            forbidden(what)


# ---- a whole kernel ----------------------------------------------------------------------------------------------------------------------


def attended(S, bf16=0, **options):
    q, k, v = (halves(1, 1, n, 128, bf16=bf16, seed=i) for i, n in enumerate((192, S, S)))
    o = np.zeros_like(q)
    maps = [tensor_map(a.view(np.uint16), (64, rows, 1, 1)) for a, rows in ((q, 64), (k, 128), (v, 128), (o, 64))]
    kernel("attention", bf16)(1, 512, (3 * 8192 + 4 * 16384) * 2, *maps, S, 128**-0.5, **options)
    s = q[0, 0].astype(np.float64) @ k[0, 0].astype(np.float64).T * 128**-0.5
    P = np.exp(s - s.max(1, keepdims=True))
    return np.abs(o[0, 0].astype(np.float64) - P / P.sum(1, keepdims=True) @ v[0, 0].astype(np.float64)).max()


@pytest.mark.parametrize(("S", "bf16", "seed", "early"), [(1024, 0, 0, False), (384, 1, 1, True)])
def test_attention(S, bf16, seed, early):
    assert attended(S, bf16, seed=seed, early=early) < (8e-3 if bf16 else 1e-3)


def test_the_functions_are_those_of_the_gpus_header():
    """Ours may have more: TMA's stores, which no kernel uses as yet."""
    function = re.compile(r"(template <(?:int \w)?>)?\s*__device__ __forceinline__ (.*?\))\s*[{;]")
    found = [function.findall((folder / "sm90.cuh").read_text()) for folder in (HERE, nvrtc.KERNELS)]
    ours, theirs = ({both for both in each if both[0] != "template <>"} for each in found)
    assert len(theirs) > 15
    assert theirs - ours == set()
