"""JAX's default generator of keys on the host: a draw's keys without a program to compile.

Threefry-2x32 with 20 rounds (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, 2011) is exact integer
arithmetic. With `jax_threefry_partitionable`, which is the default, key i of `jax.random.split` and `jax.random.fold_in`
by i are the hash of the counter (0, i).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

_MASK = 0xFFFFFFFF
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def is_in_force(impl: str) -> bool:
    """Whether JAX makes keys of `impl` this way."""
    return impl == "threefry2x32" and bool(getattr(jax.config, "jax_threefry_partitionable", False))


def fold_in(key: np.ndarray[Any, Any], data: int) -> np.ndarray[Any, Any]:
    """Key data of `jax.random.fold_in`: uint32 of shape (2,), from key data of that shape and 32 bits."""
    first, second = (int(word) for word in key)
    schedule = (first, second, first ^ second ^ 0x1BD11BDA)
    x, y = first, (data + second) & _MASK
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x = (x + y) & _MASK
            y = (((y << rotation) | (y >> (32 - rotation))) & _MASK) ^ x
        x = (x + schedule[(i + 1) % 3]) & _MASK
        y = (y + schedule[(i + 2) % 3] + i + 1) & _MASK
    return np.array([x, y], np.uint32)


def split(key: np.ndarray[Any, Any], n: int) -> np.ndarray[Any, Any]:
    """Key data of `jax.random.split`: uint32 of shape (n, 2)."""
    return np.stack([fold_in(key, i) for i in range(n)])
