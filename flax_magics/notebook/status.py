"""The answers of `%flax` (the session at a glance), `%flax_key` and `%flax_vars`, as text and as HTML."""

from __future__ import annotations

import importlib.metadata
import os
from typing import TYPE_CHECKING, NamedTuple

import jax

from .._session import Session
from ..base import __version__
from ..base.digest import count_parameters
from ..base.measures import name_devices
from ..base.text import bytes_, clean, dotted, plural, table, width, wrap
from ..cells.reruns import Rerun
from ..compile.compiler import users_cache
from ..doctor.findings import bytes_by_device, live_arrays
from ..line.commands import COMMANDS, restart_line
from ..mesh.methods import cells
from ..report.html import render, shown_bundle
from ..report.text import Notice, line_of
from ..rng.keys import short_key
from ..run import Note
from ..snapshot.save import Autosave, clock
from ..state.state import Restart

if TYPE_CHECKING:
    from ..run import Run


KEPT = 5
"""How many of the last runs are shown."""
RERUNS = 8
"""How many cells that were run again, or whose variables were bound again, are listed."""
NO_MODEL = "none yet: begin a cell with %%flaxmodel, or write %flaxmodel net"
NO_RUN = "none yet"
RERUN = "out of order"
ONLY_FRESH = "To check: Restart & Run All"
FORMS = (
    *("%flax", "%%flaxmodel [net = Net(…)]", "%flaxmodel net [= Net(…)]", "%flax_init net(x)", "%flax_apply net(x)"),
    *(
        "%flax_grad loss(net, batch)",
        "%flax_train … loss(net, data)",
        "%flax_summary net(x)",
        "%flax_vars net [= EXPR]",
    ),
    *("%flax_key [--seed N | NAME]", "%flax_save FILE", "%flax_load FILE", "%flax_export [FILE]", "%flax_mesh data=-1"),
    *("%flax_history", "%flax_replay N", "%flax_free", "%flax_doctor"),
)
"""The commands as one writes them, in the order in which they are listed."""
MEANINGS = {command.name: command.does for command in COMMANDS.values()} | {
    "%flaxmodel": "registers what is there already"
}

# Each row of the tables below: the text of its cells.
Cells = tuple[tuple[str, ...], ...]


class KeyCard(NamedTuple):
    """The root key as shown: its seed, its draws so far, the first word of the key that the next draw splits, its PRNG
    implementation.
    """

    seed: int
    draws: int
    root: str
    impl: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of its line: `seed 0`, `3 draws so far`, `next is draw 4`, `threefry2x32`."""
        so_far = plural(self.draws, "draw") if self.draws else "no draw"
        return (f"seed {self.seed}", f"{so_far} so far", f"next is draw {self.draws + 1}", clean(self.impl))

    @property
    def ways(self) -> tuple[tuple[str, str], ...]:
        """Lines to write, each with what it does."""
        return (
            ("latent = %flax_key latent", "draws a key under a name"),
            (restart_line(self.seed, fresh=False), "starts again at draw 1: the same keys once more"),
            (restart_line(self.seed, fresh=True), "and every model is initialised anew"),
        )


class Status(NamedTuple):
    """The session at a glance.

    Attributes:
      devices: name (`cpu:0`), what it is (`NVIDIA H100`), and its memory in use.
      models: name, how it is built, and its variables in a few words.
      runs: newest last; the last `KEPT` are shown.
      amounts: label and amount of what is held and cached, such as `("programs kept", "3")`.
      mesh: how it is written and drawn, and where each model's variables live; empty without one.
      versions: `flax_magics 0.1.0` and so on, this package first.
      commands: how each is written, and what it does in a few words.
      reruns: a line for each cell that drew and was run again, or has a variable that was rebound since.
    """

    devices: Cells
    key: KeyCard
    models: Cells = ()
    runs: tuple[Run, ...] = ()
    amounts: Cells = ()
    versions: tuple[str, ...] = ("flax_magics",)
    commands: Cells = ()
    reruns: tuple[str, ...] = ()
    mesh: Cells = ()


def key_card(session: Session) -> KeyCard:
    """The session's root key, as it is shown."""
    return KeyCard(session.seed, session.draws, short_key(session.root_key), str(jax.random.key_impl(session.root_key)))


def variables(session: Session, name: str, notes: tuple[Note, ...] = ()) -> Notice:
    """The answer of `%flax_vars`."""
    model = session.models[name]
    collections = model.collections()
    if collections is None:
        return Notice(name, ("no variables", "the next run initialises"), notes)
    parameters, size = count_parameters(collections)
    amount = f"{plural(parameters, 'parameter')}, {bytes_(size)}"
    updates = (f"{kind}: update {times}" for kind, times in model.updates.items())
    return Notice(name, (model.weights, amount, *updates), notes)


