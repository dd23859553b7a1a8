"""Decoding: token for token as HF where nothing is random, the same distribution where it is, and rows that do not notice each other."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import batch, build, tensors
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf_processors

from opt_np import generate, model
from opt_np.classes import OPTForCausalLM
from opt_np.kv_cache import KVCache

NO_EOS = {"eos_token_id": -1}


def language_model(variant="pre_norm", **changes):
    hf, cfg, params = build(variant, scale=0.3, **changes)
    return hf, OPTForCausalLM(params, cfg)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("variant", ["pre_norm", "like_350m", "gelu", "untied"])
@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.3}, {"repetition_penalty": 0.7}, {"max_new_tokens": 20}, {"max_length": 25}], ids=str
)
def test_greedy_is_hfs_token_for_token(variant, padding, options):
    hf, ours = language_model(variant)
    ids, mask = batch(padding, seed=3)
    options = {**NO_EOS, **({"max_new_tokens": 12} if "max_length" not in options else {}), **options}
    mask_ = np.ones_like(ids) if mask is None else mask
    expected = hf.generate(*tensors(ids), attention_mask=torch.tensor(mask_), do_sample=False, **options).numpy()
    assert np.array_equal(ours.generate(ids, attention_mask=mask, **options), expected)


def test_the_default_length_is_hfs():
    hf, ours = language_model()
    ids, _ = batch("none")
    with pytest.warns(UserWarning, match="max_length"):
        expected = hf.generate(torch.tensor(ids), attention_mask=torch.ones_like(torch.tensor(ids)), do_sample=False, **NO_EOS).numpy()
    assert np.array_equal(ours.generate(ids, **NO_EOS), expected)
    assert expected.shape[1] == ids.shape[1] + 20


def test_rows_end_at_eos_and_are_filled_with_pads():
    hf, ours = language_model()
    ids, mask = batch("left", seed=3)
    free = ours.generate(ids, attention_mask=mask, max_new_tokens=15, **NO_EOS)
    eos = [int(free[0, ids.shape[1] + 4]), int(free[1, ids.shape[1] + 9])]
    for end in (eos[0], eos):
        expected = hf.generate(
            *tensors(ids, mask)[:1], attention_mask=torch.tensor(mask), max_new_tokens=15, do_sample=False, eos_token_id=end
        ).numpy()
        assert np.array_equal(ours.generate(ids, attention_mask=mask, max_new_tokens=15, eos_token_id=end), expected)


def test_a_mask_is_inferred_from_pads_as_in_hf():
    _, ours = language_model()
    ids, mask = batch("left", seed=3)
    assert np.array_equal(ours.generate(ids, max_new_tokens=5), ours.generate(ids, attention_mask=mask, max_new_tokens=5))


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_batch_rows_equal_single_runs_whatever_side_is_padded(side):
    _, ours = language_model()
    ids, mask = batch(side, seed=5)
    together = ours.generate(ids, attention_mask=mask, max_new_tokens=10, **NO_EOS)
    for b in range(len(ids)):
        row = ids[b][mask[b] != 0][None]
        alone = ours.generate(row, max_new_tokens=10, **NO_EOS)
        assert np.array_equal(together[b, ids.shape[1] :], alone[0, row.shape[1] :])
    assert np.array_equal(together[:, : ids.shape[1]], ids)


@given(seed=st.integers(0, 2**31), rows=st.permutations(range(3)))
def test_a_rows_draws_depend_on_seed_row_and_step_alone(seed, rows):
    _, ours = language_model()
    ids, mask = batch("left", seed=5)
    options = {"do_sample": True, "seed": seed, "max_new_tokens": 6, **NO_EOS}
    together = ours.generate(ids, attention_mask=mask, **options)
    first = ids[0][mask[0] != 0][None]
    assert np.array_equal(ours.generate(first, **options)[0, -6:], together[0, -6:])
    assert np.array_equal(ours.generate(ids[:2], attention_mask=mask[:2], **options), together[:2])
    assert np.array_equal(ours.generate(ids, attention_mask=mask, **options), together)


def test_without_a_seed_runs_differ():
    _, ours = language_model()
    ids, _ = batch("none")
    runs = {ours.generate(ids, do_sample=True, max_new_tokens=8, **NO_EOS).tobytes() for _ in range(4)}
    assert len(runs) > 1


def test_draws_follow_the_distribution():
    scores = np.log(np.array([[0.5, 0.3, 0.2, 1e-30]], np.float32))
    draws = np.array([generate.choose(scores, True, 1, step)[0] for step in range(4000)])
    assert np.allclose(np.bincount(draws, minlength=4) / 4000, [0.5, 0.3, 0.2, 0], atol=0.03)


@st.composite
def score_problem(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    V = draw(st.sampled_from([5, 50, 300]))
    scores = (rng.normal(size=(2, V)) * draw(st.sampled_from([0.5, 3.0, 30.0]))).astype(np.float32)
    options = {
        "temperature": draw(st.sampled_from([0.3, 1.0, 1.7])),
        "top_k": draw(st.sampled_from([0, 1, 7, 50, 1000])),
        "top_p": draw(st.sampled_from([0.05, 0.5, 0.9, 1.0])),
        "repetition_penalty": draw(st.sampled_from([0.5, 1.0, 1.8])),
    }
    return scores, rng.integers(0, V, (2, 6)), options


@given(problem=score_problem())
def test_processed_distributions_equal_hfs(problem):
    scores, ids, options = problem
    chain = LogitsProcessorList()
    if options["repetition_penalty"] != 1:
        chain.append(hf_processors.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if options["temperature"] != 1:
        chain.append(hf_processors.TemperatureLogitsWarper(options["temperature"]))
    if options["top_k"]:
        chain.append(hf_processors.TopKLogitsWarper(options["top_k"]))
    if options["top_p"] < 1:
        chain.append(hf_processors.TopPLogitsWarper(options["top_p"]))
    expected = torch.softmax(chain(torch.tensor(ids), torch.tensor(scores)), -1).numpy()
    ours = generate.Sampling(do_sample=True, **options).process(scores, ids, np.ones_like(ids))
    e = np.exp(ours - ours.max(-1, keepdims=True))
    assert np.allclose(e / e.sum(-1, keepdims=True), expected, atol=1e-6)


def test_ties_at_the_kth_place_stay_as_in_hf():
    scores = np.array([[3.0, 1.0, 2.0, 2.0, 0.0]], np.float32)
    assert np.isfinite(generate.top_k(scores, 2)).sum() == 3
    assert np.array_equal(np.isfinite(generate.top_p(np.zeros((1, 4), np.float32), 0.5)), [[False, False, True, True]])


def test_padding_has_not_been_said_before():
    scores, ids = np.ones((1, 5), np.float32), np.array([[1, 3]])
    assert np.array_equal(generate.repetition_penalty(scores, ids, np.array([[0, 1]]), 2.0), [[1, 1, 1, 0.5, 1]])


# ---- streams -----------------------------------------------------------------------------------------------------------------------------


def test_a_stream_carries_what_generate_returns_and_the_models_own_numbers():
    _, ours = language_model()
    ids, mask = batch("left", seed=3)
    free = ours.generate(ids, attention_mask=mask, max_new_tokens=8, **NO_EOS)
    eos = int(free[1, ids.shape[1] + 2])
    whole = ours.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=eos)
    steps = list(ours.stream(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=eos))
    assert np.array_equal(np.stack([s.ids for s in steps], 1), whole[:, ids.shape[1] :])
    logits = model.forward(ours.params, whole, ours.config, attention_mask=np.concatenate([mask, np.ones((3, len(steps)), int)], 1))
    log_p = torch.log_softmax(torch.tensor(logits), -1).numpy()
    done = np.zeros(3, bool)
    for t, step in enumerate(steps, ids.shape[1]):
        for b in range(3):
            expected = (0, 0) if done[b] else (log_p[b, t - 1, whole[b, t]], -(np.exp(log_p[b, t - 1]) * log_p[b, t - 1]).sum())
            assert (step.logprobs[b], step.entropies[b]) == pytest.approx(expected, abs=1e-5)
        done |= step.ids == eos
        assert np.array_equal(step.finished, done)


def test_a_stream_comes_one_token_at_a_time():
    _, ours = language_model()
    stream = ours.stream([[5, 6]], max_new_tokens=30, **NO_EOS)
    assert next(stream).ids.shape == (1,)
    stream.close()
    assert next(stream, None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p=1.5"),
        ({"do_sample": True, "top_k": -1}, "top_k=-1"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "nothing to generate"),
        ({"max_length": 2}, "nothing to generate"),
        ({"max_new_tokens": 60}, "max_position_embeddings=40"),
        ({"attention_mask": [[0, 0, 0]]}, "all padding"),
        ({"attention_mask": [[1]]}, r"attention_mask is \(1, 1\)"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_computed(options, message):
    _, ours = language_model()
    with pytest.raises(ValueError, match=message):
        ours.stream([[5, 6, 7]], **options)


def test_unknown_options_are_named_and_none_means_the_default():
    _, ours = language_model()
    with pytest.raises(TypeError, match="no option num_beams; it has attention_mask"):
        ours.generate([[5]], num_beams=4)
    assert ours.generate([[5]], top_k=None, temperature=None, max_new_tokens=1).shape == (1, 2)


def test_without_a_pad_id_finished_rows_are_filled_with_eos_as_in_hf():
    hf, ours = language_model(pad_token_id=None)
    ids, _ = batch("none", seed=3)
    eos = int(ours.generate(ids, max_new_tokens=6, **NO_EOS)[0, ids.shape[1] + 1])
    expected = hf.generate(
        torch.tensor(ids), attention_mask=torch.ones_like(torch.tensor(ids)), max_new_tokens=6, do_sample=False, eos_token_id=eos
    ).numpy()
    assert np.array_equal(ours.generate(ids, max_new_tokens=6, eos_token_id=eos), expected)


def test_settings_that_do_nothing_are_said():
    _, ours = language_model()
    with pytest.warns(UserWarning, match="temperature: of effect only with do_sample"):
        ours.generate([[5]], temperature=0.5, max_new_tokens=1)


def test_the_last_token_may_stand_at_the_limit():
    _, ours = language_model()
    ids = np.random.default_rng(0).integers(4, 99, (1, 40))
    assert ours.generate(ids, max_new_tokens=1).shape == (1, 41)
    with pytest.raises(ValueError, match="at most 1"):
        ours.generate(ids, max_new_tokens=2)


# ---- the cache ---------------------------------------------------------------------------------------------------------------------------


def test_cache_holds_unscaled_keys_and_values_as_hf_does():
    hf, cfg, params = build("pre_norm")
    ids, _ = batch("none")
    theirs, ours = hf(torch.tensor(ids), use_cache=True).past_key_values, KVCache()
    model.forward(params, ids, cfg, ours)
    for i in range(cfg.num_hidden_layers):
        k, v = ours._layers[i]
        assert np.allclose(k[:, : ours.length].swapaxes(1, 2), theirs.layers[i].keys.detach().numpy(), rtol=1e-9, atol=1e-12)
        assert np.allclose(v[:, : ours.length].swapaxes(1, 2), theirs.layers[i].values.detach().numpy(), rtol=1e-9, atol=1e-12)


def test_cropped_reordered_and_forked_caches_continue_as_if_fresh():
    _, cfg, params = build("pre_norm")
    ids, _ = batch("none")
    cache = KVCache()
    model.forward(params, ids[:, :10], cfg, cache)
    other = cache.fork()
    cache.crop(6)
    again = model.forward(params, ids[:, 6:], cfg, cache)
    assert np.allclose(again, model.forward(params, ids, cfg)[:, 6:], rtol=1e-9, atol=1e-11)
    rows = np.array([2, 2, 0])
    other.reorder(rows)
    assert np.allclose(model.forward(params, ids[rows, 10:], cfg, other), model.forward(params, ids[rows], cfg)[:, 10:], rtol=1e-9, atol=1e-11)
    assert cache.nbytes == 2 * cfg.num_hidden_layers * ids.size * cfg.hidden_size * 8
    with pytest.raises(ValueError, match="cannot crop a cache of 17"):
        cache.crop(18)
