"""backend="cpu": every operation against opt_np.ops, whole models against HF, and the promise that a row's bits depend on nothing else."""

import copy
import inspect
import os
import pickle
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import ml_dtypes
import numba
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.dispatcher import Dispatcher
from reference import PADDINGS, VARIANTS, batch, build, worst

from opt_fast import (
    attention_bf16,
    attention_cpu,
    attention_parts,
    gemm,
    gemm_amx,
    gemm_amx_int4,
    gemm_int,
    gemm_parts,
    kernel,
    ops_cpu,
    program_cpu,
    rowwise,
    train_cpu,
)
from opt_fast.gemm import Packed
from opt_fast.kernel import Kernel
from opt_np import OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification, classes, flash, grad, model, ops, optim
from opt_np.kv_cache import KVCache
from opt_np.quantize import quantized
from opt_np.train import Options, train
from opt_np.tree import flatten

CONTRACT = ("description", "pack", "embed", "linear", "matmul", "layer_norm", "activation", "mlp",
            "attention", "attention_lse", "attention_probs", "attention_bwd", "layer_norm_bwd", "activation_bwd", "cross_entropy")  # fmt: skip
EPS = np.finfo(np.float32).eps


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def wide(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def close(ours, exact, size=16.0):
    """Within so many roundings of the largest number."""
    assert ours.dtype == np.float32
    assert np.isfinite(ours).all()
    assert np.abs(ours - exact).max(initial=0) <= size * EPS * max(np.abs(exact).max(initial=0), 1)
    return True


# ---- each operation ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTRACT)
def test_the_contract_is_the_same(name):
    assert list(inspect.signature(getattr(ops_cpu, name)).parameters) == list(inspect.signature(getattr(ops, name)).parameters)


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@given(N=shapes, I=st.integers(1, 70), O=st.integers(1, 70), bias=st.booleans(), packed=st.booleans())
def test_linear(N, I, O, bias, packed):
    x, weight, b = numbers(*N, I), numbers(O, I, seed=1), numbers(O, seed=2) if bias else None
    ours = ops_cpu.linear(x, ops_cpu.pack({"weight": weight})["weight"] if packed else weight, b)
    assert close(ours, ops.linear(*wide(x, weight), None if b is None else b.astype(float)), 8)


@given(N=shapes, D=st.integers(1, 100), affine=st.booleans(), offset=st.sampled_from([0.0, 3.0, 100.0]))
def test_layer_norm(N, D, affine, offset):
    x, p = numbers(*N, D) + np.float32(offset), (numbers(D, seed=1), numbers(D, seed=2)) if affine else ()
    exact = ops.layer_norm(*wide(x, *p))
    numpys = np.abs(ops.layer_norm(x, *p) - exact).max()  # x - mean cancels what x and mean have in common
    assert close(ops_cpu.layer_norm(x, *p), exact, 16 + 4 * numpys / EPS)


@given(N=shapes, D=st.integers(1, 100), affine=st.booleans(), many=st.booleans())
def test_the_backward_of_layer_norm(N, D, affine, many):
    N = [*N, 700] if many else N  # rows for several tasks, where D is large
    x, dy, weight = numbers(*N, D), numbers(*N, D, seed=1), numbers(D, seed=2) if affine else None
    x[..., 0] += 9  # one number alone has no variance, and nor have two alike
    exact = ops.layer_norm_bwd(*wide(dy, x), None if weight is None else weight.astype(float))
    numpys = ops.layer_norm_bwd(dy, x, weight)
    for ours, plain, truth in zip(ops_cpu.layer_norm_bwd(dy, x, weight), numpys, exact, strict=True):
        assert close(ours, truth, 32 + 4 * np.abs(plain - truth).max() / (EPS * max(np.abs(truth).max(), 1)))


@given(N=shapes, function=st.sampled_from(["relu", "gelu", "gelu_new"]))
def test_the_backward_of_the_activation(N, function):
    x, dy = numbers(*N, 9), numbers(*N, 9, seed=1)
    x.flat[0] = 0
    assert close(ops_cpu.activation_bwd(dy, x, function), ops.activation_bwd(*wide(dy, x), function))


@given(N=st.integers(1, 9), V=st.one_of(st.integers(1, 70), st.sampled_from([4096, 5000, 9001])), size=st.sampled_from([1.0, 30.0, 1e4]))
def test_the_loss_and_its_gradient(N, V, size):
    logits, labels = numbers(N, V) * np.float32(size), np.random.default_rng(N).integers(0, V, N)
    loss, exact = ops.cross_entropy(logits.astype(float), labels)
    ours, dlogits = ops_cpu.cross_entropy(logits, labels)
    assert dlogits is logits
    assert abs(ours - loss) <= 64 * EPS * max(loss, N * size)
    assert close(dlogits, exact, 16 + 4 * size)


def test_the_loss_of_logits_that_lie_apart_and_of_labels_that_are_none():
    logits = numbers(3, 80)
    loss, exact = ops.cross_entropy(logits[:, ::2].astype(float), np.array([1, 2, 3]))
    ours, dlogits = ops_cpu.cross_entropy(logits[:, ::2], np.array([1, 2, 3]))
    assert abs(ours - loss) <= 64 * EPS * loss
    assert close(dlogits, exact)
    with pytest.raises(IndexError, match="labels are 1 to 80; 80 logits have 0 to 79"):
        ops_cpu.cross_entropy(logits, np.array([1, 80, 3]))


def test_a_loss_that_is_no_number_says_so():
    logits = numbers(3, 40)
    logits[1, 7] = np.nan
    loss, dlogits = ops_cpu.cross_entropy(logits, np.array([1, 2, 3]))
    assert np.isnan(loss)
    assert np.isnan(dlogits[1]).all()
    assert np.isfinite(dlogits[[0, 2]]).all()


@given(sizes=st.lists(st.one_of(st.integers(1, 50), st.sampled_from([16384, 40000])), min_size=1, max_size=3), decay=st.sampled_from([0.0, 0.1]),
       dtype=st.sampled_from(["float32", "float64"]))  # fmt: skip
def test_the_optimiser_takes_the_steps_of_the_plain_one(sizes, decay, dtype):
    tree = {f"{i}.weight": numbers(size, 2, seed=i).astype(dtype) for i, size in enumerate(sizes)}
    ours, theirs = ({name: a.copy() for name, a in tree.items()} for _ in range(2))
    states = [optim.adamw_init(ours), optim.adamw_init(theirs)]
    for step in range(3):
        grads = [{name: numbers(*a.shape, seed=9 + step).astype(dtype) for name, a in tree.items()} for _ in range(2)]
        norms = ops_cpu.clip_by_global_norm(grads[0], 1.0), optim.clip_by_global_norm(grads[1], 1.0)
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        ops_cpu.adamw_step(ours, grads[1], states[0], 1e-2, weight_decay=decay)
        optim.adamw_step(theirs, grads[1], states[1], 1e-2, weight_decay=decay)
    for name in tree:
        np.testing.assert_array_equal(ours[name], theirs[name])
        np.testing.assert_array_equal(flatten(states[0]["v"])[name], flatten(states[1]["v"])[name])


@pytest.mark.parametrize("V", [1, 15, 16, 17, 50, 307])
def test_the_best_score_is_the_first_of_equal_ones_and_an_end_is_said(V):
    rng = np.random.default_rng(V)
    for N in (1, 5):
        scores, best, state = rng.integers(-3, 3, (N, V)).astype(np.float32), np.empty(N, np.int64), np.zeros(2, np.int64)
        scores[0] = -np.inf
        for ends in ([], [V], [V, 0]):
            rowwise.PICK(scores, best, N, V, np.array(ends, np.int64), len(ends), state, tasks=N)
            np.testing.assert_array_equal(best, scores.argmax(-1))
            assert state.tolist() == [0 in ends, 0]


@given(N=shapes, function=st.sampled_from(["relu", "gelu", "gelu_new"]), size=st.sampled_from([1e-3, 1.0, 30.0]))
def test_activation_and_mlp(N, function, size):
    x, fc1, fc2 = numbers(*N, 9) * np.float32(size), {"weight": numbers(21, 9), "bias": numbers(21)}, {"weight": numbers(9, 21), "bias": numbers(9)}
    assert close(ops_cpu.activation(x, function), ops.activation(x.astype(float), function), 4 * size)
    exact = ops.mlp(x.astype(float), *({k: v.astype(float) for k, v in p.items()} for p in (fc1, fc2)), function)
    assert close(ops_cpu.mlp(x, fc1, fc2, function), exact, 16)


def test_nan_is_not_lost():
    x = np.array([[np.nan, 1.0, -1.0]], np.float32)
    for function in ("relu", "gelu", "gelu_new"):
        assert np.isnan(ops_cpu.activation(x, function)[0, 0])
    assert np.isnan(ops_cpu.layer_norm(x)).all()
    q = numbers(1, 3, 1, 8)
    broken = q.copy()
    broken[0, 1] = np.nan
    assert np.isnan(ops_cpu.attention(broken, q, q, 1.0)[0, 1]).all()
    assert np.isnan(ops_cpu.attention(q, broken, q, 1.0)[0, 1:]).all()


KEYS = (attention_parts if attention_parts.IN_FLOAT32 is attention_parts.IN_PARTS else attention_cpu).BC  # of a tile


@st.composite
def attention_problem(draw):
    """Lengths around a tile of keys and a group of queries, head sizes around a panel, any mask."""
    B, H = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    Dh = draw(st.sampled_from([1, 7, 8, 16, 64, 80]))
    T = draw(st.sampled_from([1, 2, 5, 6, 7, KEYS - 1, KEYS + 1, 2 * KEYS + 9]))
    S = T + draw(st.sampled_from([0, 1, 3, 64, KEYS, KEYS + 5]))
    size = np.float32(draw(st.sampled_from([1e-3, 1.0, 6.0])))
    q, k, v, dO = numbers(B, T, H, Dh, seed=1) * size, numbers(B, S, H, Dh, seed=2) * size, numbers(B, S, H, Dh, seed=3), numbers(B, T, H, Dh, seed=4)
    rng, mask = np.random.default_rng(draw(st.integers(0, 99))), draw(st.sampled_from([None, "left", "right", "both", "random", "none visible"]))
    visible = None if mask is None else np.ones((B, S), bool)
    for b in range(B if mask else 0):
        first, last = rng.integers(0, S, 2)
        place = np.arange(S)
        visible[b] = {"left": place >= first, "right": place <= last, "both": (place >= first // 2) & (place <= (S + last) // 2),
                      "random": rng.random(S) < 0.5, "none visible": np.zeros(S, bool)}[mask]  # fmt: skip
    return q, k, v, dO, SimpleNamespace(visible=visible)


@given(problem=attention_problem())
def test_attention_and_its_gradients(problem):
    q, k, v, dO, layout = problem
    scale = q.shape[-1] ** -0.5
    O, L = ops_cpu.attention_lse(q, k, v, scale, layout)
    exact, lse = ops.attention_lse(*wide(q, k, v), scale, layout)
    numpys = ops.attention(q, k, v, scale, layout)
    np.testing.assert_array_equal(O, ops_cpu.attention(q, k, v, scale, layout))
    assert np.abs(O - exact).max() <= 2 * np.abs(numpys - exact).max() + 4 * EPS
    assert not O[-np.inf == L].any()
    np.testing.assert_allclose(L[-np.inf != L], lse[-np.inf != L], rtol=1e-5, atol=1e-5)
    plain = ops.attention_bwd(dO, q, k, v, *ops.attention_lse(q, k, v, scale, layout), scale, layout)
    expected = ops.attention_bwd(*wide(dO, q, k, v), exact, lse, scale, layout)
    for ours, numpys, exact_grad in zip(ops_cpu.attention_bwd(dO, q, k, v, O, L, scale, layout), plain, expected, strict=True):
        assert ours.dtype == np.float32
        assert np.abs(ours - exact_grad).max() <= 3 * np.abs(numpys - exact_grad).max() + 16 * EPS * max(np.abs(exact_grad).max(), 1)


@pytest.mark.parametrize("Dh", [4, 16, 48, 64, 80, 128, 144, 272])
@pytest.mark.parametrize("S", [1, 63, 64, 65, 191, 193, 257, 400])
def test_a_query_alone_has_the_bits_that_it_has_in_a_prompt(Dh, S):
    """Alone it reads keys where they stand, several vectors at a time; with others it reads them packed."""
    q, k, v = (numbers(1, S, 2, Dh, seed=seed) for seed in (1, 2, 3))
    (O, L), alone = ops_cpu.attention_lse(q, k, v, Dh**-0.5), ops_cpu.attention_lse(q[:, -1:], k, v, Dh**-0.5)
    np.testing.assert_array_equal(alone[0][:, 0], O[:, -1])
    np.testing.assert_array_equal(alone[1][:, 0], L[:, -1])


@given(problem=attention_problem(), data=st.data())
def test_the_weights_that_attention_used(problem, data):
    q, k, _, _, layout = problem
    T, scale = q.shape[1], q.shape[-1] ** -0.5
    rows = data.draw(st.none() | st.lists(st.integers(-T, T - 1), min_size=1, max_size=8))
    chosen = slice(None) if rows is None else rows
    P = ops_cpu.attention_probs(q, k, scale, layout, rows)
    assert close(P, ops.attention_probs(*wide(q, k), scale, layout)[:, :, chosen], 128)
    assert np.array_equal(P, ops_cpu.attention_probs(q, k, scale, layout)[:, :, chosen])
    assert np.isclose(P.sum(-1), 1, atol=1e-5).all() or layout.visible is not None


def test_attention_is_the_tiled_algorithm_of_flash():
    q, k, v = numbers(1, 70, 2, 16), numbers(1, 300, 2, 16), numbers(1, 300, 2, 16, seed=1)
    O, L = ops_cpu.attention_lse(q, k, v, 0.25)
    for h in range(2):
        O_, L_ = flash.attention(*(a[0, :, h].astype(float) for a in (q, k, v)), 0.25)
        assert close(O[0, :, h], O_)
        assert close(L[0, :, h], L_)


def test_equal_scores_of_any_size_give_equal_weights():
    for value in (-200.0, 200.0, -6e4, 1e30):
        q, k = np.full((1, 1, 1, 1), value, np.float32), np.ones((1, 4, 1, 1), np.float32)
        np.testing.assert_array_equal(ops_cpu.attention_probs(q, k, 1.0), np.full((1, 1, 1, 4), 0.25, np.float32))
        assert ops_cpu.attention(q, k, np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1), 1.0) == 1.5


def test_memory_does_not_grow_with_the_square():
    """What a thread holds for T queries, in multiples of T: the backward pass of 4096 tokens would need 64 MiB for its scores alone."""
    q = numbers(1, 4096, 1, 4)
    O, L = ops_cpu.attention_lse(q, q, q, 0.5)
    ops_cpu.attention_bwd(q, q, q, q, O, L, 0.5)
    from opt_fast.kernel import _local

    assert _local.memory.nbytes < numba.get_num_threads() * 8 * 2**20


def test_what_stands_in_the_future_does_not_matter():
    """Not even NaN, to queries of other groups; a key's own group may share its value's NaN, as NumPy's block of queries does."""
    q, k, v = numbers(1, 40, 1, 8), numbers(1, 40, 1, 8, seed=1), numbers(1, 40, 1, 8, seed=2)
    before = ops_cpu.attention(q, k, v, 0.5)
    k[0, 39], v[0, 39] = np.nan, np.inf
    after = ops_cpu.attention(q, k, v, 0.5)
    np.testing.assert_array_equal(after[0, :36], before[0, :36])
    assert np.isnan(after[0, 39]).all()
    assert np.isfinite(ops_cpu.attention_probs(q, k, 0.5)[0, 0, :39]).all()


def test_a_nan_of_any_bits_stays_nan():
    q = np.ones((1, 1, 1, 1), np.float32)
    for bits in (0x7FC00000, 0x7FC00001, 0x7F800001, 0xFFC00123):
        k = np.array([bits], np.uint32).view(np.float32).reshape(1, 1, 1, 1)
        assert np.isnan(ops_cpu.attention(q, np.concatenate([k, q], axis=1), np.concatenate([q, q], axis=1), 1.0)).all()


@pytest.mark.parametrize(
    "shapes", [((2, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)), ((1, 4, 2, 8), (1, 4, 2, 8), (1, 3, 2, 8)), ((1, 5, 2, 8),) + ((1, 4, 2, 8),) * 2]
)
def test_shapes_that_do_not_belong_together(shapes):
    with pytest.raises(ValueError, match="q is"):
        ops_cpu.attention(*(numbers(*shape) for shape in shapes), 1.0)
    q = numbers(2, 4, 2, 8)
    for visible in (np.ones((1, 4), bool), np.ones((2, 4), np.int64)):
        with pytest.raises(ValueError, match=r"layout\.visible is"):
            ops_cpu.attention(q, q, q, 1.0, SimpleNamespace(visible=visible))
    with pytest.raises(ValueError, match="a LayerNorm over 8 numbers"):
        ops_cpu.layer_norm(q, numbers(4), numbers(4))
    with pytest.raises(ValueError, match="dO is"):
        ops_cpu.attention_bwd(q[:, 1:], q, q, q, q, q[..., 0], 1.0)
    with pytest.raises(IndexError, match="rows 3 to 9"):
        ops_cpu.pack({"weight": numbers(9, 4)})["weight"].rows([3, 9])
    assert ops_cpu.attention(numbers(1, 0, 2, 8), q[:1], q[:1], 1.0).shape == (1, 0, 2, 8)


def test_a_packed_weight_where_an_array_is_needed_says_so():
    cfg = small.config()
    packed = ops_cpu.pack(small.params(cfg))
    with pytest.raises(TypeError, match="packed for backend 'cpu'"):
        model.forward(packed, small.ids(cfg), cfg)
    ids = small.ids(cfg)
    loss, _ = grad.loss_and_grads(packed, ids, ids, cfg, ops=ops_cpu, num_items=np.int64(16))
    assert loss == pytest.approx(grad.loss_and_grads(small.params(cfg), ids, ids, cfg, num_items=16)[0], rel=1e-5)


def test_a_cache_is_copied_without_what_it_points_to():
    lm, ids = MODELS["float32"], np.array([[5, 6, 7]])
    cache = KVCache()
    lm(ids, past_key_values=cache)
    lm(ids[:, :1], past_key_values=cache)
    again = copy.deepcopy(cache)
    assert cache.program is not None
    assert again.program is None
    np.testing.assert_array_equal(lm(ids[:, 1:2], past_key_values=again).logits, lm(ids[:, 1:2], past_key_values=cache).logits)
    mixed = KVCache()
    OPTForCausalLM(EXACT, CFG)(ids, past_key_values=mixed)  # float64, on NumPy
    with pytest.raises(ValueError, match="this cache holds float64"):
        lm(ids[:, :1], past_key_values=mixed)


@pytest.mark.parametrize("cls", [OPTForQuestionAnswering, OPTForCausalLM])
def test_losses_that_read_padding_are_those_of_numpy(cls, tmp_path):
    cfg = small.config()
    checkpoint = small.folder(tmp_path, cfg)
    ids, mask = small.ids(cfg), np.ones((2, 9), np.int64)
    mask[0, 6:] = 0
    head = {"new_head": True} if cls is OPTForQuestionAnswering else {}
    labels = {"start_positions": [1, 2], "end_positions": [3, 4]} if head else {"labels": ids}
    ours, numpys = (cls.from_pretrained(checkpoint, backend=b, **head)(ids, mask, **labels).loss for b in ("cpu", "numpy"))
    assert ours == pytest.approx(numpys, rel=1e-5)


def test_float64_is_refused():
    with pytest.raises(ValueError, match="computes in float32, and was given float64"):
        ops_cpu.linear(np.ones((1, 2)), numbers(3, 2))


# ---- whole models ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_hf(variant, padding):
    """Our error against float64 is at most twice NumPy's in float32."""
    _, cfg, exact_params = build(variant)
    ids, mask = batch(padding)
    exact = model.forward(exact_params, ids, cfg, attention_mask=mask)
    params = small.cast(exact_params, "float32")
    numpys, ours = (model.forward(params, ids, cfg, attention_mask=mask, ops=backend) for backend in (ops, ops_cpu))
    packed = model.forward(ops_cpu.pack(params), ids, cfg, attention_mask=mask, ops=ops_cpu)
    np.testing.assert_array_equal(ours, packed)
    assert ours.dtype == np.float32
    assert worst(ours, exact, mask) <= 2 * worst(numpys, exact, mask) + EPS


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_stored_in_16_bits_compute_as_their_float32_values(dtype, tmp_path):
    cfg, ids = small.config(), small.ids(small.config())
    stored = small.cast(small.params(cfg), dtype)
    lm = OPTForCausalLM(stored, cfg, backend="cpu")
    close = 3e-2 if dtype == "bfloat16" and ops_cpu.TILE.pairs else 1e-5  # there x is rounded, too
    np.testing.assert_allclose(lm(ids).logits, model.forward(small.cast(stored, "float32"), ids, cfg), rtol=close, atol=close)
    lm.save_pretrained(tmp_path)
    again = OPTForCausalLM.from_pretrained(tmp_path, dtype=dtype, backend="cpu")
    assert {a.dtype for name, a in flatten(again.params).items() if "norm" not in name and "bias" not in name} == {
        np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    }
    np.testing.assert_array_equal(again(ids).logits, lm(ids).logits)


def test_a_model_is_saved_and_read_by_either_backend(tmp_path):
    cfg = small.config(tie_word_embeddings=False)
    params, ids = small.params(cfg), small.ids(cfg)
    lm = OPTForCausalLM(params, cfg, backend="cpu")
    assert isinstance(lm.params["layers"][0]["fc1"]["weight"], Packed)
    assert isinstance(params["layers"][0]["fc1"]["weight"], np.ndarray)  # the caller's tree is as it was
    lm.save_pretrained(tmp_path)
    for name, array in flatten(OPTForCausalLM.from_pretrained(tmp_path).params).items():
        np.testing.assert_array_equal(array, flatten(params)[name])
    assert lm.num_parameters() == sum(a.size for a in flatten(params).values())
    np.testing.assert_array_equal(OPTForCausalLM.from_pretrained(tmp_path, backend="auto")(ids).logits, lm(ids).logits)


def test_without_numba_auto_is_numpy_unless_the_weights_are_to_have_16_bits(monkeypatch):
    monkeypatch.setitem(sys.modules, "opt_fast.ops_cpu", None)  # an import of it fails
    assert classes.choose_backend("auto") == "numpy"
    with pytest.raises(ValueError, match=r"backend 'cpu' needs opt_fast\.ops_cpu.* pip install 'opt-np\[fast\]' brings what it needs"):
        classes.choose_backend("auto", "bfloat16")


def test_released_arrays_are_let_go_of():
    params = small.params(small.config())
    packed = ops_cpu.pack(params, release=True)
    assert not any(flatten(params).values() if flatten(params) else [])
    assert len(flatten(packed)) == len(flatten(small.params(small.config())))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 1, "top_k": 20}, {"penalty_alpha": 0.6, "top_k": 4}], ids=str)
