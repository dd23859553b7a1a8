"""The CUDA C++ kernels, without a GPU: the files that NVRTC compiles run on the CPU, warp by warp (cuda_emulator.py), and compile for each GPU.

On a GPU, where there is one, the same cases run through attention_cuda.
"""

import math
import threading
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from cuda_emulator import compile_for_cpu, tensor_map, why_not
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_fast import attention_cpp, attention_cuda, nvrtc
from opt_fast.attention_cpp import Combine, Mma, MmaBwd, MmaDecode, Round, Sm90, Sm90Bwd, aligned, mma_bwd, sizes, sm90_bwd, strides
from opt_fast.attention_cuda import HALVES, plain, plain_bwd, ranges_of

needs_compiler = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
needs_nvrtc = pytest.mark.skipif(nvrtc.missing() != "", reason=nvrtc.missing())
HEAD_DIMS = (64, 80, 128)
STEPS = partial(Sm90, ordered=True, polynomial=4)
each_kernel = pytest.mark.parametrize("kernel", [Mma, Sm90, pytest.param(STEPS, id="Sm90, ordered, polynomial")])
each_backward = pytest.mark.parametrize("kernel", [MmaBwd, Sm90Bwd])

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90")


def large(*sizes):
    """For a real GPU."""
    return [pytest.param(*given, marks=pytest.mark.large) for given in sizes]


def emulated(kernel, q, k, v, scale, ranges=None, **how):
    """attention_cpp.mma or sm90, on the CPU."""
    B, T, H, Dh = q.shape
    made = kernel(Dh)
    run = compile_for_cpu(nvrtc.KERNELS / f"{made.name}.cu", made.name, {"DH": Dh, "BF16": int(q.dtype == torch.bfloat16), **made.macros})
    O, L = torch.full((B, T, H, Dh), math.nan, dtype=q.dtype), torch.full((B, H, T), math.nan)  # poison: every number must be written
    bits = [a.view(torch.int16).numpy() for a in (q, k, v, O)]
    for array in bits[:3]:
        array.flags.writeable = False  # a write to Q, K or V is an error
    given = bits[:3]
    if isinstance(made, Sm90):
        made.cache = 3 * 4 * k.shape[1] * Dh  # three heads side by side
        given = [tensor_map(array, (64, 1, rows, 1)) for array, rows in zip(given, (made.Br, made.Bc, made.Bc), strict=True)]
    rest = [*sizes(q, k, scale), *(step for a in (q, k, v) if kernel is Mma for step in strides(a)), *strides(O)]
    rest += [H, made.together(k)] if isinstance(made, Sm90) else []
    arguments = [*given, bits[3], L.numpy(), None if ranges is None else ranges.numpy(), *rest]
    run(made.grid(B, T, H), made.threads, made.shared, *arguments, **how)
    return O, L.swapaxes(1, 2)


def inputs(B, T, S, H, Dh, dtype, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(B, n, H, Dh, generator=generator) * size).to(dtype) for n in (T, S, S)]


def some_seen(rows, T, S, rng):
    """A mask that hides keys at the beginning and at the end of each row."""
    visible = np.array([(np.arange(S) >= a) & (np.arange(S) < b) for a, b in np.sort(rng.integers(0, S + 1, (rows, 2)))])
    return attention_cuda.Seen(torch.tensor(visible), torch.tensor(ranges_of(visible, T)))


def within_the_rule(found, q, k, v, scale, seen=None):
    """FlashAttention's: an error of at most twice that of the plain formula in the low precision, and the rounding of the result itself."""
    O, L = found
    exact, exact_L = plain(q.double(), k.double(), v.double(), scale, seen)
    s = attention_cuda.scores(q.double(), k.double(), scale, seen).to(q.dtype).double()
    low = (attention_cuda.probabilities(s).to(q.dtype).double() @ v.double().swapaxes(1, 2)).swapaxes(1, 2).to(q.dtype)
    noise = 2 * ((exact + 0.3).to(q.dtype).double() - 0.3 - exact).abs().max()
    if q.dtype == torch.float32:  # whose sums are not exact either
        low, noise = plain(q, k, v, scale, seen)[0], 1e-5 * exact.abs().max()
    allowed = 2 * (low.double() - exact).abs().max() + noise
    assert torch.isfinite(O).all()
    assert (O.double() - exact).abs().max() <= allowed
    assert torch.equal(torch.isinf(L), torch.isinf(exact_L))
    some = torch.isfinite(exact_L)
    assert ((L.double() - exact_L)[some].abs() <= 1e-3 * exact_L[some].abs().clamp(min=1)).all()
    assert (O[~some] == 0).all()  # a query that sees no key
    return True


# ---- on the CPU --------------------------------------------------------------------------------------------------------------------------


@needs_compiler
@each_kernel
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("Dh", HEAD_DIMS)
@pytest.mark.parametrize(("T", "S"), [(1, 1), (17, 17), (128, 128), (130, 200), (65, 65), (5, 150), (150, 40), (300, 40)])
def test_it_computes_attention(kernel, T, S, Dh, dtype):
    q, k, v = inputs(1, T, S, 2, Dh, dtype)
    assert within_the_rule(emulated(kernel, q, k, v, Dh**-0.5), q, k, v, Dh**-0.5)


@needs_compiler
@each_kernel
@pytest.mark.parametrize("Dh", HEAD_DIMS)
def test_places_for_tiles_are_filled_again_and_again(kernel, Dh):
    q, k, v = inputs(1, 200, 1000, 1, Dh, torch.float16)
    O, L = emulated(kernel, q, k, v, Dh**-0.5, early=True, races=False)
    assert within_the_rule((O, L), q, k, v, Dh**-0.5)
    for seed in range(8):  # orders in which warps run and copies land: some mistakes show in every fourth
        assert torch.equal(emulated(kernel, q, k, v, Dh**-0.5, seed=seed)[0], O)


@needs_compiler
@each_kernel
@settings(max_examples=15)
@given(T=st.integers(1, 140), past=st.integers(-20, 150), H=st.integers(1, 2), Dh=st.sampled_from(HEAD_DIMS), dtype=st.sampled_from(HALVES),
       seed=st.integers(0, 1000))  # fmt: skip
def test_any_shape_in_any_order_of_warps(kernel, T, past, H, Dh, dtype, seed):
    q, k, v = inputs(1, T, max(T + past, 1), H, Dh, dtype, seed)
    found = emulated(kernel, q, k, v, Dh**-0.5, seed=seed)
    assert within_the_rule(found, q, k, v, Dh**-0.5)
    again = emulated(kernel, q, k, v, Dh**-0.5, seed=seed + 1, early=True, races=False)  # copies land when they are asked for
    assert torch.equal(found[0], again[0])
    assert torch.equal(found[1], again[1])


@needs_compiler
@each_kernel
@settings(max_examples=12)
@given(T=st.integers(1, 70), past=st.sampled_from([0, 3, 70]), Dh=st.sampled_from(HEAD_DIMS), seed=st.integers(0, 1000))
def test_padding_is_not_seen_and_may_hold_anything(kernel, T, past, Dh, seed):
    """Left, right and both: hidden keys and values are NaN; rows without any key give 0."""
    S = T + past
    (q, k, v), seen = inputs(3, T, S, 1, Dh, torch.float16, seed), some_seen(3, T, S, np.random.default_rng(seed))
    clean = [torch.where(seen.visible[..., None, None], a, 0) for a in (k, v)]
    poisoned = [torch.where(seen.visible[..., None, None], a, math.nan) for a in (k, v)]
    assert within_the_rule(emulated(kernel, q, *poisoned, Dh**-0.5, seen.ranges), q, *clean, Dh**-0.5, seen)


@needs_compiler
@each_kernel
def test_rows_of_different_lengths_packed_end_to_end(kernel):
    """(ΣT, H, Dh), as variable lengths are packed: one tensor, whose rows the ranges name; each equals a call of its own."""
    lengths, Dh = [(40, 40), (1, 90), (129, 130)], 64
    queries, keys = (np.cumsum([0, *(pair[i] for pair in lengths)]) for i in (0, 1))
    q, k, v = (inputs(1, n, n, 2, Dh, torch.bfloat16, seed=i)[0] for i, n in enumerate((queries[-1], keys[-1], keys[-1])))
    ranges = torch.tensor([[queries[b], T, keys[b], S, S - T] for b, (T, S) in enumerate(lengths)], dtype=torch.int32)
    rows = [a.expand(3, -1, -1, -1) for a in (q, k, v)]  # a batch whose rows lie in the same place
    O, L = emulated(kernel, *rows, 0.125, ranges)
    for b in range(len(lengths)):
        here, there = slice(queries[b], queries[b + 1]), slice(keys[b], keys[b + 1])
        alone = emulated(kernel, q[:, here], k[:, there], v[:, there], 0.125)
        assert torch.equal(O[b, here], alone[0][0])
        assert torch.equal(L[b, here], alone[1][0])
        assert torch.isnan(O[b, : queries[b]]).all()  # others are not touched
        assert torch.isnan(O[b, queries[b + 1] :]).all()


@needs_compiler
@each_kernel
def test_slices_of_one_projection_are_read_where_they_lie(kernel):
    qkv = torch.randn(2, 70, 3, 2, 80, generator=torch.Generator().manual_seed(3)).half()
    q, k, v = qkv.unbind(2)
    assert all(aligned(a) is a for a in (q, k, v))
    assert torch.equal(emulated(kernel, q, k, v, 0.11)[0], emulated(kernel, *(a.contiguous() for a in (q, k, v)), 0.11)[0])


