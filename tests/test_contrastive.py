"""Contrastive search against a slow one that reads every candidate's whole text anew; transformers 5 no longer has it built in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import batch
from test_generate import NO_EOS, language_model

from opt_np import model


def read(ours, row):
    """The last hidden state of every token, and the probabilities of what comes next."""
    hidden = []
    logits = model.forward(ours.params, [row], ours.config, hidden_states=hidden)[0, -1].astype(np.float32)
    P = np.exp(logits - logits.max())
    return hidden[-1][0], P / P.sum()


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def slowly(ours, row, new, alpha, k, banned=(), window=40):
    """The paper's rule, in its own words: one row, no cache, no batch."""
    row, prompt = [int(i) for i in row], len(row)
    for _ in range(new):
        _, P = read(ours, row[-window:])
        P[list(banned)] = 0
        P /= P.sum()
        scores = {}
        for v in sorted(range(len(P)), key=lambda v: (-P[v], v))[:k]:
            h, _ = read(ours, [*row, v][-window:])
            scores[v] = (1 - alpha) * P[v] - alpha * max(cosine(h[-1], h[j]) for j in range(len(h) - 1))
        row.append(max(scores, key=lambda v: scores[v]))
    return row[prompt:]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("variant", ["pre_norm", "like_350m"])
@pytest.mark.parametrize(("alpha", "k"), [(0.6, 5), (0.2, 3), (0.9, 2), (1.0, 6)])
def test_it_is_the_papers_rule_row_for_row(variant, side, alpha, k):
    _, ours = language_model(variant)
    ids, mask = batch(side, seed=4)
    new = ours.generate(ids, attention_mask=mask, penalty_alpha=alpha, top_k=k, max_new_tokens=8, **NO_EOS)[:, ids.shape[1] :]
    mask = np.ones_like(ids) if mask is None else mask
    for row, own, continuation in zip(ids, mask, new, strict=True):
        assert continuation.tolist() == slowly(ours, row[own != 0], 8, alpha, k)


@pytest.mark.parametrize("variant", ["pre_norm", "like_350m"])
def test_what_is_hidden_is_not_compared_with(variant):
    """The hidden tokens are those that the row would say: were they compared with, it would say others."""
    _, ours = language_model(variant)
    rng, options = np.random.default_rng(0), {"penalty_alpha": 0.9, "top_k": 3, "max_new_tokens": 6, **NO_EOS}
    ids, mask = rng.integers(4, 99, (2, 14)), np.ones((2, 14), int)
    mask[1, :11] = 0
    alone = ours.generate(ids[1:, 11:], **options)[0, 3:]
    ids[1, :11] = np.resize(alone, 11)
    assert np.array_equal(ours.generate(ids, attention_mask=mask, **options)[1, 14:], alone)


@settings(max_examples=6)
@given(seed=st.integers(0, 1000), alpha=st.floats(0.05, 0.95), k=st.integers(2, 9))
def test_any_prompt(seed, alpha, k):
    _, ours = language_model()
    ids, mask = batch("left", seed=seed)
    new = ours.generate(ids, attention_mask=mask, penalty_alpha=alpha, top_k=k, max_new_tokens=5, **NO_EOS)[:, ids.shape[1] :]
    assert [row.tolist() for row in new] == [slowly(ours, row[own != 0], 5, alpha, k) for row, own in zip(ids, mask, strict=True)]


def test_processors_come_before_the_candidates():
    _, ours = language_model()
    ids, _ = batch("none", seed=4)
    free = ours.generate(ids, penalty_alpha=0.6, top_k=4, max_new_tokens=6, **NO_EOS)[:, ids.shape[1] :]
    banned = sorted({int(free[0, 0]), int(free[1, 1])})
    new = ours.generate(ids, penalty_alpha=0.6, top_k=4, max_new_tokens=6, bad_words_ids=[[i] for i in banned], **NO_EOS)[:, ids.shape[1] :]
    assert [row.tolist() for row in new] == [slowly(ours, row, 6, 0.6, 4, banned) for row in ids]


@pytest.mark.parametrize("variant", ["pre_norm", "like_350m"])
def test_past_the_context_it_compares_with_what_the_model_sees(variant):
    _, ours = language_model(variant)
    ids, mask = batch("left", T=37, seed=4)
    options = {"attention_mask": mask, "penalty_alpha": 0.6, "top_k": 3, **NO_EOS}
    new = ours.generate(ids, max_new_tokens=7, overflow="slide", **options)[:, 37:]
    for row, own, continuation in zip(ids, mask, new, strict=True):
        assert continuation.tolist() == slowly(ours, row[own != 0], 7, 0.6, 3)
    new = ours.generate(ids, max_new_tokens=7, overflow="truncate_left", **options)[:, 37:]
    for row, own, continuation in zip(ids, mask, new, strict=True):
        assert continuation.tolist() == slowly(ours, row[own != 0][-33:], 7, 0.6, 3)


def test_its_last_token_needs_a_position_too():
    _, ours = language_model()
    ids = np.full((1, 35), 5)
    options = {"penalty_alpha": 0.6, "top_k": 3, **NO_EOS}
    assert ours.generate(ids, max_new_tokens=5, **options).shape == (1, 40)
    with pytest.raises(ValueError, match="at most 5"):
        ours.generate(ids, max_new_tokens=6, **options)


def test_rows_end_and_stream_as_in_greedy_search():
    _, ours = language_model()
    ids, mask = batch("left", seed=4)
    options = {"attention_mask": mask, "penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 8}
    free = ours.generate(ids, **options, **NO_EOS)[:, ids.shape[1] :]
    end = int(free[0, 3])
    whole = ours.generate(ids, eos_token_id=end, **options)
    steps = list(ours.stream(ids, eos_token_id=end, **options))
    assert np.array_equal(np.stack([step.ids for step in steps], 1), whole[:, ids.shape[1] :])
    for row, expected in zip(whole[:, ids.shape[1] :].tolist(), free.tolist(), strict=True):
        upto = expected.index(end) + 1 if end in expected else len(expected)
        assert row[:upto] == expected[:upto]
        assert set(row[upto:]) <= {1}
    log_p = ours(whole, attention_mask=np.concatenate([mask, np.ones((3, len(steps)), int)], 1)).logits
    log_p = log_p - np.logaddexp.reduce(log_p, axis=-1, keepdims=True)
    assert steps[1].logprobs[0] == pytest.approx(log_p[0, ids.shape[1], whole[0, ids.shape[1] + 1]], abs=1e-5)


def test_one_candidate_is_greedy_search():
    _, ours = language_model()
    ids, _ = batch("none", seed=4)
    with pytest.warns(UserWarning, match="penalty_alpha has no effect without top_k above 1"):
        one = ours.generate(ids, penalty_alpha=0.6, top_k=1, max_new_tokens=4, **NO_EOS)
    assert np.array_equal(one, ours.generate(ids, max_new_tokens=4, **NO_EOS))