def test_generation_is_that_of_numpy(options):
    cfg = small.config()
    params, ids = small.params(cfg), small.ids(cfg)
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    ours, numpys = (OPTForCausalLM(params, cfg, backend=b).generate(ids, attention_mask=mask, max_new_tokens=8, **options) for b in ("cpu", "numpy"))
    np.testing.assert_array_equal(ours, numpys)


def test_hidden_states_attentions_and_taps():
    _, cfg, exact = build("pre_norm")
    params, (ids, mask) = small.cast(exact, "float32"), batch("both")
    ours, numpys = (OPTForCausalLM(params, cfg, backend=b)(ids, mask, output_hidden_states=True) for b in ("cpu", "numpy"))
    for a, b in zip(ours.hidden_states, numpys.hidden_states, strict=True):
        assert worst(a, b, mask) < 1e-5
    ours, numpys = (OPTForCausalLM(params, cfg, backend=b)(ids, mask, output_attentions=True) for b in ("cpu", "numpy"))
    assert worst(ours.logits, numpys.logits, mask) < 1e-5
    for a, b in zip(ours.attentions, numpys.attentions, strict=True):
        assert np.abs(a - b).max() < 1e-5
    seen = []
    OPTForCausalLM(params, cfg, backend="cpu")(ids, tap=lambda name, value: seen.append(name) or value)
    assert "model.decoder.layers.1.self_attn.attn_weights" in seen


