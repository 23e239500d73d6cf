"""What `%flax` and a bare `%flax_key` show: the session at a glance, and its root key, as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .columns import WIDTH, clean, dotted, table, wrap
from .text import line as run_line
from .units import bytes_, count

if TYPE_CHECKING:
    from ..run import Run

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
class Model:
    """A registered model: its name, how it is built, and its variables in a few words."""

    name: str
    module: str
    variables: str


@dataclass(frozen=True)
class Command:
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
    models: tuple[Model, ...] = ()
    runs: tuple[Run, ...] = ()
    caches: tuple[tuple[str, str], ...] = ()
    memory: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    commands: tuple[Command, ...] = ()
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
