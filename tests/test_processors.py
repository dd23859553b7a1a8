"""Every processor against HF's class on random scores, HF's own chain against ours, and the handling of ties and padding."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import build
from transformers import GenerationConfig
from transformers.generation import logits_process as hf

from opt_np import processors
from opt_np.config import OPTConfig
from opt_np.settings import NOT_BUILT, RULES, Settings, resolve

CFG = OPTConfig(vocab_size=40)
EOS = torch.tensor([2, 7])
LEAST = (1, 3)


def problem(seed, V=40, B=3, T=12, vocab=8):
    """Scores without ties, and rows whose few ids repeat."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(B, V)) * rng.choice([0.5, 3, 20])).astype(np.float32), rng.integers(0, vocab, (B, T))


ONE_BY_ONE = {
    "repetition 1.3": (lambda s, i: processors.repetition_penalty(s, i, np.zeros(3, int), 1.3), hf.RepetitionPenaltyLogitsProcessor(1.3)),
    "repetition 0.6": (lambda s, i: processors.repetition_penalty(s, i, np.zeros(3, int), 0.6), hf.RepetitionPenaltyLogitsProcessor(0.6)),
    "repetition, padded": (
        lambda s, i: processors.repetition_penalty(s, i, np.array([0, 5, 11]), 1.3),
        hf.RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=torch.tensor([0, 5, 11])),
    ),
    **{
        f"no {n}-gram twice": (lambda s, i, n=n: processors.no_repeat_ngram(s, i, n), hf.NoRepeatNGramLogitsProcessor(n))
        for n in (1, 2, 3, 12, 13, 40)
    },
    "bad words": (
        lambda s, i: processors.bad_words(s, i, [[3], [5, 6], [1, 2, 3], [*range(14)]]),
        hf.NoBadWordsLogitsProcessor([[3], [5, 6], [1, 2, 3], [*range(14)]], EOS),
    ),
    "min_length 12": (lambda s, i: processors.min_length(s, i, 12, (2, 7)), hf.MinLengthLogitsProcessor(12, EOS)),
    "min_length 13": (lambda s, i: processors.min_length(s, i, 13, (2, 7)), hf.MinLengthLogitsProcessor(13, EOS)),
    "min_new_tokens": (lambda s, i: processors.min_length(s, i, 9 + 4, (2, 7)), hf.MinNewTokensLengthLogitsProcessor(9, 4, EOS)),
    **{f"top_k {k}": (lambda s, i, k=k: processors.top_k(s, k), hf.TopKLogitsWarper(k)) for k in (1, 7, 40, 99)},
    **{
        f"top_p {p} {n}": (lambda s, i, p=p, n=n: processors.top_p(s, p, n), hf.TopPLogitsWarper(p, min_tokens_to_keep=n))
        for p in (0.01, 0.5, 0.95)
        for n in LEAST
    },
    **{
        f"min_p {p} {n}": (lambda s, i, p=p, n=n: processors.min_p(s, p, n), hf.MinPLogitsWarper(p, min_tokens_to_keep=n))
        for p in (0.05, 0.5, 1.0)
        for n in LEAST
    },
    **{
        f"typical_p {p} {n}": (lambda s, i, p=p, n=n: processors.typical_p(s, p, n), hf.TypicalLogitsWarper(p, min_tokens_to_keep=n))
        for p in (0.05, 0.5, 0.95)
        for n in LEAST
    },
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_a_processor_equals_hfs(name):
    ours, theirs = ONE_BY_ONE[name]
    changed = 0
    for seed in range(12):
        scores, ids = problem(seed)
        before = scores.copy()
        expected = theirs(torch.tensor(ids), torch.tensor(scores)).numpy()
        got = ours(scores, ids)
        assert np.array_equal(scores, before), "a processor writes into what it was given"
        assert got.dtype == np.float32
        assert np.array_equal(np.isneginf(got), np.isneginf(expected))
        assert np.allclose(got[np.isfinite(got)], expected[np.isfinite(expected)], rtol=1e-6)
        changed += not np.array_equal(got, scores)
    assert changed or name in ("no 40-gram twice", "no 13-gram twice", "no 12-gram twice", "min_length 12", "top_k 40", "top_k 99")


