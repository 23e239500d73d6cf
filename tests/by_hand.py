"""Models and comparisons that several tests use."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np


class MyModel(nn.Module):
    """The model of Flax's notebook The Sharp Bits."""

    num_neurons: int
    training: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(self.num_neurons)(x)
        return nn.Dropout(rate=0.5, deterministic=not self.training)(x)


class Normed(nn.Module):
    """BatchNorm and dropout, switched by an argument."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dropout(rate=0.5, deterministic=not train)(x)


def notebook_x() -> jax.Array:
    """An input of the notebook's shape, from a key that no session splits."""
    return jax.random.uniform(jax.random.key(42), (3, 4, 4))


def bits(tree: Any) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Every leaf of `tree` down to its bytes; equal lists mean equal bits."""
    out = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        out.append((jax.tree_util.keystr(path), str(array.dtype), array.shape, array.tobytes()))
    return out
