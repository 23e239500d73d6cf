"""One thread that tells the live lines when to draw. Starting one for each command would cost more than most commands."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable

IDLE = 10.0
"""Seconds without work after which the thread ends."""


class Job:
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
        self._job: Job | None = None
        self._wakes = float("inf")
        self._thread: threading.Thread | None = None

    def begin(self, job: Job) -> None:
        """Takes a job on. A thread that wakes early enough by itself is left asleep."""
        with self._changed:
            self._job = job
            if self._thread is None or not self._thread.is_alive():  # forked, or never started
                self._thread = threading.Thread(target=self._run, name="flax_magics live", daemon=True)
                self._wakes = job.due
                self._thread.start()
            elif job.due < self._wakes:
                self._changed.notify()

    def end(self) -> None:
        """Gives the job up, after a drawing that is under way."""
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
