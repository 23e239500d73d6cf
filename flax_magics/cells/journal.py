"""A journal of the executed cells and of what each did to the session: the source of an export and of `%flax_history`.

Nothing here imports IPython: the shell is passed in.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from ..base.text import clean
from ..base.types import Record

if TYPE_CHECKING:
    from ..run import Note

FRESH = "fresh"


class Load(Record):
    """One `%flax_load`: the loaded session's history replaced the one before.

    Attributes:
      file: the path as it was written on the line.
      state: the file's modification time in ns and its size in bytes; see `state_of`.
      seed, draws: the position of the loaded root key.
      models: names of the models in the file.
      trained: model → how many steps of its training are finished, which `--resume` goes on with.
    """

    file: str
    state: tuple[int, int]
    seed: int
    draws: int
    models: tuple[str, ...]
    trained: Mapping[str, int] = {}


class Place:
    """The place in the cells' code of the command that made a run.

    Attributes:
      run: the run's index in `Session.runs`.
      line: line number from 1, in the Python text that IPython made of the cell.
      function: name of the function around the line; at the top level of a cell it begins with `<`.
    """

    __slots__ = ("function", "line", "run")  # a long loop makes many

    def __init__(self, run: int, line: int, function: str) -> None:
        self.run, self.line, self.function = run, line, function


class ExecutedCell(Record):
    """One execution of a cell.

    Attributes:
      number: the execution count that the notebook shows; None for one that is not in IPython's history.
      text: the cell as it was typed.
      first, end: it made the session's runs `first` to `end - 1`.
      error: class name of the exception that ended it, None if it succeeded.
      line: line number of that exception, from 1, in the Python text that IPython made of the cell; None if unknown.
      registered: the models that its `flaxmodel` commands registered, in order.
      cell: the cell's id, None where the frontend sends none.
      restarted: `seed` if it restarted the root key, `fresh` if it also has models initialise anew; else empty.
      loads: its `%flax_load` commands, in order.
      gone: its runs are in no history any more, since another session was loaded.
      places: the places of the commands that made its runs, in order.
      body: the last line of a `%%flax…` cell's body that has run, 0 for none.
      stopped: the place of the last command that an interrupt or error ended after it had changed the session.
    """

    number: int | None
    text: str
    first: int = 0
    end: int = 0
    error: str | None = None
    line: int | None = None
    registered: tuple[Registered, ...] = ()
    cell: str | None = None
    restarted: str = ""
    loads: tuple[Load, ...] = ()
    gone: bool = False
    places: tuple[Place, ...] = ()
    body: int = 0
    stopped: Place | None = None

    @property
    def identity(self) -> str:
        """Equal for executions of the same cell: its id, or its text where the frontend sends no id."""
        return self.cell or self.text.strip()


class NotebookCells(Record):
    """The input of an export of a notebook.

    Attributes:
      executed: the executed cells, in order; the last may still be running.
      transform: turns a cell's text into Python, as IPython does.
      restarts: for each restart of the root key, the number of runs before it.
      seed: the seed before any restart.
    """

    executed: list[ExecutedCell]
    transform: Callable[[str], str]
    restarts: list[int]
    seed: int


class Journal:
    """Records the cell executions of one shell from the time its hooks are registered."""

    def __init__(self, runs: Callable[[], int]) -> None:
        self.runs = runs
        """Returns the number of runs that the session has now."""
        self.executed: list[ExecutedCell] = []
        self.restarts: list[int] = []
        """For each restart of the root key, the number of runs before it."""
        self._depth = 0
        """Number of nested cell executions: `%%capture` runs a cell inside a cell."""
        self._names: object = None
        """The namespace of the cell that runs."""
        self._running = ExecutedCell(None, "")
        """The outermost running cell, with what its commands did so far; errors of nested cells count as its own."""
        self._info: object = None
        """What IPython tells of that cell, by which its result is known."""
        self._places: list[Place] = []
        """Its `places`; a list, which a loop of many runs lengthens at the cost of one."""
        self.body: list[int] = []
        """The last lines of the statements that have run in the body of its `%%flax…` command."""

    def begin(self, info: Any = None, cell: str | None = None, names: object = None) -> None:
        """IPython's `pre_run_cell` hook.

        Args:
          cell: the id of the cell, None where the frontend sends none.
          names: the notebook's namespace, by which its frames are recognized.
        """
        self._names = names
        if not self._depth:
            self._running = ExecutedCell(None, str(getattr(info, "raw_cell", "") or ""), self.runs(), cell=cell)
            self._info, self._places, self.body = info, [], []
        self._depth += 1

    def catch_up(self, shell: Any) -> None:
        """Records the cell whose `end` an interrupt has kept from being called, or ended, although the cell has ended."""
        result = shell.last_execution_result
        if self._depth and result is not None and result.info is self._info:
            self._depth = 1
            self.end(result)

    def end(self, result: Any = None, number: int | None = None) -> None:
        """IPython's `post_run_cell` hook.

        Args:
          result: None for a cell that was interrupted before it began.
          number: the cell's, which a result lacks that IPython made once an interrupt had left its own code.
        """
        if result is None:
            return
        # Its `pre_run_cell` came before the hook was there, in the cell that loaded the extension, or was interrupted.
        if not self._depth:
            self._running = self._running._replace(text=str(getattr(result.info, "raw_cell", "") or ""))
        error = result.error_before_exec or result.error_in_exec
        # A nested cell that failed counts although its magic (`%%capture`) succeeds: the rest of it has not run.
        if error is not None:
            self._running = self._running._replace(error=type(error).__name__, line=failing_line(error))
        if self._depth > 1:
            self._depth -= 1
        else:
            self._ended((result.execution_count or number) if getattr(result.info, "store_history", True) else None)

    def end_unheard(self, number: int) -> None:
        """Records the cell that unloaded the extension, whose end was not told, once that is loaded again."""
        self._ended(number)

    def _ended(self, number: int | None) -> None:
        places, body = tuple(self._places), max(self.body, default=0)
        ended = self._running._replace(number=number, end=self.runs(), places=places, body=body)
        executed, running = [*self.executed, ended], ExecutedCell(None, "", self.runs())
        # In one statement without a call: where an interrupt comes before it, `catch_up` finds all as it was.
        self.executed, self._running, self._places, self.body, self._depth = executed, running, [], [], 0

    def drew_again(self, run: int, caller: FrameType) -> None:
        """`drew` of a single run, whose index is known, and the frame that called the command."""
        frame = calling_frame(self._names, caller) if self._depth else None
        if frame is not None:
            self._places.append(Place(run, frame.f_lineno, frame.f_code.co_name))

    def drew(self, runs_before: int, runs: int, names: object) -> None:
        """Records where in the cell a command made its runs; called after each command, however it ended.

        Args:
          runs_before, runs: the number of runs when the command began, and that of now.
          names: the notebook's namespace, by which its frames are recognized.
        """
        places = self._places
        frame = calling_frame(names, sys._getframe()) if self._depth and runs > runs_before else None
        if frame is not None:
            known = places[-1].run + 1 if places else 0  # commands inside this one have recorded theirs already
            for run in range(max(runs_before, known), runs):
                places.append(Place(run, frame.f_lineno, frame.f_code.co_name))

    def stopped(self, names: object) -> None:
        """Records where in the cell a command stands that was ended after it had changed the session."""
        frame = calling_frame(names, sys._getframe()) if self._depth else None
        if frame is not None:
            place = Place(self.runs(), frame.f_lineno, frame.f_code.co_name)
            self._running = self._running._replace(stopped=place)

    def registered(self, rows: list[Registered]) -> None:
        """Records what a `flaxmodel` command registered."""
        self._running = self._running._replace(registered=(*self._running.registered, *rows))

    def restarted(self, *, fresh: bool = False) -> None:
        """Records that the root key was restarted; `fresh`: models initialise anew, too."""
        self.restarts.append(self.runs())
        kind = FRESH if fresh or self._running.restarted == FRESH else "seed"
        self._running = self._running._replace(restarted=kind)

    def so_far(self, number: int) -> list[ExecutedCell]:
        """All recorded executions; the running one comes last and gets `number`."""
        places = tuple(self._places)
        running = self._running._replace(number=number, end=self.runs(), error=None, line=None, places=places)
        return [*self.executed, *([running] if self._depth else [])]

    def loaded(self, load: Load) -> None:
        """Records that a session was loaded: runs of earlier cells are in the history no more."""
        self.executed = [cell._replace(first=0, end=0, gone=True, places=()) for cell in self.executed]
        self.restarts.clear()
        self._places = []
        self._running = self._running._replace(first=self.runs(), loads=(*self._running.loads, load))

    def cells(self, shell: Any) -> list[ExecutedCell]:
        """All executions so far, the running one last; earlier ones as IPython's history has them."""
        self.catch_up(shell)
        # The running cell's number: IPython 7.34 raises `execution_count` after the cell, IPython 9 before it.
        number = shell.displayhook.prompt_count if self._depth else shell.execution_count
        told = self.so_far(number)
        known = {cell.number for cell in told}
        failed = getattr(shell.history_manager, "exceptions", {})  # IPython 9 keeps them
        earlier = [
            ExecutedCell(n, text, error=str(failed[n].get("ename", "an error")) if n in failed else None)
            for n, text in enumerate(getattr(shell.history_manager, "input_hist_raw", ()))
            if n and n not in known and n < number
        ]
        cells: list[ExecutedCell] = []
        for cell in told:  # executions without a number keep their place in the order
            while earlier and cell.number is not None and (earlier[0].number or 0) < cell.number:
                cells.append(earlier.pop(0))
            cells.append(cell)
        return cells + earlier


