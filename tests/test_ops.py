"""The operations one by one: against torch, against the shapes that their docstrings promise, and at the edges."""

import functools
import inspect
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from opt_np import flash, grad, ops
from opt_np.model import Layout

DTYPES = (np.float32, np.float64)


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def layout_of(visible):
    return Layout(np.zeros((1, 1), int), visible, 0)


# ---- docstrings are executed: "x: (*N, I);  weight: (O, I)  ->  (*N, O)" ------------------------------------------------------------------

SHAPE_LINE = re.compile(r"^\s*(\w+: \(.*?\)(?:;\s+\w+: \(.*?\))*)\s+->\s+(.*?)\s*$", re.M)


def axes(text):
    return [a.strip() for a in text.strip().strip("()").split(",") if a.strip()]


def match(shape, spec, bound, what):
    """Checks a shape against axis letters, binding each letter to one size; *N stands for any leading axes."""
    if spec and spec[0].startswith("*"):
        lead = len(shape) - (len(spec) - 1)
        assert lead >= 0, f"{what} is {shape}; the docstring says {spec}"
        assert bound.setdefault(spec[0], shape[:lead]) == shape[:lead], f"{what} is {shape}; {spec[0]} is {bound[spec[0]]}"
        shape, spec = shape[lead:], spec[1:]
    assert len(shape) == len(spec), f"{what} is {shape}; the docstring says {spec}"
    for size, letter in zip(shape, spec, strict=True):
        wanted = int(letter) if letter.isdigit() else bound.setdefault(letter, size)
        assert size == wanted, f"{what} is {shape}; axis {letter} is {wanted} elsewhere"


