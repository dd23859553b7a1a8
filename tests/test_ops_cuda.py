"""backend="cuda": every operation against opt_np.ops, whole models against HF, and autograd against the explicit backward pass.

All of it runs on torch's CPU tensors; where there is a GPU, on that as well, and then through the kernels.
"""

import copy
import importlib
import inspect
import json
import re
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import PADDINGS, VARIANTS, batch, build, tensors, worst

from opt_fast import attention_cuda, nvrtc, ops_cuda, train_cuda
from opt_np import OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification, OPTModel, cli, grad, model, ops
from opt_np.arrays import host
from opt_np.contrastive import unit_vectors
from opt_np.kv_cache import KVCache
from opt_np.lens import attribution, logit_lens
from opt_np.optim import adamw_init, adamw_step, clip_by_global_norm
from opt_np.quantize import quantized
from opt_np.score import score
from opt_np.tasks import bits_per_byte
from opt_np.train import Options, train
from opt_np.tree import flatten, map_leaves

CONTRACT = ("description", "pack", "embed", "linear", "matmul", "layer_norm", "activation", "mlp", "attention", "attention_lse",
            "attention_scores", "softmax", "attention_probs", "attention_bwd")  # fmt: skip
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where the backend puts parameters."""
    where = torch.device(request.param)
    monkeypatch.setattr(ops_cuda, "device", lambda: where)
    return where


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def on(a, dtype=torch.float64, where="cpu"):
    return None if a is None else torch.tensor(a, dtype=dtype, device=where)


def close(ours, exact, tolerance=1e-12):
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(host(ours), exact, rtol=tolerance, atol=tolerance)
    return True


# ---- each operation ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTRACT)
def test_the_contract_is_the_same(name):
    assert list(inspect.signature(getattr(ops_cuda, name)).parameters) == list(inspect.signature(getattr(ops, name)).parameters)


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"backend 'cuda' needs a GPU, and torch .* sees none here; backend='cpu'"):
        OPTForCausalLM(small.params(small.config()), small.config(), backend="cuda")
    with pytest.raises(ValueError, match="computes in float32 or float16 or bfloat16, not 'float64'"):
        OPTForCausalLM.from_pretrained("nowhere", dtype="float64", backend="cuda")


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@given(N=shapes, I=st.integers(1, 30), O=st.integers(1, 30), bias=st.booleans())
def test_linear_embed_and_matmul(N, I, O, bias):
    x, weight, b = numbers(*N, I), numbers(O, I, seed=1), numbers(O, seed=2) if bias else None
    assert close(ops_cuda.linear(on(x), on(weight), on(b)), ops.linear(x, weight, b))
    assert close(ops_cuda.matmul(on(weight), on(x.reshape(-1, I).T)), ops.matmul(weight, x.reshape(-1, I).T))
    ids = np.random.default_rng(I).integers(0, O, N)
    assert close(ops_cuda.embed(ids, on(weight)), ops.embed(ids, weight), 0)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_whole_numbers_are_what_the_reference_says(kind):
    cfg = small.config(hidden_size=40, num_attention_heads=2)
    for name, leaf in flatten(quantized(small.params(cfg), cfg, kind)[0]).items():
        assert leaf is not None, name
    fc1 = quantized(small.params(cfg), cfg, kind)[0]["layers"][0]["fc1"]
    x, there = numbers(3, 40).astype(np.float32), {name: torch.tensor(a) for name, a in fc1.items()}
    np.testing.assert_allclose(ops_cuda.linear(torch.tensor(x), **there).numpy(), ops.linear(x, **fc1), rtol=1e-5, atol=1e-5)


@given(N=shapes, D=st.integers(1, 40), affine=st.booleans(), function=st.sampled_from(["relu", "gelu", "gelu_new"]))
def test_layer_norm_activation_and_mlp(N, D, affine, function):
    x, p = numbers(*N, D), (numbers(D, seed=1), numbers(D, seed=2)) if affine else ()
    assert close(ops_cuda.layer_norm(on(x), *map(on, p)), ops.layer_norm(x, *p), 1e-9)
    assert close(ops_cuda.activation(on(x), function), ops.activation(x, function))
    fc1, fc2 = {"weight": numbers(21, D), "bias": numbers(21)}, {"weight": numbers(D, 21), "bias": numbers(D)}
    theirs = ({name: on(a) for name, a in p.items()} for p in (fc1, fc2))
    assert close(ops_cuda.mlp(on(x), *theirs, function), ops.mlp(x, fc1, fc2, function), 1e-10)


@given(B=st.integers(1, 3), T=st.integers(1, 20), past=st.integers(0, 9), H=st.integers(1, 3), Dh=st.integers(1, 9), hidden=st.booleans(),
       seed=st.integers(0, 99))  # fmt: skip
def test_attention_and_its_gradients(B, T, past, H, Dh, hidden, seed):
    q, dO, k, v = (numbers(B, n, H, Dh, seed=seed + i) for i, n in enumerate((T, T, T + past, T + past)))
    layout = SimpleNamespace(visible=np.random.default_rng(seed).random((B, T + past)) > 0.4) if hidden else None
    exact = ops.attention_lse(q, k, v, 0.3, layout)
    O, L = ops_cuda.attention_lse(on(q), on(k), on(v), 0.3, layout)
    assert close(O, exact[0])
    assert close(L, exact[1])
    assert close(ops_cuda.attention_scores(on(q), on(k), 0.3, layout), ops.attention_scores(q, k, 0.3, layout))
    rows = np.random.default_rng(seed).integers(0, T, 3)
    assert close(ops_cuda.attention_probs(on(q), on(k), 0.3, layout, rows), ops.attention_probs(q, k, 0.3, layout, rows))
    expected = ops.attention_bwd(dO, q, k, v, *exact, 0.3, layout)
    leaves = [on(a).requires_grad_() for a in (q, k, v)]
    ops_cuda.attention(*leaves, 0.3, layout).backward(on(dO))
    by_name = ops_cuda.attention_bwd(on(dO), on(q), on(k), on(v), O, L, 0.3, layout)
    for leaf, named, theirs in zip(leaves, by_name, expected, strict=True):
        assert close(leaf.grad, theirs)
        assert close(named, theirs)


def test_autograds_own_check_of_attention():
    q, k, v = (on(numbers(2, n, 2, 3, seed=n)).requires_grad_() for n in (4, 6, 6))
    layout = SimpleNamespace(visible=np.array([[0, 0, 1, 1, 0, 1], [1] * 6], bool))
    assert torch.autograd.gradcheck(lambda *qkv: ops_cuda.attention(*qkv, 0.5, layout), (q, k, v))


def test_arguments_that_fit_no_kernel_are_named():
    q, k = torch.zeros(2, 3, 2, 8), torch.zeros(2, 4, 2, 8)
    for arguments, words in [
        ((q, k[:1], k[:1], 1.0), r"q is \(2, 3, 2, 8\), k \(1, 4, 2, 8\)"),
        ((q, k, k.double(), 1.0), "float32 on cpu, torch.float32 on cpu, torch.float64 on cpu"),
        ((q, k, k, 0.0), "scale is 0.0; it must be positive"),
        ((q, k, k, np.nan), "scale is nan"),
        ((torch.zeros(1).expand(65536, 1, 1, 1),) * 3 + (1.0,), "65536 rows with 1 heads; a GPU's grid has room for 65535 of each"),
        ((torch.zeros(1).expand(1, 1, 65536, 1),) * 3 + (1.0,), "1 rows with 65536 heads"),
    ]:
        with pytest.raises(ValueError, match=words):
            ops_cuda.attention(*arguments)


@given(B=st.integers(1, 4), T=st.integers(1, 6), past=st.integers(0, 6), seed=st.integers(0, 200))
def test_a_mask_without_holes_is_five_numbers_a_row(B, T, past, seed):
    """The ranges that kernels read are equivalent to the mask: query t of a row sees the keys from `first` on, up to key before + t of these."""
    rng = np.random.default_rng(seed)
    visible = rng.random((B, T + past)) > rng.choice([0.2, 0.5, 0.9])
    if rng.random() < 0.7:  # left and right padding alone
        visible = np.array([(np.arange(T + past) >= a) & (np.arange(T + past) < b) for a, b in np.sort(rng.integers(0, T + past + 1, (B, 2)))])
    ranges = attention_cuda.ranges_of(visible, T)
    changes = np.diff(visible.astype(int), axis=1, prepend=0, append=0)
    assert (ranges is None) == bool(((changes == 1).sum(1) > 1).any())
    for row, seen in zip(() if ranges is None else ranges, visible, strict=ranges is not None):
        first_query, queries, first, keys, before = row
        assert (first_query, queries) == (0, T)
        for t in range(T):
            causal = seen & (np.arange(T + past) <= past + t)
            assert set(np.flatnonzero(causal)) == {first + j for j in range(min(keys, before + t + 1))}


def test_a_changed_mask_is_seen():
    """The last mask is cached for the next layer; another array, or the same one with other values, is another mask."""
    q, visible = torch.ones(1, 2, 1, 2), np.ones((1, 2), bool)
    v = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 2)
    first = ops_cuda.attention(q, q, v, 1.0, SimpleNamespace(visible=visible))
    visible[0, 0] = False
    second = ops_cuda.attention(q, q, v, 1.0, SimpleNamespace(visible=visible))
    assert (first[0, 1, 0, 0], second[0, 1, 0, 0]) == (2.0, 3.0)


def test_threads_are_given_their_own_masks(device):
    """The cached mask is shared by all threads: none may get the one that another has just stored."""
    wrong, seen, stop = [], [0] * 3, time.monotonic() + 1.0

    def ask(i):
        visible = np.arange(4) > np.array([[i], [-1]])  # (2, 4): as many first keys are hidden as the thread says
        while time.monotonic() < stop:
            for _ in range(50):
                if int(attention_cuda.on_device(visible, 4, device).visible[0].sum()) != 3 - i:
                    wrong.append(i)
                seen[i] += 1

    often = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(often)
    assert min(seen) > 0
    assert wrong == []


@pytest.mark.parametrize("power", [1, 2])  # with 1, what comes back to the backward pass needs no gradient itself
@pytest.mark.parametrize("of_a_head", [False, True])
def test_second_derivatives_are_refused(of_a_head, power, device):
    """autograd cannot follow the backward pass: without the refusal, a sum with other terms would be silently wrong."""
    x = on(numbers(2, 3, 2, 4), torch.float32, device).requires_grad_()
    found = train_cuda.classification_loss(x[0, :, 0], [1, 2, 0], None) if of_a_head else ops_cuda.attention(x, x, x, 0.5)

    def differentiate_twice():
        (first,) = torch.autograd.grad((found**power).sum(), x, create_graph=True)
        (first.square().sum() + x.square().sum()).backward()

    with pytest.raises(RuntimeError, match=r"once_differentiable|second derivative"):
        differentiate_twice()


def test_what_is_missing_is_told_before_anything_is_packed(device, monkeypatch):
    real = importlib.import_module

    def without(name, *rest):
        if name == "numba.cuda":
            raise ImportError("No module named 'numba.cuda'")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    assert "numba.cuda does not import (No module named 'numba.cuda')" in nvrtc.missing()
    with pytest.raises(ValueError, match=r"backend 'cuda': .* pip install 'opt-np\[kernels\]' brings it"):
        OPTForCausalLM(small.params(small.config()), small.config(), backend="cuda")


@pytest.mark.parametrize(
    ("package", "found", "wanted"), [("cuda-core", "0.7.0", "1.0"), ("numba-cuda", "0.30.1", "0.30.2"), ("numba-cuda", "0.9", "0.30.2")]
)
def test_a_package_that_is_too_old_is_told(package, found, wanted, monkeypatch):
    versions = {"cuda-core": "1.10.0", "cuda-bindings": "12.9.1", "numba-cuda": "0.30.10.post1"}
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    monkeypatch.setattr(nvrtc, "version", versions.__getitem__)
    assert nvrtc.missing() == ""
    versions[package] = found
    assert nvrtc.missing() == f"{package} is {found}, and {wanted} or later is needed; pip install 'opt-np[kernels]' brings it"


# ---- whole models ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_hf_in_float64(variant, padding, device):
    hf, cfg, params = build(variant)
    ids, mask = batch(padding)
    exact = hf(*tensors(ids, mask)).logits
    hidden = []
    ours = model.forward(ops_cuda.pack(params), ids, cfg, attention_mask=mask, ops=ops_cuda, hidden_states=hidden)
    assert ours.device.type == device.type
    real = np.ones_like(ids) if mask is None else mask
    assert worst(host(ours), exact, real) <= 1e-12
    assert len(hidden) == cfg.num_hidden_layers + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("variant", ["pre_norm", "like_350m", "gelu", "head_dim_80", "untied"])
def test_fewer_bits_err_at_most_twice_as_much_as_hf(variant, padding, dtype, device):
    hf, cfg, params = build(variant)
    ids, mask = batch(padding)
    exact = hf(*tensors(ids, mask)).logits
    low = copy.deepcopy(hf).to(device, DTYPES[dtype])
    theirs = low(*(None if a is None else torch.tensor(a, device=device) for a in (ids, mask))).logits.float().cpu()
    packed = map_leaves(lambda a: a.to(DTYPES[dtype]), ops_cuda.pack(params))
    ours = model.forward(packed, ids, cfg, attention_mask=mask, ops=ops_cuda)
    assert ours.dtype == DTYPES[dtype]
    assert worst(host(ours), exact, mask) <= 2 * worst(host(theirs), exact, mask) + 1e-6  # in float32 both are noise


@pytest.fixture(params=list(DTYPES))
def pair(request, device, tmp_path):
    """The same checkpoint on NumPy and on torch."""
    folder = small.folder(tmp_path / "lm", small.config())
    return OPTForCausalLM.from_pretrained(folder), OPTForCausalLM.from_pretrained(folder, dtype=request.param, backend="cuda")


def test_the_class_gives_tensors_and_saves_what_it_holds(pair, tmp_path):
    plain, lm = pair
    ids, mask = small.ids(plain.config), np.ones((2, 9), np.int64)
    mask[0, :3] = 0
    dtype = lm.params["embed_tokens"]["weight"].dtype
    wanted, out = plain(ids, mask, labels=ids), lm(torch.tensor(ids), torch.tensor(mask), labels=torch.tensor(ids), output_hidden_states=True,
                                                   output_attentions=True)  # fmt: skip
    assert isinstance(out.logits, torch.Tensor)
    assert out.logits.dtype == dtype
    loose = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
    assert worst(host(out.logits), wanted.logits, mask) < loose
    assert float(out.loss) == pytest.approx(float(wanted.loss), rel=loose)
    assert [tuple(P.shape) for P in out.attentions] == [(2, 2, 9, 9)] * 2
    lm.save_pretrained(tmp_path / "again")
    again = OPTForCausalLM.from_pretrained(tmp_path / "again", dtype=str(dtype).removeprefix("torch."), backend="cuda")
    for name, leaf in flatten(lm.params).items():
        assert torch.equal(leaf, flatten(again.params)[name]), name
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert lm.num_parameters() == plain.num_parameters()


def test_a_cache_holds_tensors(pair):
    _, lm = pair
    ids = small.ids(lm.config, 2, 12)
    whole, cache = host(lm(ids).logits), KVCache()
    parts = [host(lm(ids[:, a:b], past_key_values=cache).logits) for a, b in ((0, 5), (5, 6), (6, 7), (7, 12))]
    loose = 1e-4 if whole.dtype == np.float32 and lm.params["embed_tokens"]["weight"].dtype == torch.float32 else 0.15
    assert worst(np.concatenate(parts, 1), whole) < loose
    assert cache.nbytes == 2 * 2 * 2 * 12 * 16 * lm.params["embed_tokens"]["weight"].element_size()
    fork = cache.fork()
    cache.crop(6)
    fork.reorder(np.array([1, 1]))
    assert worst(host(lm(ids[:, 6:7], past_key_values=cache).logits), whole[:, 6:7]) < loose
    assert fork.length == 12
    plain = OPTForCausalLM(small.params(lm.config), lm.config)
    with pytest.raises(ValueError, match="this cache holds torch"):
        plain(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("options", [
    {}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_p": 0.9, "seed": 4}, {"penalty_alpha": 0.5, "top_k": 3},
    {"overflow": "slide", "max_new_tokens": 30},
])  # fmt: skip
def test_generation_says_what_numpy_says(options, device, tmp_path):
    folder = small.folder(tmp_path / "lm", small.config())
    plain, lm = OPTForCausalLM.from_pretrained(folder), OPTForCausalLM.from_pretrained(folder, backend="cuda")
    ids, mask = small.ids(plain.config), np.ones((2, 9), np.int64)
    mask[1, :4] = 0
    options = {"max_new_tokens": 8, **options}
    np.testing.assert_array_equal(lm.generate(ids, mask, **options), plain.generate(ids, mask, **options))


def test_quantised_weights_compute_on_tensors(device, tmp_path):
    folder = small.folder(tmp_path / "lm", small.config(hidden_size=32, num_attention_heads=2))
    for kind in ("int8", "int4"):
        plain, lm = (OPTForCausalLM.from_pretrained(folder, quantize=kind, backend=backend) for backend in ("numpy", "cuda"))
        ids = small.ids(plain.config)
        assert worst(host(lm(ids).logits), plain(ids).logits) < 1e-5
        assert lm.num_parameters() == plain.num_parameters()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_whole_numbers_beside_16_bits_compute_in_16_bits(kind, dtype, device, tmp_path):
    for changes in ({}, {"do_layer_norm_before": False, "word_embed_proj_dim": 16}):
        folder = small.folder(tmp_path / f"lm{len(changes)}", small.config(hidden_size=32, num_attention_heads=2, **changes), with_tokenizer=False)
        plain = OPTForCausalLM.from_pretrained(folder, quantize=kind)
        lm = OPTForCausalLM.from_pretrained(folder, quantize=kind, dtype=dtype, backend="cuda")
        ids, seen = small.ids(plain.config), []
        logits = lm(ids, tap=lambda name, value: (seen.append(value.dtype), value)[1]).logits  # noqa: B023
        assert {*seen, logits.dtype} == {getattr(torch, dtype)}
        assert worst(host(logits), plain(ids).logits) < (0.01 if dtype == "float16" else 0.08)


@pytest.fixture
def lm(device):
    """A model in float32."""
    cfg = small.config()
    return OPTForCausalLM(small.params(cfg), cfg, backend="cuda")


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", ">i8", ">u2"])
def test_ids_and_labels_of_any_whole_numbers(kind, lm):
    ids = small.ids(lm.config) % 100 + 4
    wanted, out = lm(ids, labels=ids), lm(ids.astype(kind), labels=ids.astype(kind))
    assert torch.equal(out.logits, wanted.logits)
    assert torch.equal(out.loss, wanted.loss)
    positions = np.tile(np.arange(9), (2, 1))
    assert torch.equal(lm(ids, position_ids=positions.astype(kind)).logits, wanted.logits)


def test_ids_and_labels_that_lie_as_they_like_in_memory(lm):
    ids = small.ids(lm.config)
    fixed = ids.copy()
    fixed.flags.writeable = False
    for array in (ids[:, ::-1], ids[::-1], np.asfortranarray(ids), fixed, np.broadcast_to(ids[:1], (3, 9))):
        wanted, out = (lm(a, labels=a) for a in (np.array(array, order="C"), array))
        assert torch.equal(out.logits, wanted.logits)
        assert torch.equal(out.loss, wanted.loss)


def test_every_input_may_be_a_tensor(lm, device):
    ids, mask = small.ids(lm.config), np.ones((2, 9), np.int64)
    mask[0, :3] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0) + 2  # others than the mask says
    assert not torch.equal(lm(ids, mask).logits, lm(ids, mask, position_ids=positions).logits)
    there = (torch.tensor(a, device=device) for a in (ids, mask, positions))
    assert torch.equal(lm(*there).logits, lm(ids, mask, position_ids=positions).logits)


def test_tools_for_looking_read_tensors(device, tmp_path):
    folder = small.folder(tmp_path / "lm", small.config())
    plain, lm = OPTForCausalLM.from_pretrained(folder), OPTForCausalLM.from_pretrained(folder, backend="cuda")
    ids = small.ids(plain.config, 1)
    for (name, theirs), (_, ours) in zip(logit_lens(plain, ids), logit_lens(lm, ids), strict=True):
        assert worst(host(ours), theirs) < 1e-4, name
    for heads in (False, True):
        for name, theirs in attribution(plain, ids, [5, 9], heads=heads).items():
            np.testing.assert_allclose(attribution(lm, ids, [5, 9], heads=heads)[name], theirs, atol=1e-4)
    np.testing.assert_allclose(lm.embed(ids), plain.embed(ids), atol=1e-5)
    _, cache = lm.run_with_cache(ids)
    assert set(cache) == set(plain.run_with_cache(ids)[1])
    np.testing.assert_allclose(host(lm.run_with_hooks(ids, [("blocks.0.hook_resid_mid", lambda x, hook: x * 2)])),
                               plain.run_with_hooks(ids, [("blocks.0.hook_resid_mid", lambda x, hook: x * 2)]), atol=1e-4)  # fmt: skip
    tokenizer = small.tokenizer()
    ours, theirs = (bits_per_byte(m.params, m.config, tokenizer, small.TEXT[:90], 16, m.ops)[0] for m in (lm, plain))
    assert ours == pytest.approx(theirs, rel=1e-5)
    np.testing.assert_allclose(score(lm, ids).logprob, score(plain, ids).logprob, atol=1e-4)


# ---- learning ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_autograd_equals_the_backward_pass_by_hand(variant, padding, device):
    _, cfg, params = build(variant)
    ids, mask = batch(padding)
    ids[0, 3] = 1  # a pad that is looked up as a token: its row learns nothing from that
    labels = np.where(np.ones_like(ids) if mask is None else mask, ids, -100)
    loss, grads = grad.loss_and_grads(params, ids, labels, cfg, mask)
    ours, our_grads = train_cuda.loss_and_grads(ops_cuda.pack(params), ids, labels, cfg, mask)
    assert ours == pytest.approx(loss, rel=1e-12)
    scale = max(np.abs(g).max() for g in flatten(grads).values())
    for name, g in flatten(grads).items():
        np.testing.assert_allclose(host(flatten(our_grads)[name]), g, atol=1e-11 * scale, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("cls", [OPTForSequenceClassification, OPTForQuestionAnswering, OPTModel])
def test_the_other_heads_learn_and_tell_the_same(cls, device, tmp_path):
    folder = small.folder(tmp_path / "lm", small.config())
    head = {} if cls is OPTModel else {"new_head": True}
    plain, lm = (cls.from_pretrained(folder, backend=backend, **head) for backend in ("numpy", "cuda"))
    ids, mask = small.ids(plain.config), np.ones((2, 9), np.int64)
    mask[0, :3] = 0
    labels = {"start_positions": [1, 2], "end_positions": [3, 4]} if cls is OPTForQuestionAnswering else {"labels": [1, 0]} if head else {}
    wanted, out = plain(ids, mask, **labels), lm(ids, mask, **labels)
    if cls is OPTModel:
        assert worst(host(out.last_hidden_state), wanted.last_hidden_state, mask) < 1e-5
        return
    assert float(out.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
    of_head, wants = (grad.classification_head, np.array([1, 0])) if cls is OPTForSequenceClassification else (grad.question_head, [[1, 3], [2, 4]])
    loss, grads = grad.loss_and_grads(plain.params, ids, wants, plain.config, mask, of_head)
    ours, our_grads = train_cuda.loss_and_grads(lm.params, ids, wants, lm.config, mask, of_head)
    assert ours == pytest.approx(loss, rel=1e-5)
    for name, g in flatten(grads).items():
        np.testing.assert_allclose(host(flatten(our_grads)[name]), g, atol=2e-5 * np.abs(g).max() + 1e-6, err_msg=name)


def test_a_user_may_call_backward_on_the_loss(device, tmp_path):
    lm = OPTForCausalLM.from_pretrained(small.folder(tmp_path / "lm"), backend="cuda")
    weight = lm.params["layers"][0]["fc1"]["weight"].requires_grad_()
    ids = small.ids(lm.config)
    lm(ids, labels=ids).loss.backward()
    expected = grad.loss_and_grads(ops_cuda.unpack(lm.params), ids, ids, lm.config)[1]["layers"][0]["fc1"]["weight"]
    np.testing.assert_allclose(host(weight.grad), expected, atol=1e-5)
    assert lm.generate(ids, max_new_tokens=2).shape == (2, 11)  # and generate goes on without


def test_learning_leaves_the_parameters_as_they_were(lm):
    ids, leaves = small.ids(lm.config), flatten(lm.params)
    leaves["layers.0.fc1.weight"].requires_grad_()
    before = {name: leaf.clone() for name, leaf in leaves.items()}
    train_cuda.loss_and_grads(lm.params, ids, ids, lm.config)
    for name, leaf in flatten(lm.params).items():
        assert leaf is leaves[name], name
        assert leaf.requires_grad == (name == "layers.0.fc1.weight"), name
        assert leaf.grad is None, name
        assert torch.equal(leaf, before[name]), name


def test_quantised_models_do_not_learn(device, tmp_path):
    folder = small.folder(tmp_path / "lm", small.config(hidden_size=32, num_attention_heads=2), with_tokenizer=False)
    ids = small.ids(small.config())
    for backend, learn in (("numpy", grad.loss_and_grads), ("cuda", train_cuda.loss_and_grads)):
        lm = OPTForCausalLM.from_pretrained(folder, quantize="int8", backend=backend)
        with pytest.raises(ValueError, match="whole numbers have no gradients"):
            learn(lm.params, ids, ids, lm.config)


def test_the_optimiser_is_that_of_optim():
    params, grads = small.params(small.config(), dtype="float64"), small.params(small.config(), seed=1, dtype="float64")
    theirs, state, their_state = ops_cuda.pack_on(params, "cpu"), adamw_init(params), ops_cuda.pack_on(adamw_init(params), "cpu")
    for step in range(3):
        g = map_leaves(lambda a, step=step: a * (step + 1), grads)
        their_g = ops_cuda.pack_on(g, "cpu")
        assert train_cuda.clip_by_global_norm(their_g, 3.0) == pytest.approx(clip_by_global_norm(g, 3.0), rel=1e-12)
        adamw_step(params, g, state, 0.01, (0.9, 0.99), weight_decay=0.1)
        train_cuda.adamw_step(theirs, their_g, their_state, 0.01, (0.9, 0.99), weight_decay=0.1)
    assert state["step"] == their_state["step"] == 3
    for name, p in flatten(params).items():
        np.testing.assert_allclose(host(flatten(theirs)[name]), p, rtol=1e-12, atol=1e-13, err_msg=name)


TINY = {"vocab_size": 300, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "context": 16, "batch_size": 2, "accumulate": 2, "steps": 12,
        "save_every": 5, "warmup_steps": 4, "learning_rate": 1e-2, "seed": 3}  # fmt: skip


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.large  # test_backend_cuda.py trains too
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_draws_the_curve_of_numpy_and_resumes(dropout, device, tmp_path):
    (tmp_path / "text.txt").write_text(small.TEXT)
    asked = {**TINY, "text": (str(tmp_path / "text.txt"),), "dropout": dropout, "eval_every": 6, "eval_text": (str(tmp_path / "text.txt"),)}
    train(Options(out=str(tmp_path / "numpy"), backend="numpy", **asked))
    train(Options(out=str(tmp_path / "cuda"), backend="cuda", **asked))
    train(Options(out=str(tmp_path / "parts"), backend="cuda", **{**asked, "steps": 5}))
    if dropout:  # torch drops other numbers than NumPy
        assert losses(tmp_path / "cuda")[-1] < losses(tmp_path / "cuda")[0]
    else:
        np.testing.assert_allclose(losses(tmp_path / "cuda"), losses(tmp_path / "numpy"), rtol=2e-4)
    part = OPTForCausalLM.from_pretrained(tmp_path / "cuda", backend="cuda")
    assert part.params["embed_tokens"]["weight"].device.type == device.type


@pytest.mark.large
def test_a_resumed_run_goes_on_as_if_never_stopped(device, tmp_path):
    (tmp_path / "text.txt").write_text(small.TEXT)
    asked = {**TINY, "text": (str(tmp_path / "text.txt"),), "dropout": 0.1, "schedule": "constant", "backend": "cuda"}
    train(Options(out=str(tmp_path / "whole"), **asked))
    train(Options(out=str(tmp_path / "parts"), **{**asked, "steps": 5}))
    train(Options(out=str(tmp_path / "parts"), resume=True, **asked))
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-6)


def test_classifiers_train_and_are_evaluated(device, tmp_path):
    lines = [json.dumps({"text": text, "label": label}) for text, label in (("the cat sat", "a"), ("on the mat", "b")) * 4]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    data = str(tmp_path / "data.jsonl")
    asked = {**TINY, "task": "classify", "data": data, "eval_data": data, "eval_every": 12, "dropout": 0.0}
    last = [train(Options(out=str(tmp_path / backend), backend=backend, **asked)) for backend in ("numpy", "cuda")]
    assert last[1]["accuracy"] == last[0]["accuracy"]
    assert last[1]["eval_loss"] == pytest.approx(last[0]["eval_loss"], rel=1e-2)


# ---- the command line and what it computes in 16 bits --------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    """opt-np in this process -> status, stdout, stderr."""

    def call(*words):
        return cli.main([str(word) for word in words]), *capsys.readouterr()

    return call


@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_vectors_of_large_numbers_have_length_1(dtype, device):
    """Their squares are beyond float16."""
    h = torch.full((1, 2, 2560), 8.0, dtype=DTYPES[dtype], device=device)
    np.testing.assert_allclose(np.linalg.norm(unit_vectors(h), axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(unit_vectors(np.full((1, 2, 2560), 8, np.float16)), 2560**-0.5, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_command_sums_probabilities_in_more_than_16_bits(dtype, device, run, tmp_path):
    """Of 4096 nearly equal ones: summed in float16 they stop growing long before 1."""
    cfg = small.config(vocab_size=4096)
    params = map_leaves(lambda a: a / 20, small.params(cfg))
    OPTForCausalLM(params, cfg).save_pretrained(tmp_path)
    small.tokenizer().save_pretrained(tmp_path)
    text = "the cat sat on the mat"
    said = run("logits", text, "--model", tmp_path, "--backend", "cuda", "--dtype", dtype, "--top", 2, "--out", tmp_path / "logits.npy")
    assert (said[0], said[2]) == (0, "")
    exact, ids = np.load(tmp_path / "logits.npy").astype(np.float64), small.tokenizer().encode(text)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))  # probabilities that sum to 1
    own = [float(line[18:].split()[0]) for line in said[1].splitlines()[2:]]
    np.testing.assert_allclose(own, [exact[t, i] for t, i in enumerate(ids[1:])], atol=6e-4)


def test_trace_command(device, run, tmp_path):
    folder = small.folder(tmp_path / "lm")
    asked = "trace", "the cat sat", "--model", folder
    for more in ([], ["--fused"]):
        (status, out, err), plain = run(*asked, *more, "--backend", "cuda"), run(*asked, *more, "--backend", "numpy")[1]
        assert (status, err) == (0, "")
        assert re.sub(r" [0-9a-f]{8}$", "", out, flags=re.M) == re.sub(r" [0-9a-f]{8}$", "", plain, flags=re.M)
    status, out, err = run(*asked, "--backend", "cuda", "--against", "numpy")
    assert (status, err) == (0, "")
    assert "none differs" in out


def test_training_without_a_gpu_leaves_nothing_behind(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "text.txt").write_text(small.TEXT)
    shape = ("--vocab-size", 300, "--hidden-size", 16, "--num-layers", 1, "--num-heads", 2, "--context", 16)
    status, out, err = run("train", "--text", tmp_path / "text.txt", "--out", tmp_path / "out", "--backend", "cuda", *shape)
    assert (status, out) == (1, "")
    assert re.fullmatch(r"opt-np: backend 'cuda' needs a GPU, .*\n", err)
    assert not (tmp_path / "out").exists()


def test_a_full_gpu_is_one_line(device, run, monkeypatch, tmp_path):
    folder = small.folder(tmp_path / "lm")

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(ops_cuda, "pack", full)
    said = run("generate", "the cat", "--model", folder, "--backend", "cuda")
    assert said == (1, "", "opt-np: not enough memory: CUDA out of memory. Tried to allocate 20.00 MiB\n")

    def broken(*_, **__):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(ops_cuda, "pack", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):  # which is to be seen whole
        run("generate", "the cat", "--model", folder, "--backend", "cuda")
