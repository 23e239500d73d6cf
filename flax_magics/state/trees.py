"""Trees of arrays as JSON and named arrays, and back, without running any code of what they were written from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict, freeze

from ..base.digest import weakly_typed
from ..base.jsondata import Damaged
from ..base.text import quoted_name
from ..errors import FlaxMagicsError

DEPTH = 200
"""Nodes inside one another: deeper trees are neither written nor read."""

Node = Any
"""JSON data that stands for a tree."""


@dataclass
class Writer:
    """Turns trees into nodes, and gathers their arrays under names that tell where they are.

    Attributes:
      arrays: what was met so far, by name.
      foreign: path and class of the first node that is read as a `OpaqueNode`.
    """

    arrays: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    foreign: tuple[str, str] | None = None

    def tree(self, tree: Any, path: str, depth: int = 0) -> Node:
        """The node of `tree`.

        Args:
          path: where it is, such as `net/params`; what its arrays are named after.

        Raises:
          FlaxMagicsError: a leaf is nothing that a file can hold.
        """
        if depth > DEPTH:
            raise FlaxMagicsError(f"`{path[:60]}…` is nested too deeply to be saved.")
        if type(tree) in (dict, FrozenDict):
            pairs = [[self.key(key, path), self.tree(value, f"{path}/{key}", depth + 1)] for key, value in tree.items()]
            return {"dict" if type(tree) is dict else "frozen": pairs}
        if type(tree) in (list, tuple):
            children = [self.tree(value, f"{path}/{i}", depth + 1) for i, value in enumerate(tree)]
            return {"list" if type(tree) is list else "tuple": children}
        if tree is None:
            return None
        if isinstance(tree, (bool, int, float, complex, str)):
            return _number(tree, path)
        if isinstance(tree, jax.ShapeDtypeStruct):
            weak = {"weak": True} if getattr(tree, "weak_type", False) else {}
            return {"shape": list(tree.shape), **_dtype(tree.dtype, path), **weak}
        if isinstance(tree, (jax.Array, np.ndarray, np.generic)):
            return self._array(tree, path)
        if isinstance(tree, OpaqueNode):  # read from a file, and still not made anything of
            self.foreign = self.foreign or (path, tree.cls)
            return {"other": [tree.cls, [self.tree(c, f"{path}/{i}", depth + 1) for i, c in enumerate(tree.children)]]}
        box = names_of(tree)
        if box is not None:
            kind = "logical" if type(tree) is nn.LogicallyPartitioned else "partitioned"
            return {kind: [box, self.tree(tree.value, path, depth + 1)]}
        children, treedef = children_of(tree)
        if treedef is None:
            raise _cannot(path, f"it is of type {type(tree).__name__}")
        self.foreign = self.foreign or (path, class_name(type(tree)))
        return {"other": [class_name(type(tree)), [self.tree(c, f"{path}/{n}", depth + 1) for n, c in children]]}

    def key(self, key: Any, path: str) -> Node:
        """A key of a dict, or a step of a path. Raises FlaxMagicsError: a file cannot hold it."""
        if key is None or type(key) in (str, int, bool):
            return key
        if type(key) is tuple:
            return [self.key(part, path) for part in key]
        raise _cannot(path, f"it has the key {key!r}, which is neither text nor a whole number")

    def _array(self, array: Any, path: str) -> Node:
        name = self._name(path)
        if isinstance(array, jax.Array):
            if not array.is_fully_addressable:
                raise _cannot(path, "other processes hold parts of it")
            if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
                self.arrays[name] = np.asarray(jax.random.key_data(array))
                return {"key": [name, impl_of(array, path)]}
            kind = "weak" if array.weak_type else "array"
        elif type(array) is np.ndarray or isinstance(array, np.generic):
            kind = "numpy" if isinstance(array, np.ndarray) else "scalar"
        else:
            raise _cannot(path, f"it is of type {type(array).__name__}")
        if not can_store(array.dtype):
            raise _cannot(path, f"it has the dtype {array.dtype}")
        try:
            self.arrays[name] = np.asarray(array)
        except RuntimeError as error:  # given away to a jitted function, or deleted
            raise _cannot(path, f"JAX says: {str(error).splitlines()[0]}") from error
        return {kind: name}

    def _name(self, path: str) -> str:
        """`path` as the name of an array, told apart from others that read alike."""
        plain = path.encode(errors="backslashreplace").decode().replace("\0", "\\0")
        name, n = plain, 1
        while name in self.arrays:
            n += 1
            name = f"{plain}#{n}"
        self.arrays[name] = np.empty(0)  # taken
        return name


def _number(value: Any, path: str) -> Node:
    kind = type(value)
    if kind is float:
        return {"float": value.hex()}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind is int and abs(value) < 1 << 200:
        return {"int": str(value)}
    if kind in (bool, str):
        return {kind.__name__: value}
    raise _cannot(path, "it is a whole number of more than 200 bits" if kind is int else f"it is a {kind.__name__}")


def _cannot(path: str, why: str) -> FlaxMagicsError:
    return FlaxMagicsError(f"`{path}` cannot be saved: {why}.")


def impl_of(key: Any, path: str) -> str:
    """The name of a typed key's PRNG implementation. Raises FlaxMagicsError: it has none that a file can give."""
    name = str(jax.random.key_impl(key))
    try:
        known = jax.random.key(0, impl=name).dtype == key.dtype
    except (ValueError, TypeError):
        known = False
    if not known:
        raise _cannot(path, f"its PRNG implementation {name} is not known by that name")
    return name


