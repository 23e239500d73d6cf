"""An iterable of batches, fetched on a thread ahead of whoever takes them."""

from __future__ import annotations

import contextvars
import copy
import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import numpy as np

from ..base.text import cut
from ..base.types import PyTree
from ..errors import FlaxMagicsError
from ..state.training import Position

AHEAD = 2
"""How many batches are fetched ahead of the step that takes them."""
MASKED = "is a masked array, and JAX knows no masks: `.filled(…)` makes a plain array of it."
MOMENT = 0.1
"""Seconds that the end of a training waits for the thread, which may be in the user's code."""


class Fetched(NamedTuple):
    """Batches that follow one another.

    Attributes:
      batches: one, or as many as a group of steps takes.
      states: those of the iterator after each; None where it gives none.
      stacked: the batches of a group as one tree with an axis before the others; None where they are no group.
    """

    batches: list[PyTree]
    states: list[Any]
    stacked: PyTree = None


class Fetching(threading.Thread):
    """Goes through an iterable once, on a thread of its own, `AHEAD` batches ahead of whoever takes them.

    Args:
      begin: where it begins: with the state of the iterator, or after so many batches.
      most: how many batches are fetched at most; None for all.
      place: how many batches of the epoch lie before `begin`: groups of `size` are counted from its first on.

    Attributes:
      size: so many batches are handed over at once, stacked if they are NumPy arrays of the same shapes.
      unsure: set with the first batch where the iterator gives and takes its state: why these may be other batches than
        those after `begin`, empty where they are the same.
    """

    def __init__(self, batches: Any, begin: Position, most: int | None, *, place: int = 0, size: int = 1) -> None:
        # A daemon: it may be in the user's code when the interpreter ends, and compiles nothing.
        super().__init__(name="flax_magics data", daemon=True)
        self._queue: queue.Queue[tuple[Fetched | None, BaseException | None]] = queue.Queue(AHEAD - 1)
        self._batches, self._begin, self._most = batches, begin, most
        self._place, self.size = place, size
        self._closed = threading.Event()
        self.unsure: str | None = None
        # Since version 7 ipykernel finds the cell to which printed output belongs in a context variable.
        self._cell = contextvars.copy_context()
        self.start()

    def run(self) -> None:
        """The body of the thread."""
        self._cell.run(self._work)

    def _work(self) -> None:
        fetched = Fetched([], [])
        try:
            if isinstance(self._batches, Iterator):
                # A thread that was told to end may be in the same generator still.
                for other in threading.enumerate():
                    if isinstance(other, Fetching) and other is not self and other._batches is self._batches:
                        other.join()
            iterator, skip = self._iterator()
            for number, batch in enumerate(iterator):
                if number >= skip:
                    fetched.batches.append(jax.tree_util.tree_map(as_array, batch))
                    fetched.states.append(_state_of(iterator))
                    if (self._place + number - skip + 1) % self.size == 0:
                        whole = len(fetched.batches) == self.size > 1
                        self._put(fetched._replace(stacked=stacked(fetched.batches)) if whole else fetched, None)
                        fetched = Fetched([], [])
                if self._closed.is_set():
                    return
                if number - skip + 1 == self._most:
                    break
            ended = None
        except BaseException as error:  # whatever it is, or whoever waits would wait forever
            ended = error
        if fetched.batches:
            self._put(fetched, None)
        self._put(None, ended)

    def _iterator(self) -> tuple[Iterator[PyTree], int]:
        """The iterator where the thread begins, or before so many batches that are left out."""
        iterator, begin = iter(self._batches), self._begin
        if not _gives_state(iterator):
            return iterator, begin.batches
        if begin.state is not None:
            try:
                iterator.set_state(copy.deepcopy(begin.state))
            except Exception as error:  # that of another loader, or of another version of it
                why = cut(f"{type(error).__name__}: {error}", 80)
                self.unsure = (
                    f"the iterator does not take the state that it had ({why}): it goes on with what it gives now"
                )
                return iter(self._batches), begin.batches
            self.unsure = ""
            return iterator, 0
        if not begin.batches and iterator is not self._batches:  # an epoch's begin
            self.unsure = ""
        return iterator, begin.batches

    def _put(self, fetched: Fetched | None, error: BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put((fetched, error), timeout=0.1)
            except queue.Full:
                continue
            return

    def next(self) -> Fetched | None:
        """The next batches; None where there are none. Raises what the iterable raised. Open to Ctrl-C."""
        while True:
            try:
                fetched, error = self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            return fetched

    def close(self) -> None:
        """Has the thread end after the batch that it fetches now, and gives it a moment for that."""
        self._closed.set()
        with suppress(queue.Empty):
            self._queue.get_nowait()  # it may wait for room
        self.join(MOMENT)


def _gives_state(iterator: object) -> bool:
    """Whether an iterator gives and takes its state, as grain's do."""
    return callable(getattr(iterator, "get_state", None)) and callable(getattr(iterator, "set_state", None))


def _state_of(iterator: Any) -> Any:
    """A copy of the state of an iterator, which goes on; None where it gives none."""
    if not _gives_state(iterator):
        return None
    with suppress(Exception):  # one of those that it is put together of may have none
        return copy.deepcopy(iterator.get_state())
    return None


def stacked(batches: list[PyTree]) -> PyTree:
    """Batches as one tree with an axis before the others; None unless they are NumPy arrays of the same shapes."""
    flat: list[tuple[list[Any], Any]] = [jax.tree_util.tree_flatten(batch) for batch in batches]
    kinds = [
        [(leaf.dtype, leaf.shape) if isinstance(leaf, np.ndarray) else None for leaf in leaves] for leaves, _ in flat
    ]
    first, treedef = kinds[0], flat[0][1]
    if None in first or any(kind != first for kind in kinds) or any(other != treedef for _, other in flat):
        return None
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return jax.tree_util.tree_unflatten(treedef, [np.stack(column) for column in columns])


def as_array(leaf: Any) -> Any:
    """A leaf of a batch as JAX takes it: tensors of torch and TensorFlow as NumPy arrays.

    A copy, since an iterable may fill one buffer again and again, and it is asked for the next batch before this is used.
    """
    if isinstance(leaf, jax.Array) or not hasattr(leaf, "__array__"):
        return leaf
    if isinstance(leaf, np.ma.MaskedArray):
        raise FlaxMagicsError(f"an array of a batch {MASKED}")
    return np.array(leaf)
