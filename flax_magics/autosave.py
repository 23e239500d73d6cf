"""Saves a session in the background, after whatever changes its variables.

The main thread notes the session down, which takes no longer than to look at its variables once: arrays do not change,
and are held on to. A thread writes what was noted last; of a burst of changes it writes the last. The file is replaced
whole each time, so that a kernel that is killed leaves the last one that was written. The thread is no daemon: Python
waits for it as it ends, and it writes what is left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import snapshot, snapshotwriter
from .errors import FlaxMagicsError
from .savedruns import History
from .snapshot import Snapshot
from .state import State
from .uninterrupted import uninterrupted

if TYPE_CHECKING:
    from .saving import Saved

REST = 4.0
"""A write is followed by a rest of so many times as long: saving takes a fifth of the time at most."""


class Autosave:
    """Writes snapshots to one file, the last one last.

    Args:
      path: of the file.
      last: what was written there before.
      clock: gives seconds.
    """

    def __init__(self, path: Path, last: Saved, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.last = last
        """What was written last; its path is as it was given."""
        self.error: str | None = None
        """Why the last write failed, None if it did not."""
        self._told: str | None = None
        self._clock = clock
        self._history = History(digest=False)
        self._sources: dict[str, tuple[Any, str]] = {}
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._pending: tuple[Snapshot, State] | None = None
        self._running = False
        self._hurry = threading.Event()

    def after(self, facts: Mapping[str, Any], state: State) -> None:
        """Notes the session down if the run, of which `facts` are the fields, changed variables."""
        if facts["changed"] or facts["made"] is not None:
            self.offer(state)

    def offer(self, state: State) -> None:
        """Notes the session down, to be written soon."""
        try:
            now = snapshot.take(state)
        except Exception as error:  # the run has succeeded, whatever is the matter here
            self.error = f"`{self.path}` was not saved: {type(error).__name__}: {error}"
            return
        with uninterrupted():  # a snapshot that no thread takes would never be written
            with self._lock:
                self._pending = now, state
                start, self._running = not self._running, True
            if start:
                threading.Thread(target=self._work, name="flax_magics autosave").start()

    def flush(self) -> None:
        """Waits until everything that was noted down is written, without rests."""
        self._hurry.set()
        try:
            with self._idle:
                while self._running:
                    self._idle.wait(0.2)
        finally:
            self._hurry.clear()

    def news(self) -> str | None:
        """Why saving fails, if nobody was told yet."""
        error = self.error
        if error is None or error == self._told:
            return None
        self._told = error
        return error

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._pending is None:
                    self._running = False
                    self._idle.notify_all()
                    return
                (now, state), self._pending = self._pending, None
            start = self._clock()
            self._write(now, state)
            del now, state
            self._rest(REST * (self._clock() - start))

    def _write(self, now: Snapshot, state: State) -> None:
        from .saving import saved_of

        try:
            size = snapshotwriter.write(self.path, snapshot.with_sources(now, state, self._sources), self._history)
            self.last = replace(saved_of(self.path, size, now, state), path=self.last.path)
            self.error = self._told = None
        except FlaxMagicsError as error:
            self.error = error.message
        except Exception as error:  # nothing that fails here may pass unseen, and none of it is the user's to catch
            self.error = f"`{self.path}` was not saved: {type(error).__name__}: {error}"

    def _rest(self, seconds: float) -> None:
        """Rests, unless somebody waits or Python ends."""
        end = self._clock() + min(seconds, 60.0)
        main = threading.main_thread()
        while main.is_alive() and self._clock() < end and not self._hurry.is_set():
            self._hurry.wait(max(0.0, min(0.05, end - self._clock())))
