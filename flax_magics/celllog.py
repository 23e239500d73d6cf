"""Which cells were run, and what that means for the draws that they made: run again, edited, a variable rebound.

A kernel does not see the order of the cells in the notebook, so nothing is said of what a fresh run would give. It sees
that a cell drew and was run again: every such cell draws once less in Run All.

Nothing here imports IPython.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from .cells import assigned_names


@dataclass(frozen=True)
class Executed:
    """One execution of a cell.

    Attributes:
      number: the one in the prompt.
      cell: the cell's own id, where the frontend sends one; else its text. `known`: it is the id.
      text: as it was then.
    """

    number: int
    cell: str
    known: bool
    text: str


@dataclass(frozen=True)
class Rerun:
    """A cell that drew and was run again.

    Attributes:
      numbers: its executions, in order.
      known: the frontend tells which cell it is; without that it is the same text that was run again.
      edited: the text was another in one of them.
      rebound: variables that the last execution's calls use and that other cells have bound since the first, with the
        number of the last cell that did.
    """

    numbers: tuple[int, ...]
    known: bool
    edited: bool
    rebound: Mapping[str, int]

    @property
    def text(self) -> str:
        """`cell [3] was edited and run again as [5] and [9]; x was rebound by [7] in between`"""
        first, *others = (f"[{number}]" for number in self.numbers)
        listed = " and ".join([", ".join(others[:-1]), others[-1]] if len(others) > 1 else others)
        what = (
            f"cell {first} was {'edited and ' if self.edited else ''}"
            if self.known
            else f"the text of cell {first} was "
        )
        said = f"{what}run again as {listed}"
        return f"{said}; {self._between}" if self.rebound else said

    @property
    def _between(self) -> str:
        return ", ".join(f"{name} was rebound by [{number}]" for name, number in self.rebound.items()) + " in between"

    def marks(self) -> Iterable[tuple[int, tuple[str, ...]]]:
        """Number of each execution, and what is said of the draws that it made."""
        last = self.numbers[-1]
        for number in self.numbers[:-1]:
            what = "cell edited" if self.edited else "cell run again" if self.known else "the same text run again"
            yield number, (f"{what} since, as [{last}]",)
        if self.rebound:
            yield last, (self._between.replace(" in between", f" since [{self.numbers[0]}]"),)


class CellLog:
    """The cells of a kernel, in the order in which they were run. Costs a reference a cell; all else is asked for."""

    def __init__(self) -> None:
        self._executed: list[Executed] = []

    def begin(self, number: int, cell: str | None, text: str) -> None:
        """A cell begins; `cell` is its id, if the frontend sends one."""
        self._executed.append(Executed(number, cell or text.strip(), cell is not None, text))

    def reruns(self, drew: Mapping[int, Iterable[str]], transform: Callable[[str], str]) -> tuple[Rerun, ...]:
        """Cells that drew and were run again, in the order of their first execution.

        Args:
          drew: number of each execution that drew → the calls that it made, as they were written.
          transform: makes Python of a cell's text, as IPython does.
        """
        cells: dict[str, list[Executed]] = {}
        for executed in self._executed:
            cells.setdefault(executed.cell, []).append(executed)
        bound: dict[int, frozenset[str]] = {}

        def binds(executed: Executed) -> frozenset[str]:
            if executed.number not in bound:
                bound[executed.number] = _bound(executed.text, transform)
            return bound[executed.number]

        found = []
        for runs in cells.values():
            if len(runs) < 2 or not any(run.number in drew for run in runs[:-1]):
                continue
            names = _used(drew.get(runs[-1].number, ())) - binds(runs[-1])
            rebound: dict[str, int] = {}
            if names:
                for other in self._executed:
                    if runs[0].number < other.number < runs[-1].number and other.cell != runs[0].cell:
                        rebound |= dict.fromkeys(sorted(names & binds(other)), other.number)
            numbers = tuple(run.number for run in runs)
            found.append(Rerun(numbers, runs[0].known, len({run.text.strip() for run in runs}) > 1, rebound))
        return tuple(sorted(found, key=lambda rerun: rerun.numbers))


def _used(calls: Iterable[str]) -> frozenset[str]:
    """Names that calls read."""
    names: set[str] = set()
    for call in set(calls):
        try:
            tree = ast.parse(call, mode="eval")
        except (SyntaxError, ValueError):  # a call that nobody wrote as text
            continue
        names.update(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    return frozenset(names)


def _bound(text: str, transform: Callable[[str], str]) -> frozenset[str]:
    """Names that a cell binds at its top level; none where its text is no Python."""
    first, _, body = text.lstrip().partition("\n")
    names: set[str] = set()
    if first.startswith("%%"):
        target, equals, _ = first.partition("=")
        if equals and first.startswith("%%flaxmodel"):
            names.add(target.split()[-1])
        # What is in other cell magics may be no Python, or run elsewhere.
        text = body if re.match(r"%%(flax|time\b|capture\b)", first) else ""
    try:
        return frozenset({*names, *assigned_names(ast.parse(transform(text)))})
    except (SyntaxError, ValueError):
        return frozenset(names)
