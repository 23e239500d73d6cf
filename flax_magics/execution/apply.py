"""Works out an init or an apply: the Run, and what the session keeps of it. The session is not changed here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import FrameType

import jax
from msgspec.structs import replace

from ..base.digest import bytes_of, owned_copy
from ..base.measures import Timing, devices_of
from ..base.processes import OFTEN
from ..base.threads import all_ready, smallest
from ..code.library import library
from ..compile.cache import Services
from ..compile.compiler import devices_in, with_peak
from ..compile.initialise import made_of
from ..compile.placement import in_force
from ..compile.reasons import WINDOW, of_programs
from ..errors import FlaxMagicsError
from ..line.options import ApplyOptions
from ..models.base import Commit
from ..rng.keys import Draw, DrawBatch, RunKeys
from ..run import DrawNumber, Note, Run
from ..state import runs
from ..state.entry import InitRecipe, LinenEntry, ModelEntry, Origin
from ..state.models import replaced_by_init
from ..state.runs import RepeatedRun, StoredRun
from ..state.state import State
from ..state.weights import WeightSource
from . import notes, record
from .build import renewed
from .call import Call, initialising, prepare_init
from .execute import ApplyRequest, Execution, execute, plain_errors
from .notes import OUTDATED, outdated_own, with_notes_of_output
from .plan_cache import LastRun
from .record import Applied, Outcome, recipe_of, stored_init
from .surroundings import around

LOOKED_AT = 4_000_000
"""Outputs of at most this many bytes are checked for NaN in every run; a larger one only if its report is shown."""


def apply_model(
    state: State, entry: ModelEntry, call: Call, options: ApplyOptions, services: Services, *, said: tuple[Note, ...]
) -> Applied:
    """Runs an apply for which no plan is kept: mode, needs, program and notes are all worked out.

    Args:
      said: notes from finding the entry, such as a module that the name now stands for.

    Raises:
      FlaxMagicsError: a mistake in the call. What the model raises is passed on.
    """
    library.look()
    entry.model.has_same_layout()  # forgets it if not
    name = entry.name
    replayed = state.find_draw(options.keys_of)
    opened = state.opened
    # An apply continues the draw that an init of its model opened. Without variables (an edit dropped them) it must
    # initialise again: in a new draw, because the open draw's `params` key is used.
    shares = replayed is None and opened is not None and opened[0] == name and entry.ready
    begin = replayed or (opened[1] if shares and opened else state.root.draw())
    draw = begin if options.samples is None else _series(state, begin, options)
    started = time.time()
    users_entry = entry
    anew = entry.rebuild_next and entry.built is not None and replayed is None and options.variables is None
    # `--fresh` marked this NNX module: it is built again in this draw, whose `params` key the run then finds used.
    if anew:
        entry, shares = renewed(entry, begin, taken=shares), True
    others = next((note.write or note.form for note in said if note.kind == "weights"), None)
    placement = in_force(state.placement)
    execution = execute(
        ApplyRequest(entry, call, options, draw, services, params_taken=shares, others=others, placement=placement)
    )
    result, variables, bound = execution.result, execution.variables, execution.request.bound
    commit = bound.model.commit(result.updates, result.trace)
    changed = commit.changed
    updated = changed if options.keeps else ()
    after = _after(execution, updated)
    keys_in_call = dict(notes.keys_in(execution.arguments, services.seen, options.key))
    collections = {*execution.built.request.variables, *result.updates, *result.sown}
    of_mode = notes.of_mode(name, bound, execution.mode, result.trace)
    steady = (*of_mode, *notes.of_mutable(options.mutable, collections, execution.request.line))
    run_notes = [*said, *steady, *_notes(execution, keys_in_call)]
    if replayed is not None:
        # Notes where this run drew other random numbers than the run that made the draw.
        # The last of them: of an init and an apply that shared the draw, the apply.
        for stored in runs.of_draw(state.runs, replayed.seed, replayed.number)[-1:]:
            run_notes += notes.compare(replayed.number, stored.record, result.trace)
    if entry.outdated and variables.made is None and options.variables is None:
        run_notes.append(outdated_own(name) if entry.built_by_user else OUTDATED)
    if execution.built.causes:
        earlier = runs.causes_of(state.runs, name, WINDOW)
        run_notes += of_programs(execution.request.line, execution.built.causes, earlier, execution.arguments.leaf)
    run = record.run_of_apply(
        execution,
        changed,
        notes=tuple(run_notes),
        started=started,
        made=made_of(entry.nnx.model.collections()) if anew else variables.made,
        changed={collection: after.update_counts[collection] for collection in sorted(updated)},
        dropped=() if options.keeps else tuple(sorted(changed)),
        first=state.runs is None,
        registered="" if name in state.models else entry.model.describe(),
    )
    if sum(map(bytes_of, jax.tree_util.tree_leaves(run.output))) <= LOOKED_AT:
        run = with_notes_of_output(run)
    write = None
    if anew:
        users_model, new_model = users_entry.nnx.model, entry.nnx.model
        after = replace(after, model=users_model)

        # NNX: the updates go into the new module first; then the user's object takes over all of that module's values.
        def write() -> None:
            if options.keeps:
                commit.make()
            users_model.become(new_model)

    elif variables.moved:
        module = after.nnx.model

        def write() -> None:
            module.assign(variables.values)
            if options.keeps:
                commit.make()

    recipe = recipe_of(execution)
    leaves = jax.tree_util.tree_leaves(execution.built.request.variables)
    # NumPy arrays are copied: the user may write into them before a replay.
    stored = StoredRun(run, Origin(recipe, list(map(owned_copy, leaves))), recipe.size)
    outcome = Outcome(run, stored, draw, after, write=write, commit=commit if options.keeps else None)
    return Applied(outcome, execution, recipe, steady, tuple(keys_in_call.values()))


def _after(execution: Execution, changed: Iterable[str]) -> ModelEntry:
    """The entry after the run: what the run wrote, and what was learned about the call (its needs, its static ints).

    Args:
      changed: the collections to keep.
    """
    entry, bound = execution.variables.entry, execution.request.bound
    method = bound.call.method
    entry = replace(
        entry,
        known_needs={**entry.known_needs, (method, bound.mode): execution.result.needs},
        static_ints=entry.static_ints | {(method, name) for name in execution.arguments.forced},
        update_counts={**entry.update_counts, **{name: entry.update_counts.get(name, 0) + 1 for name in changed}},
    )
    # An NNX module holds its variables itself: the commit writes them.
    if changed and entry.variables is not None:
        entry = replace(entry, variables={**entry.variables, **execution.result.updates})
    return entry


def _notes(execution: Execution, keys_in_call: Mapping[str, bytes]) -> Iterator[Note]:
    """Yields the notes that depend on this run's keys, variables and arguments, not on its line alone."""
    request, trace = execution.request, execution.result.trace
    bound, options, line = request.bound, request.options, request.line
    known = {name for needs in request.entry.known_needs.values() for name in needs.streams}
    # Streams that earlier runs asked for were noted then.
    yield from notes.of_streams(trace, known)
    if options.keys_of is None:  # a replay reuses its keys on purpose
        yield from notes.of_keys(keys_in_call, request.services.seen, line)
    yield from notes.of_unused(bound.switch, (*keys_in_call, *options.key), trace.unused, line)
    if execution.variables.made is not None:
        yield from notes.of_params(execution.variables.values)
    if options.samples is not None and options.samples > 1:
        yield from notes.of_samples(bound, options, trace, line)
    yield from notes.of_scalars(execution.built.scalars, line)
    if bound.own_rngs and not trace.asked:
        yield Note("rngs", "rngs: yours, draw unused")


