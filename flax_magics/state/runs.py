"""Runs as a session keeps them: facts held, outputs weakly, and what a replay needs for as long as there is room for it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import jax

from ..base.digest import describe, own
from ..models.base import CallTrace
from ..run import COMMANDS, RELEASED, Cause, Run
from .entry import Origin


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
      facts: the fields of the Run.
      origin, inputs: see above; None once they were let go of.
      record: what an apply was seen to ask for, None for every other run.
      replays: how often it was run again, and whether any of these gave other bits.
    """

    __slots__ = (
        "_output",
        "_run",
        "_shapes",
        "_sown",
        "_weak",
        "facts",
        "inputs",
        "origin",
        "record",
        "replays",
        "size",
    )

    def __init__(
        self, run: Run, origin: Origin | None = None, size: int = 0, inputs: tuple[Any, list[Any]] | None = None
    ) -> None:
        self._run = weakref.ref(run)
        self.facts = {**run.__dict__, "output": RELEASED, "inputs": RELEASED, "sown": {}}
        self._output = _weakly(run.output)
        self._sown = _weakly(dict(run.sown)) if run.sown else None
        self._shapes: str | None = None
        self.replays = (0, False)
        self.origin = origin
        self.record: CallTrace | None = None if origin is None else origin.record
        self.size = size
        self._weak: _Weak | None = None
        self.inputs = inputs
        if origin is None:
            self._weak = _weakly(run.inputs)
        elif inputs is None:
            leaves, treedef = jax.tree_util.tree_flatten(run.inputs)
            self.inputs = treedef, list(map(own, leaves))

    def run(self) -> Run:
        """The run; an array that nobody holds any more makes its whole field `RELEASED`."""
        run = self._run()
        if run is not None:
            return run
        sown = RELEASED if self._sown is None else _held(self._sown)
        run = object.__new__(Run)
        run.__dict__.update(self.facts)
        run.__dict__.update(output=self.output(), inputs=self._inputs(), sown={} if sown is RELEASED else sown)
        return run

    def output(self) -> Any:
        """What the run gave, `RELEASED` where nobody holds it any more."""
        run = self._run()
        return _held(self._output) if run is None else run.output

    def _inputs(self) -> Any:
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
        kept = cls(run)
        kept._shapes, kept.replays = shapes, replays
        return kept

    def let_go(self) -> None:
        """Lets go of what a replay needs. Inputs that somebody else holds can still be read."""
        if self.inputs is not None:
            self._shapes = self.shapes
            treedef, leaves = self.inputs
            self._weak = treedef, list(map(_reference, leaves))
        self.origin = self.inputs = None


def describe_inputs(inputs: Any) -> str:
    """Dtypes and shapes of `(args, kwargs)`; empty where they are gone."""
    if inputs is RELEASED:
        return ""
    args, kwargs = inputs
    return ", ".join([*map(describe, args), *(f"{name}={describe(value)}" for name, value in kwargs.items())])


_Weak = weakref.ref[Any] | tuple[Any, list[tuple[Any, Any]]]
"""One array; or a pytree taken apart: each leaf as a weak reference, or (where it is no array) as it is."""


def _weakly(tree: Any) -> _Weak:
    if isinstance(tree, jax.Array):  # as most are
        return weakref.ref(tree)
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    return treedef, [_reference(leaf) for leaf in leaves]


def _held(weak: _Weak) -> Any:
    """The pytree, `RELEASED` where one of its arrays is no more."""
    if isinstance(weak, weakref.ref):
        array = weak()
        return RELEASED if array is None else array
    leaves = []
    for reference, held in weak[1]:
        leaf = held if reference is None else reference()
        if leaf is None:
            return RELEASED
        leaves.append(leaf)
    return jax.tree_util.tree_unflatten(weak[0], leaves)


def _reference(leaf: Any) -> tuple[weakref.ref[Any] | None, Any]:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        try:
            return weakref.ref(leaf), None
        except TypeError:  # a numpy scalar: a few bytes
            pass
    return None, leaf


class RunLog(NamedTuple):
    """Runs, newest first, as a linked list: adding one makes a new list and leaves the old as it was."""

    kept: StoredRun
    before: RunLog | None
    length: int

    @staticmethod
    def add(chain: RunLog | None, kept: StoredRun) -> RunLog:
        """`chain` with one more run."""
        return RunLog(kept, chain, 1 if chain is None else chain.length + 1)


def newest(chain: RunLog | None, n: int) -> list[Run]:
    """The last `n` runs, oldest first."""
    return [kept.run() for kept in islice(backwards(chain), max(n, 0))][::-1]


def backwards(chain: RunLog | None) -> Iterator[StoredRun]:
    """Every run, newest first."""
    while chain is not None:
        yield chain.kept
        chain = chain.before


def calls_by_cell(chain: RunLog | None) -> dict[int, tuple[str, ...]]:
    """Numbers of this kernel's cells that drew → the calls that they made, as they were written; of a key an empty one."""
    calls: dict[int, set[str]] = {}
    for kept in backwards(chain):
        facts = kept.facts
        if facts["cell"] is not None and not facts["replayed"] and facts["elsewhere"] is None:
            calls.setdefault(facts["cell"], set()).add(facts["call"] if COMMANDS[facts["command"]].model else "")
    return {number: tuple(texts) for number, texts in calls.items()}


def of_draw(chain: RunLog | None, seed: int, number: int) -> list[StoredRun]:
    """The runs that took draw `number` of `seed`, in order: one, or an init and the apply that went on with its draw.

    Where a seed was started again it is the last time that counts.
    """
    own_draws = (kept for kept in backwards(chain) if not kept.facts["replayed"])
    for kept in own_draws:
        facts = kept.facts
        if facts["seed"] == seed and facts["draw"] <= number < facts["draw"] + (facts["draws"] or 1):
            before = next(own_draws, None)
            return [before, kept] if before is not None and _shared(before.facts, facts) else [kept]
    return []


def _shared(init: Any, apply: Any) -> bool:
    """Whether an apply went on with the draw that an init opened."""
    opens, continues = COMMANDS[init["command"]].opens, COMMANDS[apply["command"]].forward
    if not (opens and continues and init["model"] == apply["model"]):
        return False
    opened, taken = getattr(init["keys"], "draw", None), getattr(apply["keys"], "draw", None)
    if opened is None or taken is None:  # keys of a module that was built, or of a file, not what they were drawn from
        return bool((init["seed"], init["draw"]) == (apply["seed"], apply["draw"]))
    return opened is taken.first


def causes_of(chain: RunLog | None, model: str, n: int, reach: int = 500) -> list[tuple[str, tuple[Cause, ...]]]:
    """Of the last `n` runs of `model`, newest first: where the program came from, and why it was new.

    Args:
      reach: runs of any model that are looked at.
    """
    recent = (kept.facts for kept in islice(backwards(chain), reach))
    applies = (facts for facts in recent if COMMANDS[facts["command"]].forward and facts["model"] == model)
    return [(facts["program"], facts["causes"]) for facts in islice(applies, n)]
