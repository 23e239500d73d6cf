"""What a session is at one moment: frozen, replaced as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import jax
from msgspec import Struct
from msgspec.structs import replace

from ..base.types import PyTree
from ..errors import FlaxMagicsError
from ..models.calls import Path
from ..rng.keys import Draw, RootKey
from .entry import ModelEntry
from .runs import RunLog, StoredRun


class SavedInit(Struct, frozen=True, forbid_unknown_fields=True):
    """How a linen model's variables came to be, as `InitRecord` has it; `program` is a digest."""

    key: PyTree
    method: Path
    args: PyTree
    kwargs: PyTree
    program: str


class SavedModel(Struct, frozen=True, forbid_unknown_fields=True):
    """A model's variables, and what is needed to hold them against a model that is registered under its name.

    A file's JSON has its fields under these names, with `Node`s in the place of trees.

    Attributes:
      holds_variables: an NNX module, not a linen one.
      text: how it was built, in one line.
      source: the code of its classes, empty where that was not to be had.
      variables: of a linen model its collections, None before an init; of an NNX one (type, path, value) of each
        variable.
      made: how a linen model's variables came to be; None where no init of the model is known.
      assigned: the user put other variables in their place.
      keys: what the session built an NNX module with; None where the user's code did.
      file: where it was read.
    """

    name: str
    holds_variables: bool
    text: str
    source: str
    variables: PyTree
    updates: Mapping[str, int] = {}
    outdated: bool = False
    stale: bool = False
    made: SavedInit | None = None
    assigned: bool = False
    keys: Mapping[str, PyTree] | None = None
    parameters: int = 0
    bytes: int = 0
    versions: Mapping[str, str] = {}
    file: str = ""

    @property
    def ready(self) -> bool:
        """Whether there are variables."""
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
    """All that a command may change."""

    root: RootKey
    models: Mapping[str, ModelEntry] = {}
    opened: tuple[str, Draw] | None = None
    """A draw whose `params` an init took, and the model whose next apply takes the rest of it."""
    runs: RunLog | None = None
    seeds: Mapping[int, tuple[int, str]] = {}
    """seed → the last draw that was made under it before it was started again, and the PRNG implementation."""
    waiting: Mapping[str, SavedModel] = {}
    """Variables that were read from a file, by the name of the model that they wait for."""

    def after(self, kept: StoredRun, draw: Draw, entry: ModelEntry | None, opened: tuple[str, Draw] | None) -> State:
        """The state once a run has succeeded. A replay moves neither the root nor a draw that is open."""
        root, opened = (self.root, self.opened) if kept.facts.replayed else (self.root.after(draw), opened)
        models = self.models if entry is None else with_entry(self.models, entry)
        waiting = self.waiting and self._still_waiting(entry)
        log = RunLog.add(self.runs, kept)
        return replace(self, root=root, models=models, opened=opened, runs=log, waiting=waiting)

    def with_variables(self, entry: ModelEntry) -> State:
        """The state once the user has given a model other variables."""
        return replace(self, models=with_entry(self.models, entry), waiting=self._still_waiting(entry))

    def restarted(self, root: RootKey, *, fresh: bool) -> tuple[State, Restart]:
        """The state with another root key, nothing open; what was drawn under the old seed can still be found.

        Args:
          fresh: every model is to be initialised anew at its next use.
        """
        models = self.models
        if fresh:
            models = {
                name: replace(
                    entry.with_variables(None, entry.source if entry.model.holds_variables else None),
                    rebuild_next=entry.model.holds_variables,
                )
                for name, entry in models.items()
            }
        to_build = {name for name, entry in models.items() if entry.rebuild_next and entry.built is not None}
        keeping = tuple(name for name, entry in models.items() if entry.ready and name not in to_build)
        restart = Restart(root.seed, fresh, keeping, again=self._last(root.seed)[0] > 0)
        seeds = {**self.seeds, self.root.seed: self._last(self.root.seed)}
        waiting = {} if fresh else self.waiting
        return State(root, models, None, self.runs, seeds, waiting), restart

    def _still_waiting(self, entry: ModelEntry | None) -> Mapping[str, SavedModel]:
        """What waits once `entry` has variables: no older ones for the same model."""
        if entry is None or not entry.ready:
            return self.waiting
        return {name: model for name, model in self.waiting.items() if name != entry.name}

    def _last(self, seed: int) -> tuple[int, str]:
        """The last draw that was made under `seed`, 0 for none, and its PRNG implementation."""
        last = self.seeds.get(seed, (0, ""))
        if seed != self.root.seed or not self.root.draws:
            return last
        return max(last[0], self.root.draws), self.root.impl

    def find_draw(self, wanted: int | tuple[int, int] | None) -> Draw | None:
        """An earlier draw by its number, or by `(seed, number)`. Raises FlaxMagicsError if it was never made."""
        if wanted is None:
            return None
        seed, number = self.check_draw(wanted)
        impl = self._last(seed)[1]
        with jax.default_prng_impl(impl) if hasattr(jax, "default_prng_impl") else contextlib.nullcontext():
            root = RootKey.from_seed(seed)
        for _ in range(number - 1):
            root = root.after(root.draw())
        return root.draw()

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
    """What restarting the root key means for what is there: models that keep variables, a seed that was used before."""

    seed: int
    fresh: bool
    keeping: tuple[str, ...]
    again: bool
