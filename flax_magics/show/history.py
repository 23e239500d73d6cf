"""The draws of a session as text, complete in 80 columns: two lines a draw, and one row for the many of one cell."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len

from .columns import WIDTH, clean, cut, dotted, wrap
from .units import count, plural

if TYPE_CHECKING:
    from ..past import Drawn, History

SHOWN = 60
"""Rows that are shown; of more the last."""
REPLAYED = "replayed"
FOLDED = 3
"""So many runs of one cell are one row."""
BY_TURNS = 12
"""Rows of one cell, from which on the runs of one call are one row wherever they stand in it."""
NONE = "no draw yet: %flax_apply net(x) makes one"


@dataclass(frozen=True)
class Row:
    """One draw, or several that one cell made of one model: the words of each column."""

    draw: str
    what: str
    digest: str
    cell: str
    time: str
    inputs: str
    keys: tuple[str, ...]
    replayed: tuple[str, ...]
    marks: tuple[str, ...]
    weights: str = ""
    """Whose ran, where that is another answer than for the model's row before."""


def heading(history: History) -> tuple[str, ...]:
    """`history`, `12 draws`, `seed 0`."""
    rows = history.rows
    seeds = list(dict.fromkeys([*(row.seed for row in rows), history.seed]))
    first = time.strftime("%Y-%m-%d", time.localtime(rows[0].started)) if rows else ""
    seed = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    return (
        "history",
        plural(len(rows) + history.earlier, "run"),
        seed,
        first,
    )


def rows(history: History, *, everything: bool = False) -> tuple[tuple[Row, ...], str]:
    """The rows, oldest first, the last `SHOWN` or all; and what is said of those that are not shown."""
    several = len({row.seed for row in history.rows} | {history.seed}) > 1
    groups = list(_groups(history.rows))
    hidden = 0 if everything else max(0, len(groups) - SHOWN)
    missing = sum(map(len, groups[:hidden])) + history.earlier
    said = ""
    if hidden:
        said = f"{plural(missing, 'earlier run')} not shown: %flax_history --all"
    elif missing:
        said = f"{plural(missing, 'earlier run')} left out"
    news = _weights(groups)
    return tuple(_row(group, several, news[i]) for i, group in enumerate(groups) if i >= hidden), said


def _weights(groups: list[list[Drawn]]) -> list[str]:
    """For each row whose weights ran, where the model has run with others before."""
    last: dict[str, str] = {}
    news = []
    for group in groups:
        row = group[0]
        known = last.get(row.name, row.weights)
        news.append("" if row.command == "key" or row.initialises or row.weights == known else row.weights)
        if row.command != "key":
            last[row.name] = group[-1].weights
    return news


def history_text(history: History, *, everything: bool = False) -> str:
    """What `%flax_history` shows; `everything`: all rows, however many."""
    shown, said = rows(history, everything=everything)
    lines = dotted(heading(history))
    if not shown:
        return "\n".join([*lines, f"  {NONE}"])
    lines += [f"  {said}"] if said else []
    titles = ("draw", "what", "digest", "cell", "time")
    cells = [(row.draw, row.what, row.digest, row.cell, row.time) for row in shown]
    wide = [max(len(title), *(cell_len(cell[at]) for cell in cells)) for at, title in enumerate(titles)]
    wide[1] = min(wide[1], WIDTH - 2 - wide[0] - sum(wide[2:]) - 8)
    lines.append(_line(titles, wide))
    for row, cell in zip(shown, cells, strict=True):
        lines.append(_line((cell[0], cut(cell[1], wide[1]), *cell[2:]), wide))
        indent = " " * (4 + wide[0])
        about = [part for part in (row.inputs, *row.keys, row.weights, *row.replayed) if part]
        lines += [indent + part for part in dotted(about, WIDTH - len(indent))] if about else []
        for mark in row.marks:
            lines += wrap(mark, f"{indent}! ", f"{indent}  ")
    return "\n".join(lines)


def _line(cells: Iterable[str], wide: list[int]) -> str:
    draw, *others = cells
    padded = [cell + " " * (width - cell_len(cell)) for cell, width in zip(others, wide[1:], strict=True)]
    return "  ".join(["", draw.rjust(wide[0]), *padded]).rstrip()


def _groups(found: tuple[Drawn, ...]) -> Iterator[list[Drawn]]:
    """Draws one by one; those that follow each other in one execution of a cell, of one call and mode, together.

    Where a loop makes several calls by turns, those of each are together.
    """
    for _, of_cell in itertools.groupby(found, lambda row: (row.seed, row.cell)):
        drawn = list(of_cell)
        groups = [group for _, alike in itertools.groupby(drawn, _kind) for group in _parted(list(alike))]
        if len(groups) > BY_TURNS and drawn[0].cell is not None:
            by_kind: dict[object, list[Drawn]] = {}
            for row in drawn:
                by_kind.setdefault(_kind(row), []).append(row)
            groups = [group for alike in by_kind.values() for group in _parted(alike)]
        yield from groups


def _parted(group: list[Drawn]) -> Iterator[list[Drawn]]:
    if len(group) < FOLDED:
        yield from ([row] for row in group)
    else:
        yield group


def _kind(row: Drawn) -> tuple[object, ...]:
    return row.command, row.name, row.mode, row.marks, row.call, row.weights


def _row(group: list[Drawn], several: bool, weights: str) -> Row:
    first, last = group[0], group[-1]
    seed = f"{first.seed}:" if several else ""
    draw = f"{seed}{first.draw}"
    if first.draw != last.last:
        # By turns: others are in between.
        through = last.last - first.draw < sum(row.draws or 1 for row in group)
        draw += f"–{last.last}" if through else f" … {last.last}"
    what = f"key {first.name}" if first.command == "key" else f"{first.command} {first.name}"
    mode = "" if first.mode in ("", "as written") else f" {first.mode}"
    inputs = first.inputs if first.inputs == last.inputs else f"{first.inputs} … {last.inputs}"
    keys = [f"{clean(stream)} {word}" for stream, word in first.keys.items()]
    if len(group) > 1 or first.last != first.draw:
        keys = [f"{key} …" for key in keys]
    digest = f"{count(len(group))} runs" if len(group) > 1 else first.digest or "not taken"
    marks = tuple(map(clean, first.marks))
    return Row(
        draw,
        clean(what + mode),
        digest,
        "" if first.cell is None else f"[{first.cell}]",
        time.strftime("%H:%M:%S", time.localtime(first.started)),
        clean(inputs),
        tuple(keys),
        tuple(mark for mark in marks if mark.startswith(REPLAYED)),
        tuple(mark for mark in marks if not mark.startswith(REPLAYED)),
        f"weights {clean(weights)}" if weights else "",
    )
