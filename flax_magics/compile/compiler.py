"""From a lowered program to an executable: loaded from the disk cache, or compiled by XLA on a worker thread.

`Compiler` does this for whole programs, `Units` for the single ops of an initialisation.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from pathlib import Path
from typing import TypeVar

import jax
from msgspec import Struct

from ..base.private import is_compiled_alone
from ..base.threads import Future, Workers
from ..base.types import Leaf, PyTree
from .disk_cache import DiskCache, is_program
from .jaxpr import Equation
from .program_keys import Executable, hashable, jax_settings, program_key

T = TypeVar("T")


class Compiled(Struct, frozen=True):
    """An executable, its origin (`compiled` or `disk cache`), and the seconds that it took to get it."""

    executable: Executable
    origin: str
    seconds: float


class Compiler:
    """Compiles lowered programs on worker threads. `disk` is None where the disk cache is off."""

    def __init__(self) -> None:
        self.disk: DiskCache | None = None
        self.workers = Workers()
        self._guess: tuple[str, Future] | None = None
        """The name of a program on disk that is probably wanted next, and the future of its executable."""
        self._met: set[str] = set()
        """Names of the programs of calls that were wanted in this process."""

    def keep_on_disk(self, where: bool | str | os.PathLike[str]) -> None:
        """Turns the disk cache off (False) or on, in the user's cache directory (True) or in the given folder."""
        self.disk = None if where is False else DiskCache(None if where is True else Path(where))

    def begin_to_load(self, looks: Hashable) -> None:
        """Begins to load the program that a call of these looks had in an earlier session, unless it was met in this one."""
        disk = self._in_use()
        name = "" if disk is None else disk.program_of(disk.name_of(looks))
        if disk is not None and name and name not in self._met:
            self._met.add(name)
            self._guess = name, self.workers.submit(lambda: _loaded(disk, name))

    def start(self, lowered: jax.stages.Lowered, key: Hashable | None, looks: Hashable = None) -> Future:
        """Starts to compile and returns a future of the `Compiled`.

        Args:
          key: the `program_key`; None: no disk cache.
          looks: of the call that it is the program of, for `begin_to_load` in a later session.
        """
        disk = None if key is None else self._in_use()
        name = "" if disk is None else disk.name_of(key)
        guess = self._guess
        if looks is not None:
            self._guess = None
            self._met.add(name)

        def make() -> Compiled:
            loaded: Compiled | None = None if guess is None or guess[0] != name else guess[1].result()
            if loaded is not None and is_program(loaded.executable, lowered):
                return loaded
            compiled = self._make(lowered, disk, name)
            if disk is not None and looks is not None:
                self.workers.submit(lambda: disk.note(disk.name_of(looks), name))
            return compiled

        return self.workers.submit(make)

    def _in_use(self) -> DiskCache | None:
        """The disk cache; None where it is off, or the user's own is used."""
        # A program of several processes may be loaded by all of them alone, and each may have another disk.
        return None if users_cache() or jax.process_count() > 1 else self.disk

    def _make(self, lowered: jax.stages.Lowered, disk: DiskCache | None, name: str) -> Compiled:
        """Loads or compiles a program, on a worker thread, and hands a compiled one over to be stored."""
        loaded = None if disk is None else _loaded(disk, name, lowered)
        if loaded is not None:
            return loaded
        begin = time.perf_counter()
        hits = _hits.count  # counted by thread, so that other compilations at the same time do not disturb
        executable = lowered.compile()
        origin = "compiled" if _hits.count == hits else "disk cache"
        if disk is not None:  # as a task of its own, so that nobody waits for the disk
            self.workers.submit(lambda: disk.store(name, executable))
        return Compiled(executable, origin, time.perf_counter() - begin)


def _loaded(disk: DiskCache, name: str, lowered: jax.stages.Lowered | None = None) -> Compiled | None:
    """`DiskCache.load`, timed."""
    begin = time.perf_counter()
    executable = disk.load(name, lowered)
    return None if executable is None else Compiled(executable, "disk cache", time.perf_counter() - begin)


def users_cache() -> str | None:
    """The folder of JAX's own persistent cache if the user has set one, else None. Ours is then not used."""
    folder: str | None = getattr(jax.config, "jax_compilation_cache_dir", None)
    if folder and not _hits.listening:
        _Hits.listening = True  # on the class: JAX calls a listener on every thread, so it is registered once
        jax.monitoring.register_event_listener(_hits.hear)
    return folder or None


class _Hits(threading.local):
    """Counts the hits of JAX's own persistent cache, on each thread by itself."""

    count = 0
    listening = False

    def hear(self, event: str, **_: object) -> None:
        self.count += event == "/jax/compilation_cache/cache_hits"


_hits = _Hits()


def keep(cache: OrderedDict[Hashable, T], key: Hashable, value: T, most: int) -> None:
    """Puts `value` into an LRU cache of at most `most` entries, as the most recently used one."""
    cache[key] = value
    cache.move_to_end(key)
    while len(cache) > most:
        cache.popitem(last=False)


def shape_of(array: Leaf) -> jax.ShapeDtypeStruct:
    """The `ShapeDtypeStruct` of an array or aval, with its weak type."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, weak_type=getattr(array, "weak_type", False))


UNITS = 128
"""The most units in the cache, evicted least recently used first."""


class Units:
    """The small programs of eager execution: one for each kind of op, or of function that is jitted by itself.

    An initialisation consists of few kinds of them, repeated many times. Here each kind is compiled once and all of
    them in parallel, not one after the other as eager JAX meets them. A unit is the program that eager JAX would
    compile, so its bits are the same.
    """

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self.kept: OrderedDict[Hashable, Future] = OrderedDict()

    def of_equation(self, equation: Equation) -> Future | None:
        """A future of the `Compiled` for one equation of a jaxpr; its arguments are all inputs, literals included.

        None for an equation that eager JAX does not run as one program.
        """
        identity = _equation_key(equation)
        if identity is None:
            return None
        shapes = [shape_of(atom.aval) for atom in equation.invars]
        types = tuple((shape.shape, shape.dtype, shape.weak_type) for shape in shapes)
        key = (identity, types, jax_settings(), jax.default_backend())
        future = self.kept.get(key)
        if future is None or (future.done() and future.exception() is not None):  # one that failed is tried again
            bind = partial(equation.primitive.bind, **equation.params)

            def unit(*arguments: Leaf) -> PyTree:
                return bind(*arguments)

            # Eager JAX names the program so, and the name is part of the text by which programs are cached.
            unit.__name__ = str(equation.params.get("name", equation.primitive.name))
            traced = jax.jit(unit).trace(*shapes)
            lowered = traced.lower()
            future = self.compiler.start(lowered, program_key(traced, lowered))
        keep(self.kept, key, future, UNITS)
        return future


def _equation_key(equation: Equation) -> Hashable | None:
    """A hashable key of an equation that keeps nothing of the user's alive; None where it has none."""
    primitive = equation.primitive
    if primitive.name not in ("jit", "pjit", "random_fold_in") and not is_compiled_alone(primitive):
        return None
    # JAX caches the jaxpr of a jitted function: the same function and shapes give the same object. A weak reference
    # keeps no constants alive, and once its jaxpr is gone it equals no other.
    params = [(name, weakref.ref(value) if name == "jaxpr" else value) for name, value in equation.params.items()]
    return hashable((primitive.name, tuple(sorted(params, key=lambda param: param[0]))))
