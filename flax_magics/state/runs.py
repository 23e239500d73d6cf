"""Runs as a session keeps them: facts for good, outputs weakly, and what a replay needs while there is room for it.

A replay needs inputs, variables that later runs overwrote, and arrays of models that are gone; the oldest are dropped
first. An array counts once, however many runs used it, and not at all while a registered model holds it. Counting is
put off: a run is noted with the most that it may hold, and arrays are counted when the sum could exceed the limit,
after `NOTED` runs, or when somebody asks.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from operator import is_
from typing import TypeAlias

import jax
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import bytes_of, describe, own
from ..base.threads import uninterrupted
from ..base.types import Leaf, PyTree
from ..code.walk import arrays_in
from ..errors import FlaxMagicsError
from ..models.base import CallTrace
from ..run import COMMANDS, RELEASED, Cause, Run
from .entry import ApplyRecipe, ModelEntry, Origin, Replaced

Inputs: TypeAlias = tuple[jax.tree_util.PyTreeDef, list[Leaf]]
"""A run's positional and keyword arguments as a pytree: treedef and leaves."""
_Weak: TypeAlias = tuple[jax.tree_util.PyTreeDef | None, list[Callable[[], Leaf]]]
"""A pytree held weakly: its treedef (None: it is one array), and for each leaf a function that returns it or None."""


class StoredRun:
    """One run: its facts are kept for good; its output, and what was sown, only weakly.

    Its inputs, and the variables that it had, are held until `let_go`; after that the inputs are held weakly. Both are
    held as leaves, so that changing a dict later does not change a replay. NumPy arrays are copied, since they can be
    written into. While the user holds the Run, the session returns that very object.

    Args:
      origin: what a replay needs besides keys and inputs, None for a key.
      size: the most bytes that holding `origin` and the inputs may take.
      inputs: the inputs, if they are shared with an earlier run.

    Attributes:
      facts: the Run without its arrays.
      origin, inputs: see above; None once dropped.
      record: what an apply was seen to ask for, None for every other run.
      replays: how often it was run again, and whether any of these gave other bits.
    """

    # A session keeps every run, so each is kept small.
    __slots__ = (
        "_output", "_run", "_shapes", "_sown", "_weak", "facts", "inputs", "origin", "record", "replays", "size",
    )  # fmt: skip

    def __init__(self, run: Run, origin: Origin | None = None, size: int = 0, inputs: Inputs | None = None) -> None:
        self._run = weakref.ref(run)
        self.facts = replace(run, output=RELEASED, inputs=RELEASED, sown={})
        self._output = _weakly(run.output)
        self._sown = _weakly(dict(run.sown)) if run.sown else None
        self._shapes: str | None = None
        self.replays = (0, False)
        self.origin = origin
        self.record: CallTrace | None = None if origin is None else origin.record
        self.size = size
        self.inputs = inputs
        self._weak = _weakly(run.inputs) if origin is None else None
        if origin is not None and inputs is None:
            leaves, treedef = jax.tree_util.tree_flatten(run.inputs)
            self.inputs = treedef, list(map(own, leaves))

    def run(self) -> Run:
        """The run. A field of which an array is gone is `RELEASED` as a whole."""
        run = self._run()
        if run is not None:
            return run
        sown = RELEASED if self._sown is None else _held(self._sown)
        sown = {} if sown is RELEASED else sown
        return replace(self.facts, output=self.output(), inputs=self._inputs(), sown=sown)

    def output(self) -> PyTree:
        """What the run returned, `RELEASED` once an array of it is gone."""
        run = self._run()
        return _held(self._output) if run is None else run.output

    def _inputs(self) -> PyTree:
        if self.inputs is not None:
            return jax.tree_util.tree_unflatten(*self.inputs)
        return RELEASED if self._weak is None else _held(self._weak)

    @property
    def shapes(self) -> str:
        """Dtypes and shapes of the inputs, `float32[3,4,4], train=True`; known even after the inputs were dropped."""
        if self._shapes is None:
            try:
                self._shapes = describe_inputs(self._inputs())
            except Exception:  # a pytree class of the user's whose unflatten fails
                self._shapes = "…"
        return self._shapes

    @classmethod
    def read(cls, run: Run, shapes: str, replays: tuple[int, bool]) -> StoredRun:
        """A run of another process, read from a file: its inputs are gone, but their shapes were saved."""
        stored = cls(run)
        stored._shapes, stored.replays = shapes, replays
        return stored

    def let_go(self) -> None:
        """Drops what a replay needs. Inputs that somebody else holds can still be read."""
        if self.inputs is not None:
            # Described now, because the arrays may be gone when somebody asks.
            self._shapes = self.shapes
            treedef, leaves = self.inputs
            self._weak = treedef, list(map(_reference, leaves))
        self.origin = self.inputs = None


def describe_inputs(inputs: PyTree) -> str:
    """Dtypes and shapes of `(args, kwargs)`; empty where they are gone."""
    if inputs is RELEASED:
        return ""
    args, kwargs = inputs
    return ", ".join([*map(describe, args), *(f"{name}={describe(value)}" for name, value in kwargs.items())])


def _weakly(tree: PyTree) -> _Weak:
    if isinstance(tree, jax.Array):  # the usual output: no treedef to keep
        return None, [weakref.ref(tree)]
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    return treedef, list(map(_reference, leaves))


