"""What a shell shows: MIME bundles, and the live line while something is slow.

The line is `compiling net · 3 s · interrupt the kernel to stop`; the report takes its place when it is done.
"""

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

from ..base.text import clean, cut, elapsed, on_terminal, replaces, width

_ERASE = "\r\x1b[K"
SELDOM = 50
"""From one drawing to the next it takes so many times what it took the processor: less than a fiftieth of one is used."""


def publish(shell: Any, bundle: Mapping[str, object], display_id: str | None = None, *, update: bool = False) -> None:
    """Publishes a MIME bundle in a shell of IPython's; with a `display_id`, it can be updated later."""
    data = dict(bundle)
    if on_terminal(shell) and str(getattr(shell, "colors", "")).lower() != "nocolor":
        from .text import coloured  # which needs msgspec, and a terminal alone has colours

        data["text/plain"] = coloured(str(data.get("text/plain", "")))
    transient = {} if display_id is None else {"display_id": display_id}
    shell.display_pub.publish(data=data, metadata={}, transient=transient, update=update)


class Live:
    """The live line of one command, in a notebook or on a terminal.

    Args:
      shell: IPython's shell, None in a script.
      delay: seconds before the line appears.
      interval: seconds between two updates.
      clock: returns seconds, never going back.
      stream: where a terminal's line is written, standard error by default.

    Attributes:
      display_id: of the display that shows the line, None if none was shown in a notebook.
      within: shows the line's text as a part of what the cell shows already; None for a display of its own.
      speaks: whether anything is shown at all.
      progress: makes of the line's text what is shown in its place, by a command that can tell how far it is; None for the
        line alone. It is called on another thread. On a terminal the text of the bundle is one line.
    """

    def __init__(
        self,
        shell: Any,
        delay: float = 1.0,
        interval: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ) -> None:
        self._text, self._phase, self._started, self._since, self._working = "", "", 0.0, 0.0, False
        self.display_id: str | None = None
        # A display of the running cell that was cleared: the cell's next live line takes it.
        self._cleared: str | None = None
        self.within: Callable[[str], None] | None = None
        self.speaks = True
        self.progress: Callable[[str], Mapping[str, object]] | None = None
        self._shell, self._stream = shell, stream
        self._in_kernel = replaces(shell)
        self._delay, self._interval, self._clock = delay, interval, clock
        self._on_terminal = False

    @property
    def text(self) -> str:
        """What is being done; it may change while the elapsed time goes on."""
        return self._text

    @text.setter
    def text(self, text: str) -> None:
        if text != self._text:
            self._text, self._since = text, self._clock()

    @property
    def in_use(self) -> bool:
        """Whether something is being done, or a shown line still waits to be replaced."""
        return self._working or self.display_id is not None

    def begin(self, text: str) -> None:
        """Shows `text` with the elapsed time until `end`, from `delay` seconds on."""
        self._started = self._since = self._clock()
        self._text, self._phase, self._working, self.progress = text, "", True, None
        if self._visible():
            # A line that is there already is redrawn at the usual interval.
            shown = self.display_id is not None
            ticker.begin(self._tick, self._interval if shown else self._delay, self._interval)

    def end(self) -> None:
        """Stops the line. Nothing is drawn any more once this has returned."""
        if not self._working:
            return
        self._working = False
        try:
            ticker.end()
        finally:  # an interrupt may cut the wait short, and the terminal's line still has to be erased
            if self._on_terminal:
                self._write(_ERASE)
                self._on_terminal = False

    def show(self, bundle: Mapping[str, object]) -> None:
        """Publishes a MIME bundle, replacing the line if one is shown. An empty bundle clears the line."""
        if not bundle or not self.speaks:
            self.clear()
        elif self._shell is None:
            print(bundle.get("text/plain", ""))
        else:
            publish(self._shell, bundle, self.display_id, update=self.display_id is not None)
            self.display_id = None

    def clear(self) -> None:
        """Blanks the line, after a command that failed or is quiet."""
        if self.display_id is not None:
            publish(self._shell, {"text/plain": ""}, self.display_id, update=True)
            self._cleared = self.give_display()

    def give_display(self) -> str | None:
        """The display that shows the line, for something else to show; None if there is none."""
        display_id, self.display_id = self.display_id, None
        return display_id

    def begin_cell(self) -> None:
        """Forgets the displays of the cell before."""
        self._cleared = None

    def _visible(self) -> bool:
        if not self.speaks:
            return False
        with suppress(AttributeError, ValueError):  # `sys.stderr` may be None (pythonw) or closed
            return self._in_kernel or (self._stream or sys.stderr).isatty()
        return False

    def _tick(self) -> None:
        # `end` may have been called after this tick was due.
        if not self._working:
            return
        at = self._clock()
        # A phase that is over within one interval is not shown: the line would flicker.
        if not self._phase or at - self._since >= self._interval:
            self._phase = self._text
        text = clean(f"{self._phase} · {elapsed(at - self._started)}")
        text += " · interrupt the kernel to stop" if self._in_kernel else " · Ctrl-C stops it"
        progress = self.progress
        if not self._in_kernel:
            self._on_terminal = True
            line = text if progress is None else str(progress("Ctrl-C stops it")["text/plain"])
            self._write(_ERASE + cut(line, width() - 1))
            return
        if progress is None and self.within is not None:
            self.within(text)
            return
        self.display_id = self.display_id or self._cleared
        known = self.display_id is not None
        self.display_id = self.display_id or os.urandom(16).hex()
        shown = {"text/plain": cut(text, width() - 1)} if progress is None else progress(text)
        publish(self._shell, shown, self.display_id, update=known)

    def _write(self, text: str) -> None:
        print(text, end="", file=self._stream or sys.stderr, flush=True)


