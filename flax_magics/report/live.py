"""The live line: `compiling net · 3 s` while something is slow, gone or replaced by the report when it is done."""

from __future__ import annotations

import contextvars
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TextIO

from ..base.text import WIDTH, clean, cut, elapsed

_ERASE = "\r\x1b[K"


class Live:
    """The live line of one command.

    Args:
      shell: IPython's shell, or None in a script.
      delay: seconds before the line first shows.
      interval: seconds between two updates.
      clock: seconds, never going back.
      stream: where a terminal's line goes; standard error by default.

    Attributes:
      text: what is being done; may change, and the clock goes on.
      display_id: of the display that holds the line, None if nothing was shown in a notebook.
    """

    def __init__(
        self,
        shell: Any,
        delay: float = 1.0,
        interval: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ) -> None:
        self.text, self._started, self._working = "", 0.0, False
        self.display_id: str | None = None
        self._shell, self._stream = shell, stream
        self._in_kernel = getattr(shell, "kernel", None) is not None
        self._delay, self._interval, self._clock = delay, interval, clock
        self._on_terminal = False

    @property
    def in_use(self) -> bool:
        """Whether something is being done, or its line still waits for what takes its place."""
        return self._working or self.display_id is not None

    def begin(self, text: str) -> None:
        """Shows `text` and the elapsed time until `end`, once `delay` seconds have passed."""
        self.text, self._started, self._working = text, self._clock(), True
        if self._visible():
            shown = self.display_id is not None
            ticker.begin(self._tick, self._interval if shown else self._delay, self._interval)

    def end(self) -> None:
        """Nothing is drawn once this has returned."""
        if not self._working:
            return
        self._working = False
        try:
            ticker.end()
        finally:  # an interrupt may end the wait, and still the terminal's line is ours to wipe
            if self._on_terminal:
                self._write(_ERASE)
                self._on_terminal = False

    def show(self, bundle: Mapping[str, object]) -> None:
        """Publishes a MIME bundle in place of the line, or anew where no line was shown. An empty one clears."""
        if not bundle:
            self.clear()
        elif self._shell is None:
            print(bundle.get("text/plain", ""))
        else:
            self._publish(dict(bundle), update=self.display_id is not None)
            self.display_id = None

    def clear(self) -> None:
        """Blanks the line of a command that failed or is quiet."""
        if self.display_id is not None:
            self._publish({"text/plain": ""}, update=True)
            self.display_id = None

    def _visible(self) -> bool:
        with suppress(AttributeError, ValueError):  # standard error is None under pythonw, or closed
            return self._in_kernel or (self._stream or sys.stderr).isatty()
        return False

    def _tick(self) -> None:
        if not self._working:
            return
        text = cut(clean(f"{self.text} · {elapsed(self._clock() - self._started)}"), WIDTH - 1)
        if not self._in_kernel:
            self._on_terminal = True
            self._write(_ERASE + text)
            return
        known = self.display_id is not None
        self.display_id = self.display_id or os.urandom(16).hex()
        self._publish({"text/plain": text}, update=known)

    def _write(self, text: str) -> None:
        print(text, end="", file=self._stream or sys.stderr, flush=True)

    def _publish(self, data: dict[str, object], *, update: bool) -> None:
        transient = {"display_id": self.display_id} if self.display_id is not None else {}
        self._shell.display_pub.publish(data=data, metadata={}, transient=transient, update=update)


class Ticker:
    """Draws one job at a time; nothing is drawn any more once `end` has returned.

    Args:
      idle: seconds without work after which the thread ends.
    """

    def __init__(self, idle: float = 10.0) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._draw: Callable[[], None] | None = None
        self._due = self._interval = 0.0
        self._idle, self._wakes = idle, float("inf")
        self._thread: threading.Thread | None = None

    def begin(self, draw: Callable[[], None], delay: float, interval: float) -> None:
        """Has a line drawn from `delay` seconds on, every `interval` seconds.

        A thread that wakes early enough by itself is left asleep.
        """
        with self._changed:
            # The context carries the cell that output belongs to, in ipykernel 7 and after.
            self._draw = partial(contextvars.copy_context().run, draw)
            self._due, self._interval = time.monotonic() + delay, interval
            if self._thread is None or not self._thread.is_alive():  # forked, or never started
                self._thread = threading.Thread(target=self._run, name="flax_magics live", daemon=True)
                self._wakes = self._due
                self._thread.start()
            elif self._due < self._wakes:
                self._changed.notify()

    def end(self) -> None:
        """Stops drawing, once a drawing that is under way is done."""
        self._draw = None  # before the wait, which an interrupt may cut short
        with self._changed:
            pass

    def _run(self) -> None:
        with self._changed:
            last = time.monotonic()
            while True:
                now, draw = time.monotonic(), self._draw
                if draw is not None:
                    last = now
                    if now >= self._due:
                        self._due = now + self._interval
                        try:
                            draw()
                        except Exception:  # a line that cannot be drawn must never harm the work it tells of
                            self._due = float("inf")
                    # A line that cannot be drawn is never due: its end is still to be noticed.
                    self._wakes = min(self._due, last + self._idle)
                elif now - last >= self._idle:
                    self._thread = None
                    return
                else:
                    self._wakes = last + self._idle
                self._changed.wait(max(self._wakes - time.monotonic(), 0.0))


ticker = Ticker()
