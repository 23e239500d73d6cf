"""Facts about a pytree, in words and numbers."""

from __future__ import annotations

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np

from flax_magics.base.digest import kind_of


def test_a_value_in_the_words_of_a_message():
    values = [
        jnp.zeros((2, 3)),
        np.zeros(2),
        np.float32(1),
        jax.random.key(0),
        None,
        {},
        OrderedDict(),
        3,
        int,
        jax.jit(abs),
    ]
    assert list(map(kind_of, values)) == [
        "an array (float32[2,3])",
        "an array (float64[2])",
        "an array (float32[])",
        "an array (key<fry>[])",
        "None",
        "a dict",
        "an OrderedDict",
        "an int",
        "the class int",
        "a jitted function",
    ]
    jax.eval_shape(lambda x: values.append(kind_of(x)), jnp.zeros(3))
    assert values[-1] == "an array (float32[3])"
