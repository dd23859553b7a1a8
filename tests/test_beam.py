"""Beam search token for token as HF's, over its options; beam sampling, seeded; rows alone, right padding and the context's end."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import batch
from test_generate import NO_EOS, language_model

from opt_np import beam, processors

SCENARIOS = list(itertools.product(("pre_norm", "like_350m"), (-1.0, 0.0, 1.0, 2.0), (False, True, "never")))


def agree(variant, padding="left", seed=3, **options):
    """Both answers, with ends that beams do meet."""
    hf, ours = language_model(variant)
    ids, mask = batch(padding, seed=seed)
    mask = np.ones_like(ids) if mask is None else mask
    options = options if "max_length" in options else {"max_new_tokens": 12, **options}
    expected = hf.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, **options).numpy()
    got = ours.generate(ids, attention_mask=mask, **options)
    assert np.array_equal(got, expected), f"ours {got[:, ids.shape[1] :].tolist()}\ntheirs {expected[:, ids.shape[1] :].tolist()}"
    return got[:, ids.shape[1] :]


def ends(variant, count=1):
    """Tokens that beams meet here and there."""
    _, ours = language_model(variant)
    ids, mask = batch("left", seed=3)
    said = ours.generate(ids, attention_mask=mask, max_new_tokens=12, num_beams=3, num_return_sequences=3, **NO_EOS)[:, ids.shape[1] + 2 :]
    tokens, counts = np.unique(said, return_counts=True)
    return tokens[np.argsort(counts, kind="stable")][len(tokens) // 2 :][:count].tolist()


@pytest.mark.parametrize(("number", "scenario"), list(enumerate(SCENARIOS)), ids=str)
def test_beams_are_hfs_token_for_token(number, scenario):
    variant, length_penalty, early_stopping = scenario
    beams = 2 + number % 4
    new = agree(
        variant, ("left", "none")[number % 2], num_beams=beams, num_return_sequences=1 + number % beams, length_penalty=length_penalty,
        early_stopping=early_stopping, eos_token_id=ends(variant, 1 + number // 3 % 2),
    )  # fmt: skip
    assert len(new) == 3 * (1 + number % beams)


@pytest.mark.parametrize("variant", ["pre_norm", "like_350m"])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4}, {"repetition_penalty": 0.8}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2}, {"min_length": 24},
        {"min_new_tokens": 6}, {"bad_words_ids": [[7], [14, 76], [93, 7]]}, {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_length": 22},
        {"max_new_tokens": 1}, {"max_length": 20}, {"pad_token_id": 9}, {"num_beams": 9, "num_return_sequences": 9},
        {"eos_token_id": -1}, {"eos_token_id": [*range(0, 99, 2)], "early_stopping": True}, {"eos_token_id": [*range(4, 99)]},
    ],
    ids=str,
)  # fmt: skip
def test_beams_with_processors_are_hfs_token_for_token(variant, options):
    agree(variant, **{"num_beams": 3, "num_return_sequences": 3, "eos_token_id": ends(variant), **options})


@pytest.mark.parametrize(
    ("variant", "seed", "count", "length_penalty", "beams"),
    [
        ("pre_norm", 0, 2, 1.0, 2), ("pre_norm", 0, 6, 0.5, 3), ("pre_norm", 0, 6, 2.0, 5), ("pre_norm", 4, 2, -2.0, 3),
        ("like_350m", 0, 2, 2.0, 2), ("like_350m", 0, 6, 1.0, 3),
    ],
)  # fmt: skip
def test_never_stops_where_hf_stops_it(variant, seed, count, length_penalty, beams):
    """Prompts for which another guess at the length that a beam may still reach gives other texts."""
    agree(variant, seed=seed, num_beams=beams, num_return_sequences=beams, length_penalty=length_penalty, early_stopping="never",
          eos_token_id=ends(variant, count), max_new_tokens=14)  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_beams_of_other_prompts(seed):
    variant = ("pre_norm", "post_norm", "untied", "gelu")[seed % 4]
    agree(variant, seed=seed, num_beams=4, num_return_sequences=2, eos_token_id=ends(variant, 2), max_new_tokens=18)


def test_the_grid_meets_early_ends_and_different_lengths():
    """What keeps the tests above from passing for want of ends."""
    for variant in ("pre_norm", "like_350m"):
        _, ours = language_model(variant)
        ids, mask = batch("left", seed=3)
        answers = [
            ours.generate(ids, attention_mask=mask, max_new_tokens=12, num_beams=3, length_penalty=penalty, early_stopping=early, eos_token_id=end)
            for end in (ends(variant), ends(variant, 2))
            for _, penalty, early in SCENARIOS[:12]
        ]
        assert len({rows.tobytes() for rows in answers}) > 2
        assert len({rows.shape for rows in answers}) > 1
        assert any((rows[:, ids.shape[1] :] == 1).any() for rows in answers)


@pytest.mark.parametrize("penalty", [-50, -8, 50])
def test_a_score_below_hfs_worst_is_still_a_score(penalty):
    """A sum of -40 times 20^8 is below -1e9, which stands for texts that have not ended. HF returns one token there."""
    _, ours = language_model("pre_norm")
    ids, _ = batch("none", seed=3)
    options = {"num_beams": 2, "length_penalty": penalty, "max_new_tokens": 20}
    rows = ours.generate(ids, eos_token_id=ends("pre_norm", 2), **options)
    for row, answer in zip(ids, rows, strict=True):
        alone = ours.generate(row[None], eos_token_id=ends("pre_norm", 2), **options)[0]
        assert len(alone) > len(row)
        assert np.array_equal(answer[: len(alone)], alone)
        assert (answer[len(alone) :] == 1).all()
    assert ours.generate(ids[:1], **options, **NO_EOS).shape == (1, ids.shape[1] + 20)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_beams_of_a_row_do_not_depend_on_its_neighbours(side, do_sample):
    _, ours = language_model()
    ids, mask = batch(side, seed=5)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "eos_token_id": ends("pre_norm"), "do_sample": do_sample, "seed": 3}
    together = ours.generate(ids, attention_mask=mask, **options)
    for b in range(1 if do_sample else 3):  # a row's draws are those of its place in the batch
        row = ids[b][mask[b] != 0][None]
        alone = ours.generate(row, **options)[:, row.shape[1] :]
        assert np.array_equal(together[2 * b : 2 * b + 2, ids.shape[1] :][:, : alone.shape[1]], alone)
    assert np.array_equal(together[:, : ids.shape[1]], np.repeat(ids, 2, 0))


def test_one_beam_is_greedy_and_the_first_of_many_is_the_best():
    _, ours = language_model()
    ids, _ = batch("none", seed=3)
    assert np.array_equal(ours.generate(ids, num_beams=1, max_new_tokens=6, **NO_EOS), ours.generate(ids, max_new_tokens=6, **NO_EOS))
    few, many = (ours.generate(ids, num_beams=4, num_return_sequences=n, max_new_tokens=6, **NO_EOS) for n in (1, 4))
    assert np.array_equal(many[::4], few)
    log_p = ours(many).logits.astype(np.float64)
    log_p -= np.logaddexp.reduce(log_p, axis=-1, keepdims=True)
    sums = np.take_along_axis(log_p[:, ids.shape[1] - 1 : -1], many[:, ids.shape[1] :, None], 2).sum((1, 2)).reshape(3, 4)
    assert (np.diff(sums) <= 1e-6).all()


def test_beams_past_the_context_are_what_slow_readings_give():
    _, ours = language_model()
    ids, _ = batch("none", B=1, T=39, seed=2)
    options = {"num_beams": 3, "max_new_tokens": 6, **NO_EOS}
    alone = [0.0], ids.tolist()
    for _ in range(6):  # the textbook's beam search, every beam read again from the last 40 tokens
        found = []
        for score, row in zip(*alone, strict=True):
            logits = ours([row[-40:]]).logits[0, -1].astype(np.float32)
            log_p = logits - np.logaddexp.reduce(logits)
            found += [(score + log_p[i], [*row, int(i)]) for i in range(99)]
        best = sorted(found, key=lambda pair: -pair[0])[:3]
        alone = [score for score, _ in best], [row for _, row in best]
    assert ours.generate(ids, overflow="slide", **options)[0].tolist() == alone[1][0]
    kept = ours.generate(ids[:, -35:], **options)[:, 35:]
    assert np.array_equal(ours.generate(ids, overflow="truncate_left", **options)[:, 39:], kept)


def test_beam_sampling_repeats_with_its_seed_and_differs_without():
    _, ours = language_model()
    ids, _ = batch("none")
    options = {"num_beams": 3, "do_sample": True, "max_new_tokens": 8, "temperature": 1.3, "top_k": 20, **NO_EOS}
    assert np.array_equal(ours.generate(ids, seed=1, **options), ours.generate(ids, seed=1, **options))
    assert len({ours.generate(ids, **options).tobytes() for _ in range(3)}) > 1


def test_beam_sampling_draws_without_replacement():
    P = np.array([0.5, 0.3, 0.15, 0.05])
    scores = np.log(P)[None].astype(np.float32)
    pairs = np.zeros((4, 4))
    for seed in range(4000):
        request = SimpleNamespace(settings=SimpleNamespace(do_sample=True), random_numbers=lambda row, step, seed=seed: np.random.default_rng(seed))
        first, second = beam.candidates_of(scores, 2, request, 0)[0]
        pairs[first, second] += 1 / 4000
    expected = P[:, None] * P / (1 - P[:, None]) * (1 - np.eye(4))
    assert np.allclose(pairs, expected, atol=0.03)


def test_without_an_end_beams_are_drawn_from_two_tokens_at_least():
    """HF's rule: else top_k=1 would leave beams nothing to be different by."""
    _, ours = language_model("pre_norm")
    ids, _ = batch("none", seed=3)
    new = ours.generate(ids[:1], do_sample=True, num_beams=2, num_return_sequences=2, top_k=1, seed=0, max_new_tokens=5, eos_token_id=[])
    assert not np.array_equal(*new)


def test_beams_go_on_where_one_of_them_has_no_token_left():
    scores = np.float32([[-np.inf, -np.inf], [0, 1], [2, 1], [1, 0]])
    assert processors.process([], scores, np.zeros((4, 1), int), beams=2)[1].tolist()[1:] == [1, 0, 0]
    for broken in (scores, np.where(np.arange(4)[:, None] == 1, np.nan, scores)):
        with pytest.raises(ValueError, match="row 0 has no token to choose"):
            processors.process([], broken, np.zeros((4, 1), int), beams=1 if broken is scores else 2)
