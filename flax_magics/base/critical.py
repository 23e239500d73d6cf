"""A few assignments that an interrupt cannot part.

Python looks for signals between bytecodes. Assignments that one call of C makes have none between them; work that needs
Python holds the signal back, which costs more.
"""

from __future__ import annotations

import collections
import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from itertools import starmap
from operator import call
from typing import Any

Assignment = tuple[Any, ...]
"""A function of C and its arguments: `(object.__setattr__, owner, name, value)`, `(operator.setitem, items, key, value)`."""


def at_once(assignments: Iterable[Assignment]) -> None:
    """Makes all assignments, with no bytecode between one and the next."""
    collections.deque(starmap(call, tuple(assignments)), maxlen=0)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back for the time of the block, and lets it strike afterwards. Threads get none anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # ignored, or handled outside of Python
        yield
        return
    held: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(*held[0])
