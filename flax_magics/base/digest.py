"""What can be told of a tree of arrays: a digest of every bit, its shape in words, its range, a few of its values.

And of two of them: whether they agree in every bit, and if not, which leaves differ and by how much.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from msgspec import Struct

from .types import HostArray, Leaf, PyTree
from .ulp import largest_ulp


def own(leaf: Leaf) -> Leaf:
    """A copy of an array of NumPy's, which its owner may write into; any other leaf itself."""
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def weakly_typed(array: jax.Array | HostArray) -> jax.Array:
    """The array, weakly typed, with the same bits.

    `jnp.asarray(1.5)` is the one that JAX has a call for, of three dtypes; what a program gives may be of any.
    """
    weak: jax.Array = jax.device_put(array)
    if not weak.weak_type:
        with jax.debug_nans(False), jax.debug_infs(False):  # nothing is computed that could go wrong
            weak = jax.lax.convert_element_type_p.bind(
                weak, new_dtype=np.dtype(weak.dtype), weak_type=True, sharding=None
            )
    return weak


def is_key(leaf: Leaf) -> bool:
    """Whether a leaf is an array of typed keys."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def on_host(leaf: Leaf) -> HostArray:
    """A leaf's numbers, on the host, once the device has them; of typed keys their key data."""
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def little_endian(array: HostArray) -> HostArray:
    """The array, its bytes in the order in which files and digests have them."""
    return array.astype(array.dtype.newbyteorder("<")) if array.dtype.byteorder == ">" else array


def spelled(array: HostArray) -> str:
    """Dtype and shape: `float32[3,4]`."""
    return f"{array.dtype.name}[{','.join(map(str, array.shape))}]"


def _has_bits(leaf: Leaf) -> bool:
    """Whether a leaf is an array, or a number of Python's."""
    return hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))


def opened(tree: PyTree) -> PyTree:
    """`tree` with the attributes of each object in the place of the object itself, under the name of its class.

    An object that is no tree of JAX's is told by what it holds: its `repr` may have an address, or numbers cut short.
    Arrays, plain values and what can be called stay. One that holds itself stays, too.
    """
    try:
        return jax.tree_util.tree_map(_opened, tree)
    except RecursionError:
        return tree


def _opened(leaf: Leaf) -> PyTree:
    held = {} if _has_bits(leaf) or callable(leaf) else getattr(leaf, "__dict__", {})
    inside = {name: value for name, value in held.items() if not name.startswith("__")}
    return {type(leaf).__qualname__: jax.tree_util.tree_map(_opened, inside)} if inside else leaf


def _spelled_value(leaf: Leaf) -> str:
    """A leaf that is no array: its `repr`, without the address that it may have."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(leaf))


SAMPLED = 64
"""Elements of an array that `quick_digest` reads, about: evenly spaced ones on a CPU, elsewhere the first."""


def quick_digest(leaves: list[Leaf]) -> bytes:
    """A digest of some elements of every array, random keys left out: where it is another, so are the values."""
    hasher = hashlib.sha256()
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            if is_key(leaf) or leaf.is_deleted():
                continue
            leaf = leaf.addressable_data(0)  # taking elements of a sharded array needs to be told how
            if leaf.ndim and all(device.platform != "cpu" for device in leaf.devices()):
                leaf = leaf.ravel()[:SAMPLED]  # spares the way of the whole array
        flat = np.asarray(leaf).ravel()  # on a CPU where it is
        hasher.update(flat[:: max(1, flat.size // SAMPLED)].tobytes())
    return hasher.digest()


VALUES = 48
"""Values that are taken of one output at most."""


def sample_of(tree: PyTree) -> dict[str, object]:
    """Values of the arrays of `tree`, as JSON data.

    The first `VALUES` arrays share them: each gives as many, at least one, evenly spaced in C order from its first element
    to its last; one that has fewer elements gives all of them. Typed keys give their key data.

    Returns:
      `leaves`: of each array its `path` as `jax.tree_util.keystr` writes it, `array` (`float32[3,4]`), and how many
      `values` it gives. `bits`: the values of all of them one after the other, little-endian, in base64.
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
    return _has_bits(leaf) and not (isinstance(dtype, np.dtype) and dtype.kind in "OSUMm")


