"""The base of plain records, and aliases of `Any` for pytrees and their leaves: any class may be a node, which no annotation
can express.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias, dataclass_transform

if TYPE_CHECKING:
    import numpy as np

PyTree: TypeAlias = Any
"""Nested containers of leaves, as `jax.tree_util` handles them; a single leaf is a pytree, too."""

Leaf: TypeAlias = Any
"""A leaf of a pytree: usually an array or a number, but any object may be one."""

HostArray: TypeAlias = "np.ndarray[Any, Any]"
"""A NumPy array of any shape and dtype."""


@dataclass_transform(frozen_default=True)
class Record:
    """A record that nobody changes: its fields are the annotations of the class, and what stands there is a default.

    For what `%load_ext` imports. Python makes such a class in 0.01 ms, a NamedTuple in 0.3, a frozen dataclass in 1, and
    msgspec, whose classes the other rooms use, takes 10 to be imported.
    """

    _fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls._fields = (*cls._fields, *(name for name in cls.__annotations__ if name not in cls._fields))

    def __init__(self, *values: object, **named: object) -> None:
        if values:
            named.update(zip(self._fields, values, strict=False))
        self.__dict__ = named  # a third of the time that `setattr` takes for each

    def _replace(self, **changes: object) -> Self:
        """A copy in which the fields that are named have other values."""
        values = self.__dict__
        return type(self)(**{name: values[name] for name in self._fields if name in values} | changes)

    def _values(self) -> tuple[object, ...]:
        return tuple([getattr(self, name) for name in self._fields])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        fields = zip(self._fields, self._values(), strict=True)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in fields)})"