# ---- the same bits -----------------------------------------------------------------------------------------------------------------------

LENGTH = 30  # the longest row
_, CFG, EXACT = build("head_dim_80")


def stored_as(exact, cfg, dtype):
    """The parameters in a float type, or as int8 or int4."""
    return quantized(small.cast(exact, "float32"), cfg, dtype)[0] if dtype.startswith("int") else small.cast(exact, dtype)


MODELS = {d: OPTForCausalLM(stored_as(EXACT, CFG, d), CFG, backend="cpu") for d in ("float32", "float16", "bfloat16", "int8", "int4")}


def alone(dtype, ids):
    return MODELS[dtype]([ids]).logits[0]


@given(lengths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=5), sides=st.lists(st.integers(0, 10), min_size=5, max_size=5),
       seed=st.integers(0, 9),
       dtype=st.sampled_from(sorted(MODELS)), threads=st.integers(1, numba.config.NUMBA_NUM_THREADS))  # fmt: skip
def test_a_row_has_the_bits_that_it_has_alone(lengths, sides, seed, dtype, threads):
    """Batch size, padding on either side, neighbours, number of threads."""
    rows = [np.random.default_rng([seed, i]).integers(4, CFG.vocab_size, n) for i, n in enumerate(lengths)]
    T = max(n + left for n, left in zip(lengths, sides, strict=False))
    ids, mask = np.ones((len(rows), T), np.int64), np.zeros((len(rows), T), np.int64)
    for b, (row, left) in enumerate(zip(rows, sides, strict=False)):
        ids[b, left : left + len(row)], mask[b, left : left + len(row)] = row, 1
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(threads)
        logits = MODELS[dtype](ids, mask).logits
    finally:
        numba.set_num_threads(before)
    for b, row in enumerate(rows):
        np.testing.assert_array_equal(logits[b][mask[b] == 1], alone(dtype, row))


