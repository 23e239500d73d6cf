"""An interrupt at a chosen line of the package's own code."""

from __future__ import annotations

import contextlib
import dis
import itertools
import signal
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any


def press(frame: FrameType) -> None:
    """Ctrl-C in that frame: a signal raised here would be handled in the frame of this function."""
    handler = signal.getsignal(signal.SIGINT)
    assert callable(handler)
    handler(signal.SIGINT, frame)


def interrupted_after(
    lines: int, interrupt: Callable[[FrameType], object] = press, *, once: bool = False, of: str = ""
) -> contextlib.AbstractContextManager[None]:
    """A block in which `interrupt` is called once so many lines of ours have run, with the frame of the next one.

    A KeyboardInterrupt ends the block.

    Args:
      once: a line that runs again is not counted: loops over all modules or frames are longer here than there.
      of: the end of a file's name: no other line is counted.
    """
    executed = 0
    known: set[tuple[CodeType, int]] = set()

    def is_due(frame: FrameType) -> bool:
        nonlocal executed
        place = frame.f_code, frame.f_lineno
        if frame.f_code.co_filename.endswith(of) and not (once and place in known):
            executed += 1
            known.add(place)
        return executed > lines

    return interrupted_when(is_due, interrupt)


@contextlib.contextmanager
def interrupted_when(
    is_due: Callable[[FrameType], bool], interrupt: Callable[[FrameType], object] = press
) -> Iterator[None]:
    """A block in which `interrupt` is called once at a line of ours, the first of which `is_due` says so.

    A KeyboardInterrupt ends the block.
    """
    due = False

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal due
        if "flax_magics" not in frame.f_code.co_filename:
            return None
        due = due or (event == "line" and is_due(frame))
        if due and not _is_deaf(frame):
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


@contextlib.contextmanager
def training_interrupted(session: Any, lines: int, **counted: Any) -> Iterator[None]:
    """A block in which Ctrl-C is pressed once so many lines of ours have run in the loop of a training.

    Args:
      counted: `once` and `of`, see `interrupted_after`.
    """
    stack = contextlib.ExitStack()

    def on_phase(phase: str) -> None:
        if phase.startswith("training"):
            session.services.on_phase = lambda phase: None
            stack.enter_context(interrupted_after(lines, lambda frame: signal.raise_signal(signal.SIGINT), **counted))

    session.services.on_phase = on_phase
    try:
        with stack:
            yield
    except KeyboardInterrupt:
        pass
    finally:
        session.services.on_phase = lambda phase: None


def _is_deaf(frame: FrameType) -> bool:
    """Whether Python hears no signal at the line to come, where an interrupt would leave a lock taken for ever.

    That is the end of a `with` block, which calls `__exit__(None, None, None)`, and a line without an instruction of its
    own, such as `try:`, which no handler covers.
    """
    rest = [each for each in dis.get_instructions(frame.f_code) if each.offset >= frame.f_lasti]
    if rest[0].opname == "NOP":
        return True
    # What a `return` in the block gives stands on the stack, and is swapped first.
    following = itertools.islice((each for each in rest if each.opname != "SWAP"), 3)
    return all(each.opname == "LOAD_CONST" and each.argval is None for each in following)
