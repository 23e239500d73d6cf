"""Shows runs in the notebook: reports, and one counting line for further runs of a cell."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ..base.text import replaces
from ..base.types import Record

if TYPE_CHECKING:
    from ..execution.record import Outcome
    from ..report.live import Live
    from ..report.text import Loop, Rows
    from ..run import Note, Run
    from ..state.runs import RepeatedRun

LATER_RUNS = 1000
"""How many runs of a cell, at most, have their digests taken when it ends."""
LATER_BYTES = 16_000_000
"""The most bytes of outputs that are held until then."""
REFRESH = 0.25
"""The fewest seconds between two updates of a counting line."""
LINES = 12
"""How many lines of a cell, at most, have a report of their own."""


class Settings(Record):
    """The settings of the notebook; `FlaxMagics` says what each means."""

    seed: int
    report: str
    style: str
    notes: dict[str, bool]
    disk_cache: bool
    replay_bytes: int
    deadline: float


class Reporter:
    """Shows runs: a report for the first run of each line of a cell, and one counting line for all further ones.

    Remembers which notes were shown in this kernel, so that each is shown once in a loop.

    Args:
      first: gives notes for the first report; not called before that.
      speaks: says whether anything is shown but errors: of several processes that run together the first alone does.
    """

    def __init__(
        self,
        shell: Any,
        settings: Callable[[], Settings],
        first: Callable[[], tuple[Note, ...]] | None = None,
        speaks: Callable[[], bool] = lambda: True,
    ) -> None:
        self._shell, self._settings, self._speaks = shell, settings, speaks
        self._said: set[tuple[str, str]] = set()
        # Until the first report of this kernel, which also has what is wrong with JAX here.
        self._first: Callable[[], tuple[Note, ...]] | None = first
        # The counting line of the running cell and, for a notebook that is saved, its runs as data.
        self._loop: Loop | None = None
        self._rows: Rows | None = None
        self._display_id: str | None = None
        self._pending, self._shown, self._working = False, 0.0, ""
        # What has had a report in the running cell: lines, and models whose name was bound to another module.
        self._lines: set[tuple[object, ...]] = set()
        self._rebound: set[str | None] = set()
        self._live: Live | None = None
        # The run that the counting line was given last, if further runs like it are no more than numbers to it.
        self._counted: RepeatedRun | None = None
        self._later: list[Run] = []
        self._later_runs = self._later_bytes = 0

    def begin_cell(self) -> None:
        """Handles `pre_run_cell`: the runs of a cell are counted anew."""
        self._loop, self._rows, self._display_id, self._pending, self._shown = None, None, None, False, 0.0
        self._lines, self._rebound, self._working, self._counted = set(), set(), "", None
        if self._live is not None:
            self._live.begin_cell()

    def end_cell(self) -> None:
        """Handles `post_run_cell`: shows the final counting line, with its runs as data, and takes the digests put off.

        A NaN in the output of a run that showed nothing is noted now, if it was not before.
        """
        if self._loop is not None and (self._pending or (self._rows is not None and self._loop.single is None)):
            self._show_loop(self._loop, self._rows)
        self.begin_cell()
        later, self._later, self._later_runs, self._later_bytes = self._later, [], 0, 0
        if not later:
            return
        from ..base.output import has_nan

        for run in later:
            put_off = run._taken.put_off(run.output)
            nan = has_nan(run.output) if put_off else any(values.nan for values in run.values)
            if nan and self._settings().notes.get("nan", True):
                from ..execution.notes import with_notes_of_output
                from ..report.html import bundle

                noted = with_notes_of_output(run)
                # Its inputs are gone. If they had NaN too, an earlier note says so, and begins with the same words.
                texts = [text for _, text in self._said]
                news = [note for note in noted.notes if not any(text.startswith(note.text) for text in texts)]
                noted = noted.with_notes(tuple(news))
                self._said.update((note.kind, note.text) for note in noted.notes)
                self.publish(bundle(noted, "off", self._settings().style))

    def settings_changed(self) -> None:
        """Has the next run looked at anew, whose report a setting may now make another."""
        self._counted = None

    def put_off(self, outcome: Outcome) -> None:
        """`_read_later` of a run of a line that ran before. A small output, looked through already, is copied for that."""
        if self._later_runs < LATER_RUNS and self._later_bytes < LATER_BYTES:
            repeated, copy = outcome.repeated, outcome.copy
            if repeated is not None and copy:
                repeated.keep(copy)
                self._later_runs, self._later_bytes = self._later_runs + 1, self._later_bytes + len(copy)
            else:
                self._read_later(outcome.run)

    def _read_later(self, run: Run) -> None:
        """Holds a run's output until the cell has ended, to take its digest then: a replay compares with it.

        For runs that show no report, whose digest nobody has taken. Of a cell with very many or very large outputs,
        only the first ones are held.
        """
        if run.memory is not None:  # known from the program, without looking at the output
            size = run.memory.outputs
        else:
            import jax

            size = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree_util.tree_leaves(run.output))
        if self._later_runs < LATER_RUNS and self._later_bytes + size <= LATER_BYTES:
            # The inputs of a loop's runs would otherwise all be held until the cell ends.
            self._later.append(run.without_inputs())
            self._later_runs, self._later_bytes = self._later_runs + 1, self._later_bytes + size

    def live(self) -> Live:
        """A live line for one command. The last one is used again, unless its line is still shown."""
        if self._live is None or self._live.in_use:
            from ..report.live import Live

            self._live = Live(self._shell)
        self._live.within = None if self._display_id is None else self._show_with
        self._live.speaks = self._speaks()
        return self._live

    def publish(self, bundle: Mapping[str, object]) -> None:
        """Shows a MIME bundle, unless it is empty."""
        if bundle and self._speaks():
            from ..report.live import publish

            publish(self._shell, bundle)

    def report_again(self, outcome: Outcome, live: Callable[[], Live], *, quiet: bool) -> None:
        """`report` of a run of a line that ran before, and that has something to show.

        Args:
          live: makes the command's live line, if there is none; it is the caller's to clear.
        """
        repeated, counted, loop = outcome.repeated, self._counted, self._loop
        if not self._speaks():
            self.put_off(outcome)
        elif quiet or repeated is None or counted is None or loop is None or not repeated.is_like(counted):
            is_counted = self.report(outcome.run, live(), quiet=quiet)
            self._counted = repeated if is_counted else None
        elif self._rows is None:  # on a terminal
            loop.add_again(repeated.draw, repeated.seconds, repeated.changed)
            self.put_off(outcome)
        else:
            loop.add_again(repeated.draw, repeated.seconds, repeated.changed)
            repeated.keep(outcome.copy)
            self._rows.add_again(partial(repeated.recorded, outcome.copy))
            self._refresh(loop)

    def report(self, run: Run, live: Live, *, quiet: bool) -> bool:
        """Shows a run in place of its live line, as long as its news; with `quiet` only notes that were not shown.

        Returns whether the cell's counting line has it.
        """
        if not self._speaks():
            self._read_later(run)
            live.clear()
            return False
        if self._first is not None:
            first, self._first = self._first, None
            run = run.with_notes((*run.notes, *found)) if (found := first()) else run
        if quiet and not run.notes:
            self._read_later(run)
            live.clear()
            return False
        from ..execution.notes import with_notes_of_output
        from ..report.html import bundle, level

        settings = self._settings()
        if not quiet and settings.report != "off":
            run = with_notes_of_output(run)  # its digest is shown, so the output is read in any case
        silent = {kind for kind, told in settings.notes.items() if not told}
        # A loop that makes its models says so once, whatever each of them is.
        silent |= {"rebound"} if run.model in self._rebound else set()
        notes = tuple(note for note in run.notes if note.kind not in silent)
        self._rebound |= {run.model} if any(note.kind == "rebound" for note in notes) else set()
        unsaid = tuple(note for note in notes if (note.kind, note.text) not in self._said)
        self._said.update((note.kind, note.text) for note in notes)
        setting, told = ("off", unsaid) if quiet else (settings.report, notes)
        shown = run if told == run.notes else run.with_notes(told)
        length = level(shown, setting)
        if setting == "off":
            self._read_later(shown)
        # Each training has a curve of its own to show.
        line = (
            run.command,
            run.model,
            run.mode,
            run.call,
            run.samples,
            (run.draw, run.steps) if run.kind.trains else None,
        )
        further = not quiet and (line in self._lines or len(self._lines) >= LINES)
        if not quiet:
            self._lines.add(line)
        # Repeated runs were asked for to read their times. A note that was shown is no news: the line repeats it.
        self._counted = None
        counts = further and setting in ("auto", "line") and not unsaid and run.timing.steady is None
        if counts:
            self._count(shown, live)
            live.clear()
        else:
            live.show(bundle(shown, length, settings.style))
        return counts

    def progress(self, run: Run, working: str) -> dict[str, object]:
        """How far a training is, in the place of the live line, whose text is `working`."""
        from ..report.html import progress_bundle
        from ..report.text import progress_line

        if not replaces(self._shell):
            return {"text/plain": progress_line(run, working)}
        return progress_bundle(run, self._settings().style, working)

    def _count(self, run: Run, live: Live) -> None:
        """Adds a run to the cell's counting line. As long as the line stands for one run, it is that run's own line."""
        from ..report.text import Loop, Rows

        loop = self._loop = self._loop or Loop()
        loop.add(run)
        self._pending = True
        # A terminal cannot update a line: there it is printed once, when the cell ends, and without data to save.
        if not replaces(self._shell):
            self._read_later(run)
            return
        self._rows = self._rows or Rows()
        self._rows.add(run)  # takes its digest, while the output is there
        if self._display_id is None:
            self._display_id = live.give_display()
        self._refresh(loop)

    def _refresh(self, loop: Loop) -> None:
        """Shows the counting line in its display, unless it was shown just now."""
        self._pending = True
        # Updating at every run would cost a fast loop more than the runs do.
        if time.monotonic() - self._shown > REFRESH:
            # What a slow run was doing stands until the next one tells: a line that came and went would flicker.
            self._show_loop(loop, working=self._working)
            self._pending = bool(self._working)
            self._working = ""

    def _show_with(self, working: str) -> None:
        """Shows the counting line with what the command at work is doing."""
        assert self._loop is not None
        self._show_loop(self._loop, working=working)
        # So that what follows replaces it.
        self._working, self._shown, self._pending = working, 0.0, True

    def _show_loop(self, loop: Loop, rows: Rows | None = None, working: str = "") -> None:
        """Shows or updates the counting line; `rows` are added the last time, as data."""
        from ..report.html import loop_bundle
        from ..report.live import publish

        data = loop_bundle(loop, self._settings().style, rows, working)
        update = self._display_id is not None
        self._display_id = self._display_id or os.urandom(16).hex()
        publish(self._shell, data, self._display_id, update=update)
        self._shown, self._pending = time.monotonic(), False