def test_what_cp_async_cannot_read_is_copied():
    whole = torch.zeros(2, 9, 2, 72, dtype=torch.float16)
    for a in (whole[..., 4:68], torch.zeros(2 * 9 * 2 * 64 + 1, dtype=torch.float16)[1:].view(2, 9, 2, 64), whole[..., :64].transpose(2, 3)[..., :1]):
        copy = aligned(a)
        assert copy is not a
        assert torch.equal(copy, a)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
    assert aligned(whole[..., 8:]) is not None


@needs_compiler
@each_kernel
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 200.0), (torch.bfloat16, 1e4), (torch.float16, 1e-4)])
def test_huge_and_tiny_scores(kernel, dtype, size):
    """Scores of about 1e6 (one key gets all the weight), 1e10, and nearly equal ones: results are finite, and those of the formula."""
    q, k, v = inputs(1, 90, 90, 1, 64, dtype)
    q, k = q * size, k * size
    O, L = emulated(kernel, q, k, v, 0.125)
    assert torch.isfinite(O).all()
    assert torch.isfinite(L).all()
    exact, _ = plain(q.double(), k.double(), v.double(), 0.125)
    assert (O.double() - exact).abs().max() <= (0.02 if size < 1 else 0.1)


@needs_compiler
@each_kernel
@pytest.mark.parametrize("Dh", HEAD_DIMS)
def test_values_of_one_give_one_and_a_prefix_gives_its_own_bits(kernel, Dh):
    q, k, v = inputs(1, 200, 200, 1, Dh, torch.float16)
    O, _ = emulated(kernel, q, k, torch.ones_like(v), 0.125)
    assert (O - 1).abs().max() <= 2**-10
    whole, part = emulated(kernel, q, k, v, 0.125), emulated(kernel, q[:, :77], k[:, :77], v[:, :77], 0.125)
    assert torch.equal(whole[0][:, :77], part[0])  # what comes later changes no bit
    assert torch.equal(whole[1][:, :77], part[1])


# ---- decoding ----------------------------------------------------------------------------------------------------------------------------


def emulated_decode(q, k, v, scale, ranges=None, splits=1, **how):
    """attention_cpp.mma_decode, on the CPU."""
    (B, T, H, Dh), made = q.shape, MmaDecode(q.shape[-1])
    O, L = torch.full((B, T, H, Dh), math.nan, dtype=q.dtype), torch.full((B, H, T), math.nan)
    parts = torch.full((splits, B, T, H, Dh), math.nan), torch.full((splits, B, H, T), math.nan)
    given = [a.view(torch.int16).numpy() for a in (q, k, v)]
    for array in given:
        array.flags.writeable = False
    found, halves = [O.view(torch.int16).numpy(), L.numpy()], [a.numpy() for a in parts]
    of_splits, of_combine = made.arguments(q, k, v, O, L, *parts, scale, ranges)
    macros = {"DH": Dh, "BF16": int(q.dtype == torch.bfloat16)}
    decode, combine = (compile_for_cpu(nvrtc.KERNELS / "flash_decode_mma.cu", name, macros) for name in ("flash_decode", "flash_combine"))
    where = None if ranges is None else ranges.numpy()
    decode((splits, H, B), made.threads, made.shared, *given, *found, *halves, where, *of_splits[8:], **how)
    if splits > 1:
        combine((T, H, B), Combine(Dh).threads, 0, *halves, *found, *of_combine[4:], **how)
    return O, L.swapaxes(1, 2)


@needs_compiler
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("Dh", HEAD_DIMS)
@pytest.mark.parametrize(("T", "S", "splits"), [(1, 1, 1), (1, 200, 1), (1, 200, 3), (16, 300, 2), (5, 64, 1), (9, 3, 1)])
def test_it_decodes(T, S, splits, Dh, dtype):
    q, k, v = inputs(2, T, S, 2, Dh, dtype)
    assert within_the_rule(emulated_decode(q, k, v, Dh**-0.5, splits=splits), q, k, v, Dh**-0.5)


@needs_compiler
@settings(max_examples=20)
@given(T=st.integers(1, 16), S=st.integers(1, 400), splits=st.integers(1, 7), Dh=st.sampled_from(HEAD_DIMS), dtype=st.sampled_from(HALVES),
       hidden=st.booleans(), seed=st.integers(0, 1000))  # fmt: skip
