"""Names of Flax's that are replaced for the time of a trace: by one thread at a time, and a module but for a few names."""

from __future__ import annotations

import threading
from typing import Any

REPLACING = threading.RLock()
"""Held from before the first name is read until the last is put back, so that nobody puts back a replacement."""


class Altered:
    """`original`, with other values for `names`. The module itself stays as it is for all who have it."""

    def __init__(self, original: Any, **names: Any) -> None:
        self._original = original
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)
