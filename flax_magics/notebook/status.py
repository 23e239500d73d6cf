"""What `%flax` and a bare `%flax_key` show: the session at a glance, and its root key; as text and as HTML."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from .._session import Session
from ..base import __version__
from ..base.digest import count_parameters
from ..base.text import WIDTH, bytes_, clean, count, dotted, plural, table, wrap
from ..cells.reruns import Rerun
from ..compile.compiler import users_cache
from ..line.commands import MEANINGS
from ..report import facts
from ..report.html import render, shown_bundle
from ..report.notice import Notice
from ..report.text import line as run_line
from ..rng.keys import short_key
from ..run import Note
from ..snapshot.save import Autosave
from ..snapshot.view import _when
from ..state.state import Restart

if TYPE_CHECKING:
    from ..run import Run


def status_html(now: Status) -> str:
    """What `%flax` shows."""
    runs = [
        (facts.name_of(run), [part for part in (facts.mode_of(run), clean(run.device), *facts.brief(run)) if part])
        for run in now.runs[-KEPT:]
    ]
    context = {"status": now, "runs": runs, "versions": versions(now), "no_model": NO_MODEL, "no_run": NO_RUN}
    context |= {"rerun": RERUN, "only_fresh": ONLY_FRESH}
    return render("status.html", context)


def key_card_html(card: KeyCard) -> str:
    """What a bare `%flax_key` shows."""
    return render("key_card.html", {"card": card})


def status_bundle(now: Status, style: str) -> dict[str, Any]:
    """The MIME bundle of `%flax`."""
    return shown_bundle(status_text(now), lambda: status_html(now), style)


def key_bundle(card: KeyCard, style: str) -> dict[str, Any]:
    """The MIME bundle of a bare `%flax_key`."""
    return shown_bundle(key_text(card), lambda: key_card_html(card), style)


RERUNS = 8
"""Cells that were run again, or whose variables were rebound, that are told of."""


def key_card(session: Session) -> KeyCard:
    """The root key as it stands."""
    key = session.root_key
    return KeyCard(session.seed, session.draws, short_key(key), str(jax.random.key_impl(key)))


def variables(session: Session, name: str, notes: tuple[Note, ...] = ()) -> Notice:
    """What `%flax_vars` answers."""
    model = session.models[name]
    collections = model.collections()
    if collections is None:
        return Notice(name, ("no variables", "the next run initialises"), notes)
    parameters, size = count_parameters(collections)
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
            parameters, size = count_parameters(collections)
            text = ", ".join(filter(None, (plural(parameters, "parameter"), bytes_(size), model.weights)))
        if name in waiting:
            text += f"; its variables in {waiting[name].file} do not fit"
        models.append(ModelLine(name, model.describe(), text))
    for name, saved in waiting.items():
        if name not in session.models:
            text = f"{plural(saved.parameters, 'parameter')} in {saved.file} wait until its cell is run"
            models.append(ModelLine(name, saved.text, text))
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
        commands=tuple(CommandHelp(write, meaning) for write, meaning in MEANINGS),
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


KEPT = 5
"""How many of the last runs are shown."""


@dataclass(frozen=True)
class Device:
    """A device: `cpu:0`, what it is (`NVIDIA H100`), and bytes in use and in all, None where it does not say."""

    name: str
    kind: str = ""
    used: int | None = None
    limit: int | None = None

    @property
    def memory(self) -> str:
        """`1.2 GB of 80.0 GB`, or nothing."""
        if self.used is None:
            return bytes_(self.limit) if self.limit is not None else ""
        return bytes_(self.used) + (f" of {bytes_(self.limit)}" if self.limit is not None else "")


@dataclass(frozen=True)
class KeyCard:
    """The root key: its seed, its draws so far, the first word of what the next draw splits, its implementation."""

    seed: int
    draws: int
    root: str
    impl: str

    @property
    def parts(self) -> tuple[str, ...]:
        """`seed 0`, `3 draws so far`, `next is draw 4`, `threefry2x32`."""
        so_far = "1 draw" if self.draws == 1 else f"{count(self.draws)} draws" if self.draws else "no draw"
        return (f"seed {self.seed}", f"{so_far} so far", f"next is draw {self.draws + 1}", clean(self.impl))

    @property
    def ways(self) -> tuple[tuple[str, str], ...]:
        """A line to write, and what it does."""
        return (
            ("latent = %flax_key latent", "draws a key under a name"),
            (f"%flax_key --seed {self.seed}", "starts again at draw 1: the same keys once more"),
            (f"%flax_key --seed {self.seed} --fresh", "and every model is initialised anew"),
        )


@dataclass(frozen=True)
class ModelLine:
    """A registered model: its name, how it is built, and its variables in a few words."""

    name: str
    module: str
    variables: str


@dataclass(frozen=True)
class CommandHelp:
    """How a command is written, and what it does in a few words."""

    write: str
    meaning: str


@dataclass(frozen=True)
class Status:
    """The session at a glance.

    Attributes:
      runs: newest last; the last `KEPT` are shown.
      caches: rows of label and amount, such as `("programs kept", "3")`.
      memory: the same for what is held, such as `("kept for replay", "1.2 MB of 256 MB")`.
      reruns: a line for each cell that drew and was run again, or has a variable that was rebound since.
      versions: package and version, such as `("flax_magics", "0.1.0")`, which comes first.
    """

    devices: tuple[Device, ...]
    key: KeyCard
    models: tuple[ModelLine, ...] = ()
    runs: tuple[Run, ...] = ()
    caches: tuple[tuple[str, str], ...] = ()
    memory: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    commands: tuple[CommandHelp, ...] = ()
    reruns: tuple[str, ...] = ()


def key_text(card: KeyCard) -> str:
    """What a bare `%flax_key` shows."""
    ways = table(card.ways, indent="  ", gap="   ")
    return "\n".join([*dotted((f"root key {clean(card.root)}", *card.parts)), *ways])


def status_text(status: Status) -> str:
    """What `%flax` shows: a headed block for each thing there is, commands last."""
    key = status.key
    lines = dotted(versions(status))
    lines += _block("devices", [(d.name, d.kind, d.memory) for d in status.devices])
    lines += ["", "root key", *("  " + line for line in dotted((clean(key.root), *key.parts), WIDTH - 2))]
    lines += _block("models", [(m.name, m.module, m.variables) for m in status.models] or [(NO_MODEL,)])
    lines += ["", "last runs", *("  " + part for text in run_lines(status) for part in text.splitlines())]
    if status.reruns:
        lines += ["", RERUN, *(line for text in status.reruns for line in wrap(clean(text), "  "))]
        lines += wrap(ONLY_FRESH, "  ")
    lines += _block("memory and caches", [*status.memory, *status.caches])
    lines += _block("commands", [(c.write, c.meaning) for c in status.commands])
    return "\n".join(lines)


NO_MODEL = "none yet: begin a cell with %%flaxmodel, or write %flaxmodel net"
NO_RUN = "none yet"
RERUN = "cells that drew and were run again, or whose variables were rebound since"
ONLY_FRESH = "Run All draws once for each: whether it gives the same, only a fresh run can tell"


def versions(status: Status) -> tuple[str, ...]:
    """`jax 0.10.2` for each package, in the order given; without any, the name of this one."""
    return tuple(clean(f"{name} {version}") for name, version in status.versions) or ("flax_magics",)


def run_lines(status: Status) -> list[str]:
    """The last runs, oldest first, a line each."""
    return [run_line(run, WIDTH - 2) for run in status.runs[-KEPT:]] or [NO_RUN]


def _block(title: str, rows: Iterable[Sequence[str]]) -> list[str]:
    lines = table([tuple(map(clean, row)) for row in rows], indent="  ", gap="   ")
    return ["", title, *(line.rstrip() for line in lines)] if lines else []
