"""Flax's own code as it stands: whether somebody replaced a layer's method or an initialiser since it was last looked at.

A fingerprint takes what a library defines for granted. That holds for as long as nobody patches it, and a patch has to
count at once. Looking at all of Flax's names costs a few tenths of a millisecond: in a notebook that is done by the
first command of each cell that runs, in a script by every run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from operator import is_
from types import ModuleType
from typing import Any

_ROOTS = ("flax.core", "flax.linen", "flax.nnx")
_PUBLIC = ("jax", "jax.lax", "jax.nn", "jax.nn.initializers", "jax.numpy", "jax.random")
"""Modules of JAX whose names models read; what is behind these is JAX's."""


class Library:
    """`edition` counts how often what was looked at had been changed."""

    def __init__(self) -> None:
        self.edition = 0
        self._places: list[tuple[Mapping[str, Any], tuple[Any, ...]]] = []
        self._loaded = 0
        self._in_cells = False
        self._looked = False

    def in_cells(self, value: bool) -> None:
        """Whether cells are told of, each by `new_cell`."""
        self._in_cells = value
        self._looked = False

    def new_cell(self) -> None:
        """The next `look` is a look again."""
        self._looked = False

    def look(self) -> None:
        """Brings `edition` up to date."""
        if self._looked:
            return
        if self._loaded != len(sys.modules):
            self._take(keep=self._loaded != 0 and self._same())
        elif not self._same():
            self._take(keep=False)
        self._looked = self._in_cells

    def _same(self) -> bool:
        return all(
            len(values) == len(place) and all(map(is_, place.values(), values)) for place, values in self._places
        )

    def _take(self, keep: bool) -> None:
        """Notes where everything stands. More modules than before are no change of those that were there."""
        if not keep:
            self.edition += 1
        self._loaded = len(sys.modules)
        self._places = [(place, tuple(place.values())) for place in _places()]


def _places() -> Iterator[Mapping[str, Any]]:
    """The namespaces of the modules, and of the classes that they define."""
    classes: dict[type, None] = {}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or not (name in _PUBLIC or name.startswith(_ROOTS)):
            continue
        yield vars(module)
        for value in list(vars(module).values()):
            if isinstance(value, type) and str(value.__module__).startswith(_ROOTS):
                classes.setdefault(value)
    for cls in classes:
        yield vars(cls)


library = Library()
"""Of this process, as Flax is."""
