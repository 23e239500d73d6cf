"""Which cells were executed, in order, and what each did to the session: what an export and `%flax` are made of.

Nothing here imports IPython: the shell comes in as an argument.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

from ..base.text import clean

FRESH = "fresh"


class Load(NamedTuple):
    """A session that `%flax_load` read, whose history took the place of the one that was there.

    Attributes:
      file: as it was written on the line.
      state: when the file was written, in ns, and its size in bytes.
      seed, draws: where its root key stood.
      models: names of the models in it.
    """

    file: str
    state: tuple[int, int]
    seed: int
    draws: int
    models: tuple[str, ...]


class Place(NamedTuple):
    """Where the command stood that made a run of the session.

    Attributes:
      run: its index.
      line: from 1, in the text that IPython made of the cell.
      function: whose line it is; its name begins with `<` at the top of a cell.
    """

    run: int
    line: int
    function: str


class ExecutedCell(NamedTuple):
    """One execution of a cell.

    Attributes:
      number: as the notebook shows it; None for one that is in no history.
      text: as it was typed.
      first, end: it made the session's runs from index `first` up to `end`.
      error: the class of the exception that ended it, None if it succeeded.
      line: where that was, in the text that IPython made of the cell, from 1; None where it is not known.
      registered: what its `flaxmodel` commands registered, in order.
      cell: the cell's own id, None where the frontend sends none.
      restarted: `seed` if it started the root key again, `fresh` if with models that initialise anew; else empty.
      loads: what its `%flax_load` commands read.
      gone: what it did is in no history any more: another was loaded since.
      places: of the runs that its commands made, in order.
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

    @property
    def identity(self) -> str:
        """What tells the cell from others: its id, else its text."""
        return self.cell or self.text.strip()


class NotebookCells(NamedTuple):
    """What an export of a notebook is made of.

    Attributes:
      executed: the cells that ran, in order; the last may be running.
      transform: makes Python of a cell, as IPython does.
      restarts: how many runs there were each time the root key was started again.
      seed: what the root key started from, before any restart.
    """

    executed: list[ExecutedCell]
    transform: Callable[[str], str]
    restarts: list[int]
    seed: int


class Journal:
    """Keeps the executions of one shell, from the moment that it is told of them."""

    def __init__(self, runs: Callable[[], int]) -> None:
        self.runs = runs
        """How many runs the session has."""
        self.executed: list[ExecutedCell] = []
        self.restarts: list[int] = []
        """How many runs there were when the root key was started again."""
        self._depth = 0
        """How many cells are running: `%%capture` runs one inside of another."""
        self._running = ExecutedCell(None, "")
        """The outermost of them, with what its commands did so far, and an error of one inside."""

    def begin(self, info: Any = None, cell: str | None = None) -> None:
        """`pre_run_cell`; `cell` is the id of the one that begins, None where the frontend sends none."""
        if not self._depth:
            self._running = ExecutedCell(None, str(getattr(info, "raw_cell", "") or ""), self.runs(), cell=cell)
        self._depth += 1

    def end(self, result: Any = None) -> None:
        """`post_run_cell`"""
        if not self._depth:  # the cell that loaded the extension, whose beginning nobody told
            self._running = self._running._replace(text=str(getattr(result.info, "raw_cell", "") or ""), first=0)
        self._depth = max(self._depth - 1, 0)
        error = result.error_before_exec or result.error_in_exec
        if error is not None:  # inside of a magic too, which does not fail: what came after the error has not run
            self._running = self._running._replace(error=type(error).__name__, line=failing_line(error))
        if not self._depth:
            number = result.execution_count if getattr(result.info, "store_history", True) else None
            self.executed.append(self._running._replace(number=number, end=self.runs()))

    def drew(self, runs_before: int, names: object) -> None:
        """A command has ended, before which there were so many runs. `names` is the notebook's namespace."""
        frame = calling_frame(names) if self._depth and self.runs() > runs_before else None
        if frame is not None:
            places = self._running.places
            known = places[-1].run + 1 if places else 0  # by commands inside of this one
            place = frame.f_lineno, frame.f_code.co_name
            more = (Place(run, *place) for run in range(max(runs_before, known), self.runs()))
            self._running = self._running._replace(places=(*places, *more))

    def registered(self, rows: list[Registered]) -> None:
        """A `flaxmodel` command has registered these."""
        self._running = self._running._replace(registered=(*self._running.registered, *rows))

    def restarted(self, *, fresh: bool = False) -> None:
        """The root key has been started again."""
        self.restarts.append(self.runs())
        kind = FRESH if fresh or self._running.restarted == FRESH else "seed"
        self._running = self._running._replace(restarted=kind)

    def so_far(self, number: int) -> list[ExecutedCell]:
        """All executions of which this journal was told, the running one, which has this number, last."""
        running = self._running._replace(number=number, end=self.runs(), error=None, line=None)
        return [*self.executed, *([running] if self._depth else [])]

    def loaded(self, load: Load) -> None:
        """A session was read from a file: the history is that of the file, and has nothing of what ran here before."""
        self.executed = [cell._replace(first=0, end=0, gone=True, places=()) for cell in self.executed]
        self.restarts.clear()
        self._running = self._running._replace(first=self.runs(), places=(), loads=(*self._running.loads, load))

    def cells(self, shell: Any) -> list[ExecutedCell]:
        """All executions so far, the running one last; those from before this journal as the shell's history has them."""
        # The number that IPython shows: 7.34 counts after the cell, 9 before it.
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
        for cell in told:  # those without a number stay where they are
            while earlier and cell.number is not None and (earlier[0].number or 0) < cell.number:
                cells.append(earlier.pop(0))
            cells.append(cell)
        return cells + earlier