def _series(state: State, begin: Draw, options: ApplyOptions) -> DrawBatch:
    """The `--samples K` consecutive draws from `begin` on. Raises FlaxMagicsError for a replay of draws never made."""
    # `True` is an int, but no number of samples.
    size = options.samples
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise FlaxMagicsError(f"--samples takes a number of samples, 1 or more, not {size!r}.")
    if options.keys_of is not None:
        state.find_draw((begin.seed, begin.number + size - 1))
    return DrawBatch(begin, size)


def apply_again(
    last: LastRun, state: State, entry: ModelEntry, call: Call, services: Services, *, caller: FrameType
) -> Outcome | None:
    """An apply of a line that has a plan. Returns None, with nothing changed, where something it depends on differs.

    What is left to check, and all that the session keeps of the run, is worked out while the device runs.

    Args:
      caller: the frame that calls; see `around`.
    """
    placement = state.placement
    if last.recipe.placement is not (None if placement is None or placement.is_single else placement):
        return None
    started, programs, plan = time.time(), services.programs, last.plan
    program, inputs = plan.program, last.inputs(entry, call, programs)
    if inputs is None or program is None:
        return None
    # Checking takes some 20 µs, which are nothing to a long run; a long one that nobody wants would be much.
    if not last.brief and (around(caller) is not None or not last.holds(entry, programs)):
        return None
    draw, wait, variables = state.root.draw(), 0.0, inputs.variables
    # Now and then the processes of a job exchange where they are: the long way begins with that.
    if placement is not None and draw.number % OFTEN == 0 and placement.processes is not None:
        return None
    keys = plan.keys(draw)
    try:
        if inputs.pending:
            begin = services.clock()
            if not all_ready(inputs.pending):
                services.on_phase(f"waiting for the inputs of {entry.name}")
                jax.block_until_ready(inputs.pending)
            wait = services.clock() - begin
        running = programs.begin(program, variables, keys, inputs.arguments)
    except Exception:  # `apply_model` runs it again, and reports the error with its advice
        return None
    try:
        # The program is pure: where it turns out that another one is wanted, its result is dropped.
        checked = not last.brief or (around(caller) is None and last.holds(entry, programs, running))
        library.look()  # the first in a cell takes some tenths of a millisecond, so the device works meanwhile
        if not checked or library.edition != last.library:
            with suppress(Exception):  # it is nobody's; but what is left of it would count as a part of the next run
                running.finish(lambda: services.on_phase(f"running {entry.name}"))
            return None
        output, updates, sown = plan.parted(running.result, program.trace)
        source = entry.source
        after: ModelEntry | None = None
        changed: dict[str, int] = {}
        commit: Commit | None = None
        # Leaves that neither this plan nor the session put there: the user's code changed the variables.
        if inputs.fresh and source is not None:
            source = source.now(variables, entry.update_counts)
            if source is not entry.source:
                after = replace(entry, source=source)
        if updates:
            commit = plan.model.commit(updates, program.trace)
            changed = {name: entry.update_counts.get(name, 0) + 1 for name in sorted(commit.changed)}
            if changed:
                after = replace(after or entry, update_counts={**entry.update_counts, **changed})
            if entry.variables is not None:
                after = replace(after or entry, variables={**variables, **updates})
        origin, leaves, size = last.stored(inputs, call.args, None if state.runs is None else state.runs.last)
        drawn = draw, started, call.cell, source
        stored: StoredRun
        stored = repeated = RepeatedRun(last.line, output, origin, leaves, size=size, sown=sown, drawn=drawn)
        if changed:
            repeated.changed = changed
        running.look()
        state_after = state.after(stored, draw, after, None)
        state_after.root.draw(plan.folded)
        try:
            seconds = running.finish(lambda: services.on_phase(f"running {entry.name}"), last.seconds)
        except Exception:
            return None
        # Another thread has written what the run would write over.
        if commit is not None and commit.write is None and last.is_overtaken(entry, inputs):
            return None
        # Nobody has seen them yet.
        repeated.times = seconds, wait
        memory = last.line.template.memory
        # Of a program's memory figures only the device's peak changes from run to run.
        if memory is not None and memory.peak is not None:
            repeated.memory = with_peak(memory, devices_in((output, updates, sown)))
        arrays, noted = (output, (call.args, inputs.kwargs), sown), None
        copy, has_nan = last.look_through(output)
        if has_nan:
            noted = with_notes_of_output(repeated.run_of(*arrays))
            stored = StoredRun(noted, origin, size, leaves)
            state_after = state.after(stored, draw, after, None)
    except BaseException:
        programs.unfinished.wait = smallest(running.result)
        raise
    # The reason for the next new program is found by comparing with this run.
    programs.parts[entry.name] = last.parts
    committed = partial(last.wrote, inputs, updates, seconds)
    return Outcome(noted, stored, draw, after, None, None, commit, committed, state_after, arrays, copy)


