"""What is known of a run's output: its numbers, facts that outlive it, and whether another output agrees with it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from msgspec import Struct

from .digest import (
    alike,
    describe,
    digest_of,
    has_bits,
    is_gone,
    is_key,
    is_spread,
    little_endian,
    on_host,
    opened,
    spelled,
    spelled_value,
)
from .types import HostArray, Leaf, PyTree
from .ulp import largest_ulp

VALUES = 48
"""The most values that `sample_of` takes of one output."""


def sample_of(tree: PyTree) -> dict[str, object]:
    """A small sample of the values in `tree`, as JSON data.

    The first `VALUES` arrays share the budget evenly, with at least one value each. An array's values are evenly spaced
    in C order from its first element to its last; a smaller array is taken whole. Typed keys count as their key data.

    Returns:
      `leaves`: for each array its `path` as `jax.tree_util.keystr` writes it, its type as `array` (`float32[3,4]`), and
      the number of its `values`. `bits`: all values concatenated, little-endian, in base64.
    """
    leaves_by_path = jax.tree_util.tree_flatten_with_path(opened(tree))[0]
    rows = [(path, leaf) for path, leaf in leaves_by_path if _is_number(leaf)][:VALUES]
    each = max(1, VALUES // max(1, len(rows)))
    leaves, bits = [], []
    for path, leaf in rows:
        array = on_host(leaf)
        values = array.flat[_positions(array.size, each)]
        leaves.append({"path": jax.tree_util.keystr(path), "array": spelled(array), "values": int(values.size)})
        bits.append(little_endian(values).tobytes())
    return {"leaves": leaves, "bits": base64.b64encode(b"".join(bits)).decode()}


def _is_number(leaf: Leaf) -> bool:
    dtype = getattr(leaf, "dtype", None)
    # Objects, bytes, text and dates are no numbers; typed keys have a dtype that is no np.dtype, and count.
    return has_bits(leaf) and not (isinstance(dtype, np.dtype) and dtype.kind in "OSUMm")


@lru_cache(maxsize=64)
def _positions(size: int, most: int) -> HostArray:
    """At most `most` evenly spaced indices into `size` elements, the first and the last included."""
    most = min(size, most)
    return np.array([0] if most == 1 else [i * (size - 1) // (most - 1) for i in range(most)], np.intp)


CHUNK = 1 << 20
"""Elements processed at once, which bounds the temporary memory for an output of any size."""


class Values(Struct, frozen=True, forbid_unknown_fields=True):
    """Statistics of one floating-point or complex array of an output.

    Attributes:
      path: its place in the output, as `jax.tree_util.keystr` writes it; empty where the output is this array.
      size, nan, inf: the number of elements, of NaNs and of infinities.
      least, most, mean: over the finite elements; None where there are none, and for complex numbers.
    """

    path: str
    size: int
    nan: int
    inf: int
    least: float | None
    most: float | None
    mean: float | None


def values_of(tree: PyTree) -> tuple[Values, ...]:
    """`Values` of each floating-point or complex array of `tree`, in JAX's order. Reads every element."""
    leaves = jax.tree_util.tree_flatten_with_path(opened(tree))[0]
    return tuple(_values(jax.tree_util.keystr(path), leaf) for path, leaf in leaves if _is_inexact(leaf))


def has_nan(tree: PyTree) -> bool:
    """Whether any floating-point number in `tree` is NaN. Reads every element, so it blocks until they are computed."""
    leaves = [tree] if isinstance(tree, jax.Array) else jax.tree_util.tree_leaves(tree)
    for leaf in leaves:
        if _is_inexact(leaf):
            for chunk in _chunks(leaf):
                # NaN if any element is; three times as fast as `isnan` on small arrays.
                least = np.minimum.reduce(chunk)
                if least != least:
                    return True
    return False


Floats = tuple[tuple[int, np.dtype[Any]], ...]
"""Indices and dtypes of the leaves of a pytree that `any_nan` looks at."""


def floats_in(tree: PyTree) -> Floats | None:
    """What `any_nan` takes for pytrees like this one; None where only `has_nan` can read them."""
    floats = [(i, leaf) for i, leaf in enumerate(jax.tree_util.tree_leaves(tree)) if _is_inexact(leaf)]
    try:
        for _, leaf in floats:
            np.frombuffer(leaf, leaf.dtype)  # on the host, in one piece, and of a dtype that NumPy knows
    except (AttributeError, BufferError, TypeError, ValueError):
        return None
    plain = all(isinstance(leaf, jax.Array) and leaf.size and leaf.dtype.itemsize > 2 for _, leaf in floats)
    return tuple((i, leaf.dtype) for i, leaf in floats) if plain else None


def any_nan(tree: PyTree, floats: Floats) -> bool:
    """`has_nan` of small arrays, by reading them where they lie, at a third of the cost."""
    leaves = [tree] if isinstance(tree, jax.Array) else jax.tree_util.tree_leaves(tree)
    for i, dtype in floats:
        leaf: Any = leaves[i]
        values = np.frombuffer(leaf, dtype)
        most = values.item(values.argmax())  # the first NaN if there is any; a ufunc takes three times as long
        if most != most:
            return True
    return False


def nan_in(data: bytes, dtype: np.dtype[Any]) -> bool:
    """Whether a floating-point number of `data` is NaN."""
    if len(data) <= 512 and dtype.char in "fd":
        # NumPy's code is not in the processor's caches between two runs, and Python's own is.
        numbers: Any = memoryview(data)
        total = sum(numbers.cast(dtype.char))
        if total == total:  # else one of them is NaN, or infinities have come together
            return False
    return any_nan(np.frombuffer(data, dtype), ((0, dtype),))