def executed(fn):
    """fn, with every array checked against the shape line of its docstring, and results against the dtype of the first input."""
    found = SHAPE_LINE.search(inspect.getdoc(fn) or "")
    assert found, f"{fn.__name__} has no shape line"
    inputs = {name: axes(spec) for name, spec in re.findall(r"(\w+): (\(.*?\))", found[1])}
    outputs = [axes(spec) for spec in re.findall(r"\(.*?\)", found[2])]

    @functools.wraps(fn)
    def call(*args, **kwargs):
        arguments, bound = inspect.signature(fn).bind(*args, **kwargs).arguments, {}
        for name, spec in inputs.items():
            if arguments.get(name) is not None:
                match(np.shape(arguments[name]), spec, bound, name)
        result = fn(*args, **kwargs)
        arrays = [r for r in (result if isinstance(result, tuple) else (result,)) if isinstance(r, np.ndarray)]
        for array, spec in zip(arrays, outputs, strict=True):
            match(array.shape, spec, bound, "the result")
        floats = [a for a in arguments.values() if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
        assert all(a.dtype == floats[0].dtype for a in arrays if floats), f"{fn.__name__}: {floats[0].dtype} became {[a.dtype for a in arrays]}"
        return result

    return call


CALLS = {
    ops.embed: lambda d: (np.array([[1, 2], [0, 2]]), normal(3, 4, dtype=d)),
    ops.linear: lambda d: (normal(2, 3, 4, dtype=d), normal(5, 4, dtype=d), normal(5, dtype=d)),
    ops.layer_norm: lambda d: (normal(2, 3, 4, dtype=d), normal(4, dtype=d), normal(4, dtype=d)),
    ops.normalize: lambda d: (normal(2, 3, 4, dtype=d),),
    ops.layer_norm_bwd: lambda d: (normal(2, 3, 4, dtype=d), normal(2, 3, 4, dtype=d), normal(4, dtype=d)),
    ops.activation: lambda d: (normal(2, 3, dtype=d), "gelu"),
    ops.mlp: lambda d: (
        normal(2, 3, 4, dtype=d), {"weight": normal(6, 4, dtype=d), "bias": normal(6, dtype=d)}, {"weight": normal(4, 6, dtype=d)}, "relu",
    ),
    ops.attention: lambda d: (normal(2, 3, 2, 4, dtype=d), normal(2, 5, 2, 4, dtype=d), normal(2, 5, 2, 4, dtype=d), 0.5),
    ops.attention_lse: lambda d: (normal(2, 3, 2, 4, dtype=d), normal(2, 5, 2, 4, dtype=d), normal(2, 5, 2, 4, dtype=d), 0.5),
    ops.attention_probs: lambda d: (normal(2, 3, 2, 4, dtype=d), normal(2, 5, 2, 4, dtype=d), 0.5),
    ops.attention_bwd: lambda d: (
        normal(2, 3, 2, 4, dtype=d), normal(2, 3, 2, 4, dtype=d), normal(2, 5, 2, 4, dtype=d), normal(2, 5, 2, 4, dtype=d),
        normal(2, 3, 2, 4, dtype=d), normal(2, 3, 2, dtype=d), 0.5,
    ),
    ops.matmul: lambda d: (normal(2, 3, dtype=d), normal(3, 4, dtype=d)),
    ops.softmax: lambda d: (normal(2, 3, dtype=d),),
    ops.softmax_terms: lambda d: (normal(2, 3, dtype=d),),
    ops.normal_cdf: lambda d: (normal(2, 3, dtype=d),),
    flash.attention: lambda d: (normal(3, 4, dtype=d), normal(5, 4, dtype=d), normal(5, 4, dtype=d), 0.5),
    flash.attention_bwd: lambda d: (
        normal(3, 4, dtype=d), normal(3, 4, dtype=d), normal(5, 4, dtype=d), normal(5, 4, dtype=d), normal(3, 4, dtype=d), normal(3, dtype=d), 0.5,
    ),
    grad.embed_bwd: lambda d: (normal(2, 3, 4, dtype=d), np.array([[1, 2, 2], [0, 2, 1]]), normal(5, 4, dtype=d)),
    ops.activation_bwd: lambda d: (normal(2, 3, dtype=d), normal(2, 3, dtype=d), "gelu"),
    ops.cross_entropy: lambda d: (normal(3, 5, dtype=d), np.array([0, 4, 2])),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fn", CALLS, ids=lambda fn: f"{fn.__module__.split('.')[-1]}.{fn.__name__}")
def test_shapes_and_dtypes_are_what_the_docstring_says(fn, dtype):
    result = executed(fn)(*CALLS[fn](dtype))
    assert all(np.isfinite(r).all() for r in (result if isinstance(result, tuple) else (result,)))


def test_the_docstring_check_can_fail():
    def halves(x):
        """x: (*N, D)  ->  (*N, D)"""
        return x[..., ::2]

    def promotes(x):
        """x: (*N, D)  ->  (*N, D)"""
        return x.astype(np.float64)

    with pytest.raises(AssertionError, match="axis D is 4"):
        executed(halves)(normal(2, 4))
    with pytest.raises(AssertionError, match="float32 became"):
        executed(promotes)(normal(2, 4, dtype=np.float32))


def test_every_op_of_the_contract_is_there():
    names = {name for name, fn in vars(ops).items() if inspect.isfunction(fn) and fn.__module__ == "opt_np.ops"}
    assert {"pack", "embed", "linear", "matmul", "layer_norm", "activation", "mlp"} <= names
    assert {"attention", "attention_lse", "attention_probs", "attention_bwd", "layer_norm_bwd", "activation_bwd", "cross_entropy"} <= names


# ---- against torch -----------------------------------------------------------------------------------------------------------------------

floats = hnp.arrays(np.float64, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=st.floats(-50, 50))


@given(x=floats)
def test_activations_equal_torch(x):
    t = torch.tensor(x)
    assert np.array_equal(ops.activation(x, "relu"), torch.relu(t).numpy())
    assert np.allclose(ops.activation(x, "gelu"), torch.nn.functional.gelu(t).numpy(), rtol=1e-13, atol=1e-14)
    assert np.allclose(ops.activation(x, "gelu_new"), torch.nn.functional.gelu(t, approximate="tanh").numpy(), rtol=1e-13, atol=1e-14)


@given(x=floats, function=st.sampled_from(["relu", "gelu", "gelu_new"]))
def test_gradients_of_activations_equal_torch(x, function):
    t = torch.tensor(x, requires_grad=True)
    {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "gelu_new": lambda a: torch.nn.functional.gelu(a, approximate="tanh")}[function](
        t
    ).sum().backward()
    assert np.allclose(ops.activation_bwd(np.ones_like(x), x, function), t.grad.numpy(), rtol=1e-12, atol=1e-13)


@given(x=floats)
def test_layer_norm_equals_torch(x):
    D = x.shape[-1]
    w, b = normal(D), normal(D, seed=1)
    expected = torch.nn.functional.layer_norm(torch.tensor(x), (D,), torch.tensor(w), torch.tensor(b)).numpy()
    assert np.allclose(ops.layer_norm(x, w, b), expected, rtol=1e-9, atol=1e-9)


def test_normal_cdf_is_exact_to_the_last_bits():
    x = np.linspace(-8, 8, 4001)
    exact = np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in x])
    assert np.abs(ops.normal_cdf(x) - exact).max() < 1e-15


