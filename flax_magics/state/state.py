"""A session's state at one moment: frozen, and replaced as a whole by every command that changes something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
from msgspec import Struct
from msgspec.structs import replace

from ..base.types import PyTree
from ..compile.placement import Placement
from ..errors import FlaxMagicsError
from ..models.calls import Path
from ..rng.keys import Draw, RootKey, StepDraw
from .entry import ModelEntry
from .runs import RunLog, StoredRun, of_draw
from .training import SavedTraining


class SavedInit(Struct, frozen=True, forbid_unknown_fields=True):
    """How a linen model's variables were initialised, as `InitRecord` has it; `program` is a digest."""

    key: PyTree
    method: Path
    args: PyTree
    kwargs: PyTree
    program: str


class SavedModel(Struct, frozen=True, forbid_unknown_fields=True):
    """A model's variables, and what is needed to compare them with a model that is registered under its name.

    A file's JSON has its fields under these names, with `Node`s in the place of trees.

    Attributes:
      api: the one of Flax's APIs that its module is written in.
      text: how it was built, in one line.
      source: the code of its classes, empty where that cannot be read.
      variables: by collection; None for a linen model before its init. Of an NNX module by type and path, with the
        keys and counts of random streams.
      stale: `NnxEntry.rebuild_next`.
      made: how a linen model's variables were initialised; None where no init of the model is known.
      assigned: the user has put other variables in their place.
      keys: with which the session built an NNX module; None where the user's code did.
      optimizer: the text of the one that trained it last; None where none did.
      training: what goes on with the last training; None where there is nothing to go on with.
      file: the path that it was read from.
    """

    name: str
    api: Literal["linen", "nnx"]
    text: str
    source: str
    variables: PyTree
    updates: Mapping[str, int] = {}
    outdated: bool = False
    stale: bool = False
    made: SavedInit | None = None
    assigned: bool = False
    keys: Mapping[str, PyTree] | None = None
    optimizer: str | None = None
    training: SavedTraining | None = None
    parameters: int = 0
    bytes: int = 0
    versions: Mapping[str, str] = {}
    file: str = ""

    @property
    def ready(self) -> bool:
        """Whether the file has variables of the model: none before its first init."""
        return self.variables is not None


def with_entry(models: Mapping[str, ModelEntry], entry: ModelEntry) -> Mapping[str, ModelEntry]:
    """`models` with `entry`.

    A cell that has a class alone registers an instance under the class's own name. Where nothing has used that one, and an
    instance is registered under a name of its own, it gives way.
    """
    cls = type(entry.model.module).__name__
    alone = models.get(cls)
    if cls == entry.name or alone is None or alone.used or type(alone.model.module).__name__ != cls:
        return {**models, entry.name: entry}
    return {name: other for name, other in models.items() if other is not alone} | {entry.name: entry}