def _is_inexact(leaf: Leaf) -> bool:
    """Whether a leaf is a float, a complex number or an array of these of which this process has every part."""
    if isinstance(leaf, (float, complex)):
        return True
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return False
    kind = getattr(leaf.dtype, "kind", "")
    if kind not in ("f", "c") and not jax.dtypes.issubdtype(leaf.dtype, np.inexact):
        return False
    return not is_spread(leaf)


def _chunks(leaf: Leaf) -> Iterator[HostArray]:
    """The elements of an array in chunks of `CHUNK`, in a dtype that NumPy computes with natively."""
    parts = [leaf]
    if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
        # Each where it lies: to put them together takes four times as long.
        parts = [shard.data for shard in leaf.addressable_shards if shard.replica_id == 0]
    for flat in (np.asarray(part).reshape(-1) for part in parts):
        for start in range(0, flat.size, CHUNK):
            chunk = flat[start : start + CHUNK]
            # float32 holds every bfloat16, float16 and float8 number exactly.
            yield chunk if chunk.dtype.kind in "fc" and chunk.dtype.itemsize > 2 else chunk.astype(np.float32)


def _values(path: str, leaf: Leaf) -> Values:
    """Statistics of one array in a single pass over its chunks, so that memory stays bounded."""
    nan = inf = finite = size = 0
    total, least, most = 0.0, np.inf, -np.inf
    ordered = True
    for chunk in _chunks(leaf):
        size += chunk.size
        ordered = chunk.dtype.kind == "f"
        is_finite = np.isfinite(chunk)
        good = int(np.count_nonzero(is_finite))  # a sum of them takes ten times as long
        if good < chunk.size:
            missing = int(np.count_nonzero(np.isnan(chunk)))
            nan, inf = nan + missing, inf + chunk.size - good - missing
            chunk = chunk[is_finite]
        if good and ordered:
            finite += good
            total += float(chunk.sum(dtype=np.float64))  # in float32 the mean of a large array loses digits
            least, most = min(least, float(chunk.min())), max(most, float(chunk.max()))
    if not finite:
        return Values(path, size, nan, inf, None, None, None)
    return Values(path, size, nan, inf, least, most, total / finite)


class Spread(Struct, frozen=True, forbid_unknown_fields=True):
    """How one array of an output varies between the samples of one run.

    Attributes:
      path: its place in the output, as `jax.tree_util.keystr` writes it; empty where the output is one array.
      mean: over all samples and elements.
      deviation: each element's standard deviation over the samples (n - 1 in the denominator), averaged over the elements;
        NaN for one draw.
    """

    path: str
    mean: float
    deviation: float


def spread_of(output: PyTree) -> tuple[Spread, ...]:
    """The spread of every array in `output`, whose first axis are the samples.

    Empty arrays, keys, and arrays of which other processes hold parts are left out.
    """
    spreads = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(output)[0]:
        if not isinstance(leaf, jax.Array) or is_key(leaf) or not leaf.size or is_spread(leaf):
            continue
        values = np.asarray(leaf)
        if values.dtype.kind != "c":
            values = values.astype(np.float64)  # sums in the output's own dtype lose digits
        deviation = float(np.std(values, axis=0, ddof=1).mean()) if len(values) > 1 else float("nan")
        spreads.append(Spread(jax.tree_util.keystr(path), float(values.mean().real), deviation))
    return tuple(spreads)


SMALL = 4096
"""The most bytes of an output that is copied: some times as many as the facts that are computed of it."""


def _small_copy(tree: PyTree) -> PyTree | None:
    """The JAX arrays of a small pytree as NumPy arrays of their own; None where it is larger, or has other leaves."""
    size = 0
    for leaf in jax.tree_util.tree_leaves(tree):
        if not isinstance(leaf, jax.Array) or is_key(leaf) or not leaf.is_fully_addressable:
            return None
        size += leaf.nbytes
    return None if size > SMALL else jax.tree_util.tree_map(np.array, tree)


class OutputFacts(Struct, eq=False):
    """Facts about a run's output, each computed once; copies of a Run share them, and they outlive the output."""

    digest: str | None = None
    shape: str | None = None
    spread: tuple[Spread, ...] | None = None
    values: tuple[Values, ...] | None = None
    copy: PyTree = None
    """A small output, on the host, of which `digest` and `values` are computed when somebody reads them."""

    def take(self, output: PyTree) -> None:
        """Computes `digest` and `values` from `output` unless they are known. Call it before the output is released."""
        self.digest = self.digest or digest_of(output)
        if self.values is None:
            self.values = values_of(output)

    def put_off(self, output: PyTree) -> bool:
        """Copies a small output, a fifth of the work of `take`, and says so; of any other takes the facts.

        Of one that was donated or deleted there is only the shape to take.
        """
        self.shape = self.shape or describe(output)
        if is_gone(output):
            return False
        copy = None if self.digest is not None else _small_copy(output)
        if copy is None:
            self.take(output)
            return False
        self.copy = copy
        return True

    def keep(self, copy: HostArray) -> None:
        """Keeps a copy of the output, of which the facts are computed when somebody reads them."""
        if self.digest is None:
            self.copy = copy

    def read(self) -> OutputFacts:
        """The facts, with those that were put off."""
        if self.copy is not None:
            self.take(self.copy)
            self.copy = None
        return self


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
