"""Every draw of a session as a record, shown by `%flax_history` as text and HTML; and finding the runs of a draw."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import overload

import jax
from msgspec import Struct

from ..base.text import DIGITS, cell_len, clean, count, cut, dotted, plural, seconds, width, wrap
from ..base.text import table as lined_up
from ..errors import FlaxMagicsError
from ..report.curve import outcome
from ..report.html import render, shown_bundle
from ..rng.keys import RootKey, RunKeys, short_key
from ..run import COMMANDS, CommandName, DrawNumber, Run, repr_without
from ..state import runs
from ..state.runs import RunLog, StoredRun
from ..state.state import State


def history_html(history: History, table: Table | None = None) -> str:
    """The table of `%flax_history` as HTML, of the last `SHOWN` rows if no `table` is given."""
    shown, said = table or rows(history)
    context = {"heading": heading(history), "rows": shown, "left_out": said, "nothing": NONE}
    return render("history.html", {**context, "strip": strip_of(history.rows), "compiled": compiled(history)})


def history_bundle(history: History, everything: bool, style: str) -> dict[str, object]:
    """The MIME bundle of `%flax_history`; `everything`: all rows, not only the last `SHOWN`."""
    table = rows(history, everything=everything)
    return shown_bundle(history_text(history, table), lambda: history_html(history, table), style)


KEYS_ALONE = "replayed, its keys alone"
"""Marks a run that took the keys of an earlier draw (`--keys-of`)."""


class DrawRow(Struct, frozen=True, eq=False, dict=True):
    """One draw, or one of the runs that shared a draw.

    Attributes:
      seed, draw: which draw of which seed.
      samples: how many draws it took at once, None for one.
      command: what drew.
      name: the model's; for a key its stream.
      mode: as in `Run`; empty for an init or a key.
      call: as it was written.
      cell: the cell's number, None outside a notebook.
      started: seconds since the epoch.
      marks: `replayed` if it was run again, `GONE` if it cannot be, `KEYS_ALONE` if it took the keys of an earlier draw,
        and what became of the cell since.
    """

    seed: int
    draw: int
    samples: int | None
    command: CommandName
    name: str
    mode: str
    call: str
    cell: int | None
    started: float
    marks: tuple[str, ...]
    _stored: StoredRun

    def __repr__(self) -> str:
        return repr_without(self, "_stored")

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """Stream → the first word of its key in hex, for the streams that the run consumed."""
        keys, used = self._stored.facts.keys, self._stored.facts.used
        if COMMANDS[self.command].forward:
            taken = dict.fromkeys((*(("params",) if self.initialises else ()), *used))
            return {name: _word(keys, name) for name in taken if name in keys}
        return {name: _word(keys, name) for name in keys}

    @cached_property
    def inputs(self) -> str:
        """Dtypes and shapes of the arguments, `float32[3,4,4], train=True`; empty for a key."""
        return self._stored.shapes if COMMANDS[self.command].model else ""

    @cached_property
    def digest(self) -> str | None:
        """The output's digest, computed now if the output is still there; None if it is gone."""
        return self._stored.run().digest

    @property
    def weights(self) -> str:
        """Whose variables were used, such as `initialised in draw 1`; empty for a key."""
        return self._stored.facts.weights

    @property
    def trained(self) -> tuple[str, ...]:
        """How far a training is, and its last loss and metrics: `step 300 of 500`, `interrupted`, `loss 0.231`."""
        curve = self._stored.facts.trained
        return () if curve is None else outcome(curve)

    @property
    def initialises(self) -> bool:
        """Whether it made variables, as an init does, or an apply that found none."""
        return self._stored.facts.made is not None

    @property
    def last(self) -> int:
        """The number of the last draw that it took: more than `draw` if it took several."""
        return self.draw + (self.samples or 1) - 1

    @property
    def building(self) -> float:
        """Seconds for which a program was compiled; 0.0 where none was."""
        return self._stored.facts.timing.building if self._stored.facts.program == "compiled" else 0.0

    @property
    def seconds(self) -> float:
        """How long it took, with its init and with the compilation of its program."""
        facts = self._stored.facts
        ran = facts.timing.run if facts.trained is None else facts.trained.seconds
        return facts.timing.init + facts.timing.building + ran

    @property
    def run(self) -> Run:
        """The Run. A field of which an array is gone is `RELEASED` as a whole."""
        return self._stored.run()


def _word(keys: Mapping[str, jax.Array], name: str) -> str:
    return keys.word(name) if isinstance(keys, RunKeys) else short_key(keys[name])


