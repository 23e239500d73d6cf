"""A module but for a few of its names, in the place of which another module looks it up."""

from __future__ import annotations

from typing import Any


class Altered:
    """`original`, with other values for `names`. The module itself stays as it is for all who have it."""

    def __init__(self, original: Any, **names: Any) -> None:
        self._original = original
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)
