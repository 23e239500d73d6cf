"""The root key, its draws and their streams, as frozen records with pure methods.

One draw is the line of Flax's notebook *The Sharp Bits*::

    root_key, params_key, dropout_key = jax.random.split(root_key, 3)

The old root is never split again. Any further stream NAME is `jax.random.fold_in(old_root, stream_tag(NAME))`. With
partitionable threefry `split(key, n)[i] == fold_in(key, i)`, so a tag always has its highest bit set: it never equals
one of the small integers that the split amounts to.

Keys of JAX's default generator are computed on the host, in microseconds and without a program. Threefry-2x32 with 20
rounds (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, 2011) is exact integer arithmetic, so the host has
the device's bits. With `jax_threefry_partitionable`, the default, key i of `jax.random.split` and `jax.random.fold_in`
by i both are the hash of the counter (0, i). In a model's program the split would be costly: XLA compiles a split into
three in 0.12 to 0.15 s on two cores, longer than eight dense layers. A session that has made many draws has a program of
its own for them, see `Splits`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property, lru_cache, partial
from typing import Any, ClassVar, TypeAlias

import jax
import numpy as np
from msgspec import Struct

from ..base.digest import data_of, words
from ..base.private import is_tracing
from ..base.threads import Workers
from ..base.types import Record
from ..errors import FlaxMagicsError

Words: TypeAlias = np.ndarray[Any, np.dtype[np.uint32]]
"""Key data as a uint32 NumPy array: the form in which a program takes keys."""
SPLIT = ("params", "dropout")
"""The streams whose keys come from the split itself, in its order; every other stream is folded in."""


@lru_cache(maxsize=1024)
def stream_tag(name: str) -> int:
    """The integer that is folded into the old root for stream `name`: 32 bits of its sha256, the highest set."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") | 1 << 31


@cache
def _on_data(derive: Callable[..., jax.Array], impl: str) -> Callable[..., jax.Array]:
    """`derive(key, …)` as a jitted function from key data to key data, for keys of the PRNG implementation `impl`."""
    return jax.jit(lambda data, *more: jax.random.key_data(derive(jax.random.wrap_key_data(data, impl=impl), *more)))


_in_three = partial(jax.random.split, num=3)  # one object, so that `_on_data` finds its jitted function again


