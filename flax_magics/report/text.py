"""Runs as text in 80 columns, complete without the HTML; a loop's runs, and other news, in one line each."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from ..base.text import cell_len, clean, clean_lines, count, dotted, flow, plural, seconds, table, width, wrap
from ..base.threads import uninterrupted
from ..run import recorded
from . import curve, facts, tables
from .facts import Level, Row

if TYPE_CHECKING:
    from ..cells.journal import Registered
    from ..run import Note, Run


class Notice(Struct, frozen=True):
    """The content of one line, such as `net · train · cpu:0 · draw 2 · reused · run 0.22 ms`.

    Attributes:
      name: what it is about.
      texts: what is told of it, after mode and device if it has these.
      notes: shown beneath the line.
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
        """The parts of the line in order, safe to print; some may be empty."""
        return tuple(map(clean, (self.name, self.mode, self.device, *self.texts)))


def line_of(run: Run) -> Notice:
    """The report of a run in one line."""
    name, mode, first = facts.name_of(run), facts.mode_of(run), facts.new_session(run)
    return Notice(name, facts.brief(run), run.notes, mode, run.device, first)


def one_line(run: Run) -> str:
    """The report of a run in one line, however long, without its notes."""
    return " · ".join(filter(None, line_of(run).parts))


def progress_line(run: Run, working: str) -> str:
    """A training under way in one line of a terminal: of its news, the first first, what fits before `working`."""
    name = facts.name_of(run)
    parts = [] if run.trained is None else curve.news(run.trained)
    while parts and cell_len(" · ".join([name, *parts, working])) >= width():
        parts.pop()
    return " · ".join([name, *parts, working])


def notice_text(notice: Notice) -> str:
    """The line, broken if it is longer than 80 columns, and the notes beneath."""
    first = [notice.first] if notice.first else []
    return "\n".join([*first, *dotted(notice.parts), *notes(notice.notes)])


def normal(run: Run) -> str:
    """The normal report: a header, a row for each thing there is to say, and the notes."""
    return "\n".join([*head(run), *columns(facts.rows(run)), *tables_of(run), *notes(run.notes)])


def tables_of(run: Run) -> list[str]:
    """The course of a training, and the table of gradients by module; empty for any other run."""
    of_training = [] if run.trained is None else curve.lines(run.trained)
    return of_training + (tables.gradient_lines(run.layers, run.model or "") if run.layers else [])


def details(run: Run) -> str:
    """The report in full: keys, phases, memory and digest, and the run as plain Flax."""
    keys = [(key.stream, key.fingerprint or "-", key.made_by, f"→ {key.takers}") for key in facts.key_facts(run)]
    memory = [f"{name} {amount}" for name, amount in facts.memory_facts(run)]
    items = {row.label: row.items for row in facts.rows(run) if row.label != "memory"}
    items["keys"] = tuple(table(keys, columns=width() - 10))  # assigned in place, so that the row keeps its position
    items["memory"] = (*memory, "(by XLA's analysis)") if memory else ()
    items["digest"] = (run.digest,) if run.digest else ()
    below = {"out": facts.values_of(run), "jit": tuple(f"{phase.name} {phase.text}" for phase in facts.building(run))}
    rows = [Row("call", (clean(run.call),) if run.call else ())]
    for label in items:
        rows += [Row(label, items[label]), Row("", below.get(label, ()))]
    lines = [*head(run), *columns(rows, tables=("keys",)), *tables_of(run)]
    if run.mesh is not None:
        lines += [
            f"  mesh {clean(run.mesh.name)}",
            *tables.mesh_lines(run.mesh.axes, run.mesh.devices, "    "),
            *columns(tables.mesh_rows(run.mesh)),
        ]
    code = clean_lines(run.by_hand)
    if code:
        lines.append("  by hand")
    for line in code:
        # Lines break at spaces: inside brackets that is still valid Python. What follows is indented further.
        body = line.lstrip(" ")
        indent = "    " + " " * min(len(line) - len(body), 40)
        lines += wrap(body, indent, indent + "    ")
    return "\n".join([*lines, *notes(run.notes)])


def report(run: Run, level: Level) -> str:
    """A run's report at one level; notes are shown at every level, and at `off` nothing else."""
    if level == "details":
        return details(run)
    if level == "normal":
        return normal(run)
    return notice_text(line_of(run)) if level == "line" else "\n".join(notes(run.notes))


def head(run: Run) -> list[str]:
    """The header of the normal and the full report, below `new session, seed 0` for the first run."""
    lines = list(filter(None, [facts.new_session(run)]))
    if not run.kind.model:
        return lines + dotted((facts.name_of(run), *facts.brief(run)))
    mode, switch = facts.mode_of(run), clean(run.switch)
    mode = f"{mode} ({switch})" if switch and mode else switch or mode
    return lines + dotted((facts.name_of(run), mode, clean(run.device), facts.draw_of(run, seed=True)))