@st.composite
def chains(draw):
    def some(*values):
        return draw(st.sampled_from(values))

    options = {
        "repetition_penalty": some(1.0, 0.5, 1.8), "no_repeat_ngram_size": some(0, 1, 2, 3), "bad_words_ids": some(None, [[3], [5, 6], [2]]),
        "min_length": some(0, 12, 13), "min_new_tokens": some(None, 3, 5), "do_sample": some(True, True, False), "temperature": some(0.3, 1.0, 1.7),
        "top_k": some(0, 1, 7, 50), "top_p": some(0.05, 0.5, 0.9, 1.0), "min_p": some(None, 0.02, 0.3), "typical_p": some(0.2, 0.9, 1.0),
        "num_beams": some(1, 1, 4), "eos_token_id": some([2], [2, 7]),
    }  # fmt: skip
    if options["min_new_tokens"]:
        options["min_length"] = 0
    return options, draw(st.integers(0, 2**16)), draw(st.booleans())


@given(chains())
def test_the_whole_chain_is_hfs_in_hfs_order(case):
    options, seed, padded = case
    model, _, _ = build("pre_norm")
    scores, ids = problem(seed)
    padding = np.array([0, 4, 8]) if padded else np.zeros(3, int)
    config = GenerationConfig(**options)
    config._eos_token_tensor = torch.tensor(options["eos_token_id"])
    mask = torch.tensor(np.arange(9) >= padding[:, None]).long() if padded else None
    theirs = model._get_logits_processor(config, 9, device="cpu", model_kwargs={"attention_mask": mask})
    ours = processors.chain(Settings(**{k: v for k, v in options.items() if v is not None}), padding, prompt=9)
    assert len(ours) == len(theirs)
    got, expected = (
        torch.softmax(torch.as_tensor(s), -1).numpy()
        for s in (processors.process(ours, scores, ids)[0], theirs(torch.tensor(ids), torch.tensor(scores)))
    )
    assert np.allclose(got, expected, atol=1e-6)


def test_ties_at_the_kth_place_stay_as_in_hf():
    scores = np.array([[3.0, 1.0, 2.0, 2.0, 0.0]], np.float32)
    assert np.isfinite(processors.top_k(scores, 2)).sum() == 3
    assert np.array_equal(np.isfinite(processors.top_p(np.zeros((1, 4), np.float32), 0.5)), [[False, False, True, True]])


def test_the_highest_come_in_the_order_of_their_index_where_they_are_equal():
    scores = np.array([[1.0, 3, 2, 3, 2, -np.inf], [0, 0, 0, 0, 0, 0]])
    assert processors.highest(scores, 4).tolist() == [[1, 3, 2, 4], [0, 1, 2, 3]]


def test_padding_has_not_been_said_before():
    scores, ids = np.ones((1, 5), np.float32), np.array([[1, 3]])
    assert np.array_equal(processors.repetition_penalty(scores, ids, np.array([1]), 2.0), [[1, 1, 1, 0.5, 1]])


def test_typical_p_takes_removed_tokens_as_impossible():
    scores, ids = problem(3)
    cut = processors.top_k(scores, 6)
    expected = hf.TypicalLogitsWarper(0.6)(torch.tensor(ids), torch.tensor(cut)).numpy()
    assert np.array_equal(np.isneginf(processors.typical_p(cut, 0.6)), np.isneginf(expected))


# ---- the settings --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_k": 2.5}, {"top_k": True}, {"top_p": 0.0}, {"top_p": 1.1},
        {"min_p": -0.1}, {"min_p": 1.5}, {"typical_p": 0.0}, {"typical_p": 2.0}, {"repetition_penalty": 0.0}, {"no_repeat_ngram_size": -1},
        {"no_repeat_ngram_size": 1.0}, {"bad_words_ids": [5]}, {"bad_words_ids": [[]]}, {"bad_words_ids": [[-1]]}, {"bad_words_ids": "word"},
        {"min_length": -1}, {"min_new_tokens": -1}, {"eos_token_id": 1.5}, {"eos_token_id": "x"}, {"pad_token_id": -1}, {"stop_strings": [""]},
        {"stop_strings": [3]}, {"overflow": "wrap"}, {"seed": -1}, {"seed": 1.5}, {"num_return_sequences": 0}, {"num_beams": 0}, {"num_beams": 1.5},
        {"length_penalty": float("inf")}, {"length_penalty": "long"}, {"early_stopping": "sometimes"}, {"early_stopping": 1},
        {"penalty_alpha": -0.1}, {"penalty_alpha": 1.1}, {"max_new_tokens": 1.5}, {"max_length": "9"}, {"temperature": "warm"},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_cannot_be_is_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"^{name}=.* must be"):
        Settings(**options)