def test_any_splits_give_the_same(T, S, splits, Dh, dtype, hidden, seed):
    """In any order of warps, copies early and late, with padding that is NaN."""
    S, rng = max(S, T), np.random.default_rng(seed)
    q, k, v = inputs(2, T, S, 1, Dh, dtype, seed)
    seen, poisoned = None, [k, v]
    if hidden:
        seen = some_seen(2, T, S, rng)
        poisoned = [torch.where(seen.visible[..., None, None], a, math.nan) for a in (k, v)]
        k, v = (torch.where(seen.visible[..., None, None], a, 0) for a in (k, v))
    ranges = None if seen is None else seen.ranges
    found = emulated_decode(q, *poisoned, Dh**-0.5, ranges, splits, seed=seed)
    assert within_the_rule(found, q, k, v, Dh**-0.5, seen)
    again = emulated_decode(q, *poisoned, Dh**-0.5, ranges, splits, seed=seed + 1, early=True, races=False)
    assert torch.equal(found[0], again[0])
    assert torch.equal(found[1], again[1])


# ---- backward ----------------------------------------------------------------------------------------------------------------------------


def emulated_bwd(kernel, dO, q, k, v, O, L, scale, ranges=None, **how):
    """attention_cpp.mma_bwd or sm90_bwd, on the CPU."""
    D = (dO.float() * O.float()).sum(-1).swapaxes(1, 2).contiguous()
    L = L.float().swapaxes(1, 2).contiguous()
    dq, dk, dv = found = [torch.full(a.shape, math.nan, dtype=q.dtype) for a in (q, k, k)]
    given = [*(a.view(torch.int16).numpy() for a in (dO, q, k, v)), L.numpy(), D.numpy()]
    for array in given:
        array.flags.writeable = False
    results, launches = [a.view(torch.int16).numpy() for a in found], launches_of_mma_bwd if kernel is MmaBwd else launches_of_sm90_bwd
    for file, name, blocks, made, arguments in launches(kernel(q.shape[-1]), given, results, (dO, q, k, v, L, D, dq, dk, dv), scale, ranges):
        run = compile_for_cpu(nvrtc.KERNELS / file, name, {"DH": q.shape[-1], "BF16": int(q.dtype == torch.bfloat16)})
        run((blocks, q.shape[2], len(q)), made.threads, made.shared, *arguments, **how)
    return dq, dk, dv


