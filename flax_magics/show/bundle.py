"""Text, HTML and data of one thing under their MIME types, and how long a report should be."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import html, notice, text
from .facts import LEVELS, Level

if TYPE_CHECKING:
    from ..past import History
    from ..recorded import Rows
    from ..run import Run
    from ..summary import Summary
    from . import loaded, loop, registered, status

RUN_JSON = "application/vnd.flax-magics.run+json"
"""The run as data, so that a saved notebook can be verified later."""
RUNS_JSON = "application/vnd.flax-magics.runs+json"
"""The same for the runs of a counting line."""


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
    shown = _shown(text.report(run, level), lambda: html.report(run, level), style)
    return shown if level == "off" else {**shown, RUN_JSON: run.to_json()}


def loop_bundle(runs: loop.Loop, style: str, rows: Rows | None = None) -> dict[str, Any]:
    """The MIME bundle of a counting line; with `rows`, which it has once no more are to come, the runs are in it."""
    from . import loop

    shown = _shown(loop.line(runs), lambda: html.loop(runs), style)
    return shown if rows is None else {**shown, RUNS_JSON: rows.to_json()}


def status_bundle(now: status.Status, style: str) -> dict[str, Any]:
    """The MIME bundle of `%flax`."""
    from . import status

    return _shown(status.status_text(now), lambda: html.status(now), style)


def key_bundle(card: status.KeyCard, style: str) -> dict[str, Any]:
    """The MIME bundle of a bare `%flax_key`."""
    from . import status

    return _shown(status.key_text(card), lambda: html.key_card(card), style)


def history_bundle(found: History, everything: bool, style: str) -> dict[str, Any]:
    """The MIME bundle of `%flax_history`; `everything`: all rows, however many."""
    from . import history

    plain = history.history_text(found, everything=everything)
    return _shown(plain, lambda: html.history(found, everything=everything), style)


def replay_bundle(run: Run, style: str) -> dict[str, Any]:
    """The MIME bundle of a replay."""
    from . import replayed

    return notice_bundle(replayed.notice_of(run), style)


def notice_bundle(found: notice.Notice, style: str) -> dict[str, Any]:
    """The MIME bundle of a line of news."""
    return _shown(notice.notice_text(found), lambda: html.notice(found), style)


def loaded_bundle(found: loaded.Loaded, style: str) -> dict[str, Any]:
    """The MIME bundle of a file that was loaded; quiet, of its sharp bits alone."""
    from . import loaded

    if found.quiet:
        return notice_bundle(found.notice, style) if found.notice.notes else {}
    return _shown(loaded.loaded_text(found), lambda: html.loaded(found), style)


def script_bundle(code: str, style: str) -> dict[str, Any]:
    """The MIME bundle of Python code: as Markdown, every notebook gives it the colours of its cells."""
    fence = "`" * max(3, *(len(found) + 1 for found in re.findall("`+", code)), 3)
    return (
        {"text/plain": code}
        if style == "text"
        else {
            "text/plain": code,
            "text/markdown": f"{fence}python\n{code}{fence}\n",
        }
    )


def registered_bundle(models: Sequence[registered.Registered], style: str) -> dict[str, Any]:
    """The MIME bundle of what `%%flaxmodel` registered; empty if that is nothing."""
    from . import registered

    if not models:
        return {}
    return _shown(registered.registered_text(models), lambda: html.registered(models), style)


def summary_bundle(found: Summary, depth: int | None, style: str) -> dict[str, Any]:
    """The MIME bundle of a summary; for `depth` see `summary.summary_text`."""
    from . import summary

    return _shown(summary.summary_text(found, depth), lambda: html.summary(found, depth), style)


def tree_bundle(name: str, variables: Any, style: str) -> dict[str, Any]:
    """The MIME bundle of a model's variables as a tree. It has scripts, as treescope makes it.

    Raises:
      FlaxMagicsError: there are none.
    """
    from . import variables as tree

    tree.check(name, variables)
    return _shown(tree.tree_text(variables), lambda: tree.tree_html(variables), style)


def _shown(plain: str, rich: Callable[[], str], style: str) -> dict[str, Any]:
    return {"text/plain": plain} if style == "text" else {"text/plain": plain, "text/html": rich()}
