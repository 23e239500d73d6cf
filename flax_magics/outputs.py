"""What an output's numbers are like: how many are NaN or infinite, and the range of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

CHUNK = 1 << 20
"""Elements that are looked at at once: what an output of any size takes beside itself."""


@dataclass(frozen=True)
class Values:
    """One array of floating-point numbers.

    Attributes:
      path: where it is in the output, as `jax.tree_util.keystr` writes it; empty where it is all of it.
      size, nan, inf: how many numbers there are, and how many are NaN or infinite.
      least, most, mean: of the finite ones; None where there are none, and of complex numbers.
    """

    path: str
    size: int
    nan: int
    inf: int
    least: float | None
    most: float | None
    mean: float | None


def values_of(tree: Any) -> tuple[Values, ...]:
    """The arrays of `tree` that hold floating-point or complex numbers, in JAX's order. Reads all of them."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return tuple(_values(jax.tree_util.keystr(path), leaf) for path, leaf in leaves if _is_inexact(leaf))


def has_nan(tree: Any) -> bool:
    """Whether any number in `tree` is NaN."""
    leaves = [tree] if isinstance(tree, jax.Array) else jax.tree_util.tree_leaves(tree)
    for leaf in leaves:
        if _is_inexact(leaf):
            for part in _parts(leaf):
                least = np.minimum.reduce(part)  # NaN if any of them is: a third of what `isnan` takes of a few numbers
                if least != least:
                    return True
    return False


def _is_inexact(leaf: Any) -> bool:
    """Whether it can hold NaN, and all of it is in reach."""
    if isinstance(leaf, (float, complex)):
        return True
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return False
    kind = getattr(leaf.dtype, "kind", "")
    if kind not in ("f", "c") and not jax.dtypes.issubdtype(leaf.dtype, np.inexact):
        return False
    return bool(getattr(leaf, "is_fully_addressable", True))


def _parts(leaf: Any) -> Iterator[np.ndarray[Any, Any]]:
    """The numbers, some at a time, in a dtype that NumPy itself has."""
    flat = np.asarray(leaf).reshape(-1)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        # bfloat16 and the kinds of float8: every one of their numbers is one of float32's.
        yield part if part.dtype.kind in "fc" and part.dtype.itemsize > 2 else part.astype(np.float32)


def _values(path: str, leaf: Any) -> Values:
    nan = inf = finite = size = 0
    total, least, most = 0.0, np.inf, -np.inf
    ordered = True
    for part in _parts(leaf):
        size += part.size
        ordered = part.dtype.kind == "f"
        is_finite = np.isfinite(part)
        good = int(is_finite.sum())
        if good < part.size:
            missing = int(np.isnan(part).sum())
            nan, inf = nan + missing, inf + part.size - good - missing
            part = part[is_finite]
        if good and ordered:
            finite += good
            total += float(part.sum(dtype=np.float64))
            least, most = min(least, float(part.min())), max(most, float(part.max()))
    if not finite:
        return Values(path, size, nan, inf, None, None, None)
    return Values(path, size, nan, inf, least, most, total / finite)
