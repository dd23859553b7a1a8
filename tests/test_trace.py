"""Traces and costs: every step counted while it runs equals its closed form; every operation really does as many FLOPs as its formula gives; and a
planted change is found at its step."""

import json
import math

import numpy as np
import pytest
import small
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import VARIANTS, batch, build

from opt_np import OPTForCausalLM, OPTModel, cli, costs, ops, quantize, taps, trace
from opt_np.config import SIZES, OPTConfig, parameter_shapes
from opt_np.kv_cache import KVCache

STREAM = ("resid_pre", "resid_mid", "resid_post")


def model_of(variant, backend="numpy", dtype=None):
    hf, cfg, params = build(variant, dtype=dtype or ("float64" if backend == "numpy" else "float32"))
    return hf, OPTForCausalLM(params, cfg, backend)


def counts(step):
    return step.name, step.equation, tuple(step.shape), step.flops, step.weights, step.read, step.written


# Counted, and in closed form


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_costs_what_the_closed_form_says(variant, fused):
    _, model = model_of(variant)
    for B, T, past in ((1, 1, 0), (3, 12, 0), (2, 1, 9), (2, 5, 7)):
        ids, cache = batch("none", B, past + T)[0], KVCache()
        if past:
            model(ids[:, :past], past_key_values=cache)
        steps = trace.record(model, ids[:, past:], cache=cache, fused=fused, logits_to_keep=min(T, 2))
        formula = costs.steps(model.config, B, T, past, "float64", fused=fused, logits_to_keep=min(T, 2))
        expected = [c for c in formula if not (fused and c.name.endswith(STREAM))]  # the residual sums are no operation of a backend
        assert [counts(s) for s in steps] == [counts(c) for c in expected]


@given(T=st.integers(1, 20), B=st.integers(1, 3), past=st.integers(0, 10), keep=st.integers(0, 1), size=st.sampled_from([(16, 2, 24), (12, 3, 7)]))
def test_they_agree_for_any_size(T, B, past, keep, size):
    D, H, F = size
    cfg = small.config(hidden_size=D, num_attention_heads=H, ffn_dim=F)
    model, cache = OPTForCausalLM(small.params(cfg), cfg), KVCache()
    ids = small.ids(cfg, B, past + T)
    if past:
        model(ids[:, :past], past_key_values=cache)
    steps = trace.record(model, ids[:, past:], cache=cache, logits_to_keep=keep, values=False)
    assert [counts(s) for s in steps] == [counts(c) for c in costs.steps(cfg, B, T, past, logits_to_keep=keep)]


def test_padding_is_not_counted_in_attention():
    _, model = model_of("pre_norm")
    ids, mask = batch("left")
    scores = [s.flops for s in trace.record(model, ids, mask) if s.name.endswith("attn_scores")]
    alone = [sum(costs.pairs(1, int(n)) for n in mask.sum(1)) * 4 * 2 * 8 + ids.size * 32]
    assert scores == 3 * alone
    fused = [s.flops for s in trace.record(model, ids, mask, fused=True) if s.name.endswith("attn_output")]
    parts = [sum(s.flops for s in trace.record(model, ids, mask) if s.name.endswith(f"{i}.self_attn.{name}")) for i in range(3)
             for name in ("attn_scores", "attn_weights", "attn_output")]  # fmt: skip
    assert sum(fused) == sum(parts)


class Counted(np.ndarray):
    """An array that counts the numbers that go through every ufunc and einsum, and knows no rule."""

    flops = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        plain = [np.asarray(x) for x in inputs]
        if out is not None:
            kwargs["out"] = tuple(np.asarray(x) for x in out)
        y = getattr(ufunc, method)(*plain, **kwargs)
        numbers = 2 * plain[0].shape[-1] * y.size if ufunc is np.matmul else plain[0].size if method == "reduce" else np.broadcast(*plain).size
        Counted.flops += numbers
        if out is not None:
            return out[0]
        return y.view(Counted) if isinstance(y, np.ndarray) else y

    def __array_function__(self, function, types, args, kwargs):
        plain = [np.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
        if function is np.einsum:
            Counted.flops += 2 * plain[1].size
        y = function(*plain, **kwargs)
        return y.view(Counted) if isinstance(y, np.ndarray) else y


def really(operation, *args):
    Counted.flops = 0
    operation(*[a.view(Counted) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args])
    return Counted.flops


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape)


