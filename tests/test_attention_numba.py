"""The Numba kernels under Numba's simulator, against opt_np/flash.py in float64; ptxas's report on them; and the kernels on a GPU where there is one.

The simulator must be enabled before Numba is imported, so this file is also a program: a server, started once, that runs calls under it.
It runs a block's threads in order from barrier to barrier, first to last or last to first, and new arrays hold NaN: a missing barrier or an element
that was never written then shows in the result, which the simulator's usual concurrent threads would mostly hide.
"""

import importlib.util
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import cuda

from opt_fast import attention_numba
from opt_np import flash, ops

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed: pip install numba-cuda", allow_module_level=True)

EPS = np.finfo(np.float32).eps
FORWARD = "v1", "v2", "v3", "decode"
MASKS = None, "left", "right", "holes", "nothing visible"


def among_nan(array):
    """The same values as every second element, along each axis, of a larger array of NaN (for masks, of ones)."""
    if not isinstance(array, np.ndarray):
        return array
    room = np.full([2 * n for n in array.shape], np.nan if array.dtype.kind == "f" else 1).astype(array.dtype)
    part = room[tuple(slice(1, None, 2) for _ in array.shape)]
    part[...] = array
    return part


def serve():
    """Answers pickled (function, arguments, keywords, backwards, gaps) from standard input, until it ends."""
    import numba.cuda.simulator.kernel as simulator

    warnings.simplefilter("error")
    plain = np.empty

    def empty(shape, dtype=float, **options):
        array = plain(shape, dtype, **options)
        array.fill(np.nan if array.dtype.kind == "f" else 99)
        return array

    class InTurn(simulator.BlockManager):
        backwards = False

        def run(self, point, *arguments):
            threads = [Turn(self._f, arguments, point, place) for place in np.ndindex(*self._block_dim)]
            waiting = threads[::-1] if self.backwards else threads
            while waiting:
                for thread in waiting:
                    thread.go()
                if any(thread.error for thread in threads):
                    raise next(thread.error for thread in threads if thread.error)
                ended = [thread.ended for thread in waiting]
                assert all(ended) or not any(ended), "some threads wait at a barrier that others never reach"
                waiting = [] if all(ended) else waiting

    class Turn(threading.Thread):
        def __init__(self, function, arguments, block, place):
            super().__init__(daemon=True)
            self.work, self.blockIdx, self.threadIdx = (function, arguments), simulator.Dim3(*block), simulator.Dim3(*place)
            self.turn, self.done, self.ended, self.error = threading.Semaphore(0), threading.Semaphore(0), False, None
            self.start()

        def go(self):
            self.turn.release()
            self.done.acquire()

        def run(self):
            self.turn.acquire()
            try:
                self.work[0](*self.work[1])
            except Exception as error:
                self.error = error
            self.ended = True
            self.done.release()

        def syncthreads(self):
            self.done.release()
            self.turn.acquire()

    simulator.BlockManager, np.empty = InTurn, empty
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            name, arguments, keywords, InTurn.backwards, gaps = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = getattr(attention_numba, name)(*map(among_nan, arguments) if gaps else arguments, **keywords)
        except Exception as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


