"""Facts about a pytree of arrays: a digest of every bit, its shapes in words, ranges of values, a small sample."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from msgspec import Struct

from .types import HostArray, Leaf, PyTree


def own(leaf: Leaf) -> Leaf:
    """A copy of a NumPy array, since its owner may write into it later; any other leaf itself."""
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def weakly_typed(array: jax.Array | HostArray) -> jax.Array:
    """The array with the same bits, as a weakly typed JAX array of its dtype.

    JAX's public API makes weakly typed arrays from Python scalars alone, in three dtypes; programs return them in any.
    """
    weak: jax.Array = jax.device_put(array)
    if not weak.weak_type:
        with jax.debug_nans(False), jax.debug_infs(False):  # a NaN that is only converted is no error of this step
            weak = jax.lax.convert_element_type_p.bind(
                weak, new_dtype=np.dtype(weak.dtype), weak_type=True, sharding=None
            )
    return weak


def is_key(leaf: Leaf) -> bool:
    """Whether a leaf is an array of typed PRNG keys (`jax.random.key`); legacy uint32 keys are plain arrays."""
    dtype = getattr(leaf, "dtype", None)
    # Keys have dtypes of JAX's own. To ask JAX takes some times as long, and most arrays are none.
    return not (dtype is None or isinstance(dtype, np.dtype)) and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def is_gone(tree: object) -> bool:
    """Whether an array of the tree was donated or deleted."""
    return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree_util.tree_leaves(tree))


def on_host(leaf: Leaf) -> HostArray:
    """A leaf as a NumPy array; typed keys as their key data. Blocks until the device has computed it."""
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def little_endian(array: HostArray) -> HostArray:
    """The array in little-endian byte order, as files and digests have it."""
    return array.astype(array.dtype.newbyteorder("<")) if array.dtype.byteorder == ">" else array


def spelled(array: HostArray) -> str:
    """Dtype and shape as text: `float32[3,4]`."""
    return f"{array.dtype.name}[{','.join(map(str, array.shape))}]"


def has_bits(leaf: Leaf) -> bool:
    """Whether a leaf is an array or a Python number."""
    return hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))


def opened(tree: PyTree) -> PyTree:
    """`tree` with the attributes of each object in the place of the object itself, under the name of its class.

    What can be called stays. An object's `repr` may have an address, or numbers cut short.
    """
    if isinstance(tree, jax.Array) or type(tree) is np.ndarray:  # the usual output, or a copy of it
        return tree
    try:
        return jax.tree_util.tree_map(_opened, tree)
    except RecursionError:  # it holds itself
        return tree


def _opened(leaf: Leaf) -> PyTree:
    held = {} if has_bits(leaf) or callable(leaf) else getattr(leaf, "__dict__", {})
    inside = {name: value for name, value in held.items() if not name.startswith("__")}
    return {type(leaf).__qualname__: jax.tree_util.tree_map(_opened, inside)} if inside else leaf


def spelled_value(leaf: Leaf) -> str:
    """The `repr` of a leaf that is no array, without an address."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(leaf))


SAMPLED = 64
"""Roughly how many elements of an array `quick_digest` reads: evenly spaced ones on a CPU, the first ones elsewhere."""


