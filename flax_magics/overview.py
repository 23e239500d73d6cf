"""What `%flax` and `%flax_key` show of a session, gathered."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Sequence

import jax

from . import __version__
from .autosave import Autosave
from .celllog import Rerun
from .commands import MEANINGS
from .compiling import users_cache
from .keys import fingerprint
from .notes import summary
from .options import quoted
from .run import Note
from .saving import Restored, Saved
from .sessions import Session
from .show.loaded import Loaded, Waiting
from .show.notice import Notice
from .show.status import Command, Device, KeyCard, Model, Status
from .show.units import bytes_, plural
from .snapshot import SavedModel
from .state import Restart

RERUNS = 8
"""Cells that were run again, or whose variables were rebound, that are told of."""


def key_card(session: Session) -> KeyCard:
    """The root key as it stands."""
    key = session.root_key
    return KeyCard(session.seed, session.draws, fingerprint(key), str(jax.random.key_impl(key)))


def variables(session: Session, name: str, notes: tuple[Note, ...] = ()) -> Notice:
    """What `%flax_vars` answers."""
    model = session.models[name]
    collections = model.collections()
    if collections is None:
        return Notice(name, ("no variables", "the next run initialises"), notes)
    parameters, size = summary(collections)
    amount = f"{plural(parameters, 'parameter')}, {bytes_(size)}"
    updates = (f"{kind}: update {times}" for kind, times in model.updates.items())
    return Notice(name, (model.weights, amount, *updates), notes)


def status(session: Session, reruns: tuple[Rerun, ...] = ()) -> Status:
    """The session at a glance."""
    models = []
    waiting = session.waiting
    for name, model in session.models.items():
        text = "not initialised"
        collections = model.collections()
        if collections is not None:
            parameters, size = summary(collections)
            text = ", ".join(filter(None, (plural(parameters, "parameter"), bytes_(size), model.weights)))
        if name in waiting:
            text += f"; its variables in {waiting[name].file} do not fit"
        models.append(Model(name, model.describe(), text))
    for name, saved in waiting.items():
        if name not in session.models:
            text = f"{plural(saved.parameters, 'parameter')} in {saved.file} wait until its cell is run"
            models.append(Model(name, saved.text, text))
    devices = []
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        kind = device.device_kind if device.device_kind.lower() != device.platform else ""
        devices.append(
            Device(f"{device.platform}:{device.id}", kind, stats.get("bytes_in_use"), stats.get("bytes_limit"))
        )
    held = sum(
        array.nbytes for array in jax.live_arrays() if not jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    )
    versions = [("flax_magics", __version__), ("jax", jax.__version__), ("flax", importlib.metadata.version("flax"))]
    saving = () if session.autosaving is None else (("autosave", _autosave(session.autosaving)),)
    return Status(
        devices=tuple(devices),
        key=key_card(session),
        models=tuple(models),
        runs=tuple(session.last(5)),
        caches=(("compiled programs kept", str(len(session.programs))), ("on disk", _on_disk(session)), *saving),
        memory=(
            ("arrays alive in this process", bytes_(held)),
            ("kept for %flax_replay", f"{bytes_(session.kept_bytes)} of {bytes_(session.replay_bytes)}"),
        ),
        reruns=_told([rerun.text for rerun in reruns]),
        versions=tuple(versions),
        commands=tuple(Command(write, meaning) for write, meaning in MEANINGS),
    )


def _told(reruns: list[str]) -> tuple[str, ...]:
    """The last of them; of more it is said how many."""
    more = len(reruns) - RERUNS
    return (*([f"{plural(more, 'more cell')}: %flax_history marks their draws"] if more > 0 else []), *reruns[-RERUNS:])


def _on_disk(session: Session) -> str:
    """Where programs are kept for the next kernel, and how much there is."""
    disk, theirs = session.programs.compiler.disk, users_cache()
    if theirs is not None:
        return f"in JAX's own cache, as you set it: {theirs}"
    if disk is None:
        return "off"
    folder = str(disk.folder)
    home = os.path.expanduser("~")
    if folder.startswith(home + os.sep):
        folder = "~" + folder[len(home) :]
    return f"{bytes_(disk.size)} in {folder}"


def _autosave(autosaving: Autosave) -> str:
    """Where the session is saved in the background, and what was saved last."""
    if autosaving.error is not None:
        return f"fails: {autosaving.error}"
    last = autosaving.last
    draws = f"{plural(last.draws, 'draw')} of seed {last.seed}"
    return f"{last.path}, last {_when(last.when)} with {draws}, {bytes_(last.bytes)}"


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


def restarted(restart: Restart) -> Notice:
    """What `%flax_key --seed N` answers."""
    texts = ["restarted", f"seed {restart.seed}", "next is draw 1"]
    notes = []
    names = ", ".join(restart.keeping)
    if restart.fresh:
        texts.append("models initialise anew")
        if restart.keeping:
            verb = "keeps its" if len(restart.keeping) == 1 else "keep their"
            notes.append(Note("kept", f"{names} {verb} variables until the cell that built {names} is run again"))
    elif restart.keeping:
        verb = "keeps" if len(restart.keeping) == 1 else "keep"
        write = f"%flax_key --seed {restart.seed} --fresh"
        notes.append(Note("kept", f"{names} {verb} the variables that were there", write=write))
    if restart.again and not restart.fresh:
        notes.append(Note("seed again", f"seed {restart.seed} was used before in this session: its keys come again"))
    return Notice("root key", tuple(texts), tuple(notes))
