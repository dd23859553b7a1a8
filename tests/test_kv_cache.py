"""KVCache: after any sequence of operations, at any capacity, it has the same contents as a plain list of arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_np import kv_cache
from opt_np.kv_cache import KVCache

STEPS = st.lists(st.one_of(st.tuples(st.just("extend"), st.integers(1, 70)), st.tuples(st.just("crop"), st.integers(0, 99)),
                           st.tuples(st.just("reorder"), st.integers(0, 99)), st.tuples(st.just("fork"), st.just(0))), max_size=12)  # fmt: skip


@given(steps=STEPS, capacity=st.sampled_from([0, 1, 40, 64, 200, 5000]), layers=st.integers(1, 2))
def test_it_holds_what_was_put_in(steps, capacity, layers):
    rng, cache = np.random.default_rng(0), KVCache(capacity)
    plain = np.zeros((layers, 2, 3, 0, 2, 4), np.float32)
    for what, n in steps:
        if what == "extend":
            new = rng.normal(size=(layers, 2, plain.shape[2], n, 2, 4)).astype(np.float32)
            plain = np.concatenate([plain, new], axis=3)
            for i in range(layers):
                for held, expected in zip(cache.extend(i, *new[i]), plain[i], strict=True):
                    assert np.array_equal(held, expected)
            cache.advance(n)
        elif what == "crop":
            cache.crop(n := min(n, cache.length))
            plain = plain[:, :, :, :n]
        elif what == "reorder":
            rows = np.random.default_rng(n).integers(0, plain.shape[2], 1 + n % 4)
            cache.reorder(rows)
            plain = plain[:, :, rows] if cache._layers else np.zeros((layers, 2, 3, 0, 2, 4), np.float32)
        else:
            before, cache = cache, cache.fork()
            before.crop(0)
        assert cache.length == plain.shape[3]
        assert cache.nbytes == (plain.nbytes if cache._layers else 0)


@pytest.mark.parametrize(("capacity", "room"), [(0, 10), (15, 15), (600, 10 + kv_cache.AT_ONCE), (10**9, 10 + kv_cache.AT_ONCE)])
def test_room_is_made_early_but_not_for_all_that_may_come(capacity, room):
    cache = KVCache(capacity)
    cache.extend(0, *np.zeros((2, 2, 10, 1, 4), np.float32))
    assert cache._layers[0][0].shape[1] == room


def test_growth_ends_at_what_it_will_hold_at_most():
    cache = KVCache(1100)
    for n in (10, 600, 480, 10):
        cache.extend(0, *np.zeros((2, 1, n, 1, 4), np.float32))
        cache.advance(n)
    assert cache._layers[0][0].shape[1] == 1100
    cache.extend(0, *np.zeros((2, 1, 1, 1, 4), np.float32))
    assert cache._layers[0][0].shape[1] == 2200


def test_copies_have_little_room():
    """Beams are copied at every step: room for all that may come would be cleared by the system each time."""
    cache = KVCache(2000)
    cache.extend(0, *np.zeros((2, 4, 10, 1, 4), np.float32))
    cache.advance(10)
    assert cache.fork()._layers[0][0].shape == (4, 74, 1, 4)
    cache.reorder(np.array([0, 0, 3]))
    assert cache._layers[0][0].shape == (3, 74, 1, 4)
