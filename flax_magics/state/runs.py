"""Runs as a session keeps them: facts held, outputs weakly, and what a replay needs for as long as there is room for it.

How much that is: inputs, variables that later runs overwrote, and what models hold that are no more, the oldest let go
first. Every array counts once, however many runs it went into, and not at all while a registered model has it. Runs are
only noted as they come, with what they may take at most; what they do take is counted when that could be too much,
after some thousand runs, or when somebody asks.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from operator import is_
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
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
"""A run's positional and keyword arguments: how they are put together, and their leaves."""
_Weak: TypeAlias = tuple[jax.tree_util.PyTreeDef | None, list[Callable[[], Leaf]]]
"""A pytree taken apart (None: it is one array): what gives each leaf, of an array a weak reference."""


class StoredRun:
    """One run: its facts held, its output and what was sown held weakly.

    Its inputs, and the variables that it ran with, are held until `let_go`: then weakly, and not at all. They are held as
    leaves, so that a dict that is changed later is not what a replay gets; arrays of NumPy, which may be, are copied.

    The Run in a user's hands holds its own arrays; as long as it lives, the session gives that very object.

    Args:
      origin: what a replay needs besides keys and inputs, None for a key.
      size: bytes that holding on to that and to the inputs may take, at most.
      inputs: tree structure and leaves of the inputs, where they are those of an earlier run.

    Attributes:
      facts: the Run without its arrays.
      origin, inputs: see above; None once they were let go of.
      record: what an apply was seen to ask for, None for every other run.
      replays: how often it was run again, and whether any of these gave other bits.
    """

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
        """The run; an array that nobody holds any more makes its whole field `RELEASED`."""
        run = self._run()
        if run is not None:
            return run
        sown = RELEASED if self._sown is None else _held(self._sown)
        sown = {} if sown is RELEASED else sown
        return replace(self.facts, output=self.output(), inputs=self._inputs(), sown=sown)

    def output(self) -> PyTree:
        """What the run gave, `RELEASED` where nobody holds it any more."""
        run = self._run()
        return _held(self._output) if run is None else run.output

    def _inputs(self) -> PyTree:
        if self.inputs is not None:
            return jax.tree_util.tree_unflatten(*self.inputs)
        return RELEASED if self._weak is None else _held(self._weak)

    @property
    def shapes(self) -> str:
        """Dtypes and shapes of the inputs, which outlive them: `float32[3,4,4], train=True`."""
        if self._shapes is None:
            try:
                self._shapes = describe_inputs(self._inputs())
            except Exception:  # a type of the user's own that cannot be put together again
                self._shapes = "…"
        return self._shapes

    @classmethod
    def read(cls, run: Run, shapes: str, replays: tuple[int, bool]) -> StoredRun:
        """A run of another process: its inputs are gone, their shapes are known."""
        stored = cls(run)
        stored._shapes, stored.replays = shapes, replays
        return stored

    def let_go(self) -> None:
        """Lets go of what a replay needs. Inputs that somebody else holds can still be read."""
        if self.inputs is not None:
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
    if isinstance(tree, jax.Array):  # as most are
        return None, [weakref.ref(tree)]
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    return treedef, list(map(_reference, leaves))


def _held(weak: _Weak) -> PyTree:
    """The pytree, `RELEASED` where one of its arrays is no more."""
    treedef, references = weak
    leaves = [reference() for reference in references]
    if any(leaf is None for leaf in leaves):
        return RELEASED
    return leaves[0] if treedef is None else jax.tree_util.tree_unflatten(treedef, leaves)


def _reference(leaf: Leaf) -> Callable[[], Leaf]:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        with contextlib.suppress(TypeError):  # a numpy scalar: a few bytes
            return weakref.ref(leaf)
    return lambda: leaf


class RunLog(NamedTuple):
    """Runs, newest first, as a linked list: adding one makes a new list and leaves the old as it was."""

    kept: StoredRun
    before: RunLog | None
    length: int

    @staticmethod
    def add(chain: RunLog | None, stored: StoredRun) -> RunLog:
        """`chain` with one more run."""
        return RunLog(stored, chain, length(chain) + 1)


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
    """Numbers of this kernel's cells that drew → the calls that they made, as they were written; of a key an empty one."""
    calls: dict[int, set[str]] = {}
    for stored in backwards(chain):
        facts = stored.facts
        if facts.cell is not None and not facts.replayed and facts.elsewhere is None:
            calls.setdefault(facts.cell, set()).add(facts.call if COMMANDS[facts.command].model else "")
    return {number: tuple(texts) for number, texts in calls.items()}


