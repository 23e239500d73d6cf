"""A notebook as the commands see it: its session, the cells that run, and what is shown.

A run is shown as a report, further runs of the same cell as one counting line, a command at work as a live line.

Nothing here imports IPython, since the shell is an argument, or imports JAX and Flax before a command is used.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..base.text import WIDTH, fit, plural, width
from ..base.types import Record
from ..cells.journal import Journal, NotebookCells
from ..code.library import library
from ..line.call import CallExpression
from ..report.display import on_terminal, publish
from .completion import Names
from .interrupts import InterruptGuard
from .tracebacks import end_in_cell, stopped

if TYPE_CHECKING:
    from .._session import Session
    from ..base.curve import Curve
    from ..cells.reruns import Rerun
    from ..errors import FlaxMagicsError
    from ..execution.call import Call
    from ..line.options import ApplyOptions
    from ..report.live import Live
    from ..report.text import Loop, Rows
    from ..run import Note, Run
    from ..state.weights import WeightNames

LATER_RUNS = 1000
"""How many runs of a cell, at most, have their digests taken when it ends."""
LATER_BYTES = 16_000_000
"""The most bytes of outputs that are held until then."""
KNOWN_LINES = 256
"""How many lines, at most, are known as they were read."""
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


class KnownLine(NamedTuple):
    """A line of `%flax_apply` that ran before, as it was read: `out` and `quiet` are its options `-o` and `-q`."""

    expression: CallExpression
    call: type[Call]
    options: ApplyOptions
    out: str | None
    quiet: bool


class ModelCall(Record):
    """The call of a command: as it was written, with its arguments' values, and the module that is called."""

    expression: CallExpression
    call: Call
    module: object


def existing() -> Session | None:
    """The session of this process, or None. Does not import JAX."""
    module = sys.modules.get("flax_magics._session")
    return None if module is None else module.existing()


class Reporter:
    """Shows runs: a report for the first run of each line of a cell, and one counting line for all further ones.

    Remembers which notes were shown in this kernel, so that each is shown once in a loop.
    """

    def __init__(self, shell: Any, settings: Callable[[], Settings]) -> None:
        self._shell, self._settings = shell, settings
        self._said: set[tuple[str, str]] = set()
        # The counting line of the running cell and, for a notebook that is saved, its runs as data.
        self._loop: Loop | None = None
        self._rows: Rows | None = None
        self._display_id: str | None = None
        self._pending, self._shown, self._working = False, 0.0, ""
        # What has had a report in the running cell: lines, and models whose name was bound to another module.
        self._lines: set[tuple[object, ...]] = set()
        self._rebound: set[str | None] = set()
        self._live: Live | None = None
        self._later: list[Run] = []
        self._later_bytes = 0

    def begin_cell(self) -> None:
        """Handles `pre_run_cell`: the runs of a cell are counted anew."""
        self._loop, self._rows, self._display_id, self._pending, self._shown = None, None, None, False, 0.0
        self._lines, self._rebound, self._working = set(), set(), ""
        if self._live is not None:
            self._live.begin_cell()

    def end_cell(self) -> None:
        """Handles `post_run_cell`: shows the final counting line, with its runs as data, and takes the digests put off.

        A NaN in the output of a run that showed nothing is noted now, if it was not before.
        """
        if self._loop is not None and (self._pending or (self._rows is not None and self._loop.single is None)):
            self._show_loop(self._loop, self._rows)
        self.begin_cell()
        later, self._later, self._later_bytes = self._later, [], 0
        if not later:
            return
        from ..base.digest import has_nan

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

    def _unsaid(self, notes: Iterable[Note]) -> tuple[Note, ...]:
        return tuple(note for note in notes if (note.kind, note.text) not in self._said)

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
        if len(self._later) < LATER_RUNS and self._later_bytes + size <= LATER_BYTES:
            # The inputs of a loop's runs would otherwise all be held until the cell ends.
            self._later.append(run.without_inputs())
            self._later_bytes += size

    def live(self) -> Live:
        """A live line for one command. The last one is used again, unless its line is still shown."""
        if self._live is None or self._live.in_use:
            from ..report.live import Live

            self._live = Live(self._shell)
        self._live.within = None if self._display_id is None else self._show_with
        return self._live

    def publish(self, bundle: Mapping[str, object]) -> None:
        """Shows a MIME bundle, unless it is empty."""
        if bundle:
            publish(self._shell, bundle)

    def report(self, run: Run, live: Live, *, quiet: bool) -> None:
        """Shows a run in place of its live line, as long as its news; with `quiet` only notes that were not shown."""
        if quiet and not run.notes:
            self._read_later(run)
            live.clear()
            return
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
        unsaid = self._unsaid(notes)
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
        if further and setting in ("auto", "line") and not unsaid and run.timing.steady is None:
            self._count(shown, live)
            live.clear()
        else:
            live.show(bundle(shown, length, settings.style))

    def progress(self, run: Run, working: str) -> dict[str, object]:
        """How far a training is, in the place of the live line, whose text is `working`."""
        from ..report.html import progress_bundle
        from ..report.text import progress_line

        if getattr(self._shell, "kernel", None) is None:
            return {"text/plain": progress_line(run, working)}
        return progress_bundle(run, self._settings().style, working)

    def _count(self, run: Run, live: Live) -> None:
        """Adds a run to the cell's counting line. As long as the line stands for one run, it is that run's own line."""
        from ..report.text import Loop, Rows

        loop = self._loop = self._loop or Loop()
        loop.add(run)
        self._pending = True
        # A terminal cannot update a line: there it is printed once, when the cell ends, and without data to save.
        if getattr(self._shell, "kernel", None) is None:
            self._read_later(run)
            return
        self._rows = self._rows or Rows()
        self._rows.add(run)  # takes its digest, while the output is there
        if self._display_id is None:
            self._display_id = live.give_display()
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

        data = loop_bundle(loop, self._settings().style, rows, working)
        update = self._display_id is not None
        self._display_id = self._display_id or os.urandom(16).hex()
        publish(self._shell, data, self._display_id, update=update)
        self._shown, self._pending = time.monotonic(), False


