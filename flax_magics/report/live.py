"""The live line: `compiling net · 3 s` while something is slow, gone or replaced by the report when it is done."""

from __future__ import annotations

import contextvars
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from ..base.text import WIDTH, clean, cut, elapsed

_ERASE = "\r\x1b[K"


@dataclass
class Progress:
    """What is being done now, and since when. Its text may change; the clock goes on."""

    text: str
    started: float


class Live:
    """The live line of one command.

    Args:
      shell: IPython's shell, or None in a script.
      delay: seconds before the line first shows.
      interval: seconds between two updates.
      clock: seconds, never going back.
      stream: where a terminal's line goes; standard error by default.

    Attributes:
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
        self.display_id: str | None = None
        self._shell = shell
        self._in_kernel = getattr(shell, "kernel", None) is not None
        self._delay, self._interval, self._clock = delay, interval, clock
        self._stream = stream
        self._on_terminal = False
        self._phase: Progress | None = None

    @property
    def in_use(self) -> bool:
        """Whether something is being done, or its line still waits for what takes its place."""
        return self._phase is not None or self.display_id is not None

    def begin(self, text: str) -> Progress:
        """Shows `text` and the elapsed time until `end`, once `delay` seconds have passed."""
        phase = Progress(text, self._clock())
        if self._visible():
            self._phase = phase
            shown = self.display_id is not None
            ticker.begin(Tick(self._tick, self._interval if shown else self._delay, self._interval))
        return phase

    def end(self) -> None:
        """Nothing is drawn once this has returned."""
        if self._phase is None:
            return
        self._phase = None
        try:
            ticker.end()
        finally:  # an interrupt may end the wait, and still the terminal's line is ours to wipe
            if self._on_terminal:
                self._write(_ERASE)
                self._on_terminal = False

    def show(self, bundle: Mapping[str, Any]) -> None:
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
        if self._in_kernel:
            return True
        stream = self._stream or sys.stderr
        try:
            return stream.isatty()
        except (AttributeError, ValueError):  # None under pythonw, or closed
            return False

    def _tick(self) -> None:
        phase = self._phase
        if phase is None:
            return
        text = cut(clean(f"{phase.text} · {elapsed(self._clock() - phase.started)}"), WIDTH - 1)
        if not self._in_kernel:
            self._on_terminal = True
            self._write(_ERASE + text)
            return
        known = self.display_id is not None
        self.display_id = self.display_id or os.urandom(16).hex()
        self._publish({"text/plain": text}, update=known)

    def _write(self, text: str) -> None:
        stream = self._stream or sys.stderr
        stream.write(text)
        stream.flush()

    def _publish(self, data: dict[str, Any], *, update: bool) -> None:
        transient = {"display_id": self.display_id} if self.display_id is not None else {}
        self._shell.display_pub.publish(data=data, metadata={}, transient=transient, update=update)


IDLE = 10.0
"""Seconds without work after which the thread ends."""


class Tick:
    """A line to be drawn from `delay` seconds on, every `interval` seconds."""

    def __init__(self, draw: Callable[[], None], delay: float, interval: float) -> None:
        self.due = time.monotonic() + delay
        self.interval = interval
        self._draw = draw
        # The context carries the cell that output belongs to, in ipykernel 7 and after.
        self._context = contextvars.copy_context()

    def draw(self) -> None:
        """Draws, and says when the next time is."""
        self.due = time.monotonic() + self.interval
        try:
            self._context.run(self._draw)
        except Exception:  # a line that cannot be drawn must never harm the work it tells of
            self.due = float("inf")


class Ticker:
    """Draws one job at a time; nothing is drawn any more once `end` has returned."""

    def __init__(self, idle: float = IDLE) -> None:
        self._idle = idle
        self._changed = threading.Condition(threading.Lock())
        self._job: Tick | None = None
        self._wakes = float("inf")
        self._thread: threading.Thread | None = None

    def begin(self, job: Tick) -> None:
        """Starts to draw `job`. A thread that wakes early enough by itself is left asleep."""
        with self._changed:
            self._job = job
            if self._thread is None or not self._thread.is_alive():  # forked, or never started
                self._thread = threading.Thread(target=self._run, name="flax_magics live", daemon=True)
                self._wakes = job.due
                self._thread.start()
            elif job.due < self._wakes:
                self._changed.notify()

    def end(self) -> None:
        """Stops drawing, once a drawing that is under way is done."""
        self._job = None  # before the wait, which an interrupt may cut short
        with self._changed:
            pass

    def _run(self) -> None:
        with self._changed:
            last = time.monotonic()
            while True:
                now, job = time.monotonic(), self._job
                if job is not None:
                    last = now
                    if now >= job.due:
                        job.draw()
                    # A line that cannot be drawn is never due: its end is still to be noticed.
                    self._wakes = min(job.due, last + self._idle)
                elif now - last >= self._idle:
                    self._thread = None
                    return
                else:
                    self._wakes = last + self._idle
                self._changed.wait(max(self._wakes - time.monotonic(), 0.0))


ticker = Ticker()