@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=6, unique=True), left=st.integers(0, 8), seed=st.integers(0, 9),
       dtype=st.sampled_from(sorted(MODELS)))  # fmt: skip
def test_a_prompt_has_the_same_bits_however_it_was_cut_into_the_cache(cuts, left, seed, dtype):
    row, cache = np.random.default_rng(seed).integers(4, CFG.vocab_size, LENGTH), KVCache()
    ids, mask = np.concatenate([np.ones(left, np.int64), row])[None], np.concatenate([np.zeros(left, np.int64), np.ones(LENGTH, np.int64)])[None]
    parts, start = [], 0
    for stop in [*(left + cut for cut in sorted(cuts)), left + LENGTH]:
        parts.append(MODELS[dtype](ids[:, start:stop], mask[:, :stop], past_key_values=cache).logits)
        start = stop
    np.testing.assert_array_equal(np.concatenate(parts, axis=1)[0, left:], alone(dtype, row))


@settings(max_examples=15)
@given(T=st.integers(1, 3 * KEYS), past=st.integers(0, KEYS + 7), left=st.integers(0, 200), seed=st.integers(0, 9))
def test_long_attention_has_the_same_bits_in_pieces_and_behind_padding(T, past, left, seed):
    q, k, v = numbers(1, T, 2, 24, seed=seed), numbers(1, past + T, 2, 24, seed=seed + 10), numbers(1, past + T, 2, 24, seed=seed + 20)
    O, L = ops_cpu.attention_lse(q, k, v, 0.2)
    t = np.random.default_rng(seed).integers(0, T)
    O_, L_ = ops_cpu.attention_lse(q[:, t : t + 1], k[:, : past + t + 1], v[:, : past + t + 1], 0.2)
    np.testing.assert_array_equal(O_, O[:, t : t + 1])
    np.testing.assert_array_equal(L_, L[:, t : t + 1])
    padded = [np.concatenate([np.full((1, left, 2, 24), np.nan, np.float32), a], axis=1) for a in (k, v)]
    visible = SimpleNamespace(visible=np.arange(left + past + T)[None] >= left)
    np.testing.assert_array_equal(ops_cpu.attention(q, *padded, 0.2, visible), O)