@pytest.mark.parametrize(("name", "args"), [
    ("linear", (normal(2, 5, 7), normal(6, 7), normal(6))), ("linear", (normal(2, 5, 7), normal(6, 7))),
    ("layer_norm", (normal(2, 5, 7), normal(7), normal(7))), ("layer_norm", (normal(2, 5, 7),)),
    ("activation", (normal(2, 5), "relu")), ("activation", (normal(2, 5), "gelu")), ("activation", (normal(2, 5), "gelu_new")),
    ("softmax", (normal(2, 3, 1, 9),)),
    ("attention_scores", (normal(2, 1, 3, 4), normal(2, 9, 3, 4), 0.5)),  # a query that sees all keys: nothing is computed and thrown away
])  # fmt: skip
def test_an_operation_does_as_many_flops_as_its_rule_says(name, args):
    y = getattr(ops, name)(*args)
    assert trace.WORK[name](y, *args).flops == really(getattr(ops, name), *args) > 0


def test_the_counting_array_counts():
    assert really(lambda a, b: a @ b, normal(2, 3), normal(3, 4)) == 2 * 2 * 3 * 4
    assert really(lambda a: a.sum(), normal(5)) == 5
    assert really(lambda a, b: a * b + b, normal(5), normal(5)) == 10


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_whole_numbers_cost_the_bytes_that_they_take(kind):
    cfg = small.config(hidden_size=64, ffn_dim=128)
    params, with_kind = quantize.quantized(small.params(cfg), cfg, kind)
    steps = trace.record(OPTForCausalLM(params, with_kind), small.ids(cfg))
    formula = costs.steps(cfg, 2, 9, kind=kind)
    assert [(s.name, s.flops, s.weights) for s in steps] == [(c.name, c.flops, c.weights) for c in formula]
    stored = sum(a.nbytes for a in trace_leaves(params))
    assert stored == costs.weight_bytes(cfg, kind=kind)


def trace_leaves(params):
    from opt_np.tree import flatten

    return flatten(params).values()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_cpu_backend_reads_the_bytes_of_its_dtype(dtype):
    cfg = small.config(hidden_size=64, ffn_dim=128, vocab_size=320, num_attention_heads=4)
    model = OPTForCausalLM(small.cast(small.params(cfg), dtype), cfg, "cpu")
    for fused in (False, True):
        steps = trace.record(model, small.ids(cfg), fused=fused)
        formula = [c for c in costs.steps(cfg, 2, 9, dtype=dtype, fused=fused) if not (fused and c.name.endswith(STREAM))]
        assert [counts(s) for s in steps] == [counts(c) for c in formula]


# Published sizes


PUBLISHED = {"125m": (125_239_296, 36), "350m": (331_196_416, 96), "1.3b": (1_315_758_080, 192), "2.7b": (2_651_596_800, 320),
             "6.7b": (6_658_473_984, 512), "13b": (12_853_473_280, 800), "30b": (29_974_540_288, 1344), "66b": (65_719_701_504, 2304),
             "175b": (174_604_468_224, 4608)}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_caches_of_the_published_sizes(size):
    cfg, (parameters, kib) = OPTConfig.from_size(size), PUBLISHED[size]
    assert costs.parameters(cfg) == parameters
    vectors = sum(math.prod(s) for s in parameter_shapes(cfg).values() if len(s) == 1)
    assert costs.weight_bytes(cfg) == 4 * parameters
    assert costs.weight_bytes(cfg, "float16") == 2 * (parameters + vectors)
    assert costs.cache_bytes(cfg, 1, 1, number=2) == kib * 1024


@pytest.mark.parametrize("size", SIZES)
def test_flops_of_a_token_are_twice_the_parameters_that_multiply_it(size):
    """The rule of thumb, made exact: 2 for each number of a matrix, 1 for each bias; the tables that are looked up multiply once, as the head."""
    cfg = OPTConfig.from_size(size)
    D, F, L, V, W = cfg.hidden_size, cfg.ffn_dim, cfg.num_hidden_layers, cfg.vocab_size, cfg.word_embed_proj_dim
    matrices = L * (4 * D * D + 2 * D * F) + V * W + (2 * D * W if W != D else 0)
    context = 2048
    products = 2 * matrices + 4 * L * D * context
    total = sum(c.flops for c in costs.steps(cfg, 1, 1, context - 1))
    assert products < total < 1.01 * products
    prompt = sum(c.flops for c in costs.steps(cfg, 1, context))
    assert math.isclose(prompt, context * (2 * matrices + 2 * L * D * context), rel_tol=0.03 if size == "125m" else 0.02)


