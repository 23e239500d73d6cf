"""A lowered program becomes an executable: from the disk cache, or by XLA on a thread of its own."""

from __future__ import annotations

import hashlib
import operator
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from .diskcache import DiskCache
from .workers import Future, Workers

_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_default_device",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_threefry_partitionable",
    "jax_debug_nans",
    "jax_debug_infs",
    "jax_softmax_custom_jvp",
    "jax_enable_custom_prng",
    "jax_exec_time_optimization_effort",
    "jax_optimization_level",
)
_FLAG = "jax_disable_most_optimizations"  # `jax.config` has it, and no attribute of that name

_NAMES = tuple(name for name in _SETTINGS if hasattr(jax.config, name))

SETTINGS = (*_NAMES, _FLAG)
"""Names of what `settings` gives, in its order."""

_read_settings = operator.attrgetter(*_NAMES)


def settings() -> tuple[Any, ...]:
    """The settings of JAX that change what a trace or a compilation gives, as they are on this thread now."""
    return (*_read_settings(jax.config), jax.config.read(_FLAG))


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

    def start(self, lowered: Any, digest: str | None) -> Future:
        """A future of the `Compiled`. `digest` is what the text says, None for a program that must not be shared."""
        disk = self.disk if digest is not None and not users_cache() else None
        key = ""
        if disk is not None and digest is not None:
            key = disk.key(digest, f"{lowered.in_tree} {lowered.out_tree}", repr(settings()))
        return self.workers.submit(lambda: self._make(lowered, disk, key))

    def _make(self, lowered: Any, disk: DiskCache | None, key: str) -> Compiled:
        begin = time.perf_counter()
        executable = None if disk is None else disk.load(key, lowered.in_tree, lowered.out_tree)
        if executable is not None:
            return Compiled(executable, "disk cache", time.perf_counter() - begin)
        hits = _hits.count
        executable = lowered.compile()
        origin = "compiled" if _hits.count == hits else "disk cache"
        if disk is not None:  # once nobody waits for a compilation
            self.workers.submit(lambda: disk.store(key, executable))
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
