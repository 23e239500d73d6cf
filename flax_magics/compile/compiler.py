"""A lowered program becomes an executable: from the disk cache, or by XLA on a thread of its own."""

from __future__ import annotations

import hashlib
import operator
import os
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..base.workers import Future, Workers
from ..code.flax_state import Unknown, flax_state, flax_state_in_words
from .disk_cache import DiskCache

try:
    from jax._src.config import trace_context
except ImportError:  # a private name: without it the contexts of `with jax.set_mesh` and the like are not told apart

    def trace_context() -> tuple[Any, ...]:
        """Nothing."""
        return ()


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
"""Settings that it lacks."""
_FLAG = "jax_disable_most_optimizations"  # `jax.config` has it, and no attribute of that name

_NAMES = tuple(name for name in (_OTHERS if trace_context() else (*_OTHERS, *_TRACED)) if hasattr(jax.config, name))
_read_settings = operator.attrgetter(*_NAMES)


def jax_settings() -> tuple[Any, ...]:
    """The settings of JAX that change what a trace or a compilation gives, as they are on this thread now."""
    return (trace_context(), *_read_settings(jax.config), jax.config.read(_FLAG))


def settings() -> tuple[Any, ...]:
    """The same with what Flax keeps: all that a trace depends on besides the call, the model, and installed code."""
    return (jax_settings(), flax_state())


def is_unknown(found: tuple[Any, ...]) -> bool:
    """Whether there is something in what `settings` gave of which nobody can tell if it will be the same again."""
    return any(isinstance(part, Unknown) for part in found[1])


def settings_in_words() -> dict[str, Any]:
    """The same by name, for a person. Of an older JAX not all of its contexts have one."""
    words = dict(zip((*_NAMES, _FLAG), jax_settings()[1:], strict=True))
    try:
        from jax._src.config import trace_context_names

        contexts = zip(trace_context_names(), trace_context(), strict=True)
        words |= {name.removesuffix("_context_manager"): value for name, value in contexts}
    except (ImportError, NotImplementedError, ValueError):
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
    """What compiles. `disk` is None where nothing is to be kept on disk."""

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
    digest = digest_of(traced, lowered)
    if digest is None:
        return None
    trees = f"{lowered.in_tree} {lowered.out_tree}"
    types = tuple(map(_type_of, (*traced.jaxpr.in_avals, None, *traced.jaxpr.out_avals)))
    return digest, jax_settings(), trees, jax.default_backend(), where, types


def _type_of(aval: Any) -> Hashable:
    return aval and (aval.shape, str(aval.dtype), bool(getattr(aval, "weak_type", False)))


def digest_of(traced: Any, lowered: Any) -> str | None:
    """A digest of a lowered program and its constants; None if two programs of the same text may differ.

    Host callbacks are numbered in the text, not named.
    """
    text = lowered.as_text()
    if "callback" in text:
        return None
    hasher = hashlib.sha256(text.encode())
    # The text holds constants in full unless JAX is set to pass them as arguments.
    for constant in traced.jaxpr.consts:
        if hasattr(constant, "dtype"):
            data = (
                jax.random.key_data(constant)
                if jax.dtypes.issubdtype(constant.dtype, jax.dtypes.prng_key)
                else constant
            )
            hasher.update(np.asarray(data).tobytes())
    return hasher.hexdigest()