@dataclass(frozen=True, eq=False)
class History(Sequence[DrawRow]):
    """The draws of a session, oldest first: a sequence of `DrawRow`, shown as a table.

    Attributes:
      earlier: how many draws before these were left out.
      seed: the seed under which the next draw is made.
    """

    rows: tuple[DrawRow, ...]
    earlier: int
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> DrawRow: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[DrawRow, ...]: ...
    def __getitem__(self, at: int | slice) -> DrawRow | tuple[DrawRow, ...]:
        return self.rows[at]

    def __str__(self) -> str:
        return history_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return history_html(self)


def of_runs(
    chain: RunLog | None, root: RootKey, last: int | None, model: str | None, cells: Mapping[int, tuple[str, ...]]
) -> History:
    """Makes the History of a session; see `Session.history` for the arguments.

    Raises:
      FlaxMagicsError: `last` is not a number of draws.
    """
    if last is not None and (isinstance(last, bool) or not isinstance(last, int) or last < 1):
        raise FlaxMagicsError(f"`last` is a number of draws, 1 or more, not {last!r}.")
    wanted = (stored for stored in runs.backwards(chain) if model is None or stored.facts.model == model)
    rows = [_drawn(stored, cells) for stored in islice(wanted, last)][::-1]
    # What is left of the generator are the rows before the last ones.
    return History(tuple(rows), sum(1 for _ in wanted), root.seed)


def _drawn(stored: StoredRun, cells: Mapping[int, tuple[str, ...]]) -> DrawRow:
    facts = stored.facts
    times, differs = stored.replays
    marks = [KEYS_ALONE] if facts.replayed else []
    if times:
        marks.append("replayed, and it differed" if differs else "replayed")
    if COMMANDS[facts.command].model and (stored.origin is None or stored.inputs is None):
        marks.append(GONE)
    if facts.elsewhere is None:  # a run of another process has a cell number of another kernel
        marks += cells.get(facts.cell or 0, ())
    same = {
        name: getattr(facts, name) for name in ("seed", "draw", "samples", "command", "mode", "call", "cell", "started")
    }
    name = (COMMANDS[facts.command].model and facts.model) or facts.call
    return DrawRow(**same, name=name, marks=tuple(marks), _stored=stored)


def find(state: State, draw: int | tuple[int, int] | str | Run) -> list[StoredRun]:
    """The stored runs that a replay of `draw` repeats, in order.

    Raises:
      FlaxMagicsError: there is no such draw.
    """
    if isinstance(draw, Run):
        for stored in runs.backwards(state.runs):
            # The copies of a Run share this object, whatever notes they have.
            if stored.facts._taken is draw._taken:
                return [stored]
        wanted: DrawNumber = (draw.seed, draw.draw)
    elif draw == "last":
        drawn = (stored.facts for stored in runs.backwards(state.runs) if not stored.facts.replayed)
        wanted = next(((facts.seed, facts.draw) for facts in drawn), (state.root.seed, 0))
    elif isinstance(draw, str):
        raise FlaxMagicsError(f"a draw is a number, (seed, number), 'last' or a Run, not {draw!r}.")
    else:
        wanted = draw
    seed, number = state.check_draw(wanted)
    drawn_then = runs.of_draw(state.runs, seed, number)
    if not drawn_then:
        raise FlaxMagicsError(f"draw {number} of seed {seed} has no run that could be run again.")
    return drawn_then


SHOWN = 60
"""How many rows are shown, the last ones."""
REPLAYED = "replayed"
GONE = "no replay"
"""Marks a run of which not all is kept that `%flax_replay` needs, which says why."""
FOLDED = 3
"""From this many on, runs of one cell and call that follow each other are one row."""
BY_TURNS = 12
"""From this many rows of one cell on, runs of the same call are one row even if others stand between them."""
COMPILED = 8
"""Of how many compilations the reasons are shown, the longest."""
STEPS = "the steps of a training"
PAUSE = 60.0
"""Between two runs more seconds than these are cut out of the strip."""
WIDE, GAP = 600, 24
"""The width of the strip, and of the gap that stands for a pause."""
NONE = "no draw yet: %flax_apply net(x) makes one"


class HistoryRow(Struct, frozen=True):
    """A row of the table: one draw, or several that one cell made, as the text of each column."""

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
    """Where the weights came from, if that has changed since the model's row before."""
    trained: tuple[str, ...] = ()


def heading(history: History) -> list[str]:
    """The parts of the first line: `history`, `12 draws`, `seed 0`, and the date of the first draw."""
    rows = history.rows
    seeds = list(dict.fromkeys([*(row.seed for row in rows), history.seed]))
    seed = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    first = [time.strftime("%Y-%m-%d", time.localtime(row.started)) for row in rows[:1]]
    return ["history", plural(len(rows) + history.earlier, "run"), seed, *first]


