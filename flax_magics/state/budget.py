"""How much a session keeps for replays: inputs, variables that later runs overwrote, and what models hold that are no more,
the oldest let go first.

Every array counts once, however many runs it went into, and not at all while a registered model has it. Runs are
only noted as they come, with what they may take at most; what they do take is counted when that could be too much,
after some thousand runs, or when somebody asks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from operator import is_
from typing import Any

import jax
import numpy as np

from ..base.critical import uninterrupted
from ..base.digest import bytes_of
from ..code.walk import arrays_in
from ..errors import FlaxMagicsError
from .entry import ApplyRecipe, Replaced
from .runs import StoredRun

REPLAY_BYTES = 256_000_000
"""What is kept where nobody says how much."""
NOTED = 4096
"""Runs that are noted before they are looked at."""


_Held = StoredRun | Replaced


class ReplayBudget:
    """Runs that can be replayed, oldest first.

    Args:
      limit: bytes that they may hold together.
      current: gives the arrays that the session holds anyway; if asked with True, those in its models' fields and code too,
        which take longer to find.
    """

    def __init__(self, limit: int, current: Callable[[bool], Iterable[Any]]) -> None:
        self.limit = checked_limit(limit)
        self._current = current
        self.noted: list[_Held] = []
        """Runs that were not looked at yet, oldest first: appended to in the step that commits a run."""
        self._rough = 0
        self._known = 0
        self._held: list[_Held] = []
        self._sizes: dict[int, int] = {}
        """id of each array that they hold → its bytes."""
        self._pinned = False
        """Whether one of them holds arrays of its model's besides the variables."""
        self._last: dict[str, _Held] = {}
        """model → its newest run."""

    def emptied(self) -> ReplayBudget:
        """The same for a session that has begun anew."""
        return ReplayBudget(self.limit, self._current)

    def look(self, size: int) -> None:
        """Makes room, if it may be needed: runs that take `size` bytes at most have been noted."""
        self._rough += size
        if self._rough + self._known > self.limit or len(self.noted) >= NOTED:
            self.settle()

    @property
    def bytes(self) -> int:
        """Bytes that are held now, what the session holds anyway left out."""
        self.settle()
        return self._known

    def settle(self) -> None:
        """Lets go of the oldest while there is too much, an eighth of the limit at a time."""
        with uninterrupted():
            self._take_in()
            anyway = {id(array) for array in self._current(self._pinned)}
            self._known = sum(self._sizes.values()) - sum(self._sizes.get(array, 0) for array in anyway)
            if self._known > self.limit:
                self._let_go_of_oldest(anyway)

    def drop(self, replaced: Replaced) -> None:
        """Lets go of variables that an init replaced."""
        with uninterrupted():
            self._take_in()
            if replaced in self._held:
                self._held.remove(replaced)
                replaced.let_go()
                self._sizes = {}
                for kept in self._held:
                    self._sizes |= _sizes_in(kept, self._sizes)

    def replace(self, before: Replaced | None, after: Replaced | None) -> None:
        """Counts the variables that an init has replaced in the place of those that an earlier one replaced."""
        if after is before:
            return
        if before is not None:
            self.drop(before)
        if after is not None:
            self.noted.append(after)
            self.look(after.size)

    def _take_in(self) -> None:
        for kept in self.noted:
            if kept.origin is None or kept.inputs is None:
                continue
            how = kept.origin.how
            if isinstance(how, ApplyRecipe):
                before = self._last.get(how.name)
                if before is not None and before.origin is not None and before.inputs is not None:
                    _share(kept.inputs[1], before.inputs[1])
                    leaves, old = kept.origin.leaves, before.origin.leaves
                    _share(leaves, old)
                    if len(leaves) == len(old) and all(map(is_, leaves, old)):
                        kept.origin.leaves = old  # one list of them, too
                self._last[how.name] = kept
            self._held.append(kept)
            self._sizes |= _sizes_in(kept, self._sizes)
            self._pinned = self._pinned or bool(how.pinned)
        self.noted, self._rough = [], 0

    def _let_go_of_oldest(self, anyway: set[int]) -> None:
        # Some room at once: otherwise every single run would have to count again.
        enough = self.limit - self.limit // 8
        self._sizes, held, self._held = {}, self._held, []
        self._known, self._pinned = 0, False
        while held:
            sizes = _sizes_in(held[-1], self._sizes)
            more = sum(size for array, size in sizes.items() if array not in anyway)
            if self._known + more > enough:
                break
            kept = held.pop()
            self._held.append(kept)
            self._sizes |= sizes
            self._known += more
            self._pinned = self._pinned or bool(kept.origin is not None and kept.origin.how.pinned)
        self._held.reverse()
        for kept in held:
            kept.let_go()
        self._last = {name: last for name, last in self._last.items() if last.origin is not None}


def _sizes_in(kept: _Held, known: Mapping[int, int]) -> dict[int, int]:
    """The bytes of each array that a run holds by its id, those that are known left out."""
    assert kept.origin is not None
    assert kept.inputs is not None
    leaves = (*kept.origin.leaves, *kept.inputs[1], *kept.origin.how.pinned)
    return {id(leaf): size for leaf in leaves if id(leaf) not in known and (size := bytes_of(leaf))}


def _share(leaves: list[Any], old: list[Any]) -> None:
    """Arrays of NumPy that are bit by bit what they were in the run before become the same array."""
    if leaves is old or len(leaves) != len(old) or np.ndarray not in set(map(type, leaves)):
        return
    for i, (leaf, was) in enumerate(zip(leaves, old, strict=True)):
        if type(leaf) is np.ndarray and leaf is not was and type(was) is np.ndarray and _same(leaf, was):
            leaves[i] = was


def _same(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.nbytes == other.nbytes
        and not one.dtype.hasobject and one.tobytes() == other.tobytes()
    )  # fmt: skip


def checked_limit(limit: Any) -> int:
    """`limit` if it is a number of bytes.

    Raises:
      FlaxMagicsError: it is none.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise FlaxMagicsError(f"`replay_bytes` is a number of bytes, 0 or more, not {limit!r}.")
    return limit


def arrays_of(models: Mapping[str, Any], pinned: bool) -> Iterable[Any]:
    """The variables of registered models, as the session or the module holds them; `pinned`: and what else models hold."""
    for entry in models.values():
        with contextlib.suppress(Exception):  # a module that its owner has made one that no run would take
            yield from jax.tree_util.tree_leaves(entry.held)
        if not pinned:
            continue
        if not entry.model.holds_variables:  # what such a module holds are its variables
            yield from arrays_in(entry.model.module)
        elif entry.built is not None:
            yield from arrays_in((entry.built.recipe.args, entry.built.recipe.kwargs))
