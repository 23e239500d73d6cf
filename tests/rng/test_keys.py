"""The root key, its draws and their streams; JAX's default generator of keys, worked out on the host."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from by_hand import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_magics.base.digest import data_of
from flax_magics.rng import keys
from flax_magics.rng.keys import RootKey, as_key, short_key, stream_tag


def test_the_first_draw_has_the_keys_of_the_notebook():
    draw = RootKey.from_seed(0).draw()
    assert short_key(draw.stream("params")) == "375f238f"
    assert short_key(draw.stream("dropout")) == "f71f4ea9"


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_ten_draws_are_the_split_by_hand(make):
    root, root_key = RootKey.from_seed(3), make(3)
    for number in range(1, 11):
        draw = root.draw()
        root_key, params_key, dropout_key = jax.random.split(root_key, 3)
        assert draw.number == number
        assert data_of(draw.stream("params")) == data_of(params_key)
        assert data_of(draw.stream("dropout")) == data_of(dropout_key)
        root = root.after(draw)
        assert data_of(root.key) == data_of(root_key)


def test_a_further_stream_is_folded_into_the_old_root_under_a_tag_that_no_split_meets():
    draw = RootKey.from_seed(0).draw()
    by_hand = jax.random.fold_in(jax.random.key(0), np.uint32(stream_tag("noise")))
    assert bits(draw.stream("noise")) == bits(by_hand)


def test_params_that_an_init_took_come_from_a_key_of_their_own():
    draw = RootKey.from_seed(0).draw()
    own = draw.stream("params", taken=True)
    assert bits(own) == bits(jax.random.fold_in(jax.random.key(0), np.uint32(stream_tag("params"))))
    assert data_of(own) != data_of(draw.stream("params"))


def test_draws_that_a_program_works_out_ahead_are_those_of_the_host(monkeypatch):
    splits = keys.Splits()
    splits.prepare()
    program, begun = splits._program, list[jax.Array]()
    monkeypatch.setattr(splits, "_program", lambda *args: begun.append(program(*args)) or begun[-1].block_until_ready())
    monkeypatch.setattr(keys, "splits", splits)
    for seed, streams in ((5, ["noise"]), (6, []), (5, ["noise", "other"]), (5, ["other"])):
        root, root_key = RootKey.from_seed(seed), jax.random.key(seed)
        for _ in range(keys.AHEAD + 2):
            draw = root.draw(streams)
            by_hand = {name: jax.random.fold_in(root_key, np.uint32(stream_tag(name))) for name in ("noise", "other")}
            root_key, by_hand["params"], by_hand["dropout"] = jax.random.split(root_key, 3)
            assert [draw.data(name) for name in by_hand] == [data_of(key) for key in by_hand.values()]
            root = root.after(draw)
        assert root.data == data_of(root_key)
    # The host works out each draw of two further streams, and the one with which a program is dispatched.
    assert len(begun) == 3 * 2
    # It goes on as long as the device is at work for somebody else.
    monkeypatch.setattr(splits, "_begun", (root.data, 0, SimpleNamespace(is_ready=lambda: False)))
    assert splits.of(root.data) == b"".join(keys.threefry(root.data, (0, 1, 2)))
    assert len(begun) == 3 * 2


def test_the_program_is_made_once_a_session_was_long_and_not_used_where_it_fails(monkeypatch):
    made: list[object] = []
    splits = keys.Splits()
    monkeypatch.setattr(keys.Splits, "prepare", lambda self: made.append(self))
    monkeypatch.setattr(keys, "PATIENCE", 3)
    root = RootKey.from_seed(0)
    by_hand = b"".join(keys.threefry(root.data, (0, 1, 2)))
    for count in (0, 0, 1, 1):
        assert splits.of(root.data) == by_hand
        for thread in [thread for thread in threading.enumerate() if thread.name == "flax_magics compile"]:
            thread.join()
        assert made == [splits] * count
    splits._program = lambda *_: 1 / 0
    assert splits.of(root.data) == by_hand
    assert splits._program is None


def test_drawing_does_not_move_the_root():
    root = RootKey.from_seed(0)
    assert root.draw() == root.draw()
    assert root.draws == 0


def test_keys_are_those_of_the_settings_at_the_time_of_the_draw():
    root, earlier = RootKey.from_seed(0), RootKey.from_seed(0).draw()
    before = root.draw().data("dropout")
    with jax.threefry_partitionable(False):
        assert root.draw().data("dropout") == data_of(jax.random.split(jax.random.key(0), 3)[2]) != before
        assert earlier.data("dropout") == before
    assert root.draw().data("dropout") == data_of(jax.random.split(jax.random.key(0), 3)[2]) == before


@given(st.text(min_size=1), st.text(min_size=1))
@settings(max_examples=200)
def test_tags_are_32_bits_with_the_highest_set(one, other):
    for name in (one, other):
        assert 1 << 31 <= stream_tag(name) < 1 << 32
    assert (stream_tag(one) == stream_tag(other)) is (one == other)


@given(st.integers(min_value=0, max_value=2**31 - 1))
@settings(max_examples=25)
def test_no_two_keys_of_a_session_are_the_same(seed):
    root, seen = RootKey.from_seed(seed), set()
    for _ in range(4):
        draw = root.draw()
        for name in ("params", "dropout", "noise", "default"):
            data = data_of(draw.stream(name))
            assert data not in seen
            seen.add(data)
        assert draw.root not in seen
        seen.add(draw.root)
        root = root.after(draw)


def test_other_prng_implementations_keep_theirs():
    key = jax.random.key(5, impl="rbg")
    root = RootKey(5, 0, data_of(key), "rbg")
    new_root, params_key, dropout_key = jax.random.split(key, 3)
    draw = root.draw()
    assert bits(draw.stream("params")) == bits(params_key)
    assert bits(draw.stream("dropout")) == bits(dropout_key)
    assert bits(root.after(draw).key) == bits(new_root)


def test_key_data_makes_the_same_key_again():
    key = jax.random.key(9)
    assert bits(as_key(data_of(key), "threefry2x32")) == bits(key)
    assert data_of(jax.random.PRNGKey(9)) == data_of(key)


# -- on the host

WORDS = st.integers(min_value=0, max_value=2**32 - 1)


@given(WORDS, WORDS, st.lists(WORDS, min_size=1, max_size=8))
@settings(max_examples=100)
def test_keys_made_on_the_host_are_jaxs(first, second, counters):
    words = np.array([first, second], np.uint32)
    key = jax.random.wrap_key_data(words)
    folded = jax.vmap(jax.random.fold_in, (None, 0))(key, np.array(counters, np.uint32))
    assert b"".join(keys.threefry(words.tobytes(), counters)) == data_of(folded)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_a_split_is_the_hash_of_small_numbers(seed):
    key = jax.random.key(seed)
    assert b"".join(keys.threefry(data_of(key), (0, 1, 2))) == data_of(jax.random.split(key, 3))


def test_only_jaxs_default_generator_is_made_here():
    assert keys.is_on_host("threefry2x32")
    assert not keys.is_on_host("rbg")
    before = jax.config.jax_threefry_partitionable
    jax.config.update("jax_threefry_partitionable", False)
    try:
        assert not keys.is_on_host("threefry2x32")
        draw = RootKey.from_seed(0).draw()
        root_key, params_key, dropout_key = jax.random.split(jax.random.key(0), 3)
        assert bits(draw.stream("params")) == bits(params_key)
        assert bits(draw.stream("dropout")) == bits(dropout_key)
        assert draw.next_root == data_of(root_key)
    finally:
        jax.config.update("jax_threefry_partitionable", before)


@pytest.fixture
def newer_jax(monkeypatch):
    """A JAX that came after the versions that are known, as far as its number goes."""
    monkeypatch.setattr(keys, "_KNOWN", (0, 1))
    keys._is_known.cache_clear()
    yield
    keys._is_known.cache_clear()


def test_a_newer_jax_is_asked_once_whether_it_still_makes_its_keys_so(newer_jax, monkeypatch):
    assert keys.is_on_host("threefry2x32")
    monkeypatch.setattr(keys, "threefry", None)  # not asked again
    assert keys.is_on_host("threefry2x32")


def test_a_newer_jax_that_splits_in_another_way_splits_by_itself(newer_jax, monkeypatch):
    monkeypatch.setattr(keys, "threefry", lambda key, counters: [b"\0" * 8 for _ in counters])
    assert not keys.is_on_host("threefry2x32")
    draw = RootKey.from_seed(0).draw()
    assert bits(draw.stream("params")) == bits(jax.random.split(jax.random.key(0), 3)[1])
