"""What a fingerprint was read from, so that asking again costs a look at each place and no walk.

A guard holds the places that can change (a global, a class's attributes, a list's items, an array's bytes) with what
stood there. While they all hold the same objects, the fingerprint is the same. Another object of the same value breaks a
guard, and only costs the walk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import is_
from types import CellType, FunctionType
from typing import Any

BYTES = 1 << 20
"""Arrays of NumPy beyond this size are not guarded: comparing costs as much as reading them."""

_MISSING = object()
_EMPTY = object()


@dataclass
class Guards:
    """Places and what stood in them. `open` tells that something was met which cannot be guarded."""

    open: bool = False
    _names: list[tuple[Mapping[str, Any], str, Any]] = field(default_factory=list)
    _attributes: list[tuple[Any, str, Any]] = field(default_factory=list)
    _wholes: list[tuple[Mapping[Any, Any], tuple[Any, ...], tuple[Any, ...]]] = field(default_factory=list)
    _lists: list[tuple[list[Any], tuple[Any, ...]]] = field(default_factory=list)
    _sets: list[tuple[set[Any], frozenset[Any]]] = field(default_factory=list)
    _functions: list[tuple[FunctionType, Any, Any, Any]] = field(default_factory=list)
    _cells: list[tuple[CellType, Any]] = field(default_factory=list)
    _arrays: list[tuple[Any, Any, Any, bytes]] = field(default_factory=list)

    def name(self, namespace: Mapping[str, Any], name: str) -> None:
        """What `name` is bound to, or that it is not."""
        self._names.append((namespace, name, namespace.get(name, _MISSING)))

    def attribute(self, owner: Any, name: str) -> None:
        """An attribute of an object that keeps it elsewhere than in a dict."""
        self._attributes.append((owner, name, getattr(owner, name, _MISSING)))

    def whole(self, mapping: Mapping[Any, Any]) -> None:
        """All keys and values, in order."""
        self._wholes.append((mapping, tuple(mapping), tuple(mapping.values())))

    def items(self, value: list[Any]) -> None:
        """The items of a list."""
        self._lists.append((value, tuple(value)))

    def members(self, value: set[Any]) -> None:
        """The members of a set, which have to be compared by value."""
        self._sets.append((value, frozenset(value)))

    def function(self, function: FunctionType) -> None:
        """Code, defaults, and what its closure holds."""
        self._functions.append((function, function.__code__, function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            self._cells.append((cell, _contents(cell)))

    def array(self, value: Any) -> None:
        """The bytes of an array that can be written to."""
        if value.nbytes > BYTES:
            self.open = True
        else:
            self._arrays.append((value, value.shape, value.dtype, value.tobytes()))

    def hold(self) -> bool:
        """Whether everything stands where it stood."""
        if self.open:
            return False
        for namespace, name, old in self._names:
            if namespace.get(name, _MISSING) is not old:
                return False
        for mapping, keys, values in self._wholes:
            if len(mapping) != len(keys) or not all(map(is_, mapping.values(), values)) or tuple(mapping) != keys:
                return False
        for function, code, defaults, kwdefaults in self._functions:
            if (
                function.__code__ is not code
                or function.__defaults__ is not defaults
                or function.__kwdefaults__ is not kwdefaults
            ):
                return False
        for cell, old in self._cells:
            if _contents(cell) is not old:
                return False
        for owner, name, old in self._attributes:
            if getattr(owner, name, _MISSING) is not old:
                return False
        for value, kept in self._lists:
            if len(value) != len(kept) or not all(map(is_, value, kept)):
                return False
        for members, before in self._sets:
            if members != before:
                return False
        return all(
            array.shape == shape and array.dtype == dtype and array.tobytes() == data
            for array, shape, dtype, data in self._arrays
        )


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY
