"""A Ctrl-C that is always heard.

Python raises `KeyboardInterrupt` between any two bytecodes of the main thread. While JAX traces, one in ten falls into
a callback of the garbage collector or of a weak reference, where Python prints an exception and drops it, or into an
`__eq__` that NumPy calls, which clears it or makes a `SystemError` of it (measured on jax 0.10, 2,400 interrupts). The
command would go on as if nobody had asked it to stop.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _thread
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType

AGAIN = 0.05
"""Seconds until it is looked at whether an interrupt is still on its way, and after that between two looks."""


class InterruptGuard:
    """From `begin` to `end` of a command, an interrupt stops it wherever it falls.

    After an interrupt a thread sends another signal every `AGAIN` seconds, which asks whether the first one is being
    handled: in a `finally`, an `except` or a `with` on its way out. If it is, it is left alone; if not, it was lost,
    and is raised anew. A handler of the user's own is left in place, and other threads get no signals.

    Args:
      parts: the code of functions that `begin` and `end` are called in, and where nothing is to strike.
    """

    def __init__(self, *parts: CodeType) -> None:
        self._parts = (*parts, InterruptGuard.begin.__code__, InterruptGuard.end.__code__)
        self._lock = threading.Lock()
        self._struck: KeyboardInterrupt | None = None
        self._asking = self._watched = False
        self._ours: Callable[[int, FrameType | None], None] | None = None

    def begin(self) -> None:
        """Replaces Python's own handler of SIGINT, if that is the one in place. Does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
            self._ours, self._hook, sys.unraisablehook = self._strike, sys.unraisablehook, self._unraisable
            _signal.signal(_signal.SIGINT, self._ours)

    def end(self, error: BaseException | None) -> KeyboardInterrupt | None:
        """Puts Python's own handler back.

        Args:
          error: what the command ends with.

        Returns:
          the interrupt to be raised instead: it was made another error by those who got it, or it was lost, and the
          command was done before it could strike again.
        """
        if self._ours is None:
            return None
        with self._lock:  # from here on nobody asks
            ours, self._ours = self._ours, None
        # This delivers what is waiting first, so that no question is left for the handler that comes next.
        if _signal.getsignal(_signal.SIGINT) is ours:
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)
        if sys.unraisablehook == self._unraisable:
            sys.unraisablehook = self._hook
        struck, self._struck = self._struck, None
        if struck is None or (error is not None and not (isinstance(error, SystemError) and _within(struck, error))):
            return None
        return KeyboardInterrupt()

    def _strike(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signal."""
        asked, self._asking = self._asking, False
        if asked and (self._ours is None or self._struck is None or _within(self._struck, sys.exc_info()[1])):
            return
        self._struck = KeyboardInterrupt()
        if not self._watched:
            self._watched = True
            # Without the locks of `threading`, which the code that was interrupted may hold.
            _thread.start_new_thread(self._watch, ())
        if frame is None or frame.f_code not in self._parts:
            raise self._struck

    def _watch(self) -> None:
        while True:
            time.sleep(AGAIN)
            with self._lock:
                if self._ours is None:
                    return
                self._asking = True
                _thread.interrupt_main()

    def _unraisable(self, lost: sys.UnraisableHookArgs) -> None:
        """Keeps Python from printing an interrupt that it dropped, where that one is raised again."""
        if self._struck is None or lost.exc_value is not self._struck:
            self._hook(lost)


def _within(sought: BaseException, error: BaseException | None) -> bool:
    """Whether an error is the one that is sought, or was raised while that was handled."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if error is sought:
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