def _dtype(dtype: Any, path: str) -> dict[str, str]:
    """A dtype of JAX's, that of typed keys too, as data."""
    if not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return {"dtype": np.dtype(dtype).name}
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(lambda impl=impl: jax.random.key(0, impl=impl)).dtype == dtype:
            return {"key": impl}
    raise _cannot(path, f"it has the dtype {dtype}")


@dataclass(frozen=True)
class Reader:
    """Turns nodes into trees. Raises Damaged for what no Writer has written."""

    arrays: Mapping[str, np.ndarray[Any, Any]]

    def tree(self, node: Node, depth: int = 0) -> Any:
        """The tree that `node` stands for."""
        if depth > DEPTH:
            raise Damaged("a tree in it is nested too deeply")
        if node is None:
            return None
        if not isinstance(node, dict) or (len(node) != 1 and "shape" not in node):
            raise Damaged(_NO_NODE)
        if "shape" in node:
            return _shape_node(node)

        def inside(children: list[Node]) -> list[Any]:
            return [self.tree(child, depth + 1) for child in children]

        match next(iter(node.items())):
            case ("dict" | "frozen" as kind, list(pairs)):
                if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
                    raise Damaged(_NO_NODE)
                keys = [key_read(key) for key, _ in pairs]
                tree = dict(zip(keys, inside([child for _, child in pairs]), strict=True))
                if len(tree) != len(pairs):
                    raise Damaged("a dict in it has a key that stands twice")
                return tree if kind == "dict" else freeze(tree)
            case ("list", list(children)):
                return inside(children)
            case ("tuple", list(children)):
                return tuple(inside(children))
            case ("partitioned" | "logical" as kind, [list(names), child]):
                box: Any = nn.Partitioned if kind == "partitioned" else nn.LogicallyPartitioned
                return box(self.tree(child, depth + 1), tuple(map(_axis, names)))
            case ("other", [str(cls), list(children)]):
                return OpaqueNode(cls, tuple(inside(children)))
            case ("bool", bool(value)) | ("str", str(value)):
                return value
            case ("int", str(digits)) if re.fullmatch("-?[0-9]{1,69}", digits):
                return int(digits)
            case ("float", str(number)):
                return _float(number)
            case ("complex", [str(real), str(imaginary)]):
                return complex(_float(real), _float(imaginary))
            case ("array", str(name)):
                return self._array(name)
            case ("weak", str(name)):
                array = self._array(name)
                with jax.transfer_guard("allow"):
                    return weakly_typed(array)
            case ("numpy", str(name)):
                return self.stored(name).copy()  # two leaves that name one array are two
            case ("scalar", str(name)) if not self.stored(name).shape:
                return self.stored(name)[()]
            case ("key", [str(name), str(impl)]):
                return key_of(self.stored(name), impl)
        raise Damaged(_NO_NODE)

    def stored(self, name: str) -> np.ndarray[Any, Any]:
        """The array of that name as it was stored."""
        if name not in self.arrays:
            raise Damaged("a tree in it names an array that is not there")
        return self.arrays[name]

    def _array(self, name: str) -> jax.Array:
        stored = self.stored(name)
        with jax.transfer_guard("allow"):
            # A copy: on a CPU JAX may go on using NumPy's memory.
            array: jax.Array = jax.device_put(stored.copy())
        if array.dtype != stored.dtype:
            raise Damaged(
                f"it has arrays of {stored.dtype}, which JAX makes only after jax.config.update('jax_enable_x64', True)"
            )
        return array


