"""What a session is at one moment: frozen, replaced as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from . import history
from .keys import Draw, Root
from .registry import Entry


@dataclass(frozen=True)
class State:
    """All that a command may change."""

    root: Root
    models: Mapping[str, Entry] = field(default_factory=dict)
    opened: tuple[str, Draw] | None = None
    """A draw whose `params` an init took, and the model whose next apply takes the rest of it."""
    runs: history.Chain | None = None
    seeds: Mapping[int, tuple[int, str]] = field(default_factory=dict)
    """seed → the last draw that was made under it, and the PRNG implementation."""


@dataclass(frozen=True)
class Restart:
    """What restarting the root key means for what is there: models that keep variables, a seed that was used before."""

    seed: int
    fresh: bool
    keeping: tuple[str, ...]
    again: bool
