"""Mapped axes that a model names: `BatchNorm(axis_name='batch')`, written to run inside `jax.pmap(…, axis_name='batch')`.

Where nothing binds such an axis, it is bound with size 1 around the run, as `pmap` on one device does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax

_UNBOUND = re.compile(r"unbound axis name:? '?(\w+)")


def unbound_axis(error: BaseException) -> str | None:
    """The axis that JAX misses, None for any other error."""
    found = _UNBOUND.search(str(error)) if isinstance(error, (NameError, KeyError)) else None
    return found[1] if found else None


def bound(function: Callable[[], Any], axes: Iterable[str]) -> Any:
    """The result of `function()`, run where each of `axes` is there with size 1."""
    for name in axes:
        function = _bind(function, name)
    return function()


def _bind(function: Callable[[], Any], name: str) -> Callable[[], Any]:
    def run() -> Any:
        outputs = jax.vmap(function, axis_name=name, axis_size=1)()
        return jax.tree_util.tree_map(lambda leaf: leaf[0], outputs)

    return run


def inside(axes: Iterable[str], code: str) -> str:
    """The run by hand as a person binds the axes: `jax.vmap(lambda: …, axis_name='batch', axis_size=1)()`."""
    for name in sorted(axes):
        code = f"jax.vmap(lambda: {code}, axis_name='{name}', axis_size=1)()"
    return code
