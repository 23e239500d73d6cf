"""A run, a loop, a session and a registration as static HTML: no script, nothing fetched, the host's own colours.

Every string goes through Jinja2's escaping; nothing here builds markup out of strings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from . import facts
from .columns import clean, clean_lines
from .facts import Level, Phase
from .units import seconds

if TYPE_CHECKING:
    import jinja2

    from ..past import History
    from ..run import Note, Run
    from ..summary import Summary
    from .loaded import Loaded
    from .loop import Loop
    from .notice import Notice
    from .registered import Registered
    from .status import KeyCard, Status

IN_FIGURES = ("init", "jit", "run")
"""Rows of the text that HTML shows as large numerals instead."""


@dataclass(frozen=True)
class Figure:
    """A large numeral: what was measured, the time, and a few words on it."""

    label: str
    time: str
    words: str = ""

    @property
    def measures(self) -> tuple[tuple[str, str], ...]:
        """Number and unit, twice for minutes and seconds: the unit is set smaller."""
        pieces = self.time.split(" ")
        return tuple(zip(pieces[::2], pieces[1::2], strict=True))


@dataclass(frozen=True)
class Segment:
    """A part of the bar: its phase, and its share of the whole in percent."""

    phase: Phase
    share: float


def line_html(run: Run) -> str:
    """The one-line form; sharp bits beneath."""
    return report(run, "line")


def normal_html(run: Run) -> str:
    """The normal form, `<details>` closed."""
    return report(run, "normal")


def details_html(run: Run) -> str:
    """The normal form, `<details>` open."""
    return report(run, "details")


def report(run: Run, level: Level) -> str:
    """The run at one level; `off` gives the sharp bits alone."""
    name = "line.html" if level == "line" else "notes.html" if level == "off" else "run.html"
    context: dict[str, object] = {
        "first": facts.new_session(run),
        "name": facts.name_of(run),
        "mode": facts.mode_of(run),
        "device": clean(run.device),
        "notes": _notes(run.notes),
    }
    if level == "line" or run.command == "key":
        context |= {"texts": [part for part in facts.brief(run) if part]}
        name = "line.html" if level != "off" else name
    elif level != "off":
        context |= {
            "switch": facts.switch_of(run),
            "draw": facts.draw_of(run, seed=True),
            "figures": figures(run),
            "segments": segments(run),
            "rows": [row for row in facts.rows(run) if row.label not in IN_FIGURES],
            "open": level == "details",
            "keys": facts.key_facts(run),
            "memory": facts.memory_facts(run),
            "call": clean_lines(run.call),
            "by_hand": clean_lines(run.by_hand),
            "digest": run.digest or "",
            "values": facts.values_of(run),
        }
    return _render(name, context)


def _notes(notes: Iterable[Note]) -> list[tuple[list[str], list[tuple[str, list[str]]]]]:
    """The lines of each note, and label and lines of what mends it."""
    return [(clean_lines(note.text), [(label, clean_lines(text)) for label, text in note.advice]) for note in notes]


def figures(run: Run) -> tuple[Figure, ...]:
    """The largest numerals: initialisation, compilation and run, those that happened."""
    timing = run.timing
    found = [Figure("init", seconds(timing.init), "eager")] if timing.init else []
    if run.command != "apply":
        return tuple(found)
    reason = clean(run.reason)
    if timing.building:
        label = {"compiled": "compile", "disk cache": "from the disk cache"}.get(run.program, run.program or "compile")
        found.append(Figure(clean(label), seconds(timing.building), reason))
    if timing.steady:
        found.append(Figure("run, median", seconds(timing.steady.median), facts.spread_of(timing.steady)))
    else:
        found.append(Figure("run", seconds(timing.run), "" if timing.building else clean(run.program)))
    return tuple(found)


def segments(run: Run) -> tuple[Segment, ...]:
    """The bar from left to right; empty where there is nothing to compare."""
    found = [phase for phase in facts.phases(run) if phase.name != "wait"]
    whole = sum(phase.seconds for phase in found)
    return tuple(Segment(phase, 100 * phase.seconds / whole) for phase in found) if len(found) > 1 else ()


def loop(runs: Loop) -> str:
    """The counting line."""
    from .loop import parts

    notes = _notes(runs.notes)
    shown = [part for part in parts(runs) if part]
    return _render(
        "line.html",
        {"first": "", "name": runs.model, "mode": runs.mode, "device": runs.device, "texts": shown, "notes": notes},
    )


def notice(found: Notice) -> str:
    """A line of news."""
    notes = _notes(found.notes)
    texts = [clean(text) for text in found.texts]
    return _render(
        "line.html",
        {"first": "", "name": clean(found.name), "mode": "", "device": "", "texts": texts, "notes": notes},
    )


def loaded(found: Loaded) -> str:
    """A file that was loaded, the code of each model that waits folded away."""
    notes = _notes(found.notice.notes)
    texts = [clean(text) for text in found.notice.texts]
    return _render(
        "loaded.html", {"name": clean(found.notice.name), "texts": texts, "notes": notes, "waiting": found.waiting}
    )


def status(now: Status) -> str:
    """What `%flax` shows."""
    from .status import KEPT, NO_MODEL, NO_RUN, ONLY_FRESH, RERUN, versions

    runs = [
        (facts.name_of(run), [part for part in (facts.mode_of(run), clean(run.device), *facts.brief(run)) if part])
        for run in now.runs[-KEPT:]
    ]
    context = {"status": now, "runs": runs, "versions": versions(now), "no_model": NO_MODEL, "no_run": NO_RUN}
    context |= {"rerun": RERUN, "only_fresh": ONLY_FRESH}
    return _render("status.html", context)


def history(found: History, *, everything: bool = False) -> str:
    """What `%flax_history` shows."""
    from . import history as rows

    shown, said = rows.rows(found, everything=everything)
    context: dict[str, object] = {
        "heading": [part for part in rows.heading(found) if part],
        "rows": shown,
        "left_out": said,
        "none": rows.NONE,
    }
    return _render("history.html", context)


def key_card(card: KeyCard) -> str:
    """What a bare `%flax_key` shows."""
    return _render("key_card.html", {"card": card})


def registered(models: Sequence[Registered]) -> str:
    """What `%%flaxmodel` registered."""
    return _render("registered.html", {"models": models})


def summary(found: Summary, depth: int | None = None) -> str:
    """What `%flax_summary` shows: each row folds. At first those with others inside are open, as deep as the text goes."""
    from . import summary as rows

    root = rows.tree(found)
    deep = rows.shown_depth(root, depth)

    def node(row: rows.Row, level: int) -> dict[str, object]:
        return {
            "name": row.name,
            "cls": row.cls,
            "cells": rows.cells(found, row),
            "said": rows.details(found, row),
            "rows": [node(part, level + 1) for part in row.rows],
            "open": bool(row.rows) and level < deep,
        }

    context: dict[str, object] = {
        "heading": [part for part in rows.heading(found) if part],
        "labels": rows.labels(found),
        "root": node(root, 0),
        "facts": rows.facts(found),
    }
    return _render("summary.html", context)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters["clean"] = clean
    return environment


@lru_cache(maxsize=1)
def prepare() -> None:
    """Reads the templates of a run, so that its report need not: some 20 ms."""
    for name in ("parts.html", "style.html", "run.html"):
        _environment().get_template(name)


def _render(name: str, context: dict[str, object]) -> str:
    return _environment().get_template(name).render(context).strip()
