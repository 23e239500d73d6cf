"""What was measured of a run: times, memory, cost, limits; and what its bits depend on beside its code and keys: versions,
kind of device, processor, threads.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
from jaxlib import version as jaxlib_version
from msgspec import Struct

from .types import PyTree


class Steady(Struct, frozen=True, forbid_unknown_fields=True):
    """A run repeated with the same keys: every time in seconds, in the order they were taken."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.times))

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, seconds."""
        low, high = np.percentile(self.times, [25, 75])
        return float(high - low) / 2

    @property
    def outliers(self) -> tuple[int, ...]:
        """Indices of the runs that were slow, in order.

        Slow is beyond the upper quartile by more than 1.5 times the distance between the quartiles, and by more than a
        tenth: where all runs agree to a part in a thousand, none of them is worth a word. Fewer than five tell nothing.
        """
        if len(self.times) < LEAST:
            return ()
        low, high = np.percentile(self.times, [25, 75])
        limit = max(high + 1.5 * (high - low), 1.1 * high)
        return tuple(i for i, time in enumerate(self.times) if time > limit)


LEAST = 5
"""Runs from which a slow one can be told."""


class Cost(Struct, frozen=True, forbid_unknown_fields=True):
    """What XLA counts in one run of a program, on each of its devices.

    Attributes:
      flops: floating-point operations.
      bytes: bytes that are read and written, after fusion.
      loops: the program has loops over numbers, and XLA counts the body of a loop once: it is more than that.
    """

    flops: float
    bytes: float
    loops: bool = False


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """What one device was measured to reach: FLOP/s in a large matmul of `dtype`, bytes/s in a large copy (read and
    written).
    """

    device: str
    dtype: str
    flops: float
    bytes: float


class Timing(Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds that each phase took; 0.0 for a phase that did not happen.

    `run` begins once the inputs are ready (that wait is `wait`) and a run that was interrupted before has left the device
    (that wait is `busy`), and ends when the device has finished; it never includes trace, lowering or compilation.
    `compile` is all that the compilation took, and `beside` the part of it that went on beside other work and that nobody
    waited for: the phases without `beside` add up to the time that passed. `init` is the initialisation of variables; in a
    run that initialises and compiles, its tracing is part of `trace`.
    """

    trace: float = 0.0
    lower: float = 0.0
    compile: float = 0.0
    run: float = 0.0
    wait: float = 0.0
    busy: float = 0.0
    init: float = 0.0
    beside: float = 0.0
    steady: Steady | None = None

    @property
    def building(self) -> float:
        """What the program was waited for: trace, lower and compile together, without what ran beside; seconds."""
        return self.trace + self.lower + self.compile - self.beside


class Memory(Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes, as XLA's analysis of the program gives them; `peak` is the device's own count, None where it keeps none.

    The device counts from the start of the process, whatever ran in it.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    peak: int | None = None

    @property
    def analysed(self) -> int:
        """Arguments, outputs and temporaries together: what the program needs at most, as XLA has it."""
        return self.arguments + self.outputs + self.temporaries


_NAMES = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
_VECTORS = re.compile(r"^(a?simd|sse|ssse|avx|fma|f16c|amx|neon|sve|sme|bf16|i8mm|fphp)")


def environment(device: str) -> dict[str, object]:
    """As JSON data, for a run on `device` (such as `cpu:0`).

    `versions` of jax, jaxlib and flax; `device_kind` as JAX names it (`NVIDIA H100 80GB HBM3`, `cpu`), None where it names
    none; and where the device is a CPU, `processor` (see `processor`) and `threads`, how many XLA computes with, both None
    elsewhere.
    """
    return copy.deepcopy(_on(device.partition(":")[0]))


@lru_cache(maxsize=8)
def _on(kind: str) -> dict[str, object]:
    try:
        device_kind = str(jax.devices(kind)[0].device_kind) if kind else None
    except RuntimeError:  # no such backend in this process
        device_kind = None
    flax_version = importlib.metadata.version("flax")  # without importing it
    return {
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib_version.__version__, "flax": flax_version},
        "device_kind": device_kind,
        "processor": processor() if kind == "cpu" else None,
        "threads": threads() if kind == "cpu" else None,
    }


def threads() -> int:
    """How many threads XLA's CPU client computes with: `NPROC` if that is set, else the CPUs that this process may use."""
    with contextlib.suppress(ValueError, KeyError):
        return int(os.environ["NPROC"])
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's make, and a digest of the vector instructions that it has: `x86_64-GenuineIntel-6-143-5a1b9c02`.

    XLA compiles for the processor that it finds, so that sums may be taken in another order on another one.
    """
    machine, rows = platform.machine() or "unknown", first_core()
    if not rows:
        return "-".join([machine, *re.findall(r"\w+", platform.processor())])
    make = [rows[name] for name in _NAMES if rows.get(name)]
    words = (rows.get("flags") or rows.get("Features") or "").split()
    vectors = " ".join(sorted(word for word in words if _VECTORS.match(word)))
    return "-".join([machine, *make, hashlib.sha256(vectors.encode()).hexdigest()[:8]])


@lru_cache(maxsize=1)
def first_core() -> dict[str, str]:
    """What Linux says of the first core, by its names for it; empty elsewhere. Not to be changed."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            first = file.read(1 << 14).split("\n\n")[0]  # the whole of a large machine takes long
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def default_device() -> jax.Device:
    """The device that JAX would use now."""
    device: jax.Device | str | None = getattr(jax.config, "jax_default_device", None)
    return jax.local_devices(backend=device)[0] if device is None or isinstance(device, str) else device


def devices_of(tree: PyTree) -> str:
    """The names of the devices that hold the arrays of `tree`; see `name_devices`."""
    leaves = [leaf for leaf in jax.tree_util.tree_leaves(tree) if isinstance(leaf, jax.Array)]
    return name_devices({device for leaf in leaves for device in leaf.devices()} or {default_device()})


def name_devices(devices: Collection[jax.Device]) -> str:
    """`cpu:0` for one device; `gpu:0-7` or `gpu:0,2` for several."""
    platform, ids = next(iter(devices)).platform, sorted(device.id for device in devices)
    if len(ids) > 2 and ids == list(range(ids[0], ids[-1] + 1)):
        return f"{platform}:{ids[0]}-{ids[-1]}"
    return f"{platform}:{','.join(map(str, ids))}"