class PlainCache(KVCache):
    """Not the class that ops_cpu.decoder keeps a program with: every step goes through the plain operations."""


@pytest.mark.parametrize("padding", ["none", "left", "right", "both", "holes"])
@pytest.mark.parametrize("dtype", sorted(MODELS))
def test_a_pass_in_one_call_is_the_plain_one(dtype, padding):
    """Without a cache (hidden states are collected by the plain operations), and with one, at first and later; padding in the cache is 0 in both."""
    lm, (ids, mask) = MODELS[dtype], batch(padding)
    for labels in ({}, {"labels": ids}):  # a loss reads padding
        plain, fast = (lm(ids, mask, **labels, output_hidden_states=states) for states in (True, False))
        np.testing.assert_array_equal(fast.logits, plain.logits)
    caches = KVCache(), PlainCache()
    for part in (slice(0, 3), slice(3, None)):
        logits = [lm(ids[:, part], None if mask is None else mask[:, : part.stop], past_key_values=cache).logits for cache in caches]
        np.testing.assert_array_equal(*logits)
    for both in zip(caches[0]._layers, caches[1]._layers, strict=True):
        for a, b in zip(*both, strict=True):
            np.testing.assert_array_equal(a[:, : ids.shape[1]], b[:, : ids.shape[1]])