class CommandInProgress:
    """A command at work: shows its live line, clears it if the command fails, and handles interrupts.

    A `brief` command has a live line only once it names a phase, since until then it takes microseconds; it trains nothing.
    A training that is not `quiet` has its curve in the place of the line, and if it fails the report of its finished steps.
    """

    def __init__(self, notebook: Notebook, what: str, *, brief: bool, quiet: bool) -> None:
        self._notebook, self._what, self._brief, self._quiet = notebook, what, brief, quiet
        self._session, self._live = notebook.session, notebook.reporter.live()
        # The numbers of the last run, if that was a training: a failed command that leaves others has trained.
        self._curve_before = None if brief else self._last_curve()
        self._trains = not brief
        self._interrupts = InterruptGuard(CommandInProgress.__enter__.__code__, CommandInProgress.__exit__.__code__)

    def __enter__(self) -> Live:
        self._live.text = self._what
        if not self._brief:
            self._live.begin(self._what)
        self._session.services.on_phase, self._session.services.on_progress = self._doing, self._progressed
        self._interrupts.begin()
        return self._live

    def _doing(self, phase: str) -> None:
        self._live.text = phase
        if self._brief:
            self._brief = False
            self._live.begin(phase)
        # XLA compiles on other threads, and this one would only wait.
        if phase.startswith("compiling "):
            self._notebook.prepare()

    def _progressed(self, run: Run) -> None:
        if not self._quiet:
            self._live.progress = partial(self._notebook.reporter.progress, run)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        interrupt = self._interrupts.end(error)
        self._live.end()
        steps = 0
        if error is not None or interrupt is not None:
            steps = self._show_finished_steps()
        kept = f"kept: its {plural(steps, 'finished step')}" if steps else ""
        if isinstance(error, KeyboardInterrupt):
            stopped(error, self._live.text, kept)
        if interrupt is not None:
            stopped(interrupt, self._live.text if error is not None else None, kept)
            raise interrupt from None

    def _show_finished_steps(self) -> int:
        """Shows what a training that failed has done, and says how many steps; clears the line of any other command."""
        curve = self._last_curve() if self._trains else None
        if curve is None or curve is self._curve_before:
            self._live.clear()
            return 0
        (run,) = self._session.last(1)
        self._notebook.reporter.report(run, self._live, quiet=self._quiet)
        return run.steps

    def _last_curve(self) -> Curve | None:
        return next((run.trained for run in self._session.last(1)), None)


