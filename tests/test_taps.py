"""Points, hooks, lens and attribution: both vocabularies reach every name, sums are what the model adds, and edits take effect where they should."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import PADDINGS, VARIANTS, batch, build, tensors, worst

from opt_np import OPTForCausalLM, lens, ops, taps


def model_of(variant, backend="numpy"):
    hf, cfg, params = build(variant, dtype="float64" if backend == "numpy" else "float32")
    return hf, OPTForCausalLM(params, cfg, backend)


def reached(model, ids, mask=None):
    found = []

    def tap(name, value):
        found.append(name)
        return value

    model(ids, mask, tap=tap)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_are_the_points_in_the_order_in_which_they_are_reached(variant):
    _, model = model_of(variant)
    assert reached(model, *batch("left")) == taps.names(model.config)
    assert set(taps.aliases(model.config).values()) <= set(taps.names(model.config))


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stream_is_the_sum_of_what_the_branches_add(variant, backend):
    _, model = model_of(variant, backend)
    ids, mask = batch("both")
    _, cache = taps.run_with_cache(model, ids, attention_mask=mask)
    pre = model.config.do_layer_norm_before
    for i in range(model.config.num_hidden_layers):
        assert np.array_equal(cache["resid_mid", i], cache["resid_pre", i] + cache["attn_out", i])
        between = cache["resid_mid", i] if pre else cache[f"blocks.{i}.ln1.hook_normalized"]
        assert np.array_equal(cache["resid_post", i], between + cache["mlp_out", i])
        out = cache[f"model.decoder.layers.{i}"]
        assert np.array_equal(out, cache["resid_post", i] if pre else cache[f"blocks.{i}.hook_normalized_resid_post"])
        if i:
            assert np.array_equal(cache["resid_pre", i], cache[f"model.decoder.layers.{i - 1}"])


def test_what_is_made_from_points_is_what_it_says():
    _, model = model_of("pre_norm")
    ids, _ = batch("none")
    _, cache = taps.run_with_cache(model, ids)
    p = model.params["layers"][1]
    assert np.allclose(cache["result", 1].sum(2) + p["self_attn"]["out_proj"]["bias"], cache["attn_out", 1], rtol=1e-12, atol=1e-12)
    x = cache["resid_pre", 1]
    normalized = (x - x.mean(-1, keepdims=True)) / cache["scale", 1, "ln1"] * p["self_attn_layer_norm"]["weight"] + p["self_attn_layer_norm"]["bias"]
    assert np.allclose(normalized, cache["normalized", 1, "ln1"], rtol=1e-12, atol=1e-12)
    x = cache["resid_mid", 1]
    assert np.allclose(cache["scale", 1, "ln2"] ** 2, x.var(-1, keepdims=True) + 1e-5)
    assert np.allclose(cache["ln_final.hook_scale"] ** 2, cache["resid_post", 2].var(-1, keepdims=True) + 1e-5)
    assert np.allclose(ops.softmax(cache["attn_scores", 1]), cache["pattern", 1], rtol=1e-13)
    assert cache["q", 1].shape == (*ids.shape, 4, 8)
    assert np.allclose(np.einsum("bthd,bshd->bhts", cache["q", 1], cache["k", 1])[:, :, -1] / 8**0.5, cache["attn_scores", 1][:, :, -1])
    assert np.allclose(np.einsum("bhts,bshd->bthd", cache["pattern", 1], cache["v", 1]), cache["z", 1])


def test_in_post_norm_a_layer_norm_reads_the_sum():
    _, model = model_of("like_350m")
    _, cache = taps.run_with_cache(model, batch("none")[0])
    assert np.allclose(cache["scale", 0, "ln1"] ** 2, cache["resid_mid", 0].var(-1, keepdims=True) + 1e-5)
    assert np.allclose(cache["scale", 0, "ln2"] ** 2, cache["resid_post", 0].var(-1, keepdims=True) + 1e-5)
    assert cache["hook_embed"].shape[-1] == model.config.hidden_size
    assert cache["model.decoder.embed_tokens"].shape[-1] == model.config.word_embed_proj_dim


def test_only_what_is_asked_for_is_kept():
    _, model = model_of("pre_norm")
    ids, _ = batch("none")
    logits, cache = taps.run_with_cache(model, ids, ["blocks.1.attn.hook_pattern", "model.decoder.layers.0.fc1", "blocks.2.ln1.hook_scale"])
    assert list(cache) == ["model.decoder.layers.0.fc1", "model.decoder.layers.1.self_attn.attn_weights", "model.decoder.layers.2.resid_pre"]
    assert cache["scale", 2, "ln1"].shape == (*ids.shape, 1)
    assert np.allclose(logits, model(ids).logits, rtol=1e-12, atol=1e-12)
    assert list(taps.run_with_cache(model, ids, "lm_head")[1]) == ["lm_head"]
    assert list(taps.run_with_cache(model, ids, lambda path: path.endswith("fc2"))[1]) == [f"model.decoder.layers.{i}.fc2" for i in range(3)]
    with pytest.raises(KeyError, match="was not kept"):
        cache["pattern", 0]
    with pytest.raises(KeyError, match=r"needs model.decoder.layers.0.resid_pre, which was not kept"):
        cache["scale", 0, "ln1"]


@pytest.mark.parametrize("name", ["blocks.3.attn.hook_z", "blocks.0.hook_resid", "model.decoder.layers.0.q_proj"])
def test_an_unknown_name_is_refused_with_those_near_it(name):
    _, model = model_of("pre_norm")
    with pytest.raises(ValueError, match=r"is no point of this model; near it are \S+, \S+, \S+ \("):
        taps.run_with_hooks(model, batch("none")[0], [(name, lambda x, _: x)])


# Editing


@given(index=st.integers(0, 10**6), variant=st.sampled_from(["pre_norm", "like_350m"]))
def test_an_edit_changes_what_comes_after_and_nothing_before(index, variant):
    _, model = model_of(variant)
    ids, _ = batch("none")
    names = taps.names(model.config)
    name = names[index % len(names)]
    _, before = taps.run_with_cache(model, ids)
    edited = taps.hooked([(name, lambda x, _: 1.5 * x + 0.25)], model.config)
    after: dict = {}

    def tap(path, value):
        value = edited(path, value)
        after[path] = value.copy()
        return value

    logits = model(ids, tap=tap).logits
    for path in names[: names.index(name)]:
        assert np.array_equal(before[path], after[path]), path
    assert np.array_equal(after[name], 1.5 * before[name] + 0.25)
    assert (not np.allclose(logits, before["lm_head"])) or name.endswith("attn_scores")  # softmax forgives a shift, not a factor
    assert not np.allclose(logits, before["lm_head"])


def test_hooks_run_in_order_edit_in_place_or_return_and_see_the_name_they_gave():
    _, model = model_of("pre_norm")
    ids, _ = batch("none")
    seen = []

    def first(z, name):
        seen.append((name, z.shape))
        z[:, :, 1] = 0

    def second(z, name):
        seen.append((name, bool(z[:, :, 1].any())))
        return z

    q = []
    pairs = [("blocks.0.attn.hook_z", first), ("model.decoder.layers.0.self_attn.attn_output", second),
             ("blocks.0.attn.hook_q", lambda x, name: q.append(x.shape)),
             (lambda path: path.endswith("0.fc1"), lambda x, name: seen.append(name))]  # fmt: skip
    taps.run_with_hooks(model, ids, pairs)
    assert seen == [("blocks.0.attn.hook_z", (3, 17, 4, 8)), ("model.decoder.layers.0.self_attn.attn_output", False), "model.decoder.layers.0.fc1"]
    assert q == [(3, 17, 4, 8)]
    with pytest.raises(ValueError, match=r"hook at blocks.0.attn.hook_z returned float64\(3, 17, 4, 1\); the value there is float64\(3, 17, 4, 8\)"):
        taps.run_with_hooks(model, ids, [("blocks.0.attn.hook_z", lambda z, _: z[..., :1])])


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_a_head_without_its_output_is_a_head_without_its_columns(backend):
    """Ablation by a hook equals ablation of the weights."""
    _, model = model_of("like_350m", backend)
    hf, cfg, params = build("like_350m", dtype=np.asarray(model(batch("none")[0]).logits).dtype.name)
    ids, mask = batch("left")

    def without_head_2(z, name):
        z[:, :, 2] = 0

    ablated = taps.run_with_hooks(model, ids, [("blocks.1.attn.hook_z", without_head_2)], attention_mask=mask)
    layers = [dict(layer) for layer in params["layers"]]
    out_proj = layers[1]["self_attn"]["out_proj"]
    weight = out_proj["weight"].copy()
    weight[:, 2 * cfg.head_dim : 3 * cfg.head_dim] = 0
    layers[1]["self_attn"] = {**layers[1]["self_attn"], "out_proj": {**out_proj, "weight": weight}}
    expected = OPTForCausalLM({**params, "layers": layers}, cfg)(ids, mask).logits
    assert worst(ablated, expected, mask) < (1e-12 if backend == "numpy" else 1e-5)
    assert worst(ablated, hf(*tensors(ids, mask)).logits, mask) > 1e-3


def test_patching_in_the_whole_stream_gives_the_other_run():
    """Activation patching: what a layer read in the one run, put into the other, brings back all of it; one position of it, some."""
    _, model = model_of("pre_norm")
    clean, corrupt = batch("none")[0], batch("none", seed=1)[0]
    logits, cache = taps.run_with_cache(model, clean)
    patched = taps.run_with_hooks(model, corrupt, [("blocks.1.hook_resid_pre", lambda x, name: cache[name])])
    assert np.array_equal(patched, logits)

    def one_position(x, name):
        x[:, 5] = cache[name][:, 5]

    partly = taps.run_with_hooks(model, corrupt, [("blocks.1.hook_resid_pre", one_position)])
    without = model(corrupt).logits
    assert np.allclose(partly[:, :5], without[:, :5], rtol=1e-12, atol=1e-12)
    assert not np.allclose(partly[:, 5:], without[:, 5:])


def test_values_that_are_kept_are_copies():
    _, model = model_of("pre_norm")
    _, cache = taps.run_with_cache(model, batch("none")[0])
    saved = cache["pattern", 0].copy()
    cache["attn_scores", 0][:] = 0
    cache["resid_pre", 0][:] = 0
    assert np.array_equal(cache["pattern", 0], saved)


# Lens and attribution


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_lens_reads_each_layer_with_the_models_own_head(variant):
    hf, model = model_of(variant)
    ids, mask = batch("left")
    found = list(lens.logit_lens(model, ids, attention_mask=mask))
    assert [name for name, _ in found] == ["embeddings", "layer 0", "layer 1", "layer 2"]
    assert np.array_equal(found[-1][1], model(ids, mask).logits)
    import torch

    with torch.no_grad():
        states = hf(*tensors(ids, mask), output_hidden_states=True).hidden_states
        d = hf.model.decoder
        for (_, logits), x in zip(found[:-1], states[:-1], strict=True):
            h = d.final_layer_norm(x) if d.final_layer_norm is not None else x
            h = d.project_out(h) if d.project_out is not None else h
            assert worst(logits, hf.lm_head(h), mask) < 1e-11


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attribution_adds_up_to_the_logits(variant, heads):
    _, model = model_of(variant)
    for padding in PADDINGS:
        ids, mask = batch(padding)
        logits = model(ids, mask).logits
        real = np.ones(ids.shape, int) if mask is None else mask
        whole = [c for c in range(ids.shape[1]) if real[:, c].all()]  # columns without padding
        ends = ids.shape[1] - 1 - real[:, ::-1].argmax(1)
        for position, columns in ((-1, ends), (whole[0], whole[0]), (whole[-1] - ids.shape[1], whole[-1])):
            parts = lens.attribution(model, ids, [3, 50, 98], position, heads, attention_mask=mask)
            expected = logits[np.arange(len(ids)), columns][:, [3, 50, 98]]
            assert np.allclose(sum(parts.values()), expected, rtol=1e-11, atol=1e-12)
    assert len([name for name in parts if "head" in name]) == (3 * model.config.num_attention_heads if heads else 0)


@pytest.mark.parametrize(("position", "said"), [(17, "position is 17; it is a column from 0 to 16"), (-18, "-18"), (None, "position is None"),
                                                (0, "column 0 of row 1 is padding"), ([0, 1], "position is")])  # fmt: skip
def test_attribution_of_no_token_is_refused(position, said):
    _, model = model_of("pre_norm")
    ids, mask = batch("left")
    with pytest.raises(ValueError, match=said):
        lens.attribution(model, ids, [3], position, attention_mask=mask)


def test_attribution_says_what_a_part_does():
    """In a model without final norm, removing the last mlp takes away exactly what was attributed to it."""
    _, model = model_of("no_final_norm")
    ids, _ = batch("none")
    parts = lens.attribution(model, ids, [7])
    without = taps.run_with_hooks(model, ids, [("blocks.2.hook_mlp_out", lambda x, name: 0 * x)])
    assert np.allclose((model(ids).logits - without)[:, -1, [7]], parts["layer 2 mlp"], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_packed_and_quantised_models_can_be_looked_into(backend):
    from opt_np.quantize import quantized

    _, cfg, params = build("like_350m", dtype="float32")
    model = OPTForCausalLM(*quantized(params, cfg, "int8"), backend)
    ids, mask = batch("left")
    parts = lens.attribution(model, ids, [3, 50], heads=True, attention_mask=mask)
    logits = np.asarray(model(ids, mask).logits)[:, -1][:, [3, 50]]
    assert np.allclose(sum(parts.values()), logits, rtol=2e-3, atol=2e-3 * np.abs(logits).max())  # each head is rounded anew in 8-bit products
    assert np.allclose(list(lens.logit_lens(model, ids, attention_mask=mask))[-1][1], model(ids, mask).logits)


@pytest.mark.parametrize("tokens", [[99], [-1], [1.5], [[1, 2]]])
def test_attribution_of_what_is_no_token_is_refused(tokens):
    _, model = model_of("pre_norm")
    with pytest.raises(ValueError, match="it lists ids from 0 to 98"):
        lens.attribution(model, batch("none")[0], tokens)


def test_filters_know_both_vocabularies_and_must_mean_something():
    _, model = model_of("pre_norm")
    ids, _ = batch("none")
    _, cache = taps.run_with_cache(model, ids, lambda name: name.endswith("hook_pattern"))
    assert len(cache) == 3
    seen = []
    taps.run_with_hooks(model, ids, [(lambda name: name.endswith("hook_q"), lambda q, name: seen.append((name, q.shape)))])
    assert seen == [(f"blocks.{i}.attn.hook_q", (3, 17, 4, 8)) for i in range(3)]
    for call in (taps.run_with_cache, lambda *a: taps.run_with_hooks(a[0], a[1], [(a[2], lambda x, _: x)])):
        with pytest.raises(ValueError, match="true for no point's name"):
            call(model, ids, lambda name: name.endswith("hook_patern"))


def test_short_forms_do_everywhere_and_the_cache_knows_what_it_has():
    _, model = model_of("pre_norm")
    ids, _ = batch("none")
    _, cache = taps.run_with_cache(model, ids, names_filter=[("pattern", 1), ("scale", 1, "ln1")])
    assert ("pattern", 1) in cache
    assert "blocks.1.attn.hook_pattern" in cache
    assert ("scale", 1, "ln1") in cache
    assert ("pattern", 0) not in cache
    assert "nonsense" not in cache
    assert cache.get("blocks.0.attn.hook_pattern") is None
    assert cache.get(("pattern", 1)) is cache["pattern", 1]
    zero = taps.run_with_hooks(model, ids, [(("z", 1), lambda z, _: 0 * z)])
    assert not np.allclose(zero, model(ids).logits)
    with pytest.raises(ValueError, match=r"\('z',\) is no name of a point"):
        taps.run_with_hooks(model, ids, [(("z",), lambda z, _: z)])


@pytest.mark.parametrize(("hook", "said"), [(lambda z, _: z.astype("float32"), "returned float32"), (lambda z, _: 3.0, "returned float;"),
                                            (lambda z, _: z.tolist(), "returned list;")])  # fmt: skip
def test_what_a_hook_may_return(hook, said):
    _, model = model_of("pre_norm")
    with pytest.raises(ValueError, match=said):
        taps.run_with_hooks(model, batch("none")[0], [(("z", 1), hook)])


def test_what_cannot_be_replaced_or_returned_says_so():
    _, model = model_of("pre_norm")
    ids, _ = batch("none")
    with pytest.raises(ValueError, match=r"blocks.1.attn.hook_result is made from other points"):
        taps.run_with_hooks(model, ids, [("blocks.1.attn.hook_result", lambda x, _: x)])
    with pytest.raises(ValueError, match=r"call model\(ids, labels=ids, tap="):
        taps.run_with_hooks(model, ids, [], labels=ids)
    hooks = [(("z", 1), lambda z, _: 0 * z)]
    assert model(ids, labels=ids, tap=taps.hooked(hooks, model.config)).loss != model(ids, labels=ids).loss


def test_negative_layers_short_embeddings_copies_and_dicts_of_hooks():
    import copy
    import pickle

    _, model = model_of("pre_norm")
    ids, _ = batch("none")
    _, cache = taps.run_with_cache(model, ids)
    assert cache["pattern", -1] is cache["pattern", 2]
    assert cache["embed"] is cache["hook_embed"]
    assert np.array_equal(cache["scale", -1, "ln2"], cache["blocks.2.ln2.hook_scale"])
    for same in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
        assert type(same) is dict
        assert list(same) == list(cache)
    by_dict = taps.run_with_hooks(model, ids, {"blocks.1.attn.hook_z": lambda z, _: 0 * z})
    assert np.array_equal(by_dict, taps.run_with_hooks(model, ids, [(("z", 1), lambda z, _: 0 * z)]))
    with pytest.raises(ValueError, match="hooks are a list of pairs"):
        taps.run_with_hooks(model, ids, ("blocks.1.attn.hook_z", lambda z, _: z))


@pytest.mark.parametrize("name", ["ln1.hook_scale", "blocks.x2.mlp.ln2.hook_scale", "blocks.9.ln1.hook_scale", "blocks.2.attn.ln1.hook_scale"])
def test_a_cache_makes_nothing_up(name):
    _, model = model_of("pre_norm")
    _, cache = taps.run_with_cache(model, batch("none")[0])
    with pytest.raises(ValueError, match="no point of this model"):
        cache[name]


def test_models_without_a_head_of_tokens_say_so():
    from opt_np import OPTModel

    _, cfg, params = build("pre_norm", "base")
    for call in (taps.run_with_cache, lambda model, ids: taps.run_with_hooks(model, ids, [])):
        with pytest.raises(ValueError, match="OPTModel gives no logits of tokens; use OPTForCausalLM, or pass tap="):
            call(OPTModel(params, cfg), batch("none")[0])
