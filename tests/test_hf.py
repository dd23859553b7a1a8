"""HF's own OPT with our attention: the same outputs, tokens and gradients as with torch's, and an error where that is impossible."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import reference  # noqa: E402

import opt_fast  # noqa: E402
from opt_fast import hf  # noqa: E402

NORMS = ("pre_norm", "post_norm")


def written_out(q, k, v, scale, layout=None):
    """What opt_fast.attention_cuda.attention_lse is to compute, whole, in torch; and what it was given, for those who look."""
    written_out.layouts.append(layout)
    T, S = q.shape[1], k.shape[1]
    hidden = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)[None, None]
    if layout is not None and layout.visible is not None:
        hidden = hidden | ~torch.from_numpy(layout.visible)[:, None, None]
    scores = torch.einsum("bthd,bshd->bhts", q * scale, k).masked_fill(hidden, torch.finfo(q.dtype).min)
    P = torch.softmax(scores, -1).masked_fill(hidden, 0)
    return torch.einsum("bhts,bshd->bthd", P, v), torch.logsumexp(scores, -1).transpose(1, 2)


@pytest.fixture(params=["written out", "opt_fast"], autouse=True)
def kernel(request, monkeypatch):
    """The attention that HF gets: torch's formula, and ours where it can be imported."""
    if request.param == "opt_fast":
        try:
            importlib.import_module("opt_fast.attention_cuda")
        except ImportError as error:
            pytest.skip(str(error))
    else:
        module = ModuleType("opt_fast.attention_cuda")
        module.attention_lse = written_out
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(opt_fast, "attention_cuda", module, raising=False)
    written_out.layouts = []
    hf.register()
    return request.param


def build(variant: str, attention: str, dtype: str = "float32"):
    """Always the same weights."""
    return reference.build(variant, dtype=dtype, attention=attention, scale=0.2)[0]


def assert_as_near(compute, real=None):
    """compute(attention, dtype) with ours is as close to float64 as with torch's, or within float32's rounding."""
    truth = compute("sdpa", "float64")
    ours, theirs = (reference.worst(compute(name, "float32").detach(), truth, real) for name in ("opt_fast", "sdpa"))
    assert ours <= max(2 * theirs, 1e-5), f"ours is off by {ours:.1e}, torch's by {theirs:.1e}"


@pytest.mark.parametrize("padding", reference.PADDINGS)
@pytest.mark.parametrize("variant", NORMS)
def test_logits(variant, padding):
    ids, mask = reference.batch(padding)
    given = reference.tensors(ids, mask)
    assert_as_near(lambda attention, dtype: build(variant, attention, dtype)(given[0], attention_mask=given[1]).logits, mask)


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
def test_tokens_after_a_cache(padding):
    """A prompt, then five tokens at once, then one."""
    ids, mask = reference.tensors(*reference.batch(padding))

    def compute(attention, dtype):
        model, past, found = build("pre_norm", attention, dtype), None, []
        for start, stop in ((0, 11), (11, 16), (16, 17)):
            out = model(ids[:, start:stop], attention_mask=None if mask is None else mask[:, :stop], past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.logits)
        return torch.cat(found, 1)

    assert_as_near(compute, mask)


@pytest.mark.parametrize("variant", NORMS)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_greedy_tokens(variant, padding):
    ids, mask = reference.tensors(*reference.batch(padding))
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    ours, theirs = (build(variant, name).generate(ids, attention_mask=mask, **options) for name in ("opt_fast", "sdpa"))
    assert ours[:, ids.shape[1] :].unique().numel() > 3, "a model that says one word proves little"
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("variant", NORMS)
def test_gradients(variant, padding):
    ids, mask = reference.tensors(*reference.batch(padding))
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)

    def gradients(attention, dtype):
        model = build(variant, attention, dtype)
        model.zero_grad()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    truth, ours, theirs = gradients("sdpa", "float64"), gradients("opt_fast", "float32"), gradients("sdpa", "float32")
    largest = max(float(g.abs().max()) for g in truth.values())
    for name, g in truth.items():
        error, allowed = (float((found[name] - g).abs().max()) for found in (ours, theirs))
        assert error <= max(2 * allowed, 1e-5 * largest), f"{name}: {error:.1e}, torch's {allowed:.1e}"


def test_a_folder_is_loaded_with_it_and_it_can_be_chosen_later(tmp_path):
    ids, mask = reference.tensors(*reference.batch("left"))
    build("pre_norm", "sdpa").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="opt_fast")
    later = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    before = later(ids, attention_mask=mask).logits
    later.set_attn_implementation("opt_fast")
    assert loaded.config._attn_implementation == later.config._attn_implementation == "opt_fast"
    assert torch.equal(loaded(ids, attention_mask=mask).logits, later(ids, attention_mask=mask).logits)
    np.testing.assert_allclose(*(x[mask == 1].detach() for x in (before, later(ids, attention_mask=mask).logits)), atol=1e-4)


@pytest.mark.parametrize("kernel", ["written out"], indirect=True)
def test_the_mask_crosses_to_the_host_once_a_pass_and_not_at_all_without_padding():
    model, (ids, mask) = build("pre_norm", "opt_fast"), reference.tensors(*reference.batch("left"))
    model(ids, attention_mask=mask)
    first, *others = written_out.layouts
    assert len(others) == model.config.num_hidden_layers - 1
    assert all(layout is first for layout in others)
    assert first.visible.dtype == np.bool_
    np.testing.assert_array_equal(first.visible, mask.numpy() == 1)
    for nothing in (None, torch.ones_like(ids)):
        written_out.layouts = []
        model(ids, attention_mask=nothing)
        assert [layout.visible for layout in written_out.layouts] == [None] * model.config.num_hidden_layers


def test_dropout_is_refused_in_training_only():
    keys = {**reference.SMALL, "attention_dropout": 0.1, "attn_implementation": "opt_fast"}
    model, ids = transformers.OPTForCausalLM(transformers.OPTConfig(**keys)), torch.tensor([[5, 6]])
    assert model.eval()(ids).logits.isfinite().all()
    with pytest.raises(
        ValueError, match=r"attention_dropout is 0\.1, and opt_fast's attention has none; load with attention_dropout=0\.0 or use 'sdpa'"
    ):
        model.train()(ids)


def test_weights_of_attention_are_refused():
    model, ids = build("pre_norm", "opt_fast"), torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match=r"never holds its weights; model\.set_attn_implementation\('eager'\)"):
        model(ids, output_attentions=True)
    assert len(model(ids, output_hidden_states=True).hidden_states) == 4
    with pytest.raises(ValueError, match="never holds its weights"):
        model.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


def test_a_mask_for_each_query_is_refused():
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 1, 3, 3\); opt_fast's attention is causal by itself and takes a mask of keys"):
        build("pre_norm", "opt_fast")(ids, attention_mask=torch.zeros(1, 1, 3, 3), position_ids=torch.arange(3)[None])


def test_a_cache_longer_than_what_it_holds_is_refused():
    with pytest.raises(ValueError, match=r"there are 6 keys for 3 tokens; use HF's default cache, DynamicCache"):
        build("pre_norm", "opt_fast").generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, cache_implementation="static")


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="this model is 'llama'; load it with attn_implementation='sdpa'"):
        hf.layout(SimpleNamespace(model_type="llama"), 3, 3)