_NO_NODE = "a tree in it has a node that is none"


def _shape_node(node: dict[str, Any]) -> jax.ShapeDtypeStruct:
    shape = shape_of("a tree in it", node["shape"])
    match {name: value for name, value in node.items() if name != "shape"}:
        case {"key": str(impl), **others} if not others:
            return jax.ShapeDtypeStruct(shape, key_type(impl)[0])
        case {"dtype": str(dtype), **others} if others in ({}, {"weak": True}):
            return jax.ShapeDtypeStruct(shape, dtype_named(dtype), weak_type=bool(others))
    raise Damaged(_NO_NODE)


def _float(text: str) -> float:
    try:
        return float.fromhex(text)
    except (ValueError, OverflowError):
        raise Damaged("a tree in it has a float that is none") from None


def key_read(value: Any, depth: int = 0) -> Any:
    """A key of a dict, or a step of a path. Raises Damaged: it is none."""
    if isinstance(value, list) and depth < DEPTH:
        return tuple(key_read(part, depth + 1) for part in value)
    if value is None or type(value) in (str, int, bool):
        return value
    raise Damaged("a dict in it has a key that is none")


def _axis(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise Damaged("an axis in it has a name that is none")
    return tuple(value)


@lru_cache(maxsize=16)
def key_type(impl: str) -> tuple[Any, tuple[int, ...]]:
    """The dtype of the keys of a PRNG implementation, and the shape of one's data. Raises Damaged: there is none."""
    try:
        key = jax.eval_shape(lambda: jax.random.key(0, impl=impl))
        data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl)))
    except (ValueError, TypeError):
        raise Damaged("it has keys of a PRNG implementation that this JAX does not know") from None
    return key.dtype, data.shape


def key_of(words: np.ndarray[Any, Any], impl: str) -> jax.Array:
    """Typed keys of their data, words on the last axis. Raises Damaged: they cannot be that."""
    _, shape = key_type(impl)
    if words.dtype != np.uint32 or words.shape[len(words.shape) - len(shape) :] != shape or words.ndim < len(shape):
        raise Damaged(f"it has keys that are none of {impl}")
    key: jax.Array = jax.random.wrap_key_data(jax.device_put(words.copy()), impl=impl)
    return key


@dataclass(frozen=True)
class OpaqueNode:
    """A node of a class that is not ours to make: its name, and its children in JAX's order."""

    cls: str
    children: tuple[Any, ...]


