"""Trees out of JSON and named arrays, as `treewriter` has written them, without running any code of what they were made of.

A node of a class that is not known by itself is read as a `Foreign`: only a tree that the user's own code has made can
say what to make of it. A class that a file names is never looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import jax
import numpy as np
from flax import linen as nn
from flax.core import freeze

from .container import Damaged, dtype_named, shape_of
from .foreign import Foreign
from .treewriter import DEPTH, Node
from .weaktypes import weakly_typed


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
        if not isinstance(node, dict) or not node:
            raise Damaged("a tree in it has a node that is none")
        kind, value = next(iter(node.items()))
        if kind == "shape" and node.keys() - {"weak"} in ({"shape", "dtype"}, {"shape", "key"}):
            return self._shape(node)
        read = self._kinds.get(kind) if len(node) == 1 else None
        if read is None:
            raise Damaged("a tree in it has a node that is none")
        return read(self, value, depth)

    def _dict(self, value: Any, depth: int) -> dict[Any, Any]:
        pairs = [_pair(pair) for pair in _list(value)]
        found = {key_read(key): self.tree(child, depth + 1) for key, child in pairs}
        if len(found) != len(pairs):
            raise Damaged("a dict in it has a key that stands twice")
        return found

    def _frozen(self, value: Any, depth: int) -> Any:
        return freeze(self._dict(value, depth))

    def _items(self, value: Any, depth: int) -> list[Any]:
        return [self.tree(child, depth + 1) for child in _list(value)]

    def _tuple(self, value: Any, depth: int) -> tuple[Any, ...]:
        return tuple(self._items(value, depth))

    def _box(self, cls: Any) -> Callable[[Any, int], Any]:
        def read(value: Any, depth: int) -> Any:
            names, child = _pair(value)
            return cls(self.tree(child, depth + 1), tuple(map(_axis, _list(names))))

        return read

    def _other(self, value: Any, depth: int) -> Foreign:
        cls, children = _pair(value)
        return Foreign(_text(cls), self._tuple(children, depth))

    def _shape(self, node: dict[str, Any]) -> jax.ShapeDtypeStruct:
        shape = shape_of("a tree in it", node["shape"])
        if "key" in node:
            return jax.ShapeDtypeStruct(shape, key_type(_text(node["key"]))[0])
        if node.get("weak", True) is not True:
            raise Damaged("a tree in it has a bool that is none")
        return jax.ShapeDtypeStruct(shape, dtype_named(_text(node["dtype"])), weak_type="weak" in node)

    def _plain(self, kind: type) -> Callable[[Any, int], Any]:
        def read(value: Any, depth: int) -> Any:
            if type(value) is not kind:
                raise Damaged(f"a tree in it has a {kind.__name__} that is none")
            return value

        return read

    def _int(self, value: Any, depth: int) -> int:
        text = _text(value)
        if len(text) > 70 or not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit():
            raise Damaged("a tree in it has an int that is none")
        return int(text)

    def _float(self, value: Any, depth: int) -> float:
        text = _text(value)
        try:
            if len(text) > 40:
                raise ValueError
            return float.fromhex(text)
        except (ValueError, OverflowError):
            raise Damaged("a tree in it has a float that is none") from None

    def _complex(self, value: Any, depth: int) -> complex:
        real, imaginary = _pair(value)
        return complex(self._float(real, depth), self._float(imaginary, depth))

    def stored(self, name: Any) -> np.ndarray[Any, Any]:
        """The array of that name as it was stored."""
        if not isinstance(name, str) or name not in self.arrays:
            raise Damaged("a tree in it names an array that is not there")
        return self.arrays[name]

    def _numpy(self, value: Any, depth: int) -> np.ndarray[Any, Any]:
        return self.stored(value).copy()  # two leaves that name one array are two

    def _scalar(self, value: Any, depth: int) -> Any:
        stored = self.stored(value)
        if stored.shape:
            raise Damaged("a number in it is an array")
        return stored[()]

    def _array(self, value: Any, depth: int) -> jax.Array:
        stored = self.stored(value)
        with jax.transfer_guard("allow"):
            # A copy: on a CPU JAX may go on using NumPy's memory.
            array: jax.Array = jax.device_put(stored.copy())
        if array.dtype != stored.dtype:
            raise Damaged(
                f"it has arrays of {stored.dtype}, which JAX makes only after jax.config.update('jax_enable_x64', True)"
            )
        return array

    def _weak(self, value: Any, depth: int) -> jax.Array:
        array = self._array(value, depth)
        with jax.transfer_guard("allow"):
            return weakly_typed(array)

    def _typed_key(self, value: Any, depth: int) -> jax.Array:
        name, impl = _pair(value)
        return key_of(self.stored(name), _text(impl))

    _kinds: ClassVar[dict[str, Callable[[Any, Any, int], Any]]] = {
        "dict": _dict,
        "frozen": _frozen,
        "list": _items,
        "tuple": _tuple,
        "partitioned": lambda self, value, depth: self._box(nn.Partitioned)(value, depth),
        "logical": lambda self, value, depth: self._box(nn.LogicallyPartitioned)(value, depth),
        "other": _other,
        "bool": lambda self, value, depth: self._plain(bool)(value, depth),
        "str": lambda self, value, depth: self._plain(str)(value, depth),
        "int": _int,
        "float": _float,
        "complex": _complex,
        "array": _array,
        "weak": _weak,
        "numpy": _numpy,
        "scalar": _scalar,
        "key": _typed_key,
    }


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Damaged("a tree in it has a list that is none")
    return value


def _pair(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise Damaged("a tree in it has a pair that is none")
    return value[0], value[1]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Damaged("a tree in it has a text that is none")
    return value


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
    return tuple(map(_text, _list(value)))


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
