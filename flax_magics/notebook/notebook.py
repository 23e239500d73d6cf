"""A notebook as the commands see it: its session, the cells that run, and what is shown.

A run is shown as a report, further runs of the same cell as one counting line, a command at work as a live line.

Nothing here imports IPython, since the shell is an argument, or imports JAX and Flax before a command is used.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..base.text import WIDTH, fit, on_terminal, plural, width
from ..base.types import Record
from ..cells.journal import Journal, NotebookCells
from ..code.library import is_module, is_module_class, library
from ..line.call import CallExpression
from .completion import Names
from .interrupts import InterruptGuard
from .reporter import Reporter, Settings
from .tracebacks import end_in_cell, stopped

if TYPE_CHECKING:
    from .._session import Session
    from ..cells.reruns import Rerun
    from ..errors import FlaxMagicsError
    from ..execution.call import Call
    from ..line.options import ApplyOptions
    from ..report.live import Live
    from ..run import Note, Run
    from ..state.weights import WeightNames

BACK = "import flax_magics\n{0} = flax_magics.session().models['{0}'].module"
"""The lines that give a registered model its name again."""
KNOWN_LINES = 256
"""How many lines, at most, are known as they were read."""


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
    return getattr(sys.modules.get("flax_magics._session"), "_current", None)


class BriefCommand:
    """A command at work: clears its live line if it fails, and handles interrupts.

    It has a live line only once it names a phase, since until then it takes microseconds.
    """

    def __init__(self, notebook: Notebook, session: Session, what: str) -> None:
        self._notebook, self._session, self._what, self._guarded = notebook, session, what, False
        self._live: Live | None = None

    @property
    def live(self) -> Live:
        """The live line."""
        if self._live is None:
            self._live = self._notebook.reporter.live()
            self._live.text = self._what
        return self._live

    def __enter__(self) -> object:
        self._session.services.on_phase = self._doing
        self._guarded = self._notebook.interrupts.begin()
        return self._live

    def _doing(self, phase: str) -> None:
        if self._live is None:
            self.live.begin(phase)
        self.live.text = phase
        # XLA compiles on other threads, and this one would only wait.
        if phase.startswith("compiling "):
            self._notebook.prepare()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        interrupt = self._notebook.interrupts.end(error) if self._guarded else None
        if self._live is not None:
            self._live.end()
        if error is None and interrupt is None:
            return
        steps = self._show_finished_steps()
        remaining = f"kept: its {plural(steps, 'finished step')}" if steps else ""
        if isinstance(error, KeyboardInterrupt):
            stopped(error, self.live.text, remaining)
        if interrupt is not None:
            stopped(interrupt, self.live.text if error is not None else None, remaining)
            raise interrupt from None

    def clear(self) -> None:
        """Blanks the live line, if there is one."""
        if self._live is not None:
            self._live.clear()

    def _show_finished_steps(self) -> int:
        """Shows what a training that failed has done, and says how many steps; clears the line of any other command."""
        self.clear()
        return 0


class CommandInProgress(BriefCommand):
    """A command at work, with a live line from its beginning on.

    A training that is not `quiet` has its curve in the place of the line, and if it fails the report of its finished steps;
    the name `out` is then bound to their Run.
    """

    def __init__(self, notebook: Notebook, what: str, *, quiet: bool, out: str | None = None) -> None:
        super().__init__(notebook, notebook.session, what)
        self._quiet, self._out = quiet, out
        # The numbers of the last run, if that was a training: a failed command that leaves others has trained.
        self._curve_before = self._session.last_curve

    def __enter__(self) -> Live:
        live = self.live
        live.begin(self._what)
        self._session.services.on_progress = self._progressed
        super().__enter__()  # last, since an interrupt is heard in what is called after it, and would leave this halfway
        return live

    def _progressed(self, run: Run) -> None:
        if not self._quiet:
            self.live.progress = partial(self._notebook.reporter.progress, run)

    def _show_finished_steps(self) -> int:
        from msgspec.structs import replace

        curve = self._session.last_curve
        if curve is None or curve is self._curve_before:
            return super()._show_finished_steps()
        (run,) = self._session.last(1)
        # `name = %flax_train …` binds nothing where the line fails.
        where = "flax_magics.session().runs[-1]" if self._out is None else self._out
        if self._out is not None:
            self._notebook.shell.user_ns[self._out] = run
        said = {"stopped": f" · `{where}` is its Run"}
        notes = (replace(note, text=note.text + said.get(note.kind, "")) for note in run.notes)
        self._notebook.reporter.report(run.with_notes(tuple(notes)), self.live, quiet=self._quiet)
        return run.steps


class Notebook:
    """A shell, and what the commands in it share. `settings` returns the settings as they are now."""

    def __init__(self, shell: Any, settings: Callable[[], Settings]) -> None:
        self.shell, self.settings = shell, settings
        self.reporter = Reporter(
            shell,
            settings,
            lambda: self.session.first_findings(shell.user_ns, shell),
            lambda: (session := existing()) is None or session.speaks,
        )
        self.journal = Journal(lambda: 0 if (session := existing()) is None else len(session))
        around = CommandInProgress.__enter__, BriefCommand.__enter__, BriefCommand.__exit__
        self.interrupts = InterruptGuard(*(method.__code__ for method in around))
        self.called: ModelCall | None = None
        """The call of the running command, once its model was found; hints on errors refer to it."""
        self._cell: int | None = None
        self.known_lines: dict[str, KnownLine] = {}
        """Lines of `%flax_apply` that ran before, by their text."""
        self.bound: set[str] = set()
        """Names of registered models that were variables of the notebook when some cell ended."""
        self.unbound: set[str] = set()
        """Those of which it was said that they are no more."""

    # -- its session

    @property
    def session(self) -> Session:
        """The session of this kernel, made at its first use."""
        session = existing()
        if session is None:
            from .._session import current

            settings = self.settings()
            session = current(settings.seed, disk_cache=settings.disk_cache, replay_bytes=settings.replay_bytes)
            session.services.deadline = settings.deadline
        return session

    @property
    def replacements(self) -> int:
        """As `SessionView.replacements`; makes no session."""
        return 0 if (session := existing()) is None else session.replacements

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
        self.journal.catch_up(self.shell)
        self.journal.begin(info, _cell_id(info, self.shell), self.shell.user_global_ns)
        self.reporter.begin_cell()
        library.new_cell()

    def end_silent(self) -> None:
        """Handles `post_execute`, the one event of a file that `ipython FILE.ipy` runs: as a silent cell of its own."""
        if self._cell is None:
            self.reporter.end_cell()

    def end_cell(self, result: Any = None) -> None:
        """Handles `post_run_cell`: ends the reports, and drops what exceeds `replay_bytes`."""
        self.journal.end(result, self.number)
        self._cell = None
        self.reporter.end_cell()
        session = existing()
        if session is not None:
            session.settle()
            if session.models:
                self.weight_names.look(session.collections, self.shell.user_ns)
                self.bound.update(filter(self.shell.user_ns.__contains__, session.models))
                self.unbound = {name for name in self.unbound if not is_module(self.shell.user_ns.get(name))}

    @cached_property
    def weight_names(self) -> WeightNames:
        """Which names of the notebook hold weights, as far as it was seen."""
        from ..state.weights import WeightNames

        return WeightNames()

    def note_of_unbound(self, name: str, names: Mapping[str, object]) -> Note | None:
        """A note, once, if the name of a model is not among `names` any more, or stands for something else."""
        from ..base.digest import kind_of
        from ..run import Note

        value = names.get(name)
        if is_module(value) or is_module_class(value) or name not in self.bound or name in self.unbound:
            return None
        self.unbound.add(name)
        what = f"is {kind_of(value)} now" if name in names else "was deleted"
        text = f"`{name}` {what}, and this run is of the model that is registered under it: a restarted kernel has none"
        return Note("name", text, write=BACK.format(name))

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

    def working(self, what: str, *, quiet: bool = False, out: str | None = None) -> CommandInProgress:
        """Context manager around a command at work: a live line that begins with `what`, see `CommandInProgress`."""
        return CommandInProgress(self, what, quiet=quiet, out=out)

    def prepare(self) -> None:
        """Loads what showing a run takes, while XLA compiles on other threads: the templates, unless no HTML is shown."""
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
            from ..snapshot.save import autosave_failed

            self.reporter.publish(notice_bundle(autosave_failed(session.autosaving, error), self.settings().style))


def _cell_id(info: object, shell: Any) -> str | None:
    """The id of the beginning cell, None if the frontend sends none."""
    cell_id = getattr(info, "cell_id", None)
    if cell_id is None:  # not passed on by older versions of IPython
        parent = getattr(shell, "parent_header", None)
        metadata = parent.get("metadata") if isinstance(parent, dict) else None
        cell_id = metadata.get("cellId") if isinstance(metadata, dict) else None
    return cell_id if isinstance(cell_id, str) else None
