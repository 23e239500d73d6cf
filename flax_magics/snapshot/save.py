"""Saves and loads a session, at once or in the background, and what `%flax_save` and `%flax_load` answer."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import is_spread
from ..base.files import checked_target
from ..base.text import bytes_, clean, clean_lines, dotted, plural
from ..base.threads import Future, Workers, uninterrupted, wait_for
from ..compile.cache import Services
from ..compile.placement import agree, whole
from ..errors import FlaxMagicsError, advice_lines
from ..line.options import quoted
from ..report.html import note_lines, notice_bundle, render, shown_bundle
from ..report.text import Notice, notice_text
from ..run import COMMANDS, Note, Run
from ..state.runs import RunLog, backwards, length
from ..state.state import SavedModel, State
from . import document, format, restore
from .document import Snapshot, WrittenRuns
from .restore import Matched, Unfit


class Saved(Struct, frozen=True):
    """What was written.

    Attributes:
      bytes: the size of the file.
      models: names of the models whose variables are in it.
      draws: how many draws of `seed` had been made.
      runs: how many runs are in its history.
      when: seconds since the epoch at which the session was as in the file.
      kept: nothing was written, because the file has a session and this one has none yet.
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


class Restored(Struct, frozen=True):
    """What was loaded.

    Attributes:
      models: names of the registered models that have their variables back.
      waiting: saved models that are not registered yet; registering one under its name restores it.
      trained: model → how many steps of its training are finished, which `--resume` goes on with.
      notes: how things here differ from where the file was saved.
    """

    path: str
    seed: int
    draws: int
    runs: int
    models: tuple[str, ...]
    waiting: tuple[SavedModel, ...]
    parameters: int
    trained: Mapping[str, int] = {}
    notes: tuple[Note, ...] = ()


# One thread, so that two files are written one after the other.
_writers = Workers(1)


def path_of(path: str | os.PathLike[str]) -> Path:
    """The path, with `~` expanded. Raises FlaxMagicsError where it is no file name."""
    text = os.fspath(path)
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise FlaxMagicsError(f"{path!r} is no name of a file.")
    return Path(os.path.expanduser(text))


def _replaceable(path: str | os.PathLike[str], line: str = "%flax_save") -> Path:
    """`path_of` a file that may be written: a new one, an empty one, or an earlier session.

    Args:
      line: the command, for the advice.

    Raises:
      FlaxMagicsError: another file is there, or a new one would have the ending of another format.
    """
    target = path_of(path)
    if os.path.isfile(target):
        allowed = os.path.getsize(target) == 0 or format.is_session(target)
        what = f"`{path}` is there already, and no %flax_save wrote it."
    else:  # a folder and the like is told where it is written
        allowed = target.suffix in ("", ".safetensors") or os.path.lexists(target)
        what = f"a session is a file with the ending .safetensors, and `{path}` has another."
    if not allowed:
        numbered = ("", *(f"_{n}" for n in range(2, 1000)))
        names = (target.with_name(f"{target.stem}{number}.safetensors") for number in numbered)
        free = next(name for name in names if not os.path.lexists(name))
        raise FlaxMagicsError(what, write=f"{line} {quoted(os.fspath(free))}")
    return target


def save_session(state: State, path: str | os.PathLike[str], services: Services) -> Saved:
    """Writes a session into a file. An interrupt returns at once, and leaves the old file or the whole new one.

    Of several processes with one mesh the first writes, once it has the parts of arrays that others hold.
    """
    target = _replaceable(path)
    for entry in state.models.values():
        entry.check_alive(f"{entry.name}(…)")
    snapshot = document.with_sources(document.take(state), state)
    trees = [(model.variables, model.training and model.training.trees) for model in snapshot.models]
    if any(map(is_spread, jax.tree_util.tree_leaves(trees))):
        agree(services, state.placement, state.root.draw(), f"%flax_save {path}")
        snapshot = replace(snapshot, models=tuple(map(_whole, snapshot.models)))
    if not _writes(state):
        return _saved(target, 0, snapshot, state.runs)
    ticket = threading.Lock()
    work = _writers.submit(lambda: document.write(target, snapshot, state.runs, None, ticket))
    try:
        size = wait_for(work)
    except KeyboardInterrupt:
        ticket.acquire(blocking=False)  # once this thread has it, the writer does not replace the file any more
        raise
    return _saved(target, size, snapshot, state.runs)


def _whole(model: SavedModel) -> SavedModel:
    """The model with all of each array, where processes have parts of it; they all have to ask for that."""
    training = model.training
    if training is not None:
        training = replace(training, trees=jax.tree_util.tree_map(whole, training.trees))
    return replace(model, variables=jax.tree_util.tree_map(whole, model.variables), training=training)


def _writes(state: State) -> bool:
    """Whether this process writes the file: of several with one mesh the first, since all have the same session."""
    processes = None if state.placement is None else state.placement.processes
    return processes is None or processes.rank == 0


