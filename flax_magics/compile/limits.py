"""XLA's memory and cost analysis of programs, measured peak rates of devices, and the message for out of memory."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress

import jax
import numpy as np
from msgspec.structs import replace

from ..base.measures import Cost, Limits, Memory, default_device, name_devices
from ..base.text import bytes_
from ..base.types import PyTree
from ..errors import FlaxMagicsError
from .program_keys import Executable, jax_settings


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
