"""What `%flax_save` and `%flax_load` say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base.text import bytes_, clean, clean_lines, dotted, plural
from ..line.options import quoted
from ..report.html import note_lines, notice_bundle, render, shown_bundle
from ..report.text import Notice, notice_text
from ..run import Note
from ..state.saved import SavedModel
from .save import Autosave, Restored, Saved

if TYPE_CHECKING:
    pass


def loaded_html(found: Loaded) -> str:
    """A file that was loaded, the code of each model that waits folded away."""
    notes = note_lines(found.notice.notes)
    texts = [clean(text) for text in found.notice.texts]
    return render(
        "loaded.html", {"name": clean(found.notice.name), "texts": texts, "notes": notes, "waiting": found.waiting}
    )


def loaded_bundle(found: Loaded, style: str) -> dict[str, Any]:
    """The MIME bundle of a file that was loaded; quiet, of its sharp bits alone."""
    if found.quiet:
        return notice_bundle(found.notice, style) if found.notice.notes else {}
    return shown_bundle(loaded_text(found), lambda: loaded_html(found), style)


SHORT = 24
"""Lines of code that are not folded away."""


@dataclass(frozen=True)
class Waiting:
    """A model whose variables wait until it is registered.

    Attributes:
      module: how it was built, such as `Net(features=8)`.
      source: its code, as it stands in the file; empty if it is not there.
      write: the line that registers it, if its cell does not.
    """

    name: str
    module: str
    source: str
    write: str

    @property
    def parts(self) -> tuple[str, ...]:
        """What is said of it before its code."""
        code = "its code, which was not run:" if self.source else "its code is not in the file"
        return (f"waits for its cell, or for {clean(self.write)}", code)

    @property
    def lines(self) -> list[str]:
        """Its code, safe to print."""
        return clean_lines(self.source)

    @property
    def short(self) -> bool:
        """Whether its code is shown at once where it could be folded away."""
        return len(self.lines) <= SHORT


@dataclass(frozen=True)
class Loaded:
    """A file that was loaded: a line on what was restored, and each model that waits.

    Attributes:
      quiet: sharp bits alone.
    """

    notice: Notice
    waiting: tuple[Waiting, ...] = ()
    quiet: bool = False


def loaded_text(loaded: Loaded) -> str:
    """A line or two, sharp bits beneath, then the code of what waits, indented."""
    lines = [notice_text(loaded.notice)]
    for model in loaded.waiting:
        lines += ["", *dotted((f"{clean(model.name)} = {clean(model.module)}", *model.parts))]
        lines += [f"    {line}".rstrip() for line in model.lines]
    return "\n".join(lines)


def saved(done: Saved, *, autosaving: bool = False) -> Notice:
    """What `%flax_save` answers."""
    what = plural(done.parameters, "parameter")
    models = f"{', '.join(done.models)}: {what}" if done.models else "no model has variables yet"
    if done.kept:
        return _not_replaced(done)
    texts = (
        "autosave on, saved" if autosaving else "saved",
        models,
        plural(done.runs, "run"),
        f"next is draw {done.draws + 1} of seed {done.seed}",
        bytes_(done.bytes),
    )
    return Notice(done.path, texts)


def _not_replaced(done: Saved) -> Notice:
    """What `%flax_save --autosave` answers in a session that has nothing yet, where the file has something."""
    text = (
        f"{done.path} has a session of {plural(done.runs, 'run')}, saved {_when(done.when)}: what changes variables next"
        " replaces it, unless it is loaded first"
    )
    note = Note("kept", text, write=f"%flax_load {quoted(done.path)}")
    return Notice(done.path, ("autosave on", "nothing saved yet"), (note,))


def _when(seconds: float) -> str:
    """`03:42:33` of today, with the date of any other day."""
    then = time.localtime(seconds)
    today = time.localtime()[:3] == then[:3]
    return time.strftime("at %H:%M:%S" if today else "on %Y-%m-%d at %H:%M:%S", then)


def autosave_ended(before: Autosave | None) -> Notice:
    """What `%flax_save --autosave off` answers."""
    if before is None:
        return Notice("autosave", ("was off",))
    return Notice("autosave", ("off", _left(before)))


def autosave_failed(autosaving: Autosave, error: str) -> Notice:
    """What the first command says after saving in the background has failed."""
    note = Note("autosave", error, write="%flax_save --autosave off")
    return Notice("autosave", ("fails", _left(autosaving)), (note,))


def _left(autosaving: Autosave) -> str:
    """What is there of what was saved."""
    path = autosaving.last.path
    return f"{path} stays as it was saved last" if autosaving.path.is_file() else f"{path} is not there any more"


def loaded(done: Restored, *, quiet: bool) -> Loaded:
    """What `%flax_load` answers."""
    texts = [
        "loaded",
        f"{', '.join(done.models)} restored" if done.models else "",
        _waiting(done.waiting),
        plural(done.parameters, "parameter") if done.parameters else "no model had variables",
        plural(done.runs, "run"),
        f"next is draw {done.draws + 1} of seed {done.seed}",
    ]
    notice = Notice(done.path, tuple(text for text in texts if text), done.notes)
    waiting = tuple(Waiting(model.name, model.text, model.source, f"%flaxmodel {model.name}") for model in done.waiting)
    return Loaded(notice, waiting, quiet)


def _waiting(models: Sequence[SavedModel]) -> str:
    names = ", ".join(model.name for model in models)
    return f"{names} {'waits' if len(models) == 1 else 'wait'} to be registered" if models else ""
