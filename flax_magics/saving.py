"""Saving a session and loading it: what `Session.save` and `Session.load` do."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import restoring, snapshot, snapshotreader, snapshotwriter
from .atomic import Ticket, checked_target
from .autosave import Autosave
from .errors import FlaxMagicsError
from .history import Chain, newest
from .notes import SeenKeys
from .registry import Entry
from .restoring import Unfit
from .run import Note, Run
from .show.units import plural
from .snapshot import SavedModel, Snapshot
from .state import State
from .uninterrupted import uninterrupted
from .warm import WarmRuns
from .workers import Workers, wait_for

if TYPE_CHECKING:
    from .sessions import Session


@dataclass(frozen=True)
class Saved:
    """What was written: where to, how much, and of what.

    Attributes:
      bytes: the size of the file.
      models: names of the models whose variables are in it.
      draws: how many draws of `seed` had been made.
      runs: how many runs are in its history.
      when: seconds since the epoch, when the session was as it is in the file.
      kept: nothing was written: the file has a session, and this one has none yet.
    """

    path: str
    bytes: int
    models: tuple[str, ...]
    parameters: int
    seed: int
    draws: int
    runs: int
    when: float
    kept: bool = False


@dataclass(frozen=True)
class Restored:
    """What was read, and what became of it.

    Attributes:
      models: names of the registered models that have their variables back.
      waiting: models that are not registered yet; their variables are given to what is registered under their names.
      notes: what is other here than where it was saved.
    """

    path: str
    seed: int
    draws: int
    runs: int
    models: tuple[str, ...]
    waiting: tuple[SavedModel, ...]
    parameters: int
    saved: float
    notes: tuple[Note, ...] = ()


_writers = Workers(1)


def path_of(path: str | os.PathLike[str]) -> Path:
    """The path, `~` replaced. Raises FlaxMagicsError: it is none."""
    text = os.fspath(path)
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise FlaxMagicsError(f"{path!r} is no name of a file.")
    return Path(os.path.expanduser(text))


def save(session: Session, path: str | os.PathLike[str]) -> Saved:
    """Writes the session into a file. An interrupt returns at once, and leaves the old file or the whole new one."""
    target = path_of(path)
    state = session._state
    now = snapshot.with_sources(snapshot.take(state), state)
    ticket = Ticket()
    work = _writers.submit(lambda: snapshotwriter.write(target, now, None, ticket))
    try:
        size = wait_for(work)
    except KeyboardInterrupt:
        ticket.cancel()
        raise
    return saved_of(target, size, now, state)


def saved_of(target: Path, size: int, now: Snapshot, state: State) -> Saved:
    """What to say of a file that was written."""
    models = tuple(model.name for model in now.models if model.ready)
    runs = 0 if state.runs is None else state.runs.length
    return Saved(os.fspath(target), size, models, now.parameters, state.root.seed, state.root.draws, runs, now.saved)


def load(session: Session, path: str | os.PathLike[str]) -> Restored:
    """Reads a session out of a file into this one: all of it, or nothing."""
    target = path_of(path)
    found = snapshotreader.read(target)
    before = session._state
    models: dict[str, Entry] = dict(before.models)
    waiting: dict[str, SavedModel] = {}
    others: dict[str, tuple[str, ...]] = {}
    writes: list[Callable[[], None]] = []
    unfit: dict[str, tuple[SavedModel, Unfit]] = {}
    for saved in found.models:
        entry = models.get(saved.name)
        if entry is None:
            waiting[saved.name] = saved
            continue
        try:
            matched = restoring.match(saved, entry)
        except Unfit as error:
            unfit[saved.name] = saved, error
            continue
        models[saved.name], others[saved.name] = matched.entry, matched.other
        if matched.write is not None:
            writes.append(matched.write)
    if unfit:
        raise restoring.unfit(unfit, os.fspath(target))
    runs: Chain | None = None
    for kept in found.written:
        runs = Chain.add(runs, kept)
    state = State(found.root, models, found.opened, runs, found.seeds, waiting)
    seen = SeenKeys()
    seen.roots.add(found.root.data)
    restored = tuple(saved.name for saved in found.models if saved.name not in waiting and saved.ready)
    notes = (*_lost(before, found), *_edited(others), *_other(found))
    with uninterrupted():
        for write in writes:
            write()
        session._state = state
        session._seen = seen
        session._warm = WarmRuns()
        session._keeping = session._keeping.emptied()
        session._keeping.noted += [entry.replaced for entry in models.values() if entry.replaced is not None]
    return Restored(
        os.fspath(target),
        found.root.seed,
        found.root.draws,
        len(found.written),
        restored,
        tuple(saved for saved in waiting.values() if saved.ready),
        found.parameters,
        found.saved,
        notes,
    )


def _lost(before: State, found: Snapshot) -> tuple[Note, ...]:
    """What was in the session that the file replaced, and what stays that the file does not have.

    That models were built or initialised is not worth a word.
    """
    notes = []
    there = {_identity(kept.run()) for kept in found.written}
    runs = newest(before.runs, 0 if before.runs is None else before.runs.length)
    lost = sum(run.command != "init" and _identity(run) not in there for run in runs)
    if lost:
        what = f"{plural(lost, 'run')} of this session {'is' if lost == 1 else 'are'} not in the file"
        notes.append(Note("replaced", f"{what}: its root key and its history are now those of the file"))
    empty = [saved.name for saved in found.models if not saved.ready and _has_variables(before.models.get(saved.name))]
    if empty:
        verb = "has" if len(empty) == 1 else "have"
        text = f"{', '.join(empty)} {verb} no variables in the file: those that were here are dropped"
        notes.append(Note("dropped", text))
    names = {saved.name for saved in found.models}
    stays = [name for name, entry in before.models.items() if name not in names and _has_variables(entry)]
    if stays:
        verbs = ("is", "keeps its") if len(stays) == 1 else ("are", "keep their")
        notes.append(Note("stays", f"{', '.join(stays)} {verbs[0]} not in the file, and {verbs[1]} variables"))
    return tuple(notes)


def _identity(run: Run) -> tuple[Any, ...]:
    """What tells a run from every other, here and in a file."""
    return run.seed, run.draw, run.command, run.model, run.started


def _has_variables(entry: Entry | None) -> bool:
    return entry is not None and entry.ready


def _edited(others: Mapping[str, tuple[str, ...]]) -> tuple[Note, ...]:
    """Models that are registered, and other than they were when they were saved."""
    return tuple(
        Note("edited", f"{name} is not as it was saved, so that its runs may give something else: {', '.join(what)}")
        for name, what in others.items()
        if what
    )


def _other(found: Snapshot) -> tuple[Note, ...]:
    """What is other here than where the file was saved, if that may change bits."""
    now = {**snapshot.versions(), **snapshot.settings()}
    then = {**found.versions, **found.settings}
    names = [
        name for name in ("jax", "jaxlib", "flax", *snapshot.settings()) if name in then and then[name] != now[name]
    ]
    parts = [f"{name} {then[name]} → {now[name]}" for name in names]
    kind = snapshot.device()
    if found.device != kind:
        parts.append(f"device {found.device} → {kind}")
    if not parts:
        return ()
    text = f"saved with other versions or settings, so that runs may differ in their bits: {', '.join(parts)}"
    return (Note("versions", text),)


def autosave(session: Session, path: str | os.PathLike[str] | None) -> Saved | None:
    """Turns saving in the background on or off; on begins with a first time, and stays with the folder of that time.

    A session in which nothing has happened yet does not replace one that is in the file: a notebook that turns this on in
    its first cells would lose there what it is on for.
    """
    if path is None:
        old, session.autosaving = session.autosaving, None
        if old is not None:
            old.flush()
        return None
    saved = _there(session, path) or save(session, path)
    old, session.autosaving = session.autosaving, Autosave(path_of(path).absolute(), saved)
    if old is not None:
        old.flush()
    return saved


def _there(session: Session, path: str | os.PathLike[str]) -> Saved | None:
    """The session that a file has; None where this one is to replace it, whatever it is.

    Raises:
      FlaxMagicsError: it could not be replaced later.
    """
    if session._state.runs is not None or session._state.waiting:
        return None
    target = path_of(path)
    try:
        found = snapshotreader.read(target)
        size = os.stat(target).st_size
    except (FlaxMagicsError, OSError):  # none, or none of ours: the first time tells what there is to tell
        return None
    if not found.written:
        return None
    try:
        checked_target(target)
    except OSError as error:
        raise FlaxMagicsError(f"`{target}` cannot be written: {error.strerror}.") from None
    models = tuple(model.name for model in found.models if model.ready)
    root, runs = found.root, len(found.written)
    return Saved(os.fspath(target), size, models, found.parameters, root.seed, root.draws, runs, found.saved, kept=True)
