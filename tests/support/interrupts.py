"""An interrupt at a chosen line of the package's own code."""

from __future__ import annotations

import contextlib
import dis
import itertools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any


@contextlib.contextmanager
def interrupted_after(lines: int, interrupt: Callable[[FrameType], object], *, once: bool = False) -> Iterator[None]:
    """A block in which `interrupt` is called once so many lines of ours have run, with the frame of the next one.

    A KeyboardInterrupt ends the block.

    Args:
      once: a line that runs again is not counted: loops over all modules or frames are longer here than there.
    """
    executed = 0
    known: set[tuple[CodeType, int]] = set()

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal executed
        if "flax_magics" not in frame.f_code.co_filename:
            return None
        place = frame.f_code, frame.f_lineno
        if event == "line" and not (once and place in known):
            executed += 1
            known.add(place)
        if executed > lines and not _leaves_with(frame):
            sys.settrace(None)
            interrupt(frame)
        return trace

    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(tracing)


def _leaves_with(frame: FrameType) -> bool:
    """Whether the line to come is the end of a `with` block, which calls `__exit__(None, None, None)`.

    Python hears no signal there. An interrupt would leave a lock taken, and a later test waiting for it for ever.
    """
    rest = (each for each in dis.get_instructions(frame.f_code) if each.offset >= frame.f_lasti)
    # What a `return` in the block gives stands on the stack, and is swapped first.
    following = itertools.islice((each for each in rest if each.opname != "SWAP"), 3)
    return all(each.opname == "LOAD_CONST" and each.argval is None for each in following)
