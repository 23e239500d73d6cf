"""Assignments that an interrupt cannot part; and threads that compile or wait, so that the main thread can be interrupted.

Python looks for signals between bytecodes. Assignments that one call of C makes have none between them; work that needs
Python holds the signal back, which costs more.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import contextvars
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import starmap
from operator import call
from types import FrameType
from typing import Any, TypeAlias, TypeVar

import jax

from .types import PyTree

Assignment = tuple[Any, ...]
"""A function of C and its arguments: `(object.__setattr__, owner, name, value)`, `(operator.setitem, items, key, value)`."""


def at_once(assignments: Iterable[Assignment]) -> None:
    """Makes all assignments, with no bytecode between one and the next."""
    collections.deque(starmap(call, tuple(assignments)), maxlen=0)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back for the time of the block, and lets it strike afterwards. Threads get none anyway."""
    handler = signal.getsignal(signal.SIGINT)
    # It may be ignored, or handled outside of Python.
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    signals: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: signals.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if signals:
            handler(*signals[0])


Future: TypeAlias = "concurrent.futures.Future[Any]"
T = TypeVar("T")


class Workers:
    """Does work in the order in which it was given, on as many threads as there are cores; without work there is no thread.

    The threads are no daemons: a compilation that is cut off when Python exits aborts the process.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._most = threads or os.cpu_count() or 1
        self._lock = threading.Lock()
        self._waiting: collections.deque[tuple[Future, Callable[[], object]]] = collections.deque()
        self._running = 0

    @property
    def busy(self) -> bool:
        """Whether something is being done, or waits to be."""
        with self._lock:
            return self._running > 0

    def submit(self, work: Callable[[], object]) -> Future:
        """A future of what `work()` gives."""
        future: Future = concurrent.futures.Future()
        with uninterrupted():  # a future that no thread will fill would be waited for forever
            with self._lock:
                self._waiting.append((future, work))
                start = self._running < self._most
                self._running += start
            if start:
                threading.Thread(target=self._work, name="flax_magics compile").start()
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                future, work = self._waiting.popleft()
            _fulfil(future, work)


def _fulfil(future: Future, work: Callable[[], object]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def wait_for(future: Future) -> Any:
    """The result of a future. Returns to Python often enough for an interrupt to be heard."""
    while not future.done():
        concurrent.futures.wait([future], timeout=0.2)
    return future.result()


@dataclass
class Unfinished:
    """The run that the device is busy with, from its dispatch until somebody has waited for it."""

    wait: Callable[[], object] | None = None
    """Returns once the device has finished; None where nobody was interrupted."""

    def finish(self) -> None:
        """Waits for what an interrupted run has left behind; its errors are nobody's any more."""
        if self.wait is not None:
            with contextlib.suppress(Exception):  # of a run that the user has given up
                self.wait()
            self.wait = None


def smallest(result: PyTree) -> Callable[[], object] | None:
    """A function that waits for a program, and holds of its result the smallest array alone; None where it has no array."""
    arrays = [leaf for leaf in jax.tree_util.tree_leaves(result) if isinstance(leaf, jax.Array)]
    return min(arrays, key=lambda array: array.nbytes).block_until_ready if arrays else None


def elsewhere(
    function: Callable[..., T], arguments: PyTree, unfinished: Unfinished, settings: Callable[[], object]
) -> T:
    """`function(*arguments)` on another thread, so that an interrupt returns at once where the call itself would hold it.

    It costs 0.1 ms. Of JAX's settings another thread has the global ones alone: where this thread has others, by a
    `with` of the user's, the call is made here.

    Args:
      arguments: a pytree; what is no array in it becomes one here, under this thread's settings.
      settings: gives those of the thread that asks.
    """
    arguments = jax.tree_util.tree_map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.numpy.asarray(leaf), arguments
    )
    here = settings()
    future: Future = concurrent.futures.Future()

    def call_there() -> object:
        return function(*arguments) if settings() == here else _HERE

    # The context carries the cell that output belongs to, in ipykernel 7 and after.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(_fulfil, future, call_there), name="flax_magics run")
    with uninterrupted():  # a future that no thread will fill would be waited for forever
        unfinished.wait = future.result
        thread.start()
    while not future.done():
        concurrent.futures.wait([future], timeout=0.2)
    unfinished.wait = None
    result: T = future.result()
    return function(*arguments) if result is _HERE else result


_HERE = object()
"""What a thread answers that has other settings than the one that asks."""
