"""The limit on what is held for replays: counts the arrays of runs, and drops the oldest runs beyond it.

An array counts once, however many runs used it, and not at all while a registered model holds it. Counting is put off: a
run is noted with the most that it may hold, and arrays are counted when the sum could exceed the limit, after `NOTED`
runs, or when somebody asks.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import is_

import jax
import numpy as np

from ..base.digest import bytes_of
from ..base.threads import uninterrupted
from ..base.types import Leaf
from ..code.walk import arrays_in
from ..errors import FlaxMagicsError
from .entry import ApplyRecipe, ModelEntry, Replaced
from .runs import StoredRun

REPLAY_BYTES = 256_000_000
"""The most bytes that replays may hold, unless the user sets another limit."""
NOTED = 4096
"""How many runs are noted before their arrays are counted."""
_Held = StoredRun | Replaced


class ReplayBudget:
    """Limits what is held for replays, dropping the oldest runs first.

    Args:
      limit: the most bytes that runs may hold together.
      current: returns the arrays that the session holds anyway; with True also those in the fields and code of its
        models, which take longer to find.
    """

    def __init__(self, limit: int, current: Callable[[bool], Iterable[Leaf]]) -> None:
        self.limit = checked_limit(limit)
        self._current = current
        self.noted: deque[_Held] = deque()
        """Runs whose arrays are not counted yet, oldest first: the commit of a run appends to it, on any thread."""
        self._counting = threading.RLock()
        """Held while runs are counted or dropped."""
        self._rough = 0
        """The most bytes that the noted runs may hold."""
        self._known = 0
        """Bytes that were counted last, without what the session holds anyway."""
        self._held: list[_Held] = []
        self._sizes: dict[int, int] = {}
        """id of each array that the counted runs hold → its bytes."""
        self._pinned = False
        """Whether one of them holds arrays of its model besides the variables."""
        self._last: dict[str, _Held] = {}
        """model → its newest counted apply, with which the next shares equal arrays."""

    def emptied(self) -> ReplayBudget:
        """A new budget of the same limit, for a session that begins anew from a file."""
        return ReplayBudget(self.limit, self._current)

    def look(self, size: int) -> None:
        """Settles if it may be needed, after runs were noted that hold at most `size` bytes."""
        self._rough += size
        if self._rough + self._known > self.limit or len(self.noted) >= NOTED:
            self.settle()

    @property
    def bytes(self) -> int:
        """Bytes that are held now, without what the session holds anyway."""
        self.settle()
        return self._known

    def settle(self) -> None:
        """Counts, and drops the oldest runs if they hold too much: down to seven eighths of the limit."""
        # An interrupt halfway would leave sizes that do not belong to the held runs.
        with uninterrupted(), self._counting:
            self._take_in()
            anyway = {id(array) for array in self._current(self._pinned)}
            self._known = sum(self._sizes.values()) - sum(self._sizes.get(array, 0) for array in anyway)
            if self._known > self.limit:
                # Well below the limit at once: otherwise each further run would exceed it and count everything again.
                self._let_go_of_oldest(anyway, enough=self.limit - self.limit // 8)

    def empty(self) -> int:
        """Drops all runs that hold arrays which the session does not hold anyway, and older ones. Returns how many."""
        with uninterrupted(), self._counting:
            self._take_in()
            before = len(self._held)
            self._let_go_of_oldest({id(array) for array in self._current(self._pinned)}, enough=0)
            return before - len(self._held)

    def drop(self, replaced: Replaced) -> None:
        """Drops variables that an init replaced, whatever the limit."""
        with uninterrupted(), self._counting:
            self._take_in()
            if replaced in self._held:
                self._held.remove(replaced)
                replaced.let_go()
                # Its arrays may belong to runs as well, so the sizes are collected again.
                self._sizes = {}
                for held in self._held:
                    self._sizes |= _sizes_in(held, self._sizes)

    def replace(self, before: Replaced | None, after: Replaced | None) -> None:
        """Counts the variables that an init replaced, in place of those that the init before it replaced."""
        if before is not None and before is not after:
            self.drop(before)
        if after is not None and before is not after:
            self.noted.append(after)
            self.look(after.size)

    def _take_in(self) -> None:
        self._rough = 0
        while self.noted:
            held = self.noted.popleft()
            # It may have been dropped before it was ever counted.
            if held.origin is None or held.inputs is None:
                continue
            how = held.origin.how
            if isinstance(how, ApplyRecipe):
                last = self._last.get(how.name)
                # A run of a loop: it shares all with the one before, and what that has is counted.
                if last is not None and held.origin is last.origin and held.inputs is last.inputs:
                    self._last[how.name] = held
                    self._held.append(held)
                    continue
                if last is not None and last.origin is not None and last.inputs is not None:
                    _share(held.inputs[1], last.inputs[1])
                    leaves, old = held.origin.leaves, last.origin.leaves
                    _share(leaves, old)
                    if len(leaves) == len(old) and all(map(is_, leaves, old)):
                        held.origin.leaves = old  # the list itself is shared as well: a loop of runs keeps one
                self._last[how.name] = held
            self._held.append(held)
            self._sizes |= _sizes_in(held, self._sizes)
            self._pinned = self._pinned or bool(how.pinned)

    def _let_go_of_oldest(self, anyway: set[int], enough: int) -> None:
        self._sizes, oldest_first, self._held = {}, self._held, []
        self._known, self._pinned = 0, False
        # From the newest back: what still fits stays, all older runs are dropped.
        while oldest_first:
            sizes = _sizes_in(oldest_first[-1], self._sizes)
            more = sum(size for array, size in sizes.items() if array not in anyway)
            if self._known + more > enough:
                break
            held = oldest_first.pop()
            self._held.append(held)
            self._sizes |= sizes
            self._known += more
            self._pinned = self._pinned or bool(held.origin is not None and held.origin.how.pinned)
        self._held.reverse()
        for held in oldest_first:
            held.let_go()
        self._last = {name: last for name, last in self._last.items() if last.origin is not None}


def _sizes_in(held: _Held, known: Mapping[int, int]) -> dict[int, int]:
    """The bytes of each array that a run holds, by its id, without those in `known`."""
    assert held.origin is not None
    assert held.inputs is not None
    leaves = (*held.origin.leaves, *held.inputs[1], *held.origin.how.pinned)
    return {id(leaf): size for leaf in leaves if id(leaf) not in known and (size := bytes_of(leaf))}


def _share(leaves: list[Leaf], old: list[Leaf]) -> None:
    """Replaces NumPy arrays that equal those of the run before by these very arrays, so that a loop keeps one copy."""
    if leaves is old or len(leaves) != len(old) or np.ndarray not in set(map(type, leaves)):
        return
    for i, (leaf, was) in enumerate(zip(leaves, old, strict=True)):
        both = type(leaf) is np.ndarray and type(was) is np.ndarray
        # The bytes of an object array are pointers, which say nothing about its elements.
        if not both or (leaf.dtype, leaf.shape) != (was.dtype, was.shape) or leaf.dtype.hasobject:
            continue
        # As bytes, since NaN differs from itself, and 0.0 equals -0.0.
        if leaf.tobytes() == was.tobytes():
            leaves[i] = was


def checked_limit(limit: object) -> int:
    """Returns `limit`. Raises FlaxMagicsError where it is not a number of bytes."""
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise FlaxMagicsError(f"`replay_bytes` is a number of bytes, 0 or more, not {limit!r}.")
    return limit


def arrays_of(models: Mapping[str, ModelEntry], pinned: bool) -> Iterator[Leaf]:
    """The variables of registered models; with `pinned` also the arrays in their fields and code."""
    for entry in models.values():
        with contextlib.suppress(Exception):  # an NNX module may have been changed into what no run accepts
            yield from jax.tree_util.tree_leaves(entry.held)
        if pinned:
            yield from entry.model.other_arrays()
        if pinned and entry.built is not None:
            yield from arrays_in((entry.built.recipe.args, entry.built.recipe.kwargs))
