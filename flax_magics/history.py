"""Runs as a session keeps them: without keeping their arrays alive."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import jax

from .run import GONE, Cause, Run


class Kept:
    """One run: its facts held, its arrays (inputs, output, what was sown) held weakly.

    The Run in a user's hands holds its own arrays; as long as it lives, the session gives that very object.
    """

    __slots__ = ("_inputs", "_output", "_run", "_sown", "facts")

    def __init__(self, run: Run) -> None:
        self._run = weakref.ref(run)
        self.facts = {**run.__dict__, "output": GONE, "inputs": GONE, "sown": {}}
        self._output = _weakly(run.output)
        self._inputs = _weakly(run.inputs)
        self._sown = _weakly(dict(run.sown)) if run.sown else None

    def run(self) -> Run:
        """The run; an array that nobody holds any more makes its whole field `GONE`."""
        run = self._run()
        if run is not None:
            return run
        sown = GONE if self._sown is None else _held(self._sown)
        run = object.__new__(Run)
        run.__dict__.update(self.facts)
        run.__dict__.update(output=_held(self._output), inputs=_held(self._inputs), sown={} if sown is GONE else sown)
        return run


_Weak = tuple[Any, list[tuple[Any, Any]]]
"""A pytree taken apart: each leaf as a weak reference, or (where it is no array) as it is."""


def _weakly(tree: Any) -> _Weak:
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    return treedef, [_reference(leaf) for leaf in leaves]


def _held(weak: _Weak) -> Any:
    """The pytree, `GONE` where one of its arrays is no more."""
    leaves = []
    for reference, held in weak[1]:
        leaf = held if reference is None else reference()
        if leaf is None:
            return GONE
        leaves.append(leaf)
    return jax.tree_util.tree_unflatten(weak[0], leaves)


def _reference(leaf: Any) -> tuple[weakref.ref[Any] | None, Any]:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        try:
            return weakref.ref(leaf), None
        except TypeError:  # a numpy scalar: a few bytes
            pass
    return None, leaf


class Chain(NamedTuple):
    """Runs, newest first, as a linked list: adding one makes a new list and leaves the old as it was."""

    kept: Kept
    before: Chain | None
    length: int

    @staticmethod
    def add(chain: Chain | None, run: Run) -> Chain:
        """`chain` with one more run."""
        return Chain(Kept(run), chain, 1 if chain is None else chain.length + 1)


def newest(chain: Chain | None, n: int) -> list[Run]:
    """The last `n` runs, oldest first."""
    out: list[Run] = []
    while chain is not None and len(out) < n:
        out.append(chain.kept.run())
        chain = chain.before
    return out[::-1]


def causes_of(chain: Chain | None, model: str, n: int, reach: int = 500) -> list[tuple[str, tuple[Cause, ...]]]:
    """Of the last `n` runs of `model`, newest first: where the program came from, and why it was new.

    Args:
      reach: runs of any model that are looked at.
    """
    out: list[tuple[str, tuple[Cause, ...]]] = []
    while chain is not None and len(out) < n and reach > 0:
        facts = chain.kept.facts
        if facts["command"] == "apply" and facts["model"] == model:
            out.append((facts["program"], facts["causes"]))
        chain, reach = chain.before, reach - 1
    return out