@pytest.fixture(scope="module")
def simulated():
    """Calls a function of attention_numba under the simulator; with `gaps`, its arrays have strides and NaN between their numbers."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": path}
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def run(name, *arguments, backwards=False, gaps=False, **keywords):
        pickle.dump((name, arguments, keywords, backwards, gaps), server.stdin)
        server.stdin.flush()
        answer = pickle.load(server.stdout)
        if isinstance(answer, Exception):
            raise answer
        return answer

    yield run
    server.stdin.close()
    assert server.wait(60) == 0
    server.stdout.close()


# ---- against flash.py ----------------------------------------------------------------------------------------------------------------------


def numbers(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def mask(kind, B, S, seed=0):
    place, rng = np.arange(S), np.random.default_rng(seed)
    cut = rng.integers(0, S + 1, (B, 1))
    return {None: None, "left": place >= cut, "right": place < cut, "holes": rng.random((B, S)) < 0.6, "nothing visible": np.zeros((B, S), bool)}[
        kind
    ]


def exactly(q, k, v, scale, visible):
    """flash.attention of each head in float64."""
    q, k, v = (x.astype(float) for x in (q, k, v))
    O, L = np.zeros(q.shape), np.zeros(q.shape[:3])
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        O[b, :, h], L[b, :, h] = flash.attention(q[b, :, h], k[b, :, h], v[b, :, h], scale, None if visible is None else visible[b])
    return O, L


def gradients(dO, q, k, v, O, L, scale, visible):
    """flash.attention_bwd of each head in float64."""
    dO, q, k, v, O, L = (x.astype(float) for x in (dO, q, k, v, O, L))
    grads = np.zeros(q.shape), np.zeros(k.shape), np.zeros(k.shape)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        heads = (x[b, :, h] for x in (dO, q, k, v, O, L))
        for whole, part in zip(grads, flash.attention_bwd(*heads, scale, None if visible is None else visible[b]), strict=True):
            whole[b, :, h] = part
    return grads


def close(ours, exact, roundings=32.0):
    """Checks an error in units of rounding of the largest value; a float16 result is rounded once more."""
    assert np.isfinite(ours).all()
    own = np.finfo(np.float16).eps if ours.dtype == np.float16 else 0
    assert np.abs(ours - exact).max(initial=0) <= (roundings * EPS + own) * max(np.abs(exact).max(initial=0), 1)
    return True


def right(result, exact, dtype, size=1.0):
    (O, L), (exact_O, exact_L) = result, exact
    assert O.dtype == dtype
    assert L.dtype == np.float32
    assert (np.isneginf(L) == np.isneginf(exact_L)).all()
    assert not O[np.isneginf(exact_L)].any()
    seen = ~np.isneginf(exact_L)
    return close(O, exact_O, 32 * size) and close(L[seen], exact_L[seen])


@st.composite
def problems(draw):
    """Lengths around the simulator's tiles of 8, head sizes that are no powers of two, more keys than queries or fewer, any mask."""
    (B, H), Dh = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)])), draw(st.sampled_from([8, 16, 20]))
    T, S = draw(st.sampled_from([1, 3, 7, 8, 9, 17])), draw(st.sampled_from([1, 2, 8, 13, 16, 25, 35]))
    dtype = draw(st.sampled_from([np.float32, np.float32, np.float16]))
    q, k, v, dO = (numbers(B, n, H, Dh, seed=i, dtype=dtype) for i, n in enumerate((T, S, S, T)))
    return q, k, v, dO, mask(draw(st.sampled_from(MASKS)), B, S, draw(st.integers(0, 9))), draw(st.booleans()), draw(st.booleans())


@settings(max_examples=16)
@given(problem=problems(), name=st.sampled_from(FORWARD))
def test_every_rung_is_flash(simulated, problem, name):
    q, k, v, _, visible, gaps, backwards = problem
    if name == "decode":
        q = q[:, :16]
    result = simulated(name, q, k, v, 0.3, visible, gaps=gaps, backwards=backwards)
    assert right(result, exactly(q, k, v, 0.3, visible), q.dtype)
    if q.shape[1] <= k.shape[1]:
        wide = (x.astype(float) for x in (q, k, v))
        assert right(result, ops.attention_lse(*wide, 0.3, SimpleNamespace(visible=visible)), q.dtype)


@settings(max_examples=10)
@given(problem=problems())
def test_the_backward_pass_is_flash(simulated, problem):
    q, k, v, dO, visible, gaps, backwards = problem
    O, L = exactly(q, k, v, 0.3, visible)
    O, L = O.astype(q.dtype), L.astype(np.float32)
    grads = simulated("v3_bwd", dO, q, k, v, O, L, 0.3, visible, gaps=gaps, backwards=backwards)
    for ours, exact in zip(grads, gradients(dO, q, k, v, O, L, 0.3, visible), strict=True):
        assert ours.dtype == q.dtype
        assert close(ours, exact, 128)
    assert not grads[0][np.isneginf(L)].any()
    if visible is not None:
        assert not grads[1][~visible].any()
        assert not grads[2][~visible].any()


@pytest.mark.parametrize("name", [*FORWARD, "v3_bwd"])
def test_a_blocks_threads_may_run_in_any_order(simulated, name):
    q, k, v = numbers(1, 11, 1, 16), numbers(1, 35, 1, 16, seed=1), numbers(1, 35, 1, 16, seed=2)
    before = () if name != "v3_bwd" else (q,)
    after = () if name != "v3_bwd" else [x.astype(np.float32) for x in exactly(q, k, v, 0.3, None)]
    results = [simulated(name, *before, q, k, v, *after, 0.3, backwards=backwards) for backwards in (False, True)]
    for forwards, backwards in zip(*results, strict=True):
        np.testing.assert_array_equal(forwards, backwards)
        assert np.isfinite(forwards).all()