def state_of(file: str) -> tuple[int, int] | None:
    """When a file was written, in ns, and its size in bytes; None where there is none."""
    try:
        status = Path(file).expanduser().stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


_cells: Callable[[], NotebookCells] | None = None
_cell_number: Callable[[], int] | None = None


def in_notebook(cells: Callable[[], NotebookCells] | None, number: Callable[[], int] | None = None) -> None:
    """The session of this process is that of a notebook. None: it is no more.

    Args:
      cells: gives what an export is made of.
      number: gives the number of the cell that is running.
    """
    global _cells, _cell_number
    _cells, _cell_number = cells, number


def cell_number() -> int | None:
    """The number of the cell that is running, None outside of a notebook."""
    return None if _cell_number is None else _cell_number()


def cells_of_notebook() -> NotebookCells | None:
    """The cells that an export is made of, None outside of a notebook."""
    return None if _cells is None else _cells()


def calling_frame(names: object) -> FrameType | None:
    """The innermost code of the notebook's, whose namespace is `names`, that is running; None where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals is not names:
        frame = frame.f_back
    return frame


def failing_line(error: BaseException) -> int | None:
    """The line of the cell that raised `error`: of the innermost code that is a cell's own, not a function's."""
    line = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        top = code.co_name == "<module>" or code.co_name.startswith("<cell line")  # IPython 7
        # An argument of a command is code of its own, on one line; a file that is imported has other globals.
        in_cell = frame.f_globals.get("__name__") == "__main__" and not code.co_filename.startswith("<call ")
        line = number if top and in_cell else line
    return line


@dataclass(frozen=True)
class Registered:
    """One model that a cell registered.

    Attributes:
      name: its variable name.
      module: how it is built, such as `Net(features=8)`.
      state: how it compares with the model of that name before.
      changes: what changed, such as `Dense_0/kernel [4,3]→[4,5]`.
      variables: what became of the variables; `none` if there were none, `own` if the module holds new ones.
      check: rows of label and value for `--check`.
      draw: what a module that the session built was built with, such as `draw 1 of seed 0`.
      file: where variables were that waited for this model.
      unfit: why they were not used, leaf by leaf.
      other: what is other about the model than it was there.
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

    @property
    def headline(self) -> str:
        """What follows the name in the first part: nothing, `unchanged`, `changed`, `changed: a, b`."""
        if self.state == "changed" and self.changes:
            return "changed: " + ", ".join(map(clean, self.changes))
        return "" if self.state == "new" else self.state

    @property
    def parts(self) -> tuple[str, ...]:
        """What follows the first part."""
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