def columns(rows: Iterable[Row], tables: Collection[str] = ()) -> list[str]:
    """Lays out rows with their labels in one column; items stand side by side, and wrap under the first.

    Args:
      rows: those without items are left out.
      tables: labels of rows whose items are lines of a table, one below the other.
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
    """The lines of notes: `! text`, and beneath each its advice."""
    lines: list[str] = []
    for note in sharp_bits:
        first, *others = clean_lines(note.text) or [""]
        lines += wrap(first, "! ", "  ")
        lines += [wrapped for other in others for wrapped in wrap(other, "  ")]
        for label, text in note.advice:
            for n, code in enumerate(clean_lines(text)):
                begin = f"  {label}" if n == 0 else " " * (2 + len(label))
                # Advice to paste must stay one line, however long.
                lines += [begin + code] if label == "write: " else wrap(code, begin)
    return lines


_STYLES = (
    # What stands above a report, the name that it begins with, and the headings of blocks.
    (r"^(?:new session, seed -?\d+(?: · .*)?|\w+ registered: .*)$", "dim"),
    (r"^(?!new session, seed |\w+ registered: )[^\s!#][^·\n]*?(?= · )", "bold"),
    (r"(?<=\n\n)[a-z][^·\n]*(?=\n  \S)", "bold"),
    # The labels of rows, and the titles of columns.
    (
        r"^  (?:replay|roof|steps|out|samples|vars|sown|keys|static|init|jit|wait|run|rate|memory|call|digest|by hand)\b",
        "dim",
    ),
    (r"^  (?:total|FLOPs|writes|note)\b", "dim"),
    (r"^ +(?:draw  +what|module) .*$", "dim"),
    (r"(?<![\w.,])\d[\d.,]* (?:µs|ms|s|min|h)\b", "cyan"),
    (r"^ *! ", "bold yellow"),
    (r"^  (?:write|form|in your (?:model|loss)): ", "green"),
)
"""What stands in a report, as regular expressions, and rich's style for it; a later one goes on top of an earlier one."""


def coloured(text: str) -> str:
    """The text with the terminal's codes for its parts; as it is where `NO_COLOR` is set or the terminal has no colours."""
    if os.environ.get("NO_COLOR"):
        return text
    from rich.console import Console
    from rich.text import Text

    shown = Text(text)
    for pattern, style in _STYLES:
        shown.highlight_regex(re.compile(pattern, re.MULTILINE), style)
    console = Console()
    with console.capture() as captured:
        console.print(shown, soft_wrap=True, end="")
    return captured.get()


class Loop(Struct):
    """The sum of the runs of one cell's execution, shown as one counting line. Begin with `Loop()`, and `add` each run.

    Attributes:
      models, modes, devices: the names that occurred, in order.
      draws: lowest and highest draw number, (0, 0) before the first run.
      runs: what a run is called (`run`, `init`, `key`) → how many were added.
      single: the line and the data of the run, as long as there is one.
      programs: origin of the program (`compiled`, `reused`, …) → how many runs.
      reason: why the latest program was compiled that had a reason.
      building: seconds of tracing, lowering and compiling together.
      times, inits: seconds on the device of each forward run, and of each init.
      changed: collection → updates after the latest run.
      weights: whose weights ran, in order.
      notes: the notes of all runs, each once.
    """

    models: list[str] = []
    modes: list[str] = []
    devices: list[str] = []
    draws: tuple[int, int] = (0, 0)
    runs: Counter[str] = msgspec.field(default_factory=Counter)
    single: tuple[Notice, dict[str, object]] | None = None
    programs: Counter[str] = msgspec.field(default_factory=Counter)
    reason: str = ""
    building: float = 0.0
    times: list[float] = []
    inits: list[float] = []
    changed: dict[str, int] = {}
    weights: list[str] = []
    notes: tuple[Note, ...] = ()

    def add(self, run: Run) -> None:
        """Adds one run, at a cost that does not grow with the number of runs."""
        self.single = None if self.runs else (line_of(run), run.to_json())
        if run.kind.forward:
            self.programs.update([run.program] if run.program else [])
            self.times.append(run.timing.typical)
        elif run.timing.init:
            self.inits.append(run.timing.init)
        for names, name in (
            (self.models, facts.name_of(run)),
            (self.modes, facts.mode_of(run)),
            (self.devices, clean(run.device)),
            (self.weights, facts.weights_of(run)),
        ):
            if name and name not in names and len(names) <= NAMES:
                names.append(name)
        low, high = self.draws if self.runs else (run.draw, run.draw)
        self.draws = min(low, run.draw), max(high, facts.last_draw(run))
        self.runs["run" if run.kind.forward else run.command] += 1
        self.reason = clean(run.reason) or self.reason
        self.building += run.timing.building
        self.changed.update(run.changed)
        self.notes += tuple(note for note in run.notes if note not in self.notes)

    def add_again(self, draw: int, seconds: float, changed: Mapping[str, int]) -> None:
        """Adds a run of a program that was there, otherwise like the run that was added last."""
        self.single = None
        self.programs["reused"] += 1
        self.times.append(seconds)
        low, high = self.draws
        self.draws = min(low, draw), max(high, draw)
        self.runs["run"] += 1
        self.changed.update(changed)

    def line(self, working: str = "") -> Notice:
        """The counting line, such as `net · train · cpu:0 · draws 2–101 · 100 runs · reused · run median 0.22 ms`.

        Args:
          working: what the command at work is doing, told last.
        """
        if self.single is not None:
            line = self.single[0]
            return replace(line, texts=(*line.texts, working))
        from statistics import median  # 2 ms, and only a loop needs it

        low, high = self.draws
        programs = []
        for program, times in self.programs.items():
            text = clean(program) if times == self.runs["run"] else f"{count(times)} {clean(program)}"
            if program == "compiled":
                text += f" in {seconds(self.building)}"
                # Of several reasons the latest.
                text += f" ({'last: ' if times > 1 else ''}{self.reason})" if self.reason else ""
            programs.append(text)
        texts = (
            f"draw {low}" if low == high else f"draws {low}–{high}",
            ", ".join(plural(amount, what) for what, amount in self.runs.items()),
            ", ".join(programs),
            f"init median {seconds(median(self.inits))}" if self.inits else "",
            f"run median {seconds(median(self.times))}" if self.times else "",
            *(f"{clean(name)}: update {updates}" for name, updates in self.changed.items()),
            _joined(self.weights),
            working,
        )
        return Notice(_joined(self.models), texts, self.notes, _joined(self.modes), _joined(self.devices))