class State(Struct, frozen=True):
    """Everything of a session that a command may change."""

    root: RootKey
    models: Mapping[str, ModelEntry] = {}
    opened: tuple[str, Draw] | None = None
    """The model whose init opened a draw and used its `params` key, and that draw: its next apply goes on with it."""
    runs: RunLog | None = None
    seeds: Mapping[int, tuple[int, str]] = {}
    """seed → the last draw under it before it was restarted, and its PRNG implementation."""
    waiting: Mapping[str, SavedModel] = {}
    """Variables read from a file whose models are not registered yet, by model name."""
    placement: Placement | None = None
    """The mesh that runs are laid out on, None for one device."""

    def after(self, stored: StoredRun, draw: Draw, entry: ModelEntry | None, opened: tuple[str, Draw] | None) -> State:
        """The state after a run that succeeded. A replay moves neither the root key nor the open draw."""
        root, opened = (self.root, self.opened) if stored.replayed else (self.root.after(draw), opened)
        models = self.models if entry is None else with_entry(self.models, entry)
        waiting = self.waiting and self._still_waiting(entry)
        log = RunLog.add(self.runs, stored)
        return replace(self, root=root, models=models, opened=opened, runs=log, waiting=waiting)

    def with_variables(self, entry: ModelEntry) -> State:
        """The state after the user has assigned variables to a model."""
        return replace(self, models=with_entry(self.models, entry), waiting=self._still_waiting(entry))

    def restarted(self, root: RootKey, *, fresh: bool) -> tuple[State, Restart]:
        """The state with another root key and no open draw. Draws of the old seed can still be found.

        Args:
          fresh: every model is to be initialised or built again at its next use.
        """
        models = {name: entry.to_be_made_anew() if fresh else entry for name, entry in self.models.items()}
        to_build = {name for name, entry in models.items() if entry.rebuild_next and entry.built is not None}
        keeping = tuple(name for name, entry in models.items() if entry.ready and name not in to_build)
        restart = Restart(root.seed, fresh, keeping, again=self._last(root.seed)[0] > 0)
        seeds = {**self.seeds, self.root.seed: self._last(self.root.seed)}
        waiting = {} if fresh else self.waiting
        return State(root, models, None, self.runs, seeds, waiting, self.placement), restart

    def _still_waiting(self, entry: ModelEntry | None) -> Mapping[str, SavedModel]:
        """The variables that still wait once `entry` has some: not those for the same model."""
        if entry is None or not entry.ready:
            return self.waiting
        return {name: model for name, model in self.waiting.items() if name != entry.name}

    def _last(self, seed: int) -> tuple[int, str]:
        """The number of the last draw under `seed`, 0 for none, and its PRNG implementation."""
        last = self.seeds.get(seed, (0, ""))
        if seed != self.root.seed or not self.root.draws:
            return last
        # A seed that was restarted may have gone further the first time.
        return max(last[0], self.root.draws), self.root.impl

    def find_draw(self, wanted: int | tuple[int, int] | None, *, opens: bool = False) -> Draw | None:
        """An earlier draw by its number, or by `(seed, number)`. Raises FlaxMagicsError if it was never made.

        Of a training it has the keys of its first step, since nobody is handed the keys that are folded for the steps.

        Args:
          opens: for an init, whose `params` key was not folded.
        """
        if wanted is None:
            return None
        seed, number = self.check_draw(wanted)
        impl = self._last(seed)[1]
        # `jax_default_prng_impl` may have changed since the seed was used.
        with jax.default_prng_impl(impl):
            root = RootKey.from_seed(seed)
        # Each draw splits the root that the draw before it left.
        for _ in range(number - 1):
            root = root.after(root.draw())
        draw = root.draw()
        trains = any(stored.facts.kind.trains for stored in of_draw(self.runs, seed, number))
        return StepDraw.of(draw, 0) if trains and not opens else draw

    def check_draw(self, wanted: int | tuple[int, int]) -> tuple[int, int]:
        """Seed and number of an earlier draw. Raises FlaxMagicsError if it was never made."""
        seed, number = wanted if isinstance(wanted, tuple) else (self.root.seed, wanted)
        last, _ = self._last(seed)
        if not 1 <= number <= last:
            drawn = f"draws 1 to {last}" if last > 1 else "draw 1 alone" if last else "no draw"
            others = [other for other in {**self.seeds, self.root.seed: 0} if 1 <= number <= self._last(other)[0]]
            message = f"draw {number} of seed {seed} was not made in this session: it has {drawn}."
            hint = ", ".join(f"{other}:{number} is draw {number} of seed {other}" for other in others[-3:])
            raise FlaxMagicsError(message, hint=hint or None, write="%flax_history")
        return seed, number


class Restart(Struct, frozen=True):
    """What a restart of the root key means: which models keep variables, and whether the seed was used before."""

    seed: int
    fresh: bool
    keeping: tuple[str, ...]
    again: bool