class Draw(Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """One draw from the root key.

    Attributes:
      seed, number: which draw it is; numbers count from 1 under each seed.
      root: key data of the root that it splits, on the host, so that keys made of it are on no particular device.
      impl: JAX's name of the PRNG implementation, such as `threefry2x32`.
    """

    seed: int
    number: int
    root: bytes
    impl: str
    size: ClassVar[None] = None
    """None: keys have no leading axis, in contrast to those of a `DrawBatch`."""

    @cached_property
    def _split(self) -> bytes:
        """Key data of the three keys of the split, one after the other."""
        if is_on_host(self.impl):
            return b"".join(threefry(self.root, (0, 1, 2)))
        return np.asarray(_on_data(_in_three, self.impl)(_words(self.root))).tobytes()

    @property
    def next_root(self) -> bytes:
        """Key data of the root for the next draw: the first of the three keys of the split."""
        return self._split[: len(self.root)]

    @property
    def first(self) -> Draw:
        """This draw, as if it were a `DrawBatch` of one."""
        return self

    @property
    def last(self) -> Draw:
        """This draw, as if it were a `DrawBatch` of one."""
        return self

    @property
    def draws(self) -> tuple[Draw, ...]:
        """This draw alone, as if it were a `DrawBatch` of one."""
        return (self,)

    def next(self) -> Draw:
        """The draw after this one, under the same seed."""
        return Draw(self.seed, self.number + 1, self.next_root, self.impl)

    def stream(self, name: str, *, taken: bool = False) -> jax.Array:
        """The typed key of stream `name`, shape ().

        Args:
          name: `params` and `dropout` come from the split, every other stream is folded in under its own tag.
          taken: something else in this draw already uses the split's key of this name (an init took `params`), so this
            stream is folded in, too: no key is used twice.
        """
        return as_key(self.data(name, taken=taken), self.impl)

    def words(self, name: str, *, taken: bool = False) -> Words:
        """The key data of stream `name` as uint32 of shape (2,), or wider for other implementations than threefry."""
        return np.frombuffer(self.data(name, taken=taken), np.uint32)

    def data(self, name: str, *, taken: bool = False) -> bytes:
        """The key data of stream `name` as bytes; for threefry no device array is made."""
        if name in SPLIT and not taken:
            size = len(self.root)
            begin = size * (1 + SPLIT.index(name))
            return self._split[begin : begin + size]
        if name not in self._folded:
            tag = stream_tag(name)
            if is_on_host(self.impl):
                (self._folded[name],) = threefry(self.root, (tag,))
            else:
                fold_in = _on_data(jax.random.fold_in, self.impl)
                self._folded[name] = np.asarray(fold_in(_words(self.root), np.uint32(tag))).tobytes()
        return self._folded[name]

    @cached_property
    def _folded(self) -> dict[str, bytes]:
        return {}


class StepDraw(Draw, frozen=True, dict=True):
    """A draw whose keys are those of one step of a training: folded with the number of the step, which counts from 0."""

    step: int = 0

    @classmethod
    def of(cls, draw: Draw, step: int) -> StepDraw:
        """The keys that `draw` has in that step."""
        return cls(draw.seed, draw.number, draw.root, draw.impl, step)

    def data(self, name: str, *, taken: bool = False) -> bytes:
        """See `Draw.data`."""
        key = super().data(name, taken=taken)
        if is_on_host(self.impl):
            return threefry(key, (self.step,))[0]
        return np.asarray(_on_data(jax.random.fold_in, self.impl)(_words(key), np.uint32(self.step))).tobytes()


class DrawBatch(Struct, frozen=True, dict=True):
    """Several consecutive draws for one run that is mapped over their keys. Keys get a leading axis of `size`.

    It has the interface of a `Draw`: `first`, `last`, `draws`, `stream`, `words` and `data`.
    """

    first: Draw
    size: int

    @cached_property
    def draws(self) -> tuple[Draw, ...]:
        """The `size` draws, in order."""
        draws = [self.first]
        while len(draws) < self.size:
            draws.append(draws[-1].next())
        return tuple(draws)

    @property
    def last(self) -> Draw:
        """The last of the draws, after which the root key goes on."""
        return self.draws[-1]

    @property
    def impl(self) -> str:
        """JAX's name of the PRNG implementation, which all draws share."""
        return self.first.impl

    def stream(self, name: str, *, taken: bool = False) -> jax.Array:
        """The typed keys of stream `name`, shape (size,). `taken` concerns the first draw alone: see `Draw.stream`."""
        return as_key(self.data(name, taken=taken), self.impl, self.size)

    def words(self, name: str, *, taken: bool = False) -> Words:
        """The key data of stream `name` as uint32 of shape (size, 2), or wider for other implementations."""
        return _words(self.data(name, taken=taken)).reshape(self.size, -1)

    def data(self, name: str, *, taken: bool = False) -> bytes:
        """The key data of stream `name` of all draws, concatenated."""
        # Only the first draw can share its `params` key with an init before it.
        return b"".join(draw.data(name, taken=taken and draw is self.first) for draw in self.draws)


class RunKeys(Record, Mapping[str, jax.Array]):
    """The typed keys of a run by name, made when they are accessed, so that a history of runs holds no device memory.

    Attributes:
      draw: the draw that the keys come from.
      names: key's name in the run → (stream, whether that was taken); see `Draw.stream`.
    """

    draw: Draw | DrawBatch
    names: Mapping[str, tuple[str, bool]]

    def __init__(self, draw: Draw | DrawBatch, names: Mapping[str, tuple[str, bool]]) -> None:
        self.__dict__.update(draw=draw, names=names)  # each run makes one: `Record`'s own takes some times as long

    @classmethod
    def of(cls, draw: Draw | DrawBatch, *names: str) -> RunKeys:
        """Keys of the streams `names`, each under its stream's name."""
        return cls(draw, {name: (name, False) for name in names})

    def __getitem__(self, name: str) -> jax.Array:
        stream, taken = self.names[name]
        return self.draw.stream(stream, taken=taken)

    def data(self, name: str) -> bytes:
        """The key data of one key as bytes, without making a device array."""
        stream, taken = self.names[name]
        return self.draw.data(stream, taken=taken)

    def word(self, name: str) -> str:
        """`short_key` of one key, without making a device array."""
        return self.data(name)[:4][::-1].hex()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{name}: {self.word(name)}" for name in self) + "}"