# The trace itself


def test_a_trace_has_every_point_where_something_is_computed():
    _, model = model_of("like_350m")
    ids, mask = batch("right")
    steps = trace.record(model, ids, mask)
    _, cache = taps.run_with_cache(model, ids, attention_mask=mask)
    seen_before = {f"{taps.LAYER.format(i=i)}{end}" for i in range(3) for end in ("", ".resid_pre")} - {f"{taps.LAYER.format(i=0)}.resid_pre"}
    assert [s.name for s in steps] == [name for name in taps.names(model.config) if name not in seen_before]
    for step in steps:
        assert np.array_equal(step.value, cache[step.name])
        assert step.shape == step.value.shape
        assert step.dtype == "float64"
        assert step.bytes == step.weights + step.read + step.written
    assert all(s.value is None for s in trace.record(model, ids, values=False))
    assert [s.checksum for s in trace.record(model, ids, mask, values=False)] == [s.checksum for s in steps]


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_steps_are_what_the_model_runs(variant):
    _, model = model_of(variant, "cpu")
    ids, _ = batch("none")
    steps = trace.record(model, ids, fused=True)
    assert np.array_equal(steps[-1].value, model(ids).logits)
    unfused = {s.name for s in trace.record(model, ids)}
    assert {s.name for s in steps} <= unfused
    assert trace.compare(trace.record(model, ids), steps).first is None


# Where two traces part


@given(index=st.integers(0, 10**6), variant=st.sampled_from(["pre_norm", "like_350m"]), torch_too=st.booleans())
def test_a_planted_change_is_named(index, variant, torch_too):
    hf, model = model_of(variant)
    ids, mask = batch("left")
    right = trace.record_torch(hf, ids, mask) if torch_too else trace.record(model, ids, mask)
    names = [s.name for s in right]
    name = names[index % len(names)]
    wrong = trace.record(model, ids, mask, tap=lambda path, value: value * 1.001 if path == name else value)
    found = trace.compare(right, wrong)
    assert found.first is not None
    assert found.first.name == name
    assert name.removeprefix("model.decoder.") in found.verdict()
    assert all(row.error <= 1e-10 for row in found.rows[: names.index(name)])


@pytest.mark.parametrize(("op", "wrong", "name"), [
    ("layer_norm", lambda x, weight=None, bias=None: ops.layer_norm(x, weight, bias) * 1.0005, "layers.0.self_attn_layer_norm"),
    ("activation", lambda x, function: ops.activation(x, "gelu"), "layers.0.activation_fn"),
    ("attention_scores", lambda q, k, scale, layout=None: ops.attention_scores(q, k, 2 * scale, layout), "layers.0.self_attn.attn_scores"),
    ("softmax", lambda s: ops.softmax(s) + 1e-6, "layers.0.self_attn.attn_weights"),
    ("embed", lambda ids, weight: weight[ids - 1], "embed_tokens"),
])  # fmt: skip
def test_a_wrong_operation_is_named(op, wrong, name):
    _, model = model_of("pre_norm")
    right = trace.record(model, batch("none")[0])

    class Wrong:
        def __getattr__(self, other):
            return wrong if other == op else getattr(ops, other)

    model.ops = Wrong()
    assert trace.compare(right, trace.record(model, batch("none")[0])).first.name == f"model.decoder.{name}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_hugging_faces_steps_are_ours(variant):
    hf, model = model_of(variant)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())  # transformers has some of its own
    for padding in ("none", "left"):
        ids, mask = batch(padding)
        found = trace.compare(trace.record(model, ids, mask), trace.record_torch(hf, ids, mask))
        assert found.first is None, str(found)
        assert found.only_b == []
        assert len(found.rows) > 30
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())