NAMES = 4
"""How many names of one kind a counting line gives."""


def _joined(names: list[str]) -> str:
    return ", ".join([*names[:NAMES], *(["…"] if len(names) > NAMES else [])])


def registered_text(models: Sequence[Registered]) -> str:
    """The lines of the registered models, with the rows of `--check` and notes beneath each."""
    lines: list[str] = []
    for model in models:
        name = clean(model.name)
        lines += dotted((f"{name} {model.headline}" if model.headline else name, *model.parts))
        lines += table([(clean(label), clean(value)) for label, value in model.check], indent="  ")
        lines += notes(model.notes)
    return "\n".join(lines)


ROWS = 1000
"""How many runs of one loop are stored one by one."""


class Rows:
    """The runs of a loop as data, for `verify`.

    A row holds only what differs from the row before. Runs beyond `ROWS` are counted, and hashed into one digest of
    their keys and one of their outputs: whether they agree can still be told, but not which of them differs.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, object]] = []
        self._last: dict[str, object] = {}
        self._waiting: list[Callable[[Mapping[str, object], bool], dict[str, object]]] = []
        self._further = 0
        self._keys, self._digests = hashlib.sha256(), hashlib.sha256()

    def add(self, run: Run) -> None:
        """Adds a run while its output is still there: its digest is taken now."""
        self._make()
        self._add(recorded(run))

    def add_again(self, row: Callable[[Mapping[str, object], bool], dict[str, object]]) -> None:
        """Adds a run like the one that was added last.

        `row` makes its record, later, from that of the run before it; it is also told whether it is one of the first `ROWS`.
        """
        self._waiting.append(row)
        if len(self._waiting) >= ROWS:
            self._make()

    def _make(self) -> None:
        """Makes the rows that are not made yet."""
        with uninterrupted():  # or the rest would be lost; `ROWS` of them take a tenth of a second
            waiting, self._waiting = self._waiting, []
            for row in waiting:
                self._add(row(self._last, len(self._rows) < ROWS))

    def _add(self, row: dict[str, object]) -> None:
        if len(self._rows) < ROWS:
            # `self` stands for a field that was not there: no value equals it.
            self._rows.append({name: value for name, value in row.items() if self._last.get(name, self) != value})
        else:
            self._further += 1
            # A separator, so that no two sequences have the same bytes.
            self._keys.update(json.dumps(row["keys"], sort_keys=True).encode() + b"\0")
            self._digests.update(f"{row['digest']}\0".encode())
        self._last = row

    def to_json(self) -> dict[str, object]:
        """`runs`: the rows in order; `further`: how many runs came after, with a digest of their keys and one of their
        digests, or None.
        """
        self._make()
        keys, digest = (hasher.hexdigest()[:16] for hasher in (self._keys, self._digests))
        further = {"runs": self._further, "keys": keys, "digest": digest}
        return {"version": 1, "runs": list(self._rows), "further": further if self._further else None}