def init_model(
    entry: LinenEntry,
    state: State,
    call: Call,
    services: Services,
    *,
    keys_of: DrawNumber | None,
    limit: int,
    said: tuple[Note, ...],
) -> Outcome:
    """Runs an init of a linen model.

    Args:
      keys_of: number of an earlier draw whose `params` key is used; None makes the next draw.
      limit: bytes of replaced variables that may be kept, see `replaced_by_init`.
      said: notes from finding the entry.

    Raises:
      FlaxMagicsError: a mistake in the call. What the model raises is passed on.
    """
    name, model, clock = entry.name, entry.model, services.clock
    to_init, init_call = prepare_init(name, model, call)
    opened = state.find_draw(keys_of, opens=True) or state.root.draw()
    services.on_phase(f"initialising {name}")
    started, start = time.time(), clock()
    with plain_errors(call):
        variables, init_record = initialising(to_init, init_call, opened, services.programs.units).finish()
    seconds = clock() - start
    source = WeightSource.initialised(opened, variables)
    replaced, more = replaced_by_init(entry, limit)
    facts = record.facts_of_init(call, model)
    run = Run(
        command="init",
        model=name,
        mode="",
        call=call.text,
        inputs=(call.args, init_call.kwargs),
        output=variables,
        seed=opened.seed,
        draw=opened.number,
        keys=RunKeys.of(opened, "params"),
        device=devices_of(variables),
        started=started,
        program="eager",
        timing=Timing(init=seconds),
        cell=call.cell,
        made=made_of(variables),
        notes=(*said, *more, *notes.of_params(variables)),
        by_hand=model.init_by_hand(call.text, call.method, facts.init_arguments, facts.init_module),
        weights=source.describe(opened.seed),
        replayed=keys_of is not None,
        first=state.runs is None,
        registered="" if name in state.models else model.describe(),
        spelling=facts,
    )
    recipe = InitRecipe(entry.without_variables(), call.method, model.other_arrays())
    entry = replace(entry.with_variables(variables, source, init_record), replaced=replaced)
    # An init opens its draw for the model's next apply; with an earlier draw's key it opens none.
    return Outcome(run, stored_init(run, recipe), opened, entry, opened=None if keys_of is not None else (name, opened))
