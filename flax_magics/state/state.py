"""A session's state at one moment: frozen, and replaced as a whole by every command that changes something.

Beside it, for all moments together, the limit on what is held for replays.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import is_
from typing import Literal

import jax
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import bytes_of
from ..base.threads import uninterrupted
from ..base.types import Leaf, PyTree
from ..code.walk import arrays_in
from ..compile.placement import Placement
from ..errors import FlaxMagicsError
from ..models.calls import Path
from ..rng.keys import Draw, RootKey, StepDraw
from .entry import ApplyRecipe, ModelEntry, Replaced
from .runs import RunLog, StoredRun, of_draw
from .training import SavedTraining

REPLAY_BYTES = 256_000_000
"""The most bytes that replays may hold, unless the user sets another limit."""
NOTED = 4096
"""How many runs are noted before their arrays are counted."""
_Held = StoredRun | Replaced


class SavedInit(Struct, frozen=True, forbid_unknown_fields=True):
    """How a linen model's variables were initialised, as `InitRecord` has it; `program` is a digest."""

    key: PyTree
    method: Path
    args: PyTree
    kwargs: PyTree
    program: str


class SavedModel(Struct, frozen=True, forbid_unknown_fields=True):
    """A model's variables, and what is needed to compare them with a model that is registered under its name.

    A file's JSON has its fields under these names, with `Node`s in the place of trees.

    Attributes:
      api: the one of Flax's APIs that its module is written in.
      text: how it was built, in one line.
      source: the code of its classes, empty where that cannot be read.
      variables: by collection; None for a linen model before its init. Of an NNX module by type and path, with the
        keys and counts of random streams.
      stale: `NnxEntry.rebuild_next`.
      made: how a linen model's variables were initialised; None where no init of the model is known.
      assigned: the user has put other variables in their place.
      keys: with which the session built an NNX module; None where the user's code did.
      optimizer: the text of the one that trained it last; None where none did.
      training: what goes on with the last training; None where there is nothing to go on with.
      file: the path that it was read from.
    """

    name: str
    api: Literal["linen", "nnx"]
    text: str
    source: str
    variables: PyTree
    updates: Mapping[str, int] = {}
    outdated: bool = False
    stale: bool = False
    made: SavedInit | None = None
    assigned: bool = False
    keys: Mapping[str, PyTree] | None = None
    optimizer: str | None = None
    training: SavedTraining | None = None
    parameters: int = 0
    bytes: int = 0
    versions: Mapping[str, str] = {}
    file: str = ""

    @property
    def ready(self) -> bool:
        """Whether the file has variables of the model: none before its first init."""
        return self.variables is not None


def with_entry(models: Mapping[str, ModelEntry], entry: ModelEntry) -> Mapping[str, ModelEntry]:
    """`models` with `entry`.

    A cell that has a class alone registers an instance under the class's own name. Where nothing has used that one, and an
    instance is registered under a name of its own, it gives way.
    """
    cls = type(entry.model.module).__name__
    alone = models.get(cls)
    if cls == entry.name or alone is None or alone.used or type(alone.model.module).__name__ != cls:
        return {**models, entry.name: entry}
    return {name: other for name, other in models.items() if other is not alone} | {entry.name: entry}