def state_of(file: str) -> tuple[int, int] | None:
    """Modification time (ns) and size (bytes) of a file, to tell whether it changed; None where there is none."""
    try:
        status = Path(file).expanduser().stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


_cells: Callable[[], NotebookCells] | None = None
_cell_number: Callable[[], int] | None = None


def in_notebook(cells: Callable[[], NotebookCells] | None, number: Callable[[], int] | None = None) -> None:
    """Tells this module that the process-wide session is a notebook's; None when the extension is unloaded.

    Args:
      cells: returns the input of an export.
      number: returns the execution count of the running cell.
    """
    global _cells, _cell_number
    _cells, _cell_number = cells, number


def cell_number() -> int | None:
    """The execution count of the running cell, None outside a notebook."""
    return None if _cell_number is None else _cell_number()


def cells_of_notebook() -> NotebookCells | None:
    """The input of an export, None outside a notebook."""
    return None if _cells is None else _cells()


def calling_frame(names: object, frame: FrameType | None) -> FrameType | None:
    """The innermost frame of notebook code, whose globals are `names`, from `frame` outwards; None where there is none."""
    while frame is not None and frame.f_globals is not names:
        frame = frame.f_back
    return frame


def failing_line(error: BaseException) -> int | None:
    """The line of the cell's top-level code at which `error` was raised, from 1; None where no such frame is found."""
    line = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        top = code.co_name == "<module>" or code.co_name.startswith("<cell line")  # the latter in older IPython
        # Not a command's argument, which is compiled as `<call …>`, nor an imported file, which has other globals.
        in_cell = frame.f_globals.get("__name__") == "__main__" and not code.co_filename.startswith("<call ")
        line = number if top and in_cell else line
    return line