@pytest.mark.parametrize("splits", range(1, 8))
def test_any_number_of_splits_gives_the_same(simulated, splits):
    q, k, v, visible = numbers(1, 3, 1, 8), numbers(1, 200, 1, 8, seed=1), numbers(1, 200, 1, 8, seed=2), mask("holes", 1, 200)
    visible[:, 64:128] = False  # splits that see nothing
    assert right(simulated("decode", q, k, v, 0.3, visible, splits=splits), exactly(q, k, v, 0.3, visible), np.float32)


def test_the_rule_for_splits():
    assert attention_numba.split_count(12, 4, 528) == 1  # too few keys
    assert attention_numba.split_count(500, 64, 528) == 1  # heads enough
    assert attention_numba.split_count(12, 16, 528) == 14  # 168 of 528 places, where 16 would fill 192
    assert attention_numba.split_count(100, 64, 528) == 5  # 500 of 528
    assert attention_numba.split_count(400, 64, 528) == 5  # 2000 of 2112; with fewer, the last wave is a quarter empty


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("size", [1e4, 6e4])
def test_huge_scores(simulated, name, size):
    dtype = np.float16 if size > 2e4 else np.float32
    q, k, v = numbers(1, 9, 1, 8), numbers(1, 17, 1, 8, seed=1), numbers(1, 17, 1, 8, seed=2, dtype=dtype)
    q, k = (np.clip(x * np.float32(size), -6e4, 6e4).astype(dtype) for x in (q, k))
    k[0, 5] = k[0, 4]  # two equal scores share
    O, L = simulated(name, q, k, v, 1.0)
    exact_O, exact_L = exactly(q, k, v, 1.0, None)
    assert close(O, exact_O)
    assert (np.abs(L - exact_L) <= 4 * EPS * np.abs(exact_L).max()).all()


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_nothing_leaks_from_hidden_keys(simulated, kind, gaps):
    q, k, v, dO = numbers(2, 9, 1, 8), numbers(2, 19, 1, 8, seed=1), numbers(2, 19, 1, 8, seed=2), numbers(2, 9, 1, 8, seed=3)
    visible = mask(kind, 2, 19, 3)
    assert not visible.all()
    O, L = exactly(q, k, v, 0.3, visible)
    exact = gradients(dO, q, k, v, O, L, 0.3, visible)
    k[~visible], v[~visible] = np.nan, np.nan
    for name in FORWARD:
        assert right(simulated(name, q, k, v, 0.3, visible, gaps=gaps), (O, L), np.float32)
    grads = simulated("v3_bwd", dO, q, k, v, O.astype(np.float32), L.astype(np.float32), 0.3, visible.view(np.uint8), gaps=gaps)
    for ours, expected in zip(grads, exact, strict=True):
        assert close(ours, expected, 128)


@pytest.mark.parametrize("name", FORWARD)
def test_nan_is_not_lost(simulated, name):
    q, k = numbers(1, 10, 1, 8), numbers(1, 10, 1, 8, seed=1)
    broken = q.copy()
    broken[0, 4] = np.nan
    O, L = simulated(name, broken, k, k, 0.3)
    assert (np.isnan(O).all((0, 2, 3)) == (np.arange(10) == 4)).all()
    assert (np.isnan(L).all((0, 2)) == (np.arange(10) == 4)).all()


@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 5), (1, 0, 5), (1, 3, 0)])
def test_empty_arrays(simulated, B, T, S):
    q, k = np.ones((B, T, 1, 8), np.float32), np.ones((B, S, 1, 8), np.float32)
    for name in FORWARD:
        O, L = simulated(name, q, k, k, 1.0)
        assert O.shape == q.shape
        assert not O.any()
        assert np.isneginf(L).all()
    grads = simulated("v3_bwd", q, q, k, k, O, L, 1.0)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
    assert not any(x.any() for x in grads)