class State(Struct, frozen=True):
    """Everything of a session that a command may change."""

    root: RootKey
    models: Mapping[str, ModelEntry] = {}
    opened: tuple[str, Draw] | None = None
    """The model whose init opened a draw and used its `params` key, and that draw: its next apply goes on with it."""
    runs: RunLog | None = None
    seeds: Mapping[int, tuple[int, str]] = {}
    """seed → the last draw under it before it was restarted, and its PRNG implementation."""
    waiting: Mapping[str, SavedModel] = {}
    """Variables read from a file whose models are not registered yet, by model name."""
    placement: Placement | None = None
    """The mesh that runs are laid out on, None for one device."""

    def after(self, stored: StoredRun, draw: Draw, entry: ModelEntry | None, opened: tuple[str, Draw] | None) -> State:
        """The state after a run that succeeded. A replay moves neither the root key nor the open draw."""
        root, opened = (self.root, self.opened) if stored.replayed else (self.root.after(draw), opened)
        models = self.models if entry is None else with_entry(self.models, entry)
        waiting = self.waiting and self._still_waiting(entry)
        log = RunLog.add(self.runs, stored)
        return replace(self, root=root, models=models, opened=opened, runs=log, waiting=waiting)

    def with_variables(self, entry: ModelEntry) -> State:
        """The state after the user has assigned variables to a model."""
        return replace(self, models=with_entry(self.models, entry), waiting=self._still_waiting(entry))

    def restarted(self, root: RootKey, *, fresh: bool) -> tuple[State, Restart]:
        """The state with another root key and no open draw. Draws of the old seed can still be found.

        Args:
          fresh: every model is to be initialised or built again at its next use.
        """
        models = {name: entry.to_be_made_anew() if fresh else entry for name, entry in self.models.items()}
        to_build = {name for name, entry in models.items() if entry.rebuild_next and entry.built is not None}
        keeping = tuple(name for name, entry in models.items() if entry.ready and name not in to_build)
        restart = Restart(root.seed, fresh, keeping, again=self._last(root.seed)[0] > 0)
        seeds = {**self.seeds, self.root.seed: self._last(self.root.seed)}
        waiting = {} if fresh else self.waiting
        return State(root, models, None, self.runs, seeds, waiting, self.placement), restart

    def _still_waiting(self, entry: ModelEntry | None) -> Mapping[str, SavedModel]:
        """The variables that still wait once `entry` has some: not those for the same model."""
        if entry is None or not entry.ready:
            return self.waiting
        return {name: model for name, model in self.waiting.items() if name != entry.name}

    def _last(self, seed: int) -> tuple[int, str]:
        """The number of the last draw under `seed`, 0 for none, and its PRNG implementation."""
        last = self.seeds.get(seed, (0, ""))
        if seed != self.root.seed or not self.root.draws:
            return last
        # A seed that was restarted may have gone further the first time.
        return max(last[0], self.root.draws), self.root.impl

    def find_draw(self, wanted: int | tuple[int, int] | None, *, opens: bool = False) -> Draw | None:
        """An earlier draw by its number, or by `(seed, number)`. Raises FlaxMagicsError if it was never made.

        Of a training it has the keys of its first step, since nobody is handed the keys that are folded for the steps.

        Args:
          opens: for an init, whose `params` key was not folded.
        """
        if wanted is None:
            return None
        seed, number = self.check_draw(wanted)
        impl = self._last(seed)[1]
        # `jax_default_prng_impl` may have changed since the seed was used.
        with jax.default_prng_impl(impl):
            root = RootKey.from_seed(seed)
        # Each draw splits the root that the draw before it left.
        for _ in range(number - 1):
            root = root.after(root.draw())
        draw = root.draw()
        trains = any(stored.facts.kind.trains for stored in of_draw(self.runs, seed, number))
        return StepDraw.of(draw, 0) if trains and not opens else draw

    def check_draw(self, wanted: int | tuple[int, int]) -> tuple[int, int]:
        """Seed and number of an earlier draw. Raises FlaxMagicsError if it was never made."""
        seed, number = wanted if isinstance(wanted, tuple) else (self.root.seed, wanted)
        last, _ = self._last(seed)
        if not 1 <= number <= last:
            drawn = f"draws 1 to {last}" if last > 1 else "draw 1 alone" if last else "no draw"
            others = [other for other in {**self.seeds, self.root.seed: 0} if 1 <= number <= self._last(other)[0]]
            message = f"draw {number} of seed {seed} was not made in this session: it has {drawn}."
            hint = ", ".join(f"{other}:{number} is draw {number} of seed {other}" for other in others[-3:])
            raise FlaxMagicsError(message, hint=hint or None, write="%flax_history")
        return seed, number


class Restart(Struct, frozen=True):
    """What a restart of the root key means: which models keep variables, and whether the seed was used before."""

    seed: int
    fresh: bool
    keeping: tuple[str, ...]
    again: bool


class ReplayBudget:
    """Limits what is held for replays, dropping the oldest runs first.

    An array counts once, however many runs used it, and not at all while a registered model holds it. Counting is put off:
    a run is noted with the most that it may hold, and arrays are counted when the sum could exceed the limit, after `NOTED`
    runs, or when somebody asks.

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