def _saved(path: Path, size: int, snapshot: Snapshot, runs: RunLog | None) -> Saved:
    """The record of a file that holds `snapshot` and `runs`."""
    return Saved(
        path=os.fspath(path),
        bytes=size,
        models=tuple(model.name for model in snapshot.models if model.ready),
        parameters=snapshot.parameters,
        seed=snapshot.root.seed,
        draws=snapshot.root.draws,
        runs=length(runs),
        when=snapshot.saved,
    )


def load_session(current: State, path: str | os.PathLike[str]) -> tuple[State, list[Callable[[], None]], Restored]:
    """Reads a session from a file. Changes nothing.

    Args:
      current: the state that it is to replace.

    Returns:
      The new state, functions that write variables into the user's own NNX objects, and what to say.
    """
    target = path_of(path)
    snapshot, runs = document.read(target)
    matches: dict[str, Matched] = {}
    unfit: dict[str, Unfit] = {}
    for saved in snapshot.models:
        if saved.name in current.models:
            try:
                matches[saved.name] = restore.match(saved, current.models[saved.name])
            except Unfit as error:
                unfit[saved.name] = error
    # All models or none: half of a session would be neither the file's nor the old one.
    if unfit:
        raise restore.unfit(unfit, os.fspath(target))
    models = {**current.models, **{name: matched.entry for name, matched in matches.items()}}
    waiting = {saved.name: saved for saved in snapshot.models if saved.name not in matches}
    edits = {name: ", ".join(matched.other) for name, matched in matches.items() if matched.other}
    edited = [
        Note("edited", f"{name} is not as it was saved, so that its runs may give something else: {what}")
        for name, what in edits.items()
    ]
    restored = Restored(
        path=os.fspath(target),
        seed=snapshot.root.seed,
        draws=snapshot.root.draws,
        runs=length(runs),
        models=tuple(saved.name for saved in snapshot.models if saved.name in matches and saved.ready),
        waiting=tuple(saved for saved in waiting.values() if saved.ready),
        parameters=snapshot.parameters,
        trained={saved.name: saved.training.training().step for saved in snapshot.models if saved.training is not None},
        notes=(*_lost(current, snapshot, runs), *edited, *_other(snapshot), *_of_mesh(snapshot, current)),
    )
    state = State(snapshot.root, models, snapshot.opened, runs, snapshot.seeds, waiting, current.placement)
    return state, [matched.write for matched in matches.values() if matched.write is not None], restored


def _lost(current: State, snapshot: Snapshot, runs: RunLog | None) -> list[Note]:
    """Notes on what the loaded session replaces, and on models here that the file does not have.

    Inits and constructions that are lost are not worth a note.
    """
    notes = []
    in_file = {_identity(stored.facts) for stored in backwards(runs)}
    drawn = [stored.facts for stored in backwards(current.runs) if not COMMANDS[stored.facts.command].opens]
    lost = Counter(facts.model for facts in reversed(drawn) if _identity(facts) not in in_file)
    if lost:
        # The draws of `%flax_key` are of no model.
        whose = [plural(n, "key") if name is None else f"{plural(n, 'run')} of {name}" for name, n in lost.items()]
        text = (
            f"gone with the session that was here: {', '.join(whose)}; root key and history are those of the file now"
        )
        notes.append(Note("replaced", text))
    ready = {name for name, entry in current.models.items() if entry.ready}
    empty = [saved.name for saved in snapshot.models if not saved.ready and saved.name in ready]
    if empty:
        verb = "has" if len(empty) == 1 else "have"
        text = f"{', '.join(empty)} {verb} no variables in the file: those that were here are dropped"
        notes.append(Note("dropped", text))
    stays = [name for name in current.models if name in ready and name not in {saved.name for saved in snapshot.models}]
    if stays:
        verbs = ("is", "keeps its") if len(stays) == 1 else ("are", "keep their")
        notes.append(Note("stays", f"{', '.join(stays)} {verbs[0]} not in the file, and {verbs[1]} variables"))
    return notes


def _identity(facts: Run) -> tuple[object, ...]:
    """What identifies a run, in this process and in a file."""
    return (facts.seed, facts.draw, facts.command, facts.model, facts.started)


def _other(snapshot: Snapshot) -> list[Note]:
    """A note on versions, settings and devices that are others than where the file was saved, if bits may change."""
    here = {**document.versions(), **document.settings(), "device": document.device()}
    there = {**snapshot.versions, **snapshot.settings, "device": snapshot.device}
    names = ("jax", "jaxlib", "flax", *document.settings(), "device")
    parts = [f"{name} {there[name]} → {here[name]}" for name in names if name in there and there[name] != here[name]]
    text = f"saved with other versions or settings, so that runs may differ in their bits: {', '.join(parts)}"
    return [Note("versions", text)] if parts else []