def of_draw(chain: RunLog | None, seed: int, number: int) -> list[StoredRun]:
    """The runs that took draw `number` of `seed`, in order: one, or an init and the apply that went on with its draw.

    Where a seed was started again it is the last time that counts.
    """
    drawn = (stored for stored in backwards(chain) if not stored.facts.replayed)
    for stored in drawn:
        facts = stored.facts
        if facts.seed == seed and facts.draw <= number < facts.draw + (facts.samples or 1):
            before = next(drawn, None)
            return [before, stored] if before is not None and _shared(before.facts, facts) else [stored]
    return []


def _shared(init: Run, apply: Run) -> bool:
    """Whether an apply went on with the draw that an init opened."""
    opens, continues = COMMANDS[init.command].opens, COMMANDS[apply.command].forward
    if not (opens and continues and init.model == apply.model):
        return False
    opened, taken = getattr(init.keys, "draw", None), getattr(apply.keys, "draw", None)
    if opened is None or taken is None:  # keys of a module that was built, or of a file, not what they were drawn from
        return (init.seed, init.draw) == (apply.seed, apply.draw)
    return opened is taken.first


def causes_of(chain: RunLog | None, model: str, n: int, reach: int = 500) -> list[tuple[str, tuple[Cause, ...]]]:
    """Of the last `n` runs of `model`, newest first: where the program came from, and why it was new.

    Args:
      reach: runs of any model that are looked at.
    """
    recent = (stored.facts for stored in islice(backwards(chain), reach))
    applies = (facts for facts in recent if COMMANDS[facts.command].forward and facts.model == model)
    return [(facts.program, facts.causes) for facts in islice(applies, n)]


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

    def __init__(self, limit: int, current: Callable[[bool], Iterable[Leaf]]) -> None:
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
                for held in self._held:
                    self._sizes |= _sizes_in(held, self._sizes)

    def replace(self, before: Replaced | None, after: Replaced | None) -> None:
        """Counts the variables that an init has replaced in the place of those that an earlier one replaced."""
        if before is not None and before is not after:
            self.drop(before)
        if after is not None and before is not after:
            self.noted.append(after)
            self.look(after.size)

    def _take_in(self) -> None:
        for held in self.noted:
            if held.origin is None or held.inputs is None:
                continue
            how = held.origin.how
            if isinstance(how, ApplyRecipe):
                before = self._last.get(how.name)
                if before is not None and before.origin is not None and before.inputs is not None:
                    _share(held.inputs[1], before.inputs[1])
                    leaves, old = held.origin.leaves, before.origin.leaves
                    _share(leaves, old)
                    if len(leaves) == len(old) and all(map(is_, leaves, old)):
                        held.origin.leaves = old  # one list of them, too
                self._last[how.name] = held
            self._held.append(held)
            self._sizes |= _sizes_in(held, self._sizes)
            self._pinned = self._pinned or bool(how.pinned)
        self.noted, self._rough = [], 0

    def _let_go_of_oldest(self, anyway: set[int]) -> None:
        # Some room at once: otherwise every single run would have to count again.
        enough = self.limit - self.limit // 8
        self._sizes, oldest_first, self._held = {}, self._held, []
        self._known, self._pinned = 0, False
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
    """The bytes of each array that a run holds by its id, those that are known left out."""
    assert held.origin is not None
    assert held.inputs is not None
    leaves = (*held.origin.leaves, *held.inputs[1], *held.origin.how.pinned)
    return {id(leaf): size for leaf in leaves if id(leaf) not in known and (size := bytes_of(leaf))}


def _share(leaves: list[Leaf], old: list[Leaf]) -> None:
    """Arrays of NumPy that are bit by bit what they were in the run before become the same array."""
    if leaves is old or len(leaves) != len(old) or np.ndarray not in set(map(type, leaves)):
        return
    for i, (leaf, was) in enumerate(zip(leaves, old, strict=True)):
        both = type(leaf) is np.ndarray and type(was) is np.ndarray
        if not both or (leaf.dtype, leaf.shape) != (was.dtype, was.shape) or leaf.dtype.hasobject:
            continue
        if leaf.tobytes() == was.tobytes():
            leaves[i] = was


def checked_limit(limit: object) -> int:
    """`limit` if it is a number of bytes. Raises FlaxMagicsError: it is none."""
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise FlaxMagicsError(f"`replay_bytes` is a number of bytes, 0 or more, not {limit!r}.")
    return limit


def arrays_of(models: Mapping[str, ModelEntry], pinned: bool) -> Iterator[Leaf]:
    """The variables of registered models, as the session or the module holds them; `pinned`: and what else models hold."""
    for entry in models.values():
        with contextlib.suppress(Exception):  # a module that its owner has made one that no run would take
            yield from jax.tree_util.tree_leaves(entry.held)
        if pinned and not entry.model.holds_variables:
            yield from arrays_in(entry.model.module)
        elif pinned and entry.built is not None:  # what such a module holds are its variables
            yield from arrays_in((entry.built.recipe.args, entry.built.recipe.kwargs))
