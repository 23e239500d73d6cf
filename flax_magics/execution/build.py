"""Builds NNX modules as draws: on a magic's line, by `%flax_init`, and again after `--fresh`.

A State goes in and a new one comes out; what must be written into the user's own object is returned as a function.
"""

from __future__ import annotations

import time
from collections.abc import Container, Mapping

import jax
from msgspec.structs import replace

from ..base.measures import Timing, devices_of
from ..code.walk import arrays_in
from ..compile.cache import Services
from ..compile.initialise import made_of
from ..errors import FlaxMagicsError, written
from ..models.base import ModelWithVariables
from ..models.construction import BuiltBySession, Construction, adopt_built, keys_of, spell_construction
from ..rng.keys import Draw
from ..run import DrawNumber, Note, Run
from ..state import models
from ..state.entry import BuildRecipe, ModelEntry, NnxEntry
from ..state.models import Registration, replaced_by_init
from ..state.runs import StoredRun
from ..state.state import State, with_entry
from ..state.weights import WeightSource
from .call import Call
from .execute import plain_errors
from .record import Outcome, stored_init

RegisterResult = tuple[State, Registration, StoredRun | None]
"""The state with the module registered, what registering did, and the run of the construction, None without one."""


class Building:
    """Registers modules, and builds those that are given as a `Construction`.

    Args:
      services: the session's programs, clock and progress callback.
      limit: the most bytes to keep of variables that an edit drops.
    """

    def __init__(self, services: Services, limit: int) -> None:
        self.services, self.limit = services, limit

    def register_all(
        self, state: State, modules: Mapping[str, object], anew: Container[str] = (), cell: int | None = None
    ) -> tuple[State, list[Registration], list[StoredRun]]:
        """Registers `modules`. Returns the new state, what became of each, and the runs of those that were built.

        See `Session.register_all` for the arguments.
        """
        changes, builds = [], []
        for name, module in modules.items():
            state, change, build = self.register(state, name, module, anew=name in anew, cell=cell)
            changes.append(change)
            builds += [] if build is None else [build]
            # "none": a linen model has taken the place of a module that the session built.
            gone = change.variables in ("dropped", "own") or (change.state, change.variables) == ("changed", "none")
            gone = gone and not isinstance(module, Construction)
            if (gone or change.unfit) and state.opened is not None and state.opened[0] == name:
                state = replace(state, opened=None)  # the open draw's `params` key made variables that are dropped now
        return state, changes, builds

    def register(self, state: State, name: str, module: object, *, anew: bool, cell: int | None) -> RegisterResult:
        """Registers one module. Returns the state, what became of the name, and the run if the module was built."""
        if isinstance(module, Construction):
            return self._build(state, name, module, cell)
        old = state.models.get(name)
        # The name had been deleted, so a module that the user's code built is a new one, not an edit.
        if old is not None and anew and old.built_by_user:
            old = None
        entry, change = models.register(old, name, module, self.limit)
        return replace(state, models=with_entry(state.models, entry)), change, None

    def _build(self, state: State, name: str, recipe: Construction, cell: int | None) -> RegisterResult:
        """`register` for a Construction: keeps the module that an equal one built, else builds in the next draw."""
        old = state.models.get(name)
        changes: tuple[str, ...] = ()
        notes: tuple[Note, ...] = ()
        replaced = None if old is None else old.replaced
        if old is not None and old.built is not None and not old.rebuild_next:
            fingerprint = recipe.fingerprint()
            if fingerprint is not None and fingerprint == old.built.fingerprint:
                return state, models.unchanged(old), None
            # After an edit, build with the old keys: no draw is made if that gives the same, or the old variables fit.
            entry, change = built_with(old, name, recipe, old.built.keys, self.limit)
            if change.state == "unchanged":
                # The next comparison then ends at the fingerprints.
                entry = replace(entry, built=BuiltBySession.of(recipe, old.built.keys))
            if change.variables == "kept":
                return replace(state, models={**state.models, name: entry}), change, None
            changes, notes, replaced = change.changes, change.notes, entry.replaced
        draw = state.root.draw()
        model, run = _build_in(state, draw, name, recipe, self.services)
        run = replace(run, cell=cell)
        entry = _built(NnxEntry(name, model, model.fingerprint()), model, recipe, run.keys, draw)
        entry = replace(entry, replaced=replaced)
        change = (
            Registration(name, "new") if old is None else Registration(name, "changed", changes, "own", notes=notes)
        )
        stored = _stored(name, recipe, run)
        return state.after(stored, draw, entry, (name, draw)), change, stored


