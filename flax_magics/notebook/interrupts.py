"""A Ctrl-C that is never lost.

Python raises `KeyboardInterrupt` between any two bytecodes of the main thread. While JAX traces, one in ten falls into
a callback of the garbage collector or of a weak reference, where Python prints the exception and drops it, or into an
`__eq__` called by NumPy, which clears it or turns it into a `SystemError` (measured on jax 0.10, 2,400 interrupts). The
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
"""Seconds between two checks whether an interrupt was lost."""


class InterruptGuard:
    """Makes sure that an interrupt stops the command, wherever it falls between `begin` and `end`.

    After an interrupt, a thread sends another signal every `AGAIN` seconds, to ask whether the first is being handled
    (in a `finally`, `except` or `with` on its way out). If so nothing happens; if not it was lost, and is raised again.
    A handler of the user's own is left in place, and other threads get no signals.

    Args:
      parts: code of the functions around `begin` and `end`, in which nothing is raised: they must not be left halfway.
    """

    def __init__(self, *parts: CodeType) -> None:
        self._parts = (*parts, InterruptGuard.begin.__code__, InterruptGuard.end.__code__)
        self._lock = threading.Lock()
        self._struck: KeyboardInterrupt | None = None
        self._asking = self._guarding = False
        # Which command it is, and for which one a thread asks.
        self._command = self._watched = 0
        self._hook: Callable[[sys.UnraisableHookArgs], object] = sys.__unraisablehook__
        self._ours = self._strike, self._unraisable
        self._main = threading.main_thread().ident

    def begin(self) -> bool:
        """Guards a command, with its handler of SIGINT in the place of Python's own.

        Returns whether `end` is to be called. Not inside another command, nor outside of the main thread.
        """
        if self._guarding or _thread.get_ident() != self._main:
            return False
        strike, unraisable = self._ours
        # `_signal` and not `signal`, whose enums cost 18 instead of 4 µs for each command.
        if _signal.getsignal(_signal.SIGINT) is not _signal.default_int_handler:
            return False
        self._struck, self._asking = None, False  # the last question of the command before may be open
        self._command += 1
        # First, since Python's own handler would leave this function halfway.
        _signal.signal(_signal.SIGINT, strike)
        self._guarding = True
        if sys.unraisablehook is not unraisable:
            self._hook, sys.unraisablehook = sys.unraisablehook, unraisable
        return True

    def end(self, error: BaseException | None) -> KeyboardInterrupt | None:
        """Puts Python's own handler back.

        Args:
          error: the exception that the command ends with, if any.

        Returns:
          The interrupt that the caller is to raise instead: it was turned into another error, or lost, and the command
          ended before it was raised again. None if there is nothing to raise.
        """
        strike, unraisable = self._ours
        if self._watched == self._command:
            with self._lock:  # the thread sends no more signals after this
                self._guarding = False
        self._guarding = False
        if sys.unraisablehook is unraisable:
            sys.unraisablehook = self._hook
        # `_signal.signal` delivers pending signals first, so that none is left for the handler that it installs.
        if _signal.getsignal(_signal.SIGINT) is strike:
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)
        struck, self._struck = self._struck, None
        if struck is None or (error is not None and not (isinstance(error, SystemError) and _within(struck, error))):
            return None
        return KeyboardInterrupt()

    def _strike(self, number: int, frame: FrameType | None) -> None:
        """Handles SIGINT: raises a user's interrupt; for a signal of our thread raises it again if it was lost."""
        asked, self._asking = self._asking, False
        # Our own question: nothing to do if the command ended, or if the interrupt is on its way up.
        if asked and (not self._guarding or self._struck is None or _within(self._struck, sys.exc_info()[1])):
            return
        self._struck = KeyboardInterrupt()
        if self._watched != self._command:
            self._watched = self._command
            # Without `threading`, whose locks the interrupted code may hold.
            _thread.start_new_thread(self._watch, (self._command,))
        # Inside `begin`, `end` and around them it is only noted: `end` returns it.
        if frame is None or frame.f_code not in self._parts:
            raise self._struck

    def _watch(self, command: int) -> None:
        while True:
            time.sleep(AGAIN)
            with self._lock:
                if not self._guarding or self._command != command:
                    return
                # Under the lock, so that no signal is sent once `end` has put the handler back.
                self._asking = True
                _thread.interrupt_main()

    def _unraisable(self, lost: sys.UnraisableHookArgs) -> None:
        """Keeps Python from reporting a dropped interrupt as unraisable: it will be raised again."""
        if self._struck is None or lost.exc_value is not self._struck:
            self._hook(lost)


def _within(sought: BaseException, error: BaseException | None) -> bool:
    """Whether `error` is the exception sought, or was raised while that was being handled."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if error is sought:
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