@pytest.mark.parametrize("T", [1, 17, 33])
@pytest.mark.parametrize("dtype", sorted(MODELS))
def test_rows_without_a_real_token(dtype, T):
    """A query that sees no key, also where it is the last of a block, and a batch without any token."""
    lm, ids, mask = MODELS[dtype], np.full((2, T), 7), np.ones((2, T), np.int64)
    mask[1], mask[0, 3:4] = 0, 0
    h = model.last_hidden_state(lm.params, ids, CFG, attention_mask=mask, ops=ops_cpu, padding=True)
    assert np.isfinite(h).all()
    np.testing.assert_array_equal(lm(ids, mask).logits[0, :3], alone(dtype, ids[0, :3]))
    for cache in (None, KVCache()):
        assert lm(ids, np.zeros_like(mask), past_key_values=cache).logits.shape == (2, T, CFG.vocab_size)


CHANGES = ("step", "threads", "crop", "reorder", "shrink", "fork", "new weight", "plain weight", "new bias", "wide bias")


@given(changes=st.lists(st.sampled_from(CHANGES), max_size=12), dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8"]),
       variant=st.sampled_from(["pre_norm", "like_350m", "galactica_30b", "no_affine", "head_dim_7"]))  # fmt: skip
@settings(max_examples=25)
def test_a_decoding_step_is_the_plain_one_whatever_changed_since_the_last(changes, variant, dtype):
    _, cfg, exact = build(variant)
    params, rng, before = ops_cpu.pack(stored_as(exact, cfg, dtype)), np.random.default_rng(0), numba.get_num_threads()
    ids, caches = rng.integers(4, cfg.vocab_size, (3, 4)), [KVCache(), PlainCache()]
    first = [model.forward(params, ids, cfg, cache=cache, ops=ops_cpu) for cache in caches]
    np.testing.assert_array_equal(*first)
    try:
        for change in [*changes, "step"]:
            fc1 = params["layers"][-1]["fc1"]
            if change == "threads":
                numba.set_num_threads(1 if numba.get_num_threads() > 1 else before)
            elif change == "crop":
                [cache.crop(max(cache.length - 2, 1)) for cache in caches]
            elif change in ("reorder", "shrink"):
                rows = np.array([0, 0, 0]) if change == "reorder" else np.arange(1)
                [cache.reorder(np.minimum(rows, len(cache._layers[0][0]) - 1)) for cache in caches]
            elif change == "fork":
                caches[0] = caches[0].fork()
            elif change in ("new weight", "plain weight"):
                weight = np.asarray(fc1["weight"]) * np.asarray(2, fc1["weight"].dtype)
                fc1["weight"] = weight if change == "plain weight" else ops_cpu.gemm.pack(weight)
            elif change in ("new bias", "wide bias"):
                fc1["bias"] = (fc1.get("bias", np.zeros(cfg.ffn_dim)) + 1).astype(np.float32 if change == "new bias" else np.float64)
            ids = rng.integers(4, cfg.vocab_size, (len(caches[0]._layers[0][0]), 1))
            np.testing.assert_array_equal(*(model.forward(params, ids, cfg, cache=cache, ops=ops_cpu) for cache in caches))
    finally:
        numba.set_num_threads(before)


