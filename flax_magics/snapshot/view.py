"""What `%flax_save` and `%flax_load` say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..base.text import bytes_, clean, clean_lines, dotted, plural
from ..line.options import quoted
from ..report.html import note_lines, notice_bundle, render, shown_bundle
from ..report.text import Notice, notice_text
from ..run import Note
from ..state.state import SavedModel
from .save import Autosave, Restored, Saved


def loaded_html(loaded: Loaded) -> str:
    """A file that was loaded, the code of each model that waits folded away."""
    notes = note_lines(loaded.notice.notes)
    texts = [clean(text) for text in loaded.notice.texts]
    return render(
        "loaded.html", {"name": clean(loaded.notice.name), "texts": texts, "notes": notes, "waiting": loaded.waiting}
    )


def loaded_bundle(loaded: Loaded, style: str) -> dict[str, Any]:
    """The MIME bundle of a file that was loaded; quiet, of its sharp bits alone."""
    if loaded.quiet:
        return notice_bundle(loaded.notice, style) if loaded.notice.notes else {}
    return shown_bundle(loaded_text(loaded), lambda: loaded_html(loaded), style)


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


def saved(saved: Saved, *, autosaving: bool = False) -> Notice:
    """What `%flax_save` answers."""
    what = plural(saved.parameters, "parameter")
    models = f"{', '.join(saved.models)}: {what}" if saved.models else "no model has variables yet"
    if saved.kept:
        return _not_replaced(saved)
    texts = (
        "autosave on, saved" if autosaving else "saved",
        models,
        plural(saved.runs, "run"),
        f"next is draw {saved.draws + 1} of seed {saved.seed}",
        bytes_(saved.bytes),
    )
    return Notice(saved.path, texts)


def _not_replaced(saved: Saved) -> Notice:
    """What `%flax_save --autosave` answers in a session that has nothing yet, where the file has something."""
    text = (
        f"{saved.path} has a session of {plural(saved.runs, 'run')}, saved {_when(saved.when)}: what changes variables next"
        " replaces it, unless it is loaded first"
    )
    note = Note("kept", text, write=f"%flax_load {quoted(saved.path)}")
    return Notice(saved.path, ("autosave on", "nothing saved yet"), (note,))


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


def loaded(restored: Restored, *, quiet: bool) -> Loaded:
    """What `%flax_load` answers."""
    texts = [
        "loaded",
        f"{', '.join(restored.models)} restored" if restored.models else "",
        _waiting(restored.waiting),
        plural(restored.parameters, "parameter") if restored.parameters else "no model had variables",
        plural(restored.runs, "run"),
        f"next is draw {restored.draws + 1} of seed {restored.seed}",
    ]
    notice = Notice(restored.path, tuple(text for text in texts if text), restored.notes)
    waiting = tuple(
        Waiting(model.name, model.text, model.source, f"%flaxmodel {model.name}") for model in restored.waiting
    )
    return Loaded(notice, waiting, quiet)


def _waiting(models: Sequence[SavedModel]) -> str:
    names = ", ".join(model.name for model in models)
    return f"{names} {'waits' if len(models) == 1 else 'wait'} to be registered" if models else ""
