"""Threads that compile: XLA lets go of Python while it does, so that the main thread goes on, and can be interrupted."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from .uninterrupted import uninterrupted

Future = concurrent.futures.Future[Any]


class Workers:
    """Does work in the order in which it was given, on as many threads as there are cores; without work there is no thread.

    The threads are no daemons: a compilation that is cut off when Python exits aborts the process.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._most = threads or os.cpu_count() or 1
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future, Callable[[], Any]]] = deque()
        self._running = 0

    @property
    def busy(self) -> bool:
        """Whether something is being done, or waits to be."""
        with self._lock:
            return self._running > 0

    def submit(self, work: Callable[[], Any]) -> Future:
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
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)


def wait_for(future: Future) -> Any:
    """The result of a future. Returns to Python often enough for an interrupt to be heard."""
    while not future.done():
        concurrent.futures.wait([future], timeout=0.2)
    return future.result()
