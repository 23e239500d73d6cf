"""How far a model is from what the machine can do, and what to say when a device ran out of memory."""

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
from .compiler import Executable, jax_settings


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA gave up for want of memory."""
    return "RESOURCE_EXHAUSTED" in str(error) and type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError")


def out_of_memory(error: BaseException, call: str, memory: Memory | None) -> FlaxMagicsError:
    """The error to show instead of XLA's, which names no line of the user's."""
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
    """`memory` with the devices' own count of their peak so far, where they keep one; of several the highest."""
    if memory is None:
        return None
    counts = [device.memory_stats() or {} for device in devices]
    peaks = [int(stats["peak_bytes_in_use"]) for stats in counts if "peak_bytes_in_use" in stats]
    return replace(memory, peak=max(peaks)) if peaks else memory


def free_bytes(device: jax.Device) -> int | None:
    """Bytes that the device could still give, None where neither it nor the system says."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        with suppress(ValueError, OSError):
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


SIDES = {"cpu": 1024}
"""Rows of the square matrices of the matmul, by platform."""
SIDE = 8192
COPIED = {"cpu": 64_000_000}
"""Bytes that the copy reads, and as many that it writes, by platform."""
COPY = 1_000_000_000
TIMES = 5
"""Runs of which the fastest counts: everything else that the machine did only made them slower."""
LEAST = 128

_FLOATS = re.compile(r"\b(?:f|bf|c)\d+")


def _told(executable: Executable, analysis: str) -> PyTree:
    """What a method of an executable gives; None where the backend does not say."""
    with suppress(jax.errors.JaxRuntimeError, NotImplementedError, AttributeError):
        return getattr(executable, analysis)()
    return None


def memory_of(executable: Executable) -> Memory | None:
    """Bytes as XLA counts them for a compiled program; None where the backend does not say."""
    stats = _told(executable, "memory_analysis")
    parts = ("argument", "output", "temp", "generated_code")
    return None if stats is None else Memory(*(getattr(stats, f"{part}_size_in_bytes") for part in parts))


def cost_of(executable: Executable) -> Cost | None:
    """What XLA counts for one run of a compiled program on one device; None where the backend does not say."""
    counts = _told(executable, "cost_analysis")
    counts = counts[0] if isinstance(counts, list) and counts else counts or {}
    flops, moved = (max(float(counts.get(name) or 0), 0.0) for name in ("flops", "bytes accessed"))
    return Cost(flops, moved, _loops(executable.as_text() or "")) if flops > 0 or moved > 0 else None


def _loops(text: str) -> bool:
    """Whether a program loops over floating-point numbers. JAX's random bits loop over integers, and are no work of note."""
    whiles = (line.partition(" while(")[0] for line in text.splitlines() if " while(" in line)
    return any(_FLOATS.search(carried) for carried in whiles)


def devices_in(tree: PyTree) -> set[jax.Device]:
    """The devices that hold the arrays of `tree`; where it has none, the one that JAX would use."""
    leaves = (leaf for leaf in jax.tree_util.tree_leaves(tree) if isinstance(leaf, jax.Array))
    return {device for leaf in leaves for device in leaf.devices()} or {default_device()}


def dtype_of(*trees: PyTree) -> str:
    """The floating-point dtype of most elements in the first tree that has one; `float32` where none has."""
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
    """What `device` reaches, measured at the first call for it, `dtype` and JAX's settings as they are now."""
    key = (device, dtype, jax_settings())
    if key not in _MEASURED:
        _MEASURED[key] = _measure(device, dtype, clock)
    return _MEASURED[key]


def _measure(device: jax.Device, dtype: str, clock: Callable[[], float]) -> Limits:
    def fastest(function: Callable[[jax.Array], jax.Array], n: int, axes: int) -> tuple[int, float]:
        """`n`, halved until an array of such axes fits on the device, and the seconds of the fastest run."""
        while True:
            try:
                x = jax.device_put(np.ones((n,) * axes, jax.numpy.dtype(dtype)), device)
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
