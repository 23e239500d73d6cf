"""How much a session keeps for replays: inputs, variables that later runs overwrote, and what models hold that are no more,
the oldest let go first.

Every array counts once, however many runs it went into, and not at all while a registered model has it. Runs are
only noted as they come, with what they may take at most; what they do take is worked out when that could be too much,
after some hundred runs, or when somebody asks.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import compress
from operator import is_not
from typing import Any

import jax
import numpy as np

from ..base.critical import uninterrupted
from ..base.digest import bytes_of
from ..code.arrays import arrays_in
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
        self._held: deque[_Held] = deque()
        self._bytes = 0
        self._known = 0
        self._uses: dict[int, list[int]] = {}
        """id of an array → its bytes, and how many inputs and stretches of runs with the same variables hold it."""
        self._last: dict[str, _Held] = {}
        """model → its newest run."""
        self._sharing: dict[int, int] = {}
        """id of inputs → how many runs have these very ones."""
        self._pinning: dict[int, int] = {}
        """id of what runs have in common → how many runs have it, of models that hold arrays besides their variables."""
        self._after: dict[int, list[Any]] = {}
        """id of a run → which of its variables the next run of the model had no more."""

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
            self._settle()

    def drop(self, replaced: Replaced) -> None:
        """Lets go of variables that an init replaced."""
        with uninterrupted():
            self._take_in()
            if replaced in self._held:
                self._held.remove(replaced)
                self._let_go(replaced, set())

    def replace(self, before: Replaced | None, after: Replaced | None) -> None:
        """Counts the variables that an init has replaced in the place of those that an earlier one replaced."""
        if after is before:
            return
        if before is not None:
            self.drop(before)
        if after is not None:
            self.noted.append(after)
            self.look(after.size)

    def _settle(self) -> None:
        self._take_in()
        anyway = {id(array) for array in self._current(bool(self._pinning))}
        held = self._bytes - sum(self._uses[array][0] for array in anyway if array in self._uses)
        if held > self.limit:
            # Some room at once: otherwise every single run would have to look again.
            enough = self.limit - self.limit // 8
            while self._held and held > enough:
                held -= self._let_go(self._held.popleft(), anyway)
        self._known = held

    def _take_in(self) -> None:
        for kept in self.noted:
            if kept.origin is None or kept.inputs is None:
                continue
            self._held.append(kept)
            how = kept.origin.how
            name = how.name if isinstance(how, ApplyRecipe) else ""
            before = self._last.get(name) if name else None
            self._take_in_variables(kept, before)
            self._take_in_inputs(kept, before)
            if how.pinned:
                runs = self._pinning.get(id(how), 0)
                if not runs:
                    self._use(how.pinned)
                self._pinning[id(how)] = runs + 1
            if name:
                self._last[name] = kept
        self.noted, self._rough = [], 0

    def _take_in_variables(self, kept: _Held, before: _Held | None) -> None:
        """Counts the variables that the run before did not have, and remembers which of its own this one has no more."""
        assert kept.origin is not None
        leaves = kept.origin.leaves
        if before is None or before.origin is None:
            self._use(leaves)
            return
        old = before.origin.leaves
        if leaves is old:
            self._after[id(before)] = []
        elif len(leaves) != len(old):
            self._use(leaves)
            self._after[id(before)] = old
        else:
            _share(leaves, old)
            changed = list(map(is_not, leaves, old))
            if True in changed:
                gone = list(compress(old, changed))
                # Runs of one line have variables of the same shapes.
                sizes = [self._uses.get(id(leaf), _UNKNOWN)[0] for leaf in gone]
                self._use(compress(leaves, changed), sizes if kept.origin.how is before.origin.how else ())
                self._after[id(before)] = gone
            else:
                kept.origin.leaves = old
                self._after[id(before)] = []

    def _take_in_inputs(self, kept: _Held, before: _Held | None) -> None:
        inputs = kept.inputs
        assert inputs is not None
        old = None if before is None else before.inputs
        if old is not None and old is not inputs and len(old[1]) == len(inputs[1]):
            _share(inputs[1], old[1])
        runs = self._sharing.get(id(inputs), 0)
        if not runs:
            self._use(inputs[1])
        self._sharing[id(inputs)] = runs + 1

    def _use(self, leaves: Iterable[Any], sizes: Iterable[int | None] = ()) -> None:
        """Counts arrays once more. `sizes`: their bytes, as far as they are known (None: they are not)."""
        known_sizes = iter(sizes)
        for leaf in leaves:
            known, size = self._uses.get(id(leaf)), next(known_sizes, None)
            if known is not None:
                known[1] += 1
                continue
            size = bytes_of(leaf) if size is None else size
            if size:
                self._uses[id(leaf)] = [size, 1]
                self._bytes += size

    def _let_go(self, kept: _Held, anyway: set[int]) -> int:
        """Bytes that nobody holds any more, those of `anyway` left out."""
        assert kept.origin is not None
        assert kept.inputs is not None
        leaves = self._after.pop(id(kept), None)
        if leaves is None:
            leaves = kept.origin.leaves
            self._last = {name: last for name, last in self._last.items() if last is not kept}
        inputs = kept.inputs
        self._sharing[id(inputs)] -= 1
        shared = bool(self._sharing[id(inputs)])
        if not shared:
            del self._sharing[id(inputs)]
        freed = 0
        for leaf in (*leaves, *(() if shared else inputs[1]), *self._no_more_pinned(kept.origin.how)):
            known = self._uses.get(id(leaf))
            if known is None:
                continue
            known[1] -= 1
            if not known[1]:
                del self._uses[id(leaf)]
                self._bytes -= known[0]
                freed += 0 if id(leaf) in anyway else known[0]
        kept.let_go()
        return freed

    def _no_more_pinned(self, how: Any) -> tuple[Any, ...]:
        """Arrays that a model holds of which this is the last run."""
        runs = self._pinning.get(id(how), 0) - 1
        if runs > 0:
            self._pinning[id(how)] = runs
            return ()
        self._pinning.pop(id(how), None)
        return tuple(how.pinned)


_UNKNOWN: Any = (None,)


def _share(leaves: list[Any], old: list[Any]) -> None:
    """Arrays of NumPy that are bit by bit what they were in the run before become the same array."""
    if np.ndarray not in set(map(type, leaves)):
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
        held = entry.variables
        with contextlib.suppress(Exception):  # a module that its owner has made one that no run would take
            held = entry.model.take() if held is None else held
        yield from jax.tree_util.tree_leaves(held)
        if not pinned:
            continue
        if not entry.model.holds_variables:  # what such a module holds are its variables
            yield from arrays_in(entry.model.module)
        elif entry.built is not None:
            yield from arrays_in((entry.built.recipe.args, entry.built.recipe.kwargs))
