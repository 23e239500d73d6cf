"""NNX modules that the session builds, as draws: on a magic's line, by `%flax_init`, and anew after `--fresh`.

Works on one State and gives another; what is to be written into the user's own object comes back as a function.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from ..base.digest import bytes_of
from ..code.walk import arrays_in
from ..errors import FlaxMagicsError, written
from ..models.base import ModelWithVariables
from ..models.construction import BuiltBySession, Construction, adopt_built, keys_of, spell_construction
from ..rng.keys import Draw
from ..run import Run
from ..state import entry, models
from ..state.entry import ModelEntry, Origin
from ..state.models import Registration, replaced_by_init
from ..state.runs import StoredRun
from ..state.state import State
from ..state.weights import WeightSource
from . import record
from .call import Call
from .execute import plain_errors


@dataclass(frozen=True)
class Building:
    """How modules are built: `clock` gives seconds, `on_phase` is told what begins."""

    clock: Callable[[], float]
    on_phase: Callable[[str], None]

    def register_all(
        self, state: State, modules: Mapping[str, Any], anew: Container[str] = (), cell: int | None = None
    ) -> tuple[State, list[Registration], list[StoredRun]]:
        """The state with all of `modules`, what became of each, and the runs of those that were built now.

        See `Session.register_all` for the arguments.
        """
        changes, builds = [], []
        for name, module in modules.items():
            state, change, build = self.register(state, name, module, anew=name in anew, cell=cell)
            changes.append(change)
            builds += [] if build is None else [build]
            gone = change.variables in ("dropped", "own") and not isinstance(module, Construction)
            if (gone or change.unfit) and state.opened is not None and state.opened[0] == name:
                state = replace(state, opened=None)  # its `params` went into variables that are no more
        return state, changes, builds

    def register(
        self, state: State, name: str, module: Any, *, anew: bool, cell: int | None
    ) -> tuple[State, Registration, StoredRun | None]:
        """The state with one module, what became of the name, and the run if the module was built now."""
        if isinstance(module, Construction):
            entry, change, run, draw = self.build(state, name, module, cell)
            if run is not None and draw is not None:
                return state.after(run, draw, entry, (name, draw)), change, run
        else:
            old = state.models.get(name)
            if old is not None and anew and old.model.holds_variables and old.built is None:
                old = None
            entry, change = models.register(old, name, module)
        return replace(state, models={**state.models, name: entry}), change, None

    def build(
        self, state: State, name: str, recipe: Construction, cell: int | None = None
    ) -> tuple[ModelEntry, Registration, StoredRun | None, Draw | None]:
        """The module of `recipe`: the one that is there, if it was built of the same; or a new one, in the next draw.

        Returns:
          What the session is to keep of it, what became of the name, and of one that was built its run and draw.
        """
        old = state.models.get(name)
        if old is not None and old.built is not None and not old.rebuild_next:
            print_ = recipe.fingerprint()
            if print_ is not None and print_ == old.built.fingerprint:
                return old, models.unchanged(old), None, None
            # An edit: what the old keys give now is held against what is there.
            entry, change = built_with(old, name, recipe, old.built.keys)
            if change.state == "unchanged":
                return replace(entry, built=BuiltBySession.of(recipe, old.built.keys)), change, None, None
            if change.variables == "kept":
                return entry, change, None, None
            changes = change.changes
        else:
            changes = ()
        now = state.root.draw()
        started, start = time.time(), self.clock()
        keys = keys_of(now)
        self.on_phase(f"building {name}")
        model = adopt_built(recipe.build(keys), recipe.text)
        run = record.run_of_build(
            name, recipe, model, now, keys, started, self._since(start, model), cell=cell, first=state.runs is None
        )
        entry, change = models.register_holding(None, name, model, BuiltBySession.of(recipe, keys))
        entry = replace(entry, source=_source(now, model))
        if old is not None:
            change = Registration(name, "changed", changes, "own")
        return entry, change, _kept(name, recipe, run), now

    def rebuild(self, state: State, entry: ModelEntry, call: Call, draw: Any, limit: int) -> BuildResult:
        """`init` of a model that holds its variables: the same construction again, into the same object.

        Args:
          limit: see `replaced_by_init`.

        Raises:
          FlaxMagicsError: the user's own code built the module.
        """
        name = entry.name
        if entry.built is None:
            raise FlaxMagicsError(
                f"`{name}` was built by your own code, with rngs of its own: only that code can build it anew."
                " On a line, without rngs, the session builds it.",
                **written(spell_construction(type(entry.model.module), "%flaxmodel", name=name)),
            )
        recipe = entry.built.recipe
        now = state.find_draw(draw) or state.root.draw()
        self.on_phase(f"building {name}")
        started, start = time.time(), self.clock()
        keys = keys_of(now)
        with plain_errors(call):
            model = adopt_built(recipe.build(keys), recipe.text)
        seconds = self._since(start, model)
        run = record.run_of_build(
            name,
            recipe,
            model,
            now,
            keys,
            started,
            seconds,
            call,
            cell=call.cell,
            replayed=draw is not None,
            first=state.runs is None,
        )
        registered = entry.model
        assert registered.holds_variables
        replaced, notes = replaced_by_init(entry, limit)
        if notes:
            run = replace(run, notes=(*run.notes, *notes))
        entry = replace(
            entry,
            built=BuiltBySession.of(recipe, keys),
            update_counts={},
            outdated=False,
            rebuild_next=False,
            initial_sample=model.sample(),
            source=_source(now, model),
            replaced=replaced,
        )
        return BuildResult(run, now, entry, lambda: registered.become(model), _kept(name, recipe, run))

    def _since(self, start: float, model: ModelWithVariables) -> float:
        """Seconds since `start`, once what `model` holds is there."""
        jax.block_until_ready(model.collections())
        return self.clock() - start


def _source(draw: Draw, model: ModelWithVariables) -> WeightSource:
    return WeightSource.initialised(draw, model.collections(), in_module=True)


def _kept(name: str, recipe: Construction, run: Run) -> StoredRun:
    """A construction as the session keeps it."""
    pinned = tuple(arrays_in((recipe.args, recipe.kwargs)))
    size = sum(map(bytes_of, (*jax.tree_util.tree_leaves(run.inputs), *pinned)))
    return StoredRun(run, Origin(entry.BuildRecipe(name, recipe, recipe.fingerprint(), pinned), []), size)


@dataclass(frozen=True)
class BuildResult:
    """A module that was built anew: its run, the entry as it is to be kept, and what writes it into the user's object."""

    run: Run
    draw: Draw
    entry: ModelEntry
    write: Callable[[], None]
    kept: StoredRun


def built_with(
    old: ModelEntry | None, name: str, recipe: Construction, keys: Mapping[str, Any]
) -> tuple[ModelEntry, Registration]:
    """The module of `recipe` built with keys of an earlier draw, held against `old`."""
    model = adopt_built(recipe.build(keys), recipe.text)
    return models.register_holding(old, name, model, BuiltBySession.of(recipe, keys))


def renewed(entry: ModelEntry, draw: Draw, *, taken: bool) -> ModelEntry:
    """The entry of a stale module with one that is built anew in `draw`; the user's own object is as it was.

    Args:
      taken: see `Draw.stream`, of `params` alone.
    """
    assert entry.built is not None
    recipe = entry.built.recipe
    keys = keys_of(draw, taken=taken)
    model = adopt_built(recipe.build(keys), recipe.text)
    built, first = BuiltBySession.of(recipe, keys), model.sample()
    return replace(
        entry, model=model, built=built, rebuild_next=False, initial_sample=first, source=_source(draw, model)
    )