@st.composite
def attention_problem(draw):
    """q, k, v and a mask of visible keys, with lengths around the block of 128 and scores from tiny to huge."""
    B, H, Dh = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8]))
    T = draw(st.sampled_from([1, 2, 5, 127, 128, 129, 200]))
    S = T + draw(st.sampled_from([0, 1, 3, 64, 130]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    size = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    q, k, v = (rng.normal(size=(B, n, H, Dh)) * s for n, s in ((T, size), (S, size), (S, 1.0)))
    visible = draw(st.sampled_from([None, "left", "random"]))
    if visible == "left":
        visible = np.arange(S) >= rng.integers(0, S, (B, 1))
    elif visible == "random":
        visible = rng.random((B, S)) < 0.5
    return q, k, v, visible


def torch_attention(q, k, v, scale, visible):
    """sdpa under an explicit mask; rows that see nothing, which sdpa leaves undefined, are set to 0."""
    T, S = q.shape[1], k.shape[1]
    allowed = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None].expand(len(q), 1, T, S)
    if visible is not None:
        allowed = allowed & torch.tensor(visible)[:, None, None]
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    O = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)
    return torch.where(allowed.any(-1, keepdim=True), O, 0.0).transpose(1, 2)


@given(problem=attention_problem())
def test_attention_and_its_gradients_equal_torch(problem):
    q, k, v, visible = problem
    tq, tk, tv = (torch.tensor(a, requires_grad=True) for a in (q, k, v))
    expected = torch_attention(tq, tk, tv, 0.7, visible)
    dO = normal(*q.shape, seed=3)
    expected.backward(torch.tensor(dO))
    where = layout_of(visible)
    assert np.allclose(ops.attention(q, k, v, 0.7, where), expected.detach().numpy(), rtol=1e-10, atol=1e-10)
    O, L = ops.attention_lse(q, k, v, 0.7, where)
    for ours, t in zip(ops.attention_bwd(dO, q, k, v, O, L, 0.7, where), (tq, tk, tv), strict=True):
        assert np.allclose(ours, t.grad.numpy(), rtol=1e-8, atol=1e-8 * max(np.abs(t.grad.numpy()).max(), 1))


@given(problem=attention_problem())
def test_weights_times_values_are_the_output(problem):
    q, k, v, visible = problem
    P = ops.attention_probs(q, k, 0.7, layout_of(visible))
    assert np.allclose((P @ v.swapaxes(1, 2)).swapaxes(1, 2), ops.attention(q, k, v, 0.7, layout_of(visible)), rtol=1e-12, atol=1e-12)
    total = P.sum(-1)
    assert np.all(np.isclose(total, 1, rtol=1e-12) | (total == 0))
    if visible is not None:
        assert not P[~np.broadcast_to(visible[:, None, None], P.shape)].any()


