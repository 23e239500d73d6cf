"""A device that ran out of memory: what was needed, what was free, what to try."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from .errors import FlaxMagicsError
from .program import default_device
from .run import Memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA gave up for want of memory."""
    return "RESOURCE_EXHAUSTED" in str(error) and type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError")


def out_of_memory(error: BaseException, call: str, memory: Memory | None) -> FlaxMagicsError:
    """The error to show instead of XLA's, which names no line of the user's."""
    found = re.search(r"allocat\w+ (\d+)(?: ?bytes)?", str(error))
    device = default_device()
    rows = []
    if memory is not None:
        rows.append(
            f"needed: arguments {_size(memory.arguments)} · outputs {_size(memory.outputs)} · "
            f"temporaries {_size(memory.temporaries)}"
        )
    if found:
        rows.append(f"could not allocate {_size(int(found.group(1)))} in one piece")
    free = free_bytes(device)
    if free is not None:
        rows.append(f"free on {device.platform}:{device.id}: {_size(free)}")
    rows.append("try: a smaller batch; bfloat16; nn.remat on the blocks; del what holds large arrays, and `Out`")
    return FlaxMagicsError(f"out of memory on {device.platform}:{device.id} in {call}", hint="\n".join(rows))


def with_peak(memory: Memory | None, devices: Iterable[Any]) -> Memory | None:
    """`memory` with the devices' own count of their peak so far, where they keep one; of several the highest."""
    if memory is None:
        return None
    counts = [device.memory_stats() or {} for device in devices]
    peaks = [int(stats["peak_bytes_in_use"]) for stats in counts if "peak_bytes_in_use" in stats]
    return replace(memory, peak=max(peaks)) if peaks else memory


def free_bytes(device: Any) -> int | None:
    """Bytes that the device could still give, None where neither it nor the system says."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return None
    return None


def _size(n: int) -> str:
    from .show.units import bytes_

    return bytes_(n)