def test_a_row_generates_the_same_tokens_and_scores_in_any_batch():
    ids = np.random.default_rng(0).integers(4, CFG.vocab_size, (4, 9))
    lm = MODELS["float32"]
    together = list(lm.stream(ids, max_new_tokens=6))
    for b in range(4):
        for step, single in zip(together, lm.stream(ids[b : b + 1], max_new_tokens=6), strict=True):
            assert (step.ids[b], step.logprobs[b]) == (single.ids[0], single.logprobs[0])


# ---- training ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("variant", ["pre_norm", "like_350m", "gelu", "untied", "head_dim_80", "head_dim_7"])
def test_gradients(variant, padding):
    _, cfg, exact_params = build(variant)
    ids, mask = batch(padding)
    labels = ids if mask is None else np.where(mask, ids, grad.IGNORED)
    loss, exact = grad.loss_and_grads(exact_params, ids, labels, cfg, mask)
    params = small.cast(exact_params, "float32")
    (numpy_loss, numpys), (our_loss, ours) = (grad.loss_and_grads(params, ids, labels, cfg, mask, ops=backend) for backend in (ops, ops_cpu))
    assert our_loss == pytest.approx(loss, rel=1e-5)
    for name, g in flatten(ours).items():
        size = max(np.abs(flatten(exact)[name]).max(), 1e-3)
        assert g.dtype == np.float32
        assert np.abs(g - flatten(exact)[name]).max() <= 3 * np.abs(flatten(numpys)[name] - flatten(exact)[name]).max() + 1e-6 * size, name
    assert numpy_loss == pytest.approx(our_loss, rel=1e-5)


def test_training_resumes_to_the_same_bits(tmp_path):
    (tmp_path / "text.txt").write_text(small.TEXT)
    common = {"text": (str(tmp_path / "text.txt"),), "vocab_size": 300, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "context": 16,
              "batch_size": 2, "backend": "cpu", "warmup_steps": 1}  # fmt: skip
    whole = train(Options(out=str(tmp_path / "whole"), steps=6, **common))
    train(Options(out=str(tmp_path / "cut"), steps=3, schedule="cosine", **common))
    with pytest.raises(ValueError, match="--backend cpu"):
        train(Options(out=str(tmp_path / "cut"), steps=6, resume=True, **{**common, "backend": "numpy"}))
    again = train(Options(out=str(tmp_path / "cut"), steps=6, resume=True, **{**common, "backend": "auto"}))
    assert again["step"] == whole["step"] == 6
    assert np.isfinite(again["loss"])
    plain = train(Options(out=str(tmp_path / "numpy"), steps=6, **{**common, "backend": "numpy"}))
    assert plain["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_a_classifier_on_this_backend(tmp_path):
    cfg = small.config()
    checkpoint = small.folder(tmp_path, cfg)
    options = {"new_head": True, "num_labels": 3, "seed": 1}
    ids, labels = small.ids(cfg), np.array([0, 2])
    ours, numpys = (OPTForSequenceClassification.from_pretrained(checkpoint, backend=b, **options)(ids, labels=labels) for b in ("cpu", "numpy"))
    np.testing.assert_allclose(ours.logits, numpys.logits, rtol=1e-4, atol=1e-5)
    assert ours.loss == pytest.approx(numpys.loss, rel=1e-5)


def test_a_classifier_reads_rows_at_columns_that_are_masked():
    """HF finds a row's end by id, whatever the mask: here the rows' second half is hidden, but not the pad."""
    cfg = small.config()
    params = small.params(cfg)
    params["score"] = {"weight": np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)}
    ids = small.ids(cfg, 2, 8)
    mask = np.array([[1] * 8, [1] * 4 + [0] * 4])
    ours, numpys = (OPTForSequenceClassification(copy.deepcopy(params), cfg, backend)(ids, mask).logits for backend in ("cpu", "numpy"))
    np.testing.assert_allclose(ours, numpys, rtol=1e-4, atol=1e-5)


def test_no_two_functions_within_kernels_have_one_name():
    """Kernels that were compiled in other processes meet in one, and its linker knows a function by its name and the kinds of its arguments: it took
    attention's kernel for the backward pass's, which is of another step, and gradients were wrong, if the one was kept and the other was not."""
    modules = (attention_bf16, attention_cpu, attention_parts, gemm, gemm_amx, gemm_amx_int4, gemm_int, gemm_parts, kernel, program_cpu, rowwise,
               train_cpu)  # fmt: skip
    found = {id(f): f.py_func for module in modules for f in vars(module).values() if isinstance(f, Dispatcher)}
    names = [f"{f.__module__}.{f.__qualname__}" for f in found.values()]
    assert len(names) > 30
    assert len(set(names)) == len(names)


# ---- threads -----------------------------------------------------------------------------------------------------------------------------