def rebuild(
    entry: NnxEntry,
    state: State,
    call: Call,
    services: Services,
    *,
    keys_of: DrawNumber | None,
    limit: int,
    said: tuple[Note, ...],
) -> Outcome:
    """Runs the construction of an NNX module again (`%flax_init`); the commit moves its values into the user's object.

    Args:
      keys_of: number of an earlier draw whose keys are used; None makes the next draw.
      limit: bytes of replaced variables that may be kept, see `replaced_by_init`.
      said: notes from finding the entry.

    Raises:
      FlaxMagicsError: the user's own code built the module, or it has no such method.
    """
    name = entry.name
    entry.model.signature(call.method)
    if entry.built is None:
        raise FlaxMagicsError(
            f"`{name}` was built by your own code, with rngs of its own: only that code can build it anew."
            " On a line, without rngs, the session builds it.",
            **written(spell_construction(type(entry.model.module), "%flaxmodel", name=name)),
        )
    recipe = entry.built.recipe
    opened = state.find_draw(keys_of, opens=True) or state.root.draw()
    with plain_errors(call):
        model, run = _build_in(state, opened, name, recipe, services)
    users_model = entry.model
    replaced, notes = replaced_by_init(entry, limit)
    facts = {"call": call.text, "inputs": (call.args, call.kwargs), "cell": call.cell, "replayed": keys_of is not None}
    run = replace(run, **facts, notes=(*said, *notes))
    entry = _built(entry, model, recipe, run.keys, opened)
    entry = replace(entry, update_counts={}, outdated=False, replaced=replaced, training=None)
    opens = None if keys_of is not None else (name, opened)
    return Outcome(run, _stored(name, recipe, run), opened, entry, opens, lambda: users_model.become(model))


def _build_in(
    state: State, draw: Draw, name: str, recipe: Construction, services: Services
) -> tuple[ModelWithVariables, Run]:
    """Builds the module of `recipe` with the keys of `draw`. Returns it and the Run that records it."""
    clock = services.clock
    started, start = time.time(), clock()
    keys = keys_of(draw)
    services.on_phase(f"building {name}")
    model = adopt_built(recipe.build(keys), recipe.text)
    # JAX computes asynchronously: without waiting, the time would be that of the dispatch.
    jax.block_until_ready(model.collections())
    seconds = clock() - start
    variables = model.state()
    run = Run(
        command="init",
        model=name,
        mode="",
        call=recipe.text,
        inputs=(recipe.args, dict(recipe.kwargs)),
        output=variables,
        seed=draw.seed,
        draw=draw.number,
        keys=keys,
        device=devices_of(variables),
        started=started,
        program="eager",
        timing=Timing(init=seconds),
        made=made_of(model.collections()),
        by_hand=recipe.by_hand(name),
        # Only the words are needed here, so no arrays are marked.
        weights=WeightSource.initialised(draw, {}).describe(draw.seed),
        first=state.runs is None,
    )
    return model, run


def _built(
    entry: NnxEntry, model: ModelWithVariables, recipe: Construction, keys: Mapping[str, jax.Array], draw: Draw
) -> NnxEntry:
    """Completes the entry of `model`, which `recipe` has just built with `keys` of `draw`."""
    built, sample = BuiltBySession.of(recipe, keys), model.sample()
    source = WeightSource.initialised(draw, model.collections(), in_module=True)
    return replace(entry, built=built, rebuild_next=False, initial_sample=sample, source=source)


def _stored(name: str, recipe: Construction, run: Run) -> StoredRun:
    pinned = tuple(arrays_in((recipe.args, recipe.kwargs)))
    return stored_init(run, BuildRecipe(name, recipe, recipe.fingerprint(), pinned))


def built_with(
    old: ModelEntry | None, name: str, recipe: Construction, keys: Mapping[str, jax.Array], limit: int = 0
) -> tuple[ModelEntry, Registration]:
    """Builds the module of `recipe` with keys of an earlier draw, and compares it with `old`; `limit` as in `Building`."""
    model = adopt_built(recipe.build(keys), recipe.text)
    entry = NnxEntry(name, model, None, built=BuiltBySession.of(recipe, keys))
    return models.compare(old, entry.registered(), limit)


def renewed(entry: ModelEntry, draw: Draw, *, taken: bool) -> ModelEntry:
    """Builds the module of an entry that `--fresh` marked again, in `draw`; the user's own object stays untouched.

    Args:
      taken: whether the draw's `params` key is used already, see `Draw.stream`.
    """
    assert entry.built is not None
    recipe = entry.built.recipe
    keys = keys_of(draw, taken=taken)
    model = adopt_built(recipe.build(keys), recipe.text)
    return _built(replace(entry.nnx, model=model), model, recipe, keys, draw)