def _positions(size: int, most: int) -> list[int]:
    """Where in `size` elements the values are taken, `most` of them at most."""
    if size <= most:
        return list(range(size))
    return [0] if most == 1 else [i * (size - 1) // (most - 1) for i in range(most)]


CHUNK = 1 << 20
"""Elements that are looked at at once: what an output of any size takes beside itself."""


class Values(Struct, frozen=True, forbid_unknown_fields=True):
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


def values_of(tree: PyTree) -> tuple[Values, ...]:
    """The arrays of `tree` that hold floating-point or complex numbers, in JAX's order. Reads all of them."""
    leaves = jax.tree_util.tree_flatten_with_path(opened(tree))[0]
    return tuple(_values(jax.tree_util.keystr(path), leaf) for path, leaf in leaves if _is_inexact(leaf))


def has_nan(tree: PyTree) -> bool:
    """Whether any number in `tree` is NaN."""
    leaves = [tree] if isinstance(tree, jax.Array) else jax.tree_util.tree_leaves(tree)
    for leaf in leaves:
        if _is_inexact(leaf):
            for part in _parts(leaf):
                least = np.minimum.reduce(part)  # NaN if any of them is: a third of what `isnan` takes of a few numbers
                if least != least:
                    return True
    return False


def _is_inexact(leaf: Leaf) -> bool:
    """Whether a leaf is an array of floats or complex numbers, all of which this process can read."""
    if isinstance(leaf, (float, complex)):
        return True
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return False
    kind = getattr(leaf.dtype, "kind", "")
    if kind not in ("f", "c") and not jax.dtypes.issubdtype(leaf.dtype, np.inexact):
        return False
    return bool(getattr(leaf, "is_fully_addressable", True))


def _parts(leaf: Leaf) -> Iterator[HostArray]:
    """The numbers of an array, `CHUNK` at a time, in a dtype that NumPy itself has."""
    flat = np.asarray(leaf).reshape(-1)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        # bfloat16 and the kinds of float8: every one of their numbers is one of float32's.
        yield part if part.dtype.kind in "fc" and part.dtype.itemsize > 2 else part.astype(np.float32)


def _values(path: str, leaf: Leaf) -> Values:
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


def data_of(key: jax.Array | HostArray) -> bytes:
    """Host key data of a typed or a legacy (uint32) key; waits for the device."""
    return on_host(key).tobytes()


def words(key: jax.Array | HostArray) -> str:
    """The words of the key data in hex, 8 digits each: `375f238fcddb151d`."""
    return _hex(data_of(key))


def all_words(keys: Mapping[str, jax.Array]) -> dict[str, str]:
    """`words` of each key; of those of a draw (`RunKeys`), which has their data on the host, no array is made."""
    data = getattr(keys, "data", lambda name: data_of(keys[name]))
    return {name: _hex(data(name)) for name in keys}


def _hex(data: bytes) -> str:
    return "".join(f"{word:08x}" for word in np.frombuffer(data, np.uint32))


def bytes_of(leaf: Leaf) -> int:
    """Bytes of an array, 0 for what is none."""
    size = getattr(leaf, "nbytes", 0)
    return size if isinstance(size, int) else 0


def digest_of(tree: PyTree) -> str:
    """sha256, first 16 hex digits, over each leaf of `tree` in JAX's order.

    Per leaf: its key path as `jax.tree_util.keystr` writes it, dtype and shape as text, each closed by a zero byte, then
    its elements as little-endian bytes in C order (typed keys: their key data). An object that is no tree is its class's
    name and its attributes (see `opened`), any other leaf that is no array its `repr`.
    """
    hasher = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(opened(tree))[0]:
        hasher.update(jax.tree_util.keystr(path).encode() + b"\0")
        if not _has_bits(leaf):
            hasher.update(_spelled_value(leaf).encode() + b"\0")
            continue
        if is_key(leaf):
            hasher.update(str(leaf.dtype).encode())
        array = on_host(leaf)
        hasher.update(f"{array.dtype.name}{list(array.shape)}".encode() + b"\0")
        hasher.update(little_endian(array).tobytes())
    return hasher.hexdigest()[:16]


def describe(tree: PyTree, limit: int = 60) -> str:
    """The structure of `tree` with every array as `dtype[shape]`, cut to `limit` characters with `…`."""
    text = _describe(tree)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _describe(tree: PyTree) -> str:
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        return f"{tree.dtype}[{','.join(map(str, tree.shape))}]"
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key}: {_describe(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        inner = ", ".join(f"{name}={_describe(value)}" for name, value in zip(tree._fields, tree, strict=True))
        return f"{type(tree).__name__}({inner})"
    if isinstance(tree, (tuple, list)):
        inner = ", ".join(map(_describe, tree))
        if isinstance(tree, list):
            return f"[{inner}]"
        return f"({inner},)" if len(tree) == 1 else f"({inner})"
    if tree is None or isinstance(tree, (bool, int, float, complex, str)):
        return repr(tree)
    if callable(tree) and not isinstance(tree, type) and isinstance(getattr(tree, "__name__", None), str):
        return str(tree.__name__)
    leaves = jax.tree_util.tree_leaves(tree)
    if leaves and not (len(leaves) == 1 and leaves[0] is tree):
        return f"{type(tree).__name__}({', '.join(map(_describe, leaves))})"
    return type(tree).__name__


def count_parameters(tree: Mapping[str, PyTree]) -> tuple[int, int]:
    """Elements of `params` (of NNX's `Param`), and bytes of everything; of arrays or of their shapes."""
    parameters = sum(math.prod(leaf.shape) for leaf in _arrays(tree.get("params", tree.get("Param", {}))))
    return parameters, sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in _arrays(tree))


def _arrays(tree: PyTree) -> Iterator[Leaf]:
    return (leaf for leaf in jax.tree_util.tree_leaves(tree) if hasattr(leaf, "shape") and hasattr(leaf, "dtype"))


class Difference(Struct, frozen=True):
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


class Agreement(Struct, frozen=True):
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


def with_output(was: PyTree, now: PyTree) -> Agreement:
    """Compares two results leaf by leaf, bit by bit."""
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
    """Compares a result with the digest of another."""
    return Agreement(digest_of(now) == was, "digest")


def _difference(path: str, was: Leaf, now: Leaf) -> Difference | None:
    if was is now:
        return None
    if not (_has_bits(was) and _has_bits(now)):
        before, after = _spelled_value(was), _spelled_value(now)
        same = type(was) is type(now) and before == after
        return None if same else Difference(path, text=f"{before} → {after}")
    one, other = on_host(was), on_host(now)
    if one.dtype != other.dtype or one.shape != other.shape:
        return Difference(path, text=f"{spelled(one)} → {spelled(other)}")
    differ = _bits(one) != _bits(other)
    if one.ndim < differ.ndim:  # a complex number is two
        differ = differ.any(-1)
    count = int(np.count_nonzero(differ))
    if not count:
        return None
    if is_key(was) or one.dtype.kind not in "iufcV":
        return Difference(path, count, one.size)
    wide = np.complex128 if one.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):  # infinite ones, and NaN
        apart = np.abs(one[differ].astype(wide) - other[differ].astype(wide))
    largest = float(apart.max())  # NaN if any is
    return Difference(path, count, one.size, largest, largest_ulp(one[differ], other[differ]))


def _bits(array: HostArray) -> HostArray:
    """The elements as integers of their size; of a complex number its parts, on a last axis of 2."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.kind == "c":
        array = array.view(f"f{array.dtype.itemsize // 2}").reshape(*array.shape, 2)
    return array.view(f"i{array.dtype.itemsize}") if array.dtype.itemsize in (1, 2, 4, 8) else array


def alike(one: object, other: object) -> bool:
    """Whether two treedefs are equal, static data that cannot be compared being another."""
    try:
        return bool(one == other)
    except Exception:  # an array among the static data, or whatever a class of the user's raises
        return False


class Spread(Struct, frozen=True, forbid_unknown_fields=True):
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


def spread_of(output: PyTree) -> tuple[Spread, ...]:
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
