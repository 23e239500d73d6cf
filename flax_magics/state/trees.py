"""Pytrees as JSON and named arrays, and back; reading runs no code of the classes that were written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import jax
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict, freeze
from msgspec import Struct

from ..base.digest import is_key, is_spread, weakly_typed
from ..base.files import Damaged
from ..base.text import quoted_name
from ..base.types import HostArray, PyTree
from ..errors import FlaxMagicsError

DEPTH = 200
"""How deep a tree may be: deeper ones are neither written nor read."""
_IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")
"""PRNG implementations that JAX knows by these names; a file may name no other."""

Node: TypeAlias = Any
"""JSON data that represents a pytree."""


@dataclass
class Writer:
    """Turns pytrees into nodes, and collects their arrays under names that tell their places.

    Attributes:
      arrays: arrays met so far, by name.
      foreign: path and class of the first node of a class that a file can only name, read back as an `OpaqueNode`.
    """

    arrays: dict[str, HostArray] = field(default_factory=dict)
    foreign: tuple[str, str] | None = None

    def tree(self, tree: PyTree, path: str, depth: int = 0) -> Node:
        """The node of `tree`.

        Args:
          path: its place, such as `net/params`, after which its arrays are named.

        Raises:
          FlaxMagicsError: a leaf is of a type that a file cannot hold.
        """
        if depth > DEPTH:
            raise FlaxMagicsError(f"`{path[:60]}…` is nested too deeply to be saved.")
        # `type(…)`, not `isinstance`: a subclass would be read back as its base.
        if tree is None or type(tree) in (bool, int, float, str):
            if type(tree) is int and abs(tree) >> 200:
                raise _cannot(path, "it is a whole number of more than 200 bits")
            return tree
        if type(tree) in (dict, FrozenDict):
            pairs = [[self.key(key, path), self.tree(value, f"{path}/{key}", depth + 1)] for key, value in tree.items()]
            return {"dict" if type(tree) is dict else "frozen": pairs}
        if type(tree) in (list, tuple):
            return {type(tree).__name__: [self.tree(value, f"{path}/{i}", depth + 1) for i, value in enumerate(tree)]}
        if type(tree) is bytes:
            name = self._name(path)
            self.arrays[name] = np.frombuffer(tree, np.uint8)
            return {"bytes": name}
        if type(tree) is complex:
            return {"complex": [tree.real, tree.imag]}
        if isinstance(tree, jax.ShapeDtypeStruct):
            kind = f"key {_impl_of(tree, path)}" if is_key(tree) else np.dtype(tree.dtype).name
            return {"shape": [list(tree.shape), kind, bool(getattr(tree, "weak_type", False))]}
        if isinstance(tree, (jax.Array, np.ndarray, np.generic)):
            return self._array(tree, path)
        if is_box(tree):
            return {_BOXES[type(tree)]: [self.key(tree.names, path), self.tree(tree.value, path, depth + 1)]}
        if isinstance(tree, OpaqueNode):  # read from a file before, and no model has claimed it since
            cls, children = tree.cls, [(str(i), child) for i, child in enumerate(tree.children)]
        else:
            children, treedef = children_of(tree)
            if treedef is None:
                raise _cannot(path, f"it is of type {type(tree).__name__}")
            cls = class_name(type(tree))
        self.foreign = self.foreign or (path, cls)
        return {"other": [cls, [self.tree(child, f"{path}/{name}", depth + 1) for name, child in children]]}

    def key(self, key: object, path: str) -> Node:
        """The node of a dict's key, or of a path. Raises FlaxMagicsError where a file cannot hold it."""
        if key is None or type(key) in (str, int, bool):
            return key
        if type(key) is tuple:
            return [self.key(part, path) for part in key]
        raise _cannot(path, f"it has the key {key!r}, which is neither text nor a whole number")

    def _array(self, array: jax.Array | HostArray | np.generic, path: str) -> Node:
        name = self._name(path)
        if isinstance(array, jax.Array):
            if is_spread(array):
                raise _cannot(path, "other processes hold parts of it")
            if is_key(array):
                self.arrays[name] = np.asarray(jax.random.key_data(array))
                return {"key": [name, _impl_of(array, path)]}
            kind = "weak" if array.weak_type else "array"
        elif type(array) is np.ndarray or isinstance(array, np.generic):
            kind = "numpy" if isinstance(array, np.ndarray) else "scalar"
        else:
            raise _cannot(path, f"it is of type {type(array).__name__}")
        if array.dtype.name not in (*CODES, *_RAW):
            raise _cannot(path, f"it has the dtype {array.dtype}")
        try:
            self.arrays[name] = np.asarray(array)
        except RuntimeError as error:  # donated to a jitted function, or deleted
            raise _cannot(path, f"JAX says: {str(error).splitlines()[0]}") from error
        return {kind: name}

    def _name(self, path: str) -> str:
        """A name for the array at `path`, with a number where an array before it has the same."""
        # A key may hold half of a surrogate pair, which UTF-8 cannot encode.
        plain = path.encode(errors="backslashreplace").decode().replace("\0", "\\0")
        name, n = plain, 1
        while name in self.arrays:
            n += 1
            name = f"{plain}#{n}"
        self.arrays[name] = np.empty(0)  # reserves the name
        return name


