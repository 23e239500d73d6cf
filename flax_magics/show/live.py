"""The live line: `compiling net · 3 s` while something is slow, gone or replaced by the report when it is done.

A thread ticks (`ticker.py`), because the calling thread is inside XLA, which releases the GIL. In a notebook the line is
a display with an id, so that the report takes its place; in a terminal it is the last line of stderr, wiped afterwards.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from .columns import WIDTH, clean, cut
from .ticker import Job, ticker
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


class Working:
    """A block of work that a live line tells of."""

    def __init__(self, live: Live, text: str) -> None:
        self._live = live
        self._text = text
        self._outer: str | None = None

    def __enter__(self) -> Phase:
        live = self._live
        if live._phase is None:
            return live.begin(self._text)
        self._outer = live._phase.text
        live._phase.doing(self._text)
        return live._phase

    def __exit__(self, *_: object) -> None:
        live = self._live
        if self._outer is None:
            live.end()
        elif live._phase is not None:
            live._phase.doing(self._outer)


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

    @property
    def in_use(self) -> bool:
        """Whether a block is running, or its line still waits for what takes its place."""
        return self._phase is not None or self.display_id is not None

    def phase(self, text: str) -> Working:
        """Shows `text` and the elapsed time for as long as the block runs, once it has run for `delay` seconds.

        A phase inside a phase changes the text and gives it back. Nothing is drawn after the block, whatever it raises.
        """
        return Working(self, text)

    def begin(self, text: str) -> Phase:
        """The beginning of such a block, for those that `end` it themselves, whatever happens."""
        phase = Phase(text, self._clock())
        if self._visible():
            self._phase = phase
            shown = self.display_id is not None
            ticker.begin(Job(self._tick, self._interval if shown else self._delay, self._interval))
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
