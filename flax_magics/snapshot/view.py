"""The answers of `%flax_save` and `%flax_load`."""

from __future__ import annotations

import time
from collections.abc import Iterator

from ..base.text import bytes_, clean, clean_lines, dotted, plural
from ..errors import advice_lines
from ..line.options import quoted
from ..report.html import note_lines, notice_bundle, render, shown_bundle
from ..report.text import Notice, notice_text
from ..run import Note
from ..state.state import SavedModel
from .save import Autosave, Restored, Saved

SHORT = 24
"""So many lines of code, of all waiting models together, are shown; of a model beyond that, the text says how to see them
and the HTML folds them.
"""


def loaded_bundle(restored: Restored, style: str, *, quiet: bool = False) -> dict[str, object]:
    """The MIME bundle of a loaded file; with `quiet` only of its notes, and empty without any."""
    if quiet:
        return notice_bundle(loaded(restored), style) if restored.notes else {}
    return shown_bundle(loaded_text(restored), lambda: loaded_html(restored), style)


def loaded_text(restored: Restored) -> str:
    """The line of `%flax_load` with its notes, then the code of each waiting model, indented, or how to see it."""
    lines = [notice_text(loaded(restored))]
    for model, parts, code, is_shown in _waiting(restored):
        lines += ["", *dotted((f"{clean(model.name)} = {clean(model.text)}", *parts))]
        source = f"import flax_magics; print(flax_magics.session().waiting[{model.name!r}].source)"
        lines += [f"    {line}".rstrip() for line in (code if is_shown else advice_lines(source))]
    return "\n".join(lines)


def loaded_html(restored: Restored) -> str:
    """The same as HTML, with the code of each waiting model folded."""
    notice = loaded(restored)
    facts = {"name": clean(notice.name), "texts": [clean(text) for text in notice.texts]}
    return render("loaded.html", {**facts, "notes": note_lines(notice.notes), "waiting": list(_waiting(restored))})


def _waiting(restored: Restored) -> Iterator[tuple[SavedModel, tuple[str, str], list[str], bool]]:
    """Each waiting model, what is said above its code, the lines of the code, and whether these are shown unfolded."""
    room = SHORT
    for model in restored.waiting:
        code = clean_lines(model.source)
        is_shown = len(code) <= room
        room -= len(code) if is_shown else 0
        many = "" if is_shown else f" ({plural(len(code), 'line')})"
        said = f"its code{many}, which was not run:" if code else "its code is not in the file"
        yield model, (f"waits for its cell, or for %flaxmodel {clean(model.name)}", said), code, is_shown


def loaded(restored: Restored) -> Notice:
    """The line of `%flax_load`, without the code of waiting models."""
    names = [model.name for model in restored.waiting]
    texts = [
        "loaded",
        f"{', '.join(restored.models)} restored" if restored.models else "",
        f"{', '.join(names)} {'waits' if len(names) == 1 else 'wait'} to be registered" if names else "",
        plural(restored.parameters, "parameter") if restored.parameters else "no model had variables",
        plural(restored.runs, "run"),
        f"next is draw {restored.draws + 1} of seed {restored.seed}",
    ]
    return Notice(restored.path, tuple(filter(None, texts)), restored.notes)


def saved(saved: Saved, *, autosaving: bool = False) -> Notice:
    """The line of `%flax_save`."""
    if saved.kept:
        return _not_replaced(saved)
    what = plural(saved.parameters, "parameter")
    texts = (
        "autosave on, saved" if autosaving else "saved",
        f"{', '.join(saved.models)}: {what}" if saved.models else "no model has variables yet",
        plural(saved.runs, "run"),
        f"next is draw {saved.draws + 1} of seed {saved.seed}",
        bytes_(saved.bytes),
    )
    return Notice(saved.path, texts)


def _not_replaced(saved: Saved) -> Notice:
    """The line of `%flax_save --autosave` where the file's session is kept, because this one is still empty."""
    text = (
        f"{saved.path} has a session of {plural(saved.runs, 'run')}, saved {clock(saved.when)}: what changes variables next"
        " replaces it, unless it is loaded first"
    )
    note = Note("kept", text, write=f"%flax_load {quoted(saved.path)}")
    return Notice(saved.path, ("autosave on", "nothing saved yet"), (note,))


def clock(seconds: float) -> str:
    """`at 03:42:33` for a time of today, with the date for any other day."""
    then = time.localtime(seconds)
    today = time.localtime()[:3] == then[:3]
    return time.strftime("at %H:%M:%S" if today else "on %Y-%m-%d at %H:%M:%S", then)


def autosave_ended(before: Autosave | None) -> Notice:
    """The line of `%flax_save --autosave off`."""
    return Notice("autosave", ("was off",) if before is None else ("off", _left(before)))


def autosave_failed(autosaving: Autosave, error: str) -> Notice:
    """The line of the first command after saving in the background has failed."""
    note = Note("autosave", error, write="%flax_save --autosave off")
    return Notice("autosave", ("fails", _left(autosaving)), (note,))


def _left(autosaving: Autosave) -> str:
    """What is left of the saved file."""
    path = autosaving.last.path
    return f"{path} stays as it was saved last" if autosaving.path.is_file() else f"{path} is not there any more"