class Notebook:
    """A shell, and what the commands in it share. `settings` returns the settings as they are now."""

    def __init__(self, shell: Any, settings: Callable[[], Settings]) -> None:
        self.shell, self.settings = shell, settings
        self.reporter = Reporter(shell, settings)
        self.journal = Journal(lambda: 0 if (session := existing()) is None else len(session))
        self.called: ModelCall | None = None
        """The call of the running command, once its model was found; hints on errors refer to it."""
        self._cell: int | None = None
        self.known_lines: dict[str, KnownLine] = {}
        """Lines of `%flax_apply` that ran before, by their text."""

    # -- its session

    @property
    def session(self) -> Session:
        """The session of this kernel, made at its first use."""
        session = existing()
        if session is None:
            from .._session import current

            settings = self.settings()
            session = current(settings.seed, disk_cache=settings.disk_cache, replay_bytes=settings.replay_bytes)
        return session

    def names(self) -> Names:
        """The names that completion offers. Makes no session."""
        session, shell = existing(), self.shell
        values = {name: value for name, value in shell.user_ns.items() if name not in shell.user_ns_hidden}
        if session is None:
            return Names(values)
        return Names(values, {name: model.names() for name, model in session.models.items()}, session.draws)

    # -- its cells

    def begin_cell(self, info: object = None, *_: object) -> None:
        """Handles `pre_run_cell`: counts runs anew, and has the next command look for changes in Flax's own code."""
        # While it is None, `number` asks the shell.
        self._cell = None
        self._cell = self.number
        self.fit_terminal()
        self.journal.begin(info, _cell_id(info, self.shell))
        self.reporter.begin_cell()
        library.new_cell()

    def end_cell(self, result: Any = None) -> None:
        """Handles `post_run_cell`: ends the reports, and drops what exceeds `replay_bytes`."""
        self.journal.end(result)
        self._cell = None
        self.reporter.end_cell()
        session = existing()
        if session is not None:
            session.settle()
            if session.models:
                self.weight_names.look(session.collections, self.shell.user_ns)

    @cached_property
    def weight_names(self) -> WeightNames:
        """Which names of the notebook hold weights, as far as it was seen."""
        from ..state.weights import WeightNames

        return WeightNames()

    @property
    def number(self) -> int:
        """The prompt number of the running cell, read as it begins: IPython 7.34 counts after the cell, 9 before."""
        return self.shell.displayhook.prompt_count if self._cell is None else self._cell

    def reruns(self) -> tuple[Rerun, ...]:
        """Cells that drew and were run again, or whose variables were bound again since. A terminal has none."""
        if on_terminal(self.shell):
            return ()
        from ..cells.reruns import reruns

        return reruns(self.journal.so_far(self.number), self.session.cells, self.shell.transform_cell)

    def executed(self) -> NotebookCells:
        """The executed cells, of which an export is made."""
        shell, journal = self.shell, self.journal
        return NotebookCells(journal.cells(shell), shell.transform_cell, journal.restarts, self.settings().seed)

    # -- what is shown

    def fit_terminal(self) -> None:
        """Makes what is shown from now on as wide as the terminal; elsewhere it has 80 columns."""
        fit(shutil.get_terminal_size().columns if on_terminal(self.shell) else WIDTH)

    def show_error(self, error: FlaxMagicsError) -> int:
        """Has a debugger begin in the cell, and gives the columns that the message has: those of a text, 0 in a pipe."""
        end_in_cell(error, self.shell)
        in_kernel = getattr(self.shell, "kernel", None) is not None
        return width() if in_kernel or on_terminal(self.shell) else 0

    def working(self, what: str, *, brief: bool = False, quiet: bool = False) -> CommandInProgress:
        """Context manager around a command at work: a live line that begins with `what`, see `CommandInProgress`."""
        return CommandInProgress(self, what, brief=brief, quiet=quiet)

    def prepare(self) -> None:
        """Loads what showing a run takes: the templates, unless no HTML is shown."""
        settings = self.settings()
        if settings.style != "text" and settings.report != "off":
            from ..report.html import prepare

            prepare()

    def tell_of_autosave(self) -> None:
        """Reports once that saving in the background fails, after the first command since."""
        session = existing()
        if session is None or session.autosaving is None:
            return
        error = session.autosaving.news()
        if error is not None:
            from ..report.html import notice_bundle
            from ..snapshot.view import autosave_failed

            self.reporter.publish(notice_bundle(autosave_failed(session.autosaving, error), self.settings().style))


def _cell_id(info: object, shell: Any) -> str | None:
    """The id of the beginning cell, None if the frontend sends none."""
    cell_id = getattr(info, "cell_id", None)
    if cell_id is None:  # not passed on by older versions of IPython
        parent = getattr(shell, "parent_header", None)
        metadata = parent.get("metadata") if isinstance(parent, dict) else None
        cell_id = metadata.get("cellId") if isinstance(metadata, dict) else None
    return cell_id if isinstance(cell_id, str) else None
