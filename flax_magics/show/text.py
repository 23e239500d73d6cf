"""A run as text, complete by itself in 80 columns."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from . import facts
from .columns import WIDTH, clean, clean_lines, dotted, flow, table, wrap
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
