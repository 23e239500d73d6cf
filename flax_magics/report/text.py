"""A run as text, complete by itself in 80 columns; further runs of its cell in one line; other news in a line each."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from ..base.digest import all_words
from ..base.text import WIDTH, clean, clean_lines, count, dotted, flow, seconds, table, wrap
from ..run import recorded
from . import facts
from .facts import Level, Row

if TYPE_CHECKING:
    from ..cells.journal import Registered
    from ..run import Note, Run


def line(run: Run, width: int = WIDTH) -> str:
    """`net · train · cpu:0 · draw 2 · reused · run 0.22 ms`: one line, unless its names need two."""
    parts = (facts.name_of(run), facts.mode_of(run), clean(run.device), *facts.brief(run))
    return "\n".join(dotted(parts, width))


def normal(run: Run) -> str:
    """Header, one row for each thing there is to say, and the sharp bits."""
    return "\n".join([*head(run), *columns(facts.rows(run)), *notes(run.notes)])


def details(run: Run) -> str:
    """The normal form with keys, phases, memory and digest in full, and the run by hand."""
    keys = [(key.stream, key.fingerprint or "-", key.made_by, f"→ {key.takers}") for key in facts.key_facts(run)]
    key_row = Row("keys", tuple(table(keys, width=WIDTH - 10)))
    rows = [Row("call", (clean(run.call),))] if run.call else []
    for row in facts.rows(run):
        if row.label not in ("keys", "memory"):
            rows.append(row)
        if row.label == "out":
            rows.append(Row("", facts.values_of(run)))
        elif row.label == "jit":
            rows.append(Row("", tuple(f"{phase.name} {phase.text}" for phase in facts.building(run))))
        elif row.label == "keys":
            rows.append(key_row)
    if key_row not in rows:
        rows.append(key_row)
    memory = tuple(f"{name} {amount}" for name, amount in facts.memory_facts(run))
    rows.append(Row("memory", (*memory, "(by XLA's analysis)") if memory else ()))
    rows.append(Row("digest", (run.digest,) if run.digest else ()))
    lines = [*head(run), *columns(rows, tables=("keys",))]
    code = clean_lines(run.by_hand)
    if code:
        lines.append("  by hand")
    for line in code:
        # Breaks fall on spaces, which inside a bracket is still Python; what goes on hangs under its own indentation.
        body = line.lstrip(" ")
        indent = "    " + " " * min(len(line) - len(body), 40)
        lines += wrap(body, indent, indent + "    ")
    return "\n".join([*lines, *notes(run.notes)])


def report(run: Run, level: Level) -> str:
    """The run at one level; sharp bits are said at every level, and at `off` nothing else is."""
    if level == "details":
        return details(run)
    if level == "normal":
        return normal(run)
    if level == "line":
        first = facts.new_session(run)
        return "\n".join([*([first] if first else []), line(run), *notes(run.notes)])
    return "\n".join(notes(run.notes))


def head(run: Run) -> list[str]:
    """The header of the longer forms, below `new session, seed 0` if it is the first."""
    lines = [facts.new_session(run)] if run.first else []
    if facts.REPORTED[run.command].line_alone:
        return lines + dotted((facts.name_of(run), *facts.brief(run)))
    mode, switch = facts.mode_of(run), clean(run.switch)
    mode = f"{mode} ({switch})" if switch and mode else switch or mode
    return lines + dotted((facts.name_of(run), mode, clean(run.device), facts.draw_of(run, seed=True)))


def columns(rows: Iterable[Row], tables: Collection[str] = ()) -> list[str]:
    """Rows with their labels in one column; items stand four spaces apart and hang under the first.

    Args:
      rows: those without items are left out.
      tables: labels of the rows whose items are lines of a table and stand below each other.
    """
    shown = [row for row in rows if row.items]
    labels = max([4, *(len(row.label) for row in shown)])
    hang = " " * (labels + 4)
    lines: list[str] = []
    for row in shown:
        first = f"  {row.label:{labels}}  "
        if row.label in tables:
            lines += [f"{hang if n else first}{item}" for n, item in enumerate(row.items)]
        else:
            lines += flow(row.items, first, hang)
    return lines


def notes(sharp_bits: Iterable[Note]) -> list[str]:
    """The sharp bits: `! text`, and beneath each the line that mends it."""
    lines: list[str] = []
    for note in sharp_bits:
        first, *others = clean_lines(note.text) or [""]
        lines += wrap(first, "! ", "  ")
        lines += [wrapped for other in others for wrapped in wrap(other, "  ")]
        for label, text in note.advice:
            for n, code in enumerate(clean_lines(text)):
                begin = f"  {label}" if n == 0 else " " * (2 + len(label))
                # A line to be pasted stays one line.
                lines += [begin + code] if label == "write: " else wrap(code, begin)
    return lines


@dataclass
class Loop:
    """What the runs of one cell execution add up to. Begin with `Loop()` and `add` each run.

    Attributes:
      model, mode, device: the names that occurred, in order, joined by commas.
      draws: lowest and highest draw number, (0, 0) before the first run.
      runs: how many runs were added.
      programs: `compiled`, `reused`, `disk cache`, `eager` → how many runs.
      building: seconds of trace, lower and compile together.
      times: seconds on the device of each forward run.
      changed: collection → updates after the latest run.
      weights: whose weights ran, in order, joined by commas.
      notes: the sharp bits, each once.
    """

    model: str = ""
    mode: str = ""
    device: str = ""
    draws: tuple[int, int] = (0, 0)
    runs: int = 0
    programs: Counter[str] = field(default_factory=Counter)
    building: float = 0.0
    times: list[float] = field(default_factory=list)
    changed: dict[str, int] = field(default_factory=dict)
    weights: str = ""
    notes: tuple[Note, ...] = ()

    def add(self, run: Run) -> None:
        """One more run. Costs the same for the thousandth run as for the first."""
        if run.kind.forward:
            self.programs.update([run.program] if run.program else [])
            self.times.append(run.timing.steady.median if run.timing.steady else run.timing.run)
        self.model = _joined(self.model, facts.name_of(run))
        self.mode = _joined(self.mode, facts.mode_of(run))
        self.device = _joined(self.device, clean(run.device))
        self.weights = _joined(self.weights, facts.weights_of(run))
        low, high = self.draws if self.runs else (run.draw, run.draw)
        self.draws = min(low, run.draw), max(high, facts.last_draw(run))
        self.runs += 1
        self.building += run.timing.building
        self.changed.update(run.changed)
        self.notes += tuple(note for note in run.notes if note not in self.notes)

    @property
    def parts(self) -> tuple[str, ...]:
        """What the counting line says after model, mode and device."""
        low, high = self.draws
        programs = []
        for program, times in self.programs.items():
            alone = len(self.programs) == 1 and times == self.runs
            text = clean(program) if alone else f"{count(times)} {clean(program)}"
            programs.append(f"{text} in {seconds(self.building)}" if program == "compiled" else text)
        return (
            f"draw {low}" if low == high else f"draws {low}–{high}",
            f"{count(self.runs)} run" + ("s" if self.runs != 1 else ""),
            ", ".join(programs),
            f"run median {seconds(median(self.times))}" if self.times else "",
            *(f"{clean(name)}: update {updates}" for name, updates in self.changed.items()),
            self.weights,
        )


def _joined(names: str, name: str) -> str:
    return names if not name or name in names.split(", ") else f"{names}, {name}" if names else name


def loop_line(loop: Loop) -> str:
    """`net · train · cpu:0 · draws 2–101 · 100 runs · reused · run median 0.22 ms`, sharp bits beneath."""
    return "\n".join([*dotted((loop.model, loop.mode, loop.device, *loop.parts)), *notes(loop.notes)])


@dataclass(frozen=True)
class Notice:
    """`root key · restarted · seed 0`: what it is about, what became of it, and what to look out for."""

    name: str
    texts: tuple[str, ...]
    notes: tuple[Note, ...] = ()


def notice_text(notice: Notice) -> str:
    """One line in 80 columns, sharp bits beneath."""
    return "\n".join([*dotted(tuple(map(clean, (notice.name, *notice.texts)))), *notes(notice.notes)])


def registered_text(models: Sequence[Registered]) -> str:
    """A line for each model, with the rows of its check beneath."""
    lines: list[str] = []
    for model in models:
        name = clean(model.name)
        lines += dotted((f"{name} {model.headline}" if model.headline else name, *model.parts))
        lines += table([(clean(label), clean(value)) for label, value in model.check], indent="  ")
    return "\n".join(lines)


ROWS = 1000
"""Runs of one counting line that are kept one by one."""


class Rows:
    """The runs of a loop, which share one counting line.

    A row holds what differs from the row before it. Beyond `ROWS` of them, runs are counted, and their keys and digests
    go into one digest for all: whether they agree can still be told, but not which of them does not.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._last: dict[str, Any] = {}
        self._further = 0
        self._keys = hashlib.sha256()
        self._digests = hashlib.sha256()

    def add(self, run: Run) -> None:
        """One more run, whose output is still there."""
        if len(self._rows) < ROWS:
            row = recorded(run)
            self._rows.append({name: value for name, value in row.items() if self._last.get(name, self) != value})
            self._last = row
        else:
            self._further += 1
            self._keys.update(json.dumps(all_words(run.keys), sort_keys=True).encode() + b"\0")
            self._digests.update(f"{run.digest}\0".encode())

    def to_json(self) -> dict[str, Any]:
        """`runs`, the rows in order; and `further`, None or how many more there were, with a digest of their keys and one
        of their digests.
        """
        further = {
            "runs": self._further,
            "keys": self._keys.hexdigest()[:16],
            "digest": self._digests.hexdigest()[:16],
        }
        return {"version": 1, "runs": list(self._rows), "further": further if self._further else None}
