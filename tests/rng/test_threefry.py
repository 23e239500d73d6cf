"""JAX's default generator of keys, worked out on the host."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from by_hand import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_magics.rng import threefry
from flax_magics.rng.keys import RootKey

WORDS = st.integers(min_value=0, max_value=2**32 - 1)


@given(WORDS, WORDS, st.lists(WORDS, min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_keys_made_on_the_host_are_jaxs(first, second, counters):
    words = np.array([first, second], np.uint32)
    key = jax.random.wrap_key_data(words)
    folded = jax.vmap(jax.random.fold_in, (None, 0))(key, np.array(counters, np.uint32))
    assert b"".join(threefry.hashes(words.tobytes(), counters)) == np.asarray(jax.random.key_data(folded)).tobytes()


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_a_split_is_the_hash_of_small_numbers(seed):
    key = jax.random.key(seed)
    split = np.asarray(jax.random.key_data(jax.random.split(key, 3)))
    assert b"".join(threefry.hashes(np.asarray(jax.random.key_data(key)).tobytes(), (0, 1, 2))) == split.tobytes()


def test_only_jaxs_default_generator_is_made_here():
    assert threefry.is_in_force("threefry2x32")
    assert not threefry.is_in_force("rbg")
    before = jax.config.jax_threefry_partitionable
    jax.config.update("jax_threefry_partitionable", False)
    try:
        assert not threefry.is_in_force("threefry2x32")
        draw = RootKey.from_seed(0).draw()
        root_key, params_key, dropout_key = jax.random.split(jax.random.key(0), 3)
        assert bits(draw.stream("params")) == bits(params_key)
        assert bits(draw.stream("dropout")) == bits(dropout_key)
        assert draw.next_root == np.asarray(jax.random.key_data(root_key)).tobytes()
    finally:
        jax.config.update("jax_threefry_partitionable", before)


@pytest.fixture
def newer_jax(monkeypatch):
    """A JAX that came after the versions that are known, as far as its number goes."""
    monkeypatch.setattr(threefry, "_KNOWN", (0, 1))
    threefry._is_known.cache_clear()
    yield
    threefry._is_known.cache_clear()


def test_a_newer_jax_is_asked_once_whether_it_still_makes_its_keys_so(newer_jax, monkeypatch):
    assert threefry.is_in_force("threefry2x32")
    monkeypatch.setattr(threefry, "hashes", None)  # not asked again
    assert threefry.is_in_force("threefry2x32")


def test_a_newer_jax_that_splits_in_another_way_splits_by_itself(newer_jax, monkeypatch):
    monkeypatch.setattr(threefry, "hashes", lambda key, counters: [b"\0" * 8 for _ in counters])
    assert not threefry.is_in_force("threefry2x32")
    draw = RootKey.from_seed(0).draw()
    assert bits(draw.stream("params")) == bits(jax.random.split(jax.random.key(0), 3)[1])
