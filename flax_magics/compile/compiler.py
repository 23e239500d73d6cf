"""From a lowered program to an executable: loaded from the disk cache, or compiled by XLA on a worker thread.

`Compiler` does this for whole programs, `Units` for the single ops of an initialisation. The functions below
them tell what XLA's analysis says of an executable, and what was short where a device ran out of memory.
"""

from __future__ import annotations

import os
import re
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..base.measures import Cost, Limits, Memory, default_device, name_devices
from ..base.private import is_compiled_alone
from ..base.text import bytes_
from ..base.threads import Future, Workers
from ..base.types import Leaf, PyTree
from ..errors import FlaxMagicsError
from .disk_cache import DiskCache, Executable, hashable, is_program, jax_settings, program_key
from .jaxpr import Equation

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is XLA's for a device that is out of memory."""
    # By the type's name, which JAX has changed, and by the status code, which is all that tells the cause.
    return "RESOURCE_EXHAUSTED" in str(error) and type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError")


def out_of_memory(error: BaseException, call: str, memory: Memory | None) -> FlaxMagicsError:
    """The error to show in place of XLA's long one: what was needed, what is free, what to try.

    Args:
      call: the call that failed, as written.
      memory: XLA's analysis of the program, None where it was not compiled yet.
    """
    allocation = re.search(r"allocat\w+ (\d+)(?: ?bytes)?", str(error))
    device = default_device()
    rows = []
    if memory is not None:
        parts = ("arguments", "outputs", "temporaries")
        rows.append("needed: " + " · ".join(f"{part} {bytes_(getattr(memory, part))}" for part in parts))
    if allocation:
        rows.append(f"could not allocate {bytes_(int(allocation.group(1)))} in one piece")
    free = free_bytes(device)
    if free is not None:
        rows.append(f"free on {device.platform}:{device.id}: {bytes_(free)}")
    rows.append("try: a smaller batch; bfloat16; nn.remat on the blocks; del what holds large arrays, and `Out`")
    return FlaxMagicsError(f"out of memory on {device.platform}:{device.id} in {call}", hint="\n".join(rows))


def with_peak(memory: Memory | None, devices: Iterable[jax.Device]) -> Memory | None:
    """`memory` with the highest peak that any of the devices has counted so far; unchanged where they do not count."""
    if memory is None:
        return None
    counts = [device.memory_stats() or {} for device in devices]
    peaks = [int(stats["peak_bytes_in_use"]) for stats in counts if "peak_bytes_in_use" in stats]
    return replace(memory, peak=max(peaks)) if peaks else memory


def free_bytes(device: jax.Device) -> int | None:
    """Free bytes of a device; for a CPU the system's free memory. None where neither is known."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        with suppress(StopIteration, ValueError, OSError), open("/proc/meminfo", encoding="ascii") as lines:
            # What programs may still take: files that the system keeps in memory make room for it.
            return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
        with suppress(ValueError, OSError):
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


SIDES = {"cpu": 1024}
"""Rows of the square matrices in the measured matmul, by platform; `SIDE` for others."""
SIDE = 8192
COPIED = {"cpu": 64_000_000}
"""Bytes of the array in the measured copy, by platform; `COPY` for others."""
COPY = 1_000_000_000
TIMES = 5
"""Runs of each measurement, of which the fastest counts: whatever else the machine does can only slow one down."""
LEAST = 128
"""Size below which a measurement that runs out of memory is given up."""

_FLOATS = r"\b(?:f|bf|c)\d+"


def _told(executable: Executable, analysis: str) -> PyTree:
    """The result of an executable's method `analysis`; None where the backend does not implement it."""
    with suppress(jax.errors.JaxRuntimeError, NotImplementedError, AttributeError):
        return getattr(executable, analysis)()
    return None


def memory_of(executable: Executable) -> Memory | None:
    """XLA's memory analysis of a compiled program; None where the backend has none."""
    stats = _told(executable, "memory_analysis")
    parts = ("argument", "output", "temp", "generated_code")
    return None if stats is None else Memory(*(getattr(stats, f"{part}_size_in_bytes") for part in parts))


def cost_of(executable: Executable) -> Cost | None:
    """XLA's cost analysis of a compiled program, per run and device; None where the backend has none."""
    counts = _told(executable, "cost_analysis") or {}
    flops, moved = (max(float(counts.get(name) or 0), 0.0) for name in ("flops", "bytes accessed"))
    return Cost(flops, moved, _loops(executable.as_text() or "")) if flops > 0 or moved > 0 else None


def _loops(text: str) -> bool:
    """Whether the text of a compiled program has a while loop that carries floating-point values.

    JAX's random bits loop over integers, which costs nothing worth a remark.
    """
    whiles = (line.partition(" while(")[0] for line in text.splitlines() if " while(" in line)
    return any(re.search(_FLOATS, carried) for carried in whiles)


def devices_in(tree: PyTree) -> set[jax.Device]:
    """The devices of this process that hold the arrays of `tree`; the default device where it has no arrays."""
    leaves = (leaf for leaf in jax.tree_util.tree_leaves(tree) if isinstance(leaf, jax.Array))
    return {device for leaf in leaves for device in leaf.sharding.addressable_devices} or {default_device()}


def dtype_of(*trees: PyTree) -> str:
    """The floating-point dtype of most elements in the first tree that has any; `float32` where none has."""
    for tree in trees:
        sizes: Counter[str] = Counter()
        for leaf in jax.tree_util.tree_leaves(tree):
            if hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
                sizes[leaf.dtype.name] += int(np.prod(leaf.shape))
        if sizes:
            return sizes.most_common(1)[0][0]
    return "float32"


_MEASURED: dict[tuple[object, ...], Limits] = {}


def limits(device: jax.Device, dtype: str, clock: Callable[[], float]) -> Limits:
    """The peak rates of `device` for `dtype`, measured once for each combination with JAX's settings."""
    # The settings decide the precision of the matmul, and so its speed.
    key = (device, dtype, jax_settings())
    if key not in _MEASURED:
        _MEASURED[key] = _measure(device, dtype, clock)
    return _MEASURED[key]


def _measure(device: jax.Device, dtype: str, clock: Callable[[], float]) -> Limits:
    """Times a matmul and a copy on `device` and returns the rates."""

    def fastest(function: Callable[[jax.Array], jax.Array], n: int, axes: int) -> tuple[int, float]:
        """(n, seconds of the fastest run) for an array with `axes` axes of size n; n is halved until it fits."""
        while True:
            try:
                x = jax.device_put(np.ones((n,) * axes, jax.numpy.dtype(dtype)), device)
                # Compiled ahead, so that no measured run includes compilation or dispatch through `jit`.
                program = jax.jit(function).lower(x).compile()
                jax.block_until_ready(program(x))
                times = []
                for _ in range(TIMES):
                    start = clock()
                    jax.block_until_ready(program(x))
                    times.append(clock() - start)
                return n, max(min(times), 1e-9)
            except Exception as error:
                if not is_out_of_memory(error) or n <= LEAST:
                    raise
                n //= 2

    side, size = SIDES.get(device.platform, SIDE), COPIED.get(device.platform, COPY)
    width = jax.numpy.dtype(dtype).itemsize
    rows, matmul = fastest(lambda x: x @ x, side, 2)
    items, copy = fastest(jax.numpy.copy, size // width, 1)
    return Limits(name_devices({device}), dtype, 2 * rows**3 / matmul, 2 * items * width / copy)
