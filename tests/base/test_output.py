"""Facts of an output: taken while it is there, or read later from a copy of a small one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_magics.base.digest import describe
from flax_magics.base.output import OutputFacts


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
