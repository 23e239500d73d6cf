"""What an init or an apply does to a state, worked out: the run, and what is to be kept of it. Nothing is changed here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from ..base.digest import bytes_of
from ..code.walk import arrays_in
from ..compile.cache import ProgramCache
from ..compile.initialise import Initialising, made_of
from ..compile.reasons import WINDOW, of_programs
from ..errors import FlaxMagicsError
from ..line.options import ApplyOptions
from ..line.variant import Line
from ..models.base import Commit
from ..rng.keys import Draw, DrawBatch
from ..run import Note, Run
from ..state import runs
from ..state.entry import ApplyRecipe, InitRecipe, ModelEntry, Origin
from ..state.models import replaced_by_init
from ..state.runs import StoredRun
from ..state.state import State
from ..state.weights import WeightSource
from . import notes, record
from .build import renewed
from .call import Call, prepare_init
from .execute import Execution, execute, plain_errors
from .notes import OUTDATED, SeenKeys, outdated_own, with_values
from .record import origin_of, without_variables

LOOKED_AT = 4_000_000
"""Bytes of an output up to which it is looked at for NaN in any run; of a larger one that is shown, then."""


@dataclass(frozen=True)
class AppliedRun:
    """An apply that is done.

    Attributes:
      draw: what it took from the root key.
      after: the model as it is to be kept.
      done: what the run found.
      write: what writes a module that was built anew into the user's own object; None where none was.
      commit: what the run changed in a module that holds its own variables.
      kept: the run as the session keeps it.
      how: what replays of its kind have in common.
    """

    run: Run
    draw: Draw | DrawBatch
    after: ModelEntry
    done: Execution
    write: Callable[[], None] | None
    commit: Commit | None
    kept: StoredRun
    how: ApplyRecipe


def apply_model(
    state: State,
    entry: ModelEntry,
    notes: tuple[Note, ...],
    call: Call,
    options: ApplyOptions,
    programs: ProgramCache,
    seen: SeenKeys,
    on_phase: Callable[[str], None],
) -> AppliedRun:
    """An apply where everything has to be found out; `notes` are on how the entry came to be.

    Raises:
      FlaxMagicsError: a mistake in the call. What the model raises is passed on.
    """
    name = entry.name
    replayed = state.find_draw(options.draw)
    opened = state.opened
    # Variables that an edit dropped took the opened draw's `params`: what comes now is a draw of its own.
    shares = replayed is None and opened is not None and opened[0] == name and entry.ready
    begin = replayed or (opened[1] if shares and opened else state.root.draw())
    now = begin if options.draws is None else _series(state, begin, options)
    started = time.time()
    registered = entry.model
    anew = entry.rebuild_next and entry.built is not None and replayed is None and options.variables is None
    if anew:
        entry, shares = renewed(entry, begin, taken=shares), True
    rebuilt = entry.model
    done = execute(entry, call, options, now, programs, seen, on_phase, params_taken=shares)
    kept, write, made = done.entry, None, done.made
    if anew and registered.holds_variables and rebuilt.holds_variables:
        kept, made = replace(kept, model=registered), made_of(rebuilt.collections())

        def write() -> None:
            if done.commit is not None:
                done.commit.make()
            registered.become(rebuilt)

    notes = (*notes, *done.notes)
    if replayed is not None:
        notes = (*notes, *_of_masks(state, replayed, done))
    if entry.outdated and done.made is None and options.variables is None:
        notes = (*notes, OUTDATED if not entry.model.holds_variables or entry.built else outdated_own(name))
    if done.causes:
        line = Line(call.command, call.text, done.prepared.signature)
        earlier = runs.causes_of(state.runs, name, WINDOW)
        notes = (*notes, *of_programs(line, done.causes, earlier, done.ready.arguments.leaf))
    run = record.run_of_apply(
        name,
        call,
        done,
        now,
        started,
        notes,
        made,
        replayed=replayed is not None,
        first=state.runs is None,
    )
    if sum(map(bytes_of, jax.tree_util.tree_leaves(run.output))) <= LOOKED_AT:
        run = with_values(run)
    origin = origin_of(entry, options, done, call.method)
    assert isinstance(origin.how, ApplyRecipe)
    return AppliedRun(run, now, kept, done, write, done.commit, StoredRun(run, origin, origin.how.size), origin.how)


def _of_masks(state: State, draw: Draw, done: Execution) -> Iterator[Note]:
    """Where a run with an earlier draw's keys drew other numbers than that draw's own run."""
    for kept in runs.of_draw(state.runs, draw.seed, draw.number)[-1:]:
        if kept.record is not None:
            yield from notes.compare(draw.number, kept.record, done.ready.record)


def _series(state: State, begin: Draw, options: ApplyOptions) -> DrawBatch:
    """The draws of a run that takes many, from `begin` on. A replay may go no further than what was drawn."""
    size = options.draws
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise FlaxMagicsError(f"--draws takes a number of draws, 1 or more, not {size!r}.")
    if options.draw is not None:
        state.find_draw((begin.seed, begin.number + size - 1))
    return DrawBatch(begin, size)


@dataclass(frozen=True)
class InitialisedRun:
    """An init that is done: the run, the draw that it opens, and the model with its variables."""

    run: Run
    draw: Draw
    entry: ModelEntry
    kept: StoredRun


def init_model(
    state: State,
    entry: ModelEntry,
    notes: tuple[Note, ...],
    call: Call,
    draw: Any,
    programs: ProgramCache,
    clock: Callable[[], float],
    on_phase: Callable[[str], None],
    limit: int,
) -> InitialisedRun:
    """An init of a linen model.

    Args:
      draw: an earlier one whose key it takes, None for the next.
      limit: see `replaced_by_init`.

    Raises:
      FlaxMagicsError: a mistake in the call. What the model raises is passed on.
    """
    name = entry.name
    prepared = prepare_init(name, entry.model, call)
    now = state.find_draw(draw) or state.root.draw()
    on_phase(f"initialising {name}")
    started, start = time.time(), clock()
    with plain_errors(call):
        variables, made = Initialising(
            prepared.model, call.method, prepared.args, prepared.kwargs, draw=now, units=programs.units
        ).finish()
    seconds = clock() - start
    inputs, first = (prepared.args, prepared.kwargs), state.runs is None
    source = WeightSource.initialised(now, variables)
    replaced, more = replaced_by_init(entry, limit)
    run = record.run_of_init(
        entry,
        call,
        inputs,
        variables,
        now,
        started,
        seconds,
        (*notes, *more),
        weights=source.describe(now.seed),
        replayed=draw is not None,
        first=first,
    )
    how = InitRecipe(without_variables(entry), call.method, tuple(arrays_in(entry.model.module)))
    size = sum(map(bytes_of, (*jax.tree_util.tree_leaves(inputs), *how.pinned)))
    entry = replace(
        entry, variables=variables, init=made, update_counts={}, outdated=False, source=source, replaced=replaced
    )
    return InitialisedRun(run, now, entry, StoredRun(run, Origin(how, []), size))
