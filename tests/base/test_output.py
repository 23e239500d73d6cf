"""What is known of an output: facts taken while it is there or later of a copy, and another output held against it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_magics.base.digest import describe, digest_of
from flax_magics.base.output import Agreement, Difference, OutputFacts, with_digest, with_output


@pytest.mark.parametrize(
    ("output", "put_off"),
    [
        (jnp.ones((3, 4)), True),
        ({"a": (jnp.array([jnp.nan, 1.0]), jnp.arange(3)), "b": jnp.bfloat16(-0.0)}, True),
        ([jnp.complex64(1 + 2j), jnp.zeros((0, 2)), None], True),
        (jnp.ones(1025), False),
        ([jnp.ones(3), 2.5], False),
        ([jax.random.key(0)], False),
        ([np.ones(3)], False),
    ],
)
def test_facts_that_are_read_late_are_those_of_the_output_at_the_end_of_the_cell(output, put_off):
    facts, late = OutputFacts(), OutputFacts()
    facts.take(output)
    assert late.put_off(output) is put_off
    assert (late.digest is None) is put_off
    shape = describe(output)
    for leaf in jax.tree_util.tree_leaves(output):
        leaf.delete() if put_off else None
    assert (late.read() is late, late.shape) == (True, shape)
    assert (late.digest, repr(late.values)) == (facts.digest, repr(facts.values))  # NaN is not NaN


@pytest.mark.parametrize("output", [jnp.ones(3), jnp.ones(1025), (jnp.ones(3), 2.5)])
def test_of_an_output_that_was_donated_nothing_is_put_off_and_nothing_taken(output):
    jax.tree_util.tree_leaves(output)[0].delete()
    facts = OutputFacts()
    assert facts.put_off(output) is False
    assert (facts.read().digest, facts.values, facts.shape) == (None, None, describe(output))


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