def _cannot(path: str, why: str) -> FlaxMagicsError:
    return FlaxMagicsError(f"`{path}` cannot be saved: {why}.")


def _impl_of(keys: jax.Array | jax.ShapeDtypeStruct, path: str) -> str:
    """The PRNG implementation of typed keys. Raises FlaxMagicsError where it is none that a file may name."""
    for impl in _IMPLS:
        if key_type(impl)[0] == keys.dtype:
            return impl
    raise _cannot(path, f"its PRNG implementation is none of {', '.join(_IMPLS)}")


class Reader(Struct, frozen=True):
    """Turns nodes into pytrees. Raises Damaged for a node that no Writer makes."""

    arrays: Mapping[str, HostArray]

    def tree(self, node: Node, depth: int = 0) -> PyTree:
        """The pytree that `node` represents; `depth` counts the nodes around it."""
        if depth > DEPTH:
            raise Damaged("a tree in it is nested too deeply")
        if node is None or type(node) in (bool, int, float, str):
            return node

        def inside(children: list[Node]) -> list[PyTree]:
            return [self.tree(child, depth + 1) for child in children]

        match list(node.items()) if isinstance(node, dict) else ():
            case [("dict" | "frozen" as kind, list(pairs))] if all(type(p) is list and len(p) == 2 for p in pairs):
                keys = [key_read(key) for key, _ in pairs]
                tree = dict(zip(keys, inside([child for _, child in pairs]), strict=True))
                # Equal keys, such as 1 and True, would have merged.
                if len(tree) != len(pairs):
                    raise Damaged("a dict in it has a key that stands twice")
                return tree if kind == "dict" else freeze(tree)
            case [("list", list(children))]:
                return inside(children)
            case [("tuple", list(children))]:
                return tuple(inside(children))
            case [("bytes", str(name))] if self.stored(name).dtype == np.uint8 and self.stored(name).ndim == 1:
                return self.stored(name).tobytes()
            case [("complex", [float(real), float(imaginary)])]:
                return complex(real, imaginary)
            case [("partitioned" | "logical" as kind, [list(names), child])]:
                box = nn.Partitioned if kind == "partitioned" else nn.LogicallyPartitioned
                return box(self.tree(child, depth + 1), key_read(names))
            case [("other", [str(cls), list(children)])]:
                return OpaqueNode(cls, tuple(inside(children)))
            case [("shape", [shape, str(kind), bool(weak)])]:
                impl = kind.removeprefix("key ")
                dtype = dtype_named(kind) if impl == kind else key_type(impl)[0]
                return jax.ShapeDtypeStruct(shape_of("a tree in it", shape), dtype, weak_type=weak)
            case [("array", str(name))]:
                return self._array(name)
            case [("weak", str(name))]:
                # The user's transfer guard is not meant for loading.
                with jax.transfer_guard("allow"):
                    return weakly_typed(self._array(name))
            case [("numpy", str(name))]:
                return self.stored(name).copy()  # two leaves that name one array must not share memory
            case [("scalar", str(name))] if not self.stored(name).shape:
                return self.stored(name)[()]
            case [("key", [str(name), str(impl)])]:
                return _keys_of(self.stored(name), impl)
        raise Damaged("a tree in it has a node that is none")

    def stored(self, name: str) -> HostArray:
        """The stored array of that name. Raises Damaged where there is none."""
        if name not in self.arrays:
            raise Damaged("a tree in it names an array that is not there")
        return self.arrays[name]

    def _array(self, name: str) -> jax.Array:
        stored = self.stored(name)
        with jax.transfer_guard("allow"):
            # Copied, because on a CPU JAX may use NumPy's memory as its own.
            array: jax.Array = jax.device_put(stored.copy())
        if array.dtype != stored.dtype:
            raise Damaged(
                f"it has arrays of {stored.dtype}, which JAX makes only after jax.config.update('jax_enable_x64', True)"
            )
        return array


def key_read(value: Node, depth: int = 0) -> Any:
    """A key of a dict, or a path, from its node. Raises Damaged for anything else."""
    if isinstance(value, list) and depth < DEPTH:
        return tuple(key_read(part, depth + 1) for part in value)
    if value is None or type(value) in (str, int, bool):
        return value
    raise Damaged("a dict in it has a key that is none")


@lru_cache(maxsize=16)
def key_type(impl: str) -> tuple[object, tuple[int, ...]]:
    """The dtype of a PRNG implementation's keys, and the shape of one key's data. Raises Damaged for an unknown one."""
    try:
        # By shapes, so that no device computes a key.
        key = jax.eval_shape(lambda: jax.random.key(0, impl=impl))
        return key.dtype, jax.eval_shape(jax.random.key_data, key).shape
    except (ValueError, TypeError):
        raise Damaged("it has keys of a PRNG implementation that this JAX does not know") from None


