"""Two results held against each other, bit by bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from flax_magics.base.agreement import Agreement, Difference, with_digest, with_output
from flax_magics.base.digest import digest_of


def test_zero_and_minus_zero_differ_by_a_bit_and_nan_does_not():
    assert with_output(np.float32(0.0), np.float32(-0.0)) == Agreement(False, "output", (Difference("", 1, 1, 0.0, 0),))
    assert with_output(np.float32(np.nan), np.float32(np.nan)) == Agreement(True, "output")


def test_nan_in_one_of_them_and_infinite_numbers_are_compared_without_a_warning():
    inf = float("inf")
    (difference,) = with_output(np.array([1.0, np.nan], np.float32), np.array([1.0, 2.0], np.float32)).differences
    assert (difference.elements, difference.size, difference.ulp) == (1, 2, None)
    assert np.isnan(difference.largest)
    (difference,) = with_output(np.array([1.0, inf, -inf]), np.array([2.0, inf, inf])).differences
    assert (difference.elements, difference.size, difference.largest) == (2, 3, inf)


def test_ints_bools_keys_and_complex_numbers():
    was = {"b": np.array([True, False]), "c": np.array([1 + 1j]), "i": np.array([3, 4]), "k": jax.random.key(0)}
    now = {"b": np.array([True, True]), "c": np.array([1 + 2j]), "i": np.array([3, 9]), "k": jax.random.key(1)}
    agreement = with_output(was, now)
    assert [(d.path, d.elements, d.size, d.largest) for d in agreement.differences] == [
        ("['b']", 1, 2, None),
        ("['c']", 1, 1, 1.0),
        ("['i']", 1, 2, 5.0),
        ("['k']", 1, 2, None),
    ]
    assert with_output(was, dict(was)) == Agreement(True, "output")


def test_other_shapes_dtypes_values_and_structures():
    assert with_output(np.zeros(2), np.zeros(3)).differences == (Difference("", text="float64[2] → float64[3]"),)
    assert with_output(np.zeros(2), np.zeros(2, int)).differences == (Difference("", text="float64[2] → int64[2]"),)
    assert with_output({"a": "one"}, {"a": "two"}).differences == (Difference("['a']", text="'one' → 'two'"),)
    assert with_output([1], [1, 2]).differences == (Difference("", text="1 leaves → 2, put together otherwise"),)
    assert with_output((), ()) == Agreement(True, "output")


def test_a_digest_tells_whether_and_no_more():
    y = jnp.ones(3)
    assert with_digest(digest_of(y), y) == Agreement(True, "digest")
    assert with_digest(digest_of(y), y + 1) == Agreement(False, "digest")
