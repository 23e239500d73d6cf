"""A run, a loop and a line of news as static HTML and as MIME bundles: no script, nothing fetched, the host's own colours.

Every string goes through Jinja2's escaping; nothing here builds markup out of strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.jsondata import RUN_JSON, RUNS_JSON
from ..base.text import clean, clean_lines, seconds
from . import facts, text
from .facts import LEVELS, Level, Phase
from .notice import Notice, notice_text

if TYPE_CHECKING:
    import jinja2

    from ..cells import journal
    from ..cells.journal import Registered
    from ..run import Note, Run
    from .text import Loop, Rows

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
    return report_html(run, "line")


def normal_html(run: Run) -> str:
    """The normal form, `<details>` closed."""
    return report_html(run, "normal")


def details_html(run: Run) -> str:
    """The normal form, `<details>` open."""
    return report_html(run, "details")


def report_html(run: Run, level: Level) -> str:
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
    return render(name, context)


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


def loop_html(runs: Loop) -> str:
    """The counting line."""
    from .text import parts

    notes = _notes(runs.notes)
    shown = [part for part in parts(runs) if part]
    return render(
        "line.html",
        {"first": "", "name": runs.model, "mode": runs.mode, "device": runs.device, "texts": shown, "notes": notes},
    )


def notice_html(found: Notice) -> str:
    """A line of news."""
    notes = _notes(found.notes)
    texts = [clean(text) for text in found.texts]
    return render(
        "line.html",
        {"first": "", "name": clean(found.name), "mode": "", "device": "", "texts": texts, "notes": notes},
    )


def registered_html(models: Sequence[Registered]) -> str:
    """What `%%flaxmodel` registered."""
    return render("registered.html", {"models": models})


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


def render(name: str, context: dict[str, object]) -> str:
    """The template of that name, filled in."""
    return _environment().get_template(name).render(context).strip()


def level(run: Run, setting: str) -> Level:
    """How long the report of `run` should be: `setting`, or for `auto` as long as its news."""
    if setting in LEVELS:
        return LEVELS[setting]
    if run.command == "key":
        return "normal" if run.first else "line"
    made = run.made is not None or run.command == "init"
    news = made or run.first or run.program == "compiled" or run.notes or run.timing.steady is not None
    news = news or run.draws is not None
    return "normal" if news else "line"


def bundle(run: Run, level: Level, style: str) -> dict[str, Any]:
    """The MIME bundle of a run.

    Args:
      run: what is shown.
      level: see `level`; `off` gives the sharp bits alone, and an empty bundle where there are none.
      style: `text` leaves the HTML out.
    """
    if level == "off" and not run.notes:
        return {}
    shown = shown_bundle(text.report(run, level), lambda: report_html(run, level), style)
    return shown if level == "off" else {**shown, RUN_JSON: run.to_json()}


def loop_bundle(runs: text.Loop, style: str, rows: Rows | None = None) -> dict[str, Any]:
    """The MIME bundle of a counting line; with `rows`, which it has once no more are to come, the runs are in it."""
    from . import text

    shown = shown_bundle(text.loop_line(runs), lambda: loop_html(runs), style)
    return shown if rows is None else {**shown, RUNS_JSON: rows.to_json()}


def notice_bundle(found: Notice, style: str) -> dict[str, Any]:
    """The MIME bundle of a line of news."""
    return shown_bundle(notice_text(found), lambda: notice_html(found), style)


def registered_bundle(models: Sequence[journal.Registered], style: str) -> dict[str, Any]:
    """The MIME bundle of what `%%flaxmodel` registered; empty if that is nothing."""
    from .notice import registered_text

    if not models:
        return {}
    return shown_bundle(registered_text(models), lambda: registered_html(models), style)


def shown_bundle(plain: str, rich: Callable[[], str], style: str) -> dict[str, Any]:
    """The MIME bundle of a text and its HTML, which is made where `style` is not `text`."""
    return {"text/plain": plain} if style == "text" else {"text/plain": plain, "text/html": rich()}