def test_every_option_has_a_rule():
    assert {field.name for field in dataclasses.fields(Settings)} == RULES.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_return_sequences": 2}, "greedy"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_beams=2"),
        ({"num_return_sequences": 3, "num_beams": 2, "do_sample": True}, "num_beams=2"),
    ],
)
def test_more_sequences_than_there_are(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


def test_the_caller_comes_before_generation_config_and_that_before_config_and_that_before_hfs_defaults():
    cfg = OPTConfig(eos_token_id=5, pad_token_id=6)
    settings = resolve({"top_p": 0.5, "do_sample": None}, {"top_p": 0.9, "do_sample": True, "eos_token_id": [7, 8], "top_k": None}, cfg)
    assert (settings.top_p, settings.do_sample, settings.eos_token_id, settings.pad_token_id, settings.top_k) == (0.5, True, (7, 8), 6, 50)
    assert resolve({}, None, cfg).eos_token_id == (5,)
    old = OPTConfig(eos_token_id=5, extra={"repetition_penalty": 3.0})  # keys of generation in config.json count where they stand alone, as in HF
    assert (resolve({}, None, old).repetition_penalty, resolve({}, {"top_p": 1.0}, old).repetition_penalty) == (3.0, 1.0)
    assert resolve({"eos_token_id": []}, None, cfg).eos_token_id == ()
    assert resolve({}, {"seed": "x", "overflow": "y"}, cfg).overflow == "error"  # not HF's keys: whatever they are, they are not ours


def test_an_end_that_is_no_token_is_not_the_last_token():
    kept = processors.min_length(np.zeros((1, 9)), np.zeros((1, 3), int), 4, (-1, 5, 9, -5000))
    np.testing.assert_array_equal(kept, np.where(np.arange(9) == 5, -np.inf, 0)[None])


@pytest.mark.parametrize("key", NOT_BUILT)
def test_a_key_that_would_change_the_output_and_is_not_built_is_named(key):
    with pytest.warns(UserWarning, match=f"asks for {key}, which is not built here"):
        resolve({}, {key: [5], "transformers_version": "5", "_from_model_config": True, "bos_token_id": 2, "use_cache": False}, CFG)
    for nothing in (NOT_BUILT[key], [], {}):
        assert resolve({}, {key: nothing}, CFG) == resolve({}, {}, CFG)


def test_a_key_that_is_not_built_is_named_once_with_the_others():
    with pytest.warns(UserWarning, match="asks for guidance_scale, top_h, which") as warned:
        resolve({}, {"top_h": 0.4, "guidance_scale": 2.0}, CFG)
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, "temperature has no effect without do_sample=True"),
        ({"top_k": 5, "min_p": 0.1}, "top_k has no effect .*min_p has no effect"),
        ({"length_penalty": 2.0, "early_stopping": True}, "length_penalty has no effect without num_beams above 1; early_stopping"),
        ({"penalty_alpha": 0.6, "do_sample": True}, "penalty_alpha"),
        ({"max_new_tokens": 3, "max_length": 9}, "max_new_tokens wins"),
        ({"eos_token_id": [2, CFG.vocab_size]}, rf"eos_token_id=\[{CFG.vocab_size}\] is outside the vocabulary of {CFG.vocab_size} ids"),
    ],
)
def test_settings_that_do_nothing_are_said(options, message):
    with pytest.warns(UserWarning, match=message):
        resolve(options, {}, CFG)


def test_settings_of_the_model_that_do_nothing_are_not_said():
    assert resolve({}, {"temperature": 0.5, "length_penalty": 2.0}, CFG).temperature == 0.5
    assert resolve({"penalty_alpha": 0.6, "top_k": 4}, {}, CFG).contrastive