class Registered(Record):
    """One model that a `flaxmodel` command registered, as its report shows it.

    Attributes:
      name: the model's variable name.
      module: its construction, such as `Net(features=8)`.
      state: the comparison with the model registered under that name before.
      changes: differences from that one, such as `Dense_0/kernel [4,3]→[4,5]`.
      variables: what became of the variables; `none` if there were none, `own` if the module holds new ones.
      check: rows of label and value for `--check`.
      draw: for a module that the session built, the draw of its keys, such as `draw 1 of seed 0`.
      file: the file whose saved variables waited for this model.
      unfit: the leaves of these that do not fit, which is why none was used.
      other: differences from the model for which they were saved.
      notes: what an edit has dropped that an init would not make again.
    """

    name: str
    module: str
    state: Literal["new", "unchanged", "changed"] = "new"
    changes: tuple[str, ...] = ()
    variables: Literal["none", "kept", "dropped", "own", "restored"] = "none"
    check: tuple[tuple[str, str], ...] = ()
    draw: str = ""
    file: str = ""
    unfit: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()

    @property
    def headline(self) -> str:
        """The text after the name: empty for a new model, `unchanged`, `changed`, or `changed: a, b`."""
        if self.state == "changed" and self.changes:
            return "changed: " + ", ".join(map(clean, self.changes))
        return "" if self.state == "new" else self.state

    @property
    def parts(self) -> tuple[str, ...]:
        """The further parts of the report line, after name and headline."""
        changed = {
            "dropped": ("variables dropped", "next run initialises"),
            "own": ("with variables of its own",),
            "restored": (),
            "kept": ("variables kept",),
        }
        first = {
            "new": (clean(self.module), "registered"),
            "unchanged": ("variables and programs kept" if self.variables == "kept" else "programs kept",),
            "changed": changed.get(self.variables, ("registered anew",)),
        }
        parts = [*first[self.state], *([f"built with {self.draw}"] if self.draw else [])]
        if self.unfit:
            leaves = ", ".join(map(clean, self.unfit))
            return (*parts, f"the variables in {clean(self.file)} do not fit, and none is used: {leaves}")
        if self.variables == "restored":
            parts += [f"variables from {clean(self.file)}", *map(clean, self.other)]
        return tuple(parts)
