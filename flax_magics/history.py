"""Runs as a session keeps them: without keeping their arrays alive."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import jax

from .run import GONE, Cause, Run


class Kept:
    """One run: its facts held, its arrays (inputs, output, what was sown) held weakly.

    The Run in a user's hands holds its own arrays; as long as it lives, the session gives that very object.
    """

    def __init__(self, run: Run) -> None:
        self._run = weakref.ref(run)
        self.facts = {**run.__dict__, "output": GONE, "inputs": GONE, "sown": {}}
        self._output = _Weak(run.output)
        self._inputs = _Weak(run.inputs)
        self._sown = _Weak(dict(run.sown)) if run.sown else None

    def run(self) -> Run:
        """The run; an array that nobody holds any more makes its whole field `GONE`."""
        run = self._run()
        if run is not None:
            return run
        sown = GONE if self._sown is None else self._sown.get()
        run = object.__new__(Run)
        run.__dict__.update(self.facts)
        run.__dict__.update(output=self._output.get(), inputs=self._inputs.get(), sown={} if sown is GONE else sown)
        return run


class _Weak:
    """A pytree whose arrays are held weakly; what is no array is held as it is."""

    def __init__(self, tree: Any) -> None:
        leaves, self._treedef = jax.tree_util.tree_flatten(tree)
        self._leaves = [_reference(leaf) for leaf in leaves]

    def get(self) -> Any:
        leaves = []
        for weak, held in self._leaves:
            leaf = held if weak is None else weak()
            if leaf is None:
                return GONE
            leaves.append(leaf)
        return jax.tree_util.tree_unflatten(self._treedef, leaves)


def _reference(leaf: Any) -> tuple[weakref.ref[Any] | None, Any]:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        try:
            return weakref.ref(leaf), None
        except TypeError:  # a numpy scalar: a few bytes
            pass
    return None, leaf


@dataclasses.dataclass(frozen=True)
class Chain:
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
