"""Runs as a session keeps them: facts for good, outputs weakly, and what a replay needs while there is room for it.

A replay needs inputs, variables that later runs overwrote, and arrays of models that are gone; `ReplayBudget` drops the
oldest first.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from operator import is_
from typing import Any, NamedTuple, TypeAlias, overload

import jax
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import all_words, describe, digest_of, is_gone, owned_copy
from ..base.measures import Memory, Timing
from ..base.output import OutputFacts, sample_of
from ..base.types import HostArray, Leaf, PyTree
from ..models.base import CallTrace
from ..rng.keys import Draw, RunKeys
from ..run import COMMANDS, RELEASED, Cause, Note, Run
from .entry import Origin
from .weights import WeightSource

Inputs: TypeAlias = tuple[jax.tree_util.PyTreeDef, list[Leaf]]
"""A run's positional and keyword arguments as a pytree: treedef and leaves."""
_Reference: TypeAlias = Callable[[], Leaf]
"""Returns a leaf that is held weakly, or None."""
_Weak: TypeAlias = _Reference | tuple[jax.tree_util.PyTreeDef, list[_Reference]]
"""A pytree held weakly: the reference to its one array, or its treedef with a reference for each leaf."""


_making = threading.RLock()
"""Held while a Run or its facts are made, since other threads, such as one that saves, may ask for them too."""


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
      origin, inputs: see above; None once dropped.
      record: what an apply was seen to ask for, None for every other run.
      replays: how often it was run again, and whether any of these gave other bits.
    """

    # A session keeps every run, so each is kept small.
    __slots__ = (
        "_facts", "_output", "_run", "_shapes", "_sown", "_weak", "inputs", "origin", "record", "replays", "size",
    )  # fmt: skip

    def __init__(self, run: Run, origin: Origin | None = None, size: int = 0, inputs: Inputs | None = None) -> None:
        self._run: Callable[[], Run | None] = weakref.ref(run)
        self._facts: Run | None = replace(run, output=RELEASED, inputs=RELEASED, sown={})
        self._output = _weakly(run.output)
        self._sown = _weakly(dict(run.sown)) if run.sown else None
        # A training begins without the switch that it gives its loss, and is told with it.
        self._shapes = describe_inputs(run.inputs) if inputs is not None and run.kind.trains else None
        self.replays = (0, False)
        self.origin = origin
        self.record: CallTrace | None = None if origin is None else origin.record
        self.size = size
        self.inputs = inputs
        self._weak = _weakly(run.inputs) if origin is None else None
        if origin is not None and inputs is None:
            leaves, treedef = jax.tree_util.tree_flatten(run.inputs)
            self.inputs = treedef, list(map(owned_copy, leaves))

    @property
    def facts(self) -> Run:
        """The Run without its arrays."""
        assert self._facts is not None
        return self._facts

    @property
    def replayed(self) -> bool:
        """`Run.replayed`."""
        return self.facts.replayed

    @property
    def notes(self) -> tuple[Note, ...]:
        """`Run.notes`."""
        return self.facts.notes

    def run(self) -> Run:
        """The run. A field of which an array is gone is `RELEASED` as a whole."""
        with _making:
            run = self._run()
            if run is None:
                sown = RELEASED if self._sown is None else _held(self._sown)
                sown = {} if sown is RELEASED else sown
                run = replace(self.facts, output=self.output(), inputs=self._inputs(), sown=sown)
                self._run = weakref.ref(run)
            return run

    def output(self) -> PyTree:
        """What the run returned, `RELEASED` once an array of it is gone."""
        run = self._run()
        return _held(self._output) if run is None else RELEASED if is_gone(run.output) else run.output

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


class RunLine(NamedTuple):
    """What the runs of one line have in common: a Run with the fields that stay the same, and `RunKeys.names`."""

    template: Run
    key_names: Mapping[str, tuple[str, bool]]
    small: tuple[np.dtype[Any], tuple[int, ...]] | None
    """dtype and shape of the output, where it is one small array that each run looks through for NaN; else None."""
    shape: str
    """`Run.shape`."""
    record: CallTrace
    """`StoredRun.record`."""


class RepeatedRun(StoredRun):
    """A run of a line that ran before. Its facts are made when somebody reads them: of most runs in a loop, nobody does.

    Args:
      line: what it shares with the other runs of its line, whose inputs and variables `origin` and `inputs` may be.
      drawn: the draw that it took.
      started, cell: as in Run.
      source: that of its variables.

    Attributes:
      seconds, wait: of the run, and of the wait for its inputs.
      changed, memory: as in Run.
    """

    # No tuple, since the garbage collector would look through it as often as through the run itself.
    __slots__ = (
        "_cell", "_copy", "_drawn", "_line", "_source", "_started", "_taken", "changed", "memory", "seconds", "wait",
    )  # fmt: skip

    def __init__(
        self,
        line: RunLine,
        output: PyTree,
        origin: Origin,
        inputs: Inputs,
        *,
        size: int,
        sown: Mapping[str, PyTree],
        drawn: Draw,
        started: float,
        cell: int | None,
        source: WeightSource | None,
    ) -> None:
        self._line = line
        # The Draw itself: under other settings of JAX it would work out other keys than the run had.
        self._drawn = drawn
        self._started, self._cell, self._source = started, cell, source
        self._facts, self._shapes, self._weak = None, None, None
        self._copy: bytes | None = None
        self._taken: OutputFacts | None = None
        self._run = _gone
        self._output = _weakly(output)
        self._sown = _weakly(dict(sown)) if sown else None
        self.replays, self.size = (0, False), size
        self.origin, self.inputs, self.record = origin, inputs, line.record
        self.seconds = self.wait = 0.0
        self.changed: Mapping[str, int] = _UNCHANGED
        self.memory: Memory | None = line.template.memory

    replayed = False

    @property
    def notes(self) -> tuple[Note, ...]:
        """`Run.notes`."""
        return self._line.template.notes

    @property
    def facts(self) -> Run:
        """The Run without its arrays."""
        with _making:
            if self._facts is None:
                self._facts = self._made()
            return self._facts

    def _made(self, **arrays: PyTree) -> Run:
        """The Run without its arrays, but for these. What is taken of its output is the same object in all of them."""
        draw, source = self._drawn, self._source
        if self._taken is None:
            self._taken = OutputFacts(shape=self._line.shape)
            if self._copy is not None:
                self._taken.copy = self._read(self._copy)
                self._copy = None  # which goes once the facts are read
        return replace(
            self._line.template,
            seed=draw.seed,
            draw=draw.number,
            keys=RunKeys(draw, self._line.key_names),
            started=self._started,
            cell=self._cell,
            weights="" if source is None else source.describe(draw.seed),
            timing=Timing(run=self.seconds, wait=self.wait),
            _taken=self._taken,
            changed=self.changed,
            memory=self.memory,
            **arrays,
        )

    @property
    def draw(self) -> int:
        """`Run.draw`."""
        return self._drawn.number

    def is_like(self, other: RepeatedRun) -> bool:
        """Whether it differs from the other in draw, time, inputs and output alone, and the output is small."""
        return (
            self._line is other._line
            and self._line.small is not None
            and self._source is other._source
            and self._cell == other._cell
            and self._drawn.seed == other._drawn.seed
        )

    def recorded(self, copy: bytes, like: Mapping[str, object], keeps: bool) -> dict[str, object]:
        """`run.recorded` of this run.

        Args:
          copy: the bytes of its output.
          like: what `recorded` gave for a run that it `is_like`.
          keeps: the copy stays for what else is asked of it; else that is taken now, as of a large output.
        """
        output = self._read(copy)
        keys = all_words(RunKeys(self._drawn, self._line.key_names))
        news = {"draw": self.draw, "started": self._started, "keys": keys, "digest": digest_of(output)}
        if not keeps:
            self.facts._taken.read()
        return {**like, **news, **sample_of(output)}

    def run_of(self, output: PyTree, inputs: PyTree, sown: Mapping[str, PyTree]) -> Run:
        """The Run with its arrays, which the session returns too for as long as somebody holds it."""
        with _making:
            run = self._run()
            if run is None:
                run = self._made(output=output, inputs=inputs, sown=sown)
                self._run = weakref.ref(run)
            return run

    def keep(self, copy: bytes) -> None:
        """Keeps the bytes of a small output, of which the digest is taken when somebody asks."""
        with _making:
            if self._taken is None:
                self._copy = copy
            else:  # somebody has read the run already, such as another thread that saves
                self._taken.keep(self._read(copy))

    def _read(self, copy: bytes) -> HostArray:
        assert self._line.small is not None
        dtype, shape = self._line.small
        return np.frombuffer(copy, dtype).reshape(shape)


_UNCHANGED: dict[str, int] = {}


def _gone() -> None:
    """Stands for the reference to a Run that nobody has asked for."""


def describe_inputs(inputs: PyTree) -> str:
    """Dtypes and shapes of `(args, kwargs)`; empty where they are gone."""
    if inputs is RELEASED:
        return ""
    args, kwargs = inputs
    return ", ".join([*map(describe, args), *(f"{name}={describe(value)}" for name, value in kwargs.items())])


def _weakly(tree: PyTree) -> _Weak:
    if isinstance(tree, jax.Array):  # the usual output
        return weakref.ref(tree)
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    return treedef, list(map(_reference, leaves))


def _held(weak: _Weak) -> PyTree:
    """The pytree, `RELEASED` if one of its arrays is gone, donated or deleted."""
    leaves = [reference() for reference in (weak[1] if isinstance(weak, tuple) else [weak])]
    if any(leaf is None for leaf in leaves) or is_gone(leaves):
        return RELEASED
    return jax.tree_util.tree_unflatten(weak[0], leaves) if isinstance(weak, tuple) else leaves[0]


def _reference(leaf: Leaf) -> _Reference:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        with contextlib.suppress(TypeError):  # a NumPy scalar takes no weak reference, and has only a few bytes
            return weakref.ref(leaf)
    return lambda: leaf


class RunLog(Struct, frozen=True):
    """Runs as a linked list, newest first. Adding one leaves the list of every earlier State as it was."""

    last: StoredRun
    before: RunLog | None
    length: int

    @staticmethod
    def add(chain: RunLog | None, stored: StoredRun) -> RunLog:
        """Returns `chain` with one more run in front; `chain` itself stays as it is."""
        return RunLog(stored, chain, 1 if chain is None else chain.length + 1)


def with_newer(chain: RunLog | None, before: StoredRun, after: StoredRun) -> RunLog:
    """The list with `after` in the place of `before`, which is one of its runs; other lists stay as they are."""
    later: list[StoredRun] = []
    while chain is not None and chain.last is not before:
        later.append(chain.last)
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
        yield chain.last
        chain = chain.before


NEAR = 64
"""From how many runs before the end on all are listed, to find one of them."""


class Runs(Sequence[Run]):
    """The runs of a session at one moment, newest last. Each Run is made when it is asked for first."""

    def __init__(self, chain: RunLog | None) -> None:
        self._chain = chain
        self._made: dict[int, Run] = {}

    @cached_property
    def _stored(self) -> list[StoredRun]:
        return list(backwards(self._chain))[::-1]

    def __len__(self) -> int:
        return length(self._chain)

    @overload
    def __getitem__(self, at: int) -> Run: ...
    @overload
    def __getitem__(self, at: slice) -> list[Run]: ...
    def __getitem__(self, at: int | slice) -> Run | list[Run]:
        places = range(len(self))[at]
        if isinstance(places, range):
            return [self[place] for place in places]
        if places not in self._made:
            back = len(self) - 1 - places
            stored = next(islice(backwards(self._chain), back, None)) if back < NEAR else self._stored[places]
            self._made[places] = stored.run()
        return self._made[places]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(is_, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.pretty(list(self))

    def __reduce__(self) -> tuple[type, tuple[list[Run]]]:
        return list, (list(self),)  # copies and pickles hold the Runs, not what makes them


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
    """Where the program came from, and why it was new, of the last `n` applies of `model`, newest first.

    Gradients and trainings are left out: a loss has programs of its own.

    Args:
      reach: how many runs, of any model, are searched.
    """
    recent = (stored.facts for stored in islice(backwards(chain), reach))
    applies = (facts for facts in recent if facts.kind.forward and not facts.kind.loss and facts.model == model)
    return [(facts.program, facts.causes) for facts in islice(applies, n)]