def _of_mesh(snapshot: Snapshot, current: State) -> list[Note]:
    """A note where the file was saved on another mesh than this session's: on what is claimed of its runs here."""
    here = "" if current.placement is None else current.placement.axes
    if snapshot.mesh == here:
        return []
    was, now = (f"on the mesh {clean(axes)}" if axes else "without a mesh" for axes in (snapshot.mesh, here))
    claim = "keys and dropout masks are the same in every bit, sums may differ in the last ones"
    return [Note("mesh", f"saved {was}, and here runs are {now}: {claim}")]


def autosave_session(state: State, path: str | os.PathLike[str], services: Services) -> Autosave:
    """Starts saving in the background: once now, and from then on into the same file.

    A session without runs does not replace one in the file: turning autosave on in the first cell, after a restart,
    would lose what it is for.
    """
    target = _replaceable(path, _AUTOSAVE)
    # Absolute, since the working folder may change before a later save.
    return Autosave(target.absolute(), _there(state, target) or save_session(state, path, services))


def _there(state: State, target: Path) -> Saved | None:
    """The record of the session that the file has; None where it is to be replaced now.

    Raises:
      FlaxMagicsError: the file is kept, but could not be replaced later.
    """
    if state.runs is not None or state.waiting:
        return None
    try:
        snapshot, runs = document.read(target)
        size = os.stat(target).st_size
    except (FlaxMagicsError, OSError):  # no file, or none of ours: the first save reports what is wrong
        return None
    if runs is None:
        return None
    try:
        checked_target(target)
    except OSError as error:
        raise FlaxMagicsError(f"`{target}` cannot be written: {error.strerror}.") from None
    return replace(_saved(target, size, snapshot, runs), kept=True)


_AUTOSAVE = "%flax_save --autosave"
REST = 4.0
"""After a write, rest this many times as long: saving takes at most a fifth of the time."""


class Autosave:
    """Saves snapshots into one file in the background, the newest last.

    Args:
      path: of the file, absolute.
      last: what was written there last.
    """

    def __init__(self, path: Path, last: Saved) -> None:
        self.path = path
        self.last = last
        """What was written last, with the path as the user gave it."""
        self.error: str | None = None
        """Why the last write failed, None if it succeeded."""
        # The error that the user was told last.
        self._told: str | None = None
        self._history = WrittenRuns(digest=False)
        self._sources: dict[str, tuple[object, str]] = {}
        self._worker = Workers(1)
        self._job: Future | None = None
        """The job that writes the newest snapshot."""
        # Only the newest: a job that runs late writes that, and the jobs after it find nothing.
        self._pending: deque[tuple[Snapshot, State]] = deque(maxlen=1)
        self._hurry = threading.Event()

    @property
    def idle(self) -> bool:
        """Whether nothing is being written, nor waits for it."""
        return self._job is None or self._job.done()

    def after(self, run: Run, state: State) -> None:
        """Saves soon, if the run changed variables."""
        if run.changed or run.made is not None or run.trained is not None:
            self.offer(state)

    def offer(self, state: State) -> None:
        """Takes a snapshot of the state, to be written soon."""
        if not _writes(state):
            return
        try:
            snapshot = document.take(state)
        except Exception as error:  # the run has succeeded, and must not fail for its saving
            self.error = f"`{self.path}` was not saved: {type(error).__name__}: {error}"
            return
        with uninterrupted():  # an interrupt in between would leave a snapshot that no job writes
            self._pending.append((snapshot, state))
            self._job = self._worker.submit(self._work)

    def flush(self) -> None:
        """Waits until every snapshot is written, skipping the rests."""
        self._hurry.set()
        try:
            if self._job is not None:
                wait_for(self._job)
        finally:
            self._hurry.clear()

    def news(self) -> str | None:
        """Why saving fails; None if it does not, or if it was told before."""
        error = self.error
        if error is None or error == self._told:
            return None
        self._told = error
        return error

    def _work(self) -> None:
        if not self._pending:  # an earlier job wrote it already
            return
        start = time.monotonic()
        self._write(*self._pending.pop())
        self._rest(REST * (time.monotonic() - start))

    def _write(self, snapshot: Snapshot, state: State) -> None:
        try:
            snapshot = document.with_sources(snapshot, state, self._sources)
            size = document.write(_replaceable(self.path, _AUTOSAVE), snapshot, state.runs, self._history)
            self.last = _saved(Path(self.last.path), size, snapshot, state.runs)
            self.error = self._told = None
        except FlaxMagicsError as error:
            self.error = error.message
        except Exception as error:  # on this thread nobody would see it: the next command tells it
            self.error = f"`{self.path}` was not saved: {type(error).__name__}: {error}"

    def _rest(self, seconds: float) -> None:
        """Waits up to a minute; ends early if somebody flushes, or if Python is about to exit."""
        end = time.monotonic() + min(seconds, 60.0)
        main = threading.main_thread()
        while main.is_alive() and time.monotonic() < end and not self._hurry.is_set():
            # In short steps, because the end of the main thread wakes nobody.
            self._hurry.wait(max(0.0, min(0.05, end - time.monotonic())))


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
