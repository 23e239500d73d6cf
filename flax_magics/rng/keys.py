"""The root key, its draws and their streams: pure functions over frozen records.

One draw is the line of Flax's notebook *The Sharp Bits*::

    root_key, params_key, dropout_key = jax.random.split(root_key, 3)

The old root is never split again. Any further stream NAME is `jax.random.fold_in(old_root, stream_tag(NAME))`. With
partitionable threefry `split(key, n)[i] == fold_in(key, i)`, so a tag always has its highest bit set: it can never meet
one of the small integers that the split stands for.

JAX's default generator is worked out on the host: a draw's keys without a program, in some microseconds. Threefry-2x32 with
20 rounds (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, 2011) is exact integer arithmetic. With
`jax_threefry_partitionable`, which is the default, key i of `jax.random.split` and `jax.random.fold_in` by i are the hash
of the counter (0, i). As a part of a program it would be the dearest: XLA takes 0.12 to 0.15 s to compile a split into
three, on two cores, more than for eight dense layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache, partial
from typing import Any, ClassVar, TypeAlias

import jax
import numpy as np
from msgspec import Struct

from ..base.digest import data_of, words
from ..errors import FlaxMagicsError

Words: TypeAlias = np.ndarray[Any, np.dtype[np.uint32]]
"""Key data, as a program takes it."""
SPLIT = ("params", "dropout")
"""The streams that the split itself gives, in its order."""


@lru_cache(maxsize=1024)
def stream_tag(name: str) -> int:
    """The integer folded into the old root for stream `name`: 32 bits, the highest always set."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") | 1 << 31


@cache
def _on_data(derive: Callable[..., jax.Array], impl: str) -> Callable[..., jax.Array]:
    """`derive(key, …)` from key data to key data of one PRNG implementation, in one dispatch."""
    return jax.jit(lambda data, *more: jax.random.key_data(derive(jax.random.wrap_key_data(data, impl=impl), *more)))


_in_three = partial(jax.random.split, num=3)


