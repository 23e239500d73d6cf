"""Checks of JAX's own settings: each is right for some purpose, and costs something where it was left on."""

from __future__ import annotations

import os
from typing import Any

import jax

from .finding import Examined, Finding

DEBUG = {
    "jax_debug_nans": "each result is looked through",
    "jax_debug_infs": "each result is looked through",
    "jax_debug_key_reuse": "each program is traced with a check of its keys",
    "jax_check_tracer_leaks": "each trace is searched, and none is used again",
    "jax_log_compiles": "each compilation is printed",
    "jax_explain_cache_misses": "each trace is compared with earlier ones, and printed",
    "jax_enable_checks": "JAX checks itself at each operation",
}
"""Setting for debugging → what it costs while it is on."""


def set_to(value: object, *names: str) -> str:
    """The lines that give settings of JAX a value."""
    return "\n".join(["import jax", *(f'jax.config.update("{name}", {value!r})' for name in names)])


def value_of(name: str) -> Any:
    """The value of a setting; None for one that this version of JAX lacks."""
    try:
        return getattr(jax.config, name) if hasattr(jax.config, name) else jax.config.read(name)
    except AttributeError:
        return None


def is_on(name: str) -> bool:
    """Whether a setting is on."""
    return bool(value_of(name))


def x64(_: Examined) -> Finding | None:
    """64 bits where nothing else is said; or the environment variable for it, set too late."""
    if is_on("jax_enable_x64"):
        cost = "twice the memory, and on a GPU or TPU 2 to 60 times the time"
        return Finding("`jax_enable_x64` is on, and new arrays are float64", cost, set_to(False, "jax_enable_x64"))
    if os.environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true", "yes", "on"):
        text = "JAX_ENABLE_X64 is set, and JAX was imported before, or told otherwise"
        return Finding(text, "arrays are float32 all the same", set_to(True, "jax_enable_x64"))
    return None


def legacy_keys(examined: Examined) -> Finding | None:
    """Keys that are plain numbers, as `jax.random.PRNGKey` makes them, or the setting that makes these typed ones."""
    if is_on("jax_enable_custom_prng"):
        text = "`jax_enable_custom_prng` is on, and PRNGKey gives typed keys here and plain numbers elsewhere"
        return Finding(text, "code that was tried here fails there", set_to(False, "jax_enable_custom_prng"))
    shape = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    raw = [
        name
        for name, value in examined.names.items()
        if not name.startswith("_")
        and isinstance(value, jax.Array)
        and value.dtype == "uint32"
        and value.shape == shape
    ]
    if not raw:
        return None
    told = ", ".join([*(f"`{name}`" for name in raw[:4]), *["…"] * (len(raw) > 4)])
    are = "is a key" if len(raw) == 1 else "are keys"
    text = f"{told} {are} of jax.random.PRNGKey, plain uint32[{shape[0]}]"
    lines = ["import jax", *(f"{name} = jax.random.wrap_key_data({name})" for name in raw)]
    cost = "adding to a key, or giving one where numbers belong, passes unnoticed; jax.random.key makes typed ones"
    return Finding(text, cost, "\n".join(lines))


def threefry(_: Examined) -> Finding | None:
    """Random numbers that depend on how arrays are sharded."""
    if is_on("jax_threefry_partitionable"):
        return None
    cost = "random numbers are others than elsewhere, and change with the number of devices"
    return Finding("`jax_threefry_partitionable` is off", cost, set_to(True, "jax_threefry_partitionable"), now=True)


def without_jit(_: Examined) -> Finding | None:
    """Programs that are run operation by operation."""
    if not is_on("jax_disable_jit"):
        return None
    cost = "jitted functions run operation by operation, some 10 to 100 times slower"
    return Finding("`jax_disable_jit` is on", cost, set_to(False, "jax_disable_jit"), now=True)


def debug_flags(_: Examined) -> Finding | None:
    """Settings for debugging that are on."""
    names = [name for name in DEBUG if is_on(name)]
    if not names:
        return None
    costs = "; ".join(dict.fromkeys(DEBUG[name] for name in names))
    are = "is on" if len(names) == 1 else "are on"
    return Finding(f"{', '.join(f'`{name}`' for name in names)} {are}", costs, set_to(False, *names))


def recoverability(_: Examined) -> Finding | None:
    """A job of several processes, all of which end when one does."""
    if jax.process_count() == 1 or value_of("jax_enable_recoverability") in (None, True):
        return None
    text = f"`jax_enable_recoverability` is off in a job of {jax.process_count()} processes"
    cost = "when one of them ends, JAX ends the others, and what they hold is lost"
    return Finding(text, cost, set_to(True, "jax_enable_recoverability"), "first", now=True)