def test_a_thread_waits_for_all_of_a_kernels_tasks():
    """For much longer than it looks without yielding."""

    @numba.njit(nogil=True)
    def run(counters, n):
        kernel.wait(kernel.int64s(counters), 1, n)

    counters = np.zeros(2, np.int64)
    run(kernel.address(counters), 0)
    thread = threading.Thread(target=run, args=(kernel.address(counters), 3), daemon=True)
    thread.start()
    for _ in range(3):
        time.sleep(0.01)
        assert thread.is_alive()
        counters[1] += 1
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.parametrize("own", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive"}], ids=["", "spins", "policy"])
def test_the_environment_stays_as_it_was(own):
    program = "import os; before = dict(os.environ); import opt_fast.kernel; assert dict(os.environ) == before"
    given = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    subprocess.run([sys.executable, "-c", program], env=given | own, check=True, timeout=100)


# ---- kept kernels ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sent_ahead(tmp_path, monkeypatch):
    """What was compiled here, and a kernel that was never compiled, told to be compiled elsewhere."""
    monkeypatch.setattr(kernel.config, "CACHE_DIR", str(tmp_path))
    here, cfunc = [], kernel.numba.cfunc
    monkeypatch.setattr(kernel.numba, "cfunc", lambda *types_, **options: lambda f: here.append(f.__name__) or cfunc(*types_, **options)(f))

    def send(name="rowwise.ADD"):
        add = Kernel(rowwise.ADD._function)
        add.ahead(name)
        return add, kernel._elsewhere.get(add._function)

    yield here, send
    kernel._elsewhere.pop(rowwise.ADD._function, None)


def test_a_kernel_is_compiled_by_another_process(sent_ahead):
    here, send = sent_ahead
    add, process = send()
    assert process is not None
    assert send()[1] is process
    x, y = np.ones(5, np.float32), np.arange(5, dtype=np.float32)
    add(x, y, 5, tasks=1)
    np.testing.assert_array_equal(x, [1, 2, 3, 4, 5])
    assert (process.returncode, here) == (0, [])
    warm, process = send()  # kept now: no other process is needed
    assert process is None
    assert warm.address
    assert here == []


def test_where_the_other_process_fails_this_one_compiles(sent_ahead):
    here, send = sent_ahead
    add, process = send("rowwise.NO_SUCH_KERNEL")
    assert add.address
    assert process.returncode == 1
    assert here == ["_add"]


def test_where_no_process_can_be_begun_this_one_compiles(sent_ahead, monkeypatch):
    here, send = sent_ahead
    monkeypatch.setattr(kernel.sys, "executable", "/nowhere/python3")
    add, process = send()
    assert process is None
    assert add.address
    assert here == ["_add"]


@pytest.mark.parametrize("alone", ["one thread", "no Python", "a frozen program"])
def test_no_other_process_is_begun_where_it_would_not_help_or_is_none(sent_ahead, monkeypatch, alone):
    _, send = sent_ahead
    if alone == "one thread":
        monkeypatch.setattr(kernel.numba, "get_num_threads", lambda: 1)
    elif alone == "no Python":
        monkeypatch.setattr(kernel.sys, "executable", "/usr/bin/embeds-python")
    else:
        monkeypatch.setattr(kernel.sys, "frozen", True, raising=False)
    monkeypatch.setattr(kernel, "in_another_process", None)
    assert send()[1] is None


def test_attention_is_what_the_other_process_compiles(monkeypatch):
    """By a name that finds the very kernel that generation runs."""
    for dtype, quantize in (("float32", None), ("float16", None), ("bfloat16", None), ("float32", "int8"), ("float32", "int4")):
        cfg = small.config()
        params = small.cast(small.params(cfg), dtype)
        params = quantized(params, cfg, quantize)[0] if quantize else params
        asked = []
        monkeypatch.setattr(Kernel, "ahead", lambda self, name, asked=asked: asked.append((self, name)))
        lm = OPTForCausalLM(params, cfg, backend="cpu")
        ((wanted, name),) = asked
        assert eval(name, {"attention_parts": attention_parts}) is wanted
        lm.generate([[5, 6, 7]], max_new_tokens=1)
        (machine,) = lm.params.idle
        assert wanted in [kernel for program in machine.reading.values() for kernel, *_ in program.lines]
        monkeypatch.undo()


def test_where_nothing_can_be_kept_kernels_compile_all_the_same(tmp_path, monkeypatch, capsys):
    """Neither beside the package nor at home: in a folder that is gone with the process, and it is said once."""
    (tmp_path / "file").write_text("")
    kernel.for_this_process.cache_clear()
    monkeypatch.setattr(kernel.config, "CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(kernel.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    for function in (program_cpu.ADD._function, kernel._enter):
        types_ = kernel.KERNEL if function is not kernel._enter else kernel.types.void(*[kernel.types.CPointer(kernel.types.int64)] * 4)
        assert kernel.compiled(function, types_)
    assert capsys.readouterr().err.count("cannot be kept") == 1
    assert list(tmp_path.rglob("*.nbi"))
    kernel.for_this_process.cache_clear()


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_a_model_is_copied_and_pickled(backend):
    """Also after it has been used, when it keeps pages and programs; what is copied shares no parameter."""
    model, ids = OPTForCausalLM(EXACT, CFG, backend=backend), small.ids(CFG, 1, 5)
    text = model.generate(ids, max_new_tokens=4)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.ops is model.ops
        assert again.params["layers"][0]["fc1"]["bias"] is not model.params["layers"][0]["fc1"]["bias"]
        np.testing.assert_array_equal(again.generate(ids, max_new_tokens=4), text)
