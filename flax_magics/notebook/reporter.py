"""Shows what commands did: one report a run, one counting line for further runs of a cell."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..report.live import Live
    from ..report.text import Loop, Rows
    from ..run import Note, Run

LATER_RUNS = 1000
LATER_BYTES = 16_000_000
"""Outputs that are held at most until a cell has ended."""
REFRESH = 0.2
"""Seconds between two updates of a counting line."""


class Reporter:
    """What has been shown in the cell that is running, and which sharp bits were said in this kernel."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._said: set[tuple[str, str]] = set()
        self._runs = 0
        self._loop: Loop | None = None
        self._rows: Rows | None = None
        self._single: Mapping[str, Any] = {}
        self._display_id: str | None = None
        self._shown = 0.0
        self._pending = False
        self._style = "auto"
        self._live: Live | None = None
        self._later: list[Run] = []
        self._later_bytes = 0

    def begin_cell(self) -> None:
        """`pre_run_cell`: the runs of a cell are counted anew."""
        self._runs, self._loop, self._rows, self._display_id, self._pending = 0, None, None, None, False

    def end_cell(self, notes: Mapping[str, bool], style: str) -> None:
        """`post_run_cell`: the counting line as it is in the end, with its runs as data; and NaN that runs gave which
        showed nothing, if that was not said.

        Args:
          notes: kinds of sharp bits that are said, or not.
        """
        many = self._loop is not None and self._loop.runs > 1
        if self._pending or (many and self._rows is not None):
            self._show_loop(self._rows)
        self.begin_cell()
        later, self._later, self._later_bytes = self._later, [], 0
        for run in later:
            run._taken.take(run.output)
            if any(values.nan for values in run.values) and notes.get("nan", True):
                from ..execution.notes import with_values
                from ..report.html import bundle

                noted = with_values(run)
                noted = dataclasses.replace(noted, notes=self._unsaid(noted.notes))
                self._said.update((note.kind, note.text) for note in noted.notes)
                self.publish(bundle(noted, "off", style))

    def _unsaid(self, notes: Iterable[Note]) -> tuple[Note, ...]:
        return tuple(note for note in notes if (note.kind, note.text) not in self._said)

    def later(self, run: Run) -> None:
        """Takes the digest of a run that shows none, once the cell has ended: so that a replay has something to go by.

        Until then its output is held. Of a cell that runs very often, or gives very much, the first runs have one.
        """
        if run.memory is not None:  # of the program: no array has to be looked at
            size = run.memory.outputs
        else:
            import jax

            size = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree_util.tree_leaves(run.output))
        if len(self._later) < LATER_RUNS and self._later_bytes + size <= LATER_BYTES:
            from ..execution.notes import without_inputs

            self._later.append(without_inputs(run))
            self._later_bytes += size

    def live(self) -> Live:
        """A live line for one command; the one before serves again once nothing of it is shown."""
        if self._live is None or self._live.in_use:
            from ..report.live import Live

            self._live = Live(self._shell)
        return self._live

    def publish(self, bundle: Mapping[str, Any]) -> None:
        """Shows a MIME bundle; an empty one shows nothing."""
        if bundle:
            self._shell.display_pub.publish(data=dict(bundle), metadata={})

    def report(self, run: Run, live: Live, *, setting: str, style: str, quiet: bool) -> None:
        """Shows a run as long as its news, in place of its live line."""
        from ..report.html import bundle, level

        unsaid = self._unsaid(run.notes)
        if quiet:
            run, setting = dataclasses.replace(run, notes=unsaid), "off"
        self._said.update((note.kind, note.text) for note in run.notes)
        length = level(run, setting)
        self._runs += run.kind.forward and not quiet
        # In a loop a sharp bit that was said is no news: the counting line carries it.
        news = length if unsaid else level(dataclasses.replace(run, notes=()), setting)
        if quiet or setting == "off":
            self.later(run)
        if news == "line" and self._runs > 1 and run.kind.forward:
            self._count(run, style)
            live.clear()
            return
        live.show(bundle(run, length, style))

    def _count(self, run: Run, style: str) -> None:
        """Adds a run to the cell's counting line. A line that stands for one run alone is that run's own."""
        from ..report.html import bundle
        from ..report.text import Loop, Rows

        loop = self._loop = self._loop or Loop()
        loop.add(run)
        self._style, self._pending = style, True
        self._single = bundle(run, "line", style) if loop.runs == 1 else {}
        # A terminal cannot take a line back: there it is printed once, when the cell ends. Nor can one be saved.
        if getattr(self._shell, "kernel", None) is None:
            self.later(run)
            return
        self._rows = self._rows or Rows()
        self._rows.add(run)  # with its digest, while its output is there
        if time.monotonic() - self._shown > REFRESH:
            self._show_loop()

    def _show_loop(self, rows: Rows | None = None) -> None:
        """Shows the counting line, with `rows` for the last time."""
        from ..report.html import loop_bundle

        if self._loop is None:
            return
        data = self._single if self._loop.runs == 1 else loop_bundle(self._loop, self._style, rows)
        update = self._display_id is not None
        self._display_id = self._display_id or os.urandom(16).hex()
        transient = {"display_id": self._display_id}
        self._shell.display_pub.publish(data=dict(data), metadata={}, transient=transient, update=update)
        self._shown, self._pending = time.monotonic(), False