@pytest.mark.parametrize(("change", "words"), [
    ({"q": np.zeros((1, 2, 1, 8))}, "float32 or all float16"), ({"k": np.zeros((1, 3, 2, 8), np.float32)}, r"k \(1, 3, 2, 8\)"),
    ({"visible": np.ones((1, 2), bool)}, "a column for each key"), ({"visible": np.ones((1, 3), np.float32)}, "bool or uint8"),
    ({"q": SimpleNamespace(dtype="torch.bfloat16", shape=(1, 2, 1, 8))}, "float32 or all"),
    ({x: SimpleNamespace(dtype="torch.bfloat16", shape=(1, 2, 1, 8)) for x in "qkv"}, "convert with"),
    ({}, "on a GPU the arguments are torch"),
])  # fmt: skip
def test_what_is_refused(change, words):
    k = np.zeros((1, 3, 1, 8), np.float32)
    with pytest.raises(ValueError, match=words):
        attention_numba.check(**{"q": k[:, :2], "k": k, "v": k, "visible": None, **change})


def test_what_each_rung_refuses(simulated):
    k = np.zeros((1, 20, 1, 8), np.float32)
    cases = (
        ("decode", (k, k, k, 1.0), {}, "up to 16"),
        ("decode", (k[:, :1], k, k, 1.0), {"splits": 0}, "1 or more"),
        ("v3", (k[..., :6], k[..., :6], k[..., :6], 1.0), {}, "multiples of 4"),
        ("v3_bwd", (k, k, k, k, k, k, 1.0), {}, "L is float32"),
    )
    for name, arguments, keywords, words in cases:
        with pytest.raises(ValueError, match=words):
            simulated(name, *arguments, **keywords)


# ---- what the compiler makes of them -------------------------------------------------------------------------------------------------------

PTXAS = shutil.which("ptxas") or next((str(p) for p in sorted(Path("/usr/local").glob("cuda*/bin/ptxas"))), None)


SEEN, SCALE, SCORES = "visible", "float32", "scores"
FACTORIES = "bringing", "rectangles", "tiled_products", "flash_forward", "flash_backward", "split_decode"


@pytest.fixture
def compiled(monkeypatch):
    """A kernel's PTX for compute capability 9.0, and how many bytes it has in local memory, or None without ptxas; no GPU is needed."""
    monkeypatch.setattr(sys.modules["numba.cuda.dispatcher"], "get_current_device", lambda: SimpleNamespace(compute_capability=(9, 0)))

    def compiled(kernel, *arguments, floats="float32"):
        """Arguments are a number of axes, of float32 or of `floats` where it is 4 (any strides), or a type's name."""
        types = numba.types

        def type_of(x):
            if x == SEEN:
                return types.Array(types.uint8, 2, "A")
            if x == SCORES:
                return types.Array(types.float32, 4, "C")
            return types.Array(getattr(types, floats if x == 4 else "float32"), x, "A") if isinstance(x, int) else getattr(types, x)

        signature = types.void(*map(type_of, arguments))
        try:
            ptx, _ = cuda.compile(
                kernel.py_func, signature, device=False, abi="numba", cc=(9, 0), launch_bounds=kernel.targetoptions["launch_bounds"]
            )
        except (ImportError, OSError, RuntimeError) as error:
            pytest.skip(f"numba.cuda cannot compile on this machine: {error}")
        assert ".f64" not in ptx  # a double would be 1/2 of the speed on some GPUs and 1/64 on others
        if PTXAS is None:
            return ptx, None
        ptx = re.sub(r"(?m)^\.version .*", ".version 8.0", ptx)  # nothing newer is used, and ptxas may be older than NVVM
        done = subprocess.run([PTXAS, "-v", "--gpu-name", "sm_90", "-o", os.devnull, "-"], input=ptx, text=True, capture_output=True)
        if done.returncode:
            pytest.skip(f"{PTXAS} does not take this PTX: {done.stderr}")
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr).groups()
        )
        shared = re.search(r"(\d+) bytes smem", done.stderr)
        assert not shared or int(shared[1]) <= 48 * 1024
        return ptx, stack + stores + loads

    yield compiled
    for factory in (getattr(attention_numba, name) for name in FACTORIES):
        factory.cache_clear()  # what was made here is for one kind of GPU


@pytest.mark.parametrize("Dh", [64, 80, 128])
def test_v3_stays_in_registers(compiled, Dh):
    ptx, local = compiled(attention_numba.flash_forward(Dh, attention_numba.flash_tiles(Dh)), 4, 4, 4, SEEN, SEEN, 4, 3, SCALE)
    assert ".local" not in ptx
    assert "ld.shared.v4.f32" in ptx
    assert not local


