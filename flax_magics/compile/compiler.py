"""A lowered program becomes an executable: from the disk cache, or by XLA on a thread of its own.

`Compiler` does so for whole programs, `Units` for the single ops that an initialisation runs.
"""

from __future__ import annotations

import hashlib
import operator
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax

from ..base.digest import data_of
from ..base.private import is_compiled_alone, trace_context_names, trace_context_of
from ..base.threads import Future, Workers
from ..code.flax_state import Unknown, flax_state, flax_state_in_words
from .disk_cache import DiskCache

T = TypeVar("T")

trace_context = trace_context_of()
_TRACED = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_device",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_threefry_partitionable",
    "jax_softmax_custom_jvp",
    "jax_disable_jit",
)
"""Settings that `trace_context` has, by name where it gives none, and in its place where there is none."""
_OTHERS = (
    "jax_default_prng_impl",
    "jax_enable_custom_prng",
    "jax_default_dtype_bits",
    "jax_safer_randint",
    "jax_debug_nans",
    "jax_debug_infs",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_effort",
    "jax_memory_fitting_level",
    "jax_optimization_level",
    "jax_compiler_enable_remat_pass",
    "jax_ragged_dot_use_ragged_dot_instruction",
)
"""Settings that change a program and are not part of `trace_context`."""
_FLAG = "jax_disable_most_optimizations"  # `jax.config` has it, and no attribute of that name

_NAMES = tuple(name for name in (_OTHERS if trace_context() else (*_OTHERS, *_TRACED)) if hasattr(jax.config, name))
_read_settings = operator.attrgetter(*_NAMES)


def jax_settings() -> tuple[Any, ...]:
    """The settings of JAX that change what a trace or a compilation gives, as they are on this thread now."""
    return (trace_context(), *_read_settings(jax.config), jax.config.read(_FLAG))


def settings() -> tuple[Any, ...]:
    """JAX's settings and Flax's: all that a trace depends on besides the call, the model, and installed code."""
    return (jax_settings(), flax_state())


def is_unknown(settings: tuple[Any, ...]) -> bool:
    """Whether something in what `settings` gave cannot be compared: nobody can tell if it will be the same again."""
    return any(isinstance(state, Unknown) for state in settings[1])


def settings_in_words() -> dict[str, Any]:
    """The settings of JAX and Flax by name, for a person. Of an older JAX not all of its contexts have one."""
    words = dict(zip((*_NAMES, _FLAG), jax_settings()[1:], strict=True))
    names, contexts = trace_context_names(), trace_context()
    if names and len(names) == len(contexts):
        words |= {name.removesuffix("_context_manager"): value for name, value in zip(names, contexts, strict=True)}
    else:
        words |= {name: getattr(jax.config, name) for name in _TRACED if hasattr(jax.config, name)}
    return words | flax_state_in_words()


@dataclass(frozen=True)
class Compiled:
    """An executable, where it is from (`compiled`, `disk cache`), and the seconds that this took."""

    executable: Any
    origin: str
    seconds: float


@dataclass
class Compiler:
    """Compiles lowered programs on threads. `disk` is None where nothing is kept on disk."""

    disk: DiskCache | None = None
    workers: Workers = field(default_factory=Workers)

    def keep_on_disk(self, where: bool | str | os.PathLike[str]) -> None:
        """Turns the disk cache on or off: in the user's cache directory, or in the folder of that name."""
        self.disk = None if where is False else DiskCache(None if where is True else Path(where))

    def start(self, lowered: Any, key: Hashable | None) -> Future:
        """A future of the `Compiled`. `key` is the program's `program_key`."""
        disk = self.disk if key is not None and not users_cache() else None
        name = "" if disk is None else disk.name_of(key)
        return self.workers.submit(lambda: self._make(lowered, disk, name))

    def _make(self, lowered: Any, disk: DiskCache | None, name: str) -> Compiled:
        begin = time.perf_counter()
        executable = None if disk is None else disk.load(name, lowered)
        if executable is not None:
            return Compiled(executable, "disk cache", time.perf_counter() - begin)
        hits = _hits.count
        executable = lowered.compile()
        origin = "compiled" if _hits.count == hits else "disk cache"
        if disk is not None:  # once nobody waits for a compilation
            self.workers.submit(lambda: disk.store(name, executable))
        return Compiled(executable, origin, time.perf_counter() - begin)


