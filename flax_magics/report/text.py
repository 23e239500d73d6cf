"""A run as text, complete by itself in 80 columns; further runs of its cell counted in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from ..base.digest import all_words
from ..base.text import WIDTH, clean, clean_lines, count, dotted, flow, seconds, table, wrap
from ..run import recorded
from . import facts
from .facts import Level, Row

if TYPE_CHECKING:
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
    keys = [(k.stream, k.fingerprint or "-", k.made_by, f"→ {k.takers}") for k in facts.key_facts(run)]
    extra = {
        "jit": Row("", tuple(f"{phase.name} {phase.text}" for phase in facts.building(run))),
        "keys": Row("keys", tuple(table(keys, width=WIDTH - 10))),
    }
    found = [Row("call", (clean(run.call),))] if run.call else []
    extra["out"] = Row("", facts.values_of(run))
    for row in (row for row in facts.rows(run) if row.label != "memory"):
        found += (
            [row, extra[row.label]] if row.label in ("jit", "out") else [extra["keys"] if row.label == "keys" else row]
        )
    if "keys" not in {row.label for row in found}:
        found.append(extra["keys"])
    memory = tuple(f"{name} {amount}" for name, amount in facts.memory_facts(run))
    found.append(Row("memory", (*memory, "(by XLA's analysis)") if memory else ()))
    found.append(Row("digest", (run.digest,) if run.digest else ()))
    return "\n".join([*head(run), *columns(found, tables=("keys",)), *by_hand(run), *notes(run.notes)])


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
    if run.command == "key":
        return lines + dotted((facts.name_of(run), *facts.brief(run)))
    mode, switch = facts.mode_of(run), facts.switch_of(run)
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


def by_hand(run: Run) -> list[str]:
    """The same run as plain Flax, to be copied; breaks fall on spaces, which inside a bracket is still Python."""
    code = clean_lines(run.by_hand)
    return ["  by hand", *code_lines(code, "    ")] if code else []


def code_lines(code: Iterable[str], indent: str) -> list[str]:
    """Lines of code, each hanging under its own indentation."""
    lines: list[str] = []
    for line in code:
        body = line.lstrip(" ")
        deep = indent + " " * min(len(line) - len(body), 40)
        lines += wrap(body, deep, deep + "    ")
    return lines


def notes(found: Iterable[Note]) -> list[str]:
    """The sharp bits: `! text`, and beneath each the line that mends it."""
    lines: list[str] = []
    for note in found:
        first, *others = clean_lines(note.text) or [""]
        lines += wrap(first, "! ", "  ")
        lines += [wrapped for other in others for wrapped in wrap(other, "  ")]
        for label, text in note.advice:
            for n, code in enumerate(clean_lines(text)):
                begin = f"  {label}" if n == 0 else " " * (2 + len(label))
                # A line to be pasted stays one line.
                lines += [begin + code] if label == "write: " else wrap(code, begin)
    return lines


@dataclass(frozen=True)
class Loop:
    """What the runs of one cell execution add up to. Begin with `Loop()` and `add` each run.

    Attributes:
      model, mode, device: the names that occurred, in order, joined by commas.
      draws: lowest and highest draw number, (0, 0) before the first run.
      runs: how many runs were added.
      programs: `compiled`, `reused`, `disk cache`, `eager` → how many runs.
      building: seconds of trace, lower and compile together.
      changed: collection → updates after the latest run.
      weights: whose weights ran, in order, joined by commas.
      notes: the sharp bits, each once.
    """

    model: str = ""
    mode: str = ""
    device: str = ""
    draws: tuple[int, int] = (0, 0)
    runs: int = 0
    programs: Mapping[str, int] = field(default_factory=dict)
    building: float = 0.0
    changed: Mapping[str, int] = field(default_factory=dict)
    weights: str = ""
    notes: tuple[Note, ...] = ()
    _times: list[float] = field(default_factory=list, repr=False, compare=False)
    _timed: int = 0

    def add(self, run: Run) -> Loop:
        """This and one more run. Costs the same for the thousandth run as for the first."""
        programs = dict(self.programs)
        if run.program and run.command == "apply":
            programs[run.program] = programs.get(run.program, 0) + 1
        times, timed = self._times, self._timed
        if run.command == "apply":
            # Loops that grow from one another share a list of which each reads its own beginning.
            times = times if len(times) == timed else times[:timed]
            times.append(run.timing.steady.median if run.timing.steady else run.timing.run)
            timed += 1
        last = facts.last_draw(run)
        low, high = self.draws if self.runs else (run.draw, last)
        return Loop(
            model=_joined(self.model, facts.name_of(run)),
            mode=_joined(self.mode, facts.mode_of(run)),
            device=_joined(self.device, clean(run.device)),
            draws=(min(low, run.draw), max(high, last)),
            runs=self.runs + 1,
            programs=programs,
            building=self.building + run.timing.building,
            changed={**self.changed, **run.changed},
            weights=_joined(self.weights, facts.weights_of(run)),
            notes=(*self.notes, *(note for note in run.notes if note not in self.notes)),
            _times=times,
            _timed=timed,
        )

    @property
    def median(self) -> float:
        """Median of the runs' seconds on the device, 0.0 before the first."""
        return median(self._times[: self._timed]) if self._timed else 0.0


def _joined(names: str, name: str) -> str:
    return names if not name or name in names.split(", ") else f"{names}, {name}" if names else name


def parts(loop: Loop) -> tuple[str, ...]:
    """What the counting line says after model, mode and device."""
    low, high = loop.draws
    return (
        f"draw {low}" if low == high else f"draws {low}–{high}",
        f"{count(loop.runs)} run" + ("s" if loop.runs != 1 else ""),
        _programs(loop),
        f"run median {seconds(loop.median)}" if loop._timed else "",
        *(f"{clean(name)}: update {updates}" for name, updates in loop.changed.items()),
        loop.weights,
    )


def _programs(loop: Loop) -> str:
    texts = []
    for program, times in loop.programs.items():
        text = clean(program) if len(loop.programs) == 1 and times == loop.runs else f"{count(times)} {clean(program)}"
        texts.append(f"{text} in {seconds(loop.building)}" if program == "compiled" else text)
    return ", ".join(texts)


def loop_line(loop: Loop) -> str:
    """`net · train · cpu:0 · draws 2–101 · 100 runs · reused · run median 0.22 ms`, sharp bits beneath."""
    return "\n".join([*dotted((loop.model, loop.mode, loop.device, *parts(loop))), *notes(loop.notes)])


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
