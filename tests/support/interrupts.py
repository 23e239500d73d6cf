"""An interrupt at a chosen line of the package's own code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def interrupted_after(lines: int, interrupt: Callable[[FrameType], object]) -> Iterator[None]:
    """A block in which `interrupt` is called once so many lines of ours have run, with the frame of the next one.

    A KeyboardInterrupt ends the block.
    """
    executed = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal executed
        if "flax_magics" not in frame.f_code.co_filename:
            return None
        executed += event == "line"
        if executed > lines:
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