@given(problem=attention_problem(), data=st.data())
def test_the_weights_of_some_queries_are_those_of_all(problem, data):
    q, k, _, visible = problem
    rows = data.draw(st.lists(st.integers(0, q.shape[1] - 1), min_size=1, max_size=4))
    some, every = (ops.attention_probs(q, k, 0.7, layout_of(visible), chosen) for chosen in (rows, None))
    assert np.array_equal(some, every[:, :, rows])


@given(problem=attention_problem(), Br=st.sampled_from([16, 64, 100]), Bc=st.sampled_from([16, 48, 64]))
def test_flash_equals_plain_attention_forward_and_backward(problem, Br, Bc):
    q, k, v, visible = problem
    (O, lse), dO = ops.attention_lse(q, k, v, 0.7, layout_of(visible)), normal(*q.shape, seed=4)
    expected = ops.attention_bwd(dO, q, k, v, O, lse, 0.7, layout_of(visible))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        seen = None if visible is None else visible[b]
        O_, L = flash.attention(q[b, :, h], k[b, :, h], v[b, :, h], 0.7, seen, Br, Bc)
        assert np.allclose(O_, O[b, :, h], rtol=1e-10, atol=1e-12)
        assert np.allclose(L, lse[b, :, h], rtol=1e-12, atol=1e-12)
        grads = flash.attention_bwd(dO[b, :, h], q[b, :, h], k[b, :, h], v[b, :, h], O_, L, 0.7, seen, Br, Bc)
        for ours, theirs in zip(grads, expected, strict=True):
            assert np.allclose(ours, theirs[b, :, h], rtol=1e-8, atol=1e-9 * max(np.abs(theirs).max(), 1))


def test_flash_returns_the_log_of_the_sum_of_exponentials():
    q, k, v = normal(5, 4), normal(7, 4, seed=1), normal(7, 4, seed=2)
    _, L = flash.attention(q, k, v, 0.5, Br=2, Bc=3)
    scores = np.where(np.arange(7) <= np.arange(5)[:, None] + 2, 0.5 * q @ k.T, -np.inf)
    assert np.allclose(L, np.logaddexp.reduce(scores, axis=1), rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_sees_no_key_gives_exactly_zero(dtype):
    q, k, v = (normal(2, 4, 2, 8, seed=s, dtype=dtype) for s in range(3))
    visible = np.array([[False] * 4, [False, False, True, True]])
    O, L = ops.attention_lse(q, k, v, 0.3, layout_of(visible))
    assert not O[0].any()
    assert not O[1, :2].any()
    assert O[1, 2:].all()
    assert (L[0] == -np.inf).all()
    grads = ops.attention_bwd(np.ones_like(O), q, k, v, O, L, 0.3, layout_of(visible))
    assert all(np.isfinite(g).all() and not g[0].any() for g in grads)
    assert not flash.attention(q[0, :, 0], k[0, :, 0], v[0, :, 0], 0.3, visible[0])[0].any()


@pytest.mark.parametrize("value", [-200.0, 200.0, -6e4, 6e4, -1e30, 1e30])
def test_equal_scores_of_any_size_give_equal_weights(value):
    q, k = np.full((1, 1, 1, 1), value, np.float32), np.ones((1, 4, 1, 1), np.float32)
    assert np.array_equal(ops.attention_probs(q, k, 1.0), np.full((1, 1, 1, 4), 0.25, np.float32))
    O, _ = flash.attention(q[0, :, 0], k[0, :, 0], np.arange(4, dtype=np.float32)[:, None], 1.0, Br=1, Bc=3)
    assert pytest.approx(1.5) == O