def test_the_other_kernels_stay_in_registers_in_float16(compiled):
    of_keys, of_queries = attention_numba.flash_backward(128, attention_numba.BACKWARD)
    scores, values = attention_numba.tiled_products(80, attention_numba.TILED)
    for kernel, *arguments in (
        (of_keys, 4, 4, 4, 4, 3, 3, SEEN, SEEN, 4, 4, SCALE),
        (of_queries, 4, 4, 4, 4, 3, 3, SEEN, SEEN, 4, SCALE),
        (scores, 4, 4, SEEN, SEEN, SCORES, SCALE),
        (values, SCORES, 4, SEEN, SEEN, 4),
        (attention_numba.split_decode(64, 16), 4, 4, 4, SEEN, 5, 4, SCALE, "int64"),
        (attention_numba.combine, 5, 4, 4, 3),
        (attention_numba.naive_scores, 4, 4, SEEN, SCORES, SCALE),
        (attention_numba.naive_softmax, SCORES, 3),
        (attention_numba.naive_values, SCORES, 4, SEEN, 4),
        (attention_numba.row_sums, 4, 4, 3),
    ):
        ptx, local = compiled(kernel, *arguments, floats="float16")
        assert ".local" not in ptx
        assert not local


# ---- on a GPU ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("Dh", [64, 80, 128])
def test_every_rung_on_a_gpu(Dh, dtype):
    torch = pytest.importorskip("torch")
    B, T, S, H, scale = 2, 257, 300, 3, Dh**-0.5
    dtype = getattr(torch, dtype)
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(B, S, 3, H, Dh, generator=generator, device="cuda").to(dtype)
    q, k, v = qkv[:, S - T :, 0], qkv[:, :, 1], qkv[:, :, 2]  # slices of one array, as a fused projection makes them
    visible = torch.ones(B, S, dtype=torch.bool, device="cuda")
    visible[0, :70], visible[1, 100:110] = False, False
    seen = visible[:, None, None] & torch.ones(T, S, dtype=torch.bool, device="cuda").tril(S - T)

    def plain(q, k, v, dO):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        scores = (torch.einsum("bthd,bshd->bhts", q * scale, k)).masked_fill(~seen, -torch.inf)
        P = torch.where(seen.any(-1, keepdim=True), scores, 0).softmax(-1) * seen
        O = torch.einsum("bhts,bshd->bthd", P, v)
        return O, torch.logsumexp(scores, -1).transpose(1, 2), *torch.autograd.grad(O, (q, k, v), dO)

    def no_worse(ours, torchs, exact, times=2):
        assert torch.isfinite(ours).all()
        error, theirs = ((x.double() - exact).abs().max().item() for x in (ours, torchs))
        assert error <= times * theirs + 1e-5 * exact.abs().max().item()

    dO = torch.randn(B, T, H, Dh, generator=generator, device="cuda").to(dtype)
    exact, low = plain(*(x.double() for x in (q, k, v, dO))), plain(q, k, v, dO)
    for rung in (attention_numba.v1, attention_numba.v2, attention_numba.v3):
        O, L = rung(q, k, v, scale, visible)
        assert O.dtype == dtype
        no_worse(O, low[0], exact[0])
        torch.testing.assert_close(L.double(), exact[1].detach(), rtol=1e-4, atol=1e-4)
        assert (O[0, : 70 - (S - T)] == 0).all()  # these see no key
    grads = attention_numba.v3_bwd(dO, q, k, v, O, L, scale, visible)
    for ours, torchs, expected in zip(grads, low[2:], exact[2:], strict=True):
        no_worse(ours, torchs, expected, 3)
    again = attention_numba.v3_bwd(dO, q, k, v, O, L, scale, visible)
    assert all(torch.equal(x, y) for x, y in zip(grads, again, strict=True))
    for splits in (None, 1, 2, 3):
        O, _ = attention_numba.decode(q[:, -5:], k, v, scale, visible, splits)
        no_worse(O, low[0][:, -5:], exact[0][:, -5:])
    with pytest.raises(ValueError, match="bfloat16"):
        attention_numba.v3(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale)


if __name__ == "__main__":
    serve()
