"""Private names of JAX: a function for each, with what is done where a version has it no longer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

CALLBACKS = frozenset({"jax._src.callback", "jax._src.debugging"})
"""Modules through which a running program calls Python."""
TRANSFORMS = "jax._src.interpreters."
"""What the modules are called in which JAX calls a function to trace, differentiate or map it."""


def is_tracing() -> bool:
    """Whether JAX traces something on this thread; False where it cannot be told: the calling modules still tell most."""
    return not _is_clean()()


@cache
def _is_clean() -> Callable[[], bool]:
    try:
        from jax._src.core import trace_state_clean
    except ImportError:
        return lambda: True
    clean: Callable[[], bool] = trace_state_clean
    return clean


def role_of(module: str) -> Literal["callback", "trace"] | None:
    """What a frame of the module means for the code that it calls, None for nothing."""
    if not module.startswith("jax._src."):
        return None
    if module in CALLBACKS:
        return "callback"
    return "trace" if module.startswith(TRANSFORMS) else None
