"""Runs, loops and news as static HTML and as MIME bundles: no script, nothing fetched, in the colors of the host.

Every string goes through Jinja2's escaping; no function here puts markup together from strings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

from msgspec import Struct

from ..base.files import RUN_JSON, RUNS_JSON
from ..base.text import clean, clean_lines, seconds
from ..run import RELEASED, Face, like
from . import curve, facts, tables, text
from .facts import Level, Phase

if TYPE_CHECKING:
    import jinja2

    from ..cells.journal import Registered
    from ..run import Note, Run
    from .text import Loop, Notice, Rows


class Figure(Struct, frozen=True):
    """A large numeral of the report: its label, the time, and a few words beneath."""

    label: str
    time: str
    words: str = ""

    @property
    def measures(self) -> tuple[tuple[str, str], ...]:
        """(number, unit) pairs of the time, two for `1 min 5 s`: the template sets units smaller."""
        pieces = self.time.split(" ")
        return tuple(zip(pieces[::2], pieces[1::2], strict=True))


def report_html(run: Run, level: Level, working: str = "") -> str:
    """A run's report at one level; at `off` only its notes. `working`: what goes on, in place of the details."""
    if level == "off":
        return render("notes.html", {"name": facts.name_of(run), "notes": note_lines(run.notes)})
    if level == "line" or not run.kind.model:
        return line_html(text.line_of(run))
    context: dict[str, object] = {
        "first": facts.new_session(run),
        "name": facts.name_of(run),
        "mode": facts.mode_of(run),
        "device": clean(run.device),
        "switch": clean(run.switch),
        "draw": facts.draw_of(run, seed=True),
        "notes": note_lines(run.notes),
        "figures": figures(run),
        "segments": segments(run),
        # Those three are shown as large numerals above.
        "rows": [row for row in facts.rows(run) if row.label not in ("init", "jit", "run")],
        "open": level == "details",
        # Keys are read from the device, which a training keeps busy.
        "keys": () if working else facts.key_facts(run),
        "memory": facts.memory_facts(run),
        "call": clean_lines(run.call),
        "by_hand": clean_lines(run.by_hand),
        "digest": run.digest or "",
        "values": facts.values_of(run),
        "mesh": None
        if run.mesh is None or working
        else (tables.mesh_drawing(run.mesh.axes, run.mesh.devices), tables.mesh_rows(run.mesh)),
        "layers": tables.gradient_table(run.layers, run.model or "") if run.layers else None,
        "working": working,
        "curve": None if run.trained is None else curve.context(run.trained),
    }
    return render("run.html", context)


def line_html(notice: Notice) -> str:
    """A report of one line, its notes beneath."""
    name, mode, device, *texts = notice.parts
    context = {"first": notice.first, "name": name, "mode": mode, "device": device}
    return render("line.html", {**context, "texts": list(filter(None, texts)), "notes": note_lines(notice.notes)})


def note_lines(notes: Iterable[Note]) -> list[tuple[list[str], list[tuple[str, list[str]]]]]:
    """For each note its lines, and the label and lines of each advice."""
    return [(clean_lines(note.text), [(label, clean_lines(text)) for label, text in note.advice]) for note in notes]


def figures(run: Run) -> tuple[Figure, ...]:
    """The times shown as large numerals: of the init, of making the program, and of the run, if they happened."""
    timing = run.timing
    shown = [Figure("init", seconds(timing.init), "eager")] if timing.init else []
    if not run.kind.forward:
        return tuple(shown)
    if timing.building:
        label = {"compiled": "compile", "disk cache": "trace"}.get(run.program, run.program or "compile")
        words = (
            [f"and read from the disk cache in {seconds(run.timing.compile)}"] if run.program == "disk cache" else []
        )
        shown.append(
            Figure(clean(label), seconds(timing.building), ": ".join([*words, *filter(None, [clean(run.reason)])]))
        )
    if run.trained is not None:
        time, *rates = facts.trained_in(run) or ("",)
        shown += [Figure("training", time, " · ".join(rates))] if time else []
    elif timing.steady:
        shown.append(Figure("run, median", seconds(timing.steady.median), facts.spread_of(timing.steady)))
    else:
        shown.append(Figure("run", seconds(timing.run), "" if timing.building else clean(run.program)))
    return tuple(shown)


def segments(run: Run) -> tuple[tuple[Phase, float], ...]:
    """The parts of the timing bar from left to right, with their share in percent; empty for a single part."""
    busy = [phase for phase in facts.phases(run) if phase.name != "wait"]
    whole = sum(phase.seconds for phase in busy)
    return tuple((phase, 100 * phase.seconds / whole) for phase in busy) if len(busy) > 1 else ()


