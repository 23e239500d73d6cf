"""What the bits of a run depend on beside its code and keys: versions, kind of device, processor, threads."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
from jaxlib import version as jaxlib_version

_NAMES = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
_VECTORS = re.compile(r"^(a?simd|sse|ssse|avx|fma|f16c|amx|neon|sve|sme|bf16|i8mm|fphp)")


def environment(device: str) -> dict[str, Any]:
    """As JSON data, for a run on `device` (such as `cpu:0`).

    `versions` of jax, jaxlib and flax; `device_kind` as JAX names it (`NVIDIA H100 80GB HBM3`, `cpu`), None where it names
    none; and where the device is a CPU, `processor` (see `processor`) and `threads`, how many XLA computes with, both None
    elsewhere.
    """
    facts = _on(device.partition(":")[0])
    return {**facts, "versions": dict(facts["versions"])}


@lru_cache(maxsize=8)
def _on(kind: str) -> dict[str, Any]:
    cpu = kind == "cpu"
    try:
        device_kind = str(jax.devices(kind)[0].device_kind) if kind else None
    except RuntimeError:  # no such backend in this process
        device_kind = None
    return {
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib_version.__version__, "flax": flax_version()},
        "device_kind": device_kind,
        "processor": processor() if cpu else None,
        "threads": threads() if cpu else None,
    }


@lru_cache(maxsize=1)
def flax_version() -> str:
    """Flax's version, without importing it."""
    return importlib.metadata.version("flax")


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


def default_device() -> Any:
    """The device that JAX would use now."""
    device: Any = getattr(jax.config, "jax_default_device", None)
    if device is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=device)[0] if isinstance(device, str) else device


def devices_of(tree: Any) -> str:
    """The names of the devices that hold the arrays of `tree`; see `name_devices`."""
    leaves = [leaf for leaf in jax.tree_util.tree_leaves(tree) if isinstance(leaf, jax.Array)]
    return name_devices({device for leaf in leaves for device in leaf.devices()} or {default_device()})


def name_devices(devices: Any) -> str:
    """`cpu:0` for one device; `gpu:0-7` or `gpu:0,2` for several."""
    ids = sorted(device.id for device in devices)
    platform = next(iter(devices)).platform
    if len(ids) > 2 and ids == list(range(ids[0], ids[-1] + 1)):
        return f"{platform}:{ids[0]}-{ids[-1]}"
    return f"{platform}:{','.join(map(str, ids))}"
