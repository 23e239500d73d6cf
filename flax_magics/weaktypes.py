"""Weakly typed arrays: in an operation they take the dtype of what they are combined with, as Python's numbers do."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def weakly_typed(array: Any) -> jax.Array:
    """The array, weakly typed, with the same bits.

    `jnp.asarray(1.5)` is the one that JAX has a call for, of three dtypes; what a program gives may be of any.
    """
    array = jax.device_put(array)
    if not array.weak_type:
        with jax.debug_nans(False), jax.debug_infs(False):  # nothing is computed that could go wrong
            array = jax.lax.convert_element_type_p.bind(
                array, new_dtype=np.dtype(array.dtype), weak_type=True, sharding=None
            )
    weak: jax.Array = array
    return weak
