"""A notebook as the commands see it: the session in it, the cells that run, and what is shown of it all.

Nothing here imports IPython: the shell comes in as an argument. Nothing imports JAX or Flax before a command is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ..cells.journal import Journal, NotebookCells
from ..code.library import library
from ..line.call import CallExpression
from .interrupts import InterruptGuard
from .reporter import Reporter
from .tracebacks import stopped

if TYPE_CHECKING:
    from .._session import Session
    from ..cells.reruns import Rerun
    from ..report.live import Live
    from ..run import Note, Run
    from ..state.handles import ModelNames
    from ..state.weights import WeightNames


class Settings(NamedTuple):
    """What a person has set; see `FlaxMagics`, which says what each is."""

    seed: int
    report: str
    style: str
    notes: dict[str, bool]
    disk_cache: bool
    replay_bytes: int


def existing() -> Session | None:
    """The session of this process, None where there is none yet: asked without importing JAX."""
    ask = getattr(sys.modules.get("flax_magics._session"), "existing", None)
    session: Session | None = None if ask is None else ask()
    return session


class CommandInProgress:
    """A command at work: its live line, which is blank again if it fails, and what an interrupt says it stopped.

    While XLA compiles there is nothing else to do here, so `meanwhile` is called.
    """

    def __init__(self, session: Session, live: Live, what: str, meanwhile: Callable[[], None]) -> None:
        self._session = session
        self._live = live
        self._what = what
        self._meanwhile = meanwhile
        self._interrupts = InterruptGuard(CommandInProgress.__enter__.__code__, CommandInProgress.__exit__.__code__)

    def __enter__(self) -> Live:
        self._phase = self._live.begin(self._what)
        self._session.services.on_phase = self._doing
        self._interrupts.begin()
        return self._live

    def _doing(self, phase: str) -> None:
        self._phase.text = phase
        if phase.startswith("compiling "):
            self._meanwhile()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        interrupt = self._interrupts.end(error)
        if isinstance(error, KeyboardInterrupt):
            stopped(error, self._phase.text)
        self._live.end()
        if error is not None or interrupt is not None:
            self._live.clear()
        if interrupt is not None:
            stopped(interrupt, self._phase.text if error is not None else None)
            raise interrupt from None


class Notebook:
    """One shell, with what the commands in it share. `settings` gives what a person has set by now."""

    def __init__(self, shell: Any, settings: Callable[[], Settings]) -> None:
        self.shell = shell
        self.settings = settings
        self.reporter = Reporter(shell)
        self.journal = Journal(lambda: 0 if (session := existing()) is None else len(session))
        self.called: CallExpression | None = None
        """What the command at hand calls, once its model was found."""
        self._cell: int | None = None

    # -- its session

    @property
    def session(self) -> Session:
        """The session of this kernel, made at first use."""
        session = existing()
        if session is None:
            from .._session import current

            settings = self.settings()
            session = current(settings.seed)
            session.programs.compiler.keep_on_disk(settings.disk_cache)
            session.replay_bytes = settings.replay_bytes
        return session

    def model_names(self) -> dict[str, ModelNames]:
        """What completion needs to know; makes no session."""
        session = existing()
        return {} if session is None else {name: model.names() for name, model in session.models.items()}

    # -- its cells

    def begin_cell(self, info: Any = None, *_: Any) -> None:
        """`pre_run_cell`: runs are counted anew, and what the cell before did to Flax's own code may count."""
        self._cell = None
        self._cell = self.number
        self.journal.begin(info, _cell_id(info, self.shell))
        self.reporter.begin_cell()
        library.new_cell()

    def end_cell(self, *_: Any) -> None:
        """`post_run_cell`: reports come to their end, and what is more than may be kept goes."""
        self._cell = None
        settings = self.settings()
        self.reporter.end_cell(settings.notes, settings.style)
        session = existing()
        if session is not None:
            session.settle()
            if session.models:
                self._weight_names.look(session.collections, self.shell.user_ns)

    @cached_property
    def _weight_names(self) -> WeightNames:
        from ..state.weights import WeightNames

        return WeightNames()

    def holds_weights(self, model: str, name: str | None) -> None:
        """The variables of a model are about to be assigned to a name."""
        variables = self.session.collections[model]
        if name is not None and variables is not None:
            self._weight_names.hold(model, name, variables)

    def has_set_weights(self, model: str) -> None:
        """The user has given a model other variables."""
        self._weight_names.chosen(model, self.shell.user_ns)

    def weight_notes(self, model: str) -> tuple[Note, ...]:
        """The sharp bit that names of the notebook hold other weights than the model that is about to run, if they do."""
        note = self._weight_names.note(model, self.session.collections, self.shell.user_ns)
        return () if note is None else (note,)

    @property
    def number(self) -> int:
        """The number in the prompt of the cell that is running. IPython 7.34 counts after the cell, 9 before it."""
        number: int = self.shell.displayhook.prompt_count if self._cell is None else self._cell
        return number

    def reruns(self) -> tuple[Rerun, ...]:
        """Cells that drew and were run again, or have variables that were rebound since."""
        from ..cells.reruns import reruns

        return reruns(self.journal.so_far(self.number), self.session.cells, self.shell.transform_cell)

    def executed(self) -> NotebookCells:
        """What an export is made of."""
        shell, journal = self.shell, self.journal
        return NotebookCells(journal.cells(shell), shell.transform_cell, journal.restarts, self.settings().seed)

    # -- what is shown

    def working(self, what: str) -> CommandInProgress:
        """A live line for as long as the block runs; blank again if it fails."""
        return CommandInProgress(self.session, self.reporter.live(), what, self.prepare)

    def prepare(self) -> None:
        """Gets ready to show a run."""
        settings = self.settings()
        if settings.style != "text" and settings.report != "off":
            from ..report.html import prepare

            prepare()

    def report(self, run: Run, live: Live, *, quiet: bool) -> None:
        """Shows a run in place of its live line, as the settings have it. `quiet`: a sharp bit not yet said alone."""
        settings = self.settings()
        if not quiet and settings.report != "off":
            run = self._with_values(run)  # what is shown is read for its digest anyway
        if quiet and not run.notes:
            self.reporter.later(run)
            live.clear()
            return
        notes = tuple(note for note in run.notes if settings.notes.get(note.kind, True))
        if len(notes) < len(run.notes):
            run = replace(run, notes=notes)
        self.reporter.report(run, live, setting=settings.report, style=settings.style, quiet=quiet)

    @cached_property
    def _with_values(self) -> Callable[[Run], Run]:
        from ..execution.notes import with_values

        return with_values

    def tell_of_autosave(self) -> None:
        """Says, once, that saving in the background fails: at the first command after it did."""
        session = existing()
        if session is None or session.autosaving is None:
            return
        error = session.autosaving.news()
        if error is not None:
            from ..report.html import notice_bundle
            from ..snapshot.view import autosave_failed

            self.reporter.publish(notice_bundle(autosave_failed(session.autosaving, error), self.settings().style))


def _cell_id(info: Any, shell: Any) -> str | None:
    """The id of the cell that begins, None where the frontend sends none."""
    cell_id = getattr(info, "cell_id", None)
    if cell_id is None:  # older IPythons do not hand it on
        parent = getattr(shell, "parent_header", None)
        metadata = parent.get("metadata") if isinstance(parent, dict) else None
        cell_id = metadata.get("cellId") if isinstance(metadata, dict) else None
    return cell_id if isinstance(cell_id, str) else None