def _held(weak: _Weak) -> PyTree:
    """The pytree, `RELEASED` if one of its arrays is gone."""
    treedef, references = weak
    leaves = [reference() for reference in references]
    if any(leaf is None for leaf in leaves):
        return RELEASED
    return leaves[0] if treedef is None else jax.tree_util.tree_unflatten(treedef, leaves)


def _reference(leaf: Leaf) -> Callable[[], Leaf]:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        with contextlib.suppress(TypeError):  # a NumPy scalar takes no weak reference, and has only a few bytes
            return weakref.ref(leaf)
    return lambda: leaf


class RunLog(Struct, frozen=True):
    """Runs as a linked list, newest first. Adding one leaves the list of every earlier State as it was."""

    kept: StoredRun
    before: RunLog | None
    length: int

    @staticmethod
    def add(chain: RunLog | None, stored: StoredRun) -> RunLog:
        """Returns `chain` with one more run in front; `chain` itself stays as it is."""
        return RunLog(stored, chain, length(chain) + 1)


def with_newer(chain: RunLog | None, before: StoredRun, after: StoredRun) -> RunLog:
    """The list with `after` in the place of `before`, which is one of its runs; other lists stay as they are."""
    later: list[StoredRun] = []
    while chain is not None and chain.kept is not before:
        later.append(chain.kept)
        chain = chain.before
    chain = RunLog.add(None if chain is None else chain.before, after)
    for stored in reversed(later):
        chain = RunLog.add(chain, stored)
    return chain


def length(chain: RunLog | None) -> int:
    """How many runs there are."""
    return 0 if chain is None else chain.length


def newest(chain: RunLog | None, n: int) -> list[Run]:
    """The last `n` runs, oldest first."""
    return [stored.run() for stored in islice(backwards(chain), max(n, 0))][::-1]


def backwards(chain: RunLog | None) -> Iterator[StoredRun]:
    """Every run, newest first."""
    while chain is not None:
        yield chain.kept
        chain = chain.before


def calls_by_cell(chain: RunLog | None) -> dict[int, tuple[str, ...]]:
    """Cell number → the calls of its runs as they were written, an empty one for a key; only cells of this kernel."""
    calls: dict[int, set[str]] = {}
    for stored in backwards(chain):
        facts = stored.facts
        # Replays draw nothing, and runs of a loaded file have the cell numbers of another kernel.
        if facts.cell is not None and not facts.replayed and facts.elsewhere is None:
            calls.setdefault(facts.cell, set()).add(facts.call if COMMANDS[facts.command].model else "")
    return {number: tuple(texts) for number, texts in calls.items()}


def of_draw(chain: RunLog | None, seed: int, number: int) -> list[StoredRun]:
    """The runs that took draw `number` of `seed`, in order: one, or an init and the apply that went on with its draw.

    If the seed was restarted, only the runs since then count.
    """
    drawn = (stored for stored in backwards(chain) if not stored.facts.replayed)
    for stored in drawn:
        facts = stored.facts
        if facts.seed == seed and facts.draw <= number < facts.draw + (facts.samples or 1):
            previous = next(drawn, None)
            # An init that shares the draw is the run right before the apply.
            return [previous, stored] if previous is not None and _shared(previous.facts, facts) else [stored]
    return []


def _shared(init: Run, apply: Run) -> bool:
    """Whether an apply went on with the draw that an init had opened."""
    opens, continues = COMMANDS[init.command].opens, COMMANDS[apply.command].forward
    if not (opens and continues and init.model == apply.model):
        return False
    opened, taken = getattr(init.keys, "draw", None), getattr(apply.keys, "draw", None)
    if opened is None or taken is None:  # keys of a built module or of a file do not tell their Draw
        return (init.seed, init.draw) == (apply.seed, apply.draw)
    # By identity: after a restart of the same seed the draws are equal.
    return opened is taken.first


def causes_of(chain: RunLog | None, model: str, n: int, reach: int = 500) -> list[tuple[str, tuple[Cause, ...]]]:
    """Where the program came from, and why it was new, of the last `n` runs of `model`, newest first.

    Args:
      reach: how many runs, of any model, are searched.
    """
    recent = (stored.facts for stored in islice(backwards(chain), reach))
    applies = (facts for facts in recent if COMMANDS[facts.command].forward and facts.model == model)
    return [(facts.program, facts.causes) for facts in islice(applies, n)]


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
        self.noted: list[_Held] = []
        """Runs whose arrays are not counted yet, oldest first: the commit of a run appends to it."""
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
        with uninterrupted():
            self._take_in()
            anyway = {id(array) for array in self._current(self._pinned)}
            self._known = sum(self._sizes.values()) - sum(self._sizes.get(array, 0) for array in anyway)
            if self._known > self.limit:
                self._let_go_of_oldest(anyway)

    def drop(self, replaced: Replaced) -> None:
        """Drops variables that an init replaced, whatever the limit."""
        with uninterrupted():
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
        # A run may have been dropped before it was ever counted.
        for held in self.noted:
            if held.origin is None or held.inputs is None:
                continue
            how = held.origin.how
            if isinstance(how, ApplyRecipe):
                last = self._last.get(how.name)
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
        self.noted, self._rough = [], 0

    def _let_go_of_oldest(self, anyway: set[int]) -> None:
        # Well below the limit at once: otherwise each further run would exceed it and count everything again.
        enough = self.limit - self.limit // 8
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
