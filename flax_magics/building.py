"""NNX modules that the session builds, as draws: on a magic's line, by `%flax_init`, and anew after `--fresh`.

Works on one State and gives another; what is to be written into the user's own object comes back as a function.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from . import origin, records, registry
from .construct import Built, Recipe, keys_of
from .errors import FlaxMagicsError, written
from .execution import plain_errors
from .history import Kept
from .keeping import replaced_by_init
from .keys import Draw
from .models import adopt, spell_construction
from .origin import Origin, bytes_of
from .pinned import arrays_in
from .prepare import Call
from .registry import Change, Entry
from .run import Run
from .state import State
from .weights import Source


@dataclass(frozen=True)
class Building:
    """How modules are built: `clock` gives seconds, `on_phase` is told what begins."""

    clock: Callable[[], float]
    on_phase: Callable[[str], None]

    def build(
        self, state: State, name: str, recipe: Recipe, cell: int | None = None
    ) -> tuple[State, Change, Kept | None]:
        """`state` with the module of `recipe`: the one that is there, if it was built of the same; or a new one.

        Also what became of the name, and the run, if it was built.
        """
        old = state.models.get(name)
        saved = state.waiting.get(name)
        if saved is not None and saved.keys is not None:
            restored = self._restored(state, name, recipe, saved.keys)
            if restored is not None:
                return restored
        if old is not None and old.built is not None and not old.stale:
            print_ = recipe.print()
            if print_ is not None and print_ == old.built.print:
                return state, registry.unchanged(old), None
            # An edit: what the old keys give now is held against what is there.
            module = recipe.build(old.built.keys)
            built = Built.of(recipe, old.built.keys)
            entry, change = registry.register_holding(old, name, adopted(module, name, recipe), built)
            if change.state == "unchanged":
                return replace(state, models={**state.models, name: replace(entry, built=built)}), change, None
            if change.variables == "kept":
                return replace(state, models={**state.models, name: entry}), change, None
            changes = change.changes
        else:
            changes = ()
        now = state.root.draw()
        started, start = time.time(), self.clock()
        keys = keys_of(now)
        self.on_phase(f"building {name}")
        model = adopted(recipe.build(keys), name, recipe)
        run = records.of_build(
            name, recipe, model, now, keys, started, self._since(start, model), cell=cell, first=state.runs is None
        )
        entry, change = registry.register_holding(None, name, model, Built.of(recipe, keys))
        entry = replace(entry, source=_source(now, model))
        if old is not None:
            change = Change(name, "changed", changes, "own")
        kept = _kept(name, recipe, run)
        found = None
        if name in state.waiting:
            from . import restoring

            found = restoring.matched(state.waiting, entry, change)
        if found is None:
            return state.after(kept, now, entry, (name, now)), change, kept
        entry, change = found
        after = state.after(kept, now, entry, (name, now))
        return (replace(after, waiting=state.waiting) if change.unfit else after), change, kept

    def _restored(
        self, state: State, name: str, recipe: Recipe, keys: Mapping[str, Any]
    ) -> tuple[State, Change, None] | None:
        """With the module that a session which was saved had built, and its variables; None where they do not fit.

        No draw: it was made then, and its keys are those of that time.
        """
        model = adopted(recipe.build(keys), name, recipe)
        entry, change = registry.register_holding(None, name, model, Built.of(recipe, keys))
        from . import restoring

        now, change = restoring.registered(state, entry, change)
        return None if change.unfit else (now, change, None)

    def rebuild(self, state: State, entry: Entry, call: Call, draw: Any, limit: int) -> Rebuilt:
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
            model = adopted(recipe.build(keys), name, recipe)
        seconds = self._since(start, model)
        run = records.of_build(
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
        own: Any = entry.model
        replaced, notes = replaced_by_init(entry, limit)
        if notes:
            run = replace(run, notes=(*run.notes, *notes))
        entry = replace(
            entry,
            built=Built.of(recipe, keys),
            updates={},
            outdated=False,
            stale=False,
            first=model.sample(),
            source=_source(now, model),
            replaced=replaced,
        )
        return Rebuilt(run, now, entry, lambda: own.become(model), _kept(name, recipe, run))

    def _since(self, start: float, model: Any) -> float:
        """Seconds since `start`, once what `model` holds is there."""
        jax.block_until_ready(model.collections())
        return self.clock() - start


def _source(draw: Draw, model: Any) -> Source:
    return Source.initialised(draw, model.collections(), in_module=True)


def _kept(name: str, recipe: Recipe, run: Run) -> Kept:
    """A construction as the session keeps it."""
    pinned = tuple(arrays_in((recipe.args, recipe.kwargs)))
    size = sum(map(bytes_of, (*jax.tree_util.tree_leaves(run.inputs), *pinned)))
    return Kept(run, Origin(origin.Built(name, recipe, recipe.print(), pinned), []), size)


@dataclass(frozen=True)
class Rebuilt:
    """A module that was built anew: its run, the entry as it is to be kept, and what writes it into the user's object."""

    run: Run
    draw: Draw
    entry: Entry
    write: Callable[[], None]
    kept: Kept


def renewed(entry: Entry, draw: Draw, *, taken: bool) -> Entry:
    """The entry of a stale module with one that is built anew in `draw`; the user's own object is as it was.

    Args:
      taken: see `Draw.stream`, of `params` alone.
    """
    assert entry.built is not None
    recipe = entry.built.recipe
    keys = keys_of(draw, taken=taken)
    model = adopted(recipe.build(keys), entry.name, recipe)
    built, first = Built.of(recipe, keys), model.sample()
    return replace(entry, model=model, built=built, stale=False, first=first, source=_source(draw, model))


def adopted(module: Any, name: str, recipe: Recipe) -> Any:
    """The Model of a module that `recipe` built."""
    return replace(adopt(module, name), written=recipe.text)  # type: ignore[type-var]