class Draw(Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """One draw from the root key: its number under its seed, and the root that it splits (host data, uncommitted)."""

    seed: int
    number: int
    root: bytes
    impl: str
    size: ClassVar[None] = None
    """One draw is no series of them: see `DrawBatch`."""

    @cached_property
    def _split(self) -> list[bytes]:
        if is_on_host(self.impl):
            return threefry(self.root, (0, 1, 2))
        return [key.tobytes() for key in np.asarray(_on_data(_in_three, self.impl)(_words(self.root)))]

    @property
    def next_root(self) -> bytes:
        """Key data of the root that the next draw splits."""
        return self._split[0]

    @property
    def first(self) -> Draw:
        """Itself: see `DrawBatch`."""
        return self

    @property
    def last(self) -> Draw:
        """Itself: see `DrawBatch`."""
        return self

    @property
    def draws(self) -> tuple[Draw, ...]:
        """Itself alone: see `DrawBatch`."""
        return (self,)

    def next(self) -> Draw:
        """The draw after this one, under the same seed."""
        return Draw(self.seed, self.number + 1, self.next_root, self.impl)

    def stream(self, name: str, *, taken: bool = False) -> jax.Array:
        """The typed key of stream `name`, shape ().

        Args:
          name: any stream; `params` and `dropout` come from the split, every other is folded in under its own tag.
          taken: the split's key of this name already went to something else in this draw (an init took `params`), so
            the stream is folded in as well: no key is used twice.
        """
        return as_key(self.data(name, taken=taken), self.impl)

    def words(self, name: str, *, taken: bool = False) -> Words:
        """Its key data as a program takes it: uint32 of shape (2,), or as wide as `impl` has it."""
        return _words(self.data(name, taken=taken))

    def data(self, name: str, *, taken: bool = False) -> bytes:
        """Its key data, for which no array has to be made."""
        if name in SPLIT and not taken:
            return self._split[1 + SPLIT.index(name)]
        if name not in self._folded:
            tag = stream_tag(name)
            if is_on_host(self.impl):
                self._folded[name] = threefry(self.root, (tag,))[0]
            else:
                fold_in = _on_data(jax.random.fold_in, self.impl)
                self._folded[name] = np.asarray(fold_in(_words(self.root), np.uint32(tag))).tobytes()
        return self._folded[name]

    @cached_property
    def _folded(self) -> dict[str, bytes]:
        return {}


class DrawBatch(Struct, frozen=True, dict=True):
    """Draws one after the other, for one run that takes them all: what a Draw gives, with an axis in front."""

    first: Draw
    size: int

    @cached_property
    def draws(self) -> tuple[Draw, ...]:
        """The draws, in order."""
        draws = [self.first]
        while len(draws) < self.size:
            draws.append(draws[-1].next())
        return tuple(draws)

    @property
    def last(self) -> Draw:
        """The draw that the root moves on from."""
        return self.draws[-1]

    @property
    def impl(self) -> str:
        """The PRNG implementation."""
        return self.first.impl

    def stream(self, name: str, *, taken: bool = False) -> jax.Array:
        """The typed keys of stream `name`, shape (size,). `taken` is said of the first draw: see `Draw.stream`."""
        return as_key(self.data(name, taken=taken), self.impl, self.size)

    def words(self, name: str, *, taken: bool = False) -> Words:
        """Their key data as a program takes it: what a Draw gives, with an axis of `size` in front."""
        return _words(self.data(name, taken=taken)).reshape(self.size, -1)

    def data(self, name: str, *, taken: bool = False) -> bytes:
        """Their key data, one after the other."""
        return b"".join(draw.data(name, taken=taken and draw is self.first) for draw in self.draws)


@dataclass(frozen=True)
class RunKeys(Mapping[str, jax.Array]):
    """The keys of a run by name, made when they are looked at: a history of runs then holds no device memory for them.

    Attributes:
      draw: what they are drawn from.
      names: how a key is called in the run → the stream that it is, and whether that was taken (see `Draw.stream`).
    """

    draw: Draw | DrawBatch
    names: Mapping[str, tuple[str, bool]]

    @classmethod
    def of(cls, draw: Draw | DrawBatch, *names: str) -> RunKeys:
        """Streams under their own names."""
        return cls(draw, {name: (name, False) for name in names})

    def __getitem__(self, name: str) -> jax.Array:
        stream, taken = self.names[name]
        return self.draw.stream(stream, taken=taken)

    def data(self, name: str) -> bytes:
        """Key data of a key, for which no array has to be made."""
        stream, taken = self.names[name]
        return self.draw.data(stream, taken=taken)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class RootKey(Struct, frozen=True, forbid_unknown_fields=True):
    """The root key of a session: the seed it began with, how many draws it has given, and its data now."""

    seed: int
    draws: int
    data: bytes
    impl: str

    @classmethod
    def from_seed(cls, seed: int) -> RootKey:
        """Draw 0 of `seed`, under the PRNG implementation that JAX is set to now.

        Raises:
          FlaxMagicsError: `seed` is no int.
        """
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise FlaxMagicsError(f"a seed is an int, not {seed!r}.")
        with jax.ensure_compile_time_eval():  # a session may begin in a function that JAX traces
            key = jax.random.key(seed)
            return cls(seed, 0, data_of(key), str(jax.random.key_impl(key)))

    @property
    def key(self) -> jax.Array:
        """The typed key that the next draw will split, shape ()."""
        return as_key(self.data, self.impl)

    def draw(self) -> Draw:
        """The next draw. The root itself does not move: see `after`."""
        return Draw(self.seed, self.draws + 1, self.data, self.impl)

    def after(self, draw: Draw) -> RootKey:
        """The root once `draw` has succeeded."""
        return RootKey(self.seed, draw.number, draw.next_root, self.impl)


def _words(data: bytes) -> Words:
    # Key data of one key is a vector of words in every implementation that JAX has.
    return np.frombuffer(data, np.uint32)


def as_key(data: bytes, impl: str, size: int | None = None) -> jax.Array:
    """A typed key, shape (), made of host key data; with `size` so many, shape (size,)."""
    words = _words(data) if size is None else _words(data).reshape(size, -1)
    # `jnp.asarray` would compile a program for it.
    key: jax.Array = jax.random.wrap_key_data(jax.device_put(words), impl=impl)
    return key


@dataclass
class SeenKeys:
    """Data of keys that a session has met: roots that it has split or will split, and keys → the run that they went into."""

    roots: set[bytes] = field(default_factory=set)
    runs: dict[bytes, str] = field(default_factory=dict)


@cache
def shape_of_key(impl: str) -> jax.ShapeDtypeStruct:
    """A typed key of shape () as a shape."""
    shape: jax.ShapeDtypeStruct = jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    return shape


def short_key(key: jax.Array) -> str:
    """The first word of the key data in hex: `375f238f`. A short name for eyes, not for comparing."""
    return words(key)[:8]


THREEFRY = "threefry2x32"
_MASK = 0xFFFFFFFF
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_KNOWN = (0, 13)
"""The first version of JAX that is not known to make its keys this way."""


def is_on_host(impl: str) -> bool:
    """Whether keys of `impl` are worked out on the host, as JAX makes them."""
    return impl == THREEFRY and bool(getattr(jax.config, "jax_threefry_partitionable", False)) and _is_known()


def threefry(key: bytes, counters: Sequence[int]) -> list[bytes]:
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
    """Whether one key, split and folded by JAX itself, gives what `threefry` gives. Takes a fraction of a second."""
    key, tag = jax.random.key(1), 0x9E3779B9
    keys = [*jax.random.split(key, 3), jax.random.fold_in(key, np.uint32(tag))]
    return list(map(data_of, keys)) == threefry(data_of(key), (0, 1, 2, tag))