def launches_of_mma_bwd(made, given, results, tensors, scale, ranges):
    """As mma_bwd launches its kernels, with arrays for pointers."""
    T, S, where = tensors[1].shape[1], tensors[2].shape[1], None if ranges is None else ranges.numpy()
    of_keys, of_queries = made.arguments(*tensors, scale, ranges)
    yield "flash_bwd_mma.cu", "flash_bwd_keys", -(-S // made.own), made, [*given, *results[1:], where, *of_keys[9:]]
    yield "flash_bwd_mma.cu", "flash_bwd_queries", -(-T // made.own), made, [*given, results[0], where, *of_queries[8:]]


def launches_of_sm90_bwd(made, given, results, tensors, scale, ranges):
    """As sm90_bwd launches its kernels, with the emulator's tensor maps."""
    _, q, k, *_, dq, dk, _ = tensors
    where, (T, S, scale_) = None if ranges is None else ranges.numpy(), sizes(q, k, scale)
    maps = [tensor_map(array, (64, 1, rows, 1)) for array, rows in zip(given[:4], (made.Br, made.Br, made.Bc, made.Bc), strict=True)]
    sums = np.zeros((len(q), q.shape[2], *made.tiles(int(T))), np.float32)
    of_keys = [*maps, *given[4:], sums, *results[1:], where, T, S, scale_, *strides(dk)]
    yield "flash_bwd_sm90.cu", "flash_bwd_sm90", -(-int(S) // made.Bc), made, of_keys
    yield "flash_bwd_sm90.cu", "flash_bwd_sm90_queries", sums.shape[2], Round(), [sums, results[0], where, T, scale_, *strides(dq)]


def gradients_within_the_rule(found, dO, q, k, v, scale, seen=None):
    """FlashAttention's: three times the error of the formula in the low precision."""
    exact = plain_bwd(*(a.double() for a in (dO, q, k, v)), *plain(q.double(), k.double(), v.double(), scale, seen), scale, seen)
    P, dP = (attention_cuda.scores(a.double(), b.double(), c, seen) for a, b, c in ((q, k, scale), (dO, v, 1.0)))
    P = attention_cuda.probabilities(P).to(q.dtype).double()
    dP = torch.where(P > 0, dP, 0).to(q.dtype).double()
    dscores = (P * (dP - (P * dP).sum(-1, keepdim=True))).to(q.dtype).double() * scale
    q_, k_, dO_ = (a.double().swapaxes(1, 2) for a in (q, k, dO))
    low = [a.swapaxes(1, 2).to(q.dtype).double() for a in (dscores @ k_, dscores.swapaxes(2, 3) @ q_, P.swapaxes(2, 3) @ dO_)]
    for ours, theirs, true in zip(found, low, exact, strict=True):
        assert torch.isfinite(ours).all()
        assert (ours.double() - true).abs().max() <= 3 * (theirs - true).abs().max() + 1e-3 * float(true.abs().max()) + 1e-5
    return True


@needs_compiler
@each_backward
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("Dh", HEAD_DIMS)
@pytest.mark.parametrize(("T", "S"), [(1, 1), (64, 64), (70, 132), (100, 180), (150, 40)])
def test_it_computes_the_gradients(kernel, T, S, Dh, dtype):
    (q, k, v), dO = inputs(1, T, S, 2, Dh, dtype), inputs(1, T, 1, 2, Dh, dtype, seed=5)[0]
    found = emulated_bwd(kernel, dO, q, k, v, *plain(q, k, v, Dh**-0.5), Dh**-0.5)
    assert gradients_within_the_rule(found, dO, q, k, v, Dh**-0.5)


@needs_compiler
@each_backward
@pytest.mark.parametrize("Dh", HEAD_DIMS)
def test_places_for_tiles_of_queries_are_filled_again_and_again(kernel, Dh):
    """Six tiles of queries over 100 keys: one block of them, so that dq too has the same bits in each order."""
    T = 700 if Dh == 64 else 350
    visible = np.arange(T)[None] < 100
    seen = attention_cuda.Seen(torch.tensor(visible), torch.tensor(ranges_of(visible, T)))
    (q, k, v), dO = inputs(1, T, T, 1, Dh, torch.float16), inputs(1, T, 1, 1, Dh, torch.float16, seed=1)[0]
    O, L = plain(q, k, v, Dh**-0.5, seen)
    first = dq, dk, dv = emulated_bwd(kernel, dO, q, k, v, O, L, Dh**-0.5, seen.ranges, early=True, races=False)
    shown = seen.visible[..., None, None]
    assert gradients_within_the_rule((dq, *(torch.where(shown, a, 0) for a in (dk, dv))), dO, q, k, v, Dh**-0.5, seen)
    for seed in range(6):
        again = emulated_bwd(kernel, dO, q, k, v, O, L, Dh**-0.5, seen.ranges, seed=seed)
        assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(again, first, strict=True))


@needs_compiler
@each_backward
@settings(max_examples=12)
@given(T=st.integers(1, 100), past=st.integers(-20, 100), Dh=st.sampled_from(HEAD_DIMS), dtype=st.sampled_from(HALVES), seed=st.integers(0, 1000))
def test_gradients_of_any_shape_in_any_order_of_warps(kernel, T, past, Dh, dtype, seed):
    """At most two blocks of sm90's add to a dq, and a + b = b + a."""
    S = max(T + past, 1)
    (q, k, v), dO = inputs(1, T, S, 1, Dh, dtype, seed), inputs(1, T, 1, 1, Dh, dtype, seed + 1)[0]
    O, L = plain(q, k, v, Dh**-0.5)
    found = emulated_bwd(kernel, dO, q, k, v, O, L, Dh**-0.5, seed=seed)
    assert gradients_within_the_rule(found, dO, q, k, v, Dh**-0.5)
    again = emulated_bwd(kernel, dO, q, k, v, O, L, Dh**-0.5, seed=seed + 1, early=True, races=False)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@needs_compiler
@each_backward
@settings(max_examples=8)
@given(T=st.integers(1, 70), past=st.sampled_from([0, 3, 70]), Dh=st.sampled_from(HEAD_DIMS), seed=st.integers(0, 1000))
def test_hidden_keys_have_no_gradient_and_give_none(kernel, T, past, Dh, seed):
    S = T + past
    (q, k, v), dO = inputs(2, T, S, 1, Dh, torch.float16, seed), inputs(2, T, 1, 1, Dh, torch.float16, seed + 1)[0]
    seen = some_seen(2, T, S, np.random.default_rng(seed))
    shown = seen.visible[..., None, None]
    clean = [torch.where(shown, a, 0) for a in (k, v)]
    O, L = plain(q, *clean, Dh**-0.5, seen)
    dq, dk, dv = emulated_bwd(kernel, dO, q, *(torch.where(shown, a, math.nan) for a in (k, v)), O, L, Dh**-0.5, seen.ranges)
    assert all(torch.isnan(a[~seen.visible]).all() for a in (dk, dv))  # not touched: mma_bwd begins with zeros
    assert gradients_within_the_rule((dq, *(torch.where(shown, a, 0) for a in (dk, dv))), dO, q, *clean, Dh**-0.5, seen)


@needs_compiler
@each_backward
@pytest.mark.parametrize("Dh", HEAD_DIMS)
def test_gradients_of_rows_packed_end_to_end(kernel, Dh):
    """Each row's gradients equal those of a separate call; memory between the rows is NaN, and its gradients are not written."""
    lengths, gap = [(40, 40), (1, 90), (129, 160)], 3
    queries, keys = (np.cumsum([0, *(pair[i] + gap for pair in lengths)]) for i in (0, 1))
    ranges = torch.tensor([[queries[b], T, keys[b], S, S - T] for b, (T, S) in enumerate(lengths)], dtype=torch.int32)
    q, k, v, dO, O = (torch.full((1, n[-1], 2, Dh), math.nan, dtype=torch.bfloat16) for n in (queries, keys, keys, queries, queries))
    L, alone = torch.full((1, queries[-1], 2), math.nan), []
    for b, (T, S) in enumerate(lengths):
        here, there = slice(queries[b], queries[b] + T), slice(keys[b], keys[b] + S)
        q[:, here], k[:, there], v[:, there] = inputs(1, T, S, 2, Dh, torch.bfloat16, seed=b)
        dO[:, here] = inputs(1, T, 1, 2, Dh, torch.bfloat16, seed=b + 9)[0]
        O[:, here], L[:, here] = plain(q[:, here], k[:, there], v[:, there], 0.125)
        own = [a[:, part].clone() for a, part in ((dO, here), (q, here), (k, there), (v, there), (O, here), (L, here))]
        alone.append((here, there, emulated_bwd(kernel, *own, 0.125)))
    found = emulated_bwd(kernel, *(a.expand(3, -1, -1, -1) for a in (dO, q, k, v, O)), L.expand(3, -1, -1), 0.125, ranges)
    for b, (here, there, expected) in enumerate(alone):
        for a, part, own in zip(found, (here, there, there), expected, strict=True):
            assert torch.equal(a[b, part], own[0])
            assert torch.isnan(a[b, : part.start]).all()
            assert torch.isnan(a[b, part.stop :]).all()


@needs_compiler
@each_backward
def test_gradients_where_all_scores_are_low_and_keys_end_early(kernel):
    """exp(0 - L) of a key past the end would be infinite; the last queries' tiles are off the diagonal."""
    q, k, v = inputs(1, 200, 200, 1, 64, torch.float16)
    q, k, dO = q.abs() + 1, -k.abs() - 8, v.clone()  # scores of about -1800
    visible = np.arange(200)[None] < 20
    seen = attention_cuda.Seen(torch.tensor(visible), torch.tensor(ranges_of(visible, 200)))
    found = emulated_bwd(kernel, dO, q, k, v, *plain(q, k, v, 1.0, seen), 1.0, seen.ranges)
    assert torch.isfinite(found[0]).all()
    assert all(torch.isfinite(a[:, :20]).all() for a in found[1:])


# ---- for the GPU -------------------------------------------------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("bf16", [0, 1])
@pytest.mark.parametrize("Dh", HEAD_DIMS)
@pytest.mark.parametrize(("file", "kernels", "arch"), [
    *(("flash_fwd_mma.cu", 1, arch) for arch in TARGETS), *(("flash_bwd_mma.cu", 2, arch) for arch in TARGETS),
    *(("flash_decode_mma.cu", 2, arch) for arch in TARGETS), ("flash_fwd_sm90.cu", 1, "sm_90a"), ("flash_bwd_sm90.cu", 2, "sm_90a"),
])  # fmt: skip
def test_it_compiles_without_spills(file, kernels, arch, Dh, bf16):
    """ptxas's messages C75… report wgmma that it serialises instead of running asynchronously."""
    code, said = nvrtc.compile(file, arch, DH=Dh, BF16=bf16, **(STEPS(Dh).macros if bf16 and "fwd_sm90" in file else {}))
    assert code[:4] == b"\x7fELF"
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == kernels
    assert "warning" not in said.lower()
    assert "C75" not in said


@needs_nvrtc
def test_machine_code_is_kept_by_what_it_depends_on(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = nvrtc.cubin("flash_fwd_mma.cu", "sm_90", DH=64, BF16=0)
    monkeypatch.setattr(nvrtc, "compile", lambda *_, **__: pytest.fail("compiled again"))
    assert nvrtc.cubin("flash_fwd_mma.cu", "sm_90", DH=64, BF16=0) == first
    keys = {nvrtc.key("flash_fwd_mma.cu", arch, {"DH": Dh, "BF16": bf16}) for arch in TARGETS for Dh in HEAD_DIMS for bf16 in (0, 1)}
    assert len(keys) == len(TARGETS) * len(HEAD_DIMS) * 2
    monkeypatch.setattr(nvrtc, "KERNELS", tmp_path / "kernels")
    (tmp_path / "kernels").mkdir()
    for text in ("one", "two"):
        (tmp_path / "kernels" / "a.cu").write_text("source")
        (tmp_path / "kernels" / "a.cuh").write_text(text)
        keys.add(nvrtc.key("a.cu", "sm_90", {}))
    assert len(keys) == len(TARGETS) * len(HEAD_DIMS) * 2 + 2


@needs_nvrtc
def test_a_home_that_cannot_be_written_to_costs_a_compilation(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert nvrtc.cubin("flash_fwd_mma.cu", "sm_80", DH=64, BF16=0)[:4] == b"\x7fELF"


@needs_nvrtc
def test_an_error_in_the_source_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(nvrtc, "KERNELS", tmp_path)
    (tmp_path / "wrong.cu").write_text("__global__ void f() { nonsense }")
    with pytest.raises(RuntimeError, match=r'wrong.cu\(1\): error: identifier "nonsense" is undefined'):
        nvrtc.compile("wrong.cu", "sm_90")


def test_a_rung_says_why_it_refuses():
    refusal = attention_cuda.RUNGS["mma"].refuses(torch.zeros(1, 1, 1, 64, dtype=torch.float16))
    assert refusal == "it computes on a GPU, and these tensors are on cpu"
    fake = SimpleNamespace(is_cuda=True, dtype=torch.float32, shape=(1, 1, 1, 64), device="cuda")
    assert attention_cuda.RUNGS["mma"].refuses(fake) == "it computes in float16 and bfloat16, and these tensors are torch.float32"
    fake.dtype, fake.shape = torch.float16, (1, 1, 1, 96)
    assert attention_cuda.RUNGS["mma"].refuses(fake) == "it takes heads of 64, 80, 128, and these are of 96"


# ---- on a GPU ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("Dh", [*HEAD_DIMS, 40])
@pytest.mark.parametrize(("T", "S"), [(1, 700), (97, 128), *large((1, 1), (16, 300), (128, 97), (257, 1023), (1024, 1024), (2048, 2048))])
def test_the_gpu_computes_attention(T, S, Dh, dtype):
    q, k, v = (a.cuda() for a in inputs(2, T, S, 3, Dh, dtype))
    assert within_the_rule(attention_cuda.attention_lse(q, k, v, Dh**-0.5), q, k, v, Dh**-0.5)


@pytest.mark.parametrize("backward", [mma_bwd, sm90_bwd])
@pytest.mark.parametrize(("T", "S"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys_have_gradients_of_zero(backward, T, S):
    q, k, v = inputs(2, T, S, 3, 64, torch.float16)
    with mock.patch.object(torch, "empty", lambda shape, **kind: torch.full(shape, math.nan, **kind)):
        found = backward(q, q, k, v, q, torch.empty((2, T, 3), dtype=torch.float32), 0.125)
    for gradient, a in zip(found, (q, k, v), strict=True):
        assert gradient.shape == a.shape
        assert not gradient.any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["attention_lse", "mma", "sm90", "mma_bwd", "sm90_bwd"])
def test_a_thread_whose_first_work_is_a_kernel(name):
    """A new thread has no CUDA context, which a launch needs, and so do the tensor maps of sm90."""
    q, k, v = (a.cuda() for a in inputs(1, 9, 30, 2, 64, torch.float16))
    if "sm90" in name and (reason := attention_cuda.RUNGS["sm90"].refuses(q)):
        pytest.skip(reason)

    def work():
        if name.endswith("bwd"):
            return getattr(attention_cpp, name)(q, q, k, v, O, L, 0.125)[1]
        return getattr(attention_cuda if name == "attention_lse" else attention_cpp, name)(q, k, v, 0.125)[0]

    O, L = attention_cuda.attention_lse(q, k, v, 0.125)
    found: list = []
    thread = threading.Thread(target=lambda: found.append(work()))  # first, for tensor maps are kept
    thread.start()
    thread.join()
    assert torch.equal(found[0], work())


@pytest.mark.gpu
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("T", [1, 150, *large((500,))])
def test_the_gpu_sees_no_padding(T, dtype, holes):
    rng = np.random.default_rng(T)
    visible = (
        rng.random((4, 500)) > 0.5
        if holes
        else np.array([(np.arange(500) >= a) & (np.arange(500) < b) for a, b in ((0, 500), (9, 500), (0, 400), (450, 460))])
    )
    q, k, v = (a.cuda() for a in inputs(4, T, 500, 2, 64, dtype))
    hidden = torch.tensor(~visible, device="cuda")[..., None, None]
    found = attention_cuda.attention_lse(q, k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.nan), 0.125, SimpleNamespace(visible=visible))
    seen = attention_cuda.on_device(visible, T, q.device)
    assert within_the_rule(found, q, k.masked_fill(hidden, 0), v.masked_fill(hidden, 0), 0.125, seen)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("Dh", HEAD_DIMS)
@pytest.mark.parametrize("S", [97, *large((1,), (512,), (1023,), (2048,))])
@pytest.mark.parametrize("name", attention_cuda.RUNGS)
def test_every_rung_computes_attention(name, S, Dh, dtype):
    rung = attention_cuda.RUNGS[name]
    q, k, v = (a.cuda() for a in inputs(2, S, S, 3, Dh, dtype))
    if reason := rung.refuses(q):
        pytest.skip(reason)
    assert within_the_rule(rung(q, k, v, Dh**-0.5), q, k, v, Dh**-0.5)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("Dh", HEAD_DIMS)
@pytest.mark.parametrize("name", ["mma", "sm90"])
def test_the_gpu_gives_the_same_bits_a_thousand_times(name, Dh):
    rung = attention_cuda.RUNGS[name]
    q, k, v = (a.cuda() for a in inputs(6, 700, 700, 4, Dh, torch.float16))
    if reason := rung.refuses(q):
        pytest.skip(reason)
    O, L = rung(q, k, v, 0.125)
    for _ in range(1000):
        again = rung(q, k, v, 0.125)
        assert torch.equal(again[0], O)
        assert torch.equal(again[1], L)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("Dh", HEAD_DIMS)
@pytest.mark.parametrize(("T", "S"), [(97, 128), *large((257, 257), (640, 640))])
def test_the_gpus_gradients(T, S, Dh, dtype):
    """An error of at most three times that of autograd through the plain formula in the low precision."""
    q, k, v = (a.cuda() for a in inputs(2, T, S, 2, Dh, dtype))
    dO = inputs(2, T, 1, 2, Dh, dtype, seed=9)[0].cuda()

    def gradients(attention, kind):
        leaves = [a.to(kind, copy=True).requires_grad_() for a in (q, k, v)]
        attention(*leaves).backward(dO.to(kind))
        return [leaf.grad.double() for leaf in leaves]

    def formula(q, k, v):
        s = ((q * Dh**-0.5).transpose(1, 2) @ k.permute(0, 2, 3, 1)).masked_fill(
            torch.ones(T, S, dtype=torch.bool, device="cuda").triu(S - T + 1), -math.inf
        )
        return (s.softmax(-1).to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)

    exact, low = gradients(formula, torch.float64), gradients(formula, dtype)
    ours = gradients(lambda *qkv: attention_cuda.attention_lse(*qkv, Dh**-0.5)[0], dtype)
    for a, b, c in zip(ours, low, exact, strict=True):
        assert (a - c).abs().max() <= 3 * (b - c).abs().max() + 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("Dh", HEAD_DIMS)
@pytest.mark.parametrize(("T", "S"), [(97, 128), *large((1, 1), (257, 257), (300, 100), (640, 1023), (2048, 2048))])
@pytest.mark.parametrize("name", ["mma", "sm90"])
def test_both_backward_kernels(name, T, S, Dh, dtype):
    q, k, v = (a.cuda() for a in inputs(2, T, S, 3, Dh, dtype))
    dO = inputs(2, T, 1, 3, Dh, dtype, seed=9)[0].cuda()
    if reason := attention_cuda.RUNGS[name].refuses(q):
        pytest.skip(reason)
    found = {"mma": mma_bwd, "sm90": sm90_bwd}[name](dO, q, k, v, *plain(q, k, v, Dh**-0.5), Dh**-0.5)
    assert gradients_within_the_rule(found, dO, q, k, v, Dh**-0.5)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("Dh", HEAD_DIMS)
def test_hoppers_gradients_see_no_padding_and_repeat(Dh):
    """Hidden keys are NaN. dk and dv have the same bits each time, dq up to the order of its sums; with `deterministic`, all have."""
    visible = np.array([(np.arange(500) >= a) & (np.arange(500) < b) for a, b in ((0, 500), (9, 500), (0, 400), (450, 460))])
    q, k, v = (a.cuda() for a in inputs(4, 500, 500, 3, Dh, torch.float16))
    dO = inputs(4, 500, 1, 3, Dh, torch.float16, seed=9)[0].cuda()
    if reason := attention_cuda.RUNGS["sm90"].refuses(q):
        pytest.skip(reason)
    seen = attention_cuda.on_device(visible, 500, q.device)
    shown = seen.visible[..., None, None]
    clean, poisoned = ([torch.where(shown, a, other) for a in (k, v)] for other in (0, math.nan))
    given = dO, q, *poisoned, *plain(q, *clean, Dh**-0.5, seen), Dh**-0.5, seen.ranges
    first, same = sm90_bwd(*given), sm90_bwd(*given, deterministic=True)
    assert gradients_within_the_rule(first, dO, q, *clean, Dh**-0.5, seen)
    for _ in range(200):
        again = sm90_bwd(*given)
        assert all(torch.equal(a, b) for a, b in zip(again[1:], first[1:], strict=True))
        assert (again[0] - first[0]).abs().max() <= 2e-3 * first[0].abs().max()
        assert all(torch.equal(a, b) for a, b in zip(sm90_bwd(*given, deterministic=True), same, strict=True))