def test_float32_and_a_fast_backend_differ_by_rounding_and_int8_from_the_first_matrix_on():
    cfg = small.config(hidden_size=64, ffn_dim=128)
    params, ids = small.params(cfg), small.ids(cfg)
    plain = trace.record(OPTForCausalLM(params, cfg), ids)
    exact = trace.record(OPTForCausalLM(small.cast(params, "float64"), cfg), ids)
    assert trace.compare(exact, plain).first is None
    assert trace.compare(exact, plain, allowed=1e-12).first is not None
    for fused in (False, True):
        assert trace.compare(plain, trace.record(OPTForCausalLM(params, cfg, "cpu"), ids, fused=fused)).first is None
    whole = trace.compare(plain, trace.record(OPTForCausalLM(*quantize.quantized(params, cfg, "int8")), ids))
    assert whole.first.name == "model.decoder.embed_tokens"
    assert all(row.error < 0.1 for row in whole.rows)


def test_checksums_alone_tell_equal_bits():
    _, model = model_of("pre_norm")
    ids, _ = batch("none")
    a, b = (trace.record(model, ids, values=False) for _ in range(2))
    assert trace.compare(a, b).first is None
    c = trace.record(model, ids, values=False, tap=lambda path, v: np.nextafter(v, 9) if path.endswith("1.fc1") else v)
    found = trace.compare(a, c)
    assert (found.first.name, found.first.error) == ("model.decoder.layers.1.fc1", math.inf)
    assert "layers.1.fc1 " in str(found)


def test_what_is_no_number_is_a_difference():
    _, model = model_of("pre_norm")
    ids, _ = batch("none")
    a = trace.record(model, ids)
    for bad in (np.nan, np.inf):
        found = trace.compare(a, trace.record(model, ids, tap=lambda path, v, bad=bad: v * bad if path.endswith("lm_head") else v))
        assert (found.first.name, found.first.error) == ("lm_head", math.inf)


def test_traces_that_cannot_be_compared_are_refused():
    _, model = model_of("pre_norm")
    a, b = trace.record(model, batch("none")[0]), trace.record(model, batch("none", T=5)[0])
    with pytest.raises(ValueError, match=r"different inputs: model.decoder.embed_tokens is \(3, 17, 32\) in one, \(3, 5, 32\) in the other"):
        trace.compare(a, b)
    with pytest.raises(ValueError, match="share no step"):
        trace.compare(a[:1], b[1:])
    with pytest.raises(ValueError, match="leave fused or tap out"):
        trace.record(model, batch("none")[0], fused=True, tap=lambda name, value: value)


def test_another_model_of_torch_is_refused():
    import transformers

    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=8))
    with pytest.raises(ValueError, match="GPT2LMHeadModel is no OPTForCausalLM of transformers"):
        trace.record_torch(gpt2, [[1, 2]])


def test_each_block_alone_tells_where_int8_loses():
    cfg = small.config(hidden_size=64, ffn_dim=128)
    params, ids = small.params(cfg), small.ids(cfg)
    exact, int8 = OPTForCausalLM(params, cfg), OPTForCausalLM(*quantize.quantized(params, cfg, "int8"))
    apart, alone = (trace.compare(trace.record(exact, ids), steps) for steps in (trace.record(int8, ids), trace.record_each(int8, exact, ids)))
    errors = {row.name: (row.error, one.error) for row, one in zip(apart.rows, alone.rows, strict=True)}
    assert errors["model.decoder.layers.0.resid_pre"][1] == 0  # what the first block reads is exact now, whatever the embeddings lost
    assert errors["model.decoder.layers.0.resid_pre"][0] > 1e-4
    assert 0 < errors["model.decoder.layers.1.resid_mid"][1] < errors["model.decoder.layers.1.resid_mid"][0]
    assert alone.worst.error == max(row.error for row in alone.rows)
    assert trace.compare(trace.record(exact, ids), trace.record_each(exact, exact, ids), allowed=0).first is None


def test_models_of_other_sizes_differ_by_their_shapes():
    a, b = (OPTForCausalLM(small.params(cfg), cfg) for cfg in (small.config(), small.config(hidden_size=8)))
    found = trace.compare(trace.record(a, small.ids(a.config)), trace.record(b, small.ids(a.config)))
    assert found.verdict().endswith("the first to differ is embed_tokens, (2, 9, 16) and (2, 9, 8)")
    assert "array" not in repr(found.first)


