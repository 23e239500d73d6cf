"""What keeps arrays alive: the user's names, the session, or neither; and how many bytes each device holds for them."""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import jax
from msgspec import Struct

from ..base.measures import name_devices
from ..code.library import library_file, library_module
from ..code.walk import ATOMS

MOST = 2_000_000
"""The most objects that are visited from one name, or from all modules; arrays beyond them are not found."""

LAST_ERROR = "the last error, with its frames"
REPLAYS = "%flax_replay"
"""Who holds what only replays need."""

PROGRAMS = "compiled programs"
SPARE = (REPLAYS, PROGRAMS)

LiveArrays = Mapping[int, jax.Array]
"""id → array, of all that are alive; it holds them, so that no id is given to another object meanwhile."""
Roots = Iterable[tuple[str, object]]
"""(who holds it, the value), in the order in which they are to be named."""


class Holding(Struct, frozen=True):
    """Arrays that are held by the same holders.

    Attributes:
      holders: names of variables, and words for what is the session's own; empty where no name reaches the arrays.
      arrays, bytes: how many, and what they take on all devices of this process.
    """

    holders: tuple[str, ...]
    arrays: int
    bytes: int


def live_arrays() -> LiveArrays:
    """The arrays that are alive on the default platform and on the host's."""
    arrays: dict[int, jax.Array] = {}
    for platform in dict.fromkeys((jax.default_backend(), "cpu")):
        with contextlib.suppress(RuntimeError):  # `jax_platforms` leaves the CPU out
            arrays |= {id(array): array for array in jax.live_arrays(platform) if not array.is_deleted()}
    return arrays


def buffer_of(array: jax.Array) -> int:
    """Equal for arrays that share their memory: JAX has a second array for what NumPy was shown of the first on a CPU."""
    with contextlib.suppress(Exception):  # one of several devices, or a platform that has no pointers
        return array.unsafe_buffer_pointer() or id(array)
    return id(array)


def bytes_by_device(live: LiveArrays) -> dict[str, int]:
    """Device → bytes that arrays take on it, of the devices of this process."""
    sizes: dict[Any, int] = {}
    for array in {buffer_of(array): array for array in live.values()}.values():
        for device, size in _places(array):
            sizes[device] = sizes.get(device, 0) + size
    return {name_devices([device]): sizes[device] for device in sorted(sizes, key=lambda device: device.id)}


def _places(array: jax.Array) -> Iterator[tuple[Any, int]]:
    # Not `addressable_shards`, which makes an array for each device.
    size = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    for device in array.sharding.addressable_devices:
        yield device, size


def holdings(live: LiveArrays, roots: Roots, stops: Set[int] = frozenset(), others: Roots = ()) -> tuple[Holding, ...]:
    """Who holds the live arrays, the largest holding first.

    Args:
      roots: where to begin.
      stops: ids of objects that are not looked into.
      others: where to go on for arrays that are reached from none of these.
    """
    buffers = {number: buffer_of(array) for number, array in live.items()}
    holders: dict[int, list[str]] = {buffer: [] for buffer in buffers.values()}
    for name, value in roots:
        for buffer in {buffers[number] for number in reached(value, live, stops)}:
            # What is held anyway, replays and programs hold at no cost.
            if not (name in SPARE and holders[buffer]):
                holders[buffer].append(name)
    seen = set(stops)  # of all of them together: what one has led to is not gone through again from the next
    for name, value in others:
        if all(holders.values()):
            break
        for buffer in {buffers[number] for number in _walk(value, live, seen)}:
            holders[buffer] = holders[buffer] or [name]
    groups: dict[tuple[str, ...], list[int]] = {}
    for buffer, number in {buffer: number for number, buffer in buffers.items()}.items():
        sizes = groups.setdefault(tuple(dict.fromkeys(holders[buffer])), [])
        sizes.append(sum(size for _, size in _places(live[number])))
    rows = [Holding(names, len(sizes), sum(sizes)) for names, sizes in groups.items()]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def reached(value: object, live: LiveArrays, stops: Set[int] = frozenset()) -> list[int]:
    """The ids of the live arrays that an object keeps alive, through whatever it holds.

    Modules and installed classes are not looked into, nor the globals that a function reads.
    """
    return _walk(value, live, set(stops))


def _walk(value: object, live: LiveArrays, seen: set[int]) -> list[int]:
    """`reached`, through what is not in `seen`, to which it adds all that it visits."""
    found, waiting = list[int](), [value]
    while waiting and len(seen) < MOST:
        thing = waiting.pop()
        if type(thing) in ATOMS or id(thing) in seen:
            continue
        seen.add(id(thing))
        if id(thing) in live:
            found.append(id(thing))
        waiting += _held_by(thing)
    return found


def _held_by(thing: Any) -> Iterable[object]:
    if isinstance(thing, types.ModuleType):
        return ()
    if isinstance(thing, type):
        return () if library_module(thing.__module__) else list(vars(thing).values())
    if isinstance(thing, types.FunctionType):
        # What a library closes over leads into its caches; its wrappers hold what the user gave them.
        if library_file(thing.__code__.co_filename) and not hasattr(thing, "__wrapped__"):
            return ()
        return (thing.__closure__, thing.__defaults__, thing.__kwdefaults__, vars(thing))
    if isinstance(thing, types.FrameType):
        return () if thing.f_locals is thing.f_globals else list(thing.f_locals.values())
    if isinstance(thing, dict) and "__builtins__" in thing:  # the namespace of a module
        return ()
    return gc.get_referents(thing)


def users_names(names: Mapping[str, object]) -> Roots:
    """The user's variables, without those of Python's own."""
    return [(name, value) for name, value in list(names.items()) if not name.startswith("__")]


def users_modules(names: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """What the user's own modules hold, `helpers.weights`; `names` are those of the main one."""
    for name, module in list(sys.modules.items()):
        is_users = (
            isinstance(module, types.ModuleType) and getattr(module, "__file__", None) and vars(module) is not names
        )
        if is_users and name.partition(".")[0] not in ("flax_magics", "__main__") and not library_module(name):
            for attribute, value in list(vars(module).items()):
                yield f"{name}.{attribute}", value