def _keys_of(words: HostArray, impl: str) -> jax.Array:
    """Typed keys from their data, whose words are on the last axis. Raises Damaged where dtype or shape do not fit."""
    _, shape = key_type(impl)
    if words.dtype != np.uint32 or words.ndim < len(shape) or words.shape[words.ndim - len(shape) :] != shape:
        raise Damaged(f"it has keys that are none of {impl}")
    key: jax.Array = jax.random.wrap_key_data(jax.device_put(words.copy()), impl=impl)
    return key


class OpaqueNode(Struct, frozen=True):
    """A pytree node of a class that reading must not make: the class's name, and the children in JAX's order."""

    cls: str
    children: tuple[PyTree, ...]


def class_name(cls: type) -> str:
    """The full name of a class, by which a file refers to it: `my_module.State`."""
    return f"{cls.__module__}.{cls.__qualname__}"


_BOXES = {nn.Partitioned: "partitioned", nn.LogicallyPartitioned: "logical"}
"""Flax's boxes of a value with axis names, and their kinds of node."""


def is_box(tree: PyTree) -> bool:
    """Whether it is one of Flax's boxes with nothing but names and a value: no mesh, no rules."""
    if type(tree) not in _BOXES or type(tree.names) is not tuple:
        return False
    return tree.mesh is None and getattr(tree, "rules", None) is None


def children_of(tree: PyTree) -> tuple[list[tuple[str, PyTree]], jax.tree_util.PyTreeDef | None]:
    """The direct children of a pytree node by name, and its treedef; none, and None, for a leaf."""
    children, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda part: part is not tree)
    if len(children) == 1 and children[0][1] is tree:
        return [], None
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), child) for path, child in children], treedef


def foreign_in(tree: PyTree) -> tuple[str, str] | None:
    """Path and class of the first `OpaqueNode` in a tree; None where there is none."""
    for place, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, OpaqueNode):
            return jax.tree_util.keystr(place, simple=True, separator="/"), leaf.cls
    return None


class Differs(Exception):
    """Raised where a tree has no match for an `OpaqueNode`; the text says where."""


def graft(tree: PyTree, like: PyTree, path: str = "") -> PyTree:
    """`tree` with each `OpaqueNode` rebuilt as the node of `like` in its place: with its class, and its own children.

    Raises:
      Differs: `like` has no such node there, or one of another class or with other children.
    """
    if isinstance(tree, OpaqueNode):
        children, treedef = children_of(like)
        if treedef is None or class_name(type(like)) != tree.cls or len(children) != len(tree.children):
            raise Differs(f"{path.removeprefix('/')} is a {tree.cls} in the file")
        pairs = zip(tree.children, children, strict=True)
        return treedef.unflatten([graft(child, inner, f"{path}/{name}") for child, (name, inner) in pairs])
    if type(tree) in (dict, FrozenDict):
        grafted = {key: graft(value, _get(like, key), f"{path}/{key}") for key, value in tree.items()}
        return grafted if type(tree) is dict else freeze(grafted)
    if type(tree) in (list, tuple):
        return type(tree)(graft(value, _get(like, i), f"{path}/{i}") for i, value in enumerate(tree))
    return tree.replace(value=graft(tree.value, getattr(like, "value", None), path)) if is_box(tree) else tree


def _get(like: PyTree, key: object) -> PyTree:
    """The child of `like`, None where there is none."""
    try:
        return like[key]
    except (TypeError, KeyError, IndexError, AttributeError):
        return None


_WIDTHS = {"int": (8, 16, 32, 64), "uint": (8, 16, 32, 64), "float": (16, 32, 64)}
CODES = {
    "bool": "BOOL",
    "bfloat16": "BF16",
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind, widths in _WIDTHS.items() for bits in widths},
}
"""dtypes that every version of safetensors reads, and their codes in its format."""

_RAW = (
    "complex64", "complex128", "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn",
    "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "float8_e8m0fnu",
)  # fmt: skip
"""dtypes that are stored as bytes, because not every version of safetensors reads them."""

NARROW = ("bool", "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn")
"""dtypes that use only a part of their byte, so that some bytes are no value of theirs."""


def dtype_named(name: str) -> np.dtype[Any]:
    """The dtype of that name. Raises Damaged for a name that no file has, or that ml_dtypes here does not know."""
    # Listed names alone: a file must not choose attributes of NumPy.
    if name not in (*CODES, *_RAW):
        raise Damaged(f"{quoted_name(name)} is no dtype")
    scalar_type = getattr(ml_dtypes, name, None) or getattr(np, name, None)
    if scalar_type is None:
        raise Damaged(f"the dtype {name} is not known to the installed ml_dtypes")
    dtype: np.dtype[Any] = np.dtype(scalar_type)
    return dtype


def shape_of(name: str, value: object) -> tuple[int, ...]:
    """The shape in a file, as a tuple. Raises Damaged where no array can have it."""
    if not isinstance(value, list) or len(value) > 32 or any(type(size) is not int or size < 0 for size in value):
        raise Damaged(f"the shape of {quoted_name(name)} is none")
    # Sizes of 0 are left out, or they would hide a product that overflows.
    if math.prod(size or 1 for size in value) >= 1 << 60:
        raise Damaged(f"the shape of {quoted_name(name)} is larger than any array")
    return tuple(value)
