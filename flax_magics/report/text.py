"""A run as text, complete by itself in 80 columns; further runs of its cell in one line; other news in a line each."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from ..base.digest import all_words
from ..base.text import WIDTH, clean, clean_lines, count, dotted, flow, plural, seconds, table, wrap
from ..run import recorded
from . import facts
from .facts import Level, Row

if TYPE_CHECKING:
    from ..cells.journal import Registered
    from ..run import Note, Run


class Notice(NamedTuple):
    """What one line says: `net · train · cpu:0 · draw 2 · reused · run 0.22 ms`, `root key · restarted · seed 0`.

    Attributes:
      name: what it is about.
      texts: what is told of it, after mode and device where it has these.
      notes: what to look out for, beneath the line.
      first: a line above it.
    """

    name: str
    texts: tuple[str, ...]
    notes: tuple[Note, ...] = ()
    mode: str = ""
    device: str = ""
    first: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """All that stands in the line, safe to print; some may be empty."""
        return tuple(map(clean, (self.name, self.mode, self.device, *self.texts)))


def line_of(run: Run) -> Notice:
    """The one-line form of a run."""
    name, mode, first = facts.name_of(run), facts.mode_of(run), facts.new_session(run)
    return Notice(name, facts.brief(run), run.notes, mode, run.device, first)


def notice_text(notice: Notice) -> str:
    """One line, unless 80 columns are too few for it, and sharp bits beneath."""
    first = [notice.first] if notice.first else []
    return "\n".join([*first, *dotted(notice.parts), *notes(notice.notes)])


def normal(run: Run) -> str:
    """Header, one row for each thing there is to say, and the sharp bits."""
    return "\n".join([*head(run), *columns(facts.rows(run)), *notes(run.notes)])


def details(run: Run) -> str:
    """The normal form with keys, phases, memory and digest in full, and the run by hand."""
    keys = [(key.stream, key.fingerprint or "-", key.made_by, f"→ {key.takers}") for key in facts.key_facts(run)]
    memory = [f"{name} {amount}" for name, amount in facts.memory_facts(run)]
    items = {row.label: row.items for row in facts.rows(run) if row.label != "memory"}
    items["keys"] = tuple(table(keys, width=WIDTH - 10))  # where they stood, if they did
    items["memory"] = (*memory, "(by XLA's analysis)") if memory else ()
    items["digest"] = (run.digest,) if run.digest else ()
    below = {"out": facts.values_of(run), "jit": tuple(f"{phase.name} {phase.text}" for phase in facts.building(run))}
    rows = [Row("call", (clean(run.call),) if run.call else ())]
    for label in items:
        rows += [Row(label, items[label]), Row("", below.get(label, ()))]
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
    return notice_text(line_of(run)) if level == "line" else "\n".join(notes(run.notes))


def head(run: Run) -> list[str]:
    """The header of the longer forms, below `new session, seed 0` if it is the first."""
    lines = list(filter(None, [facts.new_session(run)]))
    if not run.kind.model:
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
    def line(self) -> Notice:
        """`net · train · cpu:0 · draws 2–101 · 100 runs · reused · run median 0.22 ms`"""
        low, high = self.draws
        programs = []
        for program, times in self.programs.items():
            text = clean(program) if times == self.runs else f"{count(times)} {clean(program)}"
            programs.append(f"{text} in {seconds(self.building)}" if program == "compiled" else text)
        texts = (
            f"draw {low}" if low == high else f"draws {low}–{high}",
            plural(self.runs, "run"),
            ", ".join(programs),
            f"run median {seconds(median(self.times))}" if self.times else "",
            *(f"{clean(name)}: update {updates}" for name, updates in self.changed.items()),
            self.weights,
        )
        return Notice(self.model, texts, self.notes, self.mode, self.device)


def _joined(names: str, name: str) -> str:
    return names if not name or name in names.split(", ") else f"{names}, {name}" if names else name


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
        self._rows: list[dict[str, object]] = []
        self._last: dict[str, object] = {}
        self._further = 0
        self._keys, self._digests = hashlib.sha256(), hashlib.sha256()

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

    def to_json(self) -> dict[str, object]:
        """`runs`, the rows in order; and `further`, None or how many more there were, with a digest of their keys and one
        of their digests.
        """
        keys, digest = (hasher.hexdigest()[:16] for hasher in (self._keys, self._digests))
        further = {"runs": self._further, "keys": keys, "digest": digest}
        return {"version": 1, "runs": list(self._rows), "further": further if self._further else None}