Cells = tuple[tuple[str, ...], ...]
"""Rows of a table: the text of each cell."""
Table = tuple[tuple[HistoryRow, ...], str]
"""The rows to show, and a remark on those that are not shown."""


def compiled(history: History) -> tuple[str, Cells]:
    """How many programs were compiled and how long that took, and of the longest `COMPILED` draw, time and reason."""
    new = [row for row in history.rows if row.building]
    longest = set(map(id, sorted(new, key=lambda row: -row.building)[:COMPILED]))
    several = _several(history)
    cells = tuple(
        (_number(row, several), seconds(row.building), clean(row._stored.facts.reason) or STEPS)
        for row in new
        if id(row) in longest
    )
    said = f"compiled {plural(len(new), 'time')}, in {seconds(sum(row.building for row in new))}" if new else ""
    return said + (f"; the longest {COMPILED}" if len(cells) < len(new) else ""), cells


class Strip(Struct, frozen=True):
    """The runs as a picture in time, `WIDE` from left to right.

    Attributes:
      said: all of it in words, for those who do not see it.
      begin, end: when the first run began, and when the last one ended.
      runs: where each began, to the nearest unit; those of which a program was compiled are in `compiled`, too.
      trainings: where each began, and how wide it is.
      pauses: where a pause of more than `PAUSE` seconds was cut out, and how wide the gap is that stands for it.
    """

    said: str
    begin: str
    end: str
    runs: tuple[int, ...]
    compiled: tuple[int, ...]
    trainings: tuple[tuple[float, float], ...]
    pauses: tuple[tuple[float, float], ...]


def strip_of(rows: Sequence[DrawRow]) -> Strip | None:
    """The runs as a strip in time; None where they took less than a second in all, to which times are shown."""
    spans, pauses, at = [], list[float](), 0.0  # `at`: seconds from the left, pauses left out
    until = rows[0].started if rows else 0.0
    for row in rows:
        since = row.started - until
        if since > PAUSE:
            pauses.append(at)
            since = 0.0
        begin = max(0.0, at + since)
        spans.append((begin, begin + row.seconds, len(pauses)))
        at, until = max(at, begin + row.seconds), max(until, row.started + row.seconds)
    if not rows or at < 1:
        return None
    gap = min(GAP, WIDE / 2 / len(pauses)) if pauses else 0.0
    unit = (WIDE - gap * len(pauses)) / at
    begins = [begin * unit + before * gap for begin, _, before in spans]
    is_training = [COMMANDS[row.command].trains for row in rows]
    day = "%Y-%m-%d " if time.localtime(until)[:3] != time.localtime(rows[0].started)[:3] else ""
    first = time.strftime("%H:%M:%S", time.localtime(rows[0].started))
    last = time.strftime(f"{day}%H:%M:%S", time.localtime(until))
    new = sum(1 for row in rows if row.building)
    return Strip(
        f"{plural(len(rows), 'run')} from {first} to {last}; a program was compiled for {new} of them",
        first,
        last,
        runs=tuple(sorted({round(place) for place in begins})),
        compiled=tuple(sorted({round(place) for place, row in zip(begins, rows, strict=True) if row.building})),
        trainings=tuple(
            (place, max(2.0, (end - begin) * unit))
            for place, (begin, end, _), trains in zip(begins, spans, is_training, strict=True)
            if trains
        ),
        pauses=tuple((place * unit + n * gap, gap) for n, place in enumerate(pauses)),
    )


def rows(history: History, *, everything: bool = False) -> Table:
    """The rows, oldest first (the last `SHOWN`, or all), and a remark on those that are not shown, or an empty one."""
    several = _several(history)
    groups = list(_groups(history.rows))
    hidden = 0 if everything else max(0, len(groups) - SHOWN)
    missing = sum(map(len, groups[:hidden])) + history.earlier
    how = "not shown: %flax_history --all" if hidden else "left out"
    said = f"{plural(missing, 'earlier run')} {how}" if missing else ""
    news = _weights(groups)
    return tuple(_row(group, several, news[i]) for i, group in enumerate(groups) if i >= hidden), said


def _several(history: History) -> bool:
    """Whether there were draws of several seeds, so that a draw's number says too little."""
    return len({row.seed for row in history.rows} | {history.seed}) > 1


def _number(row: DrawRow, several: bool) -> str:
    return f"{row.seed}:{row.draw}" if several else f"{row.draw}"


