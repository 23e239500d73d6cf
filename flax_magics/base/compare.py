"""Whether two results agree in every bit, and if not, which leaves differ and by how much; and how draws differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from .digest import digest_of, is_key, on_host, spelled
from .ulp import largest_ulp


@dataclass(frozen=True)
class Difference:
    """One leaf that differs.

    Attributes:
      path: where it is, as `jax.tree_util.keystr` writes it; empty where the result is one array.
      elements, size: how many of its elements differ, and how many there are.
      largest: the largest absolute difference of two elements, NaN where one of them is; None where they are no numbers.
      ulp: the same in units in the last place, see `largest_ulp`. None for integers, and where one of two is NaN.
      text: what it is in words, where it is no difference of numbers: another shape, dtype or value.
    """

    path: str
    elements: int = 0
    size: int = 0
    largest: float | None = None
    ulp: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Agreement:
    """How a replay compares with the run.

    Attributes:
      identical: None where there was nothing to compare with.
      against: `output`, or `digest` where the output was gone, which can only tell whether all is the same.
      differences: the leaves that differ.
      said: what is to be known about the replay: the model was edited since, its program was made anew.
    """

    identical: bool | None
    against: str = ""
    differences: tuple[Difference, ...] = ()
    said: tuple[str, ...] = ()


def with_output(was: Any, now: Any) -> Agreement:
    """Compares two results leaf by leaf, bit by bit."""
    old_tree: Any
    new_tree: Any
    old, old_tree = jax.tree_util.tree_flatten_with_path(was)
    new, new_tree = jax.tree_util.tree_flatten_with_path(now)
    if [path for path, _ in old] != [path for path, _ in new] or not alike(old_tree, new_tree):
        return Agreement(
            False, "output", (Difference("", text=f"{len(old)} leaves → {len(new)}, put together otherwise"),)
        )
    differences = [
        difference
        for (path, one), (_, other) in zip(old, new, strict=True)
        if (difference := _difference(jax.tree_util.keystr(path), one, other)) is not None
    ]
    return Agreement(not differences, "output", tuple(differences))


def with_digest(was: str, now: Any) -> Agreement:
    """Compares a result with the digest of another."""
    return Agreement(digest_of(now) == was, "digest")


def _difference(path: str, was: Any, now: Any) -> Difference | None:
    if was is now:
        return None
    one, other = _values(was), _values(now)
    if one is None or other is None:
        return (
            None if type(was) is type(now) and repr(was) == repr(now) else Difference(path, text=f"{was!r} → {now!r}")
        )
    if one.dtype != other.dtype or one.shape != other.shape:
        return Difference(path, text=f"{spelled(one)} → {spelled(other)}")
    differ = _bits(one) != _bits(other)
    if one.ndim < differ.ndim:  # a complex number is two
        differ = differ.any(-1)
    count = int(np.count_nonzero(differ))
    if not count:
        return None
    numbers = one.dtype.kind in "iufc" or one.dtype.kind == "V"
    if is_key(was) or not numbers:
        return Difference(path, count, one.size)
    wide = np.complex128 if one.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):  # infinite ones, and NaN
        apart = np.abs(one.astype(wide) - other.astype(wide))
    largest = float("nan") if bool(np.isnan(apart[differ]).any()) else float(apart[differ].max())
    return Difference(path, count, one.size, largest, largest_ulp(one[differ], other[differ]))


def _values(leaf: Any) -> np.ndarray[Any, Any] | None:
    if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
        return None
    return on_host(leaf)


def _bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The elements as integers of their size; of a complex number its parts, on a last axis of 2."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.kind == "c":
        array = array.view(f"f{array.dtype.itemsize // 2}").reshape(*array.shape, 2)
    return array.view(f"i{array.dtype.itemsize}") if array.dtype.itemsize in (1, 2, 4, 8) else array


def alike(one: Any, other: Any) -> bool:
    """Whether two treedefs are equal, static data that cannot be compared being another."""
    try:
        return bool(one == other)
    except Exception:  # an array among the static data, or whatever a class of the user's raises
        return False


@dataclass(frozen=True)
class Spread:
    """How one array of the output differs between draws.

    Attributes:
      path: where it is in the output, as `jax.tree_util.keystr` writes it; empty where the output is one array.
      mean: over all draws and elements.
      deviation: each element's standard deviation over the draws (n - 1 in the denominator), averaged over the elements;
        NaN for one draw.
    """

    path: str
    mean: float
    deviation: float


def spread_of(output: Any) -> tuple[Spread, ...]:
    """The spread of every array of numbers in `output`, draws on its first axis; empty arrays and keys left out."""
    spreads = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(output)[0]:
        if not isinstance(leaf, jax.Array) or is_key(leaf) or not leaf.size:
            continue
        values = np.asarray(leaf)
        if values.dtype.kind != "c":
            values = values.astype(np.float64)
        deviation = float(np.std(values, axis=0, ddof=1).mean()) if len(values) > 1 else float("nan")
        spreads.append(Spread(jax.tree_util.keystr(path), float(values.mean().real), deviation))
    return tuple(spreads)
