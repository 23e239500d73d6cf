"""Cells that made draws and were run again or edited, or whose variables were rebound: their draws may not come again.

A kernel does not see the order of the cells in the notebook, so nothing here predicts what Run All would give. It sees
that a cell drew and was run again, which Run All does only once. And it sees that the cell which bound a variable was
run again after another cell had drawn with that variable.

Nothing here imports IPython.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from ..base.tokens import assigned_names, statements
from .journal import FRESH, ExecutedCell

Transform = Callable[[str], str]
"""Turns a cell's text into Python, as IPython does."""


class Rerun(Struct, frozen=True):
    """A cell that made draws and was run again since, or uses a variable that was rebound since.

    Attributes:
      numbers: execution counts of the cell, in order.
      known: the frontend sends cell ids. Without them, equal texts count as the same cell.
      edited: the text differed between executions.
      rebound: variable that the last execution's calls use → the last other cell that rebound it since the first one.
      since: variable that the last draw's calls use → the last cell that had bound it and was run again after the draw,
        edited or with code that changes the variable again, such as `x = x + 1`.
    """

    numbers: tuple[int, ...]
    known: bool
    edited: bool
    rebound: Mapping[str, int]
    since: Mapping[str, int] = {}

    @property
    def text(self) -> str:
        """`cell [4] was edited and ran 3 times; x changed in [7]`: the cell by its last number, which a notebook shows."""
        cell, times = f"cell [{self.numbers[-1]}]", len(self.numbers)
        if times == 1:
            return f"{cell} ran before {_by(self.since)}"
        edited = " was edited and" if self.edited and self.known else ""
        ran = f"{'' if self.known else 'the text of '}{cell}{edited} ran {'twice' if times == 2 else f'{times} times'}"
        # Whether before or after the last draw, the numbers tell.
        return "; ".join(filter(None, (ran, _by({**self.rebound, **self.since}))))

    def marks(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Execution count → remarks on the draws of that execution, for the history table."""
        last = self.numbers[-1]
        for number in self.numbers[:-1]:
            what = "cell edited" if self.edited else "cell run again" if self.known else "the same text run again"
            yield number, (f"{what} since, as [{last}]",)
        between = (f"{_by(self.rebound)}, after [{self.numbers[0]}]",) if self.rebound else ()
        after = (_by(self.since, " since,"),) if self.since else ()
        if between or after:
            yield last, (*between, *after)


def _by(names: Mapping[str, int], since: str = "") -> str:
    """`x changed in [7], net changed in [8]`"""
    return ", ".join(f"{name} changed{since} in [{number}]" for name, number in names.items())


def reruns(cells: Iterable[ExecutedCell], drew: Mapping[int, Iterable[str]], transform: Transform) -> tuple[Rerun, ...]:
    """The cells whose draws may not come again, in the order of their first execution.

    Args:
      cells: every execution, in order.
      drew: execution count of each cell that drew → its calls as they were written.
      transform: turns a cell's text into Python, as IPython does.
    """
    executed = _since_restart([cell for cell in cells if cell.number is not None])
    bindings = _Bindings(executed, transform)
    by_cell: dict[str, list[ExecutedCell]] = {}
    for one in executed:
        by_cell.setdefault(one.identity, []).append(one)

    def uses(one: ExecutedCell) -> frozenset[str]:
        return _used(drew.get(_number(one), ()), one.text) - bindings.of(one)

    rows = []
    for executions in by_cell.values():
        # What failed before it drew anything was no run of the cell.
        runs = [run for run in executions if run.error is None or _number(run) in drew]
        drawing = [run for run in runs if _number(run) in drew]
        if not drawing:
            continue
        # Not by text alone: a model cell whose models are unchanged differs in comments or layout only.
        edited = len({run.text.strip() for run in runs if not _unchanged(run)} | {runs[0].text.strip()}) > 1
        # A cell of which only one execution drew draws once in Run All, too, unless it was edited since.
        again = len(runs) > 1 and (len(drawing) > 1 or (edited and drawing[0] is not runs[-1]))
        last = runs[-1] if again else drawing[-1]
        rebound = bindings.between(uses(last), runs[0], last) if again else {}
        since = bindings.after(uses(last), last) if last is drawing[-1] else {}
        if again or since:
            numbers = tuple(map(_number, runs)) if again else (_number(last),)
            rows.append(Rerun(numbers, runs[0].cell is not None, edited, rebound, since))
    return tuple(sorted(rows, key=lambda row: row.numbers))


def _since_restart(executed: list[ExecutedCell]) -> list[ExecutedCell]:
    """The executions since the last fresh start: `--fresh`, or a repeated cell that restarts the root key."""
    start, restarting = 0, set[str]()
    for at, one in enumerate(executed):
        if one.restarted == FRESH or (one.restarted and one.identity in restarting):
            start = at
        if one.restarted:
            restarting.add(one.identity)
    return executed[start:]


class _Bindings:
    """The names that each executed cell bound, parsed once for each text."""

    def __init__(self, executed: Sequence[ExecutedCell], transform: Transform) -> None:
        self.executed, self.transform = executed, transform
        self._known: dict[object, frozenset[str]] = {}

    def of(self, one: ExecutedCell) -> frozenset[str]:
        """The names that an execution bound at the cell's top level; empty where its text does not parse."""
        what = one.text, one.error, one.line, one.registered
        if what not in self._known:
            self._known[what] = _bound(one, self.transform)
        return self._known[what]

    def between(self, names: frozenset[str], first: ExecutedCell, last: ExecutedCell) -> dict[str, int]:
        """Those of `names` that another cell rebound between two executions of a cell → number of the last one."""
        bound_by: dict[str, ExecutedCell] = {}
        rebound: dict[str, int] = {}
        for other in self.executed if names else ():
            if _number(other) < _number(first):
                bound_by |= dict.fromkeys(names & self.of(other), other)
            elif _number(other) < _number(last) and other.identity != first.identity:
                again = {name for name in names & self.of(other) if self._differs(name, bound_by.get(name), other)}
                rebound |= dict.fromkeys(sorted(again), _number(other))
        return rebound

    def after(self, names: frozenset[str], drew: ExecutedCell) -> dict[str, int]:
        """Those of `names` that a cell had bound before the draw and may have changed when it ran again after the draw.

        A new cell after the draw does not count: it most likely stands below, and Run All reaches it later. Nor does an
        unchanged cell, which most likely binds the same value again.
        """
        earlier: dict[tuple[str, str], ExecutedCell] = {}
        rebound: dict[str, int] = {}
        for other in self.executed if names else ():
            if other.identity == drew.identity:
                continue
            for name in sorted(names & self.of(other)):
                cell = other.identity, name
                if _number(other) < _number(drew):
                    earlier[cell] = other
                elif cell in earlier and self._differs(name, earlier[cell], other):
                    rebound[name] = _number(other)
        return rebound

    def _differs(self, name: str, earlier: ExecutedCell | None, later: ExecutedCell) -> bool:
        """Whether `later` may have bound `name` to another value than `earlier`; not if it is that cell, unchanged."""
        if earlier is None or earlier.identity != later.identity or earlier.text.strip() != later.text.strip():
            return True
        if any(row.name == name and row.state == "changed" for row in later.registered):
            return True
        return name in _going_on(later.text, self.transform)


def _going_on(text: str, transform: Transform) -> set[str]:
    """The names that a cell reads before it binds them, as in `x = x + 1`: another execution gives another value."""
    read, bound = set[str](), set[str]()
    for statement in statements(text, transform):
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        updated = statement.target if isinstance(statement, ast.AugAssign) else None
        read |= {name.id for name in names if isinstance(name.ctx, ast.Load) or name is updated} - bound
        bound.update(assigned_names(statement))
    return read


def _unchanged(one: ExecutedCell) -> bool:
    return bool(one.registered) and all(row.state == "unchanged" for row in one.registered)


def _number(one: ExecutedCell) -> int:
    assert one.number is not None
    return one.number


def _used(calls: Iterable[str], text: str) -> frozenset[str]:
    """The names that the calls read; only calls written in the cell itself count, not those in functions elsewhere."""
    squeezed = "".join(text.split())
    written = [call for call in set(calls) if "".join(call.split()) in squeezed]
    nodes = (node for call in written for statement in statements(call) for node in ast.walk(statement))
    return frozenset(node.id for node in nodes if isinstance(node, ast.Name))


def _bound(one: ExecutedCell, transform: Transform) -> frozenset[str]:
    """`_Bindings.of`, computed: names that statements, a `%%flaxmodel` line and registrations bound."""
    text = one.text
    first, _, body = text.lstrip().partition("\n")
    names: set[str] = set()
    if first.startswith("%%"):
        target, equals, _ = first.partition("=")
        if equals and first.startswith("%%flaxmodel"):
            names.add(target.split()[-1])
        # Bodies of other cell magics may be no Python or run elsewhere. How far a failed one got is unknown.
        text = body if re.match(r"%%(flax|time\b|capture\b)", first) and one.error is None else ""
    names.update(row.name for row in one.registered)
    nodes = statements(text, transform)
    if one.error is not None:  # only the statements above the failing line have run for sure
        names.clear()
        nodes = [each for each in nodes if one.line is not None and (each.end_lineno or 0) < one.line]
    names.update(assigned_names(ast.Module(nodes, [])))
    # An unchanged model keeps the registered object: its name was not rebound.
    return frozenset(names - {row.name for row in one.registered if row.state == "unchanged"})
