"""Trees of arrays as JSON and named arrays: see `treereader` for the way back.

What is known by itself is told by its kind: dicts, FrozenDicts, lists, tuples, numbers, text, arrays of JAX's and of
NumPy's, typed keys, and the boxes in which Flax keeps names of axes. Any other node (a dataclass, a named tuple, a box
with a mesh) is written with its class's name and its children.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict

from .container import can_store
from .errors import FlaxMagicsError
from .foreign import Foreign, children_of, class_name, names_of

DEPTH = 200
"""Nodes inside one another: deeper trees are neither written nor read."""

Node = Any
"""JSON data that stands for a tree."""


@dataclass
class Writer:
    """Turns trees into nodes, and gathers their arrays under names that tell where they are.

    Attributes:
      arrays: what was met so far, by name.
      foreign: path and class of the first node that is read as a `Foreign`.
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
            return self._number(tree, path)
        if isinstance(tree, jax.ShapeDtypeStruct):
            weak = {"weak": True} if getattr(tree, "weak_type", False) else {}
            return {"shape": list(tree.shape), **_dtype(tree.dtype, path), **weak}
        if isinstance(tree, (jax.Array, np.ndarray, np.generic)):
            return self._array(tree, path)
        if isinstance(tree, Foreign):  # read from a file, and still not made anything of
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

    def _number(self, value: Any, path: str) -> Node:
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