class Ticker:
    """Draws at intervals on one thread, for one job at a time. No drawing goes on once `end` has returned.

    Args:
      idle: seconds without work after which the thread ends.
    """

    def __init__(self, idle: float = 10.0) -> None:
        # In `with`, the lock itself: a Condition takes it in Python code, in which an interrupt can leave it taken for good.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # `end` sets this without the lock.
        self._draw: Callable[[], None] | None = None
        self._due = self._interval = 0.0
        self._idle, self._wakes = idle, float("inf")
        self._thread: threading.Thread | None = None
        self._process = 0

    def begin(self, draw: Callable[[], None], delay: float, interval: float) -> None:
        """Lets `draw` be called from `delay` seconds on, every `interval` seconds.

        The thread is woken only if it would otherwise sleep too long, so that short commands wake nobody.
        """
        from ..base.threads import uninterrupted  # imports JAX, as the command at work does

        with self._lock:
            # ipykernel 7 finds the cell that output belongs to through a context variable.
            self._draw = partial(contextvars.copy_context().run, draw)
            self._due, self._interval = time.monotonic() + delay, interval
            # Not `is_alive`, which an interrupt makes take a thread for dead. A fork has the memory without the thread.
            if self._thread is None or self._process != os.getpid():
                thread = threading.Thread(target=self._run, name="flax_magics live", daemon=True)
                self._wakes = self._due
                with uninterrupted():  # else a thread could have begun of which nobody knows
                    thread.start()
                    self._thread, self._process = thread, os.getpid()
            elif self._due < self._wakes:
                self._changed.notify()

    def end(self) -> None:
        """Stops drawing, and waits for a drawing that is under way."""
        self._draw = None  # before taking the lock, a wait that an interrupt may cut short
        # The thread draws with the lock held, so holding it once means that no drawing is under way.
        with self._lock:
            pass

    def _run(self) -> None:
        with self._lock:
            last = time.monotonic()
            while True:
                now, draw = time.monotonic(), self._draw
                if draw is not None:
                    last = now
                    if now >= self._due:
                        begin = time.thread_time()
                        try:
                            draw()
                            self._due = now + max(self._interval, SELDOM * (time.thread_time() - begin))
                        except Exception:  # a failing display must never harm the work that it tells of
                            self._due = float("inf")
                    # After a failed drawing `_due` is infinite: the thread still wakes to notice that the job ended.
                    self._wakes = min(self._due, last + self._idle)
                elif now - last >= self._idle:
                    self._thread = None
                    return
                else:
                    self._wakes = last + self._idle
                self._changed.wait(max(self._wakes - time.monotonic(), 0.0))


ticker = Ticker()
