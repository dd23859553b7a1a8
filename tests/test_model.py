"""The model equals HF's, hidden state by hidden state: first the structure in float64, then the precision in float32."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import PADDINGS, VARIANTS, batch, build, tensors, worst

import opt_np
from opt_np import model
from opt_np import ops as numpy_ops
from opt_np.classes import OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification, OPTModel
from opt_np.kv_cache import KVCache
from opt_np.reader import Reader, Reading
from opt_np.tree import flatten, map_leaves, unflatten

EXACT = 1e-12  # of the largest value: float64 leaves room for rounding alone


def first_divergence(ours: list, theirs: tuple, mask) -> str:
    """Which hidden state differs first, for the message of a failing test."""
    errors = [worst(a, b, mask) for a, b in zip(ours, theirs, strict=True)]
    return "hidden states: " + ", ".join(
        f"{i}: {e:.1e}{' <- first to differ' if e > EXACT >= max(errors[:i], default=0) else ''}" for i, e in enumerate(errors)
    )


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_every_hidden_state_equal_hf(variant, padding):
    hf, cfg, params = build(variant)
    ids, mask = batch(padding)
    theirs = hf(*tensors(ids, mask), output_hidden_states=True)
    ours = []
    logits = model.forward(params, ids, cfg, attention_mask=mask, hidden_states=ours)
    assert len(ours) == len(theirs.hidden_states) == cfg.num_hidden_layers + 1
    for a, b in zip(ours, theirs.hidden_states, strict=True):
        assert worst(a, b, mask) <= EXACT, first_divergence(ours, theirs.hidden_states, mask)
    assert worst(logits, theirs.logits, mask) <= EXACT


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_error_is_at_most_twice_torchs_own(variant):
    _, cfg, params = build(variant)
    hf32, _, params32 = build(variant, dtype="float32")
    ids, mask = batch("left")
    exact = model.forward(params, ids, cfg, attention_mask=mask)
    ours = model.forward(params32, ids, cfg, attention_mask=mask)
    theirs = hf32(*tensors(ids, mask)).logits.detach().numpy()
    real = mask != 0
    assert ours.dtype == np.float32
    rms = [np.sqrt(((a - exact)[real] ** 2).mean()) for a in (ours, theirs)]
    assert rms[0] <= 2 * rms[1]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", ["pre_norm", "like_350m"])
def test_attentions_equal_hfs_eager_ones(variant, padding):
    hf, cfg, params = build(variant, dtype="float32", attention="eager")  # HF's eager mask gives NaN in float64
    ids, mask = batch(padding)
    theirs = hf(*tensors(ids, mask), output_attentions=True).attentions
    out = OPTForCausalLM(params, cfg)(ids, attention_mask=mask, output_attentions=True)
    rows = np.ones(ids.shape) if mask is None else mask
    for ours, other in zip(out.attentions, theirs, strict=True):
        seen = np.broadcast_to(rows[:, None, :, None], ours.shape)
        assert worst(ours, other, seen) < 1e-5
        assert np.allclose(ours.sum(-1)[rows[:, None].repeat(ours.shape[1], 1) != 0], 1, rtol=1e-5)
        assert not ours[:, :, np.triu(np.ones(ours.shape[-2:], bool), 1)].any()  # the future has no weight


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1, 2, 7, 17])
def test_cached_equals_uncached(variant, chunk):
    _, cfg, params = build(variant)
    ids, mask = batch("left")
    whole = model.forward(params, ids, cfg, attention_mask=mask)
    cache, parts = KVCache(), []
    for start in range(0, ids.shape[1], chunk):
        end = min(start + chunk, ids.shape[1])
        parts.append(model.forward(params, ids[:, start:end], cfg, cache, mask[:, :end]))
    assert cache.length == ids.shape[1]
    assert worst(np.concatenate(parts, axis=1), whole, mask) <= EXACT


def test_explicit_positions_equal_hfs_and_take_the_offset():
    hf, cfg, params = build("pre_norm")
    ids, _ = batch("none")
    positions = np.random.default_rng(1).integers(0, cfg.max_position_embeddings, ids.shape)
    theirs = hf(torch.tensor(ids), position_ids=torch.tensor(positions)).logits
    assert worst(model.forward(params, ids, cfg, position_ids=positions), theirs) <= EXACT


def test_position_rows_zero_is_never_read_and_row_one_only_by_pads():
    _, cfg, params = build("pre_norm")
    poisoned = map_leaves(np.copy, params)
    poisoned["embed_positions"]["weight"][0] = np.nan
    ids, mask = batch("left")
    assert np.isfinite(model.forward(poisoned, ids, cfg, attention_mask=mask)).all()
    poisoned["embed_positions"]["weight"][1] = 1e3  # visible at pads, and nowhere else
    assert worst(model.forward(poisoned, ids, cfg, attention_mask=mask), model.forward(params, ids, cfg, attention_mask=mask), mask) <= EXACT


def test_pad_tokens_without_a_mask_are_ordinary_tokens():
    hf, cfg, params = build("pre_norm")
    ids, _ = batch("left")
    assert worst(model.forward(params, ids, cfg), hf(torch.tensor(ids)).logits) <= EXACT


@pytest.mark.parametrize("dtype", [np.bool_, np.int32, np.float32])
def test_a_mask_may_be_bool_int_or_float(dtype):
    _, cfg, params = build("pre_norm")
    ids, mask = batch("both")
    assert np.array_equal(model.forward(params, ids, cfg, attention_mask=mask.astype(dtype)), model.forward(params, ids, cfg, attention_mask=mask))


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), left=st.booleans(), extra=st.integers(0, 3), seed=st.integers(0, 99))
def test_a_padded_row_equals_the_row_alone(lengths, left, extra, seed):
    _, cfg, params = build("like_350m" if seed % 2 else "pre_norm")
    rng = np.random.default_rng(seed)
    rows, T = [rng.integers(4, 99, n) for n in lengths], max(lengths) + extra
    ids, mask = np.ones((len(rows), T), np.int64), np.zeros((len(rows), T), np.int64)
    for b, row in enumerate(rows):
        where = slice(T - len(row), T) if left else slice(len(row))
        ids[b, where], mask[b, where] = row, 1
    together = model.forward(params, ids, cfg, attention_mask=mask)
    for b, row in enumerate(rows):
        assert worst(together[b][mask[b] != 0], model.forward(params, row[None], cfg)[0]) <= EXACT


@given(cut=st.integers(1, 16), seed=st.integers(0, 99))
def test_no_token_sees_its_future(cut, seed):
    _, cfg, params = build("pre_norm")
    ids, _ = batch("none", seed=seed)
    changed = ids.copy()
    changed[:, cut:] = np.random.default_rng(seed + 1).integers(4, 99, changed[:, cut:].shape)
    assert np.array_equal(model.forward(params, ids, cfg)[:, :cut], model.forward(params, changed, cfg)[:, :cut])


def test_a_row_of_pads_gives_numbers_and_disturbs_no_other():
    _, cfg, params = build("pre_norm")
    ids, mask = batch("left")
    mask[1] = 0
    logits = model.forward(params, ids, cfg, attention_mask=mask)
    assert np.isfinite(logits).all()
    assert worst(logits[[0, 2]], model.forward(params, ids[[0, 2]], cfg, attention_mask=mask[[0, 2]]), mask[[0, 2]]) <= EXACT


def test_huge_weights_give_no_nan():
    _, cfg, params = build("pre_norm", dtype="float32")
    huge = map_leaves(lambda a: a * np.float32(1e3), params)
    ids, mask = batch("left")
    assert np.isfinite(model.forward(huge, ids, cfg, attention_mask=mask)).all()


def test_the_last_position_is_usable_and_one_more_token_is_an_error():
    hf, cfg, params = build("pre_norm")
    ids = np.random.default_rng(0).integers(4, 99, (1, 40))
    assert worst(model.forward(params, ids, cfg), hf(torch.tensor(ids)).logits) <= EXACT
    with pytest.raises(ValueError, match="max_position_embeddings=40"):
        model.forward(params, np.append(ids, [[5]], axis=1), cfg)
    cache = KVCache()
    model.forward(params, ids, cfg, cache)
    with pytest.raises(ValueError, match="max_position_embeddings=40"):
        model.forward(params, [[5]], cfg, cache)


def test_pads_do_not_count_against_the_context():
    _, cfg, params = build("pre_norm")
    ids = np.random.default_rng(0).integers(4, 99, (1, 50))
    mask = np.ones((1, 50), int)
    mask[0, :10] = 0
    assert worst(model.forward(params, ids, cfg, attention_mask=mask)[:, 10:], model.forward(params, ids[:, 10:], cfg)) <= EXACT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[5, 99]]}, "vocab_size=99"),
        ({"input_ids": [[-1]]}, "hold -1"),
        ({"input_ids": [5, 6]}, r"pass \[ids\]"),
        ({"input_ids": [[]]}, "input_ids"),
        ({"input_ids": [[5.5]]}, "whole numbers"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, r"\(1, 1\).*\(1, 2\)"),
        ({"input_ids": [[5, 6]], "attention_mask": [[2, 1]]}, "other than 0"),
        ({"input_ids": [[5, 6]], "position_ids": [[0, 40]]}, "position 40"),
        ({"input_ids": [[5, 6]], "position_ids": [[-2, 0]]}, "position -2"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    _, cfg, params = build("pre_norm")
    with pytest.raises(ValueError, match=message):
        model.forward(params, cfg=cfg, **arguments)


def test_a_cache_of_another_batch_or_model_is_refused():
    _, cfg, params = build("pre_norm")
    ids, _ = batch("none")
    cache = KVCache()
    model.forward(params, ids, cfg, cache)
    with pytest.raises(ValueError, match="holds 3 rows"):
        model.forward(params, ids[:1, :2], cfg, cache)
    deeper = {**params, "layers": [*params["layers"], params["layers"][0]]}
    with pytest.raises(ValueError, match="another model"):
        model.forward(deeper, ids[:, :2], cfg, cache.fork())


@pytest.mark.parametrize("positions", [[[0, 1, 2]] * 3, [[0, 1, 2, 3]], [[0.0, 1.0]]])
def test_positions_of_another_shape_or_kind_are_refused(positions):
    _, cfg, params = build("pre_norm")
    with pytest.raises(ValueError, match="position_ids is"):
        model.forward(params, [[5, 6]], cfg, position_ids=positions)


def test_rows_of_different_lengths_are_refused_with_the_way_out():
    _, cfg, params = build("pre_norm")
    with pytest.raises(ValueError, match=r"input_ids has rows of 1 to 2 tokens; pad them"):
        model.forward(params, [[5, 6], [7]], cfg)
    with pytest.raises(ValueError, match="attention_mask has rows of 1 to 2"):
        model.forward(params, [[5, 6], [7, 8]], cfg, attention_mask=[[1, 1], 1])
    with pytest.raises(ValueError, match="labels has rows of 1 to 2"):
        OPTForCausalLM(params, cfg)([[5, 6], [7, 8]], labels=[[5, 6], [7]])


def test_logits_to_keep():
    _, cfg, params = build("pre_norm")
    ids, _ = batch("none")
    every = model.forward(params, ids, cfg)
    for keep in (3, np.int64(3)):
        assert np.allclose(model.forward(params, ids, cfg, logits_to_keep=keep), every[:, -3:], rtol=1e-12)
    assert np.allclose(model.forward(params, ids, cfg, logits_to_keep=np.array([0, 5])), every[:, [0, 5]], rtol=1e-12)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_block_may_go_on_with_the_last_tokens_alone(variant, padding):
    """Also after others; and what comes later finds all keys and values in the cache."""
    _, cfg, params = build(variant)
    ids, mask = batch(padding)
    whole, parts = KVCache(), KVCache()
    for start, end in ((0, 5), (5, ids.shape[1] - 1), (ids.shape[1] - 1, ids.shape[1])):
        every = model.last_hidden_state(params, ids[:, start:end], cfg, whole, mask[:, :end])
        for keep in (1, 2, end):
            cache = parts.fork()
            some = model.last_hidden_state(params, ids[:, start:end], cfg, cache, mask[:, :end], kept=np.s_[:, -keep:])
            assert some.shape[1] == min(keep, end - start)
            assert np.allclose(some, every[:, -keep:], rtol=1e-10, atol=1e-12)
        parts = cache
        assert parts.length == end


def test_a_prompts_last_block_computes_what_is_asked_for():
    _, cfg, params = build("pre_norm")
    ids, _ = batch("none")
    seen = []
    ops = SimpleNamespace(**{**vars(numpy_ops), "mlp": lambda h, *rest: seen.append(h.shape[1]) or numpy_ops.mlp(h, *rest)})
    for hidden, last in ((False, 1), (True, ids.shape[1])):
        seen.clear()
        h, logits = Reader(params, cfg, ops, 0)(Reading(ids, np.ones_like(ids), hidden=hidden))
        assert seen == [*[ids.shape[1]] * (cfg.num_hidden_layers - 1), last]
        assert h.shape[1] == last
        assert np.allclose(logits, model.forward(params, ids, cfg)[:, -1], rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_looking_changes_nothing_and_every_point_has_its_name(variant):
    _, cfg, params = build(variant)
    ids, mask = batch("left")
    seen = {}
    looked = model.forward(params, ids, cfg, attention_mask=mask, tap=lambda name, value: seen.setdefault(name, value))
    assert worst(looked, model.forward(params, ids, cfg, attention_mask=mask)) <= EXACT
    for name in (
        "self_attn.q_proj",
        "self_attn.attn_weights",
        "self_attn",
        "fc1",
        "activation_fn",
        "fc2",
        "self_attn_layer_norm",
        "final_layer_norm",
    ):
        assert f"model.decoder.layers.2.{name}" in seen
    assert np.array_equal(seen["lm_head"], looked)


def test_a_tap_can_edit():
    _, cfg, params = build("pre_norm")
    ids, _ = batch("none")
    without = map_leaves(np.copy, params)
    without["layers"][1]["self_attn"]["out_proj"] = map_leaves(np.zeros_like, without["layers"][1]["self_attn"]["out_proj"])
    ablated = model.forward(params, ids, cfg, tap=lambda name, value: value * 0 if name == "model.decoder.layers.1.self_attn" else value)
    assert worst(ablated, model.forward(without, ids, cfg)) <= EXACT


@pytest.mark.parametrize("variant", ["pre_norm", "like_350m"])
def test_tap_names_hold_what_hfs_modules_of_that_name_return(variant):
    hf, cfg, params = build(variant)
    ids, mask = batch("left")
    ours, theirs, handles = {}, {}, []
    for name, module in hf.named_modules():
        handles.append(module.register_forward_hook(lambda m, i, o, name=name: theirs.__setitem__(name, o[0] if isinstance(o, tuple) else o)))
    hf(*tensors(ids, mask))
    [handle.remove() for handle in handles]
    model.forward(params, ids, cfg, attention_mask=mask, tap=lambda name, value: ours.setdefault(name, value))
    shared = set(ours) & set(theirs)
    assert len(shared) >= 3 * 9 + 4
    for name in shared:
        assert worst(ours[name], theirs[name].reshape(ours[name].shape), mask) <= EXACT, name


# ---- the classes -------------------------------------------------------------------------------------------------------------------------


def test_causal_lm_class_returns_what_hf_returns():
    hf, cfg, params = build("like_350m")
    ids, mask = batch("left")
    labels = np.where(mask, ids, -100)
    theirs = hf(*tensors(ids, mask), labels=torch.tensor(labels), output_hidden_states=True)
    out = OPTForCausalLM(params, cfg)(ids.tolist(), attention_mask=mask.tolist(), labels=labels.tolist(), output_hidden_states=True, use_cache=True)
    assert worst(out.logits, theirs.logits, mask) <= EXACT
    assert abs(out.loss - theirs.loss.item()) < 1e-6  # HF computes the loss in float32
    assert [h.shape for h in out.hidden_states] == [tuple(h.shape) for h in theirs.hidden_states]
    assert out.past_key_values.length == ids.shape[1]
    assert out.attentions is None


def test_past_key_values_continue_a_row():
    _, cfg, params = build("pre_norm")
    ids, mask = batch("left")
    lm = OPTForCausalLM(params, cfg)
    first = lm(ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
    second = lm(ids[:, 9:], attention_mask=mask, past_key_values=first.past_key_values)
    assert worst(second.logits, lm(ids, attention_mask=mask).logits[:, 9:], mask[:, 9:]) <= EXACT


def test_base_model_returns_the_last_hidden_state():
    hf, cfg, params = build("like_350m", "base")
    ids, mask = batch("right")
    assert worst(OPTModel(params, cfg)(ids, attention_mask=mask).last_hidden_state, hf(*tensors(ids, mask)).last_hidden_state, mask) <= EXACT


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("num_labels", "problem_type"), [(1, None), (3, None), (3, "multi_label_classification"), (2, "regression")])
def test_classification_equals_hf(padding, num_labels, problem_type):
    hf, cfg, params = build("like_350m", "classify", num_labels=num_labels, problem_type=problem_type)
    ids, mask = batch(padding)
    rng = np.random.default_rng(0)
    if num_labels == 1:
        labels = rng.normal(size=3)
    else:
        labels = rng.integers(0, num_labels, 3) if problem_type is None else rng.integers(0, 2, (3, num_labels)).astype(float)
    theirs = hf(*tensors(ids, mask), labels=torch.tensor(labels))
    out = OPTForSequenceClassification(params, cfg)(ids, attention_mask=mask, labels=labels)
    assert worst(out.logits, theirs.logits) <= EXACT
    assert out.loss == pytest.approx(theirs.loss.item(), rel=1e-12)


@pytest.mark.parametrize("ids", [[[1, 1, 1]], [[5, 1, 6]], [[1, 7, 8]], [[5, 6, 1]], [[5, 6, 7]]])
def test_classification_reads_the_rightmost_token_that_is_no_pad(ids):
    hf, cfg, params = build("pre_norm", "classify", num_labels=3)
    assert worst(OPTForSequenceClassification(params, cfg)(ids).logits, hf(torch.tensor(ids)).logits) <= EXACT


def test_classification_without_a_pad_id_takes_one_row_only():
    hf, cfg, params = build("pre_norm", "classify", num_labels=3, pad_token_id=None)
    classifier = OPTForSequenceClassification(params, cfg)
    assert worst(classifier([[5, 6, 1]]).logits, hf(torch.tensor([[5, 6, 1]])).logits) <= EXACT
    with pytest.raises(ValueError, match="pad_token_id"):
        classifier([[5, 6], [7, 8]])


@pytest.mark.parametrize(("start", "end"), [([0, 3, 16], [2, 3, 16]), ([0, 17, 99], [4, 20, 3]), ([-4, 1, 1], [2, 2, 2])])
def test_question_answering_equals_hf(start, end):
    hf, cfg, params = build("like_350m", "qa")
    ids, mask = batch("right")
    theirs = hf(*tensors(ids, mask), start_positions=torch.tensor(start), end_positions=torch.tensor(end))
    out = OPTForQuestionAnswering(params, cfg)(ids, attention_mask=mask, start_positions=start, end_positions=end)
    assert worst(out.start_logits, theirs.start_logits, mask) <= EXACT
    assert worst(out.end_logits, theirs.end_logits, mask) <= EXACT
    assert out.loss == pytest.approx(theirs.loss.item(), rel=1e-12)


# ---- bugs that have been seen in the wild must be found ------------------------------------------------------------------------------------


def planted(name, params, cfg):
    """A model with one mistake (opt-facts: what other ports got wrong), as (params, cfg, module patches)."""
    from dataclasses import replace

    flat = {k: v.copy() for k, v in flatten(params).items()}
    if name == "position offset of 1":
        flat["embed_positions.weight"] = np.roll(flat["embed_positions.weight"], 1, axis=0)
    elif name == "final norm skipped":
        cfg = replace(cfg, _remove_final_layer_norm=True)
    elif name == "gelu for relu":
        cfg = replace(cfg, activation_function="gelu")
    elif name == "norm order swapped":
        cfg = replace(cfg, do_layer_norm_before=False)
    elif name == "q scaled twice":
        for i in range(cfg.num_hidden_layers):
            for leaf in ("weight", "bias"):
                flat[f"layers.{i}.self_attn.q_proj.{leaf}"] *= cfg.head_dim**-0.5
    elif name == "q bias not scaled":
        for i in range(cfg.num_hidden_layers):
            flat[f"layers.{i}.self_attn.q_proj.bias"] /= cfg.head_dim**-0.5
    elif name == "k and v swapped":
        for i in range(cfg.num_hidden_layers):
            a, b = f"layers.{i}.self_attn.k_proj.weight", f"layers.{i}.self_attn.v_proj.weight"
            flat[a], flat[b] = flat[b], flat[a]
    return unflatten(flat), cfg


@pytest.mark.parametrize(
    "bug",
    ["position offset of 1", "final norm skipped", "gelu for relu", "norm order swapped", "q scaled twice", "q bias not scaled", "k and v swapped"],
)
def test_a_planted_bug_is_seen(bug):
    hf, cfg, params = build("pre_norm")
    ids, _ = batch("none")
    wrong, wrong_cfg = planted(bug, params, cfg)
    assert worst(model.forward(wrong, ids, wrong_cfg), hf(torch.tensor(ids)).logits) > 1e-4


def test_layer_norm_epsilon_matters_at_this_precision(monkeypatch):
    hf, cfg, params = build("pre_norm")
    ids, _ = batch("none")
    monkeypatch.setattr("opt_np.ops.LAYER_NORM_EPS", 1e-12)
    assert worst(model.forward(params, ids, cfg), hf(torch.tensor(ids)).logits) > 1e-9


def test_public_names_and_modules_are_there_after_one_import():
    program = "import opt_np; opt_np.model.forward; opt_np.grad.loss_and_grads; opt_np.tree.flatten; opt_np.OPTConfig; print('model' in dir(opt_np))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "True\n"
    assert all(getattr(opt_np, name) is not None for name in opt_np.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        opt_np.nothing  # noqa: B018


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_once_parameters_are_ready():
    program = """
import ctypes, resource
from opt_np import ops
ops.pack({})
c, size = ctypes.CDLL(None), 48 << 20  # NumPy would ask the kernel for large pages, which hide the faults
c.malloc.restype, c.memset.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(2):
    before, place = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, c.malloc(size)
    c.memset(place, 1, size)
    c.free(place)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert faults < 100  # 12288 pages of 4096 bytes
