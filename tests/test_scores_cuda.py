"""Scores that stay on a GPU, here on torch's CPU tensors: results equal those of opt_np.processors and opt_np.generate on the array."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from opt_fast import scores_cuda  # noqa: E402
from opt_fast.scores_cuda import Scores  # noqa: E402
from opt_np import generate, processors  # noqa: E402
from opt_np.processors import Warper  # noqa: E402

WARPERS = {
    "temperature": lambda x, n: Warper(processors.temperature, temperature=0.1 + x),
    "top_k": lambda x, n: Warper(processors.top_k, k=n),
    "top_p": lambda x, n: Warper(processors.top_p, p=x, least=n),
    "min_p": lambda x, n: Warper(processors.min_p, p=x, least=n),
}


@given(name=st.sampled_from([*WARPERS]), x=st.floats(0.01, 0.99), n=st.integers(1, 6), seed=st.integers(0, 999), ties=st.booleans())
def test_processors_leave_what_numpys_leave(name, x, n, seed, ties):
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 3, (3, 20)).astype(np.float32)
    scores = np.round(scores) if ties else scores
    scores[rng.random(scores.shape) < 0.1] = -np.inf  # an earlier processor's
    scores[:, 0] = 0
    warper = WARPERS[name](x, n)
    found, expected = Scores(torch.from_numpy(scores)).after(warper), warper(scores, None)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-6)
    assert found.best.tolist() == expected.argmax(-1).tolist()


@given(seed=st.integers(0, 999), dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
def test_tokens_are_drawn_as_numpy_draws_them(seed, dtype):
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.normal(0, 2, (4, 50))).to(getattr(torch, dtype))
    scores[:, 7] = -torch.inf
    draws = [*rng.random(3), 1 - 2**-53]
    found = generate.choose(Scores(scores), draws)
    assert found.tolist() == generate.choose(scores.float().numpy(), draws).tolist()
    assert 7 not in found


def test_all_that_look_at_no_ids_and_are_common_have_one_of_their_own():
    assert {*scores_cuda.PROCESSORS} == {processors.temperature, processors.top_k, processors.top_p, processors.min_p}
    scores = Scores(torch.zeros(1, 4))
    assert scores.after(Warper(processors.typical_p, p=0.5)) is None
    assert scores.after(partial(processors.no_repeat_ngram, size=2)) is None


def test_a_mixture_of_both_kinds_and_a_tap():
    scores, ids, seen = np.random.default_rng(0).normal(0, 3, (2, 30)).astype(np.float32), np.array([[3, 4], [5, 6]]), {}
    steps = [
        ("temperature", Warper(processors.temperature, temperature=0.7)),
        ("no_repeat_ngram_size", partial(processors.no_repeat_ngram, size=1)),
        ("top_k", Warper(processors.top_k, k=5)),
    ]
    found, best = processors.process(steps, Scores(torch.from_numpy(scores)), ids, seen.__setitem__)
    expected, best_ = processors.process(steps, scores, ids)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(best, best_)
    assert [*seen] == ["temperature", "no_repeat_ngram_size", "top_k"]
    assert all(type(a) is np.ndarray for a in seen.values())


def test_scores_are_an_array_for_whoever_wants_one():
    logits = torch.tensor([[1.0, 5.0, 5.0], [7.0, -1.0, 2.0]], dtype=torch.bfloat16)
    scores = Scores(logits)
    assert scores.argmax(-1).tolist() == [1, 0]
    assert scores.max(-1).tolist() == [5, 7]
    assert np.asarray(scores).dtype == np.float32
    assert len(scores) == 2
    assert scores[0:2] is scores
    assert scores[1:2].argmax().tolist() == [0]
    np.testing.assert_array_equal(scores[1:2], [[7, -1, 2]])
    np.testing.assert_array_equal(scores[[1, 1]], [[7, -1, 2]] * 2)
    np.testing.assert_array_equal(np.asarray(scores, np.float64), logits.double())


def test_where_sums_have_to_be_the_same_each_time_tokens_are_drawn_by_numpy():
    scores, draws = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (4, 50)).astype(np.float32)), [0.1, 0.5, 0.7, 0.99]
    expected = generate.choose(scores.numpy(), draws).tolist()
    torch.use_deterministic_algorithms(True)
    try:
        assert Scores(scores).after(Warper(processors.top_p, p=0.5)) is None
        assert generate.choose(Scores(scores), draws).tolist() == expected
    finally:
        torch.use_deterministic_algorithms(False)
