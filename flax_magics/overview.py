"""What `%flax` and `%flax_key` show of a session, gathered."""

from __future__ import annotations

import importlib.metadata
import os

import jax

from . import __version__
from .celllog import Rerun
from .commands import MEANINGS
from .compiling import users_cache
from .keys import fingerprint
from .notes import summary
from .run import Note
from .sessions import Session
from .show.notice import Notice
from .show.status import Command, Device, KeyCard, Model, Status
from .show.units import bytes_, plural
from .state import Restart


def key_card(session: Session) -> KeyCard:
    """The root key as it stands."""
    key = session.root_key
    return KeyCard(session.seed, session.draws, fingerprint(key), str(jax.random.key_impl(key)))


def status(session: Session, reruns: tuple[Rerun, ...] = ()) -> Status:
    """The session at a glance."""
    models = []
    for name, model in session.models.items():
        text = "not initialised"
        collections = model.collections()
        if collections is not None:
            parameters, size = summary(collections)
            text = f"{plural(parameters, 'parameter')}, {bytes_(size)}"
        models.append(Model(name, model.describe(), text))
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
    return Status(
        devices=tuple(devices),
        key=key_card(session),
        models=tuple(models),
        runs=tuple(session.last(5)),
        caches=(("compiled programs kept", str(len(session.programs))), ("on disk", _on_disk(session))),
        memory=(
            ("arrays alive in this process", bytes_(held)),
            ("kept for %flax_replay", f"{bytes_(session.kept_bytes)} of {bytes_(session.replay_bytes)}"),
        ),
        reruns=tuple(rerun.text for rerun in reruns),
        versions=tuple(versions),
        commands=tuple(Command(write, meaning) for write, meaning in MEANINGS),
    )


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
        notes.append(Note("kept", f"{names} {verb} the variables that were there", write))
    if restart.again and not restart.fresh:
        notes.append(Note("seed again", f"seed {restart.seed} was used before in this session: its keys come again"))
    return Notice("root key", tuple(texts), tuple(notes))
