"""Facts about a pytree of arrays: what its leaves are, a digest of every bit, its shapes in words."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from .types import HostArray, Leaf, PyTree


def owned_copy(leaf: Leaf) -> Leaf:
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


def may_be_key(leaf: Leaf) -> bool:
    """Whether a leaf can be a PRNG key: typed keys, or uint32 of the shape of a legacy key."""
    return isinstance(leaf, jax.Array) and (is_key(leaf) or (leaf.dtype == "uint32" and leaf.shape in ((2,), (4,))))


def is_gone(tree: object) -> bool:
    """Whether an array of the tree was donated or deleted."""
    return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree_util.tree_leaves(tree))


def on_host(leaf: Leaf) -> HostArray:
    """A leaf as a NumPy array; typed keys as their key data. Blocks until the device has computed it.

    Of an array that spans the processes of a job it is the part that this one holds, in one row.
    """
    array = jax.random.key_data(leaf) if is_key(leaf) else leaf
    if is_spread(array):
        parts = {str(shard.index): shard.data for shard in array.addressable_shards}
        return np.concatenate([np.asarray(part).ravel() for part in parts.values()])
    return np.asarray(array)


def is_spread(leaf: Leaf) -> bool:
    """Whether other processes hold parts of an array that this one does not have."""
    return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


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


def digest_of_alike(tree: PyTree) -> str:
    """A `quick_digest` of the arrays and numbers of a tree that every process of a job should have alike, in hex."""
    leaves = [
        leaf
        for leaf in jax.tree_util.tree_leaves(tree)
        if isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex))
        and getattr(getattr(leaf, "dtype", None), "kind", "f") not in "OUSMm"
        and not is_spread(leaf)
    ]
    return quick_digest(leaves).hex()


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