def _weights(groups: list[list[DrawRow]]) -> list[str]:
    """For each group of rows, whose weights ran if these are not those that the model ran with before; else empty."""
    last: dict[str, str] = {}
    news = []
    for group in groups:
        row = group[0]
        known = last.get(row.name, row.weights)
        news.append(row.weights if not row.initialises and row.weights != known else "")
        if COMMANDS[row.command].model:
            last[row.name] = group[-1].weights
    return news


def history_text(history: History, table: Table | None = None) -> str:
    """The table of `%flax_history` as text in 80 columns, of the last `SHOWN` rows if no `table` is given."""
    shown, said = table or rows(history)
    lines = dotted(heading(history))
    if not shown:
        return "\n".join([*lines, f"  {NONE}"])
    lines += [f"  {said}"] if said else []
    titles = ("draw", "what", "digest", "cell", "time")
    cells = [(row.draw, row.what, row.digest, row.cell, row.time) for row in shown]
    wide = [max(len(title), *(cell_len(cell[at]) for cell in cells)) for at, title in enumerate(titles)]
    # The second column gives way if the line is too long; before each column are two blanks.
    wide[1] = min(wide[1], width() - sum(wide) + wide[1] - 2 * len(wide))
    lines.append(_line(titles, wide))
    for row, cell in zip(shown, cells, strict=True):
        lines.append(_line((cell[0], cut(cell[1], wide[1]), *cell[2:]), wide))
        indent = " " * (4 + wide[0])
        about = [part for part in (*row.trained, row.inputs, *row.keys, row.weights, *row.replayed) if part]
        lines += [indent + part for part in dotted(about, width() - len(indent))] if about else []
        for mark in row.marks:
            lines += wrap(mark, f"{indent}! ", f"{indent}  ")
    said, programs = compiled(history)
    lines += ["", f"  {said}", *(line.rstrip() for line in lined_up(programs, indent="    "))] if said else []
    return "\n".join(lines)


def _line(cells: Iterable[str], wide: list[int]) -> str:
    draw, *others = cells
    padded = [cell + " " * (most - cell_len(cell)) for cell, most in zip(others, wide[1:], strict=True)]
    return "  ".join(["", draw.rjust(wide[0]), *padded]).rstrip()


def _groups(rows: Iterable[DrawRow]) -> Iterator[list[DrawRow]]:
    """Groups the draws that make one row: runs of the same call and mode, one after the other in one cell.

    Where a loop makes several calls in turn, the runs of each call are one group.
    """
    for _, of_cell in itertools.groupby(rows, lambda row: (row.seed, row.cell)):
        drawn = list(of_cell)
        groups = [group for _, alike in itertools.groupby(drawn, _folds_by) for group in _parted(list(alike))]
        if len(groups) > BY_TURNS and drawn[0].cell is not None:
            by_kind: dict[object, list[DrawRow]] = {}
            for row in drawn:
                by_kind.setdefault(_folds_by(row), []).append(row)
            groups = [group for alike in by_kind.values() for group in _parted(alike)]
        yield from groups


def _parted(group: list[DrawRow]) -> list[list[DrawRow]]:
    return [group] if len(group) >= FOLDED else [[row] for row in group]


def _folds_by(row: DrawRow) -> tuple[object, ...]:
    return row.command, row.name, row.mode, row.marks, row.call, row.weights, row.trained and row.draw


def _row(group: list[DrawRow], several: bool, weights: str) -> HistoryRow:
    first, last = group[0], group[-1]
    draw = _number(first, several)
    if first.draw != last.last:
        # If other calls stand between, the numbers are not consecutive, and no dash may say so.
        through = last.last - first.draw < sum(row.samples or 1 for row in group)
        draw += f"–{last.last}" if through else f" … {last.last}"
    mode = "" if first.mode in ("", "as written", first.command) else f" {first.mode}"
    what = clean(f"{first.command} {first.name}{mode}")
    inputs = first.inputs if first.inputs == last.inputs else f"{first.inputs} … {last.inputs}"
    keys = [f"{clean(stream)} {word}" for stream, word in first.keys.items()]
    if len(group) > 1 or first.last != first.draw:
        keys = [f"{key} …" for key in keys]
    digest = f"{count(len(group))} runs" if len(group) > 1 else (first.digest or "")[:DIGITS] or "not taken"
    cell = "" if first.cell is None else f"[{first.cell}]"
    at = time.strftime("%H:%M:%S", time.localtime(first.started))
    replays = tuple(mark for mark in map(clean, first.marks) if mark.startswith((REPLAYED, GONE)))
    marks = tuple(mark for mark in map(clean, first.marks) if not mark.startswith((REPLAYED, GONE)))
    weights = f"weights {clean(weights)}" if weights else ""
    return HistoryRow(draw, what, digest, cell, at, clean(inputs), tuple(keys), replays, marks, weights, first.trained)
