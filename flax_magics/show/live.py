"""The live line: `compiling net · 3 s` while something is slow, gone or replaced by the report when it is done.

A thread ticks, because the calling thread is inside XLA, which releases the GIL. In a notebook the line is a display
with an id, so that the report takes its place; in a terminal it is the last line of stderr, wiped afterwards.
"""

from __future__ import annotations

import contextvars
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from .columns import WIDTH, clean, cut
from .units import elapsed

_ERASE = "\r\x1b[K"


class Phase:
    """What is being done now, and since when."""

    def __init__(self, text: str, started: float) -> None:
        self.text = text
        self.started = started

    def doing(self, text: str) -> None:
        """Changes the text; the clock goes on."""
        self.text = text


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
        self._phase: Phase | None = None

    @contextmanager
    def phase(self, text: str) -> Iterator[Phase]:
        """Shows `text` and the elapsed time for as long as the block runs, once it has run for `delay` seconds.

        A phase inside a phase changes the text and gives it back. No thread is left behind, whatever the block raises.
        """
        if self._phase is not None:
            outer = self._phase.text
            self._phase.doing(text)
            try:
                yield self._phase
            finally:
                self._phase.doing(outer)
            return
        phase = Phase(text, self._clock())
        if not self._visible():
            yield phase
            return
        done = threading.Event()
        # The context carries the cell that output belongs to, in ipykernel 7 and after.
        target = contextvars.copy_context().run
        ticker = threading.Thread(target=target, args=(self._tick, phase, done), name="flax_magics live", daemon=True)
        self._phase = phase
        try:
            ticker.start()
            yield phase
        finally:
            done.set()
            self._phase = None
            try:
                if ticker.ident is not None:
                    ticker.join()
            finally:  # a second interrupt may end the join, and still the terminal's line is ours to wipe
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

    def _tick(self, phase: Phase, done: threading.Event) -> None:
        shown = self.display_id is not None
        pause = self._interval if shown else self._delay
        while not done.wait(pause):
            try:
                self._draw(f"{phase.text} · {elapsed(self._clock() - phase.started)}", done)
            except Exception:  # a line that cannot be drawn must never harm the work it tells of
                return
            pause = self._interval

    def _draw(self, line: str, done: threading.Event) -> None:
        if done.is_set():
            return
        text = cut(clean(line), WIDTH - 1)
        if not self._in_kernel:
            self._on_terminal = True
            self._write(_ERASE + text)
            return
        known = self.display_id is not None
        self.display_id = self.display_id or uuid.uuid4().hex
        self._publish({"text/plain": text}, update=known)

    def _write(self, text: str) -> None:
        stream = self._stream or sys.stderr
        stream.write(text)
        stream.flush()

    def _publish(self, data: dict[str, Any], *, update: bool) -> None:
        transient = {"display_id": self.display_id} if self.display_id is not None else {}
        self._shell.display_pub.publish(data=data, metadata={}, transient=transient, update=update)