class RootKey(Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """The root key of a session: its seed, the number of draws so far, and the key data that the next draw splits."""

    seed: int
    draws: int
    data: bytes
    impl: str

    @classmethod
    def from_seed(cls, seed: int) -> RootKey:
        """The root key before the first draw of `seed`, with JAX's current default PRNG implementation.

        Raises:
          FlaxMagicsError: `seed` is no int.
        """
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise FlaxMagicsError(f"a seed is an int, not {seed!r}.")
        # Concrete in a traced function, too; elsewhere that context would compile anew what the user's keys have compiled.
        with jax.ensure_compile_time_eval() if is_tracing() else contextlib.nullcontext():
            key = jax.random.key(seed)
            return cls(seed, 0, data_of(key), str(jax.random.key_impl(key)))

    @property
    def key(self) -> jax.Array:
        """The typed key, shape (), that the next draw splits."""
        return as_key(self.data, self.impl)

    def draw(self, folded: Sequence[str] = ()) -> Draw:
        """The next draw. The root does not advance until `after`, so a failed run's draw is drawn again.

        Args:
          folded: streams other than those of the split, whose keys are worked out now, where that can be done on the
            host, so that they are there when the draw is asked for once more; all others are when they are asked for.
        """
        if not is_on_host(self.impl):
            return Draw(self.seed, self.draws + 1, self.data, self.impl)
        draw: Draw | None = self.__dict__.get("_on_host")
        return self.on_host(folded) if draw is None else draw

    def on_host(self, folded: Sequence[str] = ()) -> Draw:
        """The next draw with keys of threefry's, which `draw` gives as well while that is how keys are made."""
        root = self.data
        draw = Draw(self.seed, self.draws + 1, root, self.impl)
        keys = draw.__dict__
        if folded:
            data = splits.of(root, tuple(map(stream_tag, folded)))
            keys["_split"] = data[:24]
            keys["_folded"] = {name: data[24 + 8 * i : 32 + 8 * i] for i, name in enumerate(folded)}
        else:
            keys["_split"] = splits.of(root)
        self.__dict__["_on_host"] = draw
        return draw

    def after(self, draw: Draw) -> RootKey:
        """The root key after `draw` has succeeded."""
        return RootKey(self.seed, draw.number, draw.next_root, self.impl)


def _words(data: bytes) -> Words:
    # In every PRNG implementation of JAX the data of one key is a vector of uint32.
    return np.frombuffer(data, np.uint32)


def as_key(data: bytes, impl: str, size: int | None = None) -> jax.Array:
    """A typed key of shape () from key data; with `size`, that many keys, shape (size,)."""
    words = _words(data) if size is None else _words(data).reshape(size, -1)
    # `device_put` only copies; `jnp.asarray` would compile a program.
    key: jax.Array = jax.random.wrap_key_data(jax.device_put(words), impl=impl)
    return key


class SeenKeys:
    """Keys that a session has met, by key data, so that the reuse of a key can be noted.

    `roots`: roots that it has split or will split. `runs`: key passed to a run → that run, such as `draw 3`.
    """

    def __init__(self, roots: set[bytes]) -> None:
        self.roots = roots
        self.runs: dict[bytes, str] = {}

    def went_into(self, draw: Draw, keys: Iterable[bytes]) -> None:
        """Records that `keys` were passed to the run of a draw, each of those that were passed to none before."""
        for data in keys:
            self.runs.setdefault(data, f"draw {draw.number}")


@cache
def shape_of_key(impl: str) -> jax.ShapeDtypeStruct:
    """The `ShapeDtypeStruct` of one typed key, shape ()."""
    shape: jax.ShapeDtypeStruct = jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    return shape


def short_key(key: jax.Array) -> str:
    """The first word of the key data in hex, `375f238f`: a short name for people, too short to tell keys apart."""
    return words(key)[:8]


THREEFRY = "threefry2x32"
_MASK = 0xFFFFFFFF
_SHIFTS = ((19, 17, 6, 26), (15, 3, 16, 8))
"""32 less each of the rotations, of even and of odd groups of rounds."""
_TWICE = 1 << 32 | 1
_KNOWN = (0, 13)
"""The first JAX version for which the host's threefry was not tried; from it on, one comparison decides."""


def is_on_host(impl: str) -> bool:
    """Whether `threefry` computes the keys of `impl` as JAX would under its current settings."""
    # Without the partitionable flag JAX splits by hashing all counters at once, which gives other keys.
    return impl == THREEFRY and bool(getattr(jax.config, "jax_threefry_partitionable", False)) and _is_known()


def threefry(key: bytes, counters: Sequence[int]) -> list[bytes]:
    """The key data of `jax.random.fold_in(key, counter)` for each of the 32-bit `counters`.

    Args:
      key: 8 bytes of key data: two little-endian words. Each result has the same form.
    """
    n = len(counters)
    ones, mask, packed = _lanes(tuple(counters))
    words = int.from_bytes(key, "little")
    first, second = words & _MASK, words >> 32
    schedule = (first * ones, second * ones, (first ^ second ^ 0x1BD11BDA) * ones)
    # One pass over big integers instead of a Python loop per key: each counter has a lane of 64 bits, whose upper half
    # takes the carry of an addition or the bits rotated out until `mask` clears it. All of `x`'s carries fit in there.
    x = schedule[0]
    y = (packed + schedule[1]) & mask
    for i in range(5):
        # `y` twice in each lane, moved by as much as the rotation lacks of 32.
        a, b, c, d = _SHIFTS[i % 2]
        x += y
        y = (y * _TWICE >> a ^ x) & mask
        x += y
        y = (y * _TWICE >> b ^ x) & mask
        x += y
        y = (y * _TWICE >> c ^ x) & mask
        x += y
        y = (y * _TWICE >> d ^ x) & mask
        x += schedule[(i + 1) % 3]
        y = (y + schedule[(i + 2) % 3] + (i + 1) * ones) & mask
    data = (x & mask | y << 32).to_bytes(8 * n, "little")
    return [data[i : i + 8] for i in range(0, 8 * n, 8)]


AHEAD = 64
"""How many draws a program works out, in the time that the host takes for one or two."""
PATIENCE = 1000
"""After how many draws that program is made, which takes as long as some thousands of them."""


class Splits:
    """Splits of roots: one by one on the host, and in a long session by a program that works out those to come as well.

    Each follows from its root alone. So what was worked out ahead counts for nothing until a draw has that root.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._program: Callable[..., jax.Array] | None = None
        # The tag of a stream, and by root the three keys of the split and the key of that stream.
        self._ahead: tuple[int, dict[bytes, bytes]] = 0, {}
        # Root and tag with which the program was dispatched last, and its result, until that is read.
        self._begun: tuple[bytes, int, Any] | None = None

    def of(self, root: bytes, tags: tuple[int, ...] = ()) -> bytes:
        """Key data of the three keys of `root`'s split and of the streams with these tags, in a row; see `is_on_host`."""
        known, ahead = self._ahead
        data = ahead.get(root)
        if data is not None and not tags:
            return data[:24]
        if self._program is not None and len(tags) < 2:
            tag = tags[0] if tags else known
            if data is None or tag != known:
                data = self._work_out(root, tag)
            if data is not None:
                return data[: 24 + 8 * len(tags)]
        self._asked += 1
        if self._asked == PATIENCE:
            Workers(1).submit(self.prepare)
        return b"".join(threefry(root, (0, 1, 2, *tags)))

    def prepare(self) -> None:
        """Compiles the program, for a CPU, whatever else the session runs on."""
        root, counters = (jax.ShapeDtypeStruct((n,), np.uint32) for n in (2, 4))
        # Where it cannot be made, such as without a CPU to compile for, the host goes on one by one.
        with contextlib.suppress(Exception), jax.default_device(jax.local_devices(backend="cpu")[0]):
            self._program = jax.jit(_splits_ahead).lower(root, counters).compile()

    def _work_out(self, root: bytes, tag: int) -> bytes | None:
        """Reads what the program has worked out, or dispatches it anew: None where the host is to do this one.

        Nothing is waited for: the device may be at work for somebody, and that wait would be deaf to Ctrl-C.
        """
        program, begun = self._program, self._begun  # each read once, since another thread may draw
        if program is None:
            return None
        try:
            if begun is not None:
                first, known, result = begun
                if not result.is_ready():
                    return None
                block, self._begun = np.asarray(result).tobytes(), None
                rows = [block[i : i + 32] for i in range(0, 32 * AHEAD, 32)]
                ahead = dict(zip([first, *(row[:8] for row in rows)], rows, strict=False))
                self._ahead = known, ahead
                if known == tag and root in ahead:
                    return ahead[root]
            counters = np.array((0, 1, 2, tag), np.uint32)
            self._begun = root, tag, program(np.frombuffer(root, np.uint32), counters)
        except Exception:  # a setting of the user's, such as a guard of transfers
            self._program = self._begun = None
        return None


def _splits_ahead(root: jax.Array, counters: jax.Array) -> jax.Array:
    """`threefry` of `root`, of the first key that this gives, and so on; uint32 of shape (AHEAD, number of counters, 2)."""

    def split(root: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        first, second = root
        schedule = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
        x, y = jax.numpy.broadcast_to(first, counters.shape), counters + second
        for i in range(5):
            for shift in _SHIFTS[i % 2]:
                x = x + y
                y = (y << np.uint32(32 - shift) | y >> np.uint32(shift)) ^ x
            x = x + schedule[(i + 1) % 3]
            y = y + schedule[(i + 2) % 3] + np.uint32(i + 1)
        keys = jax.numpy.stack([x, y], axis=1)
        return keys[0], keys

    return jax.lax.scan(split, root, None, length=AHEAD)[1]


splits = Splits()
"""Those of this process."""


@lru_cache(maxsize=64)
def _lanes(counters: tuple[int, ...]) -> tuple[int, int, int]:
    """Big integers with 1, with 32 one-bits, and with a counter in each lane of 64 bits."""
    ones = sum(1 << 64 * i for i in range(len(counters)))
    return ones, ones * _MASK, sum(counter << 64 * i for i, counter in enumerate(counters))


@cache
def _is_known() -> bool:
    """Whether `threefry` agrees with this JAX: known for versions that were tried, for newer ones compared once."""
    return jax.__version_info__ < _KNOWN or agrees_with_jax()


def agrees_with_jax() -> bool:
    """Whether JAX's own split and fold of one key equal those of `threefry`. Takes a fraction of a second."""
    key, tag = jax.random.key(1), 0x9E3779B9
    keys = [*jax.random.split(key, 3), jax.random.fold_in(key, np.uint32(tag))]
    return list(map(data_of, keys)) == threefry(data_of(key), (0, 1, 2, tag))
