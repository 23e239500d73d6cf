"""The comparison of two pytrees: whether every bit agrees, and if not, which leaves differ and by how much."""

from __future__ import annotations

import jax
import numpy as np
from msgspec import Struct

from .digest import alike, digest_of, has_bits, is_key, on_host, opened, spelled, spelled_value
from .types import HostArray, Leaf, PyTree
from .ulp import largest_ulp


class Difference(Struct, frozen=True):
    """One leaf in which two results differ.

    Attributes:
      path: its place in the result, as `jax.tree_util.keystr` writes it; empty where the result is one array.
      elements, size: how many of its elements differ, and how many it has.
      largest: the largest absolute difference of two elements, NaN if one of them is; None where they are no numbers.
      ulp: the same in units in the last place (see `largest_ulp`); None for integers, and where an element is NaN.
      text: the difference in words where it is none of numbers: another shape, dtype or value.
    """

    path: str
    elements: int = 0
    size: int = 0
    largest: float | None = None
    ulp: int | None = None
    text: str = ""


class Agreement(Struct, frozen=True):
    """The result of comparing a replay with the original run.

    Attributes:
      identical: whether every bit agrees; None where nothing of the original was left to compare with.
      against: what was compared: `output`, or `digest` where the output is gone, which tells no single differences.
      differences: the leaves that differ; empty for `digest`.
      said: circumstances of the replay as sentences: the model was edited since, its program was compiled anew.
    """

    identical: bool | None
    against: str = ""
    differences: tuple[Difference, ...] = ()
    said: tuple[str, ...] = ()


def with_output(was: PyTree, now: PyTree) -> Agreement:
    """Compares two results leaf by leaf and bit by bit. Trees that are put together otherwise are not compared."""
    old, old_tree = jax.tree_util.tree_flatten_with_path(opened(was))
    new, new_tree = jax.tree_util.tree_flatten_with_path(opened(now))
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


def with_digest(was: str, now: PyTree) -> Agreement:
    """Compares a result with the digest of another whose arrays are gone."""
    return Agreement(digest_of(now) == was, "digest")


def _difference(path: str, was: Leaf, now: Leaf) -> Difference | None:
    """The difference of two leaves, None where every bit agrees."""
    if was is now:
        return None  # the very same array: nothing has to be read
    if not (has_bits(was) and has_bits(now)):
        before, after = spelled_value(was), spelled_value(now)
        same = type(was) is type(now) and before == after
        return None if same else Difference(path, text=f"{before} → {after}")
    one, other = on_host(was), on_host(now)
    if one.dtype != other.dtype or one.shape != other.shape:
        return Difference(path, text=f"{spelled(one)} → {spelled(other)}")
    differ = _bits(one) != _bits(other)
    if one.ndim < differ.ndim:  # complex: one entry for the real and one for the imaginary part
        differ = differ.any(-1)
    count = int(np.count_nonzero(differ))
    if not count:
        return None
    if is_key(was) or one.dtype.kind not in "iufcV":  # V: bfloat16 and float8 on NumPy
        return Difference(path, count, one.size)
    wide = np.complex128 if one.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):  # inf - inf and NaN would warn
        apart = np.abs(one[differ].astype(wide) - other[differ].astype(wide))
    # The largest is NaN if any is.
    return Difference(path, count, one.size, float(apart.max()), largest_ulp(one[differ], other[differ]))


def _bits(array: HostArray) -> HostArray:
    """The elements viewed as integers of the same size; complex ones as two, on an added last axis.

    Compared as floats, 0.0 would equal -0.0, and NaN nothing.
    """
    array = np.ascontiguousarray(array).reshape(array.shape)  # `ascontiguousarray` makes a scalar 1-dimensional
    if array.dtype.kind == "c":
        array = array.view(f"f{array.dtype.itemsize // 2}").reshape(*array.shape, 2)
    return array.view(f"i{array.dtype.itemsize}") if array.dtype.itemsize in (1, 2, 4, 8) else array