def quick_digest(leaves: list[Leaf]) -> bytes:
    """A cheap digest of some elements of every array, typed keys left out.

    Different digests prove different values; equal digests prove nothing.
    """
    hasher = hashlib.sha256()
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            if is_key(leaf) or leaf.is_deleted():
                continue
            leaf = leaf.addressable_data(0)  # slicing a sharded array may need an explicit output sharding
            if leaf.ndim and all(device.platform != "cpu" for device in leaf.devices()):
                leaf = leaf.ravel()[:SAMPLED]  # on the device, so that the whole array is not transferred
        flat = np.asarray(leaf).ravel()  # on a CPU this is a view, not a copy
        hasher.update(flat[:: max(1, flat.size // SAMPLED)].tobytes())
    return hasher.digest()


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


def _is_inexact(leaf: Leaf) -> bool:
    """Whether a leaf is a float, a complex number or an array of these that is fully addressable from this process."""
    if isinstance(leaf, (float, complex)):
        return True
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return False
    kind = getattr(leaf.dtype, "kind", "")
    if kind not in ("f", "c") and not jax.dtypes.issubdtype(leaf.dtype, np.inexact):
        return False
    return bool(getattr(leaf, "is_fully_addressable", True))


def _chunks(leaf: Leaf) -> Iterator[HostArray]:
    """The elements of an array in chunks of `CHUNK`, in a dtype that NumPy computes with natively."""
    flat = np.asarray(leaf).reshape(-1)
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
        good = int(is_finite.sum())
        if good < chunk.size:
            missing = int(np.isnan(chunk).sum())
            nan, inf = nan + missing, inf + chunk.size - good - missing
            chunk = chunk[is_finite]
        if good and ordered:
            finite += good
            total += float(chunk.sum(dtype=np.float64))  # in float32 the mean of a large array loses digits
            least, most = min(least, float(chunk.min())), max(most, float(chunk.max()))
    if not finite:
        return Values(path, size, nan, inf, None, None, None)
    return Values(path, size, nan, inf, least, most, total / finite)


def data_of(key: jax.Array | HostArray) -> bytes:
    """The key data of a typed or legacy (uint32) key as bytes; blocks until the device has it."""
    return on_host(key).tobytes()


def words(key: jax.Array | HostArray) -> str:
    """The words of the key data in hex, 8 digits each: `375f238fcddb151d`."""
    return _hex(data_of(key))


def all_words(keys: Mapping[str, jax.Array]) -> dict[str, str]:
    """`words` of each key by stream name."""
    # `RunKeys` has its keys as bytes on the host: asking it spares a device array per key.
    data = getattr(keys, "data", lambda name: data_of(keys[name]))
    return {name: _hex(data(name)) for name in keys}


def _hex(data: bytes) -> str:
    return np.frombuffer(data, np.uint32).astype(">u4").tobytes().hex()


def bytes_of(leaf: Leaf) -> int:
    """The size of an array in bytes, 0 for any other leaf."""
    size = getattr(leaf, "nbytes", 0)
    return size if isinstance(size, int) else 0  # an object of the user's may have an `nbytes` of any kind


def digest_of(tree: PyTree) -> str:
    """The first 16 hex digits of a sha256 over each leaf of `tree` in JAX's order.

    Hashed per leaf: its key path as `jax.tree_util.keystr` writes it, then dtype and shape as text, each closed by a
    zero byte, then the elements as little-endian bytes in C order (typed keys: their key data). Of an object that is no
    tree its class's name and its attributes are hashed (see `opened`), of any other leaf that is neither array nor number
    its `repr`.
    """
    hasher = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(opened(tree))[0]:
        hasher.update(jax.tree_util.keystr(path).encode() + b"\0")
        if not has_bits(leaf):
            hasher.update(spelled_value(leaf).encode() + b"\0")
            continue
        if is_key(leaf):
            hasher.update(str(leaf.dtype).encode())
        array = on_host(leaf)
        hasher.update(f"{array.dtype.name}{list(array.shape)}".encode() + b"\0")
        hasher.update(little_endian(array).tobytes())
    return hasher.hexdigest()[:16]


def describe(tree: PyTree, limit: int = 60) -> str:
    """The structure of `tree` as text, every array as `dtype[shape]`, cut to `limit` characters with `…`."""
    text = _describe(tree)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _describe(tree: PyTree) -> str:
    """`describe` without the cut: containers with their items, arrays as `dtype[shape]`, functions by name."""
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
    # An unregistered object is its own single leaf: describing that again would never end.
    if leaves and not (len(leaves) == 1 and leaves[0] is tree):
        return f"{type(tree).__name__}({', '.join(map(_describe, leaves))})"
    return type(tree).__name__


def kind_of(value: object) -> str:
    """What a value is, in the words of a message: `an array (float32[3,4])`, `None`, `the class Net`, `a dict`."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return f"an array ({_describe(value)})"
    name = type(value).__name__
    # JAX's own names of types, such as `PjitFunction`, are in no program of a user's.
    if callable(value) and type(value).__module__.partition(".")[0] == "jaxlib":
        name = "jitted function"
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def count_parameters(tree: Mapping[str, PyTree]) -> tuple[int, int]:
    """The number of elements in `params` (NNX: `Param`) and the bytes of all collections; arrays may be shapes."""
    parameters = sum(math.prod(leaf.shape) for leaf in _arrays(tree.get("params", tree.get("Param", {}))))
    return parameters, sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in _arrays(tree))


def _arrays(tree: PyTree) -> Iterator[Leaf]:
    return (leaf for leaf in jax.tree_util.tree_leaves(tree) if hasattr(leaf, "shape") and hasattr(leaf, "dtype"))


def alike(one: object, other: object) -> bool:
    """Whether two treedefs are equal; False where comparing their static data raises."""
    try:
        return bool(one == other)
    except Exception:  # an array among the static data, or a user's `__eq__` that fails
        return False


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
    """The spread of every array in `output`, whose first axis are the samples; empty arrays and keys are left out."""
    spreads = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(output)[0]:
        if not isinstance(leaf, jax.Array) or is_key(leaf) or not leaf.size:
            continue
        values = np.asarray(leaf)
        if values.dtype.kind != "c":
            values = values.astype(np.float64)  # sums in the output's own dtype lose digits
        deviation = float(np.std(values, axis=0, ddof=1).mean()) if len(values) > 1 else float("nan")
        spreads.append(Spread(jax.tree_util.keystr(path), float(values.mean().real), deviation))
    return tuple(spreads)