def users_cache() -> str | None:
    """The folder of JAX's own cache, where the user has set one: then theirs is in force, and ours is not."""
    folder: str | None = getattr(jax.config, "jax_compilation_cache_dir", None)
    if folder and not _hits.listening:
        _Hits.listening = True
        jax.monitoring.register_event_listener(_hits.hear)
    return folder or None


class _Hits(threading.local):
    """Counts what a thread got from JAX's own cache."""

    count = 0
    listening = False

    def hear(self, event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self.count += 1


_hits = _Hits()


def program_key(traced: Any, lowered: Any, where: Hashable = ()) -> Hashable | None:
    """What tells a lowered program from every other, in memory and on disk; None if two with the same key may differ.

    Of an argument that nothing reads the text says neither shape nor dtype, and of none the kind of a key or whether its
    type is weak, which decides on the types of what is computed with the results.

    Args:
      where: the devices that its arguments were placed on: the text does not say for which a program is.
    """
    text = lowered.as_text()
    if "callback" in text:  # host callbacks are numbered in the text, not named
        return None
    hasher = hashlib.sha256(text.encode())
    # The text holds constants in full unless JAX is set to pass them as arguments.
    for constant in traced.jaxpr.consts:
        if hasattr(constant, "dtype"):
            hasher.update(data_of(constant))
    trees = f"{lowered.in_tree} {lowered.out_tree}"
    avals = (*traced.jaxpr.in_avals, None, *traced.jaxpr.out_avals)
    types = tuple(aval and (aval.shape, str(aval.dtype), bool(getattr(aval, "weak_type", False))) for aval in avals)
    return hasher.hexdigest(), jax_settings(), trees, jax.default_backend(), where, types


def keep(kept: OrderedDict[Hashable, T], key: Hashable, value: T, most: int) -> None:
    """Keeps `value` as the last one used, and drops those that were used longest ago beyond `most`."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)


UNITS = 128
"""Units kept at most, the least recently used dropped first."""


@dataclass
class Units:
    """Small programs that JAX makes one by one where code runs op by op: an op, or a function that is jitted by itself.

    An initialisation is made of few kinds of them, many times over. Each kind is compiled once, on threads beside each
    other, instead of one after the other as they are met. What a unit computes is what JAX's own op-by-op execution
    compiles, so its bits are the same.
    """

    compiler: Compiler
    kept: OrderedDict[Hashable, Future] = field(default_factory=OrderedDict)

    def of_equation(self, equation: Any) -> Future | None:
        """A future of the `Compiled` of one equation of a jaxpr; its arguments are literals too.

        None for one that is run as JAX runs it.
        """
        identity = _equation_key(equation)
        if identity is None:
            return None
        shapes = [
            jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))
            for aval in (atom.aval for atom in equation.invars)
        ]
        types = tuple((shape.shape, shape.dtype, shape.weak_type) for shape in shapes)
        key = (identity, types, jax_settings(), jax.default_backend())
        future = self.kept.get(key)
        if future is None or (future.done() and future.exception() is not None):
            bind = partial(equation.primitive.bind, **equation.params)

            def unit(*arguments: Any) -> Any:
                return bind(*arguments)

            unit.__name__ = str(equation.params.get("name", equation.primitive.name))
            traced = jax.jit(unit).trace(*shapes)
            lowered = traced.lower()
            future = self.compiler.start(lowered, program_key(traced, lowered))
        keep(self.kept, key, future, UNITS)
        return future


def _equation_key(equation: Any) -> Hashable | None:
    """What tells an equation from another, holding nothing of the user's; None where that cannot be told."""
    primitive = equation.primitive
    if primitive.name not in ("jit", "pjit", "random_fold_in") and not is_compiled_alone(primitive):
        return None
    params = [(name, weakref.ref(value) if name == "jaxpr" else value) for name, value in equation.params.items()]
    identity = (primitive.name, tuple(sorted(params, key=lambda param: param[0])))
    try:
        hash(identity)
    except TypeError:
        return None
    return identity