FACE = Face(line=text.one_line, text=text.normal, html=lambda run: report_html(run, "normal"))
"""How a Run is shown where it is a value: its `repr`, `print` of it, and a notebook's output."""


LONG, PIECE = 48, 16
"""A word of more letters than `LONG` may be broken after each `PIECE` of them."""
_LONG_WORD = re.compile(rf"\S{{{LONG + 1},}}")


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    # At the first HTML: importing Jinja2 takes 30 ms and more.
    import jinja2
    from markupsafe import Markup

    def breakable(value: object) -> object:
        # A cell of a table is as wide as its longest word, unless the word says where it may be broken.
        if type(value) is not str or not (words := list(_LONG_WORD.finditer(value))):
            return value
        cuts = [0, *(cut for word in words for cut in range(word.start() + PIECE, word.end(), PIECE)), len(value)]
        return Markup("<wbr>").join(value[begin:end] for begin, end in pairwise(cuts))  # which escapes each piece

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=breakable,
        # A misspelt name in a template fails instead of showing nothing.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # The templates belong to the package: looking at their files for each report is of no use.
        auto_reload=False,
    )
    environment.filters["clean"] = clean
    return environment


@lru_cache(maxsize=1)
def prepare() -> None:
    """Loads the templates of a run ahead of its report, which takes some 20 ms."""
    for name in ("parts.html", "style.html", "run.html"):  # a training alone has a curve
        _environment().get_template(name)


def render(name: str, context: dict[str, object]) -> str:
    """Fills the template `name` with `context`."""
    return _environment().get_template(name).render(context).strip()


def level(run: Run, setting: str) -> Level:
    """How much to report of `run`: `setting`, or for `auto` as much as is new about it."""
    if setting != "auto":
        return cast("Level", setting)
    if not run.kind.model:
        return "normal" if run.first else "line"
    if run.layers or run.kind.trains:  # the table or the curve is what was asked for
        return "normal"
    initialised = run.made is not None or run.kind.opens
    repeated = run.samples is not None or run.timing.steady is not None
    news = initialised or repeated or run.first or run.program == "compiled" or run.notes
    return "normal" if news else "line"


def bundle(run: Run, level: Level, style: str) -> dict[str, object]:
    """The MIME bundle of a run.

    Args:
      level: see `level`; at `off` only the notes, and an empty bundle without any.
      style: `text` leaves the HTML out.
    """
    if level == "off" and not run.notes:
        return {}
    shown = shown_bundle(text.report(run, level), lambda: report_html(run, level), style)
    return shown if level == "off" else {**shown, RUN_JSON: run.to_json()}


def progress_bundle(run: Run, style: str, working: str) -> dict[str, object]:
    """The MIME bundle of a training under way: its report so far, and `working` beneath."""
    # The digest of its variables would take longer than some of its steps.
    so_far = like(run, output=RELEASED)
    return shown_bundle(
        f"{text.report(so_far, 'normal')}\n{working}", lambda: report_html(so_far, "normal", working), style
    )


def loop_bundle(loop: Loop, style: str, rows: Rows | None = None, working: str = "") -> dict[str, object]:
    """The MIME bundle of a loop's counting line; see `Loop.line` for `working`.

    `rows`, added once the cell has ended, are its runs as JSON; a single run has the JSON of a run.
    """
    shown = notice_bundle(loop.line(working), style)
    if loop.single is not None:
        return {**shown, RUN_JSON: loop.single[1]}
    return shown if rows is None else {**shown, RUNS_JSON: rows.to_json()}


def notice_bundle(notice: Notice, style: str) -> dict[str, object]:
    """The MIME bundle of one line of news."""
    return shown_bundle(text.notice_text(notice), lambda: line_html(notice), style)


def registered_bundle(models: Sequence[Registered], style: str) -> dict[str, object]:
    """The MIME bundle of the models that `%%flaxmodel` registered; empty if there are none."""
    if not models:
        return {}
    shown = [(model, note_lines(model.notes)) for model in models]
    return shown_bundle(text.registered_text(models), lambda: render("registered.html", {"models": shown}), style)


def shown_bundle(plain: str, rich: Callable[[], str], style: str) -> dict[str, object]:
    """The MIME bundle of a text and of its HTML, which is only made unless `style` is `text`."""
    return {"text/plain": plain} if style == "text" else {"text/plain": plain, "text/html": rich()}