def class_name(cls: type) -> str:
    """The name by which a class is told from others: `my_module.State`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def names_of(tree: Any) -> list[Any] | None:
    """The names of a box that has nothing else but its value, None for everything else."""
    if type(tree) not in (nn.Partitioned, nn.LogicallyPartitioned):
        return None
    if tree.mesh is not None or getattr(tree, "rules", None) is not None or type(tree.names) is not tuple:
        return None
    names: list[Any] = []
    for name in tree.names:
        if name is None or type(name) is str:
            names.append(name)
        elif type(name) is tuple and all(type(part) is str for part in name):
            names.append(list(name))
        else:
            return None
    return names


def children_of(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The children of a node by name, and how it is put together of them; None in the place of that for a leaf."""
    children, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda part: part is not tree)
    if len(children) == 1 and children[0][1] is tree:
        return [], None
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), child) for path, child in children], treedef


def foreign_in(tree: Any, path: str = "") -> tuple[str, str] | None:
    """Where in a tree the first Foreign is, and its class; None where there is none."""
    for place, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, OpaqueNode):
            return path + jax.tree_util.keystr(place, simple=True, separator="/"), leaf.cls
    return None


class Differs(Exception):
    """A tree has another node in the place of a Foreign: the text says where."""


def graft(tree: Any, like: Any, path: str = "") -> Any:
    """`tree` with every Foreign put together as the node of `like` that is in its place.

    Raises:
      Differs: there is no such node there, or one of another class or with other children.
    """
    if isinstance(tree, OpaqueNode):
        children, treedef = children_of(like)
        if treedef is None or class_name(type(like)) != tree.cls or len(children) != len(tree.children):
            raise Differs(f"{path.removeprefix('/')} is a {tree.cls} in the file")
        pairs = zip(tree.children, children, strict=True)
        return treedef.unflatten([graft(child, inner, f"{path}/{name}") for child, (name, inner) in pairs])
    if type(tree) is dict:
        return {key: graft(value, _get(like, key), f"{path}/{key}") for key, value in tree.items()}
    if type(tree) is FrozenDict:
        frozen: Any = tree
        return freeze({key: graft(value, _get(like, key), f"{path}/{key}") for key, value in frozen.items()})
    if type(tree) in (list, tuple):
        return type(tree)(graft(value, _get(like, i), f"{path}/{i}") for i, value in enumerate(tree))
    if names_of(tree) is not None:
        box: Any = tree
        return box.replace(value=graft(box.value, getattr(like, "value", None), path))
    return tree


def _get(like: Any, key: Any) -> Any:
    """The child of the other tree, None where there is none."""
    try:
        return like[key]
    except (TypeError, KeyError, IndexError, AttributeError):
        return None


CODES = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
}
"""dtypes that every version of the library gives back as they are."""

_RAW = (
    "complex64",
    "complex128",
    "int2",
    "int4",
    "uint2",
    "uint4",
    "float4_e2m1fn",
    "float6_e2m3fn",
    "float6_e3m2fn",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
"""dtypes that are stored as bytes."""

NARROW = ("bool", "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn")
"""dtypes that fill a part of their byte: not every byte is one of their values."""


def dtype_named(name: str) -> np.dtype[Any]:
    """The dtype of that name. Raises Damaged: there is none that a file can have, or that is known here."""
    if name in CODES or name in _RAW:
        scalar_type = getattr(ml_dtypes, name, None) or getattr(np, name, None)
        if scalar_type is not None:
            dtype: np.dtype[Any] = np.dtype(scalar_type)
            return dtype
        raise Damaged(f"the dtype {name} is not known to the installed ml_dtypes")
    raise Damaged(f"{quoted_name(name)} is no dtype")


def can_store(dtype: np.dtype[Any]) -> bool:
    """Whether a file can hold arrays of this dtype."""
    return dtype.name in CODES or dtype.name in _RAW


def shape_of(name: str, value: Any) -> tuple[int, ...]:
    """A shape that an array can have. Raises Damaged for every other value."""
    if not isinstance(value, list) or len(value) > 32 or any(type(size) is not int or size < 0 for size in value):
        raise Damaged(f"the shape of {quoted_name(name)} is none")
    if math.prod(size or 1 for size in value) >= 1 << 60:
        raise Damaged(f"the shape of {quoted_name(name)} is larger than any array")
    return tuple(value)