def status(session: Session, reruns: tuple[Rerun, ...] = ()) -> Status:
    """Collects what `%flax` shows."""
    models, waiting = [], session.waiting
    for name, model in session.models.items():
        text = "not initialised"
        collections = model.collections()
        if collections is not None:
            parameters, size = count_parameters(collections)
            text = ", ".join(filter(None, (plural(parameters, "parameter"), bytes_(size), model.weights)))
        if name in waiting:
            text += f"; its variables in {waiting[name].file} do not fit"
        models.append((name, model.describe(), text))
    for name, saved in waiting.items():
        if name not in session.models:
            text = f"{plural(saved.parameters, 'parameter')} in {saved.file} wait until its cell is run"
            models.append((name, saved.text, text))
    devices: dict[tuple[str, str, str], list[jax.Device]] = {}
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        kind = device.device_kind if device.device_kind.lower() != device.platform else ""
        memory = [bytes_(stats[name]) for name in ("bytes_in_use", "bytes_limit") if stats.get(name) is not None]
        devices.setdefault((device.platform, kind, " of ".join(memory)), []).append(device)
    told = [rerun.text for rerun in reruns[-RERUNS:]]
    if len(reruns) > RERUNS:
        told.insert(0, f"{plural(len(reruns) - RERUNS, 'more cell')}: %flax_history marks their draws")
    autosave = () if session.autosaving is None else (("autosave", _autosave(session.autosaving)),)
    return Status(
        devices=tuple((name_devices(alike), *told) for (_, *told), alike in devices.items()),
        key=key_card(session),
        models=tuple(models),
        runs=tuple(session.last(KEPT)),
        amounts=(
            ("arrays alive in this process", bytes_(sum(bytes_by_device(live_arrays()).values()))),
            ("kept for %flax_replay", f"{bytes_(session.kept_bytes)} of {bytes_(session.replay_bytes)}"),
            ("compiled programs kept", str(len(session.programs))),
            ("on disk", _on_disk(session)),
            *autosave,
        ),
        reruns=tuple(told),
        versions=(f"flax_magics {__version__}", f"jax {jax.__version__}", f"flax {importlib.metadata.version('flax')}"),
        commands=tuple((form, MEANINGS[form.split()[0]]) for form in FORMS),
        mesh=tuple(cells(session.mesh(), {name: model.collections() for name, model in session.models.items()})),
    )


def _on_disk(session: Session) -> str:
    """Where compiled programs are kept on disk, and how many bytes they take."""
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
    """The row on autosave: the file, and what was saved there last, or why saving fails."""
    if autosaving.error is not None:
        return f"fails: {autosaving.error}"
    last = autosaving.last
    draws = f"{plural(last.draws, 'draw')} of seed {last.seed}"
    return f"{last.path}, last {clock(last.when)} with {draws}, {bytes_(last.bytes)}"


def restarted(restart: Restart) -> Notice:
    """The answer of `%flax_key --seed N`."""
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
        write = restart_line(restart.seed, fresh=True)
        notes.append(Note("kept", f"{names} {verb} the variables that were there", write=write))
    if restart.again and not restart.fresh:
        notes.append(Note("seed again", f"seed {restart.seed} was used before in this session: its keys come again"))
    return Notice("root key", tuple(texts), tuple(notes))


def key_bundle(card: KeyCard, style: str) -> dict[str, object]:
    """The MIME bundle of a bare `%flax_key`, which shows the root key."""
    lines = dotted((f"root key {clean(card.root)}", *card.parts)) + table(card.ways, indent="  ", gap="   ")
    return shown_bundle("\n".join(lines), lambda: render("key_card.html", {"card": card}), style)


def status_bundle(status: Status, style: str) -> dict[str, object]:
    """The MIME bundle of `%flax`: a block with a heading for each subject, the commands last."""
    key, versions = status.key, tuple(map(clean, status.versions))
    run_lines = [line_of(run).parts for run in status.runs[-KEPT:]]
    run_texts = [text for parts in run_lines for text in dotted(parts, width() - 2)] or [NO_RUN]
    lines = dotted(versions)
    lines += _block("devices", status.devices)
    lines += _block("mesh", status.mesh)
    lines += ["", "root key", *("  " + line for line in dotted((clean(key.root), *key.parts), width() - 2))]
    lines += _block("models", status.models or ((NO_MODEL,),))
    lines += ["", "last runs", *("  " + text for text in run_texts)]
    if status.reruns:
        lines += ["", RERUN, *(line for text in status.reruns for line in wrap(clean(text), "  "))]
        lines += wrap(ONLY_FRESH, "  ")
    lines += _block("memory and caches", status.amounts)
    lines += _block("commands", status.commands)

    def html() -> str:
        rows = [(name, list(filter(None, texts))) for name, *texts in run_lines]
        context = {"status": status, "runs": rows, "versions": versions, "no_model": NO_MODEL, "no_run": NO_RUN}
        return render("status.html", {**context, "rerun": RERUN, "only_fresh": ONLY_FRESH})

    return shown_bundle("\n".join(lines), html, style)


def _block(title: str, rows: Cells) -> list[str]:
    lines = table([tuple(map(clean, row)) for row in rows], indent="  ", gap="   ")
    return ["", title, *(line.rstrip() for line in lines)] if lines else []