def test_half_precision_of_torch_can_be_recorded():
    hf, *_ = build("pre_norm", scale=0.11)  # of its own, for it is changed
    found = trace.record_torch(hf.to(torch.bfloat16), batch("none")[0])
    assert {s.dtype for s in found} == {"bfloat16"}
    assert found[0].value.dtype == np.float32


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(small.folder(tmp_path_factory.mktemp("model")))


def run(capsys, *words):
    status = cli.main(["trace", *words])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_shows_every_step_and_the_sums(capsys, folder, tmp_path):
    status, out, err = run(capsys, "the cat", "--model", folder, "--backend", "numpy", "--out", str(tmp_path / "values.npz"))
    assert (status, err) == (0, "")
    *lines, last = out.splitlines()
    assert last == f"{tmp_path / 'values.npz'}: the values of {len(lines) - 2} steps"
    assert lines[0].split()[:4] == ["step", "equation", "shape", "dtype"]
    assert [line.split()[0] for line in lines[1:-1]][-2:] == ["final_layer_norm", "lm_head"]
    steps = trace.record(*opened(folder))
    assert lines[-1] == trace.total(steps)
    values = np.load(tmp_path / "values.npz")
    assert np.array_equal(values["lm_head"], steps[-1].value)
    assert len(values) == len(steps) == len(lines) - 2


def opened(folder):
    from opt_np import OPTTokenizer

    model = OPTForCausalLM.from_pretrained(folder)
    return model, [OPTTokenizer.from_pretrained(folder).encode("the cat")]


@pytest.mark.parametrize(("against", "verdict"), [("cpu", "none differs"), ("float64", "none differs"), ("torch", "none differs"),
                                                  ("int8", "the first to differ is embed_tokens")])  # fmt: skip
def test_the_command_compares(capsys, folder, against, verdict):
    status, out, _ = run(capsys, "the cat", "--model", folder, "--backend", "numpy", "--against", against)
    assert status == 0
    assert verdict in out.splitlines()[-2]
    assert out.splitlines()[-1].startswith("the worst is ")
    assert ("<- first to differ" in out) == (verdict != "none differs")


def test_quantised_against_float_is_not_against_itself(capsys, folder, tmp_path):
    assert "the first to differ is embed_tokens" in run(capsys, "the cat", "--model", folder, "--quantize", "int8", "--against", "float32")[1]
    whole = tmp_path / "int8"
    assert cli.main(["quantize", folder, str(whole)]) == 0
    capsys.readouterr()
    status, _, err = run(capsys, "the cat", "--model", str(whole), "--against", "float32")
    assert (status, "the model is stored in int8, and has no float32 weights" in err) == (1, True)


def test_every_block_alone(capsys, folder):
    out = run(capsys, "the cat", "--model", folder, "--against", "int8", "--each")[1]
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines()}
    assert rows["layers.0.resid_pre"] == rows["layers.1.self_attn_layer_norm"] == "0.0e+00"


def test_two_models_side_by_side(capsys, folder, tmp_path):
    other = small.folder(tmp_path / "other", small.config(do_layer_norm_before=False, activation_function="gelu"))
    status, out, err = run(capsys, "the cat", "--model", folder, "--beside", str(other))
    assert (status, err) == (0, "")
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "activation relu gelu" in rows
    assert "LayerNorm before each branch after each sum" in rows
    assert any(row.startswith("layers.0.activation_fn u = relu(u)") and "u = gelu(u)" in row for row in rows)


@pytest.mark.parametrize("words", [["x", "--against", "int8", "--beside", "m"], ["x", "--model", "/not/there"], ["x", "--each"],
                                   ["x", "--fused", "--beside", "m"], ["x", "--out", "/not/there/x.npz"]])  # fmt: skip
def test_mistakes_are_told_in_a_line(capsys, folder, words):
    status, out, err = run(capsys, *words)
    assert (status, out) == (1, "")
    assert err.startswith("opt-np: ")
    assert err.count("\n") == 1


def test_a_model_without_a_head_is_traced_up_to_its_head_of_tokens():
    """OPTModel has the same parameters: a trace is of the language model."""
    _, cfg, params = build("pre_norm")
    assert trace.record(OPTModel(params, cfg), [[1, 2]])[-1].name == "lm_head"
    assert json.dumps(trace.record(OPTModel(params, cfg), [[1, 2]])[0]._replace(value=None))
