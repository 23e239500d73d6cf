"""What `%flax_doctor` and `%flax_free` give, as text and as HTML."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from ..base.text import bytes_, clean, count, dotted, plural, table
from ..report.facts import Row
from ..report.html import note_lines, render, shown_bundle
from ..report.text import Notice, columns, notes, notice_text
from ..run import Note
from .finding import Finding
from .memory import REPLAYS, Holding

SHOWN = 12
"""How many holdings are listed; what the smaller ones have together is one more row."""
WORTH = 1_000_000
"""Bytes that only replays hold, from which on the line is told that lets go of them."""
HELD = "  held    "
NOBODY = "reached by no name: programs that JAX keeps, or code that is running"


class Diagnosis(Struct, frozen=True):
    """What the checks have found.

    Attributes:
      findings: the name of each check that found something → what it found.
      failed: the names of checks that could not be made, with the reason.
      checks: how many were made.
      system: versions and devices, in words.
    """

    findings: Mapping[str, Finding]
    failed: Mapping[str, str]
    checks: int
    system: tuple[str, ...]

    def __str__(self) -> str:
        return notice_text(diagnosis_notice(self))

    __repr__ = __str__


class Freed(Struct, frozen=True):
    """What was let go of, and what is still held.

    Attributes:
      freed: device → bytes that it holds no more; devices that hold what they held are left out.
      held: device → bytes of the arrays that are alive.
      let_go: what was let go of, in words.
      holdings: who holds the arrays that are alive, the largest first: each array counts once.
      lost: how many runs can be replayed no more.
    """

    freed: Mapping[str, int]
    held: Mapping[str, int]
    let_go: tuple[str, ...]
    holdings: tuple[Holding, ...]
    lost: int = 0

    @property
    def replayable(self) -> int:
        """Bytes that are held for replays alone."""
        return sum(holding.bytes for holding in self.holdings if holding.holders == (REPLAYS,))

    def __str__(self) -> str:
        return freed_text(self)

    __repr__ = __str__


def diagnosis_notice(diagnosis: Diagnosis) -> Notice:
    """One line, and a note for each finding; the system is told where nothing is wrong."""
    checks = plural(diagnosis.checks, "check")
    found = len(diagnosis.findings)
    failed = [Note("doctor", f"not checked: {name} ({why})") for name, why in diagnosis.failed.items()]
    noted = (*(finding.note for finding in diagnosis.findings.values()), *failed)
    if found:
        return Notice("doctor", (plural(found, "finding"), checks, *diagnosis.system), noted)
    return Notice("doctor", ("nothing is wrong", checks, *diagnosis.system), noted)


def freed_text(freed: Freed, first: str = "") -> str:
    """The answer of `%flax_free` as text; `first` is a line above it."""
    above = [first] if first else []
    let_go = columns([Row("let go", tuple(map(clean, freed.let_go)))])
    held = table(_rows(freed), indent=" " * len(HELD))
    held[:1] = [HELD + line[len(HELD) :] for line in held[:1]]
    return "\n".join([*above, *dotted(("free", *_parts(freed))), *let_go, *held, *notes(_notes(freed))])


def freed_bundle(freed: Freed, style: str, first: str = "") -> dict[str, object]:
    """The MIME bundle of `freed_text`."""

    def html() -> str:
        context = {
            "first": first,
            "texts": _parts(freed),
            "let_go": [clean(what) for what in freed.let_go],
            "rows": _rows(freed),
        }
        return render("free.html", {**context, "notes": note_lines(_notes(freed))})

    return shown_bundle(freed_text(freed, first), html, style)


def _parts(freed: Freed) -> tuple[str, ...]:
    gone = [f"{device} {bytes_(size)} freed" for device, size in freed.freed.items()]
    held = [f"{device} {bytes_(size)}" for device, size in freed.held.items()]
    return (*(gone or ["nothing freed"]), f"held: {', '.join(held)}" if held else "nothing held")


def _rows(freed: Freed) -> list[tuple[str, str]]:
    """(bytes, who holds them) of each holding."""
    shown = freed.holdings if len(freed.holdings) <= SHOWN + 1 else freed.holdings[:SHOWN]
    sizes: dict[str, int] = {}
    for holding in shown:
        sizes[_who(holding)] = sizes.get(_who(holding), 0) + holding.bytes
    rows = [(bytes_(size), who) for who, size in sizes.items()]
    rest = freed.holdings[len(shown) :]
    if rest:
        rows.append((bytes_(sum(holding.bytes for holding in rest)), f"{count(len(rest))} others, smaller"))
    return rows


def _who(holding: Holding) -> str:
    # An NNX module is held by its name and as a model, which is one thing to the reader.
    holders = [holder for holder in holding.holders if f"the model {holder}" not in holding.holders]
    first, more = holders[:4], len(holders) - 4
    return clean(", ".join(first) + f" and {more} more" * (more > 0)) or f"{plural(holding.arrays, 'array')} {NOBODY}"


def _notes(freed: Freed) -> tuple[Note, ...]:
    noted = []
    if freed.lost:
        noted.append(
            Note("replays", f"{plural(freed.lost, 'run')} can be replayed no more: what they needed was let go of")
        )
    if freed.replayable >= WORTH:
        text = f"{bytes_(freed.replayable)} are held for %flax_replay alone, which could not repeat those runs without"
        noted.append(Note("replays", text, write="%flax_free --replays"))
    return tuple(noted)
