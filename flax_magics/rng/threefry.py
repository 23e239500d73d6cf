"""JAX's default generator of keys on the host: a draw's keys without a program, in some microseconds.

Threefry-2x32 with 20 rounds (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, 2011) is exact integer
arithmetic. With `jax_threefry_partitionable`, which is the default, key i of `jax.random.split` and `jax.random.fold_in`
by i are the hash of the counter (0, i).

As a part of a program it would be the dearest: XLA takes 0.12 to 0.15 s to compile a split into three, on two cores,
more than for eight dense layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import jax
import numpy as np

IMPL = "threefry2x32"
_MASK = 0xFFFFFFFF
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_KNOWN = (0, 13)
"""The first version of JAX that is not known to make its keys this way."""


def is_in_force(impl: str) -> bool:
    """Whether JAX makes keys of `impl` this way."""
    return impl == IMPL and bool(getattr(jax.config, "jax_threefry_partitionable", False)) and _is_known()


def hashes(key: bytes, counters: Sequence[int]) -> list[bytes]:
    """Key data of `jax.random.fold_in` of a key by each of `counters`, numbers of 32 bits.

    Args:
      key: key data of 8 bytes: two words, each as a little-endian machine has it. So is what comes back.
    """
    n = len(counters)
    ones, mask = _lanes(n)
    words = int.from_bytes(key, "little")
    first, second = words & _MASK, words >> 32
    schedule = (first * ones, second * ones, (first ^ second ^ 0x1BD11BDA) * ones)
    # All in one pass: a counter each in lanes of 64 bits, half of which are room for what is carried or rotated out.
    x = schedule[0]
    y = (sum(counter << 64 * i for i, counter in enumerate(counters)) + schedule[1]) & mask
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x = (x + y) & mask
            y = ((y << rotation | y >> 32 - rotation) & mask) ^ x
        x = (x + schedule[(i + 1) % 3]) & mask
        y = (y + schedule[(i + 2) % 3] + (i + 1) * ones) & mask
    data = (x | y << 32).to_bytes(8 * n, "little")
    return [data[i : i + 8] for i in range(0, 8 * n, 8)]


@lru_cache(maxsize=64)
def _lanes(n: int) -> tuple[int, int]:
    """A one in each of `n` lanes, and 32 ones in each."""
    ones = sum(1 << 64 * i for i in range(n))
    return ones, ones * _MASK


@cache
def _is_known() -> bool:
    """Whether this version of JAX was tried; a newer one is held against what it makes itself, once."""
    return jax.__version_info__ < _KNOWN or agrees_with_jax()


def agrees_with_jax() -> bool:
    """Whether one key, split and folded by JAX itself, gives what `hashes` gives. Takes a fraction of a second."""
    key, tag = jax.random.key(1), 0x9E3779B9
    keys = [*jax.random.split(key, 3), jax.random.fold_in(key, np.uint32(tag))]
    by_jax = [np.asarray(jax.random.key_data(one)).tobytes() for one in keys]
    return by_jax == hashes(np.asarray(jax.random.key_data(key)).tobytes(), (0, 1, 2, tag))
